"""The audit: one tangent [x; b] is compared with the untouched model, layer by layer."""

import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.operators import push
from adjointbackmap.engine.pattern import check_images, pattern_of
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.engine.rounding import CANCELLED_SHARE, path_sizes

# Largest relative difference that rounding explains.
AUDIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def audit(
    network: Network,
    x: Tensor,
    tolerance: float | None = None,
    dtype: torch.dtype | str | None = None,
) -> dict[str, float]:
    r"""Compare the tangent [x; b] with the untouched model at every layer.

    A bias or an operation that the trace missed or got wrong makes a difference. The audit repeats
    the forward pass only, so it proves nothing about the rounding of hyperplanes. For that see
    :func:`adjointbackmap.verify`.

    Args:
        network: Traced network.
        x: Image or batch.
        tolerance: Largest error; by default 1e-10 in float64 and 1e-3 in float32.
        dtype: ``torch.float64`` for more than the model's own precision.

    Returns:
        Name of a layer -> largest difference, relative to the layer's largest value. If larger
        numbers cancelled on the way to the layer, it is relative to a share of these, see
        :func:`adjointbackmap.engine.rounding.path_sizes`.

    Raises:
        RuntimeError: If a difference is larger than ``tolerance``. The message names the first such
            layer and its operations.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval().double()
        >>> x = torch.rand(1, 1, 5, 5).double()
        >>> max(audit(trace(model, x), x).values()) < 1e-12
        True
    """
    images = check_images(network, x, dtype)
    network.check_unchanged()
    layers = network.distinct_layers()
    pattern = pattern_of(network, images, 1.0)
    entries = {e.slot: e.value.expand(len(images), *e.value.shape) for e in pattern.program.entries}
    recorded = record(network, images, layers).outputs
    with exact(images.device):
        values = push(pattern, {IMAGE: images, **entries}, [layer.value for layer in layers])
    limit = AUDIT_TOLERANCE[images.dtype] if tolerance is None else tolerance
    errors: dict[str, float] = {}
    for layer in layers:
        ours = values[layer.value.slot]
        theirs = recorded[layer.name]
        largest = float(theirs.abs().max())
        errors[layer.name] = _difference_relative_to(ours, theirs, largest)
        if not errors[layer.name] <= limit:
            # the values may be small because larger numbers cancel on the way to them
            cancelled = path_sizes(pattern, images, [layer.value])[layer.value.slot]
            largest = max(largest, CANCELLED_SHARE * float(cancelled.max()))
            errors[layer.name] = _difference_relative_to(ours, theirs, largest)
        if not errors[layer.name] <= limit:
            _refuse_nan(network)
            made_by = _culprits(network, layer, errors)
            msg = (
                f"The tangent [x; b] must repeat the model at every layer to {limit:.0e}. "
                f"Got {errors[layer.name]:.2e} first at {layer.name!r} ({layer.kind}), made by "
                f"{made_by}: trace it again, or report this network."
            )
            raise RuntimeError(msg)
    return errors


def _refuse_nan(network: Network) -> None:
    """Check that no weight is NaN.

    Raises:
        ValueError: If one is, with the names of up to three parameters or buffers.
    """
    named = (*network.model.named_parameters(), *network.model.named_buffers())
    wrong = [n for n, t in named if t.is_floating_point() and bool(t.isnan().any())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        msg = (
            f"Weights must be numbers. Got NaN in {', '.join(wrong[:3])}{more}: load other weights."
        )
        raise ValueError(msg)


def _difference_relative_to(ours: Tensor | None, theirs: Tensor, largest: float) -> float:
    """Largest difference of a layer's values, relative to ``largest``."""
    return float((theirs - (0 if ours is None else ours)).abs().max()) / (largest or 1.0)


def _culprits(network: Network, layer: Layer, seen: dict[str, float]) -> str:
    """Names of the operations between the layers that agree and the first that does not."""
    program = network.program()
    agreed = [network.layer(name).value for name in seen if name != layer.name]
    right = {step.output.slot for step in program.upstream(agreed)}
    steps = [step for step in program.upstream([layer.value]) if step.output.slot not in right]
    return ", ".join(dict.fromkeys(step.op for step in steps)) or "nothing of its own"
