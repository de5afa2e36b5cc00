"""One tangent [x; b] against the untouched model, layer by layer: was any bias or operation missed?"""

import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.operators import push
from adjointbackmap.engine.pattern import check_images, pattern_of
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.engine.rounding import SHARE, path_sizes

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def audit(
    network: Network,
    x: Tensor,
    tolerance: float | None = None,
    dtype: torch.dtype | str | None = None,
) -> dict[str, float]:
    r"""Whether the tangent [x; b] gives, at every layer, what the untouched model computes there.

    It finds a bias or an operation that the trace missed or got wrong. It repeats the forward pass, so it proves nothing
    about the rounding of hyperplanes: :func:`adjointbackmap.verify` does.

    Args:
        network: Traced network.
        x: Image or batch.
        tolerance: Largest error; by default 1e-10 in float64 and 1e-3 in float32.
        dtype: ``torch.float64`` for more than the model's own precision.

    Returns:
        Name of a layer -> largest difference, relative to the layer's largest value, or to what cancelled
        on the way to it, see :func:`adjointbackmap.engine.rounding.path_sizes`.

    Raises:
        RuntimeError: If one is larger than ``tolerance``; the message names the first such layer, and its operations.

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
    limit = TOLERANCE[images.dtype] if tolerance is None else tolerance
    errors: dict[str, float] = {}
    for layer in layers:
        ours = values[layer.value.slot]
        theirs = recorded[layer.name]
        largest = float(theirs.abs().max())
        errors[layer.name] = _difference(ours, theirs, largest)
        if not errors[layer.name] <= limit:
            # the values may be so small because the paths to them cancel
            cancelled = path_sizes(pattern, images, [layer.value])[layer.value.slot]
            largest = max(largest, SHARE * float(cancelled.max()))
            errors[layer.name] = _difference(ours, theirs, largest)
        if not errors[layer.name] <= limit:
            _refuse_nan(network)
            made_by = _culprits(network, layer, errors)
            msg = (
                f"The tangent [x; b] must repeat the model at every layer to {limit:.0e}. Got {errors[layer.name]:.2e} first at "
                f"{layer.name!r} ({layer.kind}), made by {made_by}: trace it again, or report this network."
            )
            raise RuntimeError(msg)
    return errors


def _refuse_nan(network: Network) -> None:
    """Name the weights that are no numbers.

    Raises:
        ValueError: If there are some.
    """
    named = (*network.model.named_parameters(), *network.model.named_buffers())
    wrong = [n for n, t in named if t.is_floating_point() and bool(t.isnan().any())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        msg = (
            f"Weights must be numbers. Got NaN in {', '.join(wrong[:3])}{more}: load other weights."
        )
        raise ValueError(msg)


def _difference(ours: Tensor | None, theirs: Tensor, largest: float) -> float:
    """Largest difference of a layer's values, relative to a size."""
    return float((theirs - (0 if ours is None else ours)).abs().max()) / (largest or 1.0)


def _culprits(network: Network, layer: Layer, seen: dict[str, float]) -> str:
    """The operations between the layers that agree and the first that does not."""
    program = network.program()
    agreed = [network.layer(name).value for name in seen if name != layer.name]
    right = {step.output.slot for step in program.upstream(agreed)}
    steps = [step for step in program.upstream([layer.value]) if step.output.slot not in right]
    return ", ".join(dict.fromkeys(step.op for step in steps)) or "nothing of its own"
