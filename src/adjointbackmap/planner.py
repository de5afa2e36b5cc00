"""What each exact way to the same hyperplanes costs, and which is the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from adjointbackmap.jobs import Job, with_own_bias
from adjointbackmap.network import Network
from adjointbackmap.program import Step
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.units import select, unit_dims
from adjointbackmap.windows import Group, pixels_reaching, strides_of

STEP_COST = 2_000_000  # multiply-adds that fit into the time which a step takes before it computes
NUMBER_COST = 10  # and into the time that a number takes to be read and written


@dataclass(frozen=True)
class Plan:
    """How some hyperplanes are computed.

    Attributes:
        method: ``"adjoint"``, ``"basis"``, ``"coloured"`` or ``"windowed"``.
        vectors: Cotangents or tangents.
        multiply_adds: Of the convolutions and products.
        bytes: Size of the result.
        cost: Multiply-adds, and what steps and numbers take beside them, in the same unit.
    """

    method: str
    vectors: int
    multiply_adds: int
    bytes: int
    cost: int

    def __str__(self) -> str:
        kind = "cotangents" if self.method == "adjoint" else "tangents"
        work = f"{self.multiply_adds / 1e9:.3g} GMAC, {self.bytes / 2**20:,.1f} MiB"
        return f"{self.method}: {self.vectors:,} {kind}, {work}"


def plan(
    network: Network, layer: str, mode: str, units: Any = None, own_bias: bool | None = None, method: str | None = None
) -> Plan:
    """How the hyperplanes of some units of one image are computed, see :func:`adjointbackmap.hyperplanes`.

    Raises:
        ValueError: If the layer, mode, units or method do not fit the network.
    """
    chosen = network.layer(layer)
    own_bias = with_own_bias(chosen, mode, own_bias)
    in_channels = 0 if own_bias else network.kernel(chosen).rule.in_channels
    selection = select(unit_dims(chosen, mode, in_channels), units, 1)
    return plan_job(Job(network, chosen, mode, own_bias, selection, network.dtype), 1, method)


def plan_job(job: Job, images: int, method: str | None = None) -> Plan:
    """The cheapest way, or the one that is asked for.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    able = {name: of for name, of in _PLANS.items() if _is_able(job, name)}
    if method is not None and method not in able:
        what = f"layer {job.layer.name!r} in {job.mode}"
        msg = f"method must be one of {', '.join(able)} for {what}. Got {method!r}: choose one of these, or leave it out."
        raise ValueError(msg)
    return min((of(job, images) for name, of in able.items() if method in (None, name)), key=lambda p: p.cost)


def plan_jobs(jobs: Sequence[Job], images: int, method: str | None = None) -> list[Plan]:
    """The cheapest way for several layers: one windowed sweep costs them all what it costs the deepest.

    Raises:
        ValueError: If the method is unknown, or cannot give these hyperplanes.
    """
    own = [plan_job(job, images, method) for job in jobs]
    if len(jobs) == 1 or method is not None:
        return own
    swept = [_plan_windowed(job, images) if _is_able(job, "windowed") else None for job in jobs]
    together = max((s.cost for s in swept if s), default=0)
    apart = sum(o.cost for o, s in zip(own, swept, strict=True) if s)
    return own if apart <= together else [s or o for o, s in zip(own, swept, strict=True)]


def _is_able(job: Job, method: str) -> bool:
    return method == "adjoint" or job.by_columns(maps=method != "basis")


def _work(steps: list[Step], shares: dict[int, float] | None = None) -> tuple[float, float]:
    """Multiply-adds and numbers of one tangent through some steps; ``shares`` has the share of each output that is computed."""
    products = numbers = 0.0
    for step in steps:
        size = prod(step.output.shape) * (1.0 if shares is None else shares[step.output.slot])
        numbers += size
        if isinstance(step.rule, Kernel):
            products += size * step.rule.weight[0].numel()
    return products, numbers


def _planned(job: Job, images: int, method: str, vectors: int, work: tuple[float, float], batches: float) -> Plan:
    products, numbers = (vectors * w for w in work)
    size = (prod(job.part) + job.entries.numel()) * job.count * job.dtype.itemsize
    numbers += 2 * size / job.dtype.itemsize  # the result, read and written
    cost = products + NUMBER_COST * numbers + STEP_COST * batches * len(job.steps())
    return Plan(method, vectors, round(images * products), images * size, round(images * cost))


def _plan_adjoint(job: Job, images: int) -> Plan:
    vectors = job.count
    found = _planned(job, images, "adjoint", vectors, _work(job.program.upstream([job.target])), vectors / job.program.chunk)
    if job.rows is None:
        return found
    vectors = len(job.rows.unique()) * job.taps
    rows = _planned(job, images, "adjoint", vectors, _work(job.program.upstream([job.kernel.input])), vectors / job.program.chunk)
    weighted = images * job.count * job.taps * (prod(job.part) + job.entries.numel())
    return replace(rows, multiply_adds=rows.multiply_adds + weighted, cost=rows.cost + weighted)


def _plan_basis(job: Job, images: int) -> Plan:
    vectors = prod(job.network.in_shape) + job.entries.numel()
    return _planned(job, images, "basis", vectors, _work(job.steps()), vectors / job.program.chunk)


def _plan_coloured(job: Job, images: int) -> Plan:
    vectors = prod(job.part) + job.entries.numel()
    return _planned(job, images, "coloured", vectors, _work(job.steps()), vectors / job.program.chunk)


def _plan_windowed(job: Job, images: int) -> Plan:
    """One pixel's windows stand for all; biases are counted as if each went through half of the network."""
    program, (channels, *image), fields = job.program, job.network.in_shape, job.program.fields
    steps, entries = job.steps(), job.entries.numel()
    strides = strides_of([fields[s] for s in (program.image.slot, *(s.output.slot for s in steps))], len(image))
    group = Group((0,) * len(image), (1,) * len(image), strides)
    shares = {}
    for step in steps:
        spans, whole = group.spans(fields[step.output.slot]), prod(step.output.shape[1:])
        shares[step.output.slot] = 1.0 if spans is None else min(1.0, prod(max(0, s.size) for s in spans) / whole)
    pixels = channels * prod(len(axis) for axis in pixels_reaching(job.sides, image))
    on_windows, on_maps = _work(steps, shares), _work(steps)
    vectors = pixels + entries
    work = tuple((w * pixels + m * entries / 2) / max(1, vectors) for w, m in zip(on_windows, on_maps, strict=True))
    batches = prod(strides) + entries / job.program.chunk
    return _planned(job, images, "windowed", vectors, (work[0], work[1]), batches)


_PLANS: dict[str, Callable[[Job, int], Plan]] = {
    "adjoint": _plan_adjoint,
    "basis": _plan_basis,
    "coloured": _plan_coloured,
    "windowed": _plan_windowed,
}
