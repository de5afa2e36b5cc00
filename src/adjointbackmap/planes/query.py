"""The query: which hyperplanes are wanted.

The arguments of :func:`adjointbackmap.hyperplanes` are checked and joined here, and nowhere else.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.observe import Recorded, record
from adjointbackmap.engine.pattern import (
    ActivationPattern,
    check_images,
    check_pattern,
    check_scale,
    pattern_of,
)
from adjointbackmap.engine.program import KernelCall, Program
from adjointbackmap.planes.placement import PatchGeometry
from adjointbackmap.planes.readout import Readout
from adjointbackmap.planes.units import Selection, select, shown, unit_dims
from adjointbackmap.rules import Value

# Prefix of a unit of memory -> bytes.
SIZES = {
    "": 1,
    **{letter: 1000**n for n, letter in enumerate("kMGT", 1)},
    **{f"{letter}i": 1024**n for n, letter in enumerate("KMGT", 1)},
}
# Stands for a memory without bound, so that sizes are always compared as integers.
UNBOUNDED = sys.maxsize

Block = tuple[slice, ...]
"""A part of a result: a slice of the images, then one along each dimension of the units."""


@dataclass(frozen=True, eq=False)
class Query:
    """Which hyperplanes are wanted: units of a layer in a mode, at some images.

    Made by :meth:`of`.

    Attributes:
        network: The network.
        images: The images ``(N, C, H, W)`` in the dtype of the hyperplanes.
        layer: The layer.
        mode: One of its reconstruction modes.
        own_bias: Whether the layer's own bias belongs to the units.
        units: The units.
        scale: The factor k of the pattern.
        method: The method to use; ``None`` for the cheapest.
        memory: Largest size of the result in bytes.
        pattern: The pattern of the images, if the caller holds it.
    """

    network: Network
    images: Tensor
    layer: Layer
    mode: str
    own_bias: bool
    units: Selection
    scale: float
    method: str | None
    memory: int
    pattern: ActivationPattern | None = None

    @classmethod
    def of(
        cls,
        network: Network,
        x: Tensor,
        layer: str | nn.Module,
        mode: str | None = None,
        units: Any = None,
        own_bias: bool | None = None,
        scale: float | str = 1.0,
        dtype: torch.dtype | str | None = None,
        method: str | None = None,
        memory: str | float | int | None = "2GiB",
        pattern: ActivationPattern | None = None,
    ) -> "Query":
        """Check the arguments of :func:`adjointbackmap.hyperplanes` and join them.

        The model and the images are checked here, and not again later.

        Args:
            network: Traced network.
            x: Image or batch.
            layer: Name of a layer, or a module of the model.
            mode: Reconstruction mode; by default RM2, or RM0 if the layer has no positions.
            units: The units.
            own_bias: Whether the layer's own bias belongs to the units.
            scale: The factor k of the pattern.
            dtype: Dtype of the hyperplanes; by default that of the model.
            method: Method that computes them.
            memory: Largest size of the result in bytes; ``None`` for no bound.
            pattern: The pattern of ``x``, if the caller holds it.

        Raises:
            TypeError: If ``network`` is no traced network, or ``x`` no tensor.
            ValueError: If an argument does not fit the network.
            RuntimeError: If the model was changed since the trace.

        Example:
            >>> from adjointbackmap import trace
            >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
            >>> network = trace(model, torch.rand(1, 3, 8, 8))
            >>> query = Query.of(network, torch.rand(3, 8, 8), model[0], units=(0, slice(2)))
            >>> query.layer.name, query.mode, query.units.shape, query.patches.size
            ('0', 'RM2', (2, 4), (3, 3))
        """
        check_network(network)
        network.check_unchanged()
        # a copy: the user may write to x, while results and later blocks still need the images
        images = check_images(network, x, dtype).clone()
        k = check_scale(scale)
        if pattern is not None:
            check_pattern(pattern, network, images, k)
        chosen = _checked_choice(network, images, layer, mode, units, own_bias, pattern)
        return cls(network, images, *chosen, k, method, bytes_of(memory), pattern)

    @classmethod
    def of_any_image(
        cls,
        network: Network,
        layer: str | nn.Module,
        mode: str | None = None,
        units: Any = None,
        own_bias: bool | None = None,
        method: str | None = None,
    ) -> "Query":
        """The query of a plan, which needs no image.

        Its one image has zeros, and takes no memory.

        Raises:
            TypeError: If ``network`` is no traced network.
            ValueError: If an argument does not fit the network.
        """
        check_network(network)
        network.check_unchanged()
        zero = torch.zeros((), dtype=network.dtype, device=network.device)
        images = zero.expand(1, *network.in_shape)
        chosen = _checked_choice(network, images, layer, mode, units, own_bias)
        return cls(network, images, *chosen, 1.0, method, UNBOUNDED)

    def at_layer(
        self,
        layer: str | nn.Module,
        mode: str | None = None,
        units: Any = None,
        own_bias: bool | None = None,
    ) -> "Query":
        """The query for the same images at another layer, see :meth:`of`.

        Raises:
            ValueError: If an argument does not fit the network.
        """
        choice = (layer, mode, units, own_bias, self.pattern)
        chosen = _checked_choice(self.network, self.images, *choice)
        wanted = (self.scale, self.method, self.memory, self.pattern)
        return Query(self.network, self.images, *chosen, *wanted)

    def part(self, block: Block) -> "Query":
        """The query for the images and the units of a block."""
        images, *units = block
        of_block = self.units.of_images(images, tuple(units))
        pattern = None if self.pattern is None else self.pattern.part(images)
        return replace(self, images=self.images[images], units=of_block, pattern=pattern)

    # the network at the images

    def pattern_at(self, images: slice, most: int | None) -> ActivationPattern:
        """The activation pattern of some of the images.

        Args:
            images: Which images.
            most: Largest batch of tangents or cotangents.
        """
        if self.pattern is not None:
            return self.pattern.part(images, most)
        return pattern_of(self.network, self.images[images], self.scale, most)

    def recorded(self, layers: Sequence[Layer], at_once: int) -> Recorded:
        """Inputs and outputs of layers in the untouched model.

        Args:
            layers: The layers.
            at_once: Images in one call of the model.
        """
        if self.pattern is not None:
            return self.pattern.recorded(layers, at_once)
        return record(self.network, self.images, layers, at_once)

    # in which arithmetic

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hyperplanes."""
        return self.images.dtype

    @cached_property
    def program(self) -> Program:
        """The network's steps in that dtype."""
        return self.network.program(self.dtype)

    # how the units read the network, the pixels of their image parts, and their values

    @cached_property
    def _kernel(self) -> KernelCall:
        """The layer's convolution or linear call.

        Raises:
            ValueError: If the layer has neither.
        """
        return self.network.kernel(self.layer, self.dtype)

    @property
    def target(self) -> Value:
        """The layer's output, or its weighted sum before its own bias."""
        return self.layer.value if self.own_bias else self._kernel.sum

    @cached_property
    def readout(self) -> Readout:
        """How the units read the network."""
        kernel = None if self.own_bias else self._kernel
        return Readout(self.program, self.target, kernel, self.mode, self.units)

    @property
    def is_on_maps(self) -> bool:
        """Whether the layer is a map over an image, and each unit is at one position of the map."""
        on_maps = len(self.network.in_shape) == len(self.target.shape) == 3
        return on_maps and self.mode in ("RM2", "RM4") and "out_channel" in self.units.dims

    @property
    def in_patches(self) -> bool:
        """Whether image parts are stored as patches on the receptive fields of the units."""
        return self.is_on_maps and self.units.is_shared

    @cached_property
    def patches(self) -> PatchGeometry:
        """The patches on which image parts are stored."""
        field = self.program.fields[self.target.slot]
        return PatchGeometry.of(field, self.units.box, self.network.in_shape[1:])

    def corners(self) -> Tensor:
        """First row and column of each chosen unit's patch, ``(*units, 2)``."""
        return self.patches.corners(self.units.positions(self.units.flat[0]))

    @cached_property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one unit's image part as it is stored."""
        channels = self.network.in_shape[:1]
        return (*channels, *self.patches.size) if self.in_patches else self.network.in_shape

    @cached_property
    def bytes_each(self) -> int:
        """Bytes of one hyperplane: image part, bias part and value."""
        return (prod(self.part_shape) + self.readout.entries.numel() + 1) * self.dtype.itemsize

    @cached_property
    def room(self) -> int | None:
        """Bytes of the memory that the result leaves for a batch; ``None`` for no bound."""
        if self.memory == UNBOUNDED:
            return None
        result = self.bytes_each * self.units.count * len(self.images)
        return max(0, self.memory - result)

    def values(self, recorded: Recorded) -> Tensor:
        """The units' values from the recorded tensors of the untouched model, ``(N, *units)``."""
        output = recorded.outputs[self.layer.name]
        images = len(output)
        flat = self.units.numbers(slice(0, images), images, output.device)  # (N, K)
        with exact(output.device):
            if self.mode in ("RM4", "RM3"):
                chosen = self._of_single_kernels(recorded.inputs[self.layer.name], flat)
            elif self.own_bias:
                chosen = self._merged(output).flatten(1).gather(1, flat)
            else:
                # the output minus the bias would have the rounding of the sum: apply the kernel
                product = self._kernel.apply(recorded.inputs[self.layer.name])
                chosen = self._merged(product).flatten(1).gather(1, flat)
        return chosen.view(images, *self.units.shape)

    def _of_single_kernels(self, x: Tensor, flat: Tensor) -> Tensor:
        """Values of units that are single kernels, ``(N, K)``.

        The kernel is applied to one in-channel at a time. All in-channels together would take the
        memory of many blocks.

        Args:
            x: Recorded input of the kernel.
            flat: Numbers of the units, ``(N, K)``.
        """
        kernel = self._kernel
        (images, count) = flat.shape
        mask = kernel.rule.in_channel_mask(x.shape[1]).to(x.device)  # (in-channels, channels of x)
        channels = self.units.dims["out_channel"]
        # the number of a unit is (position * in-channels + in-channel) * out-channels + out-channel
        pair = flat.flatten() // channels
        out_channel = flat.flatten() % channels
        in_channel = pair % len(mask)
        # the number of the unit's element on a flat map, (position, out-channel)
        place = pair // len(mask) * channels + out_channel
        # entries (image, unit) sorted by in-channel, then split into those of each in-channel
        order = in_channel.argsort(stable=True)
        values = x.new_empty(images * count)
        sizes = in_channel.bincount(minlength=len(mask)).tolist()
        for m, those in zip(mask, order.split(sizes), strict=True):
            if len(those):
                apart = x * m.view(-1, *(1,) * (x.dim() - 2))
                maps = self._merged(kernel.apply(apart)).flatten(1)
                values[those] = maps[those // count, place[those]]
        return values.view(images, count)

    def _merged(self, maps: Tensor) -> Tensor:
        """Maps in the order of the units; in RM1 and RM3 summed over positions."""
        if self.mode in ("RM1", "RM3"):
            return maps.flatten(2).sum(2)
        return self.units.in_order(maps)


def _checked_choice(
    network: Network,
    images: Tensor,
    layer: str | nn.Module,
    mode: str | None,
    units: Any,
    own_bias: bool | None,
    pattern: ActivationPattern | None = None,
) -> tuple[Layer, str, bool, Selection]:
    """Layer, mode, own bias and units, with the defaults filled in.

    Raises:
        ValueError: If one does not fit the network.
    """
    chosen = network.layer(layer)
    if mode is None:
        mode = next((m for m in ("RM2", "RM0") if m in chosen.modes), chosen.modes[0])
    if mode not in chosen.modes:
        msg = (
            f"Layer {chosen.name!r} has the modes {', '.join(chosen.modes)}. "
            f"Got {mode!r}: choose one of these."
        )
        raise ValueError(msg)
    with_bias = _with_own_bias(mode, own_bias)
    in_channels = 0 if with_bias else network.kernel(chosen, images.dtype).rule.in_channels
    dims = unit_dims(chosen, mode, in_channels)
    if isinstance(units, str):
        if units != "predicted" or mode != "RM0":
            msg = (
                "units must be 'predicted' in RM0, or a tuple of ints, slices and arrays. "
                f"Got {units!r} in {mode}."
            )
            raise ValueError(msg)
        return chosen, mode, with_bias, _predicted(network, images, chosen, dims, pattern)
    return chosen, mode, with_bias, select(dims, units, len(images))


def _with_own_bias(mode: str, own_bias: bool | None) -> bool:
    """Whether a layer's own bias belongs to its units: the given value, or the mode's default.

    Raises:
        ValueError: If it is no truth value, or must be False in the mode.
    """
    if own_bias is not None and not isinstance(own_bias, bool | np.bool_):
        msg = (
            "own_bias must be True, False or None for the mode's default. "
            f"Got {shown(own_bias)}: give one of these."
        )
        raise ValueError(msg)
    if mode not in ("RM4", "RM3"):
        return own_bias is None or bool(own_bias)
    if own_bias:
        msg = (
            f"own_bias must be False in {mode}, whose units are single kernels. "
            "Got True: leave it out."
        )
        raise ValueError(msg)
    return False


def _predicted(
    network: Network,
    images: Tensor,
    layer: Layer,
    dims: dict[str, int],
    pattern: ActivationPattern | None,
) -> Selection:
    """The unit with the largest output, for each image."""
    recorded = record(network, images, [layer]) if pattern is None else pattern.recorded([layer])
    return Selection(dims, recorded.outputs[layer.name].argmax(1).cpu(), ())


def bytes_of(memory: str | float | int | None) -> int:
    """A memory size in bytes.

    Args:
        memory: A number of bytes, a text such as ``"2GiB"`` or ``"500MB"``, or ``None`` for no
            bound.

    Raises:
        ValueError: If it is none of these, or not positive.

    Example:
        >>> bytes_of("2GiB"), bytes_of(2e9), bytes_of("16 MB")
        (2147483648, 2000000000, 16000000)
    """
    if memory is None:
        return UNBOUNDED
    size = _size(memory)
    if not 0 < size < UNBOUNDED:
        msg = (
            "memory must be a number of bytes or such as '2GiB' or '500MB', more than none. "
            f"Got {shown(memory)}: give one of these, or None for no bound."
        )
        raise ValueError(msg)
    return max(1, int(size))


def _size(memory: object) -> float:
    """A size in bytes; NaN if the value is no size."""
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kKMGT]?i?)B?\s*", memory)
        try:
            return float(found[1]) * SIZES[found[2]] if found else math.nan
        except (ValueError, KeyError):  # two points in the number, or a prefix such as "i"
            return math.nan
    if isinstance(memory, bool):  # Python's True is an int
        return math.nan
    if isinstance(memory, int | float | np.integer | np.floating):
        return float(memory)
    return math.nan
