"""What each exact way to the same hyperplanes costs, and which is the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

from torch import nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import IMAGES_AT_ONCE
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Step
from adjointbackmap.engine.sweep import Batches
from adjointbackmap.engine.workspace import (
    bytes_of_vector,
    on_windows,
    vectors_within,
    whole,
)
from adjointbackmap.planes.query import Query
from adjointbackmap.rules.kernels import Kernel

STEP_COST = 2_000_000  # multiply-adds that fit into the time which a step takes before it computes
NUMBER_COST = 10  # and into the time that a number takes to be read and written


def plan(
    network: Network,
    layer: str | nn.Module,
    mode: str,
    units: Any = None,
    own_bias: bool | None = None,
    method: str | None = None,
) -> Plan:
    """How the hyperplanes of some units of one image are computed: method, vectors, multiply-adds, bytes.

    Args:
        network: Traced network, see :func:`trace`.
        layer: Name in ``network.layers``, or a module of the model.
        mode: One of its reconstruction modes.
        units: As for :func:`adjointbackmap.hyperplanes`.
        own_bias: Whether the layer's own bias belongs to the units.
        method: A method to look at; by default the cheapest.

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
    """The cheapest way, or the one that is asked for.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    return min((_PLANS[name](query) for name in able_methods(query)), key=lambda plan: plan.cost)


def plan_queries(queries: Sequence[Query]) -> list[Plan]:
    """The cheapest way for several layers: one windowed sweep costs them all what it costs the deepest.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    own = [plan_query(query) for query in queries]
    if len(queries) == 1 or queries[0].method is not None:
        return own
    swept = [_plan_windowed(query) if _is_able(query, "windowed") else None for query in queries]
    together = max((s.cost for s in swept if s), default=0)
    apart = sum(o.cost for o, s in zip(own, swept, strict=True) if s)
    return own if apart <= together else [s or o for o, s in zip(own, swept, strict=True)]


def able_methods(query: Query) -> list[str]:
    """The methods that can give the hyperplanes, or the one that is asked for.

    Raises:
        ValueError: If the one that is asked for is unknown, or cannot give them.
    """
    able = [name for name in METHODS if _is_able(query, name)]
    if query.method is None:
        return able
    if query.method not in able:
        what = f"layer {query.layer.name!r} in {query.mode}"
        msg = f"method must be one of {', '.join(able)} for {what}. Got {query.method!r}: choose one of these, or leave it out."
        raise ValueError(msg)
    return [query.method]


def _is_able(query: Query, method: str) -> bool:
    """Whether a method gives these hyperplanes: colours and windows need units at the positions of a map."""
    if method == "adjoint":
        return True
    return query.readout.takes_tangents and (method == "basis" or query.is_on_maps)


def _work(steps: list[Step], shares: dict[int, float] | None = None) -> tuple[float, float]:
    """Multiply-adds and numbers of one tangent through some steps; ``shares`` has the share of each output that is computed."""
    products = numbers = 0.0
    for step in steps:
        size = prod(step.output.shape) * (1.0 if shares is None else shares[step.output.slot])
        numbers += size
        if isinstance(step.rule, Kernel):
            products += size * step.rule.weight[0].numel()
    return products, numbers


def vectors_at_once(query: Query, method: str) -> int:
    """Tangents or cotangents in a batch of a method, of all images together."""
    within = vectors_within(query.room, _held(query, method), query.dtype.itemsize)
    return query.program.chunk if within is None else min(within, query.program.chunk)


def images_at_once(queries: Sequence[Query], methods: Sequence[str]) -> int:
    """Images in one call of the model, and in one batch."""
    together = (vectors_at_once(q, method) for q, method in zip(queries, methods, strict=True))
    return min(IMAGES_AT_ONCE, *together)


def _held(query: Query, method: str) -> int:
    """Largest count of numbers that one vector of a batch has in memory."""
    readout = query.readout
    program = query.program
    image = prod(query.network.in_shape)
    if method != "adjoint":
        return readout.numbers_of_tangent + image
    bias = sum(entry.value.numel() for entry in program.entries)
    return readout.numbers_of_cotangent + image + bias


def _planned(
    query: Query, method: str, vectors: int, work: tuple[float, float], batches: float
) -> Plan:
    """The cost of some vectors through a network, each of which takes some products and numbers."""
    images = len(query.images)
    itemsize = query.dtype.itemsize
    products, numbers = (vectors * w for w in work)
    size = (prod(query.part_shape) + query.readout.entries.numel()) * query.units.count * itemsize
    numbers += 2 * size / itemsize  # the result, written and read
    steps = len(query.readout.steps())
    cost = products + NUMBER_COST * numbers + STEP_COST * batches * steps
    in_batch = min(vectors * min(images, IMAGES_AT_ONCE), vectors_at_once(query, method))
    workspace = in_batch * bytes_of_vector(_held(query, method), itemsize)
    return Plan(
        method, vectors, round(images * products), images * size, workspace, round(images * cost)
    )


def _plan_adjoint(query: Query) -> Plan:
    readout = query.readout
    program = query.program
    vectors = query.units.count
    work = _work(program.upstream([readout.target]))
    at_once = vectors_at_once(query, "adjoint")
    found = _planned(query, "adjoint", vectors, work, vectors / at_once)
    if readout.row_count is None:
        return found
    kernel = cast("KernelCall", readout.kernel)
    vectors = readout.row_count * readout.taps
    work = _work(program.upstream([kernel.input]))
    rows = _planned(query, "adjoint", vectors, work, vectors / at_once)
    # then each unit weights the taps of its row
    length = prod(query.part_shape) + readout.entries.numel()
    weighted = len(query.images) * query.units.count * readout.taps * length
    return replace(rows, multiply_adds=rows.multiply_adds + weighted, cost=rows.cost + weighted)


def _plan_basis(query: Query) -> Plan:
    vectors = prod(query.network.in_shape) + query.readout.entries.numel()
    batches = vectors / vectors_at_once(query, "basis")
    return _planned(query, "basis", vectors, _work(query.readout.steps()), batches)


def _plan_coloured(query: Query) -> Plan:
    vectors = prod(query.part_shape) + query.readout.entries.numel()
    batches = vectors / vectors_at_once(query, "coloured")
    return _planned(query, "coloured", vectors, _work(query.readout.steps()), batches)


def _plan_windowed(query: Query) -> Plan:
    """One pixel's windows count for all; a bias counts as if it went through half of the network."""
    program = query.program
    readout = query.readout
    steps = readout.steps()
    entries = readout.entries.numel()
    after = [readout.apart] if readout.apart else []
    batches = Batches.of(program, [readout.source], after, 1, query.dtype, query.room)
    size = on_windows(program.fields, batches.strides)
    shares = {step.output.slot: size(step.output) / whole(step.output) for step in steps}
    reached = [len(axis) for axis in query.patches.reached()]
    pixels = query.network.in_shape[0] * prod(reached)
    vectors = pixels + entries
    parts = zip(_work(steps, shares), _work(steps), strict=True)  # on windows, on whole maps
    products, numbers = ((w * pixels + m * entries / 2) / max(1, vectors) for w, m in parts)
    count = [-(-n // stride) for n, stride in zip(reached, batches.strides, strict=True)]
    fast = min(replace(batches, within=None).pixels(count), prod(count))
    together = min(batches.pixels(count), fast)
    at_once = vectors_at_once(query, "windowed")
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
