"""Tests of exactness: dot test, dense test, reconstruction test, and the check of all units."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import Recorded, record, record_call
from adjointbackmap.engine.operators import (
    Basis,
    LayerOperator,
    basis,
    push,
    reached,
    threads_of_tangents,
)
from adjointbackmap.engine.pattern import ActivationPattern, check_images, check_scale, pattern_of
from adjointbackmap.engine.program import IMAGE, Program
from adjointbackmap.engine.rounding import CANCELLED_SHARE, drawn, path_sizes, scale_of_rounding
from adjointbackmap.engine.sweep import Sweep, sums_of_products
from adjointbackmap.engine.threads import in_threads, one_thread
from adjointbackmap.engine.windows import Group
from adjointbackmap.engine.workspace import held, vectors_within
from adjointbackmap.exactness.layer_check import SHARE_LIMIT, LayerCheck, checks_of, larger
from adjointbackmap.exactness.nearest import NearestByIndex
from adjointbackmap.planes.hyperplane import Hyperplanes
from adjointbackmap.planes.query import Query
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import Gates

# Largest error of a test by default, about a thousand roundings of each dtype.
TEST_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
# A slope such as 0.2 differs by 1.5e-8 between float32 and float64. That is the same gate.
SLOPE_ROUNDING = 1e-6


def dot_test(
    operator: LayerOperator, seed: int = 0, tolerance: float | None = None
) -> dict[str, float]:
    r"""Test that forward and adjoint are each other's transpose.

    Then :math:`\langle J u | v \rangle = \langle u | J^* v \rangle` for random vectors u and v.

    Args:
        operator: The linear map of a layer.
        seed: Seed of the random vectors.
        tolerance: Largest difference, relative to the norms; by default 1e-12 in float64 and 1e-4
            in float32. Where paths to the layer cancel, it is relative to the norms of the terms
            that cancelled.

    Returns:
        ``{"forward": <J u|v>, "adjoint": <u|J* v>, "error": relative difference}``, for all images
        together.

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
        # paths to the layer may cancel, so that the output is little more than their rounding
        summed = _paths_of_tangent(operator, image, bias)
        scale = max(scale, CANCELLED_SHARE * float(summed.double().norm() * v.double().norm()))
        error = abs(forward - adjoint) / scale
    figures = {"forward": forward, "adjoint": adjoint, "error": error}
    return _judged(figures, dtype, tolerance, "The dot test")


def dense_test(
    operator: LayerOperator, x: Tensor, tolerance: float | None = None
) -> dict[str, float]:
    """Test that the dense matrix is the Jacobian of the untouched model.

    Frozen gates make another map than the Jacobian, so the matrix of a network with frozen gates is
    compared with the columns that :meth:`LayerOperator.forward` gives.

    The Jacobian is from ``torch.func.jacrev``. The image part is compared with the derivative with
    respect to the image. Each bias part of a parameter of the model is compared with the derivative
    with respect to that parameter.

    Args:
        operator: The linear map of a layer.
        x: The images for which it was made, ``(N, C, H, W)`` or ``(C, H, W)``.
        tolerance: Largest difference, relative to the largest entry; by default 1e-12 in float64
            and 1e-4 in float32.

    Returns:
        ``{"image": relative difference, "bias": relative difference, "error": the larger}``.

    Raises:
        RuntimeError: If the difference is larger than ``tolerance``.
    """
    network = operator.pattern.network
    layer = operator.layer
    dtype = operator.pattern.dtype
    x = check_images(network, x, dtype)
    if not network.is_derivative:
        return _judged(_rows_and_columns(operator), dtype, tolerance, "The dense test")
    parameters = {name: p.detach().to(dtype) for name, p in network.model.named_parameters()}
    buffers = {
        n: b.to(dtype) if b.is_floating_point() else b for n, b in network.model.named_buffers()
    }

    def output(values: dict[str, Tensor], image: Tensor) -> Tensor:
        swapped = {**parameters, **buffers, **values}
        return record_call(network, image[None], [layer], swapped).outputs[layer.name][0]

    ours_image, ours_bias = operator.dense()
    tensors = {**parameters, **buffers}
    parts = {}
    for part in network.biases_in(dtype).values():
        if part.parameter is not None:
            name = _first_name(network.model, part.parameter)
            if tensors[name].is_floating_point():  # integers have no derivative
                parts[name] = part
    chosen = {name: tensors[name] for name in parts}
    image_error = bias_error = 0.0
    for n, image in enumerate(x):
        with NearestByIndex():
            by_values, by_image = torch.func.jacrev(output, (0, 1))(chosen, image)
        image_error = larger(image_error, _relative_difference(ours_image[n], by_image))
        for name, part in parts.items():
            theirs = by_values[name].reshape(*layer.out_shape, part.value.numel())
            ours = ours_bias[n][..., part.slice]
            bias_error = larger(bias_error, _relative_difference(ours, theirs))
    figures = {"image": image_error, "bias": bias_error, "error": larger(image_error, bias_error)}
    return _judged(figures, dtype, tolerance, "The dense test")


def _rows_and_columns(operator: LayerOperator) -> dict[str, float]:
    """Differences of the matrix by cotangents from the same matrix by tangents."""
    images = operator.pattern.images
    image, bias = operator.dense()
    figures = {}
    for name, rows, shape in (
        ("image", image, operator.in_shape),
        ("bias", bias, (operator.bias_length,)),
    ):
        size = prod(shape)
        eye = torch.eye(size, dtype=rows.dtype, device=rows.device).view(size, *shape)
        columns = operator.forward(**{name: eye.expand(images, *eye.shape)})
        ours = rows.reshape(images, -1, size)
        figures[name] = _relative_difference(ours, columns.flatten(2).mT)
    return {**figures, "error": larger(*figures.values())}


def reconstruction_test(planes: Hyperplanes, tolerance: float | None = None) -> dict[str, float]:
    r"""Test that :math:`\langle [x; b] | H \rangle` is the value of the untouched model.

    The error is scale-aware: it is relative to the scale of the rounding,
    :math:`\sum |x h_I| + \sum |b h_b|`. Where paths cancel, these terms are far smaller than the
    sums along the paths. The error is then relative to those sums.

    Args:
        planes: Hyperplanes of any units.
        tolerance: Largest scale-aware error; by default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``"error"``, the largest scale-aware error; ``"relative"``, the largest |relative error|;
        and ``"share"``, the share of units with |relative error| <= 1 %.

    Raises:
        RuntimeError: If the error is larger than ``tolerance``; the message names the worst unit.
    """
    difference = (planes.reconstruct() - planes.value).abs()
    scale = planes.magnitude().clamp_min(torch.finfo(planes.value.dtype).tiny)
    if not bool((difference <= _limit(planes.value.dtype, tolerance) * scale).all()):
        scale = scale_of_rounding(scale, _paths_of(planes))  # paths may have cancelled
    scaled = difference / scale
    relative = planes.relative_error().abs()
    worst = int(scaled.argmax())
    value = float(planes.value.flatten()[worst])
    figures = {
        "error": float(scaled.max()),
        "relative": float(relative.max()),
        "share": float((relative <= SHARE_LIMIT).double().mean()),
    }
    unit = [int(i) for i in torch.unravel_index(torch.tensor(worst), scaled.shape)]
    what = (
        f"The reconstruction of unit {unit} of {planes.layer} ({planes.mode}), value {value:.6g},"
    )
    return _judged(figures, planes.value.dtype, tolerance, what)


def _paths_of_tangent(operator: LayerOperator, image: Tensor, bias: Tensor) -> Tensor:
    """Size of the terms along the paths of a tangent [x; b], ``(N, *out_shape)``."""
    pattern = operator.pattern
    target = operator.layer.value
    with exact(image.device):
        return path_sizes(pattern, image, [target], bias)[target.slot]


def _paths_of(planes: Hyperplanes) -> Tensor:
    """Size of the terms along the paths to each unit, ``(N, *units)``, see :func:`path_sizes`.

    A unit sums elements of the layer, or of its input if it has kernels alone. Their sizes get
    random signs, and the root of the mean square over some draws is the size of the sum.
    """
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
    """The layers to verify for each image, and the arithmetic.

    Attributes:
        layers: Names of the layers.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the pattern.
        dtype: Dtype of the hyperplanes.
        accumulate: Dtype of the inner products.
        memory: Largest size of a batch of tangents in bytes; ``None`` for the fastest batch.
        values: Dtype of the network's values and of the pattern; ``None`` for ``dtype``.
    """

    layers: tuple[str, ...]
    own_bias: bool
    scale: float
    dtype: torch.dtype
    accumulate: torch.dtype
    memory: int | None = None
    values: torch.dtype | None = None

    @property
    def measured(self) -> torch.dtype:
        """The dtype of the network's values."""
        return self.values or self.dtype


def verify_images(
    network: Network,
    images: Tensor,
    names: Sequence[str],
    terms: Terms,
    report: Callable[[float], None] = lambda share: None,
) -> list[dict[str, LayerCheck]]:
    """Compare all units of some layers with their explicit hyperplanes, for one batch of images.

    See :func:`adjointbackmap.verify`.

    Args:
        network: Traced network.
        images: Batch, see :func:`adjointbackmap.engine.sweep.images_per_sweep`.
        names: Name of each image.
        terms: The layers and the arithmetic.
        report: Called with the finished share.

    Returns:
        For each image, name of a layer -> its errors.
    """
    x = check_images(network, images, terms.dtype)
    seen = check_images(network, images, terms.measured)
    layers = [network.layer(key) for key in terms.layers]
    network.check_unchanged()
    most = vectors_within(terms.memory, held(network.program(x.dtype).steps), x.dtype.itemsize)
    with one_thread(x.device):
        pattern, differing = _pattern_for(network, x, seen, check_scale(terms.scale), most)
    kernels = {}
    targets = {}
    for layer in layers:
        targets[layer.name] = layer.value
        if layer.kernel is not None and not terms.own_bias:
            kernels[layer.name] = network.kernel(layer, seen.dtype)
            targets[layer.name] = network.kernel(layer, x.dtype).sum
    checks: list[dict[str, LayerCheck]] = [{} for _ in names]
    with exact(x.device):
        with one_thread(x.device):
            recorded = record(network, seen, layers)
            paths = path_sizes(pattern, x, targets.values())
        totals = _inner_products(network, x, pattern, targets, terms, report)
        for name, (sums, magnitudes) in totals.items():
            scales = scale_of_rounding(magnitudes, paths[targets[name].slot])
            value = recorded.outputs[name]
            if name in kernels:  # without the layer's own bias
                value = kernels[name].apply(recorded.inputs[name])
            flipped = _counts_before(pattern.program, targets[name], differing, len(x))
            of_images = checks_of(name, value, sums, scales, names)
            for found, check, count in zip(checks, of_images, flipped, strict=True):
                found[name] = replace(check, flipped=count)
    return checks


def _pattern_for(
    network: Network, x: Tensor, seen: Tensor, scale: float, most: int | None
) -> tuple[ActivationPattern, dict[int, Tensor]]:
    """The pattern of the images as the network saw them, in the dtype of the hyperplanes.

    Args:
        network: Traced network.
        x: Batch in the dtype of the hyperplanes.
        seen: The same batch in the dtype of the network's values.
        scale: The factor k.
        most: Largest batch of tangents.

    Returns:
        The pattern, and slot of a step's output -> number of its gates that differ between the two
        dtypes, ``(N,)``.
    """
    own = pattern_of(network, x, scale, most)
    if seen.dtype == x.dtype:
        return own, {}
    found = pattern_of(network, seen, scale).gates
    gates = {slot: tuple(_widened(t, x.dtype) for t in each) for slot, each in found.items()}
    differing = {slot: _differing(own.gates[slot], each) for slot, each in gates.items()}
    return replace(own, gates=gates), differing


def _widened(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """A gate in a dtype, if it is a slope; winners are whole numbers."""
    return gate.to(dtype) if gate.is_floating_point() else gate


def _differing(first: Gates, second: Gates) -> Tensor:
    """The number of gates that differ, ``(N,)``; the rounding of a slope is no difference."""
    pairs = zip(first, second, strict=True)
    apart = [~torch.isclose(a, b, rtol=SLOPE_ROUNDING, atol=0) for a, b in pairs]
    return torch.stack([each.flatten(1).sum(1) for each in apart]).sum(0)


def _counts_before(
    program: Program, target: Value, differing: dict[int, Tensor], images: int
) -> list[int]:
    """The number of gates before a layer that differ, for each image."""
    total = torch.zeros(images, dtype=torch.int64)
    for step in program.upstream([target]):
        if step.output.slot in differing:
            total = total + differing[step.output.slot].cpu()
    return total.tolist()


def _inner_products(
    network: Network,
    x: Tensor,
    pattern: ActivationPattern,
    targets: dict[str, Value],
    terms: Terms,
    report: Callable[[float], None],
) -> dict[str, Tensor]:
    """Sums of x h and of |x h| for every unit, ``(2, N, *units)`` for each target.

    The tangent of a bias starts at its own layer. The tangent of a pixel is computed on windows.
    """
    accumulate = terms.accumulate
    room = terms.memory
    totals = {
        name: x.new_zeros(2, len(x), *value.shape, dtype=accumulate)
        for name, value in targets.items()
    }
    entries = network.biases_in(x.dtype).vector.expand(len(x), -1)
    extended = torch.cat([x.flatten(1), entries], 1).to(accumulate)
    biases = reached(pattern.program, targets.values()) - {IMAGE}
    _add_columns(pattern, extended, basis(pattern, biases), targets, totals, room)
    if x.dim() > 2:
        sweep = Sweep(pattern, targets.values(), room=room)
        _add_pixels(x.to(accumulate), sweep, targets, totals, report)
    else:
        _add_columns(pattern, extended, basis(pattern, {IMAGE}), targets, totals, room)
    report(1.0)
    return totals


def _add_pixels(
    x: Tensor,
    sweep: Sweep,
    targets: dict[str, Value],
    totals: dict[str, Tensor],
    report: Callable[[float], None],
) -> None:
    """Add the products of all pixels, from windowed tangents."""
    groups = list(sweep.groups())

    def compute(group: Group) -> dict[str, Tensor | None]:
        tangents = sweep.run(group)
        # (N, channels, pixels of the group), then channels last
        factors = x[(slice(None), slice(None), *group.places().T)].transpose(1, 2).contiguous()
        return {
            name: sweep.inner(group, tangents[value.slot], factors, value.shape)
            for name, value in targets.items()
        }

    for done, found in enumerate(in_threads(compute, groups, sweep.threads)):
        report(done / len(groups))
        for name, products in found.items():
            if products is not None:
                totals[name] += products


def _add_columns(
    pattern: ActivationPattern,
    extended: Tensor,
    bases: Iterable[Basis],
    targets: dict[str, Value],
    totals: dict[str, Tensor],
    room: int | None,
) -> None:
    """Add the products of the scalars of [x; b] in some bases, from tangents on whole maps."""

    def compute(b: Basis) -> dict[str, Tensor]:
        columns = push(pattern, b.tangents, targets.values())
        factors = extended[:, b.start : b.stop]
        found = {}
        for name, value in targets.items():
            column = columns[value.slot]
            if column is not None:
                # (N, scalars of the basis, elements of the value)
                rows = column.flatten(1).unflatten(0, factors.shape).to(factors.dtype)
                found[name] = sums_of_products(factors, rows).unflatten(2, value.shape)
        return found

    threads = threads_of_tangents(pattern, targets.values(), room)
    for found in in_threads(compute, bases, threads):
        for name, products in found.items():
            totals[name] += products


def _first_name(model: torch.nn.Module, name: str) -> str:
    """The first name of a parameter or buffer. A model may have it under several names."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return next(other for other, tensor in tensors.items() if tensor is tensors[name])


def _relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry; 0 if there is no entry."""
    if not theirs.numel():
        return 0.0
    scale = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) / (scale or 1.0)


def _limit(dtype: torch.dtype, tolerance: float | None) -> float:
    """The given tolerance, or the default of a dtype."""
    return TEST_TOLERANCE[dtype] if tolerance is None else tolerance


def _judged(
    figures: dict[str, float], dtype: torch.dtype, tolerance: float | None, what: str
) -> dict[str, float]:
    """The figures of a test, if its error is within the tolerance.

    Raises:
        RuntimeError: If it is not; the message has all figures.
    """
    limit = _limit(dtype, tolerance)
    if not figures["error"] <= limit:
        listed = ", ".join(f"{name} {figure:.6g}" for name, figure in figures.items())
        msg = f"{what} must have an error of at most {limit:.0e}. Got {listed}."
        raise RuntimeError(msg)
    return figures
