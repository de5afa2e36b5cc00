"""Hyperplanes larger than memory: a selection of units in blocks, each of which is computed on its own."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.hyperplane import Hyperplanes, bytes_of, job_of, planes_of
from adjointbackmap.jobs import Job
from adjointbackmap.methods import METHODS
from adjointbackmap.network import Network
from adjointbackmap.pattern import check_images
from adjointbackmap.planner import Plan, plan_job
from adjointbackmap.units import Selection

Block = tuple[slice, ...]  # images, and units along each dimension


def iter_hyperplanes(
    network: Network,
    x: Tensor,
    layer: str,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    method: str | None = None,
    memory: str | int = "2GiB",
) -> Iterator[Hyperplanes]:
    """The hyperplanes of :func:`adjointbackmap.hyperplanes` in blocks, of which each fits in ``memory``.

    A block is a range along the first unit dimension that does not fit, of one image unless several fit whole; blocks follow
    one another as the units do. Where the units have a smaller receptive field than the image, image parts are patches on it.

    Args:
        network: Traced network, see :func:`trace`.
        x: One image ``(C, H, W)`` or a batch ``(N, C, H, W)``, in the units that the model takes.
        layer: Name in ``network.layers``.
        mode: ``"RM4"`` to ``"RM0"``.
        units: As for :func:`adjointbackmap.hyperplanes`.
        own_bias: Whether the layer's own bias belongs to the unit.
        scale: The factor k at which the pattern is taken.
        dtype: ``torch.float64`` for more than the model's own precision.
        method: As for :func:`adjointbackmap.hyperplanes`; by default the one that is cheapest in such blocks.
        memory: Bytes for one block: half for the result, half for what computing it takes.

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
    work = stream(network, x, layer, mode, units, own_bias, scale, dtype, method, memory)
    return map(work.compute, work.blocks)


@dataclass(frozen=True)
class Stream:
    """Hyperplanes that are to be computed block by block: made by :func:`stream`.

    Attributes:
        job: Which hyperplanes.
        x: The images, ``(N, C, H, W)``.
        scale: The factor k of the pattern.
        method: How every block is computed.
        memory: Bytes for one block.
        block: Images, and units along each dimension, of a block; at the ends it may be smaller.
    """

    job: Job
    x: Tensor
    scale: float
    method: str
    memory: int
    block: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Images and units, ``(N, *units)``."""
        return (len(self.x), *self.job.selection.shape)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order; together they are all images and units, each once."""
        return tiles([slice(0, extent) for extent in self.shape], self.block)

    @property
    def bytes_each(self) -> int:
        """Bytes of one hyperplane: image part, bias part and value."""
        return (prod(self.job.part) + self.job.entries.numel() + 1) * self.job.dtype.itemsize

    @property
    def plan(self) -> Plan:
        """How the first block is computed; none costs more."""
        first = self.blocks[0]
        return plan_job(_job_of(self.job, first), first[0].stop, self.method)

    def compute(self, block: Block) -> Hyperplanes:
        """The hyperplanes of one of the blocks."""
        return planes_of([_job_of(self.job, block)], self.x[block[0]], self.scale, [self.method], self.memory)[0]

    def __str__(self) -> str:
        count, blocks = prod(self.shape), len(self.blocks)
        work = f"{self.method}, at most {self.plan.multiply_adds * blocks / 1e9:,.3g} GMAC"
        return f"{count:,} hyperplanes in {blocks:,} block(s), {work}, at most {count * self.bytes_each / 2**20:,.1f} MiB"


def stream(
    network: Network,
    x: Tensor,
    layer: str,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    method: str | None = None,
    memory: str | int = "2GiB",
) -> Stream:
    """What :func:`iter_hyperplanes` goes through, before anything is computed; the arguments are the same.

    Raises:
        ValueError: If an argument does not fit, or not even one unit fits in ``memory``.

    Example:
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> print(stream(network, torch.rand(3, 8, 8), "output", "RM2", (0, 0)))
        4 hyperplanes in 1 block(s), adjoint, at most 1.56e-05 GMAC, at most 0.0 MiB
    """
    images = check_images(network, x, dtype)
    job = job_of(network, images, layer, mode, units, own_bias)
    limit = bytes_of(memory)
    method, block = _cheapest(job, len(images), method, limit)
    return Stream(job, images, scale, method, limit, block)


def _cheapest(job: Job, images: int, method: str | None, memory: int) -> tuple[str, tuple[int, ...]]:
    """The method whose blocks are the cheapest together, and their shape.

    Raises:
        ValueError: If the method is not able, or no method can compute one unit within the memory.
    """
    shape, found, able = (images, *job.selection.shape), [], _able(job, method)
    for name, plan in able.items():
        block = block_shape(shape, max(1, memory // 2 // (plan.bytes // job.count)))
        blocks = prod(-(-extent // size) for extent, size in zip(shape, block, strict=True))
        first = _job_of(job, tuple(slice(0, size) for size in block))
        if _room(first, block[0], name) <= memory // 2:
            found.append((plan_job(first, block[0], name).cost * blocks, name, block))
    if not found:
        one = _job_of(job, tuple(slice(0, 1) for _ in shape))
        least = 2 * min(_room(one, 1, name) for name in able)
        msg = f"memory must be at least {least:,} bytes for one hyperplane of {job.layer.name!r}. Got {memory:,}: raise memory."
        raise ValueError(msg)
    return min(found)[1:]


def _able(job: Job, method: str | None) -> dict[str, Plan]:
    """What each method that can give the hyperplanes, or the one that is asked for, needs for one image."""
    if method is not None:
        return {method: plan_job(job, 1, method)}
    able = {}
    for name in METHODS:
        with suppress(ValueError):
            able[name] = plan_job(job, 1, name)
    return able


def _room(job: Job, images: int, method: str) -> int:
    """Bytes of what a method gives: tangents give every channel at all positions between the chosen ones."""
    planned = plan_job(job, images, method).bytes
    if method in ("adjoint", "basis"):
        return planned
    numbers = job.network.in_shape[0] * job.end.shape[0] * prod(side.size * side.count for side in job.sides)
    return max(planned, images * numbers * job.dtype.itemsize)


def _job_of(job: Job, block: Block) -> Job:
    return replace(job, selection=part_of(job.selection, block))


# blocks


def block_shape(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """The largest block of at most ``most`` elements that takes the last dimensions whole.

    Example:
        >>> block_shape((32, 32, 4), 300), block_shape((32, 32, 4), 10), block_shape((2, 3), 1)
        ((2, 32, 4), (1, 2, 4), (1, 1))
    """
    block: tuple[int, ...] = ()
    for extent in reversed(shape):
        block = (max(1, min(extent, most // prod(block))), *block)
    return block


def tiles(region: Sequence[slice], step: Sequence[int]) -> list[Block]:
    """A region in blocks of a shape, in order.

    Example:
        >>> tiles([slice(0, 3), slice(4, 5)], (2, 1))
        [(slice(0, 2, None), slice(4, 5, None)), (slice(2, 3, None), slice(4, 5, None))]
    """
    axes = [[slice(a, min(a + s, r.stop)) for a in range(r.start, r.stop, s)] for r, s in zip(region, step, strict=True)]
    return list(product(*axes))


def part_of(selection: Selection, block: Block) -> Selection:
    """The units of a block of ``(N, *units)``."""
    images = block[0] if len(selection.flat) > 1 else slice(None)
    return Selection(selection.dims, selection.flat[images, *block[1:]], selection.names)
