"""Verify every unit of every layer of the study's networks, as in [Wan2022, Tables 3.3 and 3.4]."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from adjointbackmap import data, models
from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.layer_check import LayerCheck
from adjointbackmap.exactness.verification import terms_of, verified
from adjointbackmap.files.disk import hold_folder
from adjointbackmap.sources import NetworkOptions, Subject, load_subject
from adjointbackmap.study.published.columns import PUBLISHED_COLUMNS
from adjointbackmap.study.setup import SCALE, Setup
from adjointbackmap.study.verification.outputs import outputs_verified
from adjointbackmap.study.verification.results_file import Results, read_results
from adjointbackmap.study.verification.summation import orders, outside_alone
from adjointbackmap.study.verification.tally import Tally
from adjointbackmap.training.evaluation import accuracy

KEY = "verification"


@dataclass(frozen=True)
class Arithmetic:
    """The precision of each part of a verification.

    Attributes:
        planes: Of the hyperplanes.
        sums: Of the inner products.
        values: Of the network's own values.
    """

    planes: torch.dtype
    sums: torch.dtype
    values: torch.dtype


WIDENED = "float64 hyperplanes, float32 values"
BESIDE = "float32, images of the widened run"
ARITHMETICS = {
    "float32": Arithmetic(torch.float32, torch.float32, torch.float32),
    "float64": Arithmetic(torch.float64, torch.float64, torch.float64),
    # The same images as in the next run. Finished images come from the file of "float32".
    "float32 again": Arithmetic(torch.float32, torch.float32, torch.float32),
    "float32, sums in float64": Arithmetic(torch.float32, torch.float64, torch.float32),
    # Again the same images as in the next run.
    BESIDE: Arithmetic(torch.float32, torch.float32, torch.float32),
    # The float32 parameters are widened, and gates are those of the float32 pass.
    WIDENED: Arithmetic(torch.float64, torch.float64, torch.float32),
}
"""Name of a run -> its precision."""

TaskReport = Callable[[str, float], None]


@dataclass(frozen=True)
class Counts:
    """How many test images to use, taken in the order of their hashes.

    ``None`` means the number of the study.

    Attributes:
        images: In float32. The default is all for VGG7 and 1,000 for ResNet20.
        images_float64: In float64, and for the two runs that compare sums in float32 and float64.
            The default is 200 for VGG7 and 50 for ResNet20.
        images_fc: For the layer ``fc``. The default is all.
        images_widened: With hyperplanes in float64 and values in float32, for all layers. The
            default is 1,000 for VGG7 and 100 for ResNet20.
    """

    images: int | None = None
    images_float64: int | None = None
    images_fc: int | None = None
    images_widened: int | None = None

    def check(self, available: int) -> None:
        """Check that the numbers do not exceed the available test images.

        Raises:
            ValueError: If one is less than 1, or more than there are.
        """
        for count in (self.images, self.images_float64, self.images_fc, self.images_widened):
            if count is not None and not 0 < count <= available:
                msg = (
                    f"The number of images must be from 1 to {available}. "
                    f"Got {count}: leave it out for that of the study."
                )
                raise ValueError(msg)

    def of(self, name: str, arithmetic: str) -> int:
        """Number of images for the convolutions of a network."""
        small = models.architecture(name).startswith("vgg7")
        if arithmetic == "float32":
            return self.images or (10_000 if small else 1_000)
        if arithmetic in (BESIDE, WIDENED):
            return self.images_widened or (1_000 if small else 100)
        return self.images_float64 or (200 if small else 50)


COUNTS_OF_STUDY = Counts()


def check_networks(names: Sequence[str] | None) -> list[str]:
    """The networks to verify, in the order of the study.

    If ``names`` is empty, all shipped networks with published numbers are verified.

    Raises:
        ValueError: If a network is not shipped, or has no published numbers.
    """
    able = [name for name in PUBLISHED_COLUMNS if name in models.names()]
    unknown = [name for name in names or () if name not in able]
    if unknown:
        msg = (
            f"--network must be one of {', '.join(able)}. "
            f"Got {', '.join(unknown)}: leave it out for all of them."
        )
        raise ValueError(msg)
    return [name for name in able if not names or name in names]


def verify_networks(
    folder: Path,
    names: Sequence[str],
    counts: Counts = COUNTS_OF_STUDY,
    root: Path | None = None,
    workers: int | None = None,
    report: TaskReport = lambda what, share: None,
    sample: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Verify networks.

    Images that are finished in a file of the folder are not computed again. A later run only adds
    images.

    Args:
        folder: Folder for finished images and results.
        names: Shipped networks, see :func:`check_networks`.
        counts: Numbers of images.
        root: Folder of the official binary files.
        workers: Number of processes that share the images of the convolutions.
        report: Called with the current task and its finished share.
        sample: Whether to use only the 200 test images of CIFAR-10 that ship.
        device: ``"cpu"`` or ``"cuda"``, where everything is computed.

    Returns:
        The content of ``verification.json`` in the folder after the run.

    Raises:
        ValueError: If there are fewer images than asked for, or a file of the folder is that of
            another job.
        OSError: If another process writes to the folder, or the disk is full. Finished images are
            kept.
    """
    with hold_folder(folder):
        results = Results(folder, device)
        for name in names:
            dataset = models.card(name)["dataset"]
            ships = sample and dataset == "cifar10"
            images = (data.sample() if ships else data.load(dataset, "test", root)).by_hash()
            counts.check(len(images))
            NetworkRun(name, images, results, counts, workers, report, device).run()
        results.write()
        return read_results(results.path)


def compute_verification(setup: Setup, report: TaskReport) -> None:
    """Verify the networks of a run.

    The run's number of images is used in float32, and a tenth of it in float64.
    """
    few = max(1, setup.images // 10)
    counts = Counts(setup.images, few, setup.images, few)
    names = check_networks(setup.networks)
    verify_networks(
        setup.folder / KEY, names, counts, setup.root, report=report, sample=setup.sample
    )


@dataclass(frozen=True)
class NetworkRun:
    """The verification runs of one network."""

    name: str
    images: data.Images
    results: Results
    counts: Counts
    workers: int | None
    report: TaskReport
    device: str

    @cached_property
    def subject(self) -> Subject:
        """The folded module and the map from pixels to its input."""
        return load_subject(NetworkOptions(self.name, fold=True))

    @cached_property
    def network(self) -> Network:
        """The folded module, traced."""
        return self.subject.trace(self.device)

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The results of the network so far."""
        return self.results.network(self.name, self.network.weights_hash())

    def layers(self, part: str) -> list[str]:
        """Names of all convolutions except the first, or of the fully connected layers."""
        kernels = [layer for layer in self.network.layers.values() if layer.kernel is not None]
        return [layer.name for layer in kernels[1:] if ("RM0" in layer.modes) == (part == "fc")]

    def run(self) -> None:
        """Compute accuracy, errors of every unit in each arithmetic, and the summation orders."""
        if self.entry.get("accuracy", {}).get("images") != len(self.images):
            self.report(f"{self.name}: accuracy", 0.0)
            trained = load_subject(NetworkOptions(self.name))
            self.entry["accuracy"] = accuracies(trained, self.subject, self.images, self.device)
            self.results.write()
        for arithmetic in ARITHMETICS:
            if arithmetic != WIDENED:  # its fc is verified with its convolutions
                self.verify(arithmetic, "fc", self._outputs_of(arithmetic))
        for arithmetic in ARITHMETICS:
            self.verify(arithmetic, "convolutions", self.counts.of(self.name, arithmetic))
        self.entry["orders"] = self.orders()
        self.entry["outside alone"] = self.alone()
        self.results.write()

    def _outputs_of(self, arithmetic: str) -> int:
        """Number of images for ``fc``."""
        if arithmetic == BESIDE:
            return self.counts.of(self.name, arithmetic)
        return self.counts.images_fc or len(self.images)

    def verify(self, arithmetic: str, part: str, asked: int) -> None:
        """Verify every unit of the convolutions, or every output of ``fc``.

        Only images that the results do not count yet are verified.
        """
        nothing = {"images": 0, "seconds": 0.0, "environments": [], "layers": {}}
        run = self.entry["runs"].setdefault(arithmetic, {}).setdefault(part, nothing)
        first = run.get("first", run)["images"]
        if asked <= first:
            return
        chosen = self.images[first:asked]
        used = ARITHMETICS[arithmetic]
        layers = [*self.layers(part), *(self.layers("fc") if arithmetic == WIDENED else ())]
        terms = terms_of(
            self.network, layers, False, SCALE, used.planes, used.sums, values=used.values
        )
        # in float32 first, as the network sees it
        x = self.subject.prepare(chosen.unit_interval()).to(self.device, used.planes)
        report = partial(self.report, f"{self.name}, {part}, {arithmetic}")
        arguments = (self.network, x, terms, chosen.hashes, report, self._file(part, arithmetic))
        with self._kept(run) as tallies:
            if part == "fc":
                found = outputs_verified(*arguments)
            else:
                found = verified(*arguments, self.workers)
            for _, checks in found:
                for name, check in checks.items():
                    tallies.setdefault(name, Tally(LayerCheck(name))).add(check)
        run.pop("first", None)
        self.results.write()

    def _file(self, part: str, arithmetic: str) -> Path:
        """The file of finished images; runs in the same precision share it."""
        used = ARITHMETICS[arithmetic]
        parts = [used.planes, used.sums, *([used.values] if arithmetic == WIDENED else [])]
        names = [str(dtype).removeprefix("torch.") for dtype in parts]
        precision = "-".join(dict.fromkeys(names))
        return self.results.path.parent / f"{self.name}-{part}-{precision}.jsonl"

    def orders(self) -> dict[str, Any]:
        """For each convolution, sum the terms of its worst float32 unit in several ways."""
        images = dict(zip(self.images.hashes, self.images.pixels, strict=True))
        found = {}
        for name, layer in self.entry["runs"]["float32"]["convolutions"]["layers"].items():
            image, unit = layer["check"]["worst"]
            x = self.subject.prepare(images[image].float() / 255).to(self.device)
            found[name] = orders(self.network, x, (image, tuple(unit)), name, SCALE)
        return found

    def alone(self) -> dict[str, int]:
        """Count the units with an error above 1 % from the network's own rounding alone.

        The images are those of the runs that compare sums in float32 and float64.
        """
        found = {}
        for part, run in self.entry["runs"]["float32 again"].items():
            x = self.subject.prepare(self.images[: run["images"]].unit_interval()).to(self.device)
            found.update(outside_alone(self.network, x, self.layers(part)))
        return found

    @contextmanager
    def _kept(self, run: dict[str, Any]) -> Iterator[dict[str, Tally]]:
        """Tallies that continue from the first images of a run.

        They are written into the run at the end, also if it is stopped. A stopped run may have
        counted any of its images. Therefore the run also keeps the tallies of the first images
        until it is finished.
        """
        before = {key: run[key] for key in ("images", "environments", "layers")}
        first = run.setdefault("first", before)
        started = time.monotonic()
        tallies = {name: Tally.from_dict(entry) for name, entry in first["layers"].items()}
        try:
            yield tallies
        finally:
            if tallies:
                run["layers"] = {name: tally.to_dict() for name, tally in tallies.items()}
                run["images"] = next(iter(tallies.values())).images
                run["environments"] = sorted({*first["environments"], self.results.place})
                run["seconds"] = round(run["seconds"] + time.monotonic() - started, 1)
                self.results.write()


def accuracies(
    trained: Subject,
    folded: Subject,
    images: data.Images,
    device: str = "cpu",
) -> dict[str, int | float]:
    """Accuracy of a network and of its folded version [Wan2022, section 3.5.1.2]."""
    pair = {"trained": trained, "folded": folded}
    shares = {key: accuracy(s.module.to(device), images, s.prepare) for key, s in pair.items()}
    return {"images": len(images), **shares}
