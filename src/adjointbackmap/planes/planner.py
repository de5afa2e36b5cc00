"""The cost of each method that computes hyperplanes, and the choice of the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

from torch import nn

from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import IMAGES_AT_ONCE
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Program
from adjointbackmap.engine.sweep import Batches
from adjointbackmap.engine.workspace import (
    bytes_of_vector,
    on_windows,
    vectors_within,
    whole,
    work_of,
)
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.readout import Readout
from adjointbackmap.planes.tiles import Tiling, tilings
from adjointbackmap.rules import Value

WHOLE_FIELD = "each unit sees the whole image"  # so that windows of cotangents save little
# Costs are in multiply-adds: the number of these that take as long, measured on a CPU.
STEP_COST = 2_000_000  # the start of a step, before it computes
WINDOWED_STEPS = 2  # times this: a step of windowed cotangents also cuts gates and pads
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

    Coloured and windowed tangents need units at the positions of a map. Windowed cotangents take
    RM2 alone: in RM4 units share rows, which is cheaper.
    """
    if method == "adjoint":
        return True
    if method == "windowed-adjoint":
        return query.in_patches and query.mode == "RM2"
    return query.readout.takes_tangents and (method == "basis" or query.is_on_maps)


def _why_no_windows(query: Query) -> str:
    """Why a convolution has no windows and colours; empty for other layers and if it has them.

    Windows and colours are written for maps of rows and columns.
    """
    axes = len(query.target.shape) - 1
    is_convolution = "RM4" in query.layer.modes
    if axes == 2 or not is_convolution or query.mode not in ("RM2", "RM4"):
        return ""
    counted = "1 axis" if axes == 1 else f"{axes} axes"
    return f"no windows and colours: these need maps with 2 axes, this one has {counted}"


def _work_to(program: Program, target: Value) -> tuple[float, float]:
    """The work of one vector through all steps that lead to a value, see :func:`work_of`."""
    return program.once(("work to", target.slot), lambda: work_of(program.upstream([target])))


def _work_of(readout: Readout) -> tuple[float, float]:
    """The work of one tangent from the image to the units, see :func:`work_of`."""
    key = ("work of", readout.source.slot, readout.elements)
    return readout.program.once(key, lambda: work_of(readout.steps()))


def _work_on_windows(readout: Readout, strides: tuple[int, ...]) -> tuple[float, float]:
    """The same on the windows of one pixel."""

    def compute() -> tuple[float, float]:
        size = on_windows(readout.program.fields, strides)
        steps = readout.steps()
        shares = {step.output.slot: size(step.output) / whole(step.output) for step in steps}
        return work_of(steps, shares)

    key = ("work on windows", readout.source.slot, readout.elements, strides)
    return readout.program.once(key, compute)


def vectors_at_once(query: Query, method: str) -> int:
    """Number of tangents or cotangents in a batch of a method, over all its images."""
    if method == "windowed-adjoint":
        return cheapest_tiling(query).at_once
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
    if method == "windowed-adjoint":
        return cheapest_tiling(query).cost.held + prod(query.part_shape) + program.bias_length
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
    sizes = (images * size, workspace, round(images * cost))
    return Plan(method, vectors, multiply_adds, *sizes, _why_no_windows(query))


def _plan_adjoint(query: Query) -> Plan:
    """One cotangent for each unit, or for each tap of the rows that units share."""
    readout = query.readout
    program = query.program
    vectors = query.units.count
    work = _work_to(program, readout.target)
    at_once = vectors_at_once(query, "adjoint")
    found = _planned(query, "adjoint", vectors, work, vectors / at_once)
    if readout.row_count is None:
        return replace(found, note=_note(query) or found.note)
    kernel = cast("KernelCall", readout.kernel)
    vectors = readout.row_count * readout.taps
    work = _work_to(program, kernel.input)
    rows = _planned(query, "adjoint", vectors, work, vectors / at_once)
    # then each unit is a sum over the taps of its row, weighted by its kernel
    length = prod(query.part_shape) + readout.entries.numel()
    weighted = len(query.images) * query.units.count * readout.taps * length
    return replace(rows, multiply_adds=rows.multiply_adds + weighted, cost=rows.cost + weighted)


def _plan_windowed_adjoint(query: Query) -> Plan:
    """One cotangent for each unit, on the windows of the units at the same tile of positions.

    All tiles cost what one in the middle of the map costs.
    """
    tiling = cheapest_tiling(query)
    work = (tiling.cost.products, tiling.cost.numbers)
    batches = WINDOWED_STEPS * tiling.batches
    found = _planned(query, "windowed-adjoint", query.units.count, work, batches)
    return replace(found, note=_note(query) or found.note)


def _note(query: Query) -> str:
    """What a plan of cotangents says if each unit sees the whole image."""
    is_whole = query.is_on_maps and query.patches.size == query.network.in_shape[1:]
    return WHOLE_FIELD if is_whole else ""


def cheapest_tiling(query: Query) -> Tiling:
    """The tiles of windowed cotangents: larger ones make fewer batches, but larger windows."""
    steps = len(query.program.upstream([query.target]))

    def cost(tiling: Tiling) -> float:
        vector = tiling.cost.products + NUMBER_COST * tiling.cost.numbers
        return query.units.count * vector + STEP_COST * WINDOWED_STEPS * tiling.batches * steps

    return min(tilings(query), key=cost)


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
    "windowed-adjoint": _plan_windowed_adjoint,
}
METHODS = tuple(_PLANS)
