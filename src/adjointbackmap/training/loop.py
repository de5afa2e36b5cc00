"""Training of the study's networks: one readable loop, resumable to the step.

Everything random follows from the seed and the number of the step. A killed run therefore continues
bit for bit from its last checkpoint. The test images choose nothing: the weights that are kept are
those of the epoch with the best accuracy on the 5,000 validation images.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap import data, models
from adjointbackmap.files import disk
from adjointbackmap.files.checked import OF_FILE, read_sealed, sealed_text, set_aside
from adjointbackmap.files.stopping import undivided
from adjointbackmap.files.weights import load_weights, read_torch, read_weights, torch_bytes
from adjointbackmap.machine import has_bfloat16, machine_in_words
from adjointbackmap.training.evaluation import accuracy
from adjointbackmap.training.objectives import Around, ball_of, objective_loss
from adjointbackmap.training.recipes import Recipe
from adjointbackmap.training.task import Progress, Setting, Task

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
CHECKPOINT_SECONDS = 60  # a killed run loses at most about this much time
MEASURED_STEPS = 3  # per setting, after one step that warms up
# Enough to tell the settings apart. A whole batch takes a minute on a busy machine, and nothing of
# it can be kept.
MEASURED_IMAGES = 32
NOTHING_KEPT = "stopped before the first step; nothing is kept"
ORDER, AUGMENTATION = 0, 1  # the two streams of random numbers of a seed
# A prime larger than any number of steps or epochs: no two streams share a seed.
NUMBERS_PER_STREAM = 10_000_019


@dataclass(frozen=True)
class _Data:
    """The images of a task on its device, and the map from pixels to the network's input."""

    pixels: Tensor
    labels: Tensor
    validation: data.Images
    test: data.Images
    prepare: nn.Module

    @classmethod
    def load(cls, task: Task, root: str | os.PathLike[str] | None, device: str) -> "_Data":
        """Read all three splits."""
        images, validation, test = (
            data.load(task.dataset, split, root) for split in ("train", "validation", "test")
        )
        prepare = models.preprocessing(task.network).to(device)
        pixels = images.pixels.to(device)
        return cls(pixels, images.labels.to(device), validation, test, prepare)


@dataclass
class _State:
    """What a checkpoint saves."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    setting: Setting
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per epoch
    best: dict[str, Any] = field(default_factory=dict)
    whole: bool = True  # False in the midst of a step, when the state must not be saved

    @property
    def validation(self) -> float | None:
        """The last validation accuracy."""
        rows = reversed(self.history)
        return next((row["validation"] for row in rows if row["validation"] is not None), None)


def train(
    task: Task,
    out: Path,
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train a network, or continue the run in ``out``, and write weights and card there.

    Args:
        task: Network, data set, seed and recipe.
        out: Folder for ``checkpoint.pt``, ``log.jsonl``, the training curves ``curves.png``,
            ``<name>.safetensors`` and ``<name>.json``. A stopped run has curves, too.
        root: Folder of the data, see :func:`adjointbackmap.data.load`.
        device: ``"cpu"`` or ``"cuda"``. Data and augmentation are on this device, too.
        report: Called after every step.

    Returns:
        The card, with data, recipe, seed, accuracies, time and machine.

    Raises:
        ValueError: If there is no such network, or ``out`` holds the checkpoint of another task, or
            weights without a checkpoint.
        FileNotFoundError: If the weights to start from do not exist.
        OSError: If another process trains in ``out``, or the disk is full. The last checkpoint is
            kept.
    """
    models.architecture(task.network)
    with disk.hold_folder(out):
        return _train(task, out, root, device, report)


def _train(
    task: Task,
    out: Path,
    root: str | os.PathLike[str] | None,
    device: str,
    report: Callable[[Progress], None],
) -> dict[str, Any]:
    """Train in a folder that no other process writes to.

    Raises:
        KeyboardInterrupt: As it came; before the first checkpoint it says that nothing is kept.
    """
    _check_free(task, out)
    images = _Data.load(task, root, device)
    try:
        state = _resume(task, out, device) or _begin(task, images, device)
    except KeyboardInterrupt as stop:
        stop.args = (NOTHING_KEPT,)
        raise
    if not state.step:
        _save(state, task, out)  # at once, so that the folder belongs to this run
    try:
        _run(state, task, out, images, report)
    finally:
        if state.whole:
            _save(state, task, out)
        draw_curves(out / LOG, f"Training of {task.network} on {task.dataset}")
    return _finish(state, task, out, images)


def _run(
    state: _State, task: Task, out: Path, images: _Data, report: Callable[[Progress], None]
) -> None:
    """Take all steps that are left, with a checkpoint about every minute."""
    steps_per_epoch = len(images.labels) // task.recipe.batch
    steps = task.recipe.epochs * steps_per_epoch
    saved = time.monotonic()
    while state.step < steps:
        started = time.monotonic()
        for order in _batches(task, state.step, len(images.labels)):
            with undivided():
                state.whole = False
                loss = _step(state, task, images, order, steps)
                state.seconds = state.seconds + time.monotonic() - started
                started = time.monotonic()
                if state.step % steps_per_epoch == 0:
                    _end_epoch(state, task.recipe, images, state.step // steps_per_epoch)
                state.whole = True
            report(Progress(state.step, steps, loss, state.validation))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(state, task, out)
                saved = time.monotonic()


def _check_free(task: Task, out: Path) -> None:
    """Check that the weights of this run will replace only weights of the same run.

    Raises:
        ValueError: If the folder holds weights without the checkpoint that they come from.
    """
    weights = out / f"{_title(task)}.safetensors"
    if weights.exists() and not (out / CHECKPOINT).exists():
        msg = (
            f"{out} must be empty or hold a run. "
            f"Got {weights.name} without its {CHECKPOINT}: name another folder."
        )
        raise ValueError(msg)


def _batches(task: Task, step: int, images: int) -> Iterator[Tensor]:
    """Positions of the images of each batch, for the rest of the epoch that ``step`` is in."""
    batch = task.recipe.batch
    epoch, done = divmod(step, images // batch)
    order = torch.randperm(images, generator=_generator(task.seed, ORDER, epoch))
    for i in range(done, images // batch):
        yield order[i * batch : (i + 1) * batch]


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """Random numbers of one epoch or step; they do not depend on earlier ones."""
    return torch.Generator().manual_seed((seed * 2 + stream) * NUMBERS_PER_STREAM + number)


def _step(state: _State, task: Task, images: _Data, order: Tensor, steps: int) -> float:
    """One step of gradient descent on the images at ``order``; returns its loss."""
    recipe = task.recipe
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.rate(state.step, steps)
    generator = _generator(task.seed, AUGMENTATION, state.step)
    x = images.prepare(recipe.augment(images.pixels[order], generator))
    around = Around(ball_of(images.prepare, recipe.radius, x), generator)
    loss = training_loss(state.model, x, images.labels[order], recipe, state.setting, around)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    state.step += 1
    state.losses.append(loss.item())
    return state.losses[-1]


def training_loss(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    recipe: Recipe,
    setting: Setting,
    around: Around,
) -> Tensor:
    """The recipe's objective on a batch, plus the L1 norm of the kernels if the recipe has it."""

    def scores(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=setting.layout)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.bfloat16):
            return model(images).float()

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)

    total = objective_loss(recipe.objective, recipe.strength, x, scores, loss, around)
    if recipe.l1:
        # Only kernels have more than one dimension.
        total = total + recipe.l1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
    return total


def _end_epoch(state: _State, recipe: Recipe, images: _Data, epoch: int) -> None:
    """Validate if it is due, add a row to the history, and keep the weights if they are best."""
    due = epoch % recipe.validate_every == 0 or epoch == recipe.epochs
    share = accuracy(state.model, images.validation, images.prepare) if due else None
    loss = sum(state.losses) / len(state.losses)
    seconds = round(state.seconds, 1)
    state.losses = []
    state.history.append(
        {"epoch": epoch, "step": state.step, "loss": loss, "validation": share, "seconds": seconds}
    )
    if share is not None and (not state.best or share > state.best["validation"]):
        weights = {k: v.detach().cpu().clone() for k, v in state.model.state_dict().items()}
        state.best = {"epoch": epoch, "validation": share, "weights": weights}


def _begin(task: Task, images: _Data, device: str) -> _State:
    """The state before the first step, with the fastest setting."""
    classes = len(data.SOURCES[task.dataset].classes)
    count = min(task.recipe.batch, MEASURED_IMAGES)
    pixels = images.pixels[:count]
    labels = images.labels[:count]
    setting = fastest_setting(task, classes, images.prepare, pixels, labels, device)
    state = _fresh(task, classes, setting, device)
    if task.start is not None:
        load_weights(state.model, _starting_weights(Path(task.start)), task.start)
    return state


def _starting_weights(path: Path) -> dict[str, Tensor]:
    """The weights of an earlier run.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        msg = (
            "The weights to start from must be a safetensors file of an earlier run. "
            f"Got {path}, which is none."
        )
        raise FileNotFoundError(msg)
    return read_weights(path)


def _fresh(task: Task, classes: int, setting: Setting, device: str) -> _State:
    """A model with the weights of the seed, and its optimizer."""
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(task.seed)
        model = models.build(task.network, classes)
    place: Any = {"device": device, "memory_format": setting.layout}
    model = model.train().to(**place)
    recipe = task.recipe
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.peak_rate,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    return _State(model, optimizer, setting)


def fastest_setting(
    task: Task, classes: int, prepare: nn.Module, pixels: Tensor, labels: Tensor, device: str
) -> Setting:
    """Time a few steps in each layout, in float32 and if the hardware has it in bfloat16.

    Args:
        task: What is trained.
        classes: Number of classes.
        prepare: Map from pixels in [0, 1] to the network's input.
        pixels: Bytes of some images.
        labels: Their labels.
        device: Where to train.
    """
    precisions = (False, True) if has_bfloat16(device) else (False,)
    settings = [Setting(layout, precision) for precision in precisions for layout in (True, False)]
    x = prepare(pixels.float() / 255)
    around = Around(ball_of(prepare, task.recipe.radius, x), torch.Generator())

    def seconds(setting: Setting) -> float:
        model = _fresh(task, classes, setting, device).model
        times = []
        for _ in range(1 + MEASURED_STEPS):
            started = time.perf_counter()
            training_loss(model, x, labels, task.recipe, setting, around).backward()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return min(settings, key=seconds)


def _save(state: _State, task: Task, out: Path) -> None:
    """Write checkpoint and log."""
    content = {
        "task": asdict(task),
        "setting": asdict(state.setting),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "losses": state.losses,
        "history": state.history,
        "best": state.best,
    }
    disk.write(out / CHECKPOINT, torch_bytes(content))
    disk.write(out / LOG, "".join(json.dumps(row) + "\n" for row in state.history))


def draw_curves(log: Path, title: str) -> None:
    """Draw loss and validation accuracy of a log next to it.

    Nothing is drawn if the log is empty, missing or damaged.

    Args:
        log: The file ``log.jsonl`` of a run.
        title: Heading of the figure.
    """
    from adjointbackmap import plots

    rows = []
    with suppress(ValueError):  # the next checkpoint writes a damaged log again
        rows = [json.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else []
    if rows:
        plots.save(plots.training_curves(rows, title), log.with_name("curves.png"))


def _resume(task: Task, out: Path, device: str) -> _State | None:
    """The state of the checkpoint; ``None`` if there is none, or it is damaged.

    Raises:
        ValueError: If the checkpoint is of another task.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        content = read_torch(path)
        # Checkpoints of older versions lack some fields of the recipe, which get their defaults.
        recipe = Recipe(**content["task"]["recipe"])
        begun = Task(**{**content["task"], "recipe": recipe})
        state = _restored(content, begun, device) if begun == task else None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        set_aside(path, error)  # training begins anew
        return None
    if state is None:
        msg = (
            f"{out} must be empty or hold a run of {asdict(task)}. "
            f"Got a run of {asdict(begun)}: name another folder."
        )
        raise ValueError(msg)
    return state


def _restored(content: dict[str, Any], task: Task, device: str) -> _State:
    """The state that a checkpoint holds."""
    classes = len(data.SOURCES[task.dataset].classes)
    state = _fresh(task, classes, Setting(**content["setting"]), device)
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    state.seconds = content["seconds"]
    state.history = content["history"]
    state.best = content["best"]
    state.losses = content.get("losses", [])  # checkpoints of older versions have none
    return state


def _finish(state: _State, task: Task, out: Path, images: _Data) -> dict[str, Any]:
    """Write the best weights and their card."""
    from safetensors.torch import save

    name = _title(task)
    weights = {k: v.contiguous() for k, v in state.best["weights"].items()}
    state.model.load_state_dict(weights)
    content = save(weights)
    card = {
        "name": name,
        "network": task.network,
        "dataset": task.dataset,
        "classes": len(images.test.classes),
        "training images": len(images.labels),
        "recipe": asdict(task.recipe),
        "seed": task.seed,
        "started from": _earlier(task),
        "kept epoch": state.best["epoch"],
        "validation accuracy": state.best["validation"],
        "test accuracy": accuracy(state.model, images.test, images.prepare),
        "training seconds": round(state.seconds),
        "setting": asdict(state.setting),
        "machine": machine_in_words(next(state.model.parameters()).device),
        OF_FILE: hashlib.sha256(content).hexdigest(),
    }
    disk.write(out / f"{name}.safetensors", content)
    disk.write(out / f"{name}.json", sealed_text(card, indent=2))
    return card


def _title(task: Task) -> str:
    """The name of the trained network."""
    return f"{models.architecture(task.network)}-{task.dataset}"


def _earlier(task: Task) -> dict[str, Any] | None:
    """The card of the run whose weights this one began from."""
    if task.start is None:
        return None
    card = Path(task.start).with_suffix(".json")
    return read_sealed(card, "delete it or train again") if card.is_file() else None
