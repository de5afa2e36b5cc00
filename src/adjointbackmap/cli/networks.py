"""Commands on trained networks: train, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from adjointbackmap.cli.frame import NO_SOURCE, app, console, progress, use_threads
from adjointbackmap.sources import Source, load_subject

if TYPE_CHECKING:
    from adjointbackmap.training import loop as training


@app.command
def train(
    network: str,
    dataset: Literal["cifar10", "cifar100"] = "cifar10",
    *,
    data: Path | None = None,
    out: Path | None = None,
    preset: Literal["own", "study"] = "own",
    epochs: int | None = None,
    batch: int | None = None,
    peak_rate: float | None = None,
    rise: float | None = None,
    interval: Annotated[list[tuple[float, int]] | None, Parameter(negative=())] = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    l1: float | None = None,
    label_smoothing: float | None = None,
    validate_every: int | None = None,
    augmentation: Literal["crop", "study"] | None = None,
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
        out: Folder of the run: checkpoint, log, its curves, weights, card; runs/NETWORK-DATASET-SEED if left out.
        preset: Where each of the options from --epochs to --augmentation comes from that is left out: our own recipe, whose
            numbers stand here, or that which the study published for the network and the data.
        epochs: Passes over the training images: 30.
        batch: Images in a step: 128.
        peak_rate: Largest learning rate: 0.2.
        rise: Share of the steps in which the rate rises, before it falls: 0.2.
        interval: Instead of rise and fall: a constant learning rate and its number of epochs; once for each.
        momentum: Nesterov's momentum, 0 for plain gradient descent: 0.9.
        weight_decay: Factor of the squared weights in the loss: 0.0005.
        l1: Factor of the kernels' absolute values in the loss: 0.
        label_smoothing: Share of the label that all classes have: 0.1.
        validate_every: Epochs from one validation to the next: 1.
        augmentation: Flip and crop from a padded image: crop; or the study's colours, resize and crop.
        start: Weights to begin from, the safetensors file of an earlier run.
        seed: Of initialisation, order and augmentation.
        device: Where to train.
        threads: Threads of the processor to use.
    """
    from adjointbackmap.training.loop import Task
    from adjointbackmap.training.loop import train as run
    from adjointbackmap.training.recipes import choose_recipe

    use_threads(threads)
    recipe = choose_recipe(
        network,
        dataset,
        preset,
        epochs=epochs,
        batch=batch,
        peak_rate=peak_rate,
        rise=rise,
        intervals=interval,
        momentum=momentum,
        weight_decay=weight_decay,
        l1=l1,
        label_smoothing=label_smoothing,
        validate_every=validate_every,
        augmentation=augmentation,
    )
    task = Task(network, dataset, seed, recipe, str(start) if start else None)
    folder = out or Path("runs") / f"{network}-{dataset}-{seed}"
    with progress(f"{network} on {dataset}") as (bar, job):

        def report(now: "training.Progress") -> None:
            known = "" if now.validation is None else f", validation {100 * now.validation:.1f} %"
            description = f"{network} on {dataset}: loss {now.loss:.3f}{known}"
            bar.update(job, completed=now.step / now.steps, description=description)

        card = run(task, folder, data, device, report)
    console.print(
        f"test accuracy {100 * card['test accuracy']:.2f} %, kept epoch {card['kept epoch']}; written to {folder}"
    )


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
    from adjointbackmap.training.loop import accuracy

    use_threads(threads)
    subject = load_subject(source)
    chosen = dataset or (
        "cifar100" if source.name and source.name.endswith("cifar100") else "cifar10"
    )
    images = sets.sample() if chosen == "sample" else sets.load(chosen, split, data)
    share = accuracy(subject.module, images, subject.prepare)
    which = "the sample" if chosen == "sample" else f"{chosen} {split}"
    console.print(f"{subject.title}: {100 * share:.2f} % of {len(images):,} images ({which})")
