"""Exactness as functions: dot test, dense test, reconstruction test, and every unit of every layer of some images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import Recorded, record, record_call
from adjointbackmap.engine.operators import Basis, LayerOperator, basis, push, reached
from adjointbackmap.engine.pattern import ActivationPattern, check_images, check_scale, pattern_of
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.engine.rounding import SHARE, drawn, path_sizes, scale_of_rounding
from adjointbackmap.engine.sweep import Sweep, sums_of_products
from adjointbackmap.engine.workspace import held, vectors_within
from adjointbackmap.exactness.layer_check import SHARE_LIMIT, LayerCheck, checks_of, larger
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.query import Query
from adjointbackmap.rules import Value

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def dot_test(
    operator: LayerOperator, seed: int = 0, tolerance: float | None = None
) -> dict[str, float]:
    r"""Whether forward and adjoint are each other's transpose: :math:`\langle J u | v \rangle = \langle u | J^* v \rangle`.

    Args:
        operator: The linear map of a layer.
        seed: Of the random vectors.
        tolerance: Largest difference, relative to the norms, or to those of what cancelled on the way; by
            default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``{"forward": <J u|v>, "adjoint": <u|J* v>, "error": relative difference}``, for all images together.

    Raises:
        RuntimeError: If the difference is larger than ``tolerance``.

    Example:
        >>> from adjointbackmap.engine.operators import operator
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval().double()
        >>> x = torch.rand(1, 1, 5, 5).double()
        >>> dot_test(operator(trace(model, x), x, "1"))["error"] < 1e-12
        True
    """
    pattern = operator.pattern
    n = pattern.images
    dtype = pattern.dtype
    device = pattern.network.device
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(device, dtype)

    image = draw(*operator.in_shape)
    bias = draw(operator.bias_length)
    v = draw(*operator.out_shape)
    out = operator.forward(image, bias)
    back_image, back_bias = operator.adjoint(v)
    forward = float((out * v).double().sum())
    adjoint = float((image * back_image).double().sum() + (bias * back_bias).double().sum())
    scale = float(out.double().norm() * v.double().norm()) or 1.0
    error = abs(forward - adjoint) / scale
    if not error <= _limit(dtype, tolerance):
        # the paths to the layer may cancel, so that what is left of the map is rounding
        summed = _paths_of_tangent(operator, image, bias)
        scale = max(scale, SHARE * float(summed.double().norm() * v.double().norm()))
        error = abs(forward - adjoint) / scale
    return _judged(
        {"forward": forward, "adjoint": adjoint, "error": error}, dtype, tolerance, "The dot test"
    )


def dense_test(
    operator: LayerOperator, x: Tensor, tolerance: float | None = None
) -> dict[str, float]:
    """Whether the dense matrix is the Jacobian of the untouched model, from ``torch.func.jacrev``.

    The image part is held against the Jacobian by the image, and each bias part that stands for a
    parameter of the model against the Jacobian by that parameter.

    Args:
        operator: The linear map of a layer.
        x: The images that it was made for, ``(N, C, H, W)`` or ``(C, H, W)``.
        tolerance: Largest difference, relative to the largest entry; by default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``{"image": relative difference, "bias": relative difference, "error": the larger}``.

    Raises:
        RuntimeError: If the difference is larger than ``tolerance``.
    """
    network = operator.pattern.network
    layer = operator.layer
    dtype = operator.pattern.dtype
    x = check_images(network, x, dtype)
    parameters = {name: p.detach().to(dtype) for name, p in network.model.named_parameters()}
    buffers = {
        n: b.to(dtype) if b.is_floating_point() else b for n, b in network.model.named_buffers()
    }

    def output(values: dict[str, Tensor], image: Tensor) -> Tensor:
        swapped = {**parameters, **buffers, **values}
        return record_call(network, image[None], [layer], swapped).outputs[layer.name][0]

    ours_image, ours_bias = operator.dense()
    tensors = {**parameters, **buffers}
    named = {
        _first_name(network.model, p.parameter): p
        for p in network.biases_in(dtype).values()
        if p.parameter is not None
    }
    parts = {
        name: part for name, part in named.items() if tensors[name].is_floating_point()
    }  # others have no derivative
    chosen = {name: tensors[name] for name in parts}
    image_error = bias_error = 0.0
    for n, image in enumerate(x):
        by_values, by_image = torch.func.jacrev(output, (0, 1))(chosen, image)
        image_error = larger(image_error, _difference(ours_image[n], by_image))
        for name, part in parts.items():
            theirs = by_values[name].reshape(*layer.out_shape, part.value.numel())
            bias_error = larger(bias_error, _difference(ours_bias[n][..., part.slice], theirs))
    figures = {"image": image_error, "bias": bias_error, "error": larger(image_error, bias_error)}
    return _judged(figures, dtype, tolerance, "The dense test")


def reconstruction_test(planes: Hyperplanes, tolerance: float | None = None) -> dict[str, float]:
    r"""Whether :math:`\langle [x; b] | H \rangle` is what the untouched model computes.

    The error is relative to the scale of the rounding, :math:`\sum |x h_I| + \sum |b h_b|`. Where these terms
    are far smaller than what was summed along the paths, because paths cancel, it is relative to that.

    Args:
        planes: Hyperplanes of any units.
        tolerance: Largest scale-aware error; by default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``{"error": largest scale-aware error, "relative": largest |relative error|, "share": share of units <= 1 %}``.

    Raises:
        RuntimeError: If the error is larger than ``tolerance``; the message names the worst unit.
    """
    difference = (planes.reconstruct() - planes.value).abs()
    scale = planes.magnitude().clamp_min(torch.finfo(planes.value.dtype).tiny)
    if not bool((difference <= _limit(planes.value.dtype, tolerance) * scale).all()):
        scale = scale_of_rounding(scale, _paths_of(planes))  # the terms may have cancelled
    scaled = difference / scale
    relative = planes.relative_error().abs()
    worst = int(scaled.argmax())
    figures = {
        "error": float(scaled.max()),
        "relative": float(relative.max()),
        "share": float((relative <= SHARE_LIMIT).double().mean()),
    }
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), scaled.shape)]
    what = f"The reconstruction of unit {place} of {planes.layer} ({planes.mode}), value {float(planes.value.flatten()[worst]):.6g},"
    return _judged(figures, planes.value.dtype, tolerance, what)


def _paths_of_tangent(operator: LayerOperator, image: Tensor, bias: Tensor) -> Tensor:
    """Size of what is summed along the paths of a tangent [x; b], ``(N, *out_shape)``."""
    pattern = operator.pattern
    target = operator.layer.value
    with exact(image.device):
        return path_sizes(pattern, image, [target], bias)[target.slot]


def _paths_of(planes: Hyperplanes) -> Tensor:
    """Size of what is summed along the paths to every unit, ``(N, *units)``, see :func:`path_sizes`."""
    network = planes.network
    layer = network.layer(planes.layer)
    chosen = (layer, planes.mode, planes.own_bias, planes.units)
    query = Query(network, planes.x, *chosen, planes.scale, None, planes.memory)
    pattern = pattern_of(network, planes.x, planes.scale)
    read = layer.value if planes.own_bias else network.kernel(layer, planes.x.dtype).input
    with exact(planes.x.device):
        sizes = path_sizes(pattern, planes.x, [read])[read.slot]
        draws = drawn(sizes, torch.Generator().manual_seed(1)).unbind(1)
        squares = [query.values(Recorded({layer.name: d}, {layer.name: d})).square() for d in draws]
    return torch.stack(squares).mean(0).sqrt()


@dataclass(frozen=True)
class Terms:
    """What is verified of every image, and in which arithmetic.

    Attributes:
        layers: Names of the layers.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the pattern.
        dtype: Of the network's values and the hyperplanes.
        accumulate: Of the inner products.
        memory: Bytes that a batch of tangents may take; ``None`` for the batch that is fast.
    """

    layers: tuple[str, ...]
    own_bias: bool
    scale: float
    dtype: torch.dtype
    accumulate: torch.dtype
    memory: int | None = None


def verify_images(
    network: Network,
    images: Tensor,
    names: Sequence[str],
    terms: Terms,
    report: Callable[[float], None] = lambda share: None,
) -> list[dict[str, LayerCheck]]:
    """Hold every unit of some layers at images, which are computed as one batch, against its explicit hyperplane.

    See :func:`adjointbackmap.verify`.

    Args:
        network: Traced network.
        images: Batch, see :func:`adjointbackmap.engine.sweep.images_at_once`.
        names: Of each image.
        terms: What is verified.
        report: Called with the share that is done.

    Returns:
        For each image, name of a layer -> its errors.
    """
    x = check_images(network, images, terms.dtype)
    layers = [network.layer(key) for key in terms.layers]
    network.check_unchanged()
    most = vectors_within(terms.memory, held(network.program(x.dtype).steps), x.dtype.itemsize)
    pattern = pattern_of(network, x, check_scale(terms.scale), most)
    kernels = {
        layer.name: network.kernel(layer, x.dtype)
        for layer in layers
        if layer.kernel is not None and not terms.own_bias
    }
    targets = {
        layer.name: kernels[layer.name].sum if layer.name in kernels else layer.value
        for layer in layers
    }
    checks: list[dict[str, LayerCheck]] = [{} for _ in names]
    with exact(x.device):
        recorded = record(network, x, layers)
        totals = _inner_products(network, x, pattern, targets, terms, report)
        paths = path_sizes(pattern, x, targets.values())
        for key, (sums, terms_of_units) in totals.items():
            scales = scale_of_rounding(terms_of_units, paths[targets[key].slot])
            value = (
                kernels[key].apply(recorded.inputs[key])
                if key in kernels
                else recorded.outputs[key]
            )
            for found, check in zip(
                checks, checks_of(key, value, sums, scales, names), strict=True
            ):
                found[key] = check
    return checks


def _inner_products(
    network: Network,
    x: Tensor,
    pattern: ActivationPattern,
    targets: dict[str, Value],
    terms: Terms,
    report: Callable[[float], None],
) -> dict[str, Tensor]:
    """Sums of x h and of |x h| for every unit of the targets, ``(2, N, *units)`` each.

    A bias's tangent starts at its own layer, a pixel's is windowed.
    """
    accumulate = terms.accumulate
    totals = {
        name: x.new_zeros(2, len(x), *value.shape, dtype=accumulate)
        for name, value in targets.items()
    }
    entries = network.biases_in(x.dtype).vector.expand(len(x), -1)
    extended = torch.cat([x.flatten(1), entries], 1).to(accumulate)
    biases = reached(pattern.program, targets.values()) - {IMAGE}
    _add_columns(pattern, extended, basis(pattern, biases), targets, totals)
    if x.dim() > 2:
        sweep = Sweep(pattern, targets.values(), room=terms.memory)
        _add_pixels(x.to(accumulate), sweep, targets, totals, report)
    else:
        _add_columns(pattern, extended, basis(pattern, {IMAGE}), targets, totals)
    report(1.0)
    return totals


def _add_pixels(
    x: Tensor,
    sweep: Sweep,
    targets: dict[str, Value],
    totals: dict[str, Tensor],
    report: Callable[[float], None],
) -> None:
    """Add what the pixels contribute, by windowed tangents."""
    groups = list(sweep.groups())
    for done, group in enumerate(groups):
        report(done / len(groups))
        tangents = sweep.run(group)
        factors = x[(slice(None), slice(None), *group.places().T)].transpose(1, 2).contiguous()
        for name, value in targets.items():
            products = sweep.inner(group, tangents[value.slot], factors, value.shape)
            if products is not None:
                totals[name] += products


def _add_columns(
    pattern: ActivationPattern,
    extended: Tensor,
    bases: Iterable[Basis],
    targets: dict[str, Value],
    totals: dict[str, Tensor],
) -> None:
    for b in bases:
        columns = push(pattern, b.tangents, targets.values())
        factors = extended[:, b.start : b.stop]
        for name, value in targets.items():
            column = columns[value.slot]
            if column is not None:
                rows = column.flatten(1).unflatten(0, factors.shape).to(factors.dtype)
                totals[name] += sums_of_products(factors, rows).unflatten(2, value.shape)


def _first_name(model: torch.nn.Module, name: str) -> str:
    """The first of the names of a parameter or buffer that a model holds under several."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return next(other for other, tensor in tensors.items() if tensor is tensors[name])


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return float((ours - theirs).abs().max()) / (scale or 1.0) if theirs.numel() else 0.0


def _limit(dtype: torch.dtype, tolerance: float | None) -> float:
    return TOLERANCE[dtype] if tolerance is None else tolerance


def _judged(
    figures: dict[str, float], dtype: torch.dtype, tolerance: float | None, what: str
) -> dict[str, float]:
    limit = _limit(dtype, tolerance)
    if not figures["error"] <= limit:
        listed = ", ".join(f"{name} {figure:.6g}" for name, figure in figures.items())
        msg = f"{what} must have an error of at most {limit:.0e}. Got {listed}."
        raise RuntimeError(msg)
    return figures
