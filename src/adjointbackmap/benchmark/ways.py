"""The ways to compute the hyperplanes of one entry: our methods and the peers, measured."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap.benchmark.networks import SAMPLE_IMAGES, BenchmarkNetwork
from adjointbackmap.benchmark.peers import MEMORY_FORMATS, Peer, Work
from adjointbackmap.benchmark.timing import clock, extrapolated, time_and_memory, within_memory
from adjointbackmap.planes.planner import METHODS

# A peer whose parts differ from ours by more than this share of our largest entry is left out: it
# computes other hyperplanes.
WRONG = 1e-2
CHECKED = 8  # units on which each peer is compared with our methods
MEMORY = "4GiB"  # for our methods; the plan stays within it
ALL = None  # as chosen units
# Early, middle and late layers of each network, with all of their units if these fit into MEMORY.
CHOSEN: dict[str, dict[str, Any]] = {
    "vgg7": {"conv1": ALL, "conv3": ALL, "conv5": ALL},
    "resnet20": {"conv1": ALL, "conv9": ALL, "conv17": ALL},
    "resnet18": {
        "layer1.0.conv1": ALL,
        "layer2.0.conv1": ALL,
        "layer2.1.conv2": (slice(13, 15), slice(13, 15), slice(None)),
        "layer4.1.conv2": (3, 3, slice(128)),
    },
}
REFUSALS = (ValueError, RuntimeError, MemoryError)  # of our methods and of torch
STUDY = ("vgg7", "resnet20")  # measured in full: every layer, the ten classes, the verification


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        quick: Whether the run is a quick look, whose figures are not kept.
        repeats: Number of runs; the median of their times is taken.
        few: Number of a peer's units to measure; the time of all units is extrapolated.
        some: The same for our methods whose time is proportional to the number of units.
        images: Number of images in the entry for the classes.
        networks: Keys of ``CHOSEN``.
        sides: Image sides of the family of growing networks.
        depths: Numbers of residual blocks of the family of growing networks.
        most: Largest cost of one of our runs in multiply-adds, about half a minute on two cores.
            Runs that cost more are left out.
        before: Worktree of an older commit to compare with; empty for none.
    """

    quick: bool = False
    repeats: int = 5
    few: int = 64
    some: int = 256
    images: int = SAMPLE_IMAGES
    networks: tuple[str, ...] = tuple(CHOSEN)
    sides: tuple[int, ...] = (32, 64, 128, 224)
    depths: tuple[int, ...] = (2, 4, 8, 16)
    most: float = 3e12
    before: str = ""


QUICK = Settings(True, 1, 16, 32, 8, ("vgg7",), (32, 64), (2, 4), 2e11)


# our methods


def mode_of(layer: abm.Layer) -> str:
    """The mode with one hyperplane per unit of the layer."""
    return "RM0" if len(layer.out_shape) == 1 else "RM2"


def numbers_of(layer: abm.Layer, units: Any) -> Tensor:
    """Indices of the chosen units in the layer's flat output."""
    every = torch.arange(prod(layer.out_shape)).view(layer.out_shape).movedim(0, -1)
    return (every if units is ALL else every[units]).flatten().sort().values


def units_at(layer: abm.Layer, numbers: Tensor) -> tuple[Tensor, ...]:
    """Units at some indices of the flat output, in the axis order of the mode."""
    channel, *positions = torch.unravel_index(numbers, layer.out_shape)
    return (*positions, channel)


def able(network: abm.Network, layer: str, units: Any = ALL) -> list[str]:
    """Our methods that can compute these units."""
    found = []
    for method in METHODS:
        try:
            network.plan(layer, mode_of(network.layer(layer)), units, method=method)
        except ValueError:
            continue
        found.append(method)
    return found


def attempt(
    measure: Callable[[], dict[str, Any]],
    errors: type[Exception] | tuple[type[Exception], ...] = REFUSALS,
) -> dict[str, Any]:
    """A measurement, or the error message that explains why there is none."""
    try:
        with within_memory():
            return measure()
    except errors as error:
        first_line = str(error).strip().splitlines()[:1]
        return {"left_out": " ".join([f"{type(error).__name__}:", *first_line])}


def too_much(cost: int, settings: Settings) -> dict[str, Any]:
    """The reason for leaving out a run that costs too much."""
    most = f"{settings.most / 1e9:,.0f} G"
    return {"left_out": f"the plan counts {cost / 1e9:,.0f} G, the most is {most}"}


def ours(
    subject: BenchmarkNetwork, layer: str, units: Any, method: str, settings: Settings
) -> dict[str, Any]:
    """Measure one of our methods on the units of a layer, for one image.

    If its multiply-adds are proportional to the number of units, only some units are measured.
    """
    network = subject.network
    known = subject.network.layer(layer)
    mode = mode_of(known)
    numbers = numbers_of(known, units)
    planned = network.plan(layer, mode, units, method=method)
    counts = {"multiply_adds": planned.multiply_adds, "cost": planned.cost}
    few = numbers[:: max(1, len(numbers) // settings.some)][: settings.some]
    part = network.plan(layer, mode, units_at(known, few), method=method)
    proportional = part.multiply_adds * len(numbers) == planned.multiply_adds * len(few)
    x = subject.x[:1]
    call = partial(abm.hyperplanes, network, x, layer, mode, method=method, memory=MEMORY)
    if proportional and len(numbers) > 2 * settings.some:
        one = time_and_memory(partial(call, units=units_at(known, few[:1])), settings.repeats)[
            "seconds"
        ]
        found = time_and_memory(partial(call, units=units_at(known, few)), settings.repeats)
        return {**extrapolated(found, one, len(few), len(numbers), "units"), **counts}
    if planned.cost > settings.most:
        return too_much(planned.cost, settings)
    return {**time_and_memory(partial(call, units=units), settings.repeats), **counts}


def our_classes(subject: BenchmarkNetwork, method: str, settings: Settings) -> dict[str, Any]:
    """Measure one of our methods on every class.

    One image is measured if all images cost too much.
    """
    planned = subject.network.plan("fc", "RM0", method=method)
    count = settings.images
    images = count if planned.cost * count <= settings.most else 1
    if planned.cost > settings.most:
        return too_much(planned.cost, settings)
    x = subject.x[:images]
    call = partial(abm.hyperplanes, subject.network, x, "fc", "RM0", method=method)
    found = time_and_memory(call, settings.repeats)
    counts = {"multiply_adds": planned.multiply_adds * count, "cost": planned.cost * count}
    return {**extrapolated(found, 0.0, images, count, "images"), **counts}


def all_layers(network: abm.Network, x: Tensor) -> dict[str, abm.Hyperplanes]:
    """Every hyperplane of every convolution and linear layer at an image."""
    chosen = [layer.name for layer in network.distinct_layers() if layer.kernel is not None]
    return abm.hyperplanes(network, x, chosen, memory=MEMORY)


# the peers


def tuned(peer: Peer, work: Work, least: int, most: int) -> tuple[Work, int]:
    """The memory format and chunk that are fastest for a peer.

    Each pair is tried once. The first run in a format is a warm-up and is not timed.
    """
    chunks = [chunk for chunk in peer.chunks if chunk <= max(least, most)] or [most]
    works = [replace(work, memory_format=f) for f in MEMORY_FORMATS]
    tries = [(candidate, chunk) for candidate in works for chunk in chunks]
    speeds = []
    warm = set()
    for candidate, chunk in tries:
        count = min(most, max(least, chunk))
        run = partial(peer.call, candidate, count, chunk)
        if candidate.memory_format not in warm:
            warm.add(candidate.memory_format)
            seconds_or_never(run)
        speeds.append(seconds_or_never(run) / count)
    return tries[speeds.index(min(speeds))]


def seconds_or_never(run: Callable[[], object]) -> float:
    """Duration of a run in seconds; infinite if it fails.

    It fails, for example, if a chunk does not fit into memory.
    """
    try:
        return clock(run)
    except (RuntimeError, MemoryError):
        return inf


def difference(peer: Peer, found: Any, ours: tuple[Tensor, Tensor], image: Tensor) -> float:
    """Largest difference between a peer's parts and ours, relative to our largest entry."""
    if peer.of == "columns":
        pairs = [(found, torch.cat(ours, -1)[..., : found.shape[-1]])]
    else:
        pixels = ours[0] * image if peer.times_image else ours[0]
        pairs = [(a, b) for a, b in zip(found, (pixels, ours[1]), strict=True) if a is not None]
    largest = torch.cat([b.flatten() for _, b in pairs]).abs().max()
    worst = torch.cat([(a - b).flatten() for a, b in pairs]).abs().max()
    return float(worst / (largest if largest > 0 else 1))  # NaN stays


def planes_at(
    subject: BenchmarkNetwork, layer: str, units: Any, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Our hyperplanes of some units: ``(units, pixels)`` and ``(units, biases)``.

    The method is the one that the plan chooses for all of the work.
    """
    known = subject.network.layer(layer)
    planned = subject.network.plan(layer, mode_of(known), units)
    method = planned.method if units is ALL and planned.bytes < 2**30 else None
    chosen = units_at(known, numbers)
    x = subject.x[:1]
    planes = abm.hyperplanes(subject.network, x, layer, mode_of(known), chosen, method=method)
    return planes.image[0].flatten(1), planes.bias_part[0]


def peer_way(
    peer: Peer,
    work: Work,
    checked: Tensor,
    planes: tuple[Tensor, Tensor],
    settings: Settings,
) -> dict[str, Any]:
    """Measure a peer with its best settings, on some units or columns.

    Its hyperplanes of the checked units are compared with ours.
    """
    total = len(work.vector) if peer.of == "columns" else len(work.units)
    least = min(settings.few, total)
    best, chunk = tuned(peer, work, least, total)
    batch = min(chunk, total) if peer.of == "columns" else len(checked)
    found = peer.call(best, batch, min(batch, chunk))
    rows = found[checked] if peer.of == "columns" else found
    worst = difference(peer, rows, planes, work.x[0].flatten())
    if not worst < WRONG:  # also if it is NaN
        return left_out_as_wrong(worst)
    count = min(total, max(least, chunk))
    fixed = statistics.median([clock(best.forward) for _ in range(5)])
    run = time_and_memory(partial(peer.call, best, count, chunk), settings.repeats)
    facts = facts_of(peer, best, chunk, worst)
    return {**extrapolated(run, fixed, count, total, peer.of), **facts}


def left_out_as_wrong(worst: float) -> dict[str, Any]:
    """The reason for leaving out a peer that computes other hyperplanes."""
    return {"left_out": f"its hyperplanes differ by {worst:.1g} of the largest entry"}


def facts_of(peer: Peer, best: Work, chunk: int, worst: float) -> dict[str, Any]:
    """What a peer computes, with which settings, and how far it is from ours."""
    return {
        "peer": True,
        "gives": peer.gives,
        "settings": f"{best.memory_format}, chunk {chunk}",
        "difference": worst,
    }


def peer_ways(
    subject: BenchmarkNetwork,
    layer: str,
    units: Any,
    peers: dict[str, Peer],
    settings: Settings,
) -> dict[str, Any]:
    """Measure all peers on units of a layer. A peer that is not installed is listed as left out."""
    numbers = None if units is ALL else numbers_of(subject.network.layer(layer), units)
    work = Work(subject.model, (layer,), subject.x[:1], numbers)
    checked = work.spread(min(CHECKED, len(work.units)))
    planes = planes_at(subject, layer, units, checked)
    return {
        title: of_peer(peer, partial(peer_way, peer, work, checked, planes, settings))
        for title, peer in peers.items()
    }


def of_peer(peer: Peer, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement of a peer, or the reason why there is none.

    Other libraries have no error type of their own for what they do not support.
    """
    if peer.is_missing:
        return {"left_out": f"{peer.needs} is not installed"}
    return attempt(measure, Exception if peer.needs else REFUSALS)


def class_peer(
    peer: Peer, subject: BenchmarkNetwork, planes: abm.Hyperplanes, settings: Settings
) -> dict[str, Any]:
    """Measure a peer on every class of the images."""
    count = len(planes.x)
    best, chunk = tuned(peer, Work(subject.model, ("fc",), planes.x), count, count)
    found = peer.call(best, count, chunk)
    # axes (image, class, pixel) and (image, class, bias); the images get an axis for the classes
    parts = (planes.image.flatten(2), planes.bias_part)
    worst = difference(peer, found, parts, planes.x.flatten(1)[:, None])
    if not worst < WRONG:  # also if it is NaN
        return left_out_as_wrong(worst)
    run = time_and_memory(partial(peer.call, best, count, chunk), settings.repeats)
    return {**run, **facts_of(peer, best, chunk, worst)}
