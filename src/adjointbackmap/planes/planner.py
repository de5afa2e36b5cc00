"""The cost of each method that computes hyperplanes, and the choice of the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

from torch import nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import IMAGES_AT_ONCE
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Program, Step
from adjointbackmap.engine.sweep import Batches
from adjointbackmap.engine.workspace import (
    bytes_of_vector,
    on_windows,
    vectors_within,
    whole,
)
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.readout import Readout
from adjointbackmap.rules import Value
from adjointbackmap.rules.kernels import Kernel

# Costs are in multiply-adds: the number of these that take as long, measured on a CPU.
STEP_COST = 2_000_000  # the start of a step, before it computes
NUMBER_COST = 10  # reading and writing one number


def plan(
    network: Network,
    layer: str | nn.Module,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    method: str | None = None,
) -> Plan:
    """The plan for the hyperplanes of some units of one image.

    It has the method and the numbers of vectors, multiply-adds and bytes.

    Args:
        network: Traced network, see :func:`trace`.
        layer: Name in ``network.layers``, or a module of the model.
        mode: One of its reconstruction modes.
        units: As for :func:`adjointbackmap.hyperplanes`.
        own_bias: Whether the layer's own bias belongs to the units.
        method: Method of the plan; by default the cheapest.

    Raises:
        TypeError: If ``network`` is no traced network.
        ValueError: If the layer, mode, units or method do not fit the network.
        RuntimeError: If the model was changed since the trace.

    Example:
        >>> import torch
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> plan(network, "output", "RM2", units=(0, 0, 0)).vectors
        1
    """
    return plan_query(Query.of_any_image(network, layer, mode, units, own_bias, method))


def plan_query(query: Query) -> Plan:
    """The plan of the query's method, or of the cheapest method if the query has none.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    return min((_PLANS[name](query) for name in able_methods(query)), key=lambda plan: plan.cost)


def plan_queries(queries: Sequence[Query]) -> list[Plan]:
    """The cheapest plans for several layers at the same images.

    One windowed sweep gives all layers at the cost of the deepest one. So it is used for all layers
    that can have it, unless their cheapest plans cost less in total.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    own = [plan_query(query) for query in queries]
    if len(queries) == 1 or queries[0].method is not None:
        return own
    swept = [_plan_windowed(query) if _is_able(query, "windowed") else None for query in queries]
    together = max((s.cost for s in swept if s), default=0)
    # only of the layers that the sweep can give
    apart = sum(o.cost for o, s in zip(own, swept, strict=True) if s)
    return own if apart <= together else [s or o for o, s in zip(own, swept, strict=True)]


def able_methods(query: Query) -> list[str]:
    """The query's method, or all methods that can give its hyperplanes if it has none.

    Raises:
        ValueError: If its method is unknown, or cannot give them.
    """
    able = [name for name in METHODS if _is_able(query, name)]
    if query.method is None:
        return able
    if query.method not in able:
        what = f"layer {query.layer.name!r} in {query.mode}"
        msg = (
            f"method must be one of {', '.join(able)} for {what}. "
            f"Got {query.method!r}: choose one of these, or leave it out."
        )
        raise ValueError(msg)
    return [query.method]


def _is_able(query: Query, method: str) -> bool:
    """Whether a method can give the hyperplanes of a query.

    Coloured and windowed tangents need units at the positions of a map.
    """
    if method == "adjoint":
        return True
    return query.readout.takes_tangents and (method == "basis" or query.is_on_maps)


def _work(steps: list[Step], shares: dict[int, float] | None = None) -> tuple[float, float]:
    """Multiply-adds of one tangent through some steps, and numbers that it writes.

    Args:
        steps: The steps.
        shares: Slot of an output -> share of its elements that is computed; by default all.
    """
    products = numbers = 0.0
    for step in steps:
        size = prod(step.output.shape) * (1.0 if shares is None else shares[step.output.slot])
        numbers += size
        if isinstance(step.rule, Kernel):
            products += size * step.rule.weight[0].numel()
    return products, numbers


def _work_to(program: Program, target: Value) -> tuple[float, float]:
    """The work of one vector through all steps that lead to a value, see :func:`_work`."""
    return program.once(("work to", target.slot), lambda: _work(program.upstream([target])))


def _work_of(readout: Readout) -> tuple[float, float]:
    """The work of one tangent from the image to the units, see :func:`_work`."""
    key = ("work of", readout.source.slot, readout.elements)
    return readout.program.once(key, lambda: _work(readout.steps()))


def _work_on_windows(readout: Readout, strides: tuple[int, ...]) -> tuple[float, float]:
    """The same on the windows of one pixel."""

    def compute() -> tuple[float, float]:
        size = on_windows(readout.program.fields, strides)
        steps = readout.steps()
        shares = {step.output.slot: size(step.output) / whole(step.output) for step in steps}
        return _work(steps, shares)

    key = ("work on windows", readout.source.slot, readout.elements, strides)
    return readout.program.once(key, compute)


def vectors_at_once(query: Query, method: str) -> int:
    """Number of tangents or cotangents in a batch of a method, over all its images."""
    within = vectors_within(query.room, _held(query, method), query.dtype.itemsize)
    return query.program.chunk if within is None else min(within, query.program.chunk)


def images_per_batch(queries: Sequence[Query], methods: Sequence[str]) -> int:
    """Number of images in one call of the model, and in one batch."""
    together = (vectors_at_once(q, method) for q, method in zip(queries, methods, strict=True))
    return min(IMAGES_AT_ONCE, *together)


def _held(query: Query, method: str) -> int:
    """Most numbers that one vector of a batch has in memory at a time."""
    readout = query.readout
    program = query.program
    image = prod(query.network.in_shape)
    if method != "adjoint":
        return readout.numbers_of_tangent + image
    return readout.numbers_of_cotangent + image + program.bias_length


def _planned(
    query: Query, method: str, vectors: int, work: tuple[float, float], batches: float
) -> Plan:
    """The plan of a method.

    Args:
        query: The query.
        method: The method.
        vectors: Number of vectors for one image.
        work: Multiply-adds and numbers of one vector.
        batches: Number of batches for one image.
    """
    images = len(query.images)
    itemsize = query.dtype.itemsize
    products, numbers = (vectors * w for w in work)
    size = (prod(query.part_shape) + query.readout.entries.numel()) * query.units.count * itemsize
    numbers += 2 * size / itemsize  # the result is written and then read
    steps = len(query.readout.steps())
    cost = products + NUMBER_COST * numbers + STEP_COST * batches * steps
    in_batch = min(vectors * min(images, IMAGES_AT_ONCE), vectors_at_once(query, method))
    workspace = in_batch * bytes_of_vector(_held(query, method), itemsize)
    multiply_adds = round(images * products)
    return Plan(method, vectors, multiply_adds, images * size, workspace, round(images * cost))


def _plan_adjoint(query: Query) -> Plan:
    """One cotangent for each unit, or for each tap of the rows that units share."""
    readout = query.readout
    program = query.program
    vectors = query.units.count
    work = _work_to(program, readout.target)
    at_once = vectors_at_once(query, "adjoint")
    found = _planned(query, "adjoint", vectors, work, vectors / at_once)
    if readout.row_count is None:
        return found
    kernel = cast("KernelCall", readout.kernel)
    vectors = readout.row_count * readout.taps
    work = _work_to(program, kernel.input)
    rows = _planned(query, "adjoint", vectors, work, vectors / at_once)
    # then each unit is a sum over the taps of its row, weighted by its kernel
    length = prod(query.part_shape) + readout.entries.numel()
    weighted = len(query.images) * query.units.count * readout.taps * length
    return replace(rows, multiply_adds=rows.multiply_adds + weighted, cost=rows.cost + weighted)


def _plan_basis(query: Query) -> Plan:
    """One tangent for each pixel and channel, and for each bias of the layer."""
    vectors = prod(query.network.in_shape) + query.readout.entries.numel()
    batches = vectors / vectors_at_once(query, "basis")
    return _planned(query, "basis", vectors, _work_of(query.readout), batches)


def _plan_coloured(query: Query) -> Plan:
    """One tangent for each element of a patch, and for each bias of the layer."""
    vectors = prod(query.part_shape) + query.readout.entries.numel()
    batches = vectors / vectors_at_once(query, "coloured")
    return _planned(query, "coloured", vectors, _work_of(query.readout), batches)


def _plan_windowed(query: Query) -> Plan:
    """One tangent for each pixel and channel on its windows, and for each bias of the layer.

    All pixels cost what one in the middle costs. A bias starts at its own layer: on average it
    passes half of the network.
    """
    program = query.program
    readout = query.readout
    entries = readout.entries.numel()
    after = [readout.apart] if readout.apart else []
    batches = Batches.of(program, [readout.source], after, 1, query.dtype, query.room)
    reached = [len(axis) for axis in query.patches.reached()]  # rows and columns of the image
    pixels = query.network.in_shape[0] * prod(reached)
    vectors = pixels + entries
    # work on windows, for a pixel, and on whole maps, for a bias; then the mean of all vectors
    parts = zip(_work_on_windows(readout, batches.strides), _work_of(readout), strict=True)
    products, numbers = ((w * pixels + m * entries / 2) / max(1, vectors) for w, m in parts)
    # pixels along each axis that are congruent modulo the stride: these go together
    count = [-(-n // stride) for n, stride in zip(reached, batches.strides, strict=True)]
    fast = min(replace(batches, within=None).pixels(count), prod(count))
    together = min(batches.pixels(count), fast)
    at_once = vectors_at_once(query, "windowed")
    # one batch for each residue modulo the strides, more where the memory allows fewer pixels
    sweeps = prod(batches.strides) * fast / together + entries / at_once
    found = _planned(query, "windowed", vectors, (products, numbers), sweeps)
    each = bytes_of_vector(_held(query, "windowed"), query.dtype.itemsize)
    workspace = max(min(entries, at_once) * each, together * batches.bytes_of_pixel)
    return replace(found, workspace=workspace)


_PLANS: dict[str, Callable[[Query], Plan]] = {
    "adjoint": _plan_adjoint,
    "basis": _plan_basis,
    "coloured": _plan_coloured,
    "windowed": _plan_windowed,
}
METHODS = tuple(_PLANS)
