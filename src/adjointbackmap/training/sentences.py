"""Training of the two networks of sentences, by ten-fold cross-validation on the movie reviews.

A fold takes about a minute. A stopped run continues with the fold that was not finished. The test
part of a fold chooses nothing: the weights that are kept are those of the epoch with the best
accuracy on the validation part, which is a tenth of the other folds.
"""

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap.capture.precision import exact
from adjointbackmap.files import disk
from adjointbackmap.files.checked import OF_FILE, read_or_set_aside, sealed_text
from adjointbackmap.machine import machine_in_words
from adjointbackmap.text import reviews
from adjointbackmap.text.networks import NETWORKS
from adjointbackmap.text.words import PADDING, UNKNOWN, Vocabulary
from adjointbackmap.training.task import Progress

SHIPPED_FOLD = 0  # chosen before any training
OF_WORDS = "words sha256"  # key of a card: the SHA-256 of the list of words
WARM_UP = 100  # steps in which the learning rate rises
POOL = 20  # batches that are sorted by length together, so that little is filled up


@dataclass(frozen=True)
class SentenceRecipe:
    """AdamW with a learning rate that rises for a moment and then falls linearly to zero.

    Attributes:
        epochs: Passes over the training sentences.
        batch: Sentences in a step.
        peak_rate: Largest learning rate.
        weight_decay: Decay of the weights, separate from the loss.
        label_smoothing: Share of the label that is spread over both classes.
        word_dropout: Share of the words that a step replaces by the unknown word, which learns its
            numbers that way.
        at_least: A word is in the vocabulary if the training sentences have it this often.

    Raises:
        ValueError: If a count is less than 1.
    """

    epochs: int = 10
    batch: int = 50
    peak_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    word_dropout: float = 0.1
    at_least: int = 2

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.at_least) < 1:
            msg = (
                "Epochs, batch and at_least must be at least 1. "
                f"Got {self.epochs}, {self.batch} and {self.at_least}."
            )
            raise ValueError(msg)


@dataclass(frozen=True)
class SentenceTask:
    """What is trained; a folder continues only the task that began it."""

    network: str
    seed: int = 0
    recipe: SentenceRecipe = SentenceRecipe()
    folds: int = reviews.FOLDS


@dataclass(frozen=True)
class _Part:
    """Token numbers ``(N, T)``, labels and lengths ``(N,)`` of sentences."""

    tokens: Tensor
    labels: Tensor

    @classmethod
    def of(cls, sentences: reviews.Sentences, vocabulary: Vocabulary) -> "_Part":
        return cls(vocabulary.tokens(sentences.texts), torch.tensor(sentences.labels))


@dataclass
class _Best:
    """The epoch with the best validation accuracy so far."""

    epoch: int = 0
    validation: float = 0.0
    weights: dict[str, Tensor] | None = None


def train(
    task: SentenceTask,
    out: Path,
    root: str | os.PathLike[str] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train a network on each fold, or continue the run in ``out``; write weights and card.

    Args:
        task: Network, seed, recipe, and how many of the ten folds to train.
        out: Folder for ``fold-0.json`` and so on, and for ``<name>.safetensors``,
            ``<name>.words.txt`` and ``<name>.json`` of the first fold.
        root: Folder of the data, see :func:`adjointbackmap.text.reviews.load`.
        report: Called after every step.

    Returns:
        The card, with the accuracy of the first fold, and mean and spread over all folds.

    Raises:
        ValueError: If ``out`` holds the run of another task.
    """
    with disk.hold_folder(out):
        sentences = reviews.load(root)
        found = []
        for number in range(task.folds):
            path = out / f"fold-{number}.json"
            row = _finished(path, task)
            if row is None:
                row = _fold(task, sentences.fold(number), number, out, report)
                disk.write(path, sealed_text(row))
            found.append(row)
        card = _card(task, found)
        disk.write(out / f"{_title(task)}.json", sealed_text(card, indent=2))
        return card


def _finished(path: Path, task: SentenceTask) -> dict[str, Any] | None:
    """What a finished fold has left; ``None`` if it is not finished.

    Raises:
        ValueError: If it is of another task.
    """
    row = read_or_set_aside(path, "seed")
    if row is not None and (row["seed"], row["recipe"]) != (task.seed, asdict(task.recipe)):
        msg = (
            f"{path.parent} must be empty or hold a run of seed {task.seed} and "
            f"{asdict(task.recipe)}. Got seed {row['seed']} and {row['recipe']}: "
            "name another folder."
        )
        raise ValueError(msg)
    return row


def _fold(
    task: SentenceTask,
    fold: reviews.Fold,
    number: int,
    out: Path,
    report: Callable[[Progress], None],
) -> dict[str, Any]:
    """Train on one fold; keep weights and words if it is the one that ships."""
    started = time.monotonic()
    vocabulary = Vocabulary.of(fold.train.texts, task.recipe.at_least)
    parts = [_Part.of(part, vocabulary) for part in (fold.train, fold.validation, fold.test)]
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(task.seed * reviews.FOLDS + number)
        model = NETWORKS[task.network](len(vocabulary))
        best = _fit(model, task, parts[0], parts[1], number, report)
    assert best.weights is not None
    model.load_state_dict(best.weights)
    row = {
        "seed": task.seed,
        "recipe": asdict(task.recipe),
        "fold": number,
        "words": len(vocabulary),
        "training sentences": len(fold.train),
        "kept epoch": best.epoch,
        "validation accuracy": best.validation,
        "test sentences": len(fold.test),
        "test accuracy": accuracy(model, parts[2].tokens, parts[2].labels),
        "training seconds": round(time.monotonic() - started),
    }
    if number != SHIPPED_FOLD:
        return row
    return {**row, **_written(_title(task), best.weights, vocabulary, out)}


def _fit(
    model: nn.Module,
    task: SentenceTask,
    train: _Part,
    validation: _Part,
    number: int,
    report: Callable[[Progress], None],
) -> _Best:
    """Take all steps of a fold, and keep the weights of the best epoch."""
    recipe = task.recipe
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.peak_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * (len(train.labels) // recipe.batch)
    before = number * steps
    best = _Best()
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for rows in _batches((train.tokens != PADDING).sum(1), recipe.batch):
            share = min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.peak_rate * share
            loss = _loss(model, train, rows, recipe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            known = best.validation if best.weights else None
            report(Progress(before + step, task.folds * steps, loss.item(), known))
        share = accuracy(model, validation.tokens, validation.labels)
        if share > best.validation:
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            best = _Best(epoch, share, weights)
    return best


def _loss(model: nn.Module, part: _Part, rows: Tensor, recipe: SentenceRecipe) -> Tensor:
    """Cross-entropy of the sentences at ``rows``, some of their words replaced."""
    tokens = part.tokens[rows]
    tokens = tokens[:, : int((tokens != PADDING).sum(1).max())]
    dropped = torch.rand(tokens.shape) < recipe.word_dropout
    tokens = torch.where(dropped & (tokens != PADDING), UNKNOWN, tokens)
    return F.cross_entropy(model(tokens), part.labels[rows], label_smoothing=recipe.label_smoothing)


def _batches(lengths: Tensor, batch: int) -> Iterator[Tensor]:
    """The rows of each batch of an epoch; sentences of a batch are about equally long."""
    order = torch.randperm(len(lengths))[: len(lengths) // batch * batch]
    for pool in order.split(POOL * batch):
        groups = pool[lengths[pool].argsort()].split(batch)
        for i in torch.randperm(len(groups)).tolist():
            yield groups[i]


def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor, batch: int = 200) -> float:
    """Share of sentences whose largest output is their label, in eval mode.

    Args:
        model: Network of class scores.
        tokens: Token numbers ``(N, T)``.
        labels: Class of each sentence ``(N,)``.
        batch: Sentences per forward pass.
    """
    model.eval()
    with exact(labels.device):
        scores = torch.cat([model(part) for part in tokens.split(batch)])
    return float((scores.argmax(1) == labels).double().mean())


def _written(
    title: str, weights: dict[str, Tensor], vocabulary: Vocabulary, out: Path
) -> dict[str, str]:
    """Write weights and words; their checksums."""
    from safetensors.torch import save

    content = save({k: v.contiguous() for k, v in weights.items()})
    words = "".join(f"{word}\n" for word in vocabulary.words).encode()
    disk.write(out / f"{title}.safetensors", content)
    disk.write(out / f"{title}.words.txt", words)
    return {
        OF_WORDS: hashlib.sha256(words).hexdigest(),
        OF_FILE: hashlib.sha256(content).hexdigest(),
    }


def _card(task: SentenceTask, folds: list[dict[str, Any]]) -> dict[str, Any]:
    """The card of the fold that ships, with mean and spread over all folds."""
    accuracies = [row["test accuracy"] for row in folds]
    seconds = sum(row["training seconds"] for row in folds)
    return {
        "name": _title(task),
        "network": task.network,
        "dataset": reviews.NAME,
        "classes": len(reviews.CLASSES),
        **folds[SHIPPED_FOLD],
        "accuracies of all folds": accuracies,
        "mean accuracy": statistics.mean(accuracies),
        "standard deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "training seconds of all folds": seconds,
        "machine": machine_in_words(torch.device("cpu")),
    }


def _title(task: SentenceTask) -> str:
    """The name of the trained network."""
    return f"{task.network}-{reviews.NAME}"
