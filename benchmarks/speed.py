"""Claim: every hyperplane of a layer, of a network and of a batch while the user waits, many times faster than named peers.

usage: python benchmarks/speed.py [--only vgg7] [--repeats 5] [--out docs/results/speed.json] [--docs docs/speed.md]

VGG7 (the shipped one) and ResNet20 (random weights, non-trivial statistics), folded, at 32 x 32 in float32: every unit
of every layer in RM2 and in RM0, `abm.verify`, ten classes of 64 images. All ways of an entry are measured one after
the other in one process; times are medians, the run before them, which is left out, tells the memory. Slow ways are
measured on some units or columns and extrapolated, and marked. Each finished entry is kept in the file, so that a
stopped run goes on.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from exactness import environment, network_of
from speed_peers import CAPTUM, CLASS_PEERS, PEERS, Peer, Work, by_jacrev
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap import data, models
from adjointbackmap.arithmetic import exact
from adjointbackmap.methods import METHODS
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.windows import Sweep, Windows

CHOSEN = {"vgg7": ("conv1", "conv3", "conv5"), "resnet20": ("conv1", "conv9", "conv17")}  # an early, a middle and a late one
IMAGES = 64
FEW, SOME = 64, 256  # units of a peer, and of our adjoint, from which the time of all is extrapolated
TOO_MUCH = 30  # a method of ours is left out where the plan counts so many times the best's cost, in RM0 only
DEFECT = 1.5
RATES = (32, 64, 96, 128)  # channels of the plain convolution
RUN = time.strftime("%Y-%m-%d %H:%M:%S")
BEGIN, END = "<!-- speed: written by benchmarks/speed.py -->", "<!-- speed: end -->"
Run = Callable[[], object]


# time and memory


def clock(run: Run) -> float:
    """Seconds of a run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the resident set, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def growth(run: Run) -> float | None:
    """MiB by which the resident set grows during a run, result included; ``None`` where the system does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        run()
        return None
    run()
    return max(0, resident("VmHWM") - before) / 2**20


def measured(run: Run, repeats: int) -> dict:
    """Median time of some runs, and the memory of the one before them."""
    mib = growth(run)
    times = [clock(run) for _ in range(repeats)]
    while sum(times) < 0.3 and len(times) < 10 * repeats:
        times.append(clock(run))
    return {"seconds": statistics.median(times), "fastest": min(times), "runs": len(times), "mib": mib}


def extrapolated(found: dict, fixed: float, count: int, total: int, of: str) -> dict:
    """The time of all from that of some; what is needed once, such as the pass forward, is counted once."""
    if count == total:
        return found
    scaled = {key: fixed + max(0.0, found[key] - fixed) * total / count for key in ("seconds", "fastest")}
    return {**found, **scaled, "measured": f"{count} of {total:,} {of}"}


# the work


@cache
def prepared(name: str) -> tuple[abm.Network, torch.nn.Module, Tensor]:
    """A network of the study, its folded module, and the images."""
    model = network_of(name)[0]
    x = models.preprocessing(name)(data.sample()[:IMAGES].unit_interval())
    return abm.trace(model, x[:2]), model, x


def mode_of(layer: abm.Layer) -> str:
    """The mode whose units are the layer's."""
    return "RM0" if len(layer.out_shape) == 1 else "RM2"


def places(layer: abm.Layer, count: int) -> tuple[Tensor, ...]:
    """Some units, evenly over a layer's output as :func:`speed_peers.spread` takes them, in the order of the mode."""
    size = prod(layer.out_shape)
    where = torch.unravel_index(torch.arange(count) * (size // count), layer.out_shape)
    return (*where[1:], where[0])


def ours(name: str, layer: str, method: str, repeats: int) -> dict:
    """Every unit of a layer at one image by one of our methods."""
    network, _, x = prepared(name)
    known = network.layer(layer)
    mode, total = mode_of(known), prod(known.out_shape)
    call = partial(abm.hyperplanes, network, x[:1], layer, mode, method=method)
    planned = network.plan(layer, mode, method=method)
    counts = {"multiply_adds": planned.multiply_adds, "cost": planned.cost}
    if method != "adjoint" or total <= 2 * SOME:
        return {**measured(call, repeats), **counts}
    one = measured(partial(call, units=places(known, 1)), repeats)["seconds"]
    some = measured(partial(call, units=places(known, SOME)), repeats)
    return {**extrapolated(some, one, SOME, total, "units"), **counts}


def able(network: abm.Network, layer: str, mode: str) -> list[str]:
    """Our methods that apply."""
    found = []
    for method in METHODS:
        try:
            network.plan(layer, mode, method=method)
        except ValueError:
            continue
        found.append(method)
    return found


def tuned(peer: Peer, work: Work, formats: tuple[str, ...], least: int) -> tuple[Work, int]:
    """The memory format and chunk with which a peer is fastest, each tried once; the first run of a format is left out."""
    works = [Work(work.model, work.layer, work.x, f) for f in formats]
    tries = [(candidate, chunk) for candidate in works for chunk in peer.chunks]
    if len(tries) == 1:
        return tries[0]
    speeds = []
    for candidate, chunk in tries:
        count = max(least, chunk)
        run = partial(peer.call, candidate, count, chunk)
        if chunk == peer.chunks[0]:
            run()
        speeds.append(clock(run) / count)
    return tries[speeds.index(min(speeds))]


def peer_at(peer: Peer, work: Work, chunk: int, total: int, least: int, repeats: int) -> dict:
    """A peer with its best settings, from some units or columns."""
    count = min(total, max(least, chunk))
    fixed = statistics.median([clock(work.forward) for _ in range(5)])
    found = extrapolated(measured(partial(peer.call, work, count, chunk), repeats), fixed, count, total, peer.of)
    return {**found, "peer": True, "whole": peer.whole, "settings": f"{work.memory_format}, chunk {chunk}"}


def peer_ways(name: str, layer: str, peers: dict[str, Peer], repeats: int) -> dict:
    """Peers at every unit of a layer; what is not installed is named as left out."""
    network, model, x = prepared(name)
    units, ways = prod(network.layer(layer).out_shape), {}
    for title, peer in peers.items():
        if title.startswith("Captum") and not CAPTUM:
            ways[title] = {"left_out": "captum is not installed"}
            continue
        least = min(FEW, units)
        peer = Peer(peer.call, peer.whole, tuple(c for c in peer.chunks if c <= max(least, units)) or (units,), peer.of)
        work, chunk = tuned(peer, Work(model, layer, x[:1]), ("contiguous", "channels last"), least)
        total = x[0].numel() + work.entries if peer.of == "columns" else units
        ways[title] = peer_at(peer, work, chunk, total, least, repeats)
    return ways


def difference(name: str, layer: str) -> float:
    """Largest difference between our hyperplanes and those of jacrev at some units, relative to the largest entry."""
    network, model, x = prepared(name)
    known = network.layer(layer)
    count = min(FEW, prod(known.out_shape))
    method = network.plan(layer, mode_of(known)).method  # of every unit: some alone would be planned otherwise
    planes = abm.hyperplanes(network, x[:1], layer, mode_of(known), units=places(known, count), method=method)
    image, biases = by_jacrev(Work(model, layer, x[:1]), count, count)
    bias = torch.cat([b.flatten(1) for b in biases.values()], 1)
    pairs = ((planes.image[0], image[:, 0]), (planes.bias_part[0], bias))
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())  # NaN stays


# the entries


def layer_entry(name: str, layer: str, repeats: int) -> dict:
    """Every unit of a layer: all methods and peers for the chosen layers, the plan's choice and jacrev for the others."""
    network = prepared(name)[0]
    mode = mode_of(network.layer(layer))
    planned = network.plan(layer, mode)
    everything = layer in CHOSEN[name]
    methods = able(network, layer, mode) if everything else [planned.method]
    ways = {method: ours(name, layer, method, repeats) for method in methods}
    ways |= peer_ways(name, layer, PEERS if everything else {"jacrev": PEERS["jacrev"]}, repeats)
    facts = {"units": prod(network.layer(layer).out_shape), "mode": mode, "full": everything}
    return {**facts, "plan": planned.method, "explained": str(planned), "ways": ways, "difference": difference(name, layer)}


def verify_entry(name: str, repeats: int) -> dict:
    """`abm.verify` of one image, every unit of every layer."""
    network, _, x = prepared(name)
    units = sum(check.units for check in abm.verify(network, x[:1]).values())
    return {"units": units, "ways": {"verify": measured(lambda: abm.verify(network, x[:1]), repeats)}}


def classes_entry(name: str, repeats: int) -> dict:
    """RM0 of every class for a batch of images."""
    network, model, x = prepared(name)
    best, ways = network.plan("fc", "RM0"), {}
    for method in able(network, "fc", "RM0"):
        planned = network.plan("fc", "RM0", method=method)
        images = IMAGES if method == best.method else 1
        if planned.cost > TOO_MUCH * best.cost:
            ways[method] = {"left_out": f"the plan counts {planned.cost / best.cost:.0f} times the best's cost"}
            continue
        found = measured(partial(abm.hyperplanes, network, x[:images], "fc", "RM0", method=method), repeats)
        ways[method] = {
            **extrapolated(found, 0.0, images, IMAGES, "images"),
            "multiply_adds": planned.multiply_adds * IMAGES,
            "cost": planned.cost * IMAGES,
        }
    for title, peer in CLASS_PEERS.items():
        if title.startswith("Captum") and not CAPTUM:
            ways[title] = {"left_out": "captum is not installed"}
            continue
        work, chunk = tuned(peer, Work(model, "fc", x), ("contiguous", "channels last"), IMAGES // 4)
        ways[title] = peer_at(peer, work, chunk, IMAGES, IMAGES, repeats)
    units = IMAGES * network.layer("fc").out_shape[0]
    return {"units": units, "mode": "RM0", "full": True, "plan": best.method, "explained": str(best), "ways": ways}


class Counting(Sweep):
    """A sweep that counts its multiply-adds on windows, and those of them that touch a tangent's window.

    A window grows by the reach of a kernel, so at its edges some products are with zeros: those are not touching.
    """

    products = 0
    touching = 0

    def _step(self, group, step, inputs):
        out = super()._step(group, step, inputs)
        if isinstance(step.rule, Kernel) and out is not None:
            given, made = (v.tensor if isinstance(v, Windows) else v for v in (inputs[0], out))
            weight = step.rule.weight
            products = made.numel() * weight[0].numel()
            self.products += products
            self.touching += min(products, given.numel() * weight[:, 0].numel() // prod(getattr(step.rule, "stride", [1])))
        return out


def sweep_entry(name: str, repeats: int) -> dict:
    """The windowed sweep of one image that serves every layer, and the rate that it reaches."""
    network, _, x = prepared(name)
    pattern = abm.record_pattern(network, x[:1])
    targets = [layer.value for layer in network.distinct_layers()]

    def run(kind: type[Sweep] = Sweep) -> Sweep:
        sweep = kind(pattern, targets)
        with exact(x.device):
            for group in sweep.groups():
                sweep.run(group)
        return sweep

    counted = run(Counting)
    found = measured(run, repeats)
    rates = {k: 2e-9 * getattr(counted, k) / found["seconds"] for k in ("products", "touching")}
    return {"ways": {"sweep": {**found, "multiply_adds": counted.products}}, "touching": counted.touching, "gflops": rates}


def rate_entry(repeats: int) -> dict:
    """GFLOP/s of a large plain convolution, 3 x 3 at 32 x 32, float32, channels last."""
    ways = {}
    for channels in RATES:
        x = torch.rand(8192 // channels, channels, 32, 32).contiguous(memory_format=torch.channels_last)
        w = torch.rand(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            found = measured(partial(F.conv2d, x, w, padding=1), repeats)
        products = x.numel() * channels * 9
        ways[f"{channels} channels"] = {**found, "multiply_adds": products, "gflops": 2e-9 * products / found["seconds"]}
    return {"ways": ways, "gflops": max(w["gflops"] for w in ways.values())}


def entries() -> Iterator[tuple[str, Callable[[int], dict]]]:
    """Name and measurement of everything, in the order of the tables."""
    yield "machine/rate", rate_entry
    for name in CHOSEN:
        for layer in prepared(name)[0].distinct_layers():
            if layer.kernel is not None:
                yield f"{name}/{layer.name}", partial(layer_entry, name, layer.name)
        yield f"{name}/verify", partial(verify_entry, name)
        yield f"{name}/sweep", partial(sweep_entry, name)
        yield f"{name}/classes", partial(classes_entry, name)


# the tables


def seconds_of(way: dict) -> str:
    """A time, with a star where it was extrapolated."""
    return f"{way['seconds']:.3g} s{'*' if 'measured' in way else ''}"


def mib_of(way: dict) -> str:
    """Peak memory."""
    return "not told" if way["mib"] is None else f"{way['mib']:,.0f} MiB"


def best_of(entry: dict, peer: bool) -> tuple[str, dict]:
    """The fastest of our methods, or of the peers that give image and bias parts."""
    able = {n: w for n, w in entry["ways"].items() if "seconds" in w and w.get("peer", False) == peer and w.get("whole", True)}
    return min(able.items(), key=lambda item: item[1]["seconds"])


def plan_distance(entry: dict) -> float:
    """How many times as long as the best of our methods the plan's choice takes."""
    return entry["ways"][entry["plan"]]["seconds"] / best_of(entry, peer=False)[1]["seconds"]


def summary(found: dict) -> list[str]:
    """A row for each layer and batch: the plan's choice beside the fastest peer."""
    head = "| work | hyperplanes | plan | multiply-adds | time | memory | plan / best method | jacrev | best peer | ratio to it |"
    lines = [head, "|" + "---|" * 10]
    for name, e in found.items():
        if "plan" in e:
            way, (title, peer) = e["ways"][e["plan"]], best_of(e, peer=True)
            jacrev = next(w for n, w in e["ways"].items() if "jacrev" in n)
            distance = f"{plan_distance(e):.2f}" + (" (defect)" if plan_distance(e) > DEFECT else "") if e["full"] else "-"
            cost = f"{way['multiply_adds'] / 1e9:.3g} G | {seconds_of(way)} | {mib_of(way)}"
            peers = f"{seconds_of(jacrev)} | {title}, {seconds_of(peer)} | {peer['seconds'] / way['seconds']:.3g} x"
            lines.append(f"| {name}, {e['mode']} | {e['units']:,} | {e['plan']} | {cost} | {distance} | {peers} |")
    return lines


def totals(found: dict) -> list[str]:
    """All layers of one image: layer by layer, and verified."""
    lines = ["| one image | hyperplanes | way | time | memory | jacrev, all layers | ratio to it |", "|" + "---|" * 7]
    for name in CHOSEN:
        layers = [e for n, e in found.items() if n.startswith(f"{name}/conv") or n == f"{name}/fc"]
        wanted = sum(layer.kernel is not None for layer in prepared(name)[0].distinct_layers())
        if len(layers) < wanted:
            continue
        peer = sum(e["ways"]["jacrev"]["seconds"] for e in layers)
        planned = [e["ways"][e["plan"]] for e in layers]
        largest = max((w["mib"] for w in planned if w["mib"] is not None), default=None)
        both = {"layer by layer": {"seconds": sum(w["seconds"] for w in planned), "mib": largest}}
        if f"{name}/verify" in found:
            both["`abm.verify`"] = found[f"{name}/verify"]["ways"]["verify"]
        for way, w in both.items():
            row = f"{sum(e['units'] for e in layers):,} | {way} | {seconds_of(w)} | {mib_of(w)}"
            lines.append(f"| {name} | {row} | {peer:.3g} s* | {peer / w['seconds']:.3g} x |")
    return lines


def rates(found: dict) -> list[str]:
    """The rate of the windowed sweep beside that of a plain convolution."""
    lines = ["| windowed sweep of all layers | multiply-adds | time | memory | GFLOP/s | share of the plain convolution's |"]
    lines.append("|" + "---|" * 6)
    plain = found.get("machine/rate", {}).get("gflops")
    for name in CHOSEN:
        e = found.get(f"{name}/sweep")
        if e and plain:
            way, shares = e["ways"]["sweep"], {k: 100 * v / plain for k, v in e["gflops"].items()}
            row = f"{way['multiply_adds'] / 1e9:.3g} G | {seconds_of(way)} | {mib_of(way)} | {e['gflops']['products']:.0f}"
            touching = f"{shares['touching']:.0f} % without the products with zeros around a window"
            lines.append(f"| {name} | {row} | {shares['products']:.0f} %; {touching} |")
    for channels, way in found.get("machine/rate", {}).get("ways", {}).items():
        row = f"{way['multiply_adds'] / 1e9:.3g} G | {seconds_of(way)} | {mib_of(way)} | {way['gflops']:.0f}"
        lines.append(f"| plain 3 x 3 convolution, {channels} | {row} | |")
    return lines


def everything(found: dict) -> list[str]:
    """Every way of the entries that have all."""
    head = "| work | way | parts | multiply-adds | time | memory | ratio to the plan's choice | settings | measured |"
    lines = [head, "|" + "---|" * 9]
    for name, e in found.items():
        for title, w in e["ways"].items() if e.get("full") else ():
            if "left_out" in w:
                lines.append(f"| {name} | {title} | | | | | | | left out: {w['left_out']} |")
                continue
            parts = "image and bias" if w.get("whole", True) else "image only"
            products = f"{w['multiply_adds'] / 1e9:.3g} G" if "multiply_adds" in w else ""
            ratio = w["seconds"] / e["ways"][e["plan"]]["seconds"]
            figures = f"{products} | {seconds_of(w)} | {mib_of(w)} | {ratio:.3g} x"
            lines.append(f"| {name} | {title} | {parts} | {figures} | {w.get('settings', '')} | {w.get('measured', 'all')} |")
    return lines


def markdown(found: dict) -> str:
    """Where it was measured, and the tables."""
    env, known = found["environment"], found["entries"]
    runs, repeats = {e["run"] for e in known.values()}, min(e["repeats"] for e in known.values())
    machine = f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads, torch {env['torch']}, Python {env['python']}"
    lines = [f"{machine}. Medians of at least {repeats} runs, in {len(runs)} process{'es' if len(runs) > 1 else ''};"]
    lines.append(f"load of the machine at the start {env['load']:.1f}.")
    worst = max((e["difference"] for e in known.values() if "difference" in e), default=None)
    if worst is not None:
        lines.append(f"Largest difference to jacrev, relative to the largest entry: {worst:.1e}.")
    for table in (summary, totals, rates, everything):
        lines += ["", *table(known)]
    note = "time of some units, columns or images extrapolated to all; its memory is that of those that were measured"
    return "\n".join([*lines, "", f"\\* {note}."])


def write_docs(found: dict, docs: Path) -> None:
    """Put the tables between the two marks of a page."""
    before, _, rest = docs.read_text().partition(BEGIN)
    docs.write_text(f"{before}{BEGIN}\n\n{markdown(found)}\n\n{END}{rest.partition(END)[2]}")


def machine() -> dict:
    """Where the figures were measured."""
    info = Path("/proc/cpuinfo")
    named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = named[0] if named else platform.processor()
    return {**environment(), "cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "captum": CAPTUM}


def warm_up() -> None:
    """Everything once on a small layer, so that imports and the first use of a kernel are in no figure."""
    for name in CHOSEN:
        network, model, x = prepared(name)
        for method in METHODS:
            abm.hyperplanes(network, x[:1], "conv0", "RM2", units=(0, 0, slice(None)), method=method)
        for title, peer in PEERS.items():
            if CAPTUM or not title.startswith("Captum"):
                peer.call(Work(model, "conv0", x[:1]), 2, 2)


def main() -> None:
    """Measure every entry that the file lacks, and print the tables.

    Raises:
        SystemExit: If the plan's choice is slower than the best of our methods by more than the limit.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the entries to measure, such as vgg7 or conv1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into, such as docs/speed.md")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"environment": machine(), "entries": {}}
    warm_up()
    order = dict(entries())
    for name, measure in order.items():
        if arguments.only in name and name not in found["entries"]:
            started = time.perf_counter()
            entry = {**measure(arguments.repeats), "run": RUN, "repeats": arguments.repeats}
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
            kept = {**found["entries"], name: entry}
            found["entries"] = {n: kept[n] for n in order if n in kept}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if arguments.docs:
        write_docs(found, arguments.docs)
    defects = [
        f"{n} ({plan_distance(e):.2f})" for n, e in found["entries"].items() if e.get("full") and plan_distance(e) > DEFECT
    ]
    if defects:
        msg = f"the plan must be at most {DEFECT} times as slow as the best method. Got more in {', '.join(defects)}"
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
