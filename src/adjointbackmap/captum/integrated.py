"""Captum's ``IntegratedGradients`` without steps, and the error of Captum's own with them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.analysis.integrals import baselines as as_batch
from adjointbackmap.analysis.integrals import mean_hyperplane
from adjointbackmap.analysis.lines import FLOAT64, RegionLine, region_line
from adjointbackmap.captum.adjoint import (
    AdjointBackMap,
    Target,
    indicator,
    refuse_other_inputs,
)
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.pattern import check_images

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class SamplingError:
    r"""How far Captum's integrated gradients with some steps are from the exact ones.

    Attributes:
        sampled: Captum's attributions, ``(N, C, H, W)``.
        exact: The exact ones, ``(N, C, H, W)``.
        pixels: :math:`\sum |sampled - exact| / \sum |exact|` over the pixels, ``(N,)``.
        total: :math:`|\sum sampled - (c(x) - c(x'))| / |c(x) - c(x')|`, ``(N,)``. Captum's
            convergence delta measures this sum alone.
    """

    sampled: Tensor
    exact: Tensor
    pixels: Tensor
    total: Tensor


class ExactIntegratedGradients:
    r"""Captum's ``IntegratedGradients`` without ``n_steps``: exact for a piecewise-affine model.

    The attributions are :math:`(x - x') \sum_r (t_{r+1} - t_r) H_I^{(r)}` over the linear regions
    of the segment from the baseline, see :func:`adjointbackmap.integrated_gradients`. They are
    computed in float64, and returned in the dtype of the inputs.

    Args:
        model: Any module that :func:`adjointbackmap.trace` takes, in eval mode.
        multiply_by_inputs: Whether to multiply by :math:`x - x'`. Without it, the result is the
            mean gradient on the segment.
        layer: A module of the model, or the name of a layer, whose units are targets; ``None`` for
            the model's output.

    Raises:
        ValueError: If ``layer`` is not a module of the model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.rand(2, 1, 5, 5)
        >>> exact = ExactIntegratedGradients(model)
        >>> image, delta = exact.attribute(x, target=1, return_convergence_delta=True)
        >>> image.shape, bool(delta.abs().max() < 1e-6)
        (torch.Size([2, 1, 5, 5]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        multiply_by_inputs: bool = True,
        *,
        layer: nn.Module | str | None = None,
    ) -> None:
        self.model = model
        self.multiply_by_inputs = multiply_by_inputs
        self.layer = layer
        self._traced = AdjointBackMap(model, layer)

    def attribute(
        self,
        inputs: Inputs,
        baselines: Inputs | float | int | tuple[float | int, ...] | None = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int | None = None,
        method: str | None = None,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Exact integrated gradients of one unit, or of a sum of units, for each input.

        Args:
            inputs: A batch ``(N, C, H, W)``, or a tuple that holds one batch.
            baselines: A batch, one image, or a number; by default 0.
            target: The unit, as :meth:`AdjointBackMap.attribute` takes it. A callable is refused.
            additional_forward_args: Must be ``None``: a network takes one image and nothing else.
            n_steps: Captum's argument, which has no effect: nothing is sampled.
            method: Captum's argument, which has no effect.
            internal_batch_size: Captum's argument, which has no effect: batches fit the memory.
            return_convergence_delta: Whether to return the sum of the attributions minus the
                change of the unit, ``(N,)``. It is zero to rounding for a continuous network, and
                minus the sum of the jumps for one that jumps.

        Returns:
            Attributions in the shape and dtype of ``inputs``, as a tuple if they are a tuple. With
            ``return_convergence_delta``, a pair of these and the deltas.

        Raises:
            ValueError: If the target does not choose units of the layer, or the inputs do not fit
                the model.
        """
        refuse_other_inputs(inputs, additional_forward_args, False)
        x = _only(inputs)
        slopes, change, difference = self._integrated(x, _only(baselines), target)
        image = difference * slopes
        delta = image.flatten(1).sum(1) - change
        found = (image if self.multiply_by_inputs else slopes).to(x.dtype)
        given = (found,) if isinstance(inputs, tuple) else found
        return (given, delta.to(x.dtype)) if return_convergence_delta else given

    def sampling_error(
        self,
        inputs: Tensor,
        baselines: Tensor | float | int | None = None,
        target: Target = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
    ) -> SamplingError:
        """Error of Captum's own ``IntegratedGradients``, which samples the segment.

        Args:
            inputs: A batch ``(N, C, H, W)``.
            baselines: A batch, one image, or a number; by default 0.
            target: The unit of the model's output.
            n_steps: Captum's number of steps.
            method: Captum's rule: ``"gausslegendre"``, ``"riemann_left"``, ``"riemann_right"``,
                ``"riemann_middle"`` or ``"riemann_trapezoid"``.

        Raises:
            ImportError: If Captum is not installed.
            ValueError: If this is for a layer other than the output.
        """
        if self.layer is not None:
            msg = "sampling_error is for the model's output. Got a layer: leave layer out."
            raise ValueError(msg)
        try:
            from captum.attr import IntegratedGradients
        except ImportError as error:
            msg = "sampling_error needs Captum: pip install captum."
            raise ImportError(msg) from error
        slopes, change, difference = self._integrated(inputs, baselines, target)
        exact = difference * slopes
        start = inputs - difference.to(inputs.dtype)
        sampled = IntegratedGradients(self.model).attribute(
            inputs, start, target=target, n_steps=n_steps, method=method
        )
        sampled = sampled.detach().double()
        gap = (sampled - exact).abs().flatten(1).sum(1)
        pixels = gap / exact.abs().flatten(1).sum(1)
        total = (sampled.flatten(1).sum(1) - change).abs() / change.abs()
        return SamplingError(sampled, exact, pixels, total)

    def lines(
        self, inputs: Tensor, baselines: Tensor | float | int | None = None
    ) -> list[RegionLine]:
        """The regions on the segment from the baseline to each input.

        Args:
            inputs: A batch ``(N, C, H, W)``.
            baselines: A batch, one image, or a number; by default 0.
        """
        network, images, start = self._ends(inputs, baselines)
        return [region_line(network, a, b) for a, b in zip(start, images, strict=True)]

    def _ends(self, x: Tensor, baselines: Any) -> tuple[Network, Tensor, Tensor]:
        network = self._traced.network(x)
        images = check_images(network, x, FLOAT64)
        return network, images, as_batch(network, 0.0 if baselines is None else baselines, images)

    def _integrated(
        self, x: Tensor, baselines: Any, target: Target
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean gradients, changes of the units, and differences to the baselines.

        Raises:
            ValueError: If the target does not choose units.
        """
        network, images, start = self._ends(x, baselines)
        if callable(target):
            msg = (
                "target must choose units. Got a callable: wrap the model in a module that "
                "gives it."
            )
            raise ValueError(msg)
        layer = network.layers[OUTPUT]
        seeds = indicator(network, layer.out_shape, target, images)
        means = [
            mean_hyperplane(region_line(network, first, last), {layer.value.slot: seed[None]})[0]
            for first, last, seed in zip(start, images, seeds, strict=True)
        ]
        before, after = (
            record(network, points, [layer]).outputs[OUTPUT].detach() for points in (start, images)
        )
        change = ((after - before) * seeds).flatten(1).sum(1)
        return torch.stack(means), change, images - start


def _only(inputs: Any) -> Any:
    """The one input of a tuple."""
    return inputs[0] if isinstance(inputs, tuple) else inputs
