"""Every unit of every layer of the study's networks over the test images, as in [Wan2022, Tables 3.3 and 3.4]."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjointbackmap import data, models
from adjointbackmap.benchmark.timing import environment
from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.checks import Terms
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import LayerCheck, checks_of
from adjointbackmap.exactness.verification import Checks, fits, job_of, terms_of, verified
from adjointbackmap.files.checked import DamagedFile, read_or_set_aside, read_sealed
from adjointbackmap.files.disk import hold_folder
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.sources import Source, Subject, load_subject
from adjointbackmap.study.published.columns import COLUMNS
from adjointbackmap.study.setup import SCALE, Setup, write_json
from adjointbackmap.study.verification.summation import BATCH, orders, outside_alone, products
from adjointbackmap.study.verification.tally import Tally
from adjointbackmap.training.loop import accuracy

KEY = "verification"
FORMAT = 2
RESULTS = "verification.json"
ARITHMETIC = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float32 again": (torch.float32, torch.float32),  # on the images of the next one: what was finished is taken from its file
    "float32, sums in float64": (torch.float32, torch.float64),
}
"""Name -> precision of values and hyperplanes, and of the inner products."""

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Counts:
    """How many test images, the first ones in the order of their hashes; ``None`` for what the study wants.

    Attributes:
        images: In float32; by default all for VGG7, 1,000 for ResNet20.
        images_float64: In float64, and in float32 with sums in either; by default 200 for VGG7, 50 for ResNet20.
        images_fc: For the layer ``fc``; by default all.
    """

    images: int | None = None
    images_float64: int | None = None
    images_fc: int | None = None

    def check(self, available: int) -> None:
        """Hold the numbers that are asked for against the test images.

        Raises:
            ValueError: If one is less than 1, or more than there are.
        """
        for count in (self.images, self.images_float64, self.images_fc):
            if count is not None and not 0 < count <= available:
                msg = f"The number of images must be from 1 to {available}. Got {count}: leave it out for that of the study."
                raise ValueError(msg)

    def of(self, name: str, arithmetic: str) -> int:
        """Images for the convolutions of a network."""
        small = models.architecture(name).startswith("vgg7")
        if arithmetic == "float32":
            return self.images or (10_000 if small else 1_000)
        return self.images_float64 or (200 if small else 50)


WANTED = Counts()


class Results:
    """What was found so far, in a file that is replaced in one step.

    Attributes:
        path: The file.
        found: ``format``, ``environments`` and ``networks``.
        place: Which of the environments this run has.

    Raises:
        ValueError: If the file is none of this experiment.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.path = folder / RESULTS
        empty: dict[str, Any] = {"format": FORMAT, "environments": [], "networks": {}}
        self.found = _before(self.path) or empty
        here = environment(device)
        if here not in self.found["environments"]:
            self.found["environments"].append(here)
        self.place = self.found["environments"].index(here)

    def network(self, name: str, weights: str) -> dict[str, Any]:
        """The entry of a network, an empty one if there is none.

        Raises:
            ValueError: If it has the results of other weights.
        """
        entry = self.found["networks"].setdefault(name, {"weights sha256": weights, "runs": {}})
        if entry["weights sha256"] != weights:
            msg = f"{self.path} must have results of the weights {weights[:8]} of {name}. Got those of "
            msg += f"{entry['weights sha256'][:8]}: name another folder with --out."
            raise ValueError(msg)
        return entry

    def write(self) -> None:
        """Replace the file."""
        write_json(self.path, self.found)


def read(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ValueError: If it holds none of this experiment.
    """
    try:
        return _of_this_experiment(read_sealed(path, "make it again"), path)
    except FileNotFoundError as error:
        raise ValueError(_no_results(path)) from error


def _before(path: Path) -> dict[str, Any] | None:
    """The results that a run goes on with; damaged ones are set aside, and made again from the finished images.

    Raises:
        ValueError: If the file is none of this experiment.
    """
    try:
        found = read_or_set_aside(path, "format")
    except DamagedFile as error:
        raise ValueError(_no_results(path)) from error
    return found and _of_this_experiment(found, path)


def _of_this_experiment(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same results, if they are of this experiment.

    Raises:
        ValueError: If they are not.
    """
    if found.get("format") != FORMAT or "networks" not in found:
        raise ValueError(_no_results(path))
    return found


def _no_results(path: Path) -> str:
    return f"Results must be a file that study verification wrote. Got {path}: delete it or name another."


def check_networks(names: Sequence[str] | None) -> list[str]:
    """The networks to verify, in the order of the study; all that are shipped if none is named.

    Raises:
        ValueError: If one is not shipped, or nothing was published about it.
    """
    able = [name for name in COLUMNS if name in models.names()]
    unknown = [name for name in names or () if name not in able]
    if unknown:
        msg = f"--network must be one of {', '.join(able)}. Got {', '.join(unknown)}: leave it out for all of them."
        raise ValueError(msg)
    return [name for name in able if not names or name in names]


def run(
    folder: Path,
    names: Sequence[str],
    counts: Counts = WANTED,
    root: Path | None = None,
    workers: int | None = None,
    report: Report = lambda what, share: None,
    sample: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Verify networks; images that a file of the folder has are not computed again, so that a later run only adds.

    Args:
        folder: Where finished images and results are kept.
        names: Shipped networks, see :func:`check_networks`.
        counts: How many images.
        root: Folder of the official binary files.
        workers: How many processes share the images of the convolutions.
        report: Called with what is computed and the share of it that is done.
        sample: Whether the 200 test images of CIFAR-10 that ship stand for all of them.
        device: ``"cpu"`` or ``"cuda"``, where all is computed.

    Returns:
        What ``verification.json`` in the folder holds then.

    Raises:
        ValueError: If there are not so many images, or a file of the folder is that of another job.
        OSError: If another process writes to the folder, or the disk is full: finished images stay.
    """
    with hold_folder(folder):
        results = Results(folder, device)
        for name in names:
            dataset = models.card(name)["dataset"]
            images = (data.sample() if sample and dataset == "cifar10" else data.load(dataset, "test", root)).by_hash()
            counts.check(len(images))
            _Study(name, images, results, counts, workers, report, device).run()
        results.write()
        return read(results.path)


def compute(setup: Setup, report: Report) -> None:
    """Verify the networks of a run on its number of images, and on a tenth of them in float64."""
    counts = Counts(setup.images, max(1, setup.images // 10), setup.images)
    run(setup.folder / KEY, check_networks(setup.networks), counts, setup.root, None, report, setup.sample)


@dataclass(frozen=True)
class _Study:
    """The runs of one network."""

    name: str
    images: data.Images
    results: Results
    counts: Counts
    workers: int | None
    report: Report
    device: str

    @cached_property
    def subject(self) -> Subject:
        return load_subject(Source(self.name, fold=True))

    @cached_property
    def network(self) -> Network:
        return self.subject.trace(self.device)

    @cached_property
    def entry(self) -> dict[str, Any]:
        return self.results.network(self.name, self.network.weights_hash())

    def layers(self, part: str) -> list[str]:
        """Names of the convolutions but the first, or of the fully connected layers."""
        kernels = [layer for layer in self.network.layers.values() if layer.kernel is not None]
        return [layer.name for layer in kernels[1:] if ("RM0" in layer.modes) == (part == "fc")]

    def run(self) -> None:
        """Accuracy, every unit of the convolutions and of ``fc`` in each arithmetic, and the orders of summation."""
        if self.entry.get("accuracy", {}).get("images") != len(self.images):
            self.report(f"{self.name}: accuracy", 0.0)
            self.entry["accuracy"] = accuracies(load_subject(Source(self.name)), self.subject, self.images, self.device)
            self.results.write()
        for arithmetic in ARITHMETIC:
            self.verify(arithmetic, "fc", self.counts.images_fc or len(self.images))
        for arithmetic in ARITHMETIC:
            self.verify(arithmetic, "convolutions", self.counts.of(self.name, arithmetic))
        self.entry["orders"], self.entry["outside alone"] = self.orders(), self.alone()
        self.results.write()

    def verify(self, arithmetic: str, part: str, asked: int) -> None:
        """Every unit of the convolutions, or every output of ``fc``, of the images that the results do not count yet."""
        nothing = {"images": 0, "seconds": 0.0, "environments": [], "layers": {}}
        run = self.entry["runs"].setdefault(arithmetic, {}).setdefault(part, nothing)
        first = run.get("first", run)["images"]
        if asked <= first:
            return
        chosen, (dtype, accumulate) = self.images[first:asked], ARITHMETIC[arithmetic]
        terms = terms_of(self.network, self.layers(part), False, SCALE, dtype, accumulate)
        x = self.subject.prepare(chosen.unit_interval()).to(self.device, dtype)
        precision = "-".join(str(d).removeprefix("torch.") for d in dict.fromkeys((dtype, accumulate)))
        keep = self.results.path.parent / f"{self.name}-{part}-{precision}.jsonl"
        what = f"{self.name}, {part}, {arithmetic}"
        arguments = (self.network, x, terms, chosen.hashes, lambda share: self.report(what, share), keep)
        with self._kept(run) as tallies:
            for _, checks in outputs_verified(*arguments) if part == "fc" else verified(*arguments, self.workers):
                for name, check in checks.items():
                    tallies.setdefault(name, Tally(LayerCheck(name))).add(check)
        run.pop("first", None)
        self.results.write()

    def orders(self) -> dict[str, Any]:
        """The unit with the largest error of each convolution in float32, its terms summed in several ways."""
        images = dict(zip(self.images.hashes, self.images.pixels, strict=True))
        found = {}
        for name, layer in self.entry["runs"]["float32"]["convolutions"]["layers"].items():
            image, unit = layer["check"]["worst"]
            x = self.subject.prepare(images[image].float() / 255).to(self.device)
            found[name] = orders(self.network, x, (image, tuple(unit)), name, SCALE)
        return found

    def alone(self) -> dict[str, int]:
        """Units that the network's own rounding takes outside, on the images of the sums in float64."""
        found = {}
        for part, run in self.entry["runs"]["float32 again"].items():
            x = self.subject.prepare(self.images[: run["images"]].unit_interval()).to(self.device)
            found.update(outside_alone(self.network, x, self.layers(part)))
        return found

    @contextmanager
    def _kept(self, run: dict[str, Any]) -> Iterator[dict[str, Tally]]:
        """Tallies that go on from the first images of a run and go into it, also where it is stopped.

        Until the run is finished, what it counts may be any of its images; so it keeps the tallies of the first ones beside.
        """
        first = run.setdefault("first", {key: run[key] for key in ("images", "environments", "layers")})
        started, tallies = time.monotonic(), {name: Tally.from_dict(entry) for name, entry in first["layers"].items()}
        try:
            yield tallies
        finally:
            if tallies:
                run["layers"] = {name: tally.to_dict() for name, tally in tallies.items()}
                run["images"] = next(iter(tallies.values())).images
                run["environments"] = sorted({*first["environments"], self.results.place})
                run["seconds"] = round(run["seconds"] + time.monotonic() - started, 1)
                self.results.write()


def accuracies(trained: Subject, folded: Subject, images: data.Images, device: str = "cpu") -> dict[str, int | float]:
    """Shares of images that a network and its folded twin classify correctly [Wan2022, section 3.5.1.2]."""
    pair = {"trained": trained, "folded": folded}
    shares = {key: accuracy(s.module.to(device), images, s.prepare) for key, s in pair.items()}
    return {"images": len(images), **shares}


def outputs_verified(
    network: Network, x: Tensor, terms: Terms, names: Sequence[str], report: Callable[[float], None], keep: Path
) -> Iterator[tuple[str, Checks]]:
    """Name and errors of each image for fully connected layers, whose RM0 hyperplanes are computed for many images at once.

    Args:
        network: Traced network.
        x: Batch.
        terms: What is verified.
        names: Name of each image.
        report: Called with the share that is done.
        keep: File of finished images.
    """
    record = Record(keep, {**job_of(network, terms), "mode": "RM0"}, fits(network, terms))
    kept = {name: {layer: LayerCheck.from_dict(entry) for layer, entry in found.items()} for name, found in record.results()}
    yield from ((name, kept[name]) for name in names if name in kept)
    missing = [n for n, name in enumerate(names) if name not in kept]
    for start in range(0, len(missing), BATCH):
        report(1 - (len(missing) - start) / len(names))
        part = missing[start : start + BATCH]
        for name, checks in _outputs(network, x[part], terms, [names[n] for n in part]):
            record.append(name, {layer: check.to_dict() for layer, check in checks.items()})
            yield name, checks
    report(1.0)


def _outputs(network: Network, x: Tensor, terms: Terms, names: Sequence[str]) -> list[tuple[str, Checks]]:
    """Name and errors of each image of a batch."""
    found: list[tuple[str, Checks]] = [(name, {}) for name in names]
    for layer in terms.layers:
        planes = hyperplanes(network, x, layer, "RM0", None, terms.own_bias, terms.scale, terms.dtype)
        parts = products(planes, terms.accumulate)
        sums, magnitudes = parts.sum(-1), parts.abs().sum(-1)
        for (_, checks), check in zip(found, checks_of(layer, planes.value, sums, magnitudes, names), strict=True):
            checks[layer] = check
    return found
