"""Training of the study's networks: one readable loop, resumable to the step.

Everything random follows from the seed and the number of the step, so that a killed run continues
bit for bit from its last checkpoint. The test images choose nothing: the weights kept are those of
the epoch with the best accuracy on the 5,000 validation images.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap import data, models
from adjointbackmap.capture.precision import exact
from adjointbackmap.files import disk
from adjointbackmap.files.checked import OF_FILE, read_sealed, sealed_text, set_aside
from adjointbackmap.files.stopping import undivided
from adjointbackmap.files.weights import load_weights, read_torch, read_weights, torch_bytes
from adjointbackmap.training.recipes import Recipe

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 60
MEASURED_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """How a step is computed: memory layout and the precision of the autocast."""

    channels_last: bool
    bfloat16: bool

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of images and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Task:
    """What is trained: a checkpoint continues only the task that began it."""

    network: str
    dataset: str
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    start: str | None = None  # weights to begin from, the safetensors file of an earlier run


@dataclass(frozen=True)
class Progress:
    """Told after every step: finished and total steps, the loss of the step, the last validation accuracy."""

    step: int
    steps: int
    loss: float
    validation: float | None


@dataclass
class _State:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    setting: Setting
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    history: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)
    whole: bool = True  # not in the midst of a step, so that it may be saved

    @property
    def validation(self) -> float | None:
        """The last validation accuracy."""
        return next(
            (row["validation"] for row in reversed(self.history) if row["validation"] is not None),
            None,
        )


def train(
    task: Task,
    out: Path,
    root: str | os.PathLike | None = None,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict:
    """Train a network, or continue the run that ``out`` holds, and write weights and card there.

    Args:
        task: Network, data set, seed and recipe.
        out: Folder for ``checkpoint.pt``, ``log.jsonl``, its picture ``curves.png``, which a stopped run has too,
            ``<name>.safetensors`` and ``<name>.json``.
        root: Folder of the data, see :func:`adjointbackmap.data.load`.
        device: ``"cpu"`` or ``"cuda"``; data and augmentation live there too.
        report: Called after every step.

    Returns:
        The card, with data, recipe, seed, accuracies, time and machine.

    Raises:
        ValueError: If there is no such network, or ``out`` holds the checkpoint of another task, or weights without one.
        FileNotFoundError: If the weights to start from are not there.
        OSError: If another process trains in ``out``, or the disk is full: the last checkpoint stays.
    """
    models.architecture(task.network)
    with disk.hold_folder(out):
        return _train(task, out, root, device, report)


def _train(
    task: Task,
    out: Path,
    root: str | os.PathLike | None,
    device: str,
    report: Callable[[Progress], None],
) -> dict:
    """Train in a folder that no other process writes to."""
    _check_free(task, out)
    images, validation, test = (
        data.load(task.dataset, split, root) for split in ("train", "validation", "test")
    )
    prepare = models.preprocessing(task.network).to(device)
    pixels = images.pixels.to(device)
    labels = images.labels.to(device)
    state = _resume(task, out, device) or _begin(task, pixels, labels, prepare, device)
    steps_per_epoch = len(labels) // task.recipe.batch
    steps = task.recipe.epochs * steps_per_epoch
    if not state.step:
        _save(state, task, out)  # at once, so that the folder is this run's
    saved = time.monotonic()
    try:
        while state.step < steps:
            started = time.monotonic()
            for order in _batches(task, state.step, len(labels)):
                with undivided():
                    state.whole = False
                    loss = _step(state, task, prepare, pixels[order], labels[order], steps)
                    state.seconds = state.seconds + time.monotonic() - started
                    started = time.monotonic()
                    if state.step % steps_per_epoch == 0:
                        _end_epoch(
                            state, task.recipe, validation, prepare, state.step // steps_per_epoch
                        )
                    state.whole = True
                report(Progress(state.step, steps, loss, state.validation))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    _save(state, task, out)
                    saved = time.monotonic()
    finally:
        if state.whole:
            _save(state, task, out)
        _draw(out / "log.jsonl", f"Training of {task.network} on {task.dataset}")
    return _finish(state, task, out, prepare, len(images), test)


def _check_free(task: Task, out: Path) -> None:
    """Whether the weights that a run ends with would replace nothing but those of the same run.

    Raises:
        ValueError: If the folder holds weights without the checkpoint that they come from.
    """
    weights = out / f"{_title(task)}.safetensors"
    if weights.exists() and not (out / CHECKPOINT).exists():
        msg = f"{out} must be empty or hold a run. Got {weights.name} without its checkpoint.pt: name another folder."
        raise ValueError(msg)


def accuracy(model: nn.Module, images: data.Images, prepare: nn.Module, batch: int = 500) -> float:
    """Share of images whose largest output is their label (float32, eval mode; the mode is put back).

    Args:
        model: Network of class scores.
        images: Images with labels.
        prepare: Map from pixels in [0, 1] to the network's input.
        batch: Images computed at once.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        right = 0
        with exact(device):
            for start in range(0, len(images), batch):
                part = images[start : start + batch]
                x = prepare(part.unit_interval().to(device)).contiguous(
                    memory_format=torch.channels_last
                )
                right += int((model(x).argmax(1).cpu() == part.labels).sum())
    finally:
        model.train(was_training)
    return right / len(images)


def _batches(task: Task, step: int, images: int) -> Iterator[Tensor]:
    """The rest of the epoch that ``step`` is in: positions of the images of each batch."""
    epoch, done = divmod(step, images // task.recipe.batch)
    order = torch.randperm(images, generator=_generator(task.seed, 0, epoch))
    for i in range(done, images // task.recipe.batch):
        yield order[i * task.recipe.batch : (i + 1) * task.recipe.batch]


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + stream) * 10_000_019 + number)


def _step(
    state: _State, task: Task, prepare: nn.Module, pixels: Tensor, labels: Tensor, steps: int
) -> float:
    recipe = task.recipe
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.rate(state.step, steps)
    x = prepare(recipe.augment(pixels, _generator(task.seed, 1, state.step)))
    loss = _loss(state.model, x, labels, recipe, state.setting)
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    state.step += 1
    state.losses.append(loss.item())
    return state.losses[-1]


def _loss(model: nn.Module, x: Tensor, labels: Tensor, recipe: Recipe, setting: Setting) -> Tensor:
    x = x.contiguous(memory_format=setting.layout)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.bfloat16):
        scores = model(x)
    loss = F.cross_entropy(scores.float(), labels, label_smoothing=recipe.label_smoothing)
    if recipe.l1:
        loss = loss + recipe.l1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
    return loss


def _end_epoch(
    state: _State, recipe: Recipe, validation: data.Images, prepare: nn.Module, epoch: int
) -> None:
    due = epoch % recipe.validate_every == 0 or epoch == recipe.epochs
    share = accuracy(state.model, validation, prepare) if due else None
    loss = sum(state.losses) / len(state.losses)
    seconds = round(state.seconds, 1)
    state.losses = []
    state.history.append(
        {"epoch": epoch, "step": state.step, "loss": loss, "validation": share, "seconds": seconds}
    )
    if share is not None and (not state.best or share > state.best["validation"]):
        weights = {k: v.detach().cpu().clone() for k, v in state.model.state_dict().items()}
        state.best = {"epoch": epoch, "validation": share, "weights": weights}


def _begin(task: Task, pixels: Tensor, labels: Tensor, prepare: nn.Module, device: str) -> _State:
    classes = len(data.SOURCES[task.dataset].classes)
    setting = _fastest_setting(
        task, classes, prepare, pixels[: task.recipe.batch], labels[: task.recipe.batch], device
    )
    state = _fresh(task, classes, setting, device)
    if task.start is not None:
        load_weights(state.model, _starting_weights(Path(task.start)), task.start)
    return state


def _starting_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"The weights to start from must be a safetensors file of an earlier run. Got {path}, which is none."
        raise FileNotFoundError(msg)
    return read_weights(path)


def _fresh(task: Task, classes: int, setting: Setting, device: str) -> _State:
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        model = models.build(task.network, classes)
    model = model.train().to(device=device, memory_format=setting.layout)  # type: ignore[call-overload]
    recipe = task.recipe
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.peak_rate,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    return _State(model, optimizer, setting)


def _fastest_setting(
    task: Task, classes: int, prepare: nn.Module, pixels: Tensor, labels: Tensor, device: str
) -> Setting:
    """Time a few steps in each layout and, where the processor has the instructions, in bfloat16."""
    precisions = (False, True) if _has_bfloat16(device) else (False,)
    settings = [Setting(layout, precision) for precision in precisions for layout in (True, False)]
    x = prepare(pixels.float() / 255)

    def seconds(setting: Setting) -> float:
        model = _fresh(task, classes, setting, device).model
        times = []
        for _ in range(1 + MEASURED_STEPS):
            started = time.perf_counter()
            _loss(model, x, labels, task.recipe, setting).backward()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return min(settings, key=seconds)


def _has_bfloat16(device: str) -> bool:
    """Whether the processor multiplies bfloat16 numbers in hardware; emulation is slower than float32."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _save(state: _State, task: Task, out: Path) -> None:
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
    disk.write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.history))


def _draw(log: Path, title: str) -> None:
    from adjointbackmap import plots

    rows = []
    with suppress(ValueError):  # a damaged log has no picture: the next checkpoint writes it again
        rows = [json.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else []
    if rows:
        plots.save(plots.training_curves(rows, title), log.with_name("curves.png"))


def _resume(task: Task, out: Path, device: str) -> _State | None:
    if not (out / CHECKPOINT).exists():
        return None
    try:
        content = read_torch(out / CHECKPOINT)
        begun = Task(
            **{**content["task"], "recipe": Recipe(**content["task"]["recipe"])}
        )  # new fields have their defaults
        state = _restored(content, begun, device) if begun == task else None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        set_aside(out / CHECKPOINT, error)  # training begins anew
        return None
    if state is None:
        msg = f"{out} must be empty or hold a run of {asdict(task)}. Got a run of {asdict(begun)}: name another folder."
        raise ValueError(msg)
    return state


def _restored(content: dict, task: Task, device: str) -> _State:
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


def _finish(
    state: _State,
    task: Task,
    out: Path,
    prepare: nn.Module,
    training_images: int,
    test: data.Images,
) -> dict:
    from safetensors.torch import save

    name = _title(task)
    weights = {k: v.contiguous() for k, v in state.best["weights"].items()}
    state.model.load_state_dict(weights)
    content = save(weights)
    card = {
        "name": name,
        "network": task.network,
        "dataset": task.dataset,
        "classes": len(test.classes),
        "training images": training_images,
        "recipe": asdict(task.recipe),
        "seed": task.seed,
        "started from": _earlier(task),
        "kept epoch": state.best["epoch"],
        "validation accuracy": state.best["validation"],
        "test accuracy": accuracy(state.model, test, prepare),
        "training seconds": round(state.seconds),
        "setting": asdict(state.setting),
        "machine": _machine(next(state.model.parameters()).device),
        OF_FILE: hashlib.sha256(content).hexdigest(),
    }
    disk.write(out / f"{name}.safetensors", content)
    disk.write(out / f"{name}.json", sealed_text(card, indent=2))
    return card


def _title(task: Task) -> str:
    """The name of the trained network."""
    return f"{models.architecture(task.network)}-{task.dataset}"


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{platform.machine()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _earlier(task: Task) -> dict | None:
    """The card of the run whose weights this one began from."""
    if task.start is None:
        return None
    card = Path(task.start).with_suffix(".json")
    return read_sealed(card, "delete it or train again") if card.is_file() else None
