"""Hyperplanes larger than memory: units are divided into blocks, and each is computed alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.display import numbered, words_of_bytes, words_of_work
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.workspace import block_shape
from adjointbackmap.planes.hyperplane import Hyperplanes, planes_of
from adjointbackmap.planes.planner import able_methods, plan_query
from adjointbackmap.planes.query import Block, Query


def iter_hyperplanes(
    network: Network,
    x: Tensor,
    layer: str | nn.Module,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float | str = 1.0,
    dtype: torch.dtype | str | None = None,
    method: str | None = None,
    memory: str | float | int | None = "2GiB",
    pattern: ActivationPattern | None = None,
) -> Iterator[Hyperplanes]:
    """The hyperplanes of :func:`adjointbackmap.hyperplanes`, one block after the other.

    Each block fits in ``memory``. It has several images if all their units fit, otherwise one
    image. Its units are a range along the first unit dimension that does not fit as a whole. Blocks
    come in the order of the units. If the receptive field of the units is smaller than the image,
    image parts are patches on it.

    The arguments are those of :func:`adjointbackmap.hyperplanes`, for one layer. ``memory`` is that
    of one block: half for the result, half for its computation. The default method is the one that
    is cheapest in such blocks.

    Returns:
        An iterator over blocks, each with its images ``x`` and its ``units``.

    Raises:
        ValueError: If an argument does not fit, or one unit alone does not fit in ``memory``. It is
            raised at the call, before the first block.

    Example:
        >>> from adjointbackmap import trace
        >>> first, second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second).eval()
        >>> image = torch.rand(3, 8, 8)
        >>> network = trace(model, image[None])
        >>> blocks = iter_hyperplanes(network, image, "2", "RM2", memory="16kB")
        >>> [tuple(block.value.shape) for block in blocks]
        [(1, 3, 4, 2), (1, 1, 4, 2)]
    """
    wanted = (mode, units, own_bias, scale, dtype, method, memory, pattern)
    work = stream(Query.of(network, x, layer, *wanted))
    return map(work.compute, work.blocks)


@dataclass(frozen=True)
class Stream:
    """Hyperplanes to be computed block by block: made by :func:`stream`.

    Attributes:
        query: The query, with the method and with the memory of one block.
        block: Number of images and of units along each dimension of a block. The last block along a
            dimension may have fewer.
    """

    query: Query
    block: tuple[int, ...]

    @property
    def method(self) -> str:
        """The method of every block."""
        return str(self.query.method)

    @property
    def memory(self) -> int:
        """Bytes for one block."""
        return self.query.memory

    @property
    def shape(self) -> tuple[int, ...]:
        """Images and units, ``(N, *units)``."""
        return (len(self.query.images), *self.query.units.shape)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order; every unit of every image is in one of them."""
        return tiles([slice(0, extent) for extent in self.shape], self.block)

    @property
    def plan(self) -> Plan:
        """The plan of the first block; no other block costs more."""
        return plan_query(self.query.part(self.blocks[0]))

    def compute(self, block: Block) -> Hyperplanes:
        """The hyperplanes of one of the blocks.

        Raises:
            RuntimeError: If the model was changed since the trace.
        """
        # the user may have changed the model since the block before
        self.query.network.check_unchanged()
        return planes_of([self.query.part(block)], [self.method])[0]

    def begun(self, method: str, memory: int, block: tuple[int, ...]) -> "Stream":
        """The same hyperplanes, with the method, memory and blocks of an earlier run."""
        return Stream(replace(self.query, method=method, memory=memory), block)

    def __str__(self) -> str:
        count = prod(self.shape)
        blocks = len(self.blocks)
        work = words_of_work(self.plan.multiply_adds * blocks)
        size = words_of_bytes(count * self.query.bytes_each)
        what = f"{numbered(count, 'hyperplane')} in {numbered(blocks, 'block')}"
        return f"{what}, {self.method}, at most {work}, at most {size}"


def stream(query: Query) -> Stream:
    """The blocks of :func:`iter_hyperplanes`, with the method that is cheapest in blocks.

    Nothing is computed here.

    Raises:
        ValueError: If the method cannot give these hyperplanes, or no method can compute one unit
            within the memory.

    Example:
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> print(stream(Query.of(network, torch.rand(3, 8, 8), "output", "RM2", (0, 0))))
        4 hyperplanes in 1 block, adjoint, at most 15,552 multiply-adds, at most 512 bytes
    """
    shape = (len(query.images), *query.units.shape)
    able = able_methods(query)
    found = []
    for name in able:
        each = _while_computed(query, name)
        # half of the memory is for the result, half for its computation
        block = block_shape(shape, max(1, query.memory // 2 // each))
        blocks = prod(-(-extent // size) for extent, size in zip(shape, block, strict=True))
        first = replace(query, method=name).part(tuple(slice(0, size) for size in block))
        if _bytes_given(first) <= query.memory // 2:
            found.append((plan_query(first).cost * blocks, name, block))
    if not found:
        one = query.part(tuple(slice(0, 1) for _ in shape))
        least = 2 * min(_bytes_given(replace(one, method=name)) for name in able)
        msg = (
            f"memory must be at least {least:,} bytes for one hyperplane of {query.layer.name!r}. "
            f"Got {query.memory:,}: raise memory."
        )
        raise ValueError(msg)
    _, name, block = min(found)  # the lowest cost
    return Stream(replace(query, method=name), block)


def _while_computed(query: Query, method: str) -> int:
    """Bytes of one hyperplane while a method computes it.

    Coloured tangents and the basis give hyperplanes in another order, and the basis gives them on
    the whole image. Their result is copied once.
    """
    pixels = query.network.in_shape if method == "basis" else query.part_shape
    copies = 2 if method in ("basis", "coloured") else 1
    return (copies * prod(pixels) + query.readout.entries.numel()) * query.dtype.itemsize


def _bytes_given(query: Query) -> int:
    """Bytes of the hyperplanes that a method computes for a query.

    Coloured and windowed tangents give all channels at all positions of the box of units.
    """
    method = str(query.method)
    units = query.units.count
    if method in ("windowed", "coloured"):
        units = max(units, query.readout.elements.shape[0] * prod(query.patches.counts))
    return len(query.images) * units * _while_computed(query, method)


# blocks


def tiles(region: Sequence[slice], step: Sequence[int]) -> list[Block]:
    """A region divided into blocks of a shape, in order; blocks at the end may be smaller.

    Args:
        region: A slice along each dimension.
        step: Extent of a block along each dimension.

    Example:
        >>> tiles([slice(0, 3), slice(4, 5)], (2, 1))
        [(slice(0, 2, None), slice(4, 5, None)), (slice(2, 3, None), slice(4, 5, None))]
    """
    return list(product(*(_cut_slice(r, s) for r, s in zip(region, step, strict=True))))


def _cut_slice(whole: slice, step: int) -> list[slice]:
    """A slice in pieces of a size."""
    starts = range(whole.start, whole.stop, step)
    return [slice(a, min(a + step, whole.stop)) for a in starts]
