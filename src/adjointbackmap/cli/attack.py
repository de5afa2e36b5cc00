"""The command attack."""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from adjointbackmap.cli.attempt import (
    BALL_METHODS,
    Attempt,
    Steps,
    ball_settings,
    job_of,
    study_settings,
)
from adjointbackmap.cli.frame import (
    NO_NETWORK,
    NOT_KEPT,
    app,
    console,
    help_examples,
    progress,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.files.checked import OF_FILE, read_or_set_aside, sealed_text
from adjointbackmap.files.disk import hold_file, hold_folder, write
from adjointbackmap.sources import NetworkOptions, Subject, chosen_images, load_subject

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.exactness.journal import Record
    from adjointbackmap.examples import Attacked

RESULTS_FILE = "attack.json"
IMAGES_FILE = "attack.safetensors"
ROWS_SHOWN = 20  # images in the table of the terminal
PICTURES = 4  # images that are drawn
ATTACK_EXAMPLES = help_examples(
    "adjointbackmap attack vgg7-cifar10 --image horse",
    "adjointbackmap attack vgg7-cifar10 --images 20 --method targeted --target cat --keep done",
)
SHORT_HASH = 8  # digits of an image's hash in the table and in names of pictures


@app.command(help_epilogue=ATTACK_EXAMPLES)
def attack(
    source: NetworkOptions = NO_NETWORK,
    *,
    image: str = "horse",
    images: int | None = None,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    method: Literal["basic", "targeted", "least-likely", "pgd", "apgd"] = "basic",
    target: str | None = None,
    norm: Literal["linf", "l2"] = "linf",
    starts: int = 1,
    seed: int = 0,
    step: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    radius: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    iterations: int | None = None,
    until_success: bool | None = None,
    examples: Path | None = None,
    keep: Path | None = None,
    out: Path = Path("adjointbackmap-attack"),
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Attack images and measure the results.

    The defaults of --step, --radius, --iterations and --until-success are those of the study:
    of its experiment 1 for the method basic, of its experiment 2 for the others.

    Args:
        source: The network.
        image: A sample image by number, the first sample image of a class, or a picture file.
        images: Number of images to use instead of --image. Test images of CIFAR are taken in the
            order of their hashes.
        dataset: Images for --images: the 200 sample images that ship, or the test images of CIFAR.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        method: Away from the predicted class (basic), towards the class of --target (targeted), or
            towards the least likely class of each image (least-likely): the attacks of the study.
            Away from the predicted class, or towards --target, inside a ball of --radius (8/255 if
            left out): projected gradient descent (pgd), or Auto-PGD (apgd).
        target: Name or number of a class, for --method targeted, pgd or apgd. Images that the
            network already assigns to this class are left out.
        norm: Norm of the ball of pgd and apgd.
        starts: Number of random starts of pgd and apgd.
        seed: Seed of these starts.
        step: Length of a step, for pixels in [0, 1]. One number, or one per channel.
        radius: Largest change of a pixel. One number, or one per channel. If left out, only the
            limits 0 and 1 of a pixel count.
        iterations: Largest number of steps.
        until_success: Whether an image stops at its first success.
        examples: File of adversarial examples, one per image. They are measured, and nothing is
            attacked.
        keep: File for finished images. Images in it are not attacked again.
        out: Folder for the images (attack.safetensors), their numbers (attack.json) and pictures
            of the first four.
        threads: Number of processor threads.
        output: How tables are printed.

    Raises:
        ValueError: If --target is not a class, comes without --method targeted, or is missing with
            it; if the network assigns all images to the target; or if --out holds the results of
            another attack.
        OSError: If another process writes to --out or --keep, or the disk is full.
        KeyboardInterrupt: On Ctrl-C.
    """
    use_threads(threads)
    subject = load_subject(source)
    goal = _goal(method, target, subject.classes)
    pixels = chosen_images(image, images, dataset, data, subject)
    with hold_folder(out):
        if examples is not None:
            job, found = _examined(subject, pixels, examples, out)
        else:
            pixels = _not_yet_at_goal(subject, pixels, goal, target)
            steps = Steps(step, radius, iterations, until_success)
            settings = (
                ball_settings(method, norm, starts, seed, steps)
                if method in BALL_METHODS
                else study_settings(method, subject, pixels, steps)
            )
            attempt = Attempt(subject, pixels, method, goal, settings)
            job = attempt.job
            _check_kept(out, job, pixels)
            with _advice_when_stopped(keep):
                found = _attacked(attempt, keep)
        _show_and_write(found, subject, goal, job, out, output)


def _examined(
    subject: Subject, pixels: "Tensor", examples: Path, out: Path
) -> tuple[dict[str, Any], "Attacked"]:
    """Measure the adversarial examples of a file."""
    from adjointbackmap.examples import examine, read_examples

    made = read_examples(examples)
    checksum = hashlib.sha256(examples.read_bytes()).hexdigest()
    job = job_of(subject, {"examples": str(examples), "sha256": checksum})
    _check_kept(out, job, pixels)
    return job, examine(subject.module, pixels, made, subject.prepare)


@contextmanager
def _advice_when_stopped(keep: Path | None) -> Iterator[None]:
    """Name --keep if a run without it is stopped: its finished images are lost.

    Raises:
        KeyboardInterrupt: As it came, with this advice.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not keep:
            stop.args = (NOT_KEPT,)
        raise


def _not_yet_at_goal(
    subject: Subject, pixels: "Tensor", goal: int | None, target: str | None
) -> "Tensor":
    """The images that the network does not assign to the target already.

    Raises:
        ValueError: If there is none.
    """
    from adjointbackmap.examples import scores_of

    if goal is None:
        return pixels
    chosen = pixels[scores_of(subject.module, pixels, subject.prepare).argmax(1) != goal]
    if not len(chosen):
        msg = (
            "The network must see an image as another class than --target. "
            f"Got {target} for all: choose another."
        )
        raise ValueError(msg)
    return chosen


def _check_kept(out: Path, job: dict[str, Any], pixels: "Tensor") -> None:
    """Check that the results in a folder are of the same attack, and of images of this run.

    Raises:
        ValueError: If they are not.
    """
    from adjointbackmap.exactness.journal import setting_differences

    path = out / RESULTS_FILE
    kept = read_or_set_aside(path, "network")
    if kept is None:
        return
    kept.pop(OF_FILE, None)
    try:
        missing = {row["image"] for row in kept.pop("images")} - set(_names(pixels))
    except (KeyError, TypeError):
        other = "without images"
    else:
        lacks = f"{len(missing)} images that this run lacks" if missing else ""
        other = setting_differences(kept, job) or lacks
    if other:
        msg = (
            f"{path} must hold results of this job. "
            f"Got those of another ({other}): name another folder with --out."
        )
        raise ValueError(msg)


def _goal(method: str, target: str | None, classes: tuple[str, ...]) -> int | None:
    """Number of the target class.

    Raises:
        ValueError: If --target and --method targeted do not come together, or there is no such
            class.
    """
    free = method in BALL_METHODS  # with or without a target
    if not free and (method == "targeted") != (target is not None):
        msg = (
            "--target must come with --method targeted, pgd or apgd, and targeted with --target. "
            f"Got {method} and {target or 'no target'}."
        )
        raise ValueError(msg)
    if target is None or target.isdigit():
        return None if target is None else int(target)
    if target not in classes:
        names = f", or {', '.join(classes)}" if classes else ""
        msg = f"--target must be the number of a class{names}. Got {target!r}."
        raise ValueError(msg)
    return classes.index(target)


def _attacked(attempt: Attempt, keep: Path | None) -> "Attacked":
    """Attack batch by batch. A batch is skipped if all its images are kept."""
    from adjointbackmap.examples import BATCH

    pixels = attempt.pixels
    names = _names(pixels)
    with hold_file(keep) if keep else nullcontext(), progress("attacking") as (bar, task):
        record = _record(keep, attempt) if keep else None
        results = dict(record.results()) if record else {}
        for first in range(0, len(pixels), BATCH):
            part = slice(first, first + BATCH)
            if not results.keys() >= set(names[part]):
                for name, result in _results(attempt.run(part), attempt.goal):
                    results[name] = result
                    if record and name not in record.names:
                        record.append(name, result)
            bar.update(task, completed=min(1.0, (first + BATCH) / len(pixels)))
    return _joined(attempt, [results[name] for name in names])


def _record(keep: Path, attempt: Attempt) -> "Record":
    """The finished images in a file; each result is checked against the size of an image."""
    from adjointbackmap.exactness.journal import Record

    size = attempt.pixels[0].numel() * attempt.pixels.element_size()
    return Record(keep, attempt.job, partial(_fits, size))


def _results(made: "Attacked", goal: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each image, and its result for the file."""
    for row, image in zip(_rows(made, goal), made.adversarial, strict=True):
        content = b64encode(image.numpy().tobytes()).decode()
        yield row["image"], {"adversarial": content, "steps": row["steps"]}


def _joined(attempt: Attempt, results: list[dict[str, Any]]) -> "Attacked":
    """Results of the file as tensors, measured again."""
    import torch

    from adjointbackmap.examples import examine

    subject = attempt.subject
    pixels = attempt.pixels
    numbers = bytearray(b"".join(b64decode(result["adversarial"]) for result in results))
    adversarial = torch.frombuffer(numbers, dtype=pixels.dtype).view_as(pixels)
    steps = torch.tensor([result["steps"] for result in results])
    found = examine(subject.module, pixels, adversarial, subject.prepare)
    return replace(found, steps=steps)


def _fits(size: int, name: str, result: Any) -> None:
    """Check that a kept result has an image of ``size`` bytes and a number of steps.

    Raises:
        ValueError: If not.
    """
    try:
        content = b64decode(result["adversarial"], validate=True)
        fits = len(content) == size and type(result["steps"]) is int
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        msg = f"it has no image of {size:,} bytes and no steps"
        raise ValueError(msg)


def _names(pixels: "Tensor") -> list[str]:
    """Hash of each image's bytes."""
    import torch

    from adjointbackmap.exactness.verification import image_hash

    return [image_hash(image) for image in (255 * pixels).round().to(torch.uint8)]


def _show_and_write(
    found: "Attacked",
    subject: Subject,
    goal: int | None,
    job: dict[str, Any],
    out: Path,
    output: Output,
) -> None:
    """Show the first images, and write all of them, their numbers and some pictures."""
    from safetensors.torch import save

    images = _rows(found, goal)
    output.tables(console, _table(images, subject))
    tensors = {"pixels": found.pixels.contiguous(), "adversarial": found.adversarial.contiguous()}
    content = save(tensors)
    numbers = {**job, "images": images, OF_FILE: hashlib.sha256(content).hexdigest()}
    write(out / RESULTS_FILE, sealed_text(numbers))
    write(out / IMAGES_FILE, content)
    _draw(images[:PICTURES], found, subject, out)
    pictures = f"{min(len(images), PICTURES)} picture(s)"
    output.text(console, f"Written: {out / IMAGES_FILE}, {out / RESULTS_FILE} and {pictures}")


def _draw(rows: list[dict[str, Any]], found: "Attacked", subject: Subject, out: Path) -> None:
    """A picture of each of the first images: before, after, noise."""
    from adjointbackmap import plots

    for row, before, after in zip(rows, found.pixels, found.adversarial, strict=False):
        labels = _class(row["before"], subject), _class(row["after"], subject)
        name = row["image"][:SHORT_HASH]
        title = f"{subject.title}: image {name}, noise of l2 {row['l2']:.3g}"
        plots.save(plots.attacked(before, after, title, labels), out / f"{name}.png")


def _rows(found: "Attacked", goal: int | None) -> list[dict[str, Any]]:
    """The numbers of each image.

    An image is fooled if its class is the target, or without a target, if its class has changed.
    """
    fooled = found.after != found.before if goal is None else found.after == goal
    columns = {
        name: getattr(found, name).tolist() for name in ("before", "after", "l2", "linf", "inside")
    }
    columns["steps"] = [None] * len(fooled) if found.steps is None else found.steps.tolist()
    columns |= {"image": _names(found.pixels), "fooled": fooled.tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _table(images: list[dict[str, Any]], subject: Subject) -> Table:
    """The first images."""
    fooled = sum(row["fooled"] for row in images)
    outside = sum(not row["inside"] for row in images)
    shown = f"the first {ROWS_SHOWN} of {len(images)} images; " if len(images) > ROWS_SHOWN else ""
    table = Table(
        *("image", "before", "after", "l2", "linf", "steps", "fooled"),
        title=f"{subject.title}: {fooled} of {len(images)} images fooled",
        caption=f"{shown}{outside} outside [0, 1]",
    )
    for row in images[:ROWS_SHOWN]:
        classes = (_class(row[when], subject) for when in ("before", "after"))
        norms = (f"{row[norm]:.4g}" for norm in ("l2", "linf"))
        steps = "" if row["steps"] is None else str(row["steps"])
        table.add_row(
            row["image"][:SHORT_HASH], *classes, *norms, steps, "yes" if row["fooled"] else "no"
        )
    return table


def _class(number: int, subject: Subject) -> str:
    return subject.classes[number] if number < len(subject.classes) else str(number)
