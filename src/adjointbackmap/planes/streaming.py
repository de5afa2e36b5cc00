"""Hyperplanes larger than memory: a selection of units in blocks, each of which is computed on its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.engine.network import Network
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
) -> Iterator[Hyperplanes]:
    """The hyperplanes of :func:`adjointbackmap.hyperplanes` in blocks, of which each fits in ``memory``.

    A block is a range along the first unit dimension that does not fit, of one image unless several fit whole; blocks follow
    one another as the units do. Where the units have a smaller receptive field than the image, image parts are patches on it.

    The arguments are those of :func:`adjointbackmap.hyperplanes`, but for one layer, and ``memory`` is that of one block: half
    for the result, half for what computing it takes. By default the method is the one that is cheapest in such blocks.

    Returns:
        An iterator over blocks, each with its images ``x`` and its ``units``.

    Raises:
        ValueError: If an argument does not fit, or not even one unit fits in ``memory``; at the call, before the first block.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)).eval()
        >>> image = torch.rand(3, 8, 8)
        >>> blocks = iter_hyperplanes(trace(model, image[None]), image, "2", "RM2", memory="16kB")
        >>> [tuple(block.value.shape) for block in blocks]
        [(1, 3, 4, 2), (1, 1, 4, 2)]
    """
    work = stream(Query.of(network, x, layer, mode, units, own_bias, scale, dtype, method, memory))
    return map(work.compute, work.blocks)


@dataclass(frozen=True)
class Stream:
    """Hyperplanes that are to be computed block by block: made by :func:`stream`.

    Attributes:
        query: Which hyperplanes, by which method, and how many bytes a block may take.
        block: Images, and units along each dimension, of a block; at the ends it may be smaller.
    """

    query: Query
    block: tuple[int, ...]

    @property
    def method(self) -> str:
        """How every block is computed."""
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
        """The blocks in order; together they are all images and units, each once."""
        return tiles([slice(0, extent) for extent in self.shape], self.block)

    @property
    def plan(self) -> Plan:
        """How the first block is computed; none costs more."""
        return plan_query(self.query.part(self.blocks[0]))

    def compute(self, block: Block) -> Hyperplanes:
        """The hyperplanes of one of the blocks.

        Raises:
            RuntimeError: If the model was changed since the trace.
        """
        self.query.network.check_unchanged()  # it may have been, since the block before
        return planes_of([self.query.part(block)], [self.method])[0]

    def begun(self, method: str, memory: int, block: tuple[int, ...]) -> "Stream":
        """The same as it was begun, by a method and in blocks that were chosen then."""
        return Stream(replace(self.query, method=method, memory=memory), block)

    def __str__(self) -> str:
        count = prod(self.shape)
        blocks = len(self.blocks)
        work = f"{self.method}, at most {self.plan.multiply_adds * blocks / 1e9:,.3g} GMAC"
        size = count * self.query.bytes_each / 2**20
        return f"{count:,} hyperplanes in {blocks:,} block(s), {work}, at most {size:,.1f} MiB"


def stream(query: Query) -> Stream:
    """What :func:`iter_hyperplanes` goes through, before anything is computed: the method whose blocks are the cheapest.

    Raises:
        ValueError: If the method is not able, or no method can compute one unit within the memory.

    Example:
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> print(stream(Query.of(network, torch.rand(3, 8, 8), "output", "RM2", (0, 0))))
        4 hyperplanes in 1 block(s), adjoint, at most 1.56e-05 GMAC, at most 0.0 MiB
    """
    shape = (len(query.images), *query.units.shape)
    able = able_methods(query)
    found = []
    for name in able:
        each = _while_computed(query, name)
        block = block_shape(shape, max(1, query.memory // 2 // each))
        blocks = prod(-(-extent // size) for extent, size in zip(shape, block, strict=True))
        first = replace(query, method=name).part(tuple(slice(0, size) for size in block))
        if _room(first) <= query.memory // 2:
            found.append((plan_query(first).cost * blocks, name, block))
    if not found:
        one = query.part(tuple(slice(0, 1) for _ in shape))
        least = 2 * min(_room(replace(one, method=name)) for name in able)
        msg = (
            f"memory must be at least {least:,} bytes for one hyperplane of {query.layer.name!r}. "
            f"Got {query.memory:,}: raise memory."
        )
        raise ValueError(msg)
    _, name, block = min(found)
    return Stream(replace(query, method=name), block)


def _while_computed(query: Query, method: str) -> int:
    """Bytes of one hyperplane while a method computes it.

    Colours and the basis give hyperplanes in another order, and the basis on the whole image: the
    result is copied once.
    """
    pixels = query.network.in_shape if method == "basis" else query.part_shape
    copies = 2 if method in ("basis", "coloured") else 1
    return (copies * prod(pixels) + query.readout.entries.numel()) * query.dtype.itemsize


def _room(query: Query) -> int:
    """Bytes of what a method gives: tangents give all channels at all positions of a box."""
    method = str(query.method)
    units = query.units.count
    if method in ("windowed", "coloured"):
        units = max(units, query.readout.elements.shape[0] * prod(query.patches.counts))
    return len(query.images) * units * _while_computed(query, method)


# blocks


def tiles(region: Sequence[slice], step: Sequence[int]) -> list[Block]:
    """A region in blocks of a shape, in order.

    Example:
        >>> tiles([slice(0, 3), slice(4, 5)], (2, 1))
        [(slice(0, 2, None), slice(4, 5, None)), (slice(2, 3, None), slice(4, 5, None))]
    """
    axes = [
        [slice(a, min(a + s, r.stop)) for a in range(r.start, r.stop, s)]
        for r, s in zip(region, step, strict=True)
    ]
    return list(product(*axes))
