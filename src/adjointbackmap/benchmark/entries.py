"""The entries of the benchmark: each is one piece of work, for our methods and for the peers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

import adjointbackmap as abm
from adjointbackmap.benchmark.aims import FASTER
from adjointbackmap.benchmark.fresh import before_entry, busy_entry
from adjointbackmap.benchmark.networks import benchmark_network, kernel_names
from adjointbackmap.benchmark.peers import CLASS_PEERS, PEERS, Work
from adjointbackmap.benchmark.timing import Counter, time_and_memory
from adjointbackmap.benchmark.ways import (
    ALL,
    CHOSEN,
    STUDY,
    Settings,
    able,
    all_layers,
    attempt,
    class_peer,
    mode_of,
    numbers_of,
    of_peer,
    our_classes,
    ours,
    peer_way,
    peer_ways,
    planes_at,
)
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.sweep import Sweep

RATE_CHANNELS = (32, 64, 96, 128)  # of the plain convolutions
RATE_VALUES = 8192  # images times channels of a plain convolution, so that all have the same size


def layer_entry(name: str, layer: str, settings: Settings) -> dict[str, Any]:
    """The entry of one layer.

    For a chosen layer it has all methods and peers. For another layer it has the plan's choice and
    jacrev.
    """
    subject = benchmark_network(name)
    chosen = CHOSEN.get(name, {})
    network = subject.network
    known = subject.network.layer(layer)
    units = chosen.get(layer)
    full = layer in chosen
    planned = network.plan(layer, mode_of(known), units)
    methods = able(network, layer, units) if full else [planned.method]
    ways = {m: attempt(partial(ours, subject, layer, units, m, settings)) for m in methods}
    peers = PEERS if full else {"jacrev": PEERS["jacrev"]}
    ways |= peer_ways(subject, layer, units, peers, settings)
    number = len(numbers_of(known, units))
    total = prod(known.out_shape)
    which = f"{number:,}" if number == total else f"{number:,} of {total:,}"
    facts = {"units": number, "which": which, "mode": mode_of(known), "full": full}
    return {**facts, "plan": planned.method, "explained": str(planned), "ways": ways}


def growing_entry(name: str, settings: Settings) -> dict[str, Any]:
    """The last layer of a growing network, and the verification of all its layers."""
    network = benchmark_network(name).network
    x = benchmark_network(name).x[:1]
    last = [layer.name for layer in network.distinct_layers() if layer.kernel is not None][-1]
    entry = layer_entry(name, last, settings)
    verification = partial(abm.verify, network, x)
    entry["ways"]["verify"] = attempt(partial(time_and_memory, verification, settings.repeats))
    return {**entry, "size": int(name.partition("/")[2])}


def verify_entry(name: str, settings: Settings) -> dict[str, Any]:
    """The verification of every unit of every layer, for one image."""
    network = benchmark_network(name).network
    x = benchmark_network(name).x[:1]
    units = sum(check.units for check in abm.verify(network, x).values())
    way = time_and_memory(partial(abm.verify, network, x), settings.repeats)
    return {"units": units, "ways": {"abm.verify": way}}


def layers_entry(name: str, settings: Settings) -> dict[str, Any]:
    """All hyperplanes of all layers for one image, and jacfwd with all layers as its output."""
    subject = benchmark_network(name)
    network = subject.network
    layers = tuple(kernel_names(name))
    units = sum(prod(network.layer(layer).out_shape) for layer in layers)
    work = Work(subject.model, layers, subject.x[:1])
    last = numbers_of(network.layer(layers[-1]), ALL)
    # the units of all layers are joined, those of the last layer at the end
    checked = units - len(last) + last
    planes = planes_at(subject, layers[-1], ALL, last)
    our = time_and_memory(partial(all_layers, network, subject.x[:1]), settings.repeats)
    jacfwd = attempt(partial(peer_way, PEERS["jacfwd"], work, checked, planes, settings))
    return {"units": units, "ways": {"all layers": our, "jacfwd, every layer at once": jacfwd}}


def classes_entry(name: str, settings: Settings) -> dict[str, Any]:
    """The RM0 hyperplanes of every class, for a batch of images."""
    subject = benchmark_network(name)
    network = subject.network
    x = subject.x[: settings.images]
    best = network.plan("fc", "RM0")
    ways = {
        method: attempt(partial(our_classes, subject, method, settings))
        for method in able(network, "fc")
    }
    planes = abm.hyperplanes(network, x, "fc", "RM0")
    for title, peer in CLASS_PEERS.items():
        ways[title] = of_peer(peer, partial(class_peer, peer, subject, planes, settings))
    count = planes.value.numel()
    facts = {"units": count, "which": f"{count:,}", "mode": "RM0", "full": True}
    return {**facts, "plan": best.method, "explained": str(best), "ways": ways}


def sweep_entry(name: str, settings: Settings) -> dict[str, Any]:
    """The windowed sweep for all layers of one image, and its rate."""
    network = benchmark_network(name).network
    x = benchmark_network(name).x[:1]
    pattern = abm.record_pattern(network, x)
    targets = [layer.value for layer in network.distinct_layers()]

    def run() -> None:
        sweep = Sweep(pattern, targets)
        with exact(x.device):
            for group in sweep.groups():
                sweep.run(group)

    with Counter() as counted:  # type: ignore[no-untyped-call]
        run()
    found = time_and_memory(run, settings.repeats)
    # a multiply-add is two floating-point operations
    rates = {k: 2e-9 * getattr(counted, k) / found["seconds"] for k in ("products", "touching")}
    return {"ways": {"sweep": {**found, "multiply_adds": counted.products}}, "gflops": rates}


def held_entry(name: str, settings: Settings) -> dict[str, Any]:
    """One unit of the last convolution, without and with a held pattern."""
    network = benchmark_network(name).network
    x = benchmark_network(name).x[:1]
    maps = [layer for layer in network.distinct_layers() if layer.kernel is not None]
    last = [layer.name for layer in maps if len(layer.out_shape) == 3][-1]
    call = partial(abm.hyperplanes, network, x, last, units=(4, 4, 3))
    titles = {"without": call, "held": partial(call, pattern=abm.record_pattern(network, x))}
    ways = {title: time_and_memory(run, settings.repeats) for title, run in titles.items()}
    return {"ways": ways, "pair": list(ways), "layer": last}


def float64_entry(name: str, settings: Settings) -> dict[str, Any]:
    """The verification of every unit in float64 and in float32."""
    network = benchmark_network(name).network
    x = benchmark_network(name).x[:1]
    ways = {
        dtype: time_and_memory(partial(abm.verify, network, x, dtype=dtype), settings.repeats)
        for dtype in ("float64", "float32")
    }
    return {"ways": ways, "pair": list(ways)}


def rate_entry(settings: Settings) -> dict[str, Any]:
    """GFLOP/s of a large plain convolution, 3 x 3 at 32 x 32, float32, channels last."""
    ways = {}
    layout = torch.channels_last
    for channels in RATE_CHANNELS:
        x = torch.rand(RATE_VALUES // channels, channels, 32, 32).contiguous(memory_format=layout)
        w = torch.rand(channels, channels, 3, 3).contiguous(memory_format=layout)
        with torch.no_grad():
            found = time_and_memory(partial(F.conv2d, x, w, padding=1), settings.repeats)
        products = x.numel() * channels * 9  # 3 x 3 products of each in-channel
        ways[f"{channels} channels"] = {
            **found,
            "multiply_adds": products,
            "gflops": 2e-9 * products / found["seconds"],
        }
    return {"ways": ways, "gflops": max(w["gflops"] for w in ways.values())}


Measure = Callable[[Settings], dict[str, Any]]


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
            found[f"held/{name}"] = partial(held_entry, name)
            found[f"float64/{name}"] = partial(float64_entry, name)
    growing = [f"side/{n}" for n in settings.sides] + [f"depth/{n}" for n in settings.depths]
    for name in growing:
        found[name] = partial(growing_entry, name)
    if settings.before:
        for work in FASTER:
            found[f"before/{work}"] = partial(before_entry, work)
    if not settings.quick:
        found["busy/vgg7"] = busy_entry
    return found


def warm_up(settings: Settings) -> None:
    """Run everything once on a small layer.

    Imports and the first use of a kernel then count in no figure.
    """
    subject = benchmark_network("side/32")
    tiny = replace(settings, repeats=1, few=2, some=2)
    units = (0, 0, slice(None))
    for method in able(subject.network, "0"):
        abm.hyperplanes(subject.network, subject.x[:1], "0", "RM2", units, method=method)
    peers = {name: replace(peer, chunks=(2,)) for name, peer in PEERS.items()}
    peer_ways(subject, "0", units, peers, tiny)
