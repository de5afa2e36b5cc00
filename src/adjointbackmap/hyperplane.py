"""Effective hyperplanes of a layer's units in the five reconstruction modes RM0 to RM4."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.arithmetic import exact
from adjointbackmap.network import Layer, Network
from adjointbackmap.operators import CHUNK, basis, pull, push, reached
from adjointbackmap.pattern import ActivationPattern, check_images, record_pattern
from adjointbackmap.program import KernelCall
from adjointbackmap.recording import Recorded, record
from adjointbackmap.rules import Value
from adjointbackmap.units import Selection, select, unit_dims

if TYPE_CHECKING:
    import xarray

MODES = ("RM4", "RM3", "RM2", "RM1", "RM0")
IMAGES_AT_ONCE = 64
BLOCK = 2**22  # numbers in a block of an inner product
UNITS_OF_MEMORY = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Contributions:
    """What each pixel and each bias adds to a unit: all of them sum to its value.

    Attributes:
        image: ``x * H_I``, ``(N, *units, C, H, W)``.
        bias: ``b * H_b`` by the part of the bias vector, each ``(N, *units, length)``.
        axes: Dimensions of one input: 3 for ``(C, H, W)``.
    """

    image: Tensor
    bias: dict[str, Tensor]
    axes: int = 3

    def total(self) -> Float[Tensor, "n *units"]:
        """Sum over pixels and biases, ``(N, *units)``."""
        return sum((b.sum(-1) for b in self.bias.values()), start=self.image.flatten(-self.axes).sum(-1))


@dataclass(frozen=True)
class Hyperplanes:
    """Effective hyperplanes of some units at some images.

    Attributes:
        image: Image parts ``(N, *units, C, H, W)``, in activation per unit of input.
        bias: Bias parts ``(N, *units, M)``, in activation per unit of bias.
        value: What the untouched model computes for the units, ``(N, *units)``.
        x: The images, ``(N, C, H, W)``.
        network: The network.
        layer: Name of the layer.
        mode: Reconstruction mode.
        units: Which units, see :class:`Selection`.
        own_bias: Whether the layer's own bias belongs to the units.
        scale: The factor k of the pattern.
    """

    image: Float[Tensor, "n *units_in"]
    bias: Float[Tensor, "n *units m"]
    value: Float[Tensor, "n *units"]
    x: Float[Tensor, "n *in"]
    network: Network
    layer: str
    mode: str
    units: Selection
    own_bias: bool
    scale: float

    def reconstruct(self, x: Tensor | None = None) -> Float[Tensor, "n *units"]:
        r"""The inner product :math:`\langle [x; b] | H \rangle`, ``(N, *units)``.

        Args:
            x: Images ``(N, C, H, W)``, or one ``(C, H, W)`` for all; by default those of the hyperplanes.

        Raises:
            ValueError: If the shape does not fit.
        """
        image, bias = self._inner(self._images(x).flatten(1), self._b())
        return (image + bias).view(self.value.shape)

    def magnitude(self, x: Tensor | None = None) -> Float[Tensor, "n *units"]:
        r"""The scale of the rounding: :math:`\sum |x h_I| + \sum |b h_b|`, ``(N, *units)``."""
        image, bias = self._inner(self._images(x).flatten(1), self._b(), torch.abs)
        return (image + bias).view(self.value.shape)

    def relative_error(self) -> Float[Tensor, "n *units"]:
        """Signed relative error of the reconstruction [Wan2022, eq. 3.29], ``(N, *units)``."""
        return relative_error(self.reconstruct(), self.value)

    def contributions(self) -> Contributions:
        """What each pixel and each bias adds to the units."""
        x = self.x.view(len(self.x), *(1,) * len(self.units.shape), *self.x.shape[1:])
        parts = self.network.biases_in(self.image.dtype)
        bias = {name: self.bias[..., part.slice] * part.value.flatten() for name, part in parts.items()}
        return Contributions(x * self.image, bias, self.x.dim() - 1)

    def to_xarray(self) -> "xarray.Dataset":
        """Image, bias and value with labelled dimensions: images, units, channel, row, col, and the bias vector's names.

        Example:
            >>> import torch
            >>> from adjointbackmap.network import trace
            >>> network = trace(torch.nn.Conv2d(1, 2, 3).eval(), torch.rand(1, 1, 5, 5))
            >>> hyperplanes(network, torch.rand(1, 5, 5), "output", "RM1").to_xarray()["image"].dims
            ('n', 'out_channel', 'channel', 'row', 'col')
        """
        import xarray

        spatial = {2: ("channel", "row", "col"), 1: ("channel", "col"), 0: ("feature",), 3: ("channel", "depth", "row", "col")}
        names = spatial[self.x.dim() - 2]
        dims = ("n", *self.units.names)
        shared = len(self.units.flat) == 1
        coords: dict[str, Any] = {"bias_name": ("m", list(self.network.biases.labels))}
        for name, places in self.units.coordinates().items():
            if name in self.units.names:
                along = places[0].movedim(self.units.names.index(name), 0)
                coords[name] = (name, along.reshape(len(along), -1)[:, 0].numpy())
            else:
                coords[name] = (dims[1:], places[0].numpy()) if shared else (dims, places.numpy())
        arrays = {"image": ((*dims, *names), self.image), "bias_part": ((*dims, "m"), self.bias), "value": (dims, self.value)}
        data = {name: (d, t.cpu().numpy()) for name, (d, t) in arrays.items()}
        attrs = {"layer": self.layer, "mode": self.mode, "own_bias": int(self.own_bias), "k": self.scale}
        return xarray.Dataset(data, coords, attrs)

    def _images(self, x: Tensor | None) -> Tensor:
        if x is None:
            return self.x
        x = check_images(self.network, x, self.image.dtype)
        if len(x) not in (1, len(self.x)):
            msg = f"x must be one image or {len(self.x)}. Got {len(x)}."
            raise ValueError(msg)
        return x.expand(len(self.x), *x.shape[1:])

    def _inner(self, x: Tensor, b: Tensor, of: Callable[[Tensor], Tensor] = torch.positive) -> list[Tensor]:
        """Sums of products with [x; b], a bounded part at a time; summed pairwise, as precise as float32 allows."""
        sums = []
        for part, vector in ((self.image, x[:, None]), (self.bias, b)):
            blocks = self._flat(part).split(max(1, BLOCK // max(1, vector.shape[-1])), 1)
            sums.append(torch.cat([of(block * vector).sum(2) for block in blocks], 1))
        return sums

    def _flat(self, part: Tensor) -> Tensor:
        """An image or bias part with the units in one dimension and everything else in another."""
        units = len(self.units.shape) + 1
        return part.reshape(len(part), prod(self.units.shape), prod(part.shape[units:]))

    def _b(self) -> Tensor:
        return self.network.biases_in(self.image.dtype).vector


def relative_error(reconstructed: Float[Tensor, "*units"], value: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    r"""Signed relative error :math:`(\hat c - c) / c_{\neq 0}` [Wan2022, eq. 3.29].

    A value of zero is replaced in the denominator by the smallest positive normal float32; where both
    are zero the error is zero.

    Example:
        >>> relative_error(torch.tensor([1.5, 0.0]), torch.tensor([1.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    tiny = torch.finfo(torch.float32).tiny
    return (reconstructed - value) / torch.where(value == 0, tiny, value)


def hyperplanes(
    network: Network,
    x: Tensor,
    layer: str,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory: str | int = "2GiB",
) -> Hyperplanes:
    r"""Effective hyperplanes of a layer's units at the activation pattern of ``x``.

    :math:`c([x; b]) = \langle [x; b] | J_F^*(k [x; b])\, w \rangle` [Wan2022, eqs. 3.2-3.4, 3.7-3.12].

    Args:
        network: Traced network, see :func:`trace`.
        x: One image ``(C, H, W)`` or a batch ``(N, C, H, W)``, in the units that the model takes.
        layer: Name in ``network.layers``.
        mode: ``"RM4"`` (one kernel, one position; units ``(out_row, out_col, in_channel, out_channel)``), ``"RM3"`` (one
            kernel, positions summed; ``(in_channel, out_channel)``), ``"RM2"`` (one unit; ``(out_row, out_col,
            out_channel)``), ``"RM1"`` (one out-channel, positions summed; ``(out_channel,)``), or ``"RM0"`` (one output of
            a fully connected layer; ``(out_feature,)``).
        units: ``None`` for all; a tuple over the mode's unit dimensions of ints, slices or integer arrays, combined as
            NumPy does; a tensor ``(N, K, d)`` of units for each image; ``"predicted"`` for the largest output in RM0.
        own_bias: Whether the layer's own bias belongs to the unit; by default it does in RM0 to RM2, so that the value is
            what the module gives. It never does in RM3 and RM4.
        scale: The factor k at which the pattern is taken.
        dtype: ``torch.float64`` for more than the model's own precision.
        memory: Largest size of the result, in bytes or such as ``"2GiB"``.

    Returns:
        ``image`` of shape ``(N, *units, C, H, W)``, ``bias`` of shape ``(N, *units, M)`` and ``value`` of shape
        ``(N, *units)``, detached, on the model's device.

    Raises:
        ValueError: If the layer, mode, units, shape or dtype do not fit, ``x`` is not finite, or the result is larger than
            ``memory``.

    Example:
        >>> import torch
        >>> from adjointbackmap.network import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)).eval()
        >>> image = torch.rand(3, 8, 8)
        >>> planes = hyperplanes(trace(model, image[None]), image, layer="2", mode="RM2")
        >>> bool((planes.reconstruct() - planes.value).abs().max() < 1e-5)
        True
    """
    chosen = network.layer(layer)
    own_bias = _own_bias(chosen, mode, own_bias)
    images = check_images(network, x, dtype)
    in_channels = 0 if own_bias else network.kernel(chosen, images.dtype).rule.in_channels
    dims = unit_dims(chosen, mode, in_channels)
    if not isinstance(units, str):
        selection = select(dims, units, len(images))
        _check_memory(network, selection, images, memory)
    recorded = _recorded(network, images, chosen)
    if isinstance(units, str):
        selection = _predicted(units, mode, dims, recorded.outputs[layer])
    job = _Job(network, chosen, mode, own_bias, selection, scale, images.dtype)
    image, bias = job.planes(images)
    shape = (len(images), *selection.shape)
    return Hyperplanes(
        image=image.view(*shape, *images.shape[1:]),
        bias=bias.view(*shape, bias.shape[-1]),
        value=job.values(recorded).view(shape),
        x=images,
        network=network,
        layer=layer,
        mode=mode,
        units=selection,
        own_bias=own_bias,
        scale=scale,
    )


def _own_bias(layer: Layer, mode: str, own_bias: bool | None) -> bool:
    if mode not in layer.modes:
        msg = f"Layer {layer.name!r} has the modes {', '.join(layer.modes)}. Got {mode!r}: choose one of these."
        raise ValueError(msg)
    if mode in ("RM4", "RM3"):
        if own_bias:
            msg = f"own_bias must be False in {mode}, whose units are single kernels. Got True: leave it out."
            raise ValueError(msg)
        return False
    return own_bias is not False


def _recorded(network: Network, images: Tensor, layer: Layer) -> Recorded:
    """Input of the layer's kernel and the layer's output, from the untouched model."""
    with exact(images.device):
        found = [record(network, part, [layer]) for part in images.split(IMAGES_AT_ONCE)]
    inputs = {name: torch.cat([f.inputs[name] for f in found]) for name in found[0].inputs}
    return Recorded(inputs, {layer.name: torch.cat([f.outputs[layer.name] for f in found])})


def _predicted(units: str, mode: str, dims: dict[str, int], output: Tensor) -> Selection:
    if units != "predicted" or mode != "RM0":
        msg = f"units must be 'predicted' in RM0, or a tuple of ints, slices and arrays. Got {units!r} in {mode}."
        raise ValueError(msg)
    return Selection(dims, output.argmax(1).cpu(), ())


def _check_memory(network: Network, selection: Selection, images: Tensor, memory: str | int) -> None:
    each = (prod(network.in_shape) + len(network.biases)) * images.element_size()
    wanted, limit = len(images) * prod(selection.shape) * each, bytes_of(memory)
    if wanted > limit:
        msg = (
            f"The result must fit in memory={memory}. It needs {wanted / 2**30:.2f} GiB for {len(images)} x "
            f"{prod(selection.shape):,} hyperplanes: choose fewer units or images, or raise memory."
        )
        raise ValueError(msg)


def bytes_of(memory: str | int) -> int:
    """Bytes of a size such as ``"2GiB"``, ``"500MB"`` or an int.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> bytes_of("2GiB")
        2147483648
    """
    if isinstance(memory, int):
        return memory
    number = memory.rstrip("BGKMikb")
    unit = memory[len(number) :].strip()
    try:
        return int(float(number) * UNITS_OF_MEMORY[unit])
    except (ValueError, KeyError):
        msg = f"memory must be a number of bytes or such as '2GiB' or '500MB'. Got {memory!r}."
        raise ValueError(msg) from None


@dataclass(frozen=True)
class _Job:
    """One call of :func:`hyperplanes`: which units of which layer."""

    network: Network
    layer: Layer
    mode: str
    own_bias: bool
    selection: Selection
    scale: float
    dtype: torch.dtype

    @property
    def kernel(self) -> KernelCall:
        """The layer's convolution or linear call."""
        return self.network.kernel(self.layer, self.dtype)

    @property
    def target(self) -> Value:
        """The layer's output, or its weighted sum before its own bias."""
        return self.layer.value if self.own_bias else self.kernel.sum

    def planes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image parts ``(N, K, D)`` and bias parts ``(N, K, M)``, with the units in one dimension."""
        units, pixels, length = prod(self.selection.shape), prod(self.network.in_shape), len(self.network.biases)
        image = images.new_zeros(len(images), units, pixels)
        bias = images.new_zeros(len(images), units, length)
        by_tangents = self.mode in ("RM2", "RM0") and len(self.selection.flat) == 1 and units > pixels + length
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            pattern = record_pattern(self.network, images[part], self.scale, images.dtype)
            with exact(images.device):
                (self._forward if by_tangents else self._back)(pattern, image[part], bias[part], part)
        return image, bias

    def _forward(self, pattern: ActivationPattern, image: Tensor, bias: Tensor, part: slice) -> None:
        """One tangent per scalar of [x; b] gives a column of every unit."""
        pixels = image.shape[-1]
        for b in basis(pattern, reached(pattern.program, [self.target])):
            out = push(pattern, b.tangents, [self.target])[self.target.slot]
            if out is None:
                continue
            columns = self._in_unit_order(out).flatten(1)[:, self.selection.flat.flatten().to(out.device)]
            columns = columns.unflatten(0, (pattern.images, -1)).transpose(1, 2)
            whole, shift = (image, 0) if b.start < pixels else (bias, pixels)
            whole[:, :, b.start - shift : b.stop - shift] = columns

    def _back(self, pattern: ActivationPattern, image: Tensor, bias: Tensor, part: slice) -> None:
        """One cotangent per unit gives its hyperplane."""
        flat = self.selection.flat.reshape(len(self.selection.flat), -1)
        flat = (flat[part] if len(flat) > 1 else flat).expand(pattern.images, -1)
        step = max(1, CHUNK // pattern.images)
        for k in range(0, flat.shape[1], step):
            chosen = flat[:, k : k + step]
            planes = pull(pattern, self._cotangents(chosen.flatten().to(image.device), pattern.dtype))
            for whole, got in zip((image, bias), planes, strict=True):
                whole[:, k : k + step] = got.flatten(1).unflatten(0, (pattern.images, -1))

    def _cotangents(self, flat: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """A cotangent for each unit: one where the unit reads the layer, or its kernel where in-channels are apart."""
        places = torch.unravel_index(flat, tuple(self.selection.dims.values()))
        where = dict(zip(self.selection.dims, places, strict=True))
        seeds = torch.zeros(len(flat), *self.target.shape, dtype=dtype, device=flat.device)
        each = torch.arange(len(flat), device=flat.device)
        j = where.pop("in_channel", None)
        if self.mode in ("RM1", "RM3"):
            seeds[each, where["out_channel"]] = 1
        elif "out_channel" in where:
            *spatial, channel = where.values()
            seeds[(each, channel, *spatial)] = 1
        else:
            seeds[(each, *where.values())] = 1
        if seeds.dim() == 4:
            seeds = seeds.contiguous(memory_format=torch.channels_last)
        if j is None:
            return {self.target.slot: seeds}
        kernel = self.kernel
        (back,) = kernel.rule.adjoint((), seeds, [kernel.input.shape])
        mask = torch.zeros_like(back)
        mask[each, kernel.rule.in_channel_of(where["out_channel"], j)] = 1
        return {kernel.input.slot: back * mask}

    def values(self, recorded: Recorded) -> Tensor:
        """The units' values from what the untouched model computed, ``(N, K)``."""
        output = recorded.outputs[self.layer.name]
        with exact(output.device):
            everything = self._merged(output) if self.own_bias else self._without_bias(recorded.inputs[self.layer.name])
        flat = self.selection.flat.reshape(len(self.selection.flat), -1).to(output.device)
        return everything.flatten(1).gather(1, flat.expand(len(output), -1))

    def _without_bias(self, x: Tensor) -> Tensor:
        """The layer's kernel applied to its recorded input, to one in-channel at a time where the mode keeps them apart."""
        kernel = self.kernel
        if self.mode not in ("RM4", "RM3"):
            return self._merged(kernel.apply(x))
        mask = kernel.rule.in_channel_mask(x.shape[1]).to(x.device)
        apart = [self._merged(kernel.apply(x * m.view(-1, *(1,) * (x.dim() - 2)))) for m in mask]
        return torch.stack(apart, -2)

    def _merged(self, maps: Tensor) -> Tensor:
        """Maps in the order of the units, positions summed where the mode says so."""
        if self.mode in ("RM1", "RM3"):
            return maps.flatten(2).sum(2)
        return self._in_unit_order(maps)

    def _in_unit_order(self, maps: Tensor) -> Tensor:
        """``(N, C, *positions)`` to ``(N, *positions, C)``."""
        return maps.movedim(1, -1) if "out_channel" in self.selection.dims else maps
