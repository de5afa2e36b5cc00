"""The command attack."""

import hashlib
import json
from base64 import b64decode, b64encode
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.table import Table

from adjointbackmap.cli.frame import NO_SOURCE, app, console, progress, use_threads
from adjointbackmap.files.checked import OF_FILE, read_or_set_aside, sealed_text
from adjointbackmap.files.disk import hold_file, hold_folder, write
from adjointbackmap.sources import Source, Subject, find_image, find_images, load_subject

if TYPE_CHECKING:
    from torch import Tensor

    from adjointbackmap.attacks import Attack
    from adjointbackmap.examples import Attacked

RESULTS = "attack.json"
ROWS = 20  # images in the table
PICTURES = 4


@app.command
def attack(
    source: Source = NO_SOURCE,
    *,
    image: str = "horse",
    images: int | None = None,
    dataset: Literal["sample", "cifar10", "cifar100"] = "sample",
    data: Path | None = None,
    method: Literal["basic", "targeted", "least-likely"] = "basic",
    target: str | None = None,
    step: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    radius: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    iterations: int | None = None,
    until_success: bool | None = None,
    examples: Path | None = None,
    keep: Path | None = None,
    out: Path = Path("adjointbackmap-attack"),
    threads: int | None = None,
) -> None:
    """Attack images, away from the class that the network says or towards another, and measure the results again.

    What is left out is the study's: basic as in its experiment 1, the others as in experiment 2.

    Args:
        source: The network.
        image: Number of a sample image, a class for its first one, or a picture file.
        images: The first so many images of the data, in the place of one; the test images are in the order of their hashes.
        dataset: The data for --images: the sample of 200 that ships, or the test images of CIFAR.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        method: The basic iterative method; towards --target; or towards the class that is least likely for each image.
        target: Name or number of a class, for the method targeted; images that the network sees as it are left out.
        step: Length of a step in pixels in [0, 1]; one number, or one for each channel.
        radius: How far a pixel may move in all; one number, or one for each channel; as far as [0, 1] goes if left out.
        iterations: How many steps at most.
        until_success: Whether each image stops at its first success.
        examples: Measure the adversarial examples in this file, one for each image, and attack nothing.
        keep: File of finished images: those that it has are not attacked again.
        out: Folder for the images, attack.safetensors, their numbers, attack.json, and pictures of the first four.
        threads: Threads of the processor to use.

    Raises:
        ValueError: If --target is not a class, or is given without the method targeted or the other way round, or the
            network sees all images as it, or --out has results of another attack.
        OSError: If another process writes to --out or --keep, or the disk is full.
        KeyboardInterrupt: On Ctrl-C.
    """
    from adjointbackmap.attacks import study_attack
    from adjointbackmap.examples import examine, read_examples

    use_threads(threads)
    subject = load_subject(source)
    goal = _goal(method, target, subject.classes)
    pixels = (
        find_image(image, subject)[0][None]
        if images is None
        else find_images(images, dataset, data)
    )
    with hold_folder(out):
        if examples is not None:
            made = read_examples(examples)
            job = _job(
                subject,
                {
                    "examples": str(examples),
                    "sha256": hashlib.sha256(examples.read_bytes()).hexdigest(),
                },
            )
            _check_kept(out, job, pixels)
            found = examine(subject.module, pixels, made, subject.prepare)
        else:
            pixels = _others(subject, pixels, goal, target)
            named = {
                "step": tuple(step or ()) or None,
                "radius": tuple(radius or ()) or None,
                "iterations": iterations,
            }
            given: dict[str, Any] = {
                k: v for k, v in {**named, "until_success": until_success}.items() if v is not None
            }
            settings = replace(
                study_attack(1 if method == "basic" else 2, pixels, subject.prepare), **given
            )
            job = _job(subject, {"method": method, "target": goal, **asdict(settings)})
            _check_kept(out, job, pixels)
            try:
                found = _attacked(subject, pixels, method, goal, settings, job, keep)
            except KeyboardInterrupt as stop:
                if not keep:
                    stop.args = ("stopped; with --keep FILE, it goes on where it was",)
                raise
        _tell(found, subject, goal, job, out)


def _others(subject: Subject, pixels: "Tensor", goal: int | None, target: str | None) -> "Tensor":
    """The images that the network does not see as the target.

    Raises:
        ValueError: If there is none.
    """
    from adjointbackmap.examples import scores_of

    if goal is None:
        return pixels
    chosen = pixels[scores_of(subject.module, pixels, subject.prepare).argmax(1) != goal]
    if not len(chosen):
        msg = f"The network must see an image as another class than --target. Got {target} for all: choose another."
        raise ValueError(msg)
    return chosen


def _check_kept(out: Path, job: dict[str, Any], pixels: "Tensor") -> None:
    """Whether a folder has no results but those of the same attack, which this run has too.

    Raises:
        ValueError: If it has others.
    """
    from adjointbackmap.exactness.journal import differences

    path = out / RESULTS
    kept = read_or_set_aside(path, "network")
    if kept is None:
        return
    kept.pop(OF_FILE, None)
    try:
        missing = {row["image"] for row in kept.pop("images")} - set(_names(pixels))
    except (KeyError, TypeError):
        other = "without images"
    else:
        other = differences(kept, job) or (
            f"{len(missing)} images that this run lacks" if missing else ""
        )
    if other:
        msg = f"{path} must hold results of this job. Got those of another ({other}): name another folder with --out."
        raise ValueError(msg)


def _job(subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes the results, as JSON holds it."""
    made_by = {"network": subject.title, "weights sha256": subject.trace().weights_hash()}
    return json.loads(json.dumps(made_by | settings))


def _goal(method: str, target: str | None, classes: tuple[str, ...]) -> int | None:
    """Number of the target.

    Raises:
        ValueError: If there is none where one must be, one where none may be, or it is no class.
    """
    if (method == "targeted") != (target is not None):
        msg = f"--target must come with --method targeted, and that with --target. Got {method} and {target or 'no target'}."
        raise ValueError(msg)
    if target is None or target.isdigit():
        return None if target is None else int(target)
    if target not in classes:
        msg = f"--target must be the number of a class{', or ' if classes else ''}{', '.join(classes)}. Got {target!r}."
        raise ValueError(msg)
    return classes.index(target)


def _attacked(
    subject: Subject,
    pixels: "Tensor",
    method: str,
    goal: int | None,
    settings: "Attack",
    job: dict[str, Any],
    keep: Path | None,
) -> "Attacked":
    """Attack batch by batch; a batch whose images are kept is not attacked again."""
    import torch

    from adjointbackmap.exactness.journal import Record
    from adjointbackmap.examples import BATCH, examine

    names = _names(pixels)
    with hold_file(keep) if keep else nullcontext(), progress("attacking") as (bar, task):
        record = (
            Record(keep, job, partial(_fits, pixels[0].numel() * pixels.element_size()))
            if keep
            else None
        )
        results = dict(record.results()) if record else {}
        for first in range(0, len(pixels), BATCH):
            part = slice(first, first + BATCH)
            if not results.keys() >= set(names[part]):
                made = _attack(subject, pixels[part], method, goal, settings)
                for row, image in zip(_rows(made, goal), made.adversarial, strict=True):
                    name = row["image"]
                    content = b64encode(image.numpy().tobytes()).decode()
                    results[name] = {"adversarial": content, "steps": row["steps"]}
                    if record and name not in record.names:
                        record.append(name, results[name])
            bar.update(task, completed=min(1.0, (first + BATCH) / len(pixels)))
    numbers = bytearray(b"".join(b64decode(results[name]["adversarial"]) for name in names))
    adversarial = torch.frombuffer(numbers, dtype=pixels.dtype).view_as(pixels)
    steps = torch.tensor([results[name]["steps"] for name in names])
    return replace(
        examine(subject.module, pixels, adversarial, subject.prepare, settings.box), steps=steps
    )


def _fits(size: int, name: str, result: Any) -> None:
    """Whether a kept result has an image of so many bytes and a number of steps.

    Raises:
        ValueError: If not.
    """
    try:
        fits = (
            len(b64decode(result["adversarial"], validate=True)) == size
            and type(result["steps"]) is int
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        msg = f"it has no image of {size:,} bytes and no steps"
        raise ValueError(msg)


def _attack(
    subject: Subject, pixels: "Tensor", method: str, goal: int | None, settings: "Attack"
) -> "Attacked":
    """One batch."""
    import torch

    from adjointbackmap.attacks import basic_iterative, least_likely
    from adjointbackmap.examples import scores_of

    if method == "least-likely":
        return least_likely(subject.module, pixels, settings, subject.prepare)
    labels = scores_of(subject.module, pixels, subject.prepare).argmax(1)
    targets = None if goal is None else torch.full_like(labels, goal)
    return basic_iterative(subject.module, pixels, labels, settings, subject.prepare, targets)


def _names(pixels: "Tensor") -> list[str]:
    import torch

    from adjointbackmap.exactness.verification import image_hash

    return [image_hash(image) for image in (255 * pixels).round().to(torch.uint8)]


def _tell(
    found: "Attacked", subject: Subject, goal: int | None, job: dict[str, Any], out: Path
) -> None:
    """Show the first images, and write all of them, their numbers and some pictures."""
    from safetensors.torch import save

    from adjointbackmap import plots

    images = _rows(found, goal)
    console.print(_table(images, subject))
    tensors = {"pixels": found.pixels.contiguous(), "adversarial": found.adversarial.contiguous()}
    content = save(tensors)
    write(
        out / RESULTS,
        sealed_text({**job, "images": images, OF_FILE: hashlib.sha256(content).hexdigest()}),
    )
    write(out / "attack.safetensors", content)
    for row, before, after in list(zip(images, found.pixels, found.adversarial, strict=True))[
        :PICTURES
    ]:
        labels = _class(row["before"], subject), _class(row["after"], subject)
        title = f"{subject.title}: image {row['image'][:8]}, noise of l2 {row['l2']:.3g}"
        plots.save(plots.attacked(before, after, title, labels), out / f"{row['image'][:8]}.png")
    console.print(
        f"Written: {out / 'attack.safetensors'}, {out / RESULTS} and {min(len(images), PICTURES)} picture(s)"
    )


def _rows(found: "Attacked", goal: int | None) -> list[dict[str, Any]]:
    """The numbers of each image; it is fooled where its class is the target, or another than before."""
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
    shown = f"the first {ROWS} of {len(images)} images; " if len(images) > ROWS else ""
    table = Table(
        *("image", "before", "after", "l2", "linf", "steps", "fooled"),
        title=f"{subject.title}: {fooled} of {len(images)} images fooled",
        caption=f"{shown}{outside} outside [0, 1]",
    )
    for row in images[:ROWS]:
        classes = (_class(row[when], subject) for when in ("before", "after"))
        norms = (f"{row[norm]:.4g}" for norm in ("l2", "linf"))
        steps = "" if row["steps"] is None else str(row["steps"])
        table.add_row(row["image"][:8], *classes, *norms, steps, "yes" if row["fooled"] else "no")
    return table


def _class(number: int, subject: Subject) -> str:
    return subject.classes[number] if number < len(subject.classes) else str(number)
