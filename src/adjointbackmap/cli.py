"""The command line: each command is a function of its own; torch is imported when a command runs."""

import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adjointbackmap import training
    from adjointbackmap.hyperplane import Hyperplanes
    from adjointbackmap.network import Network
    from adjointbackmap.verification import LayerCheck

app = App(
    name="adjointbackmap",
    help="Exact effective hyperplanes of any unit of any layer of a piecewise-affine network.",
    error_console=Console(stderr=True, soft_wrap=True),
    error_formatter=lambda error: Text(f"adjointbackmap: {' '.join(str(error).split())}"),
)
console = Console()
DEMO_NETWORK = "vgg7-cifar10"
STUDY_SCALE = 1 / 8


@Parameter(name="*")
@dataclass(frozen=True)
class Source:
    """Which network: a shipped name, or a function that builds one.

    Attributes:
        name: A shipped network, such as vgg7-cifar10.
        model: module:function that returns a module in place of a shipped name.
        weights: Weights for --model, a safetensors file or one that torch.load reads with weights_only.
        shape: Shape of one input of --model.
        fold: Merge batch norm and multipliers into the kernels first.
    """

    name: str | None = None
    _: KW_ONLY
    model: str | None = None
    weights: Path | None = None
    shape: tuple[int, int, int] = (3, 32, 32)
    fold: bool = False


NO_SOURCE = Source()


@dataclass(frozen=True)
class Subject:
    """A network that is ready: the module, the map from pixels to its input, its classes, its title."""

    module: "nn.Module"
    prepare: "nn.Module"
    classes: tuple[str, ...]
    title: str
    shape: tuple[int, ...]

    def trace(self) -> "Network":
        """Trace the module at its shape."""
        import torch

        from adjointbackmap.tracing import trace

        return trace(self.module, torch.zeros(1, *self.shape))


@app.command
def demo(*, image: str = "ship", out: Path = Path("adjointbackmap-demo"), threads: int | None = None) -> None:
    """Show one image of the sample: prediction, hyperplanes of every class, every unit of every layer verified.

    Args:
        image: Number of a sample image, 0 to 199, or a class for its first one.
        out: Folder for the picture.
        threads: Threads of the processor to use.
    """
    from adjointbackmap import plots
    from adjointbackmap.hyperplane import hyperplanes

    started = time.monotonic()
    _use_threads(threads)
    subject = _subject(Source(DEMO_NETWORK, fold=True))
    pixels, described = _image(image, subject)
    x = subject.prepare(pixels)
    network = subject.trace()
    planes = hyperplanes(network, x, "fc", "RM0", scale=STUDY_SCALE)
    best = subject.classes[int(planes.value[0].argmax())]
    console.print(f"[bold]{subject.title}[/bold] sees {described}: it says [bold]{best}[/bold].")
    console.print("Every output is an inner product of the image and the network's biases with a hyperplane, computed here:\n")
    console.print(_class_table(planes, subject.classes))
    console.print(_unit_table(network, x))
    console.print(_check_table(_verified(network, x, STUDY_SCALE, "float32")))
    figure = plots.class_hyperplanes(planes, subject.classes, pixels, f"{subject.title}: {described}, seen as {best}")
    console.print(f"Picture: [bold]{plots.save(figure, out / 'hyperplanes.png')}[/bold]")
    console.print(f"{time.monotonic() - started:.0f} s in all. Next: adjointbackmap layers {DEMO_NETWORK}")


@app.command
def layers(source: Source = NO_SOURCE) -> None:
    """List the layers of a network: kind, output shape, receptive field, modes and number of hyperplanes."""
    from adjointbackmap.units import unit_dims

    subject = _subject(source)
    network = subject.trace()
    table = Table("layer", "kind", "output", "field", "modes", "hyperplanes", title=subject.title)
    for layer in network.layers.values():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        units = prod(unit_dims(layer, mode).values())
        shape, field = ("x".join(map(str, extents)) for extents in (layer.out_shape, layer.receptive_field))
        modes = layer.modes[0] if len(layer.modes) == 1 else f"{layer.modes[0]} to {layer.modes[-1]}"
        table.add_row(layer.name, layer.kind, shape, field, modes, f"{units:,} in {mode}")
    console.print(table)
    console.print(f"{len(network.biases)} biases in {len(network.biases.names)} parts: {', '.join(network.biases.names)}")


@app.command(name="map")
def map_units(
    source: Source = NO_SOURCE,
    *,
    layer: str,
    mode: Literal["RM4", "RM3", "RM2", "RM1", "RM0"],
    units: str | None = None,
    image: str = "0",
    own_bias: bool | None = None,
    scale: float = 1.0,
    dtype: Literal["float32", "float64"] | None = None,
    memory: str = "2GiB",
    out: Path = Path("hyperplanes"),
) -> None:
    """Compute the hyperplanes of chosen units and write them to a file and a picture.

    Args:
        source: The network.
        layer: Name of the layer, see the command layers.
        mode: Reconstruction mode.
        units: Parts over the mode's unit dimensions, separated by commas: an int, a slice such as 2:5 or : for all;
            or predicted, for RM0. All units if left out.
        image: Number of a sample image, a class for its first one, or a picture file.
        own_bias: Whether the layer's own bias belongs to the units.
        scale: The factor k of the activation pattern.
        dtype: float64 for more than the model's own precision.
        memory: Largest size of the result.
        out: Name of the files without their ending.
    """
    import torch

    from adjointbackmap import plots
    from adjointbackmap.hyperplane import hyperplanes
    from adjointbackmap.store import write_npz

    subject = _subject(source)
    pixels, described = _image(image, subject)
    with console.status("computing hyperplanes"):
        planes = hyperplanes(
            subject.trace(),
            subject.prepare(pixels),
            layer,
            mode,
            units=_units(units),
            own_bias=own_bias,
            scale=scale,
            dtype=getattr(torch, dtype) if dtype else None,
            memory=memory,
        )
    error = planes.relative_error().abs()
    shape = " x ".join(map(str, planes.image.shape))
    console.print(f"{planes.value.numel():,} hyperplanes of {layer} ({mode}), image part {shape}, for {described}")
    console.print(
        f"largest |relative error| {float(error.max()):.2e}, share <= 1 %: {100 * float((error <= 0.01).float().mean()):.4f} %"
    )
    figure = plots.unit_hyperplanes(planes, f"{subject.title}, {layer}, {mode}, {described}")
    archive = write_npz(planes, out.with_name(out.name + ".npz"))
    picture = plots.save(figure, out.with_name(out.name + ".png"))
    console.print(f"Written: {archive} and {picture}")


@app.command
def verify(
    source: Source = NO_SOURCE,
    *,
    image: str = "0",
    images: int | None = None,
    layer: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    own_bias: bool = False,
    scale: float = STUDY_SCALE,
    dtype: Literal["float32", "float64"] = "float32",
    threads: int | None = None,
) -> None:
    """Hold every unit of every layer against its explicit hyperplane.

    Args:
        source: The network.
        image: Number of a sample image, a class for its first one, or a picture file.
        images: The first so many images of the sample, in the place of one.
        layer: Only these layers.
        own_bias: Whether a layer's own bias belongs to its units.
        scale: The factor k of the activation pattern.
        dtype: float64 for more than the model's own precision.
        threads: Threads of the processor to use.

    Raises:
        ValueError: If there are not so many images.
        RuntimeError: If a unit is off in float64.
    """
    import torch

    from adjointbackmap import data

    _use_threads(threads)
    subject = _subject(source)
    if images is None:
        pixels = _image(image, subject)[0][None]
    else:
        if not 0 < images <= len(data.sample()):
            msg = f"--images must be from 1 to {len(data.sample())}. Got {images}."
            raise ValueError(msg)
        pixels = data.sample()[:images].unit_interval()
    x = subject.prepare(pixels).to(getattr(torch, dtype))
    checks = _verified(subject.trace(), x, scale, dtype, layer, own_bias)
    console.print(_check_table(checks))
    if any(check.share < 1 for check in checks.values()) and dtype == "float64":
        msg = "Every unit must be within 1 % in float64. Got some that are not: see the table."
        raise RuntimeError(msg)


@app.command
def train(
    network: str,
    dataset: Literal["cifar10", "cifar100"] = "cifar10",
    *,
    data: Path | None = None,
    out: Path | None = None,
    epochs: int = 30,
    batch: int = 128,
    peak_rate: float = 0.2,
    rise: float = 0.2,
    weight_decay: float = 5e-4,
    start: Path | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> None:
    """Train a network of the study; stop it at any time and start it again to go on where it was.

    Args:
        network: vgg7-nobias, fixup-resnet20-nobias, vgg7, resnet20 or fixup-resnet20.
        dataset: The data.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        out: Folder of the run: checkpoint, log, weights and card; runs/<network>-<dataset>-<seed> if left out.
        epochs: Passes over the training images.
        batch: Images in a step.
        peak_rate: Largest learning rate.
        rise: Share of the steps in which the rate rises.
        weight_decay: Factor of the squared weights in the loss.
        start: Weights to begin from, the safetensors file of an earlier run.
        seed: Of initialisation, order and augmentation.
        device: Where to train.
        threads: Threads of the processor to use.
    """
    from adjointbackmap.training import Recipe, Task
    from adjointbackmap.training import train as run

    _use_threads(threads)
    recipe = Recipe(epochs=epochs, batch=batch, peak_rate=peak_rate, rise=rise, weight_decay=weight_decay)
    task = Task(network, dataset, seed, recipe, str(start) if start else None)
    folder = out or Path("runs") / f"{network}-{dataset}-{seed}"
    with _progress(f"{network} on {dataset}") as (bar, job):

        def report(progress: "training.Progress") -> None:
            known = "" if progress.validation is None else f", validation {100 * progress.validation:.1f} %"
            description = f"{network} on {dataset}: loss {progress.loss:.3f}{known}"
            bar.update(job, completed=progress.step / progress.steps, description=description)

        card = run(task, folder, data, device, report)
    console.print(f"test accuracy {100 * card['test accuracy']:.2f} %, kept epoch {card['kept epoch']}; written to {folder}")


@app.command
def evaluate(
    source: Source = NO_SOURCE,
    *,
    dataset: Literal["cifar10", "cifar100", "sample"] | None = None,
    split: Literal["test", "validation", "train"] = "test",
    data: Path | None = None,
    threads: int | None = None,
) -> None:
    """Accuracy of a network on a data set, recomputed from its weights.

    Args:
        source: The network.
        dataset: The data; that of a shipped name if left out. sample is the 200 images that ship with the package.
        split: Which images.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        threads: Threads of the processor to use.
    """
    from adjointbackmap import data as sets
    from adjointbackmap.training import accuracy

    _use_threads(threads)
    subject = _subject(source)
    chosen = dataset or ("cifar100" if source.name and source.name.endswith("cifar100") else "cifar10")
    images = sets.sample() if chosen == "sample" else sets.load(chosen, split, data)
    share = accuracy(subject.module, images, subject.prepare)
    which = "the sample" if chosen == "sample" else f"{chosen} {split}"
    console.print(f"{subject.title}: {100 * share:.2f} % of {len(images):,} images ({which})")


def main() -> None:
    """Run the command line: bad input is one line and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]adjointbackmap:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; finished work is kept")
        sys.exit(130)


def _use_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        msg = f"--threads must be at least 1. Got {threads}."
        raise ValueError(msg)
    import torch

    torch.set_num_threads(threads)


def _subject(source: Source) -> Subject:
    """Load the network that the options name.

    Raises:
        ValueError: If they name none, or two.
    """
    import torch
    from torch import nn

    from adjointbackmap import data, models
    from adjointbackmap.folding import fold

    if source.model is not None and source.name is None:
        subject = Subject(_built(source.model, source.weights), nn.Identity(), (), source.model, source.shape)
    elif source.name is not None and source.model is None:
        classes = data.SOURCES[models.card(source.name)["dataset"]].classes
        subject = Subject(models.load(source.name), models.preprocessing(source.name), classes, source.name, (3, 32, 32))
    else:
        given = "neither" if source.model is None else "both"
        msg = f"Name a shipped network ({', '.join(models.names())}) or give --model module:function. Got {given}."
        raise ValueError(msg)
    if not source.fold:
        return subject
    folded = fold(subject.module, torch.zeros(1, *subject.shape)).model
    return replace(subject, module=folded, title=f"{subject.title} (folded)")


def _built(model: str, weights: Path | None) -> "nn.Module":
    import torch

    path, _, function = model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        built = getattr(importlib.import_module(path), function)()
    except (ImportError, AttributeError) as error:
        msg = f"--model must be module:function, importable from here. Got {model!r}: {error}."
        raise ValueError(msg) from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, torch.nn.Module):
        msg = f"--model must name a function that returns a torch.nn.Module. Got {type(built).__name__}."
        raise TypeError(msg)
    if weights is not None:
        built.load_state_dict(_state(weights))
    return built.eval()


def _state(weights: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    if not weights.is_file():
        msg = f"--weights must be a file. Got {weights}, which is none."
        raise FileNotFoundError(msg)
    return load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, map_location="cpu", weights_only=True)


def _image(image: str, subject: Subject) -> tuple["Tensor", str]:
    """Pixels in [0, 1] and how to speak of them: a sample image by number or class, or a picture file.

    Raises:
        ValueError: If there is no such image.
    """
    from adjointbackmap import data

    sample = data.sample()
    if image in sample.classes:
        image = str(int((sample.labels == sample.classes.index(image)).nonzero()[0]))
    if image.isdigit() and subject.shape == (3, 32, 32):
        if int(image) >= len(sample):
            msg = f"--image must be from 0 to {len(sample) - 1}, a class, or a picture file. Got {image}."
            raise ValueError(msg)
        chosen = sample[[int(image)]]
        name = sample.classes[int(chosen.labels)]
        return chosen.unit_interval()[0], f"sample image {image} ({name}, {chosen.hashes[0][:8]})"
    return _picture(Path(image), subject.shape), Path(image).name


def _picture(path: Path, shape: tuple[int, ...]) -> "Tensor":
    """A picture file as pixels in [0, 1] of the network's shape; it is not resized.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another shape.
    """
    import torch
    from matplotlib.image import imread

    if not path.is_file():
        size = f"{shape[2]} x {shape[1]} pixels"
        msg = f"--image must be the number or class of a sample image, or a picture file of {size}. Got {path}."
        raise FileNotFoundError(msg)
    pixels = torch.as_tensor(imread(path).copy())
    pixels = pixels.float() / 255 if not pixels.is_floating_point() else pixels
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)[: shape[0]]
    if tuple(pixels.shape) != shape:
        msg = f"The picture must have shape {shape}. Got {tuple(pixels.shape)} in {path}: resize it first."
        raise ValueError(msg)
    return pixels


def _units(text: str | None) -> Any:
    """Units as typed: ``3,:,0`` is the tuple that NumPy indexing would take.

    Raises:
        ValueError: If a part is neither an int nor a slice.
    """
    if text is None or text == "predicted":
        return text
    try:
        return tuple(_unit_part(part.strip()) for part in text.split(","))
    except ValueError:
        msg = f"--units must be ints and slices separated by commas, such as 3,:,0:8, or predicted. Got {text!r}."
        raise ValueError(msg) from None


def _unit_part(part: str) -> int | slice:
    if ":" not in part:
        return int(part)
    return slice(*(int(bound) if bound else None for bound in part.split(":")))


@contextmanager
def _progress(description: str) -> Iterator[tuple[Progress, Any]]:
    with Progress(console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=1.0)


def _verified(
    network: "Network",
    x: "Tensor",
    scale: float,
    dtype: str,
    layers: list[str] | None = None,
    own_bias: bool = False,
) -> dict[str, "LayerCheck"]:
    import torch

    from adjointbackmap.verification import verify as run

    with _progress("verifying every unit") as (bar, job):
        return run(network, x, layers, own_bias, scale, getattr(torch, dtype), lambda share: bar.update(job, completed=share))


def _class_table(planes: "Hyperplanes", classes: tuple[str, ...]) -> Table:
    table = Table("class", "network's output", "reconstruction", "relative error", title="RM0: every class")
    rows = zip(classes, planes.value[0], planes.reconstruct()[0], planes.relative_error()[0], strict=True)
    for name, value, rebuilt, error in rows:
        style = "bold" if value == planes.value[0].max() else None
        table.add_row(name, f"{float(value):.6f}", f"{float(rebuilt):.6f}", f"{float(error):+.1e}", style=style)
    return table


def _unit_table(network: "Network", x: "Tensor") -> Table:
    """One unit of every layer: the middle of the first out-channel's map."""
    from adjointbackmap.hyperplane import hyperplanes

    table = Table("layer", "unit", "network's value", "reconstruction", "relative error", title="One unit of every layer")
    for layer in network.distinct_layers():
        mode = next(m for m in ("RM2", "RM0") if m in layer.modes)
        middle = tuple(extent // 2 for extent in layer.out_shape[1:]) if mode == "RM2" else ()
        planes = hyperplanes(network, x, layer.name, mode, (*middle, 0), scale=STUDY_SCALE)
        value, rebuilt, error = (float(t) for t in (planes.value, planes.reconstruct(), planes.relative_error()))
        table.add_row(layer.name, f"{mode} {(*middle, 0)}", f"{value:.6f}", f"{rebuilt:.6f}", f"{error:+.1e}")
    return table


def _check_table(checks: dict[str, "LayerCheck"]) -> Table:
    total = sum(check.units for check in checks.values())
    table = Table(
        *("layer", "units", "|e| <= 1 %", "e <= 1 %", "largest |e|", "scaled", "zero"),
        title=f"Every unit of every layer: {total:,} hyperplanes",
        caption="e: relative error; shares in %; scaled: largest error over the sum of |x h| and |b h|; zero: units that are 0",
    )
    for check in checks.values():
        table.add_row(
            check.layer,
            f"{check.units:,}",
            f"{100 * check.share:.4f}",
            f"{100 * check.within_signed / check.units:.4f}",
            f"{check.largest:.1e}",
            f"{check.scaled:.1e}",
            f"{100 * check.zero / check.units:.1f}",
        )
    return table
