"""Attributions of two small transformers: how far each is from the score, and deleting its top.

usage: python benchmarks/transformer_peers.py [--data FOLDER] [--vit FILE] [--docs docs/peers.md]

The networks are transformer-reviews and a small vision transformer, which is trained here for a few
epochs if FILE does not exist. AttnLRP takes the rules of the package lxt, which is installed with
pip install --no-deps lxt. Results are kept by network in docs/results.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap import data, models
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.entering import plain
from adjointbackmap.machine import environment
from adjointbackmap.report.sheets import PagePlace
from adjointbackmap.text import reviews
from adjointbackmap.text.networks import HEADS, Block
from adjointbackmap.text.words import PADDING

PLACE = PagePlace(
    "<!-- transformers: written by benchmarks/transformer_peers.py -->",
    "<!-- transformers: end -->",
)
PER_CLASS = 75  # sentences
IMAGES = 120
STEPS = 50  # of integrated gradients
RESAMPLED = 2000
SEED = 0
WORDS_DELETED = (1, 2, 3, 4, 5)
PATCHES_DELETED = (2, 4, 8, 16, 32)
WIDTH = 64
DEPTH = 3
PATCH = 4
EPOCHS = 3
BATCH = 100
RATE = 2e-3


class SmallViT(nn.Module):
    """Vision transformer: patches of 4 x 4 pixels, pre-norm blocks, the mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((32 // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, 32, 32)`` to class scores."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x).mean(1))


def trained_vit(path: Path, root: Path | None) -> SmallViT:
    """The vision transformer with the weights of a file, which is made if it does not exist."""
    torch.manual_seed(SEED)
    model = SmallViT()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images = data.load("cifar10", "train", root)
    prepare = models.Normalise()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    step = 0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            x = prepare(images.pixels[rows].float() / 255)
            x = x.flip(-1) if step % 2 else x
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 100) * (1 - step / steps)
            loss = F.cross_entropy(model(x), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    save_file(model.state_dict(), path)
    return model.eval()


# AttnLRP: gradient times input of the same weights under lxt's rules


@cache
def lxt_rules() -> ModuleType:
    """The rules of lxt without its models, which import parts of transformers.

    Raises:
        ImportError: If lxt is not installed.
    """
    found = importlib.util.find_spec("lxt")
    if found is None or found.submodule_search_locations is None:
        msg = "AttnLRP needs the package lxt. Got none: pip install --no-deps lxt."
        raise ImportError(msg)
    path = Path(found.submodule_search_locations[0]) / "efficient" / "rules.py"
    spec = importlib.util.spec_from_file_location("lxt_rules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lrp_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm whose deviation is no function of the input."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return centred / lxt_rules().stop_gradient(deviation) * layer.weight + layer.bias


def lrp_block(block: Block, x: Tensor, is_word: Tensor | None = None) -> Tensor:
    """A block under the rules: uniform for products, identity for GELU."""
    rules = lxt_rules()

    def heads(part: Tensor) -> Tensor:
        return part.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    q, k, v = map(heads, block.qkv(lrp_norm(block.norm1, x)).chunk(3, -1))
    scores = rules.divide_gradient(q @ k.transpose(-1, -2), 2) * q.shape[-1] ** -0.5
    if is_word is not None:
        scores = scores.masked_fill(~is_word[:, None, None], -torch.inf)
    mixed = rules.divide_gradient(scores.softmax(-1) @ v, 2)
    x = x + block.out(mixed.transpose(1, 2).reshape(x.shape))
    u = block.up(lrp_norm(block.norm2, x))
    return x + block.down(rules.identity_rule_implicit(block.act, u))


def with_rules(model: nn.Module) -> nn.Module:
    """A copy of a transformer's structure whose norms and blocks follow the rules."""
    copied = structural_copy(model)
    for module in copied.modules():
        if isinstance(module, Block):
            module.forward = partial(lrp_block, module)  # type: ignore[method-assign]
    copied.norm.forward = partial(lrp_norm, copied.norm)  # type: ignore[union-attr,method-assign]
    return copied


# what is explained


@dataclass(frozen=True)
class Task:
    """A network, some inputs that it classifies correctly, and how their parts are deleted.

    Attributes:
        network: The traced network, with frozen gates.
        x: The inputs.
        classes: The class of each.
        run: Gives the scores of a model for inputs.
        by_part: Sums attributions ``(N, *in_shape)`` over each word or patch, ``(N, parts)``.
        scores_without: Scores of inputs without the parts that a mask ``(N, parts)`` names.
        parts: Number of parts of each input.
        deleted: Numbers of parts to delete.
    """

    network: abm.Network
    x: Tensor
    classes: Tensor
    run: Callable[[nn.Module, Tensor], Tensor]
    by_part: Callable[[Tensor], Tensor]
    scores_without: Callable[[Tensor], Tensor]
    parts: Tensor
    deleted: tuple[int, ...]


def sentences(root: Path | None) -> Task:
    """Sentences of the fold that the shipped transformer has not seen."""
    reader = models.reader("transformer-reviews")
    test = reviews.load(root).fold(models.card(reader.title)["fold"]).test
    tokens = reader.tokens(test.texts)
    labels = torch.tensor(test.labels)
    with torch.no_grad():
        right = reader.model(tokens).argmax(1) == labels
    long = (tokens != PADDING).sum(1) > WORDS_DELETED[-1]
    rows = torch.cat(
        [torch.nonzero(right & long & (labels == c)).flatten()[:PER_CLASS] for c in (0, 1)]
    )
    chosen = tokens[rows]
    is_word = chosen != PADDING

    def run(model: nn.Module, x: Tensor) -> Tensor:
        entrance = reader.network.entrance
        assert entrance is not None
        # several steps of one path may come at once: each sentence's tokens as often
        given = chosen.repeat(len(x) // len(chosen), 1) if len(x) != 1 else chosen[:1]
        return entrance.run(structural_copy(model), x, (given,))

    def without(mask: Tensor) -> Tensor:
        kept = is_word & ~mask
        moved = torch.zeros_like(chosen)
        for i, keep in enumerate(kept):  # deleted words leave no gap
            words = chosen[i][keep]
            moved[i, : len(words)] = words
        with torch.no_grad():
            return reader.model(moved)

    x = reader.network.embed(chosen)
    return Task(
        reader.network,
        x,
        labels[rows],
        run,
        lambda part: part.sum(-1),
        without,
        is_word.sum(1),
        WORDS_DELETED,
    )


def pictures(path: Path, root: Path | None) -> Task:
    """CIFAR's sample images, whose patches are deleted by the mean colour."""
    model = trained_vit(path, root)
    images = data.sample()
    x = models.Normalise()(images.unit_interval())
    with torch.no_grad():
        right = model(x).argmax(1) == images.labels
    print(f"the vision transformer is right on {float(right.double().mean()):.3f} of the sample")
    rows = torch.nonzero(right).flatten()[:IMAGES]
    chosen = x[rows]
    side = 32 // PATCH

    def by_part(values: Tensor) -> Tensor:
        # (N, C, rows of patches, PATCH, columns of patches, PATCH)
        return values.view(-1, 3, side, PATCH, side, PATCH).sum((1, 3, 5)).flatten(1)

    def without(mask: Tensor) -> Tensor:
        grid = mask.view(-1, 1, side, side).repeat_interleave(PATCH, 2)
        grid = grid.repeat_interleave(PATCH, 3)
        with torch.no_grad():
            return model(chosen.masked_fill(grid, 0.0))

    network = abm.trace(model, chosen[:1], curved="frozen")
    parts = torch.full((len(rows),), side * side)
    return Task(
        network,
        chosen,
        images.labels[rows],
        lambda module, images: module(images),
        by_part,
        without,
        parts,
        PATCHES_DELETED,
    )


# attributions, each (N, *in_shape), and the part that belongs to no pixel or word


def gradient_x_input(task: Task, model: nn.Module | None = None) -> Tensor:
    """The derivative of the class's score times the input."""
    x = plain(task.x).clone().requires_grad_()
    scores = task.run(model or task.network.model, x)
    picked = scores.gather(1, task.classes[:, None]).sum()
    return x.detach() * torch.autograd.grad(picked, x)[0]


def integrated_gradients(task: Task) -> Tensor:
    """Captum's, from zero: no word, or the mean colour."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(lambda x: task.run(task.network.model, x))
    x = plain(task.x)
    # all inputs at each step, so that each row has its own tokens
    return method.attribute(
        x, torch.zeros_like(x), task.classes, n_steps=STEPS, internal_batch_size=len(x)
    ).detach()


def attn_lrp(task: Task) -> Tensor:
    """AttnLRP, by the rules of lxt."""
    return gradient_x_input(task, with_rules(task.network.model))


def ours(task: Task, curved: str) -> tuple[Tensor, Tensor]:
    """What words or pixels add, and what all biases add, ``(N,)``."""
    network = task.network.read_as(curved)
    images = []
    biases = []
    for start in range(0, len(task.x), 30):
        part = task.x[start : start + 30]
        units = task.classes[start : start + 30, None, None]
        planes = abm.hyperplanes(network, part, "output", units=units)
        images.append(plain(part) * planes.image[:, 0])
        biases.append(planes.reconstruct()[:, 0] - images[-1].flatten(1).sum(1))
    return torch.cat(images), torch.cat(biases)


def attributions(task: Task) -> dict[str, tuple[Tensor, Tensor]]:
    """Method -> attributions, and what it gives to biases."""
    none = torch.zeros(len(task.x))
    return {
        "gradient x input": (gradient_x_input(task), none),
        "integrated gradients": (integrated_gradients(task), none),
        "AttnLRP": (attn_lrp(task), none),
        "ours, tangent": ours(task, "tangent"),
        "ours, frozen": ours(task, "frozen"),
    }


# what is measured


def measured(task: Task) -> dict[str, Any]:
    """For each method the distance of its sum from the score, and the curve of deletions."""
    with torch.no_grad():
        score = task.run(task.network.model, plain(task.x))
        at_zero = task.run(task.network.model, torch.zeros_like(plain(task.x)))
    value = score.gather(1, task.classes[:, None])[:, 0]
    start = at_zero.gather(1, task.classes[:, None])[:, 0]
    found: dict[str, Any] = {"inputs": len(task.x), "deleted": task.deleted, "methods": {}}
    for name, (values, biases) in attributions(task).items():
        total = values.flatten(1).sum(1) + biases
        row = {"distance from the score": _median((total - value).abs() / value.abs())}
        if name == "integrated gradients":
            row["distance from its promise"] = _median(
                (total - (value - start)).abs() / value.abs()
            )
        row["drop"] = deletions(task, task.by_part(values))
        found["methods"][name] = row
    draw = torch.Generator().manual_seed(SEED)
    chance = torch.rand(len(task.x), task.by_part(values).shape[1], generator=draw)
    found["methods"]["random order"] = {"drop": deletions(task, chance)}
    return found


def deletions(task: Task, values: Tensor) -> dict[str, Any]:
    """How far the class's probability falls when the parts that add most are deleted."""
    places = torch.arange(values.shape[1])
    values = values.masked_fill(places >= task.parts[:, None], -torch.inf)
    order = values.argsort(1, descending=True)
    nothing = torch.zeros(values.shape, dtype=torch.bool)
    before = _probability(task, nothing)
    drops = []
    for count in task.deleted:
        mask = nothing.scatter(1, order[:, :count], True)
        drops.append(before - _probability(task, mask))
    each = torch.stack(drops, 1).double().numpy()  # (N, counts)
    curve = [_with_interval(column, np.mean) for column in each.T]
    return {"curve": curve, "mean": _with_interval(each.mean(1), np.mean)}


def _probability(task: Task, mask: Tensor) -> Tensor:
    scores = task.scores_without(mask).softmax(1)
    return scores.gather(1, task.classes[:, None])[:, 0]


def _median(values: Tensor) -> dict[str, float]:
    return _with_interval(values.double().numpy(), np.median)


def _with_interval(values: np.ndarray, of: Any) -> dict[str, float]:
    """A figure over inputs with its 95 % bootstrap interval."""
    draw = np.random.default_rng(SEED)
    picked = values[draw.integers(0, len(values), (RESAMPLED, len(values)))]
    low, high = np.quantile(of(picked, axis=1), (0.025, 0.975))
    return {"value": float(of(values)), "low": float(low), "high": float(high)}


# the page


def markdown(found: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| network | method | distance of the sum from the score, median | "
        "fall of the probability when the top is deleted |",
        "|---|---|---|---|",
    ]
    for network, result in found["networks"].items():
        for name, row in result["methods"].items():
            distance = row.get("distance from the score")
            drop = row["drop"]["mean"]
            cells = (
                _share(distance) if distance else "",
                f"{drop['value']:.3f} ({drop['low']:.3f} to {drop['high']:.3f})",
            )
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    promise = {
        network: _share(result["methods"]["integrated gradients"]["distance from its promise"])
        for network, result in found["networks"].items()
    }
    kept = "; ".join(f"{share} on {network}" for network, share in promise.items())
    lines += ["", f"Integrated gradients keep their own promise to a median of {kept}."]
    return "\n".join(lines)


def _share(figure: dict[str, float]) -> str:
    """A distance relative to the score."""
    if figure["value"] < 1e-4:
        return f"{figure['value']:.0e}"
    low, value, high = (100 * figure[k] for k in ("low", "value", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    """Measure the networks that the file of results lacks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the movie reviews and CIFAR-10")
    parser.add_argument("--vit", type=Path, default=Path("small-vit.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/transformer-peers.json"))
    parser.add_argument("--docs", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    tasks: dict[str, Callable[[], Task]] = {
        "`transformer-reviews`": partial(sentences, arguments.data),
        "vision transformer": partial(pictures, arguments.vit, arguments.data),
    }
    for name, make in tasks.items():
        if name not in found["networks"]:
            result = measured(make())
            networks = {**found["networks"], name: result}
            found = {"environment": environment(), "networks": networks}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.docs:
        PLACE.check(arguments.docs)
        PLACE.fill(arguments.docs, markdown(found))


if __name__ == "__main__":
    main()
