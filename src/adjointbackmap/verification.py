"""Exactness as public functions: dot test, dense test, reconstruction test, and every unit of every layer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from adjointbackmap.arithmetic import exact
from adjointbackmap.hyperplane import Hyperplanes, relative_error
from adjointbackmap.network import Layer, Network
from adjointbackmap.operators import CHUNK, Basis, LayerOperator, basis, push, reached
from adjointbackmap.pattern import ActivationPattern, check_images, record_pattern
from adjointbackmap.program import IMAGE
from adjointbackmap.recording import call_with, record
from adjointbackmap.rules import Value
from adjointbackmap.windows import Sweep

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
SHARE_LIMIT = 0.01  # the study counts the units whose relative error is at most 1 %
HISTOGRAM_EDGES = tuple(float(f"1e{e}") for e in range(-16, 3))


def dot_test(operator: LayerOperator, seed: int = 0, tolerance: float | None = None) -> dict[str, float]:
    r"""Whether forward and adjoint are each other's transpose: :math:`\langle J u | v \rangle = \langle u | J^* v \rangle`.

    Args:
        operator: The linear map of a layer.
        seed: Of the random vectors.
        tolerance: Largest difference, relative to the norms; by default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``{"forward": <J u|v>, "adjoint": <u|J* v>, "error": relative difference}``, for all images together.

    Raises:
        RuntimeError: If the difference is larger than ``tolerance``.

    Example:
        >>> from adjointbackmap.operators import operator
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval().double()
        >>> x = torch.rand(1, 1, 5, 5).double()
        >>> dot_test(operator(trace(model, x), x, "1"))["error"] < 1e-12
        True
    """
    pattern = operator.pattern
    n, dtype, device = pattern.images, pattern.dtype, pattern.network.device
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(device, dtype)

    image, bias, v = draw(*operator.in_shape), draw(operator.bias_length), draw(*operator.out_shape)
    out = operator.forward(image, bias)
    back_image, back_bias = operator.adjoint(v)
    forward = float((out * v).double().sum())
    adjoint = float((image * back_image).double().sum() + (bias * back_bias).double().sum())
    scale = float(out.double().norm() * v.double().norm()) or 1.0
    error = abs(forward - adjoint) / scale
    return _judged({"forward": forward, "adjoint": adjoint, "error": error}, dtype, tolerance, "The dot test")


def dense_test(operator: LayerOperator, x: Tensor, tolerance: float | None = None) -> dict[str, float]:
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
    network, layer = operator.pattern.network, operator.layer
    dtype = operator.pattern.dtype
    x = check_images(network, x, dtype)
    parameters = {name: p.detach().to(dtype) for name, p in network.model.named_parameters()}
    buffers = {n: b.to(dtype) if b.is_floating_point() else b for n, b in network.model.named_buffers()}

    def output(values: dict[str, Tensor], image: Tensor) -> Tensor:
        swapped = {**parameters, **buffers, **values}
        call = partial(call_with, network.model, swapped)
        return record(network, image[None], [layer], call).outputs[layer.name][0]

    ours_image, ours_bias = operator.dense()
    parts = {_first_name(network.model, p.parameter): p for p in network.biases_in(dtype).values() if p.parameter is not None}
    chosen = {name: {**parameters, **buffers}[name] for name in parts}
    image_error = bias_error = 0.0
    for n, image in enumerate(x):
        by_values, by_image = torch.func.jacrev(output, (0, 1))(chosen, image)
        image_error = _larger(image_error, _difference(ours_image[n], by_image))
        for name, part in parts.items():
            theirs = by_values[name].reshape(*layer.out_shape, part.value.numel())
            bias_error = _larger(bias_error, _difference(ours_bias[n][..., part.slice], theirs))
    figures = {"image": image_error, "bias": bias_error, "error": _larger(image_error, bias_error)}
    return _judged(figures, dtype, tolerance, "The dense test")


def reconstruction_test(planes: Hyperplanes, tolerance: float | None = None) -> dict[str, float]:
    r"""Whether :math:`\langle [x; b] | H \rangle` is what the untouched model computes.

    The error is held against the scale of the rounding, :math:`\sum |x h_I| + \sum |b h_b|`.

    Args:
        planes: Hyperplanes of any units.
        tolerance: Largest scale-aware error; by default 1e-12 in float64 and 1e-4 in float32.

    Returns:
        ``{"error": largest scale-aware error, "relative": largest |relative error|, "share": share of units <= 1 %}``.

    Raises:
        RuntimeError: If the error is larger than ``tolerance``; the message names the worst unit.
    """
    difference = (planes.reconstruct() - planes.value).abs()
    scaled = difference / planes.magnitude().clamp_min(torch.finfo(planes.value.dtype).tiny)
    relative = planes.relative_error().abs()
    worst = int(scaled.argmax())
    figures = {
        "error": float(scaled.max()),
        "relative": float(relative.max()),
        "share": float((relative <= SHARE_LIMIT).double().mean()),
    }
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), scaled.shape)]
    what = (
        f"The reconstruction of unit {place} of {planes.layer} ({planes.mode}), value {float(planes.value.flatten()[worst]):.6g},"
    )
    return _judged(figures, planes.value.dtype, tolerance, what)


@dataclass
class LayerCheck:
    """Errors of every unit of a layer over the images seen so far.

    Attributes:
        layer: Name of the layer.
        units: Units checked, over all images.
        within: How many have |relative error| <= 1 %.
        within_signed: How many have a signed relative error <= 1 %, as published.
        zero: How many have a value of exactly zero.
        largest: Largest |relative error|.
        scaled: Largest error divided by sum |x h| + sum |b h|.
        worst: Image and unit of the largest |relative error|, the unit in the layer's own shape.
        histogram: Counts of |relative error| between the powers of ten of ``HISTOGRAM_EDGES``.
    """

    layer: str
    units: int = 0
    within: int = 0
    within_signed: int = 0
    zero: int = 0
    largest: float = 0.0
    scaled: float = 0.0
    worst: tuple[int, tuple[int, ...]] | None = None
    histogram: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM_EDGES) + 1))

    @property
    def share(self) -> float:
        """Share of units with |relative error| <= 1 %."""
        return self.within / self.units

    def add(self, value: Tensor, reconstructed: Tensor, magnitude: Tensor, first_image: int) -> None:
        """Count the units of some images, ``(N, *units)`` each."""
        error = relative_error(reconstructed, value)
        absolute = error.abs()
        self.units += value.numel()
        self.within += int((absolute <= SHARE_LIMIT).sum())
        self.within_signed += int((error <= SHARE_LIMIT).sum())
        self.zero += int((value == 0).sum())
        tiny = torch.finfo(value.dtype).tiny
        self.scaled = _larger(self.scaled, float(((reconstructed - value).abs() / magnitude.clamp_min(tiny)).max()))
        if self.worst is None or _larger(self.largest, float(absolute.max())) != self.largest:
            image, *unit = (int(i) for i in torch.unravel_index(absolute.argmax().cpu(), absolute.shape))
            self.largest, self.worst = float(absolute.max()), (first_image + image, tuple(unit))
        edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
        counts = torch.bincount(torch.bucketize(absolute.double().flatten().cpu(), edges), minlength=len(edges) + 1)
        self.histogram = [a + b for a, b in zip(self.histogram, counts.tolist(), strict=True)]


def verify(
    network: Network,
    images: Tensor,
    layers: Sequence[str] | None = None,
    own_bias: bool = False,
    scale: float = 1 / 8,
    dtype: torch.dtype | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> dict[str, LayerCheck]:
    r"""Hold every unit of every layer against its explicit hyperplane, [Wan2022, eqs. 3.27-3.29].

    Every column of the hyperplanes is computed by a unit tangent of [x; b], and the inner products are
    summed from these: never the network's own arithmetic over again.

    Args:
        network: Traced network.
        images: Image or batch.
        layers: Names of layers; by default every layer but those that give what another gives.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the pattern.
        dtype: ``torch.float64`` for more than the model's own precision.
        report: Called with the share that is done.

    Returns:
        Name of a layer -> its errors.

    Raises:
        ValueError: If a layer or the images do not fit the network.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval()
        >>> x = torch.rand(1, 1, 5, 5)
        >>> {name: check.share for name, check in verify(trace(model, x), x).items()}
        {'0': 1.0, '1': 1.0}
    """
    x = check_images(network, images, dtype)
    chosen = [network.layer(name) for name in layers] if layers is not None else network.distinct_layers()
    checks = {layer.name: LayerCheck(layer.name) for layer in chosen}
    for n, image in enumerate(x):

        def report_part(part: float, done: int = n) -> None:
            report((done + part) / len(x))

        _verify_image(network, image[None], chosen, own_bias, scale, checks, n, report_part)
    return checks


def _verify_image(
    network: Network,
    x: Tensor,
    layers: Sequence[Layer],
    own_bias: bool,
    scale: float,
    checks: dict[str, LayerCheck],
    number: int,
    report: Callable[[float], None],
) -> None:
    pattern = record_pattern(network, x, scale, x.dtype)
    kernels = {layer.name: network.kernel(layer, x.dtype) for layer in layers if layer.kernel is not None and not own_bias}
    targets = {layer.name: kernels[layer.name].sum if layer.name in kernels else layer.value for layer in layers}
    with exact(x.device):
        recorded = record(network, x, list(layers))
        sums, scales = _inner_products(network, x, pattern, targets, report)
        for layer in layers:
            name = layer.name
            value = kernels[name].apply(recorded.inputs[name]) if name in kernels else recorded.outputs[name]
            checks[name].add(value, sums[name], scales[name], number)


def _inner_products(
    network: Network, x: Tensor, pattern: ActivationPattern, targets: dict[str, Value], report: Callable[[float], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of x h and of |x h| for every unit of the targets: a bias's tangent starts at its own layer, a pixel's is windowed."""
    totals = {name: x.new_zeros(2, *value.shape) for name, value in targets.items()}
    extended = torch.cat([x.flatten(), network.biases_in(x.dtype).vector.to(x.device)])
    biases = reached(pattern.program, targets.values()) - {IMAGE}
    _add_columns(pattern, extended, basis(pattern, biases, CHUNK), targets, totals)
    if x.dim() > 2:
        _add_pixels(x, Sweep(pattern, targets.values()), targets, totals, report)
    else:
        _add_columns(pattern, extended, basis(pattern, {IMAGE}, CHUNK), targets, totals)
    report(1.0)
    return {name: t[:1] for name, t in totals.items()}, {name: t[1:] for name, t in totals.items()}


def _add_pixels(
    x: Tensor, sweep: Sweep, targets: dict[str, Value], totals: dict[str, Tensor], report: Callable[[float], None]
) -> None:
    """Add what the pixels contribute, by windowed tangents."""
    groups = list(sweep.groups())
    for done, group in enumerate(groups):
        report(done / len(groups))
        tangents = sweep.run(group)
        factors = x[0][(slice(None), *group.places().T)].T.contiguous()
        for name, value in targets.items():
            products = sweep.inner(group, tangents[value.slot], factors, value.shape)
            if products is not None:
                totals[name] += products


def _add_columns(
    pattern: ActivationPattern, extended: Tensor, bases: Iterable[Basis], targets: dict[str, Value], totals: dict[str, Tensor]
) -> None:
    for b in bases:
        columns = push(pattern, b.tangents, targets.values())
        factors = extended[b.start : b.stop]
        for name, value in targets.items():
            column = columns[value.slot]
            if column is not None:
                rows = column.flatten(1)
                totals[name] += torch.stack([factors @ rows, factors.abs() @ rows.abs()]).view(2, *value.shape)


def _first_name(model: torch.nn.Module, name: str) -> str:
    """The first of the names of a parameter or buffer that a model holds under several."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return next(other for other, tensor in tensors.items() if tensor is tensors[name])


def _larger(first: float, second: float) -> float:
    """The larger of two errors, where NaN is larger than any number."""
    return first if second <= first or first != first else second


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return float((ours - theirs).abs().max()) / (scale or 1.0) if theirs.numel() else 0.0


def _judged(figures: dict[str, float], dtype: torch.dtype, tolerance: float | None, what: str) -> dict[str, float]:
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    if not figures["error"] <= limit:
        listed = ", ".join(f"{name} {figure:.6g}" for name, figure in figures.items())
        msg = f"{what} must have an error of at most {limit:.0e}. Got {listed}."
        raise RuntimeError(msg)
    return figures
