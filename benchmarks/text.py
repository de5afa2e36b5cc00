"""The study's questions, asked of sentences: do hyperplanes agree, and what does one word change?

usage: python benchmarks/text.py [--data FOLDER] [--docs docs/text.md]

Sentences are those of the fold that the shipped networks have not seen, class by class in the order
of their hashes, that the network classifies correctly. The rules of judgement are in RULES; they
were written before the first run. It takes about five minutes on one thread.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap import models
from adjointbackmap.capture.entering import Entrance
from adjointbackmap.machine import environment
from adjointbackmap.report.sheets import PagePlace
from adjointbackmap.text import reviews
from adjointbackmap.text.readers import Reader
from adjointbackmap.text.words import PADDING, SPECIAL

PLACE = PagePlace("<!-- text: written by benchmarks/text.py -->", "<!-- text: end -->")
PER_CLASS = 75
FEWEST_WORDS = 5  # in a shorter sentence a replacement leaves hardly any other word
TRIED = 100  # replacements that are tried in the model, the best by the derivative
CONTROLS = 5  # random words for each sentence
DRAWN = 200  # random words among which the one of the same distance is looked for
RESAMPLED = 2000
SEED = 0
AT_ONCE = 25  # sentences
RULES = {
    "agreement": (
        "Hyperplanes agree within a class if the mean cosine of pairs of one predicted class is "
        "larger than that of pairs of different classes, with a 95 % interval above 0."
    ),
    "replacement": (
        "A flip changes the hyperplane more than a random word does if the mean difference to the "
        "random word of the same distance has a 95 % interval above 0."
    ),
}


@dataclass(frozen=True)
class Chosen:
    """Sentences that a network classifies correctly: token numbers ``(N, T)`` and classes."""

    tokens: Tensor
    classes: Tensor


def chosen_sentences(reader: Reader, root: Path | None) -> Chosen:
    """The first sentences of each class of the test part that the network classifies correctly."""
    test = reviews.load(root).fold(models.card(reader.title)["fold"]).test
    tokens = reader.tokens(test.texts)
    labels = torch.tensor(test.labels)
    with torch.no_grad():
        right = reader.model(tokens).argmax(1) == labels
    right &= (tokens != PADDING).sum(1) >= FEWEST_WORDS
    rows = [torch.nonzero(right & (labels == c)).flatten()[:PER_CLASS] for c in (0, 1)]
    kept = torch.cat(rows)
    return Chosen(tokens[kept], labels[kept])


def hyperplanes_of(reader: Reader, tokens: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Image parts ``(N, T, D)`` and bias parts ``(N, M)`` of one unit for each sentence."""
    images = []
    biases = []
    for part, which in zip(tokens.split(AT_ONCE), units.split(AT_ONCE), strict=True):
        x = reader.network.embed(part)
        planes = abm.hyperplanes(reader.network, x, "output", units=which[:, None, None])
        images.append(planes.image[:, 0])
        biases.append(planes.bias[:, 0])
    return torch.cat(images), torch.cat(biases)


# question 1: how far the hyperplanes of a class agree between sentences


def agreement(reader: Reader, chosen: Chosen) -> dict[str, Any]:
    """Cosines between sentences of the hyperplanes of one unit, the score of "positive"."""
    one = torch.ones_like(chosen.classes)
    image, bias = hyperplanes_of(reader, chosen.tokens, one)
    is_word = (chosen.tokens != PADDING)[..., None]
    # positions hold other words in other sentences: the mean over the words is compared
    mean = (image * is_word).sum(1) / is_word.sum(1)
    found = {}
    for name, part in (("words", mean), ("biases", bias)):
        unit = torch.nn.functional.normalize(part.double(), dim=1).numpy()
        found[name] = _within_and_across(unit @ unit.T, chosen.classes.numpy())
    return found


def _within_and_across(cosines: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Mean cosine of pairs of one class and of two, with intervals over sentences."""
    same = classes[:, None] == classes[None]

    def means(rows: np.ndarray) -> tuple[float, float]:
        other = rows[:, None] != rows[None]  # a sentence drawn twice is no pair
        picked = cosines[np.ix_(rows, rows)]
        alike = same[np.ix_(rows, rows)]
        return picked[alike & other].mean(), picked[~alike].mean()

    draw = np.random.default_rng(SEED)
    count = len(classes)
    every = np.array([means(draw.integers(0, count, count)) for _ in range(RESAMPLED)])
    within, across = means(np.arange(count))
    return {
        "within": _figure(within, every[:, 0]),
        "across": _figure(across, every[:, 1]),
        "difference": _figure(within - across, every[:, 0] - every[:, 1]),
    }


# question 2: what one word's replacement does to the hyperplane


def replacements(reader: Reader, chosen: Chosen) -> dict[str, Any]:
    """One word is replaced so that the class flips; the same word by random ones as control."""
    draw = torch.Generator().manual_seed(SEED)
    rows: dict[str, list[Tensor]] = {"start": [], "flip": [], "matched": [], "random": []}
    places = []
    kept = []
    for i, tokens in enumerate(chosen.tokens):
        found = flipped(reader, tokens, int(chosen.classes[i]))
        if found is None:
            continue
        (place, word) = found
        changed = {
            "flip": [word],
            "matched": [_of_same_distance(reader, int(tokens[place]), word, draw)],
            "random": torch.randint(
                len(SPECIAL), len(reader.vocabulary), (CONTROLS,), generator=draw
            ).tolist(),
        }
        rows["start"].append(tokens[None])
        for name, words in changed.items():
            rows[name].append(_with_words(tokens, place, words))
        places.append(place)
        kept.append(i)
    return _measured(reader, chosen.classes[kept], rows, torch.tensor(places), len(chosen.classes))


def flipped(reader: Reader, tokens: Tensor, label: int) -> tuple[int, int] | None:
    """Place and new word of the replacement that lowers a class most; ``None`` if it stays.

    The derivative ranks all words at all places, and the best are tried in the model.
    """
    network = reader.network
    words = reader.model.get_submodule(reader.after).weight.detach()
    length = int((tokens != PADDING).sum())
    x = network.embed(tokens[None]).plain.clone().requires_grad_()
    entrance = network.entrance
    assert isinstance(entrance, Entrance)
    scores = entrance.run(abm_copy(reader), x, (tokens[None],))
    margin = scores[0, label] - scores[0, 1 - label]
    (slope,) = torch.autograd.grad(margin, x)
    # (T, words): the change of the margin that the derivative promises for each replacement
    gain = (
        slope[0, :length] @ words.T - (slope[0, :length] * x[0, :length].detach()).sum(1)[:, None]
    )
    gain[:, : len(SPECIAL)] = torch.inf
    best = gain.flatten().topk(TRIED, largest=False).indices
    places = best // len(words)
    tried = tokens.repeat(TRIED, 1)
    tried[torch.arange(TRIED), places] = best % len(words)
    with torch.no_grad():
        scores = reader.model(tried[:, :length])
    margins = scores[:, label] - scores[:, 1 - label]
    lowest = int(margins.argmin())
    if margins[lowest] >= 0:
        return None
    return int(places[lowest]), int(best[lowest] % len(words))


def abm_copy(reader: Reader) -> torch.nn.Module:
    """A copy of the structure of a reader's model, for hooks."""
    from adjointbackmap.capture.copies import structural_copy

    return structural_copy(reader.model)


def _of_same_distance(reader: Reader, old: int, new: int, draw: torch.Generator) -> int:
    """Of random words, the one whose distance to the old word is nearest to the new one's."""
    words = reader.model.get_submodule(reader.after).weight.detach()
    drawn = torch.randint(len(SPECIAL), len(words), (DRAWN,), generator=draw)
    drawn = drawn[(drawn != new) & (drawn != old)]
    wanted = (words[new] - words[old]).norm()
    return int(drawn[((words[drawn] - words[old]).norm(dim=1) - wanted).abs().argmin()])


def _with_words(tokens: Tensor, place: int, words: list[int]) -> Tensor:
    several = tokens.repeat(len(words), 1)
    several[:, place] = torch.tensor(words)
    return several


def _measured(
    reader: Reader,
    classes: Tensor,
    rows: dict[str, list[Tensor]],
    places: Tensor,
    asked: int,
) -> dict[str, Any]:
    """How far hyperplanes of the first class's score move, by kind of replacement."""
    flat = {name: torch.cat(parts) for name, parts in rows.items()}
    image, bias = hyperplanes_of(reader, flat["start"], classes)
    is_word = flat["start"] != PADDING
    others = is_word.scatter(1, places[:, None], False)[..., None]
    changes: dict[str, np.ndarray] = {}
    found: dict[str, Any] = {"asked": asked, "flipped": len(classes)}
    for name in ("flip", "matched", "random"):
        times = len(flat[name]) // len(classes)
        new_image, new_bias = hyperplanes_of(reader, flat[name], classes.repeat_interleave(times))
        moved = _relative(image, new_image, others, times)
        moved_bias = _relative(bias, new_bias, torch.ones(()), times)
        changes[name] = moved
        found[name] = {
            "hyperplane of the other words": _with_interval(moved),
            "bias part": _with_interval(moved_bias),
        }
        found[name]["classes that flip"] = _share_of_flips(reader, flat[name], classes, times)
    found["flip minus matched"] = _with_interval(changes["flip"] - changes["matched"])
    found["flip minus random"] = _with_interval(changes["flip"] - changes["random"])
    found["explained by the old hyperplane"] = _explained(reader, flat, classes, image, places)
    return found


def _relative(old: Tensor, new: Tensor, where: Tensor, times: int) -> np.ndarray:
    """``|H' - H| / |H|`` for each sentence, the mean over its replacements."""
    mask = where.repeat_interleave(times, 0) if where.dim() else where
    before = old.repeat_interleave(times, 0) * mask
    change = (new * mask - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return change.view(-1, times).mean(1).double().numpy()


def _share_of_flips(reader: Reader, tokens: Tensor, classes: Tensor, times: int) -> float:
    with torch.no_grad():
        now = reader.model(tokens).argmax(1)
    return float((now != classes.repeat_interleave(times)).double().mean())


def _explained(
    reader: Reader, flat: dict[str, Tensor], classes: Tensor, image: Tensor, places: Tensor
) -> dict[str, float]:
    """Share of a score's change that the old hyperplane gives for the new word."""
    words = reader.model.get_submodule(reader.after).weight.detach()
    rows = torch.arange(len(places))
    change = words[flat["flip"][rows, places]] - words[flat["start"][rows, places]]
    promised = (change * image[rows, places]).sum(1)
    with torch.no_grad():
        scores = [reader.model(flat[name])[rows, classes] for name in ("flip", "start")]
    return _with_interval((promised / (scores[0] - scores[1])).double().numpy(), np.median)


def _with_interval(values: np.ndarray, of: Any = np.mean) -> dict[str, float]:
    """A mean, or median, over sentences with its 95 % bootstrap interval."""
    draw = np.random.default_rng(SEED)
    picked = draw.integers(0, len(values), (RESAMPLED, len(values)))
    return _figure(of(values), of(values[picked], axis=1))


def _figure(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high)}


# the page


def shown(figure: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def markdown(found: dict[str, Any]) -> str:
    """The tables and the judgements of the page."""
    networks = found["networks"]
    lines = [
        "| network | part | pairs of one class | pairs of two classes | difference |",
        "|---|---|---|---|---|",
    ]
    for name, result in networks.items():
        for part, figures in result["agreement"].items():
            cells = (shown(figures[k]) for k in ("within", "across", "difference"))
            lines.append(f"| `{name}` | {part} | {' | '.join(cells)} |")
    lines += ["", f"*Rule.* {RULES['agreement']}", ""]
    for name, result in networks.items():
        agree = [
            f"{part}: {'yes' if figures['difference']['low'] > 0 else 'no'}"
            for part, figures in result["agreement"].items()
        ]
        lines.append(f"- `{name}`: {', '.join(agree)}.")
    lines += [
        "",
        "| network | replacement | class flips | other words' hyperplane | bias part |",
        "|---|---|---|---|---|",
    ]
    kinds = {"flip": "found", "matched": "random, same distance", "random": "random"}
    for name, result in networks.items():
        for kind, words in kinds.items():
            row = result["replacement"][kind]
            cells = (
                f"{100 * row['classes that flip']:.0f} %",
                shown(row["hyperplane of the other words"]),
                shown(row["bias part"]),
            )
            lines.append(f"| `{name}` | {words} | {' | '.join(cells)} |")
    lines += ["", f"*Rule.* {RULES['replacement']}", ""]
    for name, result in networks.items():
        row = result["replacement"]
        verdict = "yes" if row["flip minus matched"]["low"] > 0 else "no"
        lines.append(
            f"- `{name}`: {verdict}. One word flips the class of {row['flipped']} of "
            f"{row['asked']} sentences. Found minus random of the same distance: "
            f"{shown(row['flip minus matched'])}. "
            "The old hyperplane gives "
            f"{shown(row['explained by the old hyperplane'])} of the score's change (median)."
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the networks that the file of results lacks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the movie reviews")
    parser.add_argument("--out", type=Path, default=Path("docs/results/text.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    for name in models.names("sentences"):
        if name not in found["networks"]:
            reader = models.reader(name)
            chosen = chosen_sentences(reader, arguments.data)
            result = {
                "sentences": len(chosen.classes),
                "agreement": agreement(reader, chosen),
                "replacement": replacements(reader, chosen),
            }
            found = {
                "environment": environment(),
                "rules": RULES,
                "networks": {**found["networks"], name: result},
            }
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.docs:
        PLACE.check(arguments.docs)
        PLACE.fill(arguments.docs, markdown(found))


if __name__ == "__main__":
    main()
