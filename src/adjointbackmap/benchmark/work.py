"""The entries of the benchmark: each is one piece of work, for our methods and for the peers."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap.benchmark.networks import IMAGES, Subject, kernel_names, prepared
from adjointbackmap.benchmark.peers import CLASS_PEERS, FORMATS, PEERS, Peer, Work
from adjointbackmap.benchmark.timing import Counter, clock, extrapolated, measured, within_memory
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.planes.planner import METHODS

# A peer whose parts differ from ours by more than this share of our largest entry is left out: it
# computes other hyperplanes.
WRONG = 1e-2
CHECKED = 8  # units for the comparison of each peer with our methods
MEMORY = "4GiB"
ALL = None
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
REFUSALS = (ValueError, RuntimeError, MemoryError)
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
    """

    quick: bool = False
    repeats: int = 5
    few: int = 64
    some: int = 256
    images: int = IMAGES
    networks: tuple[str, ...] = tuple(CHOSEN)
    sides: tuple[int, ...] = (32, 64, 128, 224)
    depths: tuple[int, ...] = (2, 4, 8, 16)
    most: float = 3e12


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
    measure: Callable[[], dict],
    errors: type[Exception] | tuple[type[Exception], ...] = REFUSALS,
) -> dict:
    """A measurement, or the error message that explains why there is none."""
    try:
        with within_memory():
            return measure()
    except errors as error:
        return {
            "left_out": " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        }


def too_much(cost: int, settings: Settings) -> dict:
    """The reason for leaving out a run that costs too much."""
    return {
        "left_out": f"the plan counts {cost / 1e9:,.0f} G, the most is {settings.most / 1e9:,.0f} G"
    }


def ours(subject: Subject, layer: str, units: Any, method: str, settings: Settings) -> dict:
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
    call = partial(
        abm.hyperplanes,
        network,
        subject.x[:1],
        layer,
        mode,
        method=method,
        memory=MEMORY,
    )
    if proportional and len(numbers) > 2 * settings.some:
        one = measured(partial(call, units=units_at(known, few[:1])), settings.repeats)["seconds"]
        found = measured(partial(call, units=units_at(known, few)), settings.repeats)
        return {**extrapolated(found, one, len(few), len(numbers), "units"), **counts}
    if planned.cost > settings.most:
        return too_much(planned.cost, settings)
    return {**measured(partial(call, units=units), settings.repeats), **counts}


def all_layers(network: abm.Network, x: Tensor) -> dict[str, abm.Hyperplanes]:
    """Every hyperplane of every convolution and linear layer at an image."""
    chosen = [layer.name for layer in network.distinct_layers() if layer.kernel is not None]
    return abm.hyperplanes(network, x, chosen, memory=MEMORY)


# the peers


def tuned(peer: Peer, work: Work, least: int, most: int) -> tuple[Work, int]:
    """The memory format and chunk that are fastest for a peer.

    Each pair is tried once. The first run in a format is a warm-up and is not timed.
    """
    tries = [
        (replace(work, memory_format=f), chunk)
        for f in FORMATS
        for chunk in peer.chunks
        if chunk <= max(least, most)
    ]
    tries = tries or [(replace(work, memory_format=f), most) for f in FORMATS]
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


def planes_at(subject: Subject, layer: str, units: Any, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Our hyperplanes of some units: ``(units, pixels)`` and ``(units, biases)``.

    The method is the one that the plan chooses for all of the work.
    """
    known = subject.network.layer(layer)
    planned = subject.network.plan(layer, mode_of(known), units)
    method = planned.method if units is ALL and planned.bytes < 2**30 else None
    planes = abm.hyperplanes(
        subject.network,
        subject.x[:1],
        layer,
        mode_of(known),
        units_at(known, numbers),
        method=method,
    )
    return planes.image[0].flatten(1), planes.bias_part[0]


def peer_way(
    peer: Peer,
    work: Work,
    checked: Tensor,
    planes: tuple[Tensor, Tensor],
    settings: Settings,
) -> dict:
    """Measure a peer with its best settings, on some units or columns.

    Its hyperplanes of the checked units are compared with ours.
    """
    total = len(work.vector) if peer.of == "columns" else len(work.units)
    least = min(settings.few, total)
    best, chunk = tuned(peer, work, least, total)
    batch = min(chunk, total) if peer.of == "columns" else len(checked)
    found = peer.call(best, batch, min(batch, chunk))
    worst = difference(
        peer,
        found[checked] if peer.of == "columns" else found,
        planes,
        work.x[0].flatten(),
    )
    if not worst < WRONG:
        return {"left_out": f"its hyperplanes differ by {worst:.1g} of the largest entry"}
    count = min(total, max(least, chunk))
    fixed = statistics.median([clock(best.forward) for _ in range(5)])
    run = measured(partial(peer.call, best, count, chunk), settings.repeats)
    facts = {
        "peer": True,
        "gives": peer.gives,
        "settings": f"{best.memory_format}, chunk {chunk}",
        "difference": worst,
    }
    return {**extrapolated(run, fixed, count, total, peer.of), **facts}


def peer_ways(
    subject: Subject,
    layer: str,
    units: Any,
    peers: dict[str, Peer],
    settings: Settings,
) -> dict:
    """Measure all peers on units of a layer. A peer that is not installed is listed as left out."""
    work = Work(
        subject.model,
        (layer,),
        subject.x[:1],
        None if units is ALL else numbers_of(subject.network.layer(layer), units),
    )
    checked = work.spread(min(CHECKED, len(work.units)))
    planes = planes_at(subject, layer, units, checked)
    return {
        title: of_peer(peer, partial(peer_way, peer, work, checked, planes, settings))
        for title, peer in peers.items()
    }


def of_peer(peer: Peer, measure: Callable[[], dict]) -> dict:
    """A measurement of a peer, or the reason why there is none.

    Other libraries have no error type of their own for what they do not support.
    """
    if peer.is_missing:
        return {"left_out": f"{peer.needs} is not installed"}
    return attempt(measure, Exception if peer.needs else REFUSALS)


# the entries


def layer_entry(name: str, layer: str, settings: Settings) -> dict:
    """The entry of one layer.

    For a chosen layer it has all methods and peers. For another layer it has the plan's choice and
    jacrev.
    """
    subject = prepared(name)
    chosen = CHOSEN.get(name, {})
    network = subject.network
    known = subject.network.layer(layer)
    units = chosen.get(layer)
    full = layer in chosen
    planned = network.plan(layer, mode_of(known), units)
    methods = able(network, layer, units) if full else [planned.method]
    ways = {m: attempt(partial(ours, subject, layer, units, m, settings)) for m in methods}
    ways |= peer_ways(
        subject,
        layer,
        units,
        PEERS if full else {"jacrev": PEERS["jacrev"]},
        settings,
    )
    number = len(numbers_of(known, units))
    total = prod(known.out_shape)
    which = f"{number:,}" if number == total else f"{number:,} of {total:,}"
    facts = {"units": number, "which": which, "mode": mode_of(known), "full": full}
    return {**facts, "plan": planned.method, "explained": str(planned), "ways": ways}


def growing_entry(name: str, settings: Settings) -> dict:
    """The last layer of a growing network, and the verification of all its layers."""
    network = prepared(name).network
    x = prepared(name).x[:1]
    last = [layer.name for layer in network.distinct_layers() if layer.kernel is not None][-1]
    entry = layer_entry(name, last, settings)
    entry["ways"]["verify"] = attempt(
        lambda: measured(lambda: abm.verify(network, x), settings.repeats),
    )
    return {**entry, "size": int(name.partition("/")[2])}


def verify_entry(name: str, settings: Settings) -> dict:
    """The verification of every unit of every layer, for one image."""
    network = prepared(name).network
    x = prepared(name).x[:1]
    units = sum(check.units for check in abm.verify(network, x).values())
    return {
        "units": units,
        "ways": {"abm.verify": measured(lambda: abm.verify(network, x), settings.repeats)},
    }


def layers_entry(name: str, settings: Settings) -> dict:
    """All hyperplanes of all layers for one image, and jacfwd with all layers as its output."""
    subject = prepared(name)
    network = subject.network
    layers = tuple(kernel_names(name))
    units = sum(prod(network.layer(layer).out_shape) for layer in layers)
    work = Work(subject.model, layers, subject.x[:1])
    last = numbers_of(network.layer(layers[-1]), ALL)
    checked = units - len(last) + last
    planes = planes_at(subject, layers[-1], ALL, last)
    ways = {"all layers": measured(lambda: all_layers(network, subject.x[:1]), settings.repeats)}
    ways["jacfwd, every layer at once"] = attempt(
        partial(peer_way, PEERS["jacfwd"], work, checked, planes, settings),
    )
    return {"units": units, "ways": ways}


def classes_entry(name: str, settings: Settings) -> dict:
    """The RM0 hyperplanes of every class, for a batch of images."""
    subject = prepared(name)
    network = subject.network
    x = subject.x[: settings.images]
    best = network.plan("fc", "RM0")
    ways = {}
    for method in able(network, "fc"):
        ways[method] = attempt(partial(our_classes, subject, method, settings))
    planes = abm.hyperplanes(network, x, "fc", "RM0")
    for title, peer in CLASS_PEERS.items():
        ways[title] = of_peer(peer, partial(class_peer, peer, subject, planes, settings))
    facts = {
        "units": planes.value.numel(),
        "which": f"{planes.value.numel():,}",
        "mode": "RM0",
        "full": True,
    }
    return {**facts, "plan": best.method, "explained": str(best), "ways": ways}


def our_classes(subject: Subject, method: str, settings: Settings) -> dict:
    """Measure one of our methods on every class.

    One image is measured if all images cost too much.
    """
    planned = subject.network.plan("fc", "RM0", method=method)
    count = settings.images
    images = count if planned.cost * count <= settings.most else 1
    if planned.cost > settings.most:
        return too_much(planned.cost, settings)
    found = measured(
        partial(abm.hyperplanes, subject.network, subject.x[:images], "fc", "RM0", method=method),
        settings.repeats,
    )
    counts = {"multiply_adds": planned.multiply_adds * count, "cost": planned.cost * count}
    return {**extrapolated(found, 0.0, images, count, "images"), **counts}


def class_peer(peer: Peer, subject: Subject, planes: abm.Hyperplanes, settings: Settings) -> dict:
    """Measure a peer on every class of the images."""
    count = len(planes.x)
    best, chunk = tuned(peer, Work(subject.model, ("fc",), planes.x), count, count)
    found = peer.call(best, count, chunk)
    worst = difference(
        peer,
        found,
        (planes.image.flatten(2), planes.bias_part),
        planes.x.flatten(1)[:, None],
    )
    if not worst < WRONG:
        return {"left_out": f"its hyperplanes differ by {worst:.1g} of the largest entry"}
    facts = {
        "peer": True,
        "gives": peer.gives,
        "settings": f"{best.memory_format}, chunk {chunk}",
        "difference": worst,
    }
    return {**measured(partial(peer.call, best, count, chunk), settings.repeats), **facts}


def sweep_entry(name: str, settings: Settings) -> dict:
    """The windowed sweep for all layers of one image, and its rate."""
    network = prepared(name).network
    x = prepared(name).x[:1]
    pattern = abm.record_pattern(network, x)
    targets = [layer.value for layer in network.distinct_layers()]

    def run() -> None:
        sweep = Sweep(pattern, targets)
        with exact(x.device):
            for group in sweep.groups():
                sweep.run(group)

    with Counter() as counted:
        run()
    found = measured(run, settings.repeats)
    rates = {k: 2e-9 * getattr(counted, k) / found["seconds"] for k in ("products", "touching")}
    return {"ways": {"sweep": {**found, "multiply_adds": counted.products}}, "gflops": rates}


def rate_entry(settings: Settings) -> dict:
    """GFLOP/s of a large plain convolution, 3 x 3 at 32 x 32, float32, channels last."""
    ways = {}
    for channels in (32, 64, 96, 128):
        x = torch.rand(8192 // channels, channels, 32, 32).contiguous(
            memory_format=torch.channels_last
        )
        w = torch.rand(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            found = measured(partial(F.conv2d, x, w, padding=1), settings.repeats)
        products = x.numel() * channels * 9
        ways[f"{channels} channels"] = {
            **found,
            "multiply_adds": products,
            "gflops": 2e-9 * products / found["seconds"],
        }
    return {"ways": ways, "gflops": max(w["gflops"] for w in ways.values())}


Measure = Callable[[Settings], dict]


def entries(settings: Settings) -> dict[str, Measure]:
    """All entries in the order of the tables: name -> measurement."""
    found: dict[str, Measure] = {"machine/rate": rate_entry}
    for name in settings.networks:
        whole = name in STUDY and not settings.quick
        for layer in kernel_names(name) if whole else CHOSEN[name]:
            found[f"{name}/{layer}"] = partial(layer_entry, name, layer)
        if name in STUDY:
            found[f"{name}/layers"] = partial(layers_entry, name)
            found[f"{name}/verify"] = partial(verify_entry, name)
            found[f"{name}/sweep"] = partial(sweep_entry, name)
            found[f"{name}/classes"] = partial(classes_entry, name)
    for name in [*(f"side/{n}" for n in settings.sides), *(f"depth/{n}" for n in settings.depths)]:
        found[name] = partial(growing_entry, name)
    return found


def warm_up(settings: Settings) -> None:
    """Run everything once on a small layer.

    Imports and the first use of a kernel then count in no figure.
    """
    subject = prepared("side/32")
    tiny = replace(settings, repeats=1, few=2, some=2)
    for method in able(subject.network, "0"):
        abm.hyperplanes(
            subject.network,
            subject.x[:1],
            "0",
            "RM2",
            (0, 0, slice(None)),
            method=method,
        )
    peer_ways(
        subject,
        "0",
        (0, 0, slice(None)),
        {n: replace(p, chunks=(2,)) for n, p in PEERS.items()},
        tiny,
    )
