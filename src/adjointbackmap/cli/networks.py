"""Commands on trained networks: train, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adjointbackmap.cli.frame import NO_SOURCE, app, console, progress, use_threads
from adjointbackmap.subjects import Source, load_subject

if TYPE_CHECKING:
    from adjointbackmap import training


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

    use_threads(threads)
    recipe = Recipe(epochs=epochs, batch=batch, peak_rate=peak_rate, rise=rise, weight_decay=weight_decay)
    task = Task(network, dataset, seed, recipe, str(start) if start else None)
    folder = out or Path("runs") / f"{network}-{dataset}-{seed}"
    with progress(f"{network} on {dataset}") as (bar, job):

        def report(now: "training.Progress") -> None:
            known = "" if now.validation is None else f", validation {100 * now.validation:.1f} %"
            description = f"{network} on {dataset}: loss {now.loss:.3f}{known}"
            bar.update(job, completed=now.step / now.steps, description=description)

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

    use_threads(threads)
    subject = load_subject(source)
    chosen = dataset or ("cifar100" if source.name and source.name.endswith("cifar100") else "cifar10")
    images = sets.sample() if chosen == "sample" else sets.load(chosen, split, data)
    share = accuracy(subject.module, images, subject.prepare)
    which = "the sample" if chosen == "sample" else f"{chosen} {split}"
    console.print(f"{subject.title}: {100 * share:.2f} % of {len(images):,} images ({which})")
