"""Exact attributions for Quantus, and completeness under a tolerance as one of its metrics.

Quantus [Hedstroem2023] is loaded when a metric is made: ``pip install adjointbackmap[quantus]``.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.analysis.integrals import integrated_gradients
from adjointbackmap.captum.adjoint import AdjointBackMap
from adjointbackmap.tracing import trace

# arguments that a metric of Quantus must be given
REQUIRED = (
    *("normalise_func", "normalise_func_kwargs", "return_aggregate", "aggregate_func"),
    *("default_plot_func", "disable_warnings", "display_progressbar"),
)
# and those that its call must be given
CALLED_WITH = (
    *("a_batch", "s_batch", "channel_first", "explain_func", "explain_func_kwargs"),
    "model_predict_kwargs",
)
TOLERANCE = 1e-6  # of the sum of absolute attributions; those of float32 round to about 1e-7 of it


def explain(
    model: nn.Module,
    inputs: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    method: str = "integrated",
    baseline: float | int = 0.0,
    **_: Any,
) -> np.ndarray:
    """Exact attributions of class scores: an ``explain_func`` of Quantus.

    Args:
        model: A module that :func:`adjointbackmap.trace` takes, in eval mode.
        inputs: Images ``(N, C, H, W)``.
        targets: Class of each image, ``(N,)``.
        method: ``"integrated"`` for exact integrated gradients, which are complete;
            ``"contributions"`` for pixel times hyperplane, which leave out the biases.
        baseline: Value of all pixels of the baseline of integrated gradients.

    Returns:
        Attributions like the inputs, in their dtype.

    Raises:
        ValueError: If the method is unknown.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 1]]))
        >>> explain(model, np.ones((1, 1, 2, 2), np.float32), np.array([0])).tolist()
        [[[[1.0, 2.0], [3.0, 4.0]]]]
    """
    if method not in ("integrated", "contributions"):
        msg = f"method must be integrated or contributions. Got {method!r}: choose one of them."
        raise ValueError(msg)
    x = torch.as_tensor(inputs)
    classes = torch.as_tensor(targets).flatten().tolist()
    if method == "contributions":
        found = AdjointBackMap(model, multiply_by_inputs=True).attribute(x, target=classes)
        assert isinstance(found, Tensor)  # a tuple only for inputs that are one
        return found.detach().cpu().numpy()
    network = trace(model, x[:1])
    parts = [
        integrated_gradients(network, image, baseline, units=int(number)).image.reshape(x.shape[1:])
        for image, number in zip(x, classes, strict=True)
    ]
    return torch.stack(parts).to(x.dtype).cpu().numpy()


def completeness(tolerance: float = TOLERANCE, baseline: float | int = 0.0, **options: Any) -> Any:
    r"""A metric of Quantus: whether attributions sum to the change of the score, to a tolerance.

    An image passes if :math:`|\sum a - (c(x) - c(x'))| \le tolerance \sum |a|`. Quantus' own
    ``Completeness`` compares floats with ``==``. Even an exact method fails that by rounding.

    Args:
        tolerance: Largest error, relative to the sum of absolute attributions.
        baseline: Value of all pixels of :math:`x'`.
        options: Further arguments of ``quantus.metrics.base.Metric``. ``abs`` and ``normalise`` are
            false by default: an attribution that is scaled or without its sign cannot be complete.

    Returns:
        The metric. It is called as those of Quantus, and gives a bool for each image.

    Raises:
        ImportError: If Quantus is not installed.
        ValueError: If the tolerance is negative.
    """
    if tolerance < 0:
        msg = f"tolerance must be at least 0. Got {tolerance}: give a share such as 1e-6."
        raise ValueError(msg)
    return _metric()(tolerance, float(baseline), {"abs": False, "normalise": False} | options)


@cache
def _metric() -> type:
    """The class of the metric.

    Raises:
        ImportError: If Quantus is not installed.
    """
    try:
        from quantus.helpers.enums import DataType, EvaluationCategory, ModelType, ScoreDirection
        from quantus.metrics.base import Metric
    except ImportError as error:
        msg = "This metric needs Quantus: pip install 'adjointbackmap[quantus]'."
        raise ImportError(msg) from error

    class CompletenessWithin(Metric):  # type: ignore[misc]
        """Completeness under a tolerance, see :func:`completeness`."""

        name = "Completeness under a tolerance"
        data_applicability = frozenset({DataType.IMAGE, DataType.TIMESERIES, DataType.TABULAR})
        model_applicability = frozenset({ModelType.TORCH})
        score_direction = ScoreDirection.HIGHER
        evaluation_category = EvaluationCategory.AXIOMATIC

        def __init__(self, tolerance: float, baseline: float, options: dict[str, Any]) -> None:
            super().__init__(**dict.fromkeys(REQUIRED) | options)
            self.tolerance = tolerance
            self.baseline = baseline

        def __call__(
            self, model: Any, x_batch: np.ndarray, y_batch: np.ndarray, **options: Any
        ) -> Any:
            given = dict.fromkeys(CALLED_WITH) | {"softmax": False} | options
            return super().__call__(model, x_batch, y_batch, **given)

        def evaluate_batch(
            self,
            model: Any,
            x_batch: np.ndarray,
            y_batch: np.ndarray,
            a_batch: np.ndarray,
            **_: Any,
        ) -> list[bool]:
            numbers = np.arange(len(x_batch))
            ends = (x_batch, np.full_like(x_batch, self.baseline))
            shape = x_batch.shape
            taken = [model.shape_input(x, shape, channel_first=True, batched=True) for x in ends]
            scores = [np.asarray(model.predict(x))[numbers, y_batch] for x in taken]
            flat = a_batch.reshape(len(a_batch), -1).astype(float)
            gaps = np.abs(flat.sum(1) - (scores[0] - scores[1]).astype(float))
            return (gaps <= self.tolerance * np.abs(flat).sum(1)).tolist()

    return CompletenessWithin
