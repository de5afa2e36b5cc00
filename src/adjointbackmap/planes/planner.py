"""What each exact way to the same hyperplanes costs, and which is the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

from torch import nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Step
from adjointbackmap.engine.windows import Group, strides_of
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
    able = [name for name in METHODS if _is_able(query, name)]
    if query.method is not None and query.method not in able:
        what = f"layer {query.layer.name!r} in {query.mode}"
        msg = f"method must be one of {', '.join(able)} for {what}. Got {query.method!r}: choose one of these, or leave it out."
        raise ValueError(msg)
    wanted = able if query.method is None else [query.method]
    return min((_PLANS[name](query) for name in wanted), key=lambda plan: plan.cost)


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


def plans_of(query: Query) -> dict[str, Plan]:
    """What each method that can give the hyperplanes needs, or the one that is asked for."""
    if query.method is not None:
        return {query.method: plan_query(query)}
    return {name: _PLANS[name](query) for name in METHODS if _is_able(query, name)}


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


def _planned(query: Query, method: str, vectors: int, work: tuple[float, float], batches: float) -> Plan:
    """The cost of some vectors through a network, each of which takes some products and numbers."""
    images, itemsize = len(query.images), query.dtype.itemsize
    products, numbers = (vectors * w for w in work)
    size = (prod(query.part_shape) + query.readout.entries.numel()) * query.units.count * itemsize
    numbers += 2 * size / itemsize  # the result, written and read
    steps = len(query.readout.steps())
    cost = products + NUMBER_COST * numbers + STEP_COST * batches * steps
    return Plan(method, vectors, round(images * products), images * size, round(images * cost))


def _plan_adjoint(query: Query) -> Plan:
    readout, program = query.readout, query.program
    vectors = query.units.count
    work = _work(program.upstream([readout.target]))
    found = _planned(query, "adjoint", vectors, work, vectors / program.chunk)
    if readout.rows is None:
        return found
    kernel = cast("KernelCall", readout.kernel)
    vectors = len(readout.rows.unique()) * readout.taps
    rows = _planned(query, "adjoint", vectors, _work(program.upstream([kernel.input])), vectors / program.chunk)
    # then each unit weights the taps of its row
    length = prod(query.part_shape) + readout.entries.numel()
    weighted = len(query.images) * query.units.count * readout.taps * length
    return replace(rows, multiply_adds=rows.multiply_adds + weighted, cost=rows.cost + weighted)


def _plan_basis(query: Query) -> Plan:
    vectors = prod(query.network.in_shape) + query.readout.entries.numel()
    return _planned(query, "basis", vectors, _work(query.readout.steps()), vectors / query.program.chunk)


def _plan_coloured(query: Query) -> Plan:
    vectors = prod(query.part_shape) + query.readout.entries.numel()
    return _planned(query, "coloured", vectors, _work(query.readout.steps()), vectors / query.program.chunk)


def _plan_windowed(query: Query) -> Plan:
    """One pixel's windows stand for all; biases are counted as if each went through half of the network."""
    program, fields = query.program, query.program.fields
    steps, entries = query.readout.steps(), query.readout.entries.numel()
    slots = [program.image.slot, *(step.output.slot for step in steps)]
    strides = strides_of([fields[slot] for slot in slots], len(query.network.in_shape) - 1)
    pixel = Group.of_one(strides)
    shares = {}
    for step in steps:
        spans, whole = pixel.spans(fields[step.output.slot]), prod(step.output.shape[1:])
        windowed = whole if spans is None else prod(max(0, s.size) for s in spans)
        shares[step.output.slot] = min(1.0, windowed / whole)
    pixels = query.network.in_shape[0] * prod(map(len, query.patches.reached()))
    vectors = pixels + entries
    on_windows, on_maps = _work(steps, shares), _work(steps)
    products, numbers = ((w * pixels + m * entries / 2) / max(1, vectors) for w, m in zip(on_windows, on_maps, strict=True))
    batches = prod(strides) + entries / program.chunk
    return _planned(query, "windowed", vectors, (products, numbers), batches)


_PLANS: dict[str, Callable[[Query], Plan]] = {
    "adjoint": _plan_adjoint,
    "basis": _plan_basis,
    "coloured": _plan_coloured,
    "windowed": _plan_windowed,
}
METHODS = tuple(_PLANS)
