"""Commands on trained networks: train, evaluate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from adjointbackmap.cli.frame import (
    NO_NETWORK,
    app,
    check_device,
    console,
    help_examples,
    progress,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import CIFAR_SHAPE, NetworkOptions, load_subject

if TYPE_CHECKING:
    from adjointbackmap.sources import Subject
    from adjointbackmap.training.recipes import Recipe
    from adjointbackmap.training.sentences import SentenceRecipe
    from adjointbackmap.training.task import Progress


@Parameter(name="*")
@dataclass(frozen=True)
class RecipeOptions:
    """Changes to the recipe of --preset. The numbers here are those of the own recipe.

    Attributes:
        epochs: Passes over the training images. Own recipe: 30.
        batch: Images per step. Own recipe: 128.
        peak_rate: Largest learning rate. Own recipe: 0.2.
        rise: Share of the steps in which the learning rate rises; then it falls. Own recipe: 0.2.
        interval: A constant learning rate and its number of epochs, instead of rise and fall. Give
            the option once per interval.
        momentum: Nesterov's momentum; 0 is plain gradient descent. Own recipe: 0.9.
        weight_decay: Factor of the squared weights in the loss. Own recipe: 0.0005.
        l1: Factor of the kernels' absolute values in the loss. Own recipe: 0.
        label_smoothing: Share of the label that is spread over all classes. Own recipe: 0.1.
        validate_every: Epochs from one validation to the next. Own recipe: 1.
        augmentation: Flip, and crop from a padded image (crop), or the study's colours, resize and
            crop (study).
        objective: What training minimises: the plain loss, or one that calms the network: with an
            adversarial step (adversarial), with a penalty on scores that are not linear around an
            image (local-linearity), or on the loss's gradient (gradient-norm). Own recipe: plain.
        radius: Largest change of a pixel in [0, 1] for such an objective. Own recipe: 8/255.
        strength: Factor of its penalty. Own recipe: 1.
    """

    epochs: int | None = None
    batch: int | None = None
    peak_rate: float | None = None
    rise: float | None = None
    interval: Annotated[list[tuple[float, int]] | None, Parameter(negative=())] = None
    momentum: float | None = None
    weight_decay: float | None = None
    l1: float | None = None
    label_smoothing: float | None = None
    validate_every: int | None = None
    augmentation: Literal["crop", "study"] | None = None
    objective: Literal["plain", "adversarial", "local-linearity", "gradient-norm"] | None = None
    radius: float | None = None
    strength: float | None = None

    def recipe(self, network: str, dataset: str, preset: str) -> "Recipe":
        """The recipe of the preset with these changes."""
        from adjointbackmap.training.recipes import choose_recipe

        changes = asdict(self)
        intervals = changes.pop("interval")
        return choose_recipe(network, dataset, preset, intervals=intervals, **changes)

    def of_sentences(self) -> "SentenceRecipe":
        """The recipe of the networks of sentences with these changes.

        Raises:
            ValueError: If a change is one of images.
        """
        from adjointbackmap.training.sentences import SentenceRecipe

        changes = {name: value for name, value in asdict(self).items() if value is not None}
        known = asdict(SentenceRecipe())
        other = [f"--{name.replace('_', '-')}" for name in changes if name not in known]
        if other:
            msg = (
                "A network of sentences has the options --epochs, --batch, --peak-rate, "
                f"--weight-decay and --label-smoothing. Got {', '.join(other)}: leave it out."
            )
            raise ValueError(msg)
        return SentenceRecipe(**changes)


OWN_RECIPE = RecipeOptions()
TRAIN_EXAMPLES = help_examples(
    "adjointbackmap train vgg7 --data FOLDER",
    "adjointbackmap train resnet20 cifar100 --preset study --out runs/study",
    "adjointbackmap train vgg7 --objective local-linearity --out runs/calm",
    "adjointbackmap train transformer reviews --data FOLDER",
)
EVALUATE_EXAMPLES = help_examples(
    "adjointbackmap evaluate vgg7-cifar10 --dataset sample",
    "adjointbackmap evaluate vgg7-cifar10 --data FOLDER --json",
)


@app.command(help_epilogue=TRAIN_EXAMPLES)
def train(
    network: str,
    dataset: Literal["cifar10", "cifar100", "reviews"] = "cifar10",
    *,
    data: Path | None = None,
    out: Path | None = None,
    preset: Literal["own", "study"] = "own",
    options: RecipeOptions = OWN_RECIPE,
    start: Path | None = None,
    seed: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> None:
    """Train a network of the study, or one that reads sentences.

    A stopped run continues when the same command is run again. Networks of sentences are trained on
    each of ten folds of the reviews; the weights that are written are those of the first.

    Args:
        network: vgg7-nobias, fixup-resnet20-nobias, vgg7, resnet20 or fixup-resnet20; textcnn or
            transformer for the reviews.
        dataset: The data: reviews for the networks of sentences.
        data: Folder of the official binary files, or of the reviews. If left out: the folder that
            ADJOINTBACKMAP_DATA names, or a download.
        out: Folder for checkpoint, log, training curves, weights and card. The default is
            runs/NETWORK-DATASET-SEED.
        preset: Recipe that fills in the options from --epochs to --augmentation: our own, or the
            published one of the study for this network and data.
        options: Changes to the recipe.
        start: Weights to begin from: the safetensors file of an earlier run.
        seed: Seed of initialisation, order of the images, and augmentation.
        device: Where to train.
        threads: Number of processor threads.
    """
    from adjointbackmap.training.loop import train as run
    from adjointbackmap.training.task import Task

    use_threads(threads)
    if _is_of_sentences(network, dataset):
        choices = {"--preset": preset != "own", "--start": start, "--device": device != "cpu"}
        _train_sentences(network, data, out, options, seed, choices)
        return
    check_device(device)
    recipe = options.recipe(network, dataset, preset)
    task = Task(network, dataset, seed, recipe, str(start) if start else None)
    folder = out or Path("runs") / f"{network}-{dataset}-{seed}"
    with progress(f"{network} on {dataset}") as (bar, job):

        def report(now: "Progress") -> None:
            known = "" if now.validation is None else f", validation {100 * now.validation:.1f} %"
            description = f"{network} on {dataset}: loss {now.loss:.3f}{known}"
            bar.update(job, completed=now.step / now.steps, description=description)

        card = run(task, folder, data, device, report)
    accuracy = f"{100 * card['test accuracy']:.2f} %"
    console.print(f"test accuracy {accuracy}, kept epoch {card['kept epoch']}; written to {folder}")


def _is_of_sentences(network: str, dataset: str) -> bool:
    """Whether a network reads sentences.

    Raises:
        ValueError: If the data are of the other kind.
    """
    from adjointbackmap import models

    of_sentences = models.takes_sentences(network)
    if of_sentences != (dataset == "reviews"):
        wanted = "the reviews" if of_sentences else "images"
        data = "reviews" if of_sentences else "cifar10"
        msg = (
            f"{network} must be trained on {wanted}. Got {dataset}: "
            f"adjointbackmap train {network} {data}."
        )
        raise ValueError(msg)
    return of_sentences


def _train_sentences(
    network: str,
    data: Path | None,
    out: Path | None,
    options: RecipeOptions,
    seed: int,
    choices: Mapping[str, object],
) -> None:
    """Train a network of sentences on ten folds.

    Raises:
        ValueError: If an option is one of images.
    """
    from adjointbackmap import models
    from adjointbackmap.training.sentences import SentenceTask
    from adjointbackmap.training.sentences import train as run

    given = [option for option, value in choices.items() if value]
    if given:
        msg = f"{', '.join(given)} must come with a network of images. Got {network}: leave it out."
        raise ValueError(msg)
    task = SentenceTask(models.architecture(network), seed, options.of_sentences())
    folder = out or Path("runs") / f"{network}-reviews-{seed}"
    with progress(f"{network} on reviews") as (bar, job):

        def report(now: "Progress") -> None:
            description = f"{network} on reviews: loss {now.loss:.3f}"
            bar.update(job, completed=now.step / now.steps, description=description)

        card = run(task, folder, data, report)
    mean = f"{100 * card['mean accuracy']:.1f} %"
    spread = f"{100 * card['standard deviation']:.1f}"
    console.print(f"mean accuracy of ten folds {mean}, deviation {spread}; written to {folder}")


@app.command(help_epilogue=EVALUATE_EXAMPLES)
def evaluate(
    source: NetworkOptions = NO_NETWORK,
    *,
    dataset: Literal["cifar10", "cifar100", "sample"] | None = None,
    split: Literal["test", "validation", "train"] = "test",
    data: Path | None = None,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Compute the accuracy of a network on a data set.

    Args:
        source: The network.
        dataset: The data; sample is the 200 images that ship. The default is the data set of a
            shipped network, or cifar10.
        split: Which images of the data set.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        threads: Number of processor threads.
        output: How tables are printed.
    """
    from adjointbackmap import data as sets
    from adjointbackmap.training.evaluation import accuracy

    use_threads(threads)
    subject = load_subject(source)
    trained_on = "cifar100" if source.name and source.name.endswith("cifar100") else "cifar10"
    chosen = dataset or trained_on
    images = sets.sample() if chosen == "sample" else sets.load(chosen, split, data)
    _check_outputs(subject, len(images.classes), chosen)
    share = accuracy(subject.module, images, subject.prepare)
    which = "the sample" if chosen == "sample" else f"{chosen} {split}"
    if output == TABLES:
        console.print(f"{subject.title}: {100 * share:.2f} % of {len(images):,} images ({which})")
        return
    table = Table("network", "data", "images", "accuracy in %")
    table.add_row(subject.title, which, str(len(images)), f"{100 * share:.2f}")
    output.tables(console, table)


def _check_outputs(subject: "Subject", classes: int, dataset: str) -> None:
    """Raise if a network does not have an output for each class of the data.

    Raises:
        ValueError: If it does not take these images, or has another number of outputs.
    """
    import torch

    if subject.shape != CIFAR_SHAPE:
        msg = (
            f"The network must take the images of {dataset}, {CIFAR_SHAPE}. "
            f"Got one of {subject.shape}: evaluate it in Python."
        )
        raise ValueError(msg)
    with torch.no_grad():
        outputs = subject.module(torch.zeros(1, *subject.shape))
    if outputs.shape[1:] != (classes,):
        msg = (
            f"The network must have an output for each of the {classes} classes of {dataset}. "
            f"Got outputs of shape {tuple(outputs.shape[1:])}: choose another --dataset."
        )
        raise ValueError(msg)
    subject.check_classes(classes)
