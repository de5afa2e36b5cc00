"""Distance from an image to the kinks of all units, and so to the end of its linear region.

One sweep over all units gives the norms that the distances need.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor

from adjointbackmap.analysis.crossings import NORMS, Plane
from adjointbackmap.capture.precision import exact
from adjointbackmap.display import Shown, Summary, Table
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.operators import basis, pull, push
from adjointbackmap.engine.pattern import (
    ActivationPattern,
    check_images,
    check_pattern,
    dtype_of,
    pattern_of,
)
from adjointbackmap.engine.program import IMAGE, Program, Step
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.rules import Rule, Value
from adjointbackmap.rules.base import Gates, Shape
from adjointbackmap.rules.infinite import Infinite
from adjointbackmap.rules.kinks import Levels
from adjointbackmap.rules.moving import Slice
from adjointbackmap.rules.pooling import Largest, MaxPooling, Taken, Winner
from adjointbackmap.rules.sorting import OrderStatistic, RunningMaximum, Sort, TopK

# Kinks within this factor of the smallest distance are computed again. The factor is far larger
# than the error of a float32 sweep.
MARGIN = 1.01
AT_ONCE = 32  # kinks of one operation that are computed again in one batch


def kinks_of(rule: Rule) -> tuple[float, ...]:
    """Kinks or jumps of a function of one number; an empty tuple for any other operation.

    Example:
        >>> from adjointbackmap.rules.piecewise import Clamp, ReLU6
        >>> kinks_of(ReLU6(0.0, 6.0)), kinks_of(Clamp(None, 1.0))
        ((0.0, 6.0), (1.0,))
    """
    levels = [kink for kink in rule.kinks() or () if isinstance(kink, Levels)]
    if len(levels) != 1 or levels[0].of != (0,):
        return ()
    return tuple(at for at in levels[0].at if isinstance(at, float))


class Gap(Rule):
    """The first value minus the second. It is zero at the kink of their maximum.

    Args:
        dims: Dimensions that the first value lacks and the second has.
    """

    def __init__(self, dims: Sequence[int] = ()) -> None:
        self.dims = sorted(dims)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """``a - b``."""
        first, second = tangents
        for dim in self.dims:
            first = first.unsqueeze(dim)
        return first - second

    def positional(self) -> bool:
        """Whether both values have all dimensions."""
        return not self.dims


@dataclass(frozen=True)
class Watched:
    """A value whose units have kinks: its name, its place in the program and its kinks."""

    name: str
    value: Value
    kinks: tuple[float, ...]


@dataclass(frozen=True)
class Extended(ActivationPattern):
    """An activation pattern whose program also computes the gaps of its maxima."""

    steps: Program

    @property
    def program(self) -> Program:
        """The network's steps, followed by the gaps."""
        return self.steps

    def to(self, dtype: torch.dtype) -> "Extended":
        """The same gates in another dtype; no gate is computed again."""
        own = self.network.program(dtype)
        gaps = self.steps.steps[len(own.steps) :]
        gates = {
            slot: tuple(g.to(dtype) if g.is_floating_point() else g for g in found)
            for slot, found in self.gates.items()
        }
        return Extended(
            self.network,
            dtype,
            self.images,
            gates,
            Program(own.image, own.device, own.steps + gaps, own.entries),
            x=self.x.to(dtype),
            scale=self.scale,
        )


class Watch:
    """One pass over the steps of a pattern that collects the values with kinks.

    Attributes:
        found: The values with kinks.
        unmeasured: Names of the operations whose kinks are not measured.
    """

    def __init__(self, pattern: ActivationPattern) -> None:
        own = pattern.program
        self.pattern = pattern
        self.gates = dict(pattern.gates)
        self.program = Program(own.image, own.device, list(own.steps), own.entries)
        self.slots = max(
            [IMAGE, *(e.slot for e in own.entries), *(s.output.slot for s in own.steps)],
        )
        self.names = layer_names(pattern.network)
        self.found: list[Watched] = []
        self.unmeasured: list[str] = []
        for step in own.steps:
            self.visit(step)

    def extended(self) -> Extended:
        """The pattern, with steps that compute these values."""
        own = self.pattern
        return Extended(
            own.network,
            own.dtype,
            own.images,
            self.gates,
            self.program,
            x=own.x,
            scale=own.scale,
        )

    def visit(self, step: Step) -> None:
        """Watch what one step compares."""
        kinks = step.rule.kinks()
        if kinks is None:
            if step.output.slot in self.gates:
                self.unmeasured.append(self.name(step))
            return
        for kink in kinks:
            if not isinstance(kink, Levels):
                self.contest(step)
            elif all(isinstance(at, float | int) for at in kink.at):
                self.levels(step, kink)
            else:
                self.unmeasured.append(self.name(step))

    def levels(self, step: Step, kink: Levels) -> None:
        """Watch an input, or the difference of two."""
        inputs = [step.inputs[i] for i in kink.of if i < len(step.inputs)]
        value = inputs[0]
        if len(inputs) > 1:
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            value = self.put(Gap(), tuple(inputs), tuple(shape))
        self.keep(self.name(step), value, tuple(float(cast("float", at)) for at in kink.at))

    def contest(self, step: Step) -> None:
        """Watch the elements among which an operation chooses."""
        rule = step.rule
        output = step.output
        if isinstance(rule, Largest | Winner | OrderStatistic):
            dims = rule.dims if isinstance(rule, Largest) else [rule.dim]
            gap = Gap(() if rule.keepdim else dims)
            value = self.put(gap, (output, step.inputs[0]), step.inputs[0].shape)
            self.keep(self.name(step), value)
        elif isinstance(rule, Sort | TopK | RunningMaximum):
            self.order(rule, step)
        elif isinstance(rule, MaxPooling):
            for n, places in enumerate(_window(rule, step, self.gates[output.slot][0])):
                other = self.put(rule, step.inputs, output.shape, (places,))
                self.keep(f"{self.name(step)}[{n}]", self.put(Gap(), (output, other), output.shape))
        else:
            self.unmeasured.append(self.name(step))

    def order(self, rule: Sort | TopK | RunningMaximum, step: Step) -> None:
        """Watch an operation that orders elements.

        A sort has a kink where two neighbours are equal. ``topk`` has one where one of the k
        largest equals another element. A running maximum has one where the winner equals the next
        element.
        """
        x = step.inputs[0]
        out = step.output
        length = step.inputs[0].shape[rule.dim - 1]
        if isinstance(rule, TopK):
            for n in range(rule.options["k"]):
                self.keep(
                    f"{self.name(step)}[{n}]",
                    self.put(Gap(), (self.part(rule, out, n, n + 1), x), x.shape),
                )
        elif length > 1:
            first = self.part(rule, out, 0, length - 1)
            second = self.part(rule, out if isinstance(rule, Sort) else x, 1, length)
            self.keep(self.name(step), self.put(Gap(), (first, second), first.shape))

    def part(self, rule: Taken, value: Value, start: int, stop: int) -> Value:
        """A slice of a value along the dimension of a rule."""
        shape = (*value.shape[: rule.dim - 1], stop - start, *value.shape[rule.dim :])
        return self.put(Slice(len(shape) - 1, rule.dim, start, stop, 1), (value,), shape)

    def name(self, step: Step) -> str:
        """Name of an operation."""
        return step_name(self.names, step)

    def put(self, rule: Rule, inputs: tuple[Value, ...], shape: Shape, gates: Gates = ()) -> Value:
        """Add a step, and return its output."""
        self.slots += 1
        output = Value(self.slots, shape)
        self.program.steps.append(Step(rule, inputs, output, "gap"))
        if gates:
            self.gates[output.slot] = gates
        return output

    def keep(self, name: str, value: Value, kinks: tuple[float, ...] = (0.0,)) -> None:
        """Watch a value."""
        taken = sum(w.name.partition("#")[0] == name for w in self.found)
        self.found.append(Watched(f"{name}#{taken}" if taken else name, value, kinks))


def layer_names(network: Network) -> dict[int, str]:
    """Names of the layers, keyed by slot."""
    names: dict[int, str] = {}
    for layer in network.layers.values():
        names.setdefault(layer.value.slot, layer.name)
    return names


def step_name(names: dict[int, str], step: Step) -> str:
    """Name of an operation: that of its layer, or of the layer that it reads and its own."""
    before = names.get(step.inputs[0].slot) if step.inputs else None
    return names.get(step.output.slot) or (f"{before}.{step.op}" if before else step.op)


def step_names(network: Network, steps: Sequence[Step]) -> list[str]:
    """Names of operations; of several with one name, the second is ``name#1``."""
    layers = layer_names(network)
    seen: Counter[str] = Counter()
    found = []
    for step in steps:
        name = step_name(layers, step)
        found.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def _window(rule: MaxPooling, step: Step, winners: Tensor) -> Iterator[Tensor]:
    """For each element of a pooling window, its flat index in the map at every position.

    Where an element lies outside the map, the index is that of the winner.
    """
    _, *extents = step.inputs[0].shape
    windows = rule.windows((1, *extents)).to(winners.device)
    for places in windows.T:
        flat = places.view(step.output.shape[1:])
        yield torch.where(flat >= 0, flat, winners)


@dataclass(frozen=True, repr=False)
class Kink(Plane):
    """The kink of one unit, as a plane in the image's linear region.

    Attributes:
        name: Name of the operation, see :class:`KinkDistances`.
        unit: Index of the unit in the operation's distances.
        at: Value of the unit at the kink.
    """

    name: str
    unit: tuple[int, ...]
    at: float


@dataclass(frozen=True, repr=False)
class KinkDistances(Shown):
    """Distance from an image to the nearest kink of every unit.

    An operation has the name of its layer. If it has no layer, its name is that of the layer that
    it reads and its own, such as ``conv1.relu``. A max pooling has one entry for each element of
    its windows: ``pool[0]``, ``pool[1]``, ...

    Attributes:
        distances: Name of an operation -> l2 and l-infinity distances of its units,
            ``(2, *units)``.
        unmeasured: Operations whose kinks are not measured: comparisons, masks, and rules that the
            user has added.
        x: The image, ``(C, H, W)``.
    """

    distances: dict[str, Tensor]
    unmeasured: tuple[str, ...]
    x: Tensor
    pattern: Extended
    watched: tuple[Watched, ...]

    def _summary(self) -> Summary:
        heads = ("operation", "units", "nearest l2", "nearest linf")
        rows = []
        for name, found in self.distances.items():
            ends = (f"{float(n):.4g}" for n in found.flatten(1).amin(1))
            rows.append((name, f"{found[0].numel():,}", *ends))
        facts = {"not measured": ", ".join(self.unmeasured)} if self.unmeasured else {}
        return Summary("KinkDistances", facts, {"": Table(heads, rows)})

    def nearest(self, norm: str) -> Kink | None:
        """The nearest kink of all units, where the linear region ends.

        The result is ``None`` if no kink can be reached. Kinks whose distance is close to the
        smallest one are computed again with cotangents. A sweep in float32 is therefore accurate
        enough.

        Args:
            norm: ``"l2"`` or ``"linf"``.

        Raises:
            RuntimeError: If the model has changed since the network was traced.
        """
        self.pattern.network.check_unchanged()
        left = [
            (watched, self.distances[watched.name][NORMS.index(norm)].flatten().clone())
            for watched in self.watched
        ]
        nearest = None
        distance = float("inf")
        while (
            least := min((float(part.min()) for _, part in left), default=float("inf"))
        ) < MARGIN * distance:
            for watched, part in left:
                near = part.topk(min(AT_ONCE, len(part)), largest=False)
                flat = near.indices[near.values <= MARGIN * least]
                part[flat] = float("inf")
                for kink in self._kinks(watched, flat.tolist()):
                    if kink.distance(norm) < distance:
                        nearest = kink
                        distance = kink.distance(norm)
        return nearest

    def _kinks(self, watched: Watched, flat: list[int]) -> list[Kink]:
        """The kinks of some units of one operation."""
        if not flat:
            return []
        shape = watched.value.shape
        rows = torch.arange(len(flat))
        seeds = self.x.new_zeros(len(flat), prod(shape))
        seeds[rows, flat] = 1
        with exact(self.x.device):
            images, biases = pull(self.pattern, {watched.value.slot: seeds.view(-1, *shape)})
        offsets = (biases @ self.pattern.network.biases_in(self.x.dtype).vector).tolist()
        values = (images * self.x).flatten(1).sum(1).tolist()
        found = []
        for n, image, value, offset in zip(flat, images, values, offsets, strict=True):
            at = min(watched.kinks, key=lambda kink: abs(offset + value - kink))
            unit = tuple(int(i) for i in torch.unravel_index(torch.tensor(n), shape))
            found.append(Kink(self.x, image, offset - at, watched.name, unit, at))
        return found


def kink_distances(
    network: Network,
    x: Tensor,
    dtype: torch.dtype | str = torch.float64,
    sweep: torch.dtype | str | None = None,
    pattern: ActivationPattern | None = None,
) -> KinkDistances:
    r"""Exact distance from an image to the kinks of every unit, inside its linear region.

    In the region every unit is :math:`c([x; b]) = \langle [x; b] | H \rangle`. The biases are
    fixed. The kink at :math:`a` is therefore :math:`|c - a| / \lVert H_I \rVert_2` away in l2, and
    :math:`|c - a| / \lVert H_I \rVert_1` in l-infinity. The sweep over all units adds up the norms
    column by column. For a maximum we measure where winner - competitor = 0. The smallest of all
    distances is the distance to the end of the linear region.

    Args:
        network: Traced network.
        x: One image.
        dtype: Dtype of the arithmetic.
        sweep: Dtype of the sweep that computes the norms; by default ``dtype``. A sweep in float32
            takes a third of the time. The gates and the values of the units stay in ``dtype``, and
            :meth:`KinkDistances.nearest` is as exact. A model that casts is always swept in
            ``dtype``.
        pattern: The pattern of ``x`` in ``dtype`` at k = 1, from :func:`record_pattern`; by
            default it is recorded.

    Returns:
        The distances. A distance is infinite where no change of the image moves the unit.

    Raises:
        ValueError: If ``x`` does not fit the network, or is more than one image, or ``pattern`` is
            another one.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()).eval()
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> found = kink_distances(trace(model, torch.zeros(1, 2)), torch.tensor([1.0, 1.0]))
        >>> found.distances["1"].tolist()
        [[1.4], [1.0]]
    """
    dtype = dtype_of(dtype) or torch.float64
    swept_in = dtype_of(sweep)
    images = one_image(network, x, dtype)
    network.check_piecewise_affine("kink_distances")
    network.check_unchanged()
    if pattern is not None:
        check_pattern(pattern, network, images, 1.0)
    watch = Watch(pattern or pattern_of(network, images, 1.0))
    extended = watch.extended()
    targets = [w.value for w in watch.found]
    with exact(images.device):
        entries = {e.slot: e.value[None].to(dtype) for e in extended.program.entries}
        values = push(extended, {IMAGE: images, **entries}, targets)
        infinite = push(extended, signs_of(extended.program), targets)
        swept = extended
        if swept_in and network.is_computed_in(swept_in):
            swept = extended.to(swept_in)
        sums = _squares_and_sizes(swept, images.to(swept.dtype), {t.slot: t for t in targets})
    distances = {}
    for watched in watch.found:
        slot = watched.value.slot
        value = cast("Tensor", values[slot])[0]
        signs = infinite[slot]
        if signs is not None:  # an infinite unit never reaches its kink
            value = value.masked_fill(signs[0] != 0, torch.inf)
        distances[watched.name] = _distances(value, watched.kinks, sums[slot])
    return KinkDistances(
        distances,
        tuple(dict.fromkeys(watch.unmeasured)),
        images[0],
        extended,
        tuple(watch.found),
    )


def signs_of(program: Program) -> dict[int, Tensor]:
    """Signs of the infinite constants, keyed by slot."""
    return {
        s.output.slot: s.rule.value.sign() for s in program.steps if isinstance(s.rule, Infinite)
    }


def one_image(network: Network, x: Tensor, dtype: torch.dtype, name: str = "x") -> Tensor:
    """One image as a batch; ``name`` is that of the argument.

    Raises:
        ValueError: If there is more than one image.
    """
    images = check_images(network, x, dtype)
    if len(images) != 1:
        msg = (
            f"{name} must be one image: each has a linear region of its own. Got "
            f"{len(images)}: call it for each."
        )
        raise ValueError(msg)
    return images.clone()  # results keep it, and the caller may write into x


def _distances(value: Tensor, kinks: tuple[float, ...], sums: Tensor) -> Tensor:
    """Distances ``(2, *units)`` to the nearest of the given kinks."""
    gap = torch.stack([(value - kink).abs() for kink in kinks]).amin(0)
    norms = torch.stack([sums[0].sqrt(), sums[1]])
    return torch.where(norms > 0, gap / norms, torch.inf)


def _squares_and_sizes(
    pattern: Extended,
    x: Tensor,
    targets: dict[int, Value],
) -> dict[int, Tensor]:
    """Sums over each unit's image part: of squares and of magnitudes, ``(2, *units)`` per slot."""
    sums = {slot: x.new_zeros(2, *value.shape) for slot, value in targets.items()}
    if x.dim() == 2:
        for b in basis(pattern, {IMAGE}):
            for slot, columns in push(pattern, b.tangents, targets.values()).items():
                if columns is not None:
                    sums[slot] += _squares_and_magnitudes(columns, columns.flatten(1)).view(
                        2,
                        *columns.shape[1:],
                    )
        return sums
    sweep = Sweep(pattern, targets.values())
    for group in sweep.groups():
        for slot, tangents in sweep.run(group).items():
            ones = x.new_ones(1, prod(group.count), x.shape[1])
            found = sweep.inner(group, tangents, ones, targets[slot].shape, _squares_and_magnitudes)
            if found is not None:
                sums[slot] += found[:, 0]
    return sums


def _squares_and_magnitudes(_: Tensor, rows: Tensor) -> Tensor:
    """Sums over the tangents, ``(2, *batch, n)``. A norm uses no factors."""
    return torch.stack([rows.square().sum(-2), rows.abs().sum(-2)])
