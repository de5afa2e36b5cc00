"""Random networks for hypothesis: small graphs with branches that meet and parts used twice."""

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from cases import enliven, parameter
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

Draw = Callable[[st.SearchStrategy], Any]
Shape = Sequence[int]  # without the batch: channels, then positions
LIMIT = 120  # numbers in a value, so that dense Jacobians stay small


class Function(nn.Module):
    """A function of one or two values, named for the report; ``constants`` are its parameters."""

    def __init__(
        self, name: str, function: Callable[..., Tensor], *constants: nn.Parameter
    ) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.constants = nn.ParameterList(constants)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values, *self.constants)

    def extra_repr(self) -> str:
        return self.name


class RandomNetwork(nn.Module):
    """Value 0 is the image; each call of a part on earlier values makes the next one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.calls: list[tuple[int, tuple[int, ...]]] = []  # a part, and the values that it takes
        self.shapes = [tuple(shape)]

    @property
    def last(self) -> int:
        """Number of the last value."""
        return len(self.calls)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for part, inputs in self.calls:
            values.append(self.parts[part](*(values[i] for i in inputs)))
        return values[-1]

    def append(self, part: nn.Module, *inputs: int) -> bool:
        """Call a part, if it fits its inputs and gives neither too much nor nothing."""
        try:
            with torch.no_grad():
                shape = part.eval()(*(torch.zeros(2, *self.shapes[i]) for i in inputs)).shape
        except (RuntimeError, ValueError, AssertionError):
            return False
        if len(shape) < 2 or shape[0] != 2 or not 0 < prod(shape[1:]) <= LIMIT:
            return False
        if not any(part is p for p in self.parts):
            self.parts.append(part)
        self.calls.append((next(i for i, p in enumerate(self.parts) if p is part), inputs))
        self.shapes.append(tuple(shape[1:]))
        return True

    def extra_repr(self) -> str:
        return f"shape={self.shapes[0]}, calls={self.calls}"


def pick(draw: Draw, *choices: Any) -> Any:
    """One of some values, the first the simplest."""
    return draw(st.sampled_from(choices))


def of_axes(shape: Shape, *kinds: Any) -> Any:
    """The kind for one, two or three axes of positions."""
    return kinds[len(shape) - 2]


# parts that have a kernel or statistics


class Standardised(nn.Conv2d):
    """A convolution that takes the mean of every kernel away in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias
        )


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruned": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "weight norm by a hook": weight_norm,
    "spectral norm by a hook": spectral_norm,
}
"""Ways to compute a kernel anew at every call."""


def with_kernel(draw: Draw, module: nn.Module) -> nn.Module:
    """A layer whose kernel is its own parameter, or one that is computed."""
    how = pick(draw, "own", "own", "own", "standardised", *COMPUTED)
    if how == "standardised" and type(module) is nn.Conv2d:
        module.__class__ = Standardised
    return COMPUTED[how](module) if how in COMPUTED else module


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm that is more than one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.3)


def convolution(draw: Draw, shape: Shape) -> nn.Module:
    groups = pick(draw, *(g for g in (1, 2, 3) if shape[0] % g == 0))
    kind = of_axes(shape, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    mode = pick(draw, "zeros", "zeros", "reflect", "replicate", "circular")
    padding = pick(draw, 0, 1, 2, "same")
    stride = 1 if padding == "same" else pick(draw, 1, 2)
    size = tuple(pick(draw, 3, 1, 2) for _ in shape[1:])
    dilation = pick(draw, 1, 1, 2)
    bias = pick(draw, True, False)
    out = groups * pick(draw, 1, 2, 3)
    return with_kernel(
        draw, kind(shape[0], out, size, stride, padding, dilation, groups, bias, mode)
    )


def transposed_convolution(draw: Draw, shape: Shape) -> nn.Module:
    groups = pick(draw, *(g for g in (1, 2, 3) if shape[0] % g == 0))
    kind = of_axes(shape, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    stride = pick(draw, 1, 2, 3)
    rest = {
        "output_padding": pick(draw, 0, 1),
        "bias": pick(draw, True, False),
        "dilation": pick(draw, 1, 1, 2),
    }
    size = pick(draw, 2, 1, 3)
    padding = pick(draw, 0, 1)
    out = groups * pick(draw, 1, 2)
    return with_kernel(draw, kind(shape[0], out, size, stride, padding, groups=groups, **rest))


def linear(draw: Draw, shape: Shape) -> nn.Module:
    return with_kernel(
        draw, nn.Linear(shape[-1], pick(draw, 3, 1, 5), bias=pick(draw, True, False))
    )


def batch_norm(draw: Draw, shape: Shape) -> nn.Module:
    maps = pick(draw, nn.BatchNorm2d, nn.BatchNorm2d, NormAndActivation)
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, maps, nn.BatchNorm3d)[len(shape) - 1]
    return kind(shape[0], eps=pick(draw, 1e-5, 0.3), affine=pick(draw, True, False))


def instance_norm(draw: Draw, shape: Shape) -> nn.Module:
    kind = of_axes(shape, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return kind(shape[0], affine=pick(draw, True, False), track_running_stats=True)


def recurrent(draw: Draw, shape: Shape) -> nn.Module:
    options = {"bias": pick(draw, True, False), "bidirectional": pick(draw, False, True)}
    layer = nn.RNN(
        shape[-1],
        pick(draw, 3, 1),
        pick(draw, 1, 2),
        nonlinearity="relu",
        batch_first=True,
        **options,
    )
    return LastAndAll(layer)


class LastAndAll(nn.Module):
    """The outputs of a recurrent layer, and each less its last state."""

    def __init__(self, layer: nn.RNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.layer(x)
        return torch.cat([outputs, outputs[..., : states.shape[2]] - states[-1].unsqueeze(1)], 2)


def multiplier(draw: Draw, shape: Shape) -> nn.Module:
    return Function("scalar", lambda x, m: x * m, parameter(*pick(draw, (), (1,))))


# parts that have pieces


def activation(draw: Draw, shape: Shape) -> nn.Module:
    return pick(
        draw,
        nn.ReLU,
        lambda: nn.LeakyReLU(0.2),
        nn.PReLU,
        lambda: nn.PReLU(shape[0]),
        nn.RReLU,
        nn.Dropout,
    )()


SATURATING = {
    "relu6": lambda c: F.relu6(9 * c),
    "hardtanh": lambda c: F.hardtanh(c, -0.4, 0.7),
    "hard sigmoid": lambda c: F.hardsigmoid(6 * c),
    "clamp": lambda c: c.clamp(-0.2, 0.9),
    "clamp from below": lambda c: c.clamp_min(-0.35),
    "hard shrink": lambda c: F.hardshrink(c, 0.3),
    "soft shrink": lambda c: F.softshrink(c, 0.25),
    "threshold": lambda c: F.threshold(c, 0.15, -0.6),
    "absolute": torch.abs,
    "where": lambda c: torch.where(c > 0.1, c, 0.5 - 2 * c),
    "where several": lambda c: torch.where((c > 0.6) | ~(c >= -0.7), 0.3, c),
    "mask": lambda c: c * (c > -0.1) + 0.4 * (c < 0.2).to(c.dtype),
    "sign": lambda c: c - 0.3 * torch.sign(c),
    "sign alone": torch.sign,
    "sign compared": lambda c: torch.where(torch.sign(c) == 1, c, 0.4 - c),
    "mask compared": lambda c: torch.where((c > 0.2).to(c.dtype) == 1, c, -0.5 * c),
    "where of signs": lambda c: torch.where(c > 0.4, torch.sign(c + 0.3), (c < -0.3).to(c.dtype)),
    "clamp to infinity": lambda c: c.clamp(-0.2, torch.inf),
    "masked fill": lambda c: c.masked_fill(c < -0.5, -1.5),
}


def saturating(draw: Draw, shape: Shape) -> nn.Module:
    """With a random shift, so that no kink lies where a saturated value before it does."""
    name = pick(draw, *SATURATING)
    return Function(name, lambda x, shift: SATURATING[name](x + shift), parameter())


def with_tensor(draw: Draw, shape: Shape) -> nn.Module:
    parts = {
        "maximum": lambda x, p: torch.maximum(x, p),
        "minimum": lambda x, p: torch.min(p, x),
        "clamp tensors": lambda x, p: x.clamp(-p.abs(), p.abs() + 0.3),
        "multiplier": lambda x, p: x * p,
        "offset": lambda x, p: x - 0.5 * p,
        "affine": lambda x, p: (
            (1.5 - x) / 0.8 + p
        ),  # a parameter that multiplies too has another derivative than its entry
    }
    name = pick(draw, *parts)
    sizes = pick(draw, (), (shape[0], *(1,) * (len(shape) - 1)), (1, *shape), (shape[-1],))
    return Function(name, parts[name], parameter(*sizes))


# parts whose constants have odd names, are cast, or are read as numbers


class Named(nn.Module):
    """Parameters and buffers whose names are those of operations, beside literals."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        shape = (channels, *(1,) * (dims - 1))
        self.add = parameter(*shape)
        self.sub = parameter()
        self.register_buffer("mul", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((x + 0.3) * self.mul - self.sub - 0.2) + (self.add - 0.1) - self.add * 2


def constants(draw: Draw, shape: Shape) -> nn.Module:
    even = [i % 2 == 0 for i in range(shape[0])]
    parts = {
        "item": lambda x, p: x * p.sum().item() + float(p[0] * 0.3),
        "list": lambda x, p: (
            x * torch.tensor(p.tolist(), dtype=x.dtype).mean() - torch.tensor([0.3]).to(x)
        ),
        "cast": lambda x, p: x - p.to(x).type_as(x)[0] * 0.7,
        "made": lambda x, p: (
            x * torch.full((1,), 0.3, dtype=x.dtype)
            - torch.full_like(x, 0.1)
            + torch.tensor(7) / 3 * p[0]
        ),
        "branch": lambda x, p: x + p[0] if p.mean() > 0 else 0.7 * x - p[1],
        "boolean index": lambda x, p: x[:, torch.tensor(even)] * p[p > p.min()].sum(),
        "place": lambda x, p: x * p[int(p.argmax())] - p[p.argmin()],
    }
    name = pick(draw, "named", *parts)
    return (
        Named(shape[0], len(shape))
        if name == "named"
        else Function(name, parts[name], parameter(3))
    )


# parts that pool or reduce


def pooling(draw: Draw, shape: Shape) -> nn.Module:
    size = pick(draw, 2, 3, 1)
    stride = pick(draw, 2, 1, 3)
    padding = pick(draw, 0, 1)
    ceil = pick(draw, False, True)
    target = tuple(pick(draw, 1, 2, 3) for _ in shape[1:])
    kinds = [
        lambda: of_axes(shape, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)(
            size, stride, padding, pick(draw, 1, 2), ceil_mode=ceil
        ),
        lambda: of_axes(shape, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(
            size, stride, padding, ceil, pick(draw, True, False)
        ),
        lambda: of_axes(shape, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)(
            target
        ),
        lambda: of_axes(shape, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)(
            target
        ),
    ]
    return pick(draw, *kinds)()


def reduction(draw: Draw, shape: Shape) -> nn.Module:
    dim = pick(draw, *range(1, len(shape) + 1))
    keep = len(shape) == 1 or pick(draw, True, False)
    parts = {
        "mean": lambda x: x.mean(dim, keepdim=keep),
        "sum": lambda x: x.sum(dim, keepdim=keep),
        "amax": lambda x: x.amax(dim, keepdim=keep),
        "amin": lambda x: x.amin(dim, keepdim=keep),
        "max": lambda x: x.max(dim, keepdim=keep)[0],
        "min": lambda x: x.min(dim, keepdim=keep).values,
        "centred": lambda x: x - x.mean(dim, keepdim=True),
        "largest of every second": lambda x: x.masked_fill(
            _every_second(shape, dim), -torch.inf
        ).amax(dim, keepdim=keep),
        "smallest without": lambda x: torch.where(_every_second(shape, dim), torch.inf, x).min(
            dim, keepdim=keep
        )[0],
        "less than the largest": lambda x: x - x.amax(dim, keepdim=True),
        "maxout": lambda x: x.unflatten(dim, (-1, 2)).amax(dim + 1),
        "selected": lambda x: x.select(dim, -1) if not keep else x.select(dim, -1).unsqueeze(dim),
    }
    name = pick(draw, *parts)
    return Function(f"{name} over {dim}, {keep=}", parts[name])


def ordering(draw: Draw, shape: Shape) -> nn.Module:
    dim = pick(draw, *range(1, len(shape) + 1))
    n = pick(draw, 1, 2)
    parts = {
        "sort": lambda x: x.sort(dim)[0],
        "group sort": lambda x: (
            x.unflatten(dim, (-1, 2)).sort(dim + 1, descending=True)[0].flatten(dim, dim + 1)
        ),
        "top": lambda x: x.topk(n, dim)[0],
        "bottom": lambda x: x.topk(n, dim, largest=False)[0],
        "of rank": lambda x: x.kthvalue(n, dim, keepdim=True)[0],
        "median": lambda x: x.median(dim, keepdim=True)[0],
        "quantile": lambda x: x - x.quantile(0.3 * n, dim, keepdim=True),
        "running maximum": lambda x: x.cummax(dim)[0],
        "running minimum": lambda x: x.cummin(dim)[0],
        "in another's order": lambda x: x.gather(dim, (x.flip(dim) - 0.6 * x).argsort(dim)),
        "place of the largest": lambda x: x - 0.3 * x.argmax(dim, keepdim=True).to(x.dtype),
        "sum of sizes": lambda x: torch.linalg.vector_norm(x + 0.1, 1, dim, keepdim=True),
        "largest size": lambda x: (
            torch.linalg.vector_norm(x + 0.1, float("inf"), dim, keepdim=True) - x
        ),
    }
    name = pick(draw, *parts)
    return Function(f"{name} along {dim} by {n}", parts[name])


def _every_second(shape: Shape, dim: int) -> Tensor:
    """Truth at places 1, 3, ... of a dimension."""
    places = torch.arange(shape[dim - 1]) % 2 == 1
    return places.view(-1, *(1,) * (len(shape) - dim))


# parts that move


def moving(draw: Draw, shape: Shape) -> nn.Module:
    dim = pick(draw, *range(1, len(shape) + 1))
    n = pick(draw, 1, 2)
    length = shape[dim - 1]
    parts = {
        "flip": lambda x: x.flip(dim),
        "roll": lambda x: x.roll(n, dim),
        "from": lambda x: x.narrow(dim, n, length - n),
        "every second": lambda x: x[(slice(None),) * dim + (slice(n - 1, None, 2),)],
        "twice": lambda x: torch.cat([x, x], dim),
        "with constants": lambda x: torch.cat(
            [x, torch.ones_like(x) * 0.7, torch.zeros_like(x)], dim
        ),
        "repeat": lambda x: x.repeat_interleave(2, dim),
        "transpose": lambda x: x.transpose(1, dim),
        "stack": lambda x: torch.stack([x, -x], dim).flatten(dim, dim + 1),
        "split": lambda x: x.split([n, length - n], dim)[1],
        "chunks": lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
        "index": lambda x: x.index_select(dim, torch.tensor([length - 1, 0, 0])),
        "windows": lambda x: x.unfold(dim, 2, n).flatten(dim, dim + 1),
        "square": lambda x: x.unflatten(dim, (-1, 2)).flatten(1),
        "assigned": lambda x: _assigned(x, dim),
        "sums": lambda x: x.cumsum(dim),
        "differences": lambda x: torch.diff(x, n, dim),
        "triangle": lambda x: x.tril() if len(shape) > 1 else x,
        "filled": lambda x: x.index_fill(dim, torch.tensor([length - 1]), 0.7),
        "added": lambda x: x.index_add(
            dim, torch.tensor([0, 0]), x.narrow(dim, n - 1, 2), alpha=0.5
        ),
        "scattered": lambda x: _scattered(x, dim),
        "by a mask": _masked,
        "between": lambda x: torch.lerp(x, x.flip(dim), 0.3),
        "matrix": lambda x: (
            x @ torch.linspace(-1, 1, 2 * shape[-1], dtype=x.dtype).view(shape[-1], 2)
        ),
    }
    name = pick(draw, *parts)
    return Function(f"{name} along {dim} by {n}", parts[name])


def _assigned(x: Tensor, dim: int) -> Tensor:
    x = x.clone()
    x.select(dim, 0).copy_(2 * x.select(dim, -1))
    x.narrow(dim, 1, 1).zero_()
    return x


def _scattered(x: Tensor, dim: int) -> Tensor:
    """Every second element added to its neighbour, at places that are given for every position."""
    places = (torch.arange(x.shape[dim]) // 2).view(-1, *(1,) * (x.dim() - dim - 1)).expand(x.shape)
    return x.scatter_add(dim, places, 0.5 * x)


def _unpooled(x: Tensor) -> Tensor:
    """The maxima at their places; the size is given, for a map may have an odd one."""
    maxima, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(maxima, places, 2, output_size=x.shape[2:])


def _masked(x: Tensor) -> Tensor:
    """Every second column replaced by a number, and what is small by zero."""
    x = x.clone()
    x[..., 1::2] = 0.4
    x[x < -1.3] = 0
    return x


def padding(draw: Draw, shape: Shape) -> nn.Module:
    pads = [pick(draw, 1, 0, 2) for _ in range(2 * len(shape) - 2)]
    if pick(draw, False, False, False, True):
        pool = of_axes(shape, F.max_pool1d, F.max_pool2d, F.max_pool3d)
        ends = (0, 1) * (len(shape) - 1)
        return Function(
            "max pool after -inf", lambda x: pool(F.pad(x, ends, value=-torch.inf), 2, 1)
        )
    mode = pick(draw, "constant", "reflect", "replicate", "circular")
    value = pick(draw, 0.0, 0.6) if mode == "constant" else None
    cut = pick(draw, 0, 1, 3)
    pads[0] -= cut
    if mode == "circular":  # more numbers than the opposite side has left are refused
        pads[1] = min(pads[1], shape[-1] + min(pads[0], 0))
    return Function(f"pad {pads} {mode} {value}", lambda x: F.pad(x, pads, mode, value))


def resizing(draw: Draw, shape: Shape) -> nn.Module:
    linear = of_axes(shape, "linear", "bilinear", "trilinear")
    mode = pick(
        draw, "nearest", linear, "nearest-exact", *(("bicubic",) if len(shape) == 3 else ())
    )
    corners = pick(draw, False, True) if mode not in ("nearest", "nearest-exact") else None
    if mode in ("bilinear", "bicubic") and pick(draw, False, True):
        smaller = tuple(max(1, n - 1) for n in shape[1:])
        # PyTorch repeats the first row where the result has one column
        smaller = smaller if smaller[1] > 1 else (shape[1], 1)
        return Function(
            f"antialiased {mode}", lambda x: F.interpolate(x, smaller, mode=mode, antialias=True)
        )
    sizes = [
        {"scale_factor": 2.0},
        {"size": tuple(n + 1 for n in shape[1:])},
        {"scale_factor": 1.5},
    ]
    factors = [
        {"scale_factor": f, "recompute_scale_factor": pick(draw, False, True)}
        for f in (3.1, 2.1, 0.6)
    ]
    to = pick(draw, *sizes, *factors)
    return Function(
        f"{mode} {to} {corners=}",
        lambda x: F.interpolate(x, **to, mode=mode, align_corners=corners),
    )


def mixing(draw: Draw, shape: Shape) -> nn.Module:
    """Channels to positions and back, windows to columns and back: maps only."""
    kinds = [
        lambda: nn.PixelShuffle(2),
        lambda: nn.PixelUnshuffle(2),
        lambda: nn.ChannelShuffle(2),
        lambda: Function("unfold", lambda x: F.unfold(x, 2, padding=1)),
        lambda: Function(
            "unfold and fold", lambda x: F.fold(F.unfold(x, 2) * 1.5, tuple(shape[1:]), 2)
        ),
        lambda: Function("unpooled", lambda x: _unpooled(x)),
        lambda: Function("pooling of order 1", lambda x: F.lp_pool2d(x, 1, 2)),
        lambda: Function(
            "einsum", lambda x, m: torch.einsum("nchw,cd->ndhw", x, m), parameter(shape[0], 2)
        ),
    ]
    return pick(draw, *kinds)()


def flatten(draw: Draw, shape: Shape) -> nn.Module:
    return nn.Flatten()


# curved parts, each with a twin whose gates are detached


class Curved(nn.Module):
    """A curved function of a value, written twice: as users do, and with its gates detached.

    Attributes:
        detaches: Whether the second is called.
    """

    def __init__(self, name: str, function: Callable, twin: Callable, **parts: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.twin = twin
        self.parts = nn.ModuleDict(parts)
        self.detaches = False

    def forward(self, x: Tensor) -> Tensor:
        return (self.twin if self.detaches else self.function)(x, **self.parts)

    def extra_repr(self) -> str:
        return self.name


ELEMENTWISE = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "selu": F.selu,
    "exponential": lambda u: torch.exp(0.3 * u),
    "cosine": torch.cos,
    "log-sigmoid": F.logsigmoid,
}


def elementwise(draw: Draw, shape: Shape) -> nn.Module:
    """``f(0) + u [(f(u) - f(0)) / u]``, shifted: a rectified value is rarely zero then."""
    name = pick(draw, *ELEMENTWISE)
    function = ELEMENTWISE[name]
    shift = 0.21 + 0.1 * pick(draw, 0, 1, 2)

    def twin(x: Tensor) -> Tensor:
        u = (0.3 * (x + shift)) if name == "exponential" else x + shift
        own = torch.exp if name == "exponential" else function
        at_zero = own(torch.zeros((), dtype=x.dtype))
        # the gate at zero is the derivative, here a central difference
        h = 1e-6
        slope = (own(torch.full_like(u, h)) - own(torch.full_like(u, -h))) / (2 * h)
        safe = torch.where(u == 0, 1, u)
        gate = torch.where(u == 0, slope, (own(u) - at_zero) / safe)
        return at_zero + u * gate.detach()

    return Curved(name, lambda x: function(x + shift), twin)


def statistics_norm(draw: Draw, shape: Shape) -> nn.Module:
    """A norm over the last dimension: layer norm, RMS norm, or division by the length."""
    eps = pick(draw, 0.1, 0.02)

    def layer_twin(x: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * (c.square().mean(-1, keepdim=True) + eps).rsqrt().detach()

    def rms_twin(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()

    def length_twin(x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) + eps).detach()

    parts = {
        "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:], eps=eps), layer_twin),
        "RMS norm": (lambda x: F.rms_norm(x, x.shape[-1:], eps=eps), rms_twin),
        "over its length": (lambda x: x / (x.norm(dim=-1, keepdim=True) + eps), length_twin),
    }
    name = pick(draw, *parts)
    return Curved(name, *parts[name])


def product(draw: Draw, shape: Shape) -> nn.Module:
    """A product of two linear functions of a value, of which the second may be a gate."""
    n = shape[-1]
    kernels = {"first": nn.Linear(n, n), "second": nn.Linear(n, n)}

    def halves(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        a, b = first(x), second(x)
        return (a * b.detach() + a.detach() * b) / 2

    parts = {
        "sigmoid gate": (
            lambda x, first, second: first(x) * torch.sigmoid(second(x)),
            lambda x, first, second: first(x) * torch.sigmoid(second(x)).detach(),
        ),
        "activated gate": (
            lambda x, first, second: F.silu(second(x)) * first(x),
            lambda x, first, second: first(x) * F.silu(second(x)).detach(),
        ),
        "halves": (lambda x, first, second: first(x) * second(x), halves),
        "quotient": (
            lambda x, first, second: first(x) / (0.5 + second(x).abs()),
            lambda x, first, second: first(x) / (0.5 + second(x).abs()).detach(),
        ),
        "softmax gate": (
            lambda x, first, second: first(x) * torch.softmax(second(x), -1),
            lambda x, first, second: first(x) * torch.softmax(second(x), -1).detach(),
        ),
    }
    name = pick(draw, *parts)
    return Curved(name, *parts[name], **kernels)


def attention(draw: Draw, shape: Shape) -> nn.Module:
    """Attention of the rows of a value to each other, in both forms."""
    n = shape[-1]
    kernels = {"query": nn.Linear(n, n), "key": nn.Linear(n, n)}

    def written(x: Tensor, query: nn.Module, key: nn.Module) -> Tensor:
        return torch.softmax(query(x) @ key(x).mT / n**0.5, -1) @ x

    def fused(x: Tensor, query: nn.Module, key: nn.Module) -> Tensor:
        return F.scaled_dot_product_attention(query(x), key(x), x)

    def twin(x: Tensor, query: nn.Module, key: nn.Module) -> Tensor:
        return torch.softmax(query(x) @ key(x).mT / n**0.5, -1).detach() @ x

    name = pick(draw, "written attention", "fused attention")
    return Curved(name, written if name == "written attention" else fused, twin, **kernels)


POINTWISE = [activation, saturating, with_tensor, batch_norm]
ANYWHERE = [*POINTWISE, linear, moving, reduction, ordering, constants]
KINDS = {1: [linear, *ANYWHERE]}
KINDS[2] = [
    convolution,
    *ANYWHERE,
    convolution,
    pooling,
    padding,
    resizing,
    transposed_convolution,
    flatten,
]
KINDS[2] = [*KINDS[2], instance_norm]
KINDS[3] = [*KINDS[2], mixing]
KINDS[4] = KINDS[2]
KINDS[2] = [*KINDS[2], recurrent]
"""Kinds of parts for values of so many dimensions beside the batch."""

CURVED = {n: [elementwise, statistics_norm, product, attention][: 3 + (n > 1)] for n in KINDS}
"""The same of curved parts."""

MEETINGS = {
    "add": torch.add,
    "sub": lambda x, y: x - 0.5 * y,
    "cat": lambda x, y: torch.cat([x, y], 1),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > y, x, 0.5 * y),
    "gate": lambda x, y: x * (y > 0.05),
}


def fitted(shape: Shape, to: Shape) -> nn.Module:
    """A part that gives a value another shape, position by position where it can."""
    if len(shape) == len(to) > 1:
        pool = of_axes(shape, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)(
            tuple(to[1:])
        )
        return nn.Sequential(
            of_axes(shape, nn.Conv1d, nn.Conv2d, nn.Conv3d)(shape[0], to[0], 1), pool
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), prod(to)), nn.Unflatten(1, tuple(to)))


def meet(draw: Draw, net: RandomNetwork) -> None:
    """The last value and an earlier one become one."""
    last = net.last
    other = draw(st.integers(0, net.last))
    name = pick(draw, *MEETINGS)
    same_axes = len(net.shapes[other]) == len(net.shapes[last])
    if not (same_axes and net.append(Function(name, MEETINGS[name]), last, other)):
        net.append(fitted(net.shapes[other], net.shapes[last]), other)
        net.append(Function(name, MEETINGS[name]), last, net.last)


def continued(draw: Draw, net: RandomNetwork, curved: bool = False) -> None:
    """A new or an earlier part, after the last value or, as a branch, after an earlier one."""
    source = net.last if pick(draw, True, True, True, False) else draw(st.integers(0, net.last))
    shape = net.shapes[source]
    used = [
        net.parts[part]
        for part, inputs in net.calls
        if len(inputs) == 1 and net.shapes[inputs[0]] == shape
    ]
    if used and pick(draw, False, False, False, True):
        net.append(pick(draw, *used), source)
    elif len(shape) in KINDS:
        kinds = CURVED if curved and pick(draw, True, False) else KINDS
        kind = pick(draw, *kinds[len(shape)])
        fits = net.append(kind(draw, shape), source)
        if fits and kind in (convolution, transposed_convolution, linear):
            scaled(draw, net)


def scaled(draw: Draw, net: RandomNetwork) -> None:
    """Batch norms and multipliers after the last value, which are what can be folded, or none."""
    while pick(draw, False, True):
        part = pick(draw, batch_norm, multiplier)(draw, net.shapes[net.last])
        if not net.append(part, net.last):
            return


SHAPES = [(2, 5, 5), (1, 4, 6), (3, 3, 3), (2, 7), (1, 9), (3, 4), (5,), (4,), (2, 3, 2, 3)]


@st.composite
def networks(draw: Draw, curved: bool = False) -> tuple[RandomNetwork, Tensor]:
    """A network of one to twelve operations in float64 and eval mode, and two images.

    Args:
        draw: What draws.
        curved: Whether half of its parts are curved.
    """
    shape = pick(draw, *SHAPES)
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**16)))
        net = RandomNetwork(shape)
        for _ in range(draw(st.integers(1, 12))):
            if net.calls and pick(draw, False, False, False, True):
                meet(draw, net)
            else:
                continued(draw, net, curved)
        if curved:
            last = net.shapes[net.last]
            net.append(pick(draw, *CURVED[len(last)])(draw, last), net.last)
        net.append(KINDS[len(net.shapes[-1])][0](draw, net.shapes[-1]), net.last)
        enliven(net)
        return net.double().eval(), torch.randn(2, *shape, dtype=torch.float64)


def with_detached_gates(net: RandomNetwork) -> RandomNetwork:
    """A copy of a network whose curved parts detach their gates."""
    twin = copy.deepcopy(net)
    for part in twin.parts:
        if isinstance(part, Curved):
            part.detaches = True
    return twin
