"""Networks that the command train has written, each with its card."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adjointbackmap import data, models
from adjointbackmap.engine.folding import fold
from adjointbackmap.engine.network import Network
from adjointbackmap.files.checked import OF_FILE, compare, read_sealed
from adjointbackmap.files.weights import load_weights, read_weights
from adjointbackmap.sources import CIFAR_SHAPE, Subject
from adjointbackmap.study.setup import Trained

PLAIN = "plain"


@dataclass(frozen=True)
class Candidate(Trained):
    """A trained network in the folder of its training, with the images of one split.

    Attributes:
        folder: Folder that ``adjointbackmap train`` wrote.
        split: ``"validation"`` or ``"test"``.
    """

    folder: Path = Path()
    split: str = "validation"

    @classmethod
    def of(cls, folder: Path, root: Path | None, split: str) -> "Candidate":
        """The network of a folder.

        Args:
            folder: Folder of a finished training.
            root: Folder of the official binary files.
            split: Split of the images.

        Raises:
            ValueError: If the folder has no finished training, or several.
        """
        cards = [
            path for path in folder.glob("*.json") if path.with_suffix(".safetensors").exists()
        ]
        if len(cards) != 1:
            msg = (
                "A run must be a folder of one finished training, with weights and card. "
                f"Got {folder}, which has {len(cards)}: train it to the end."
            )
            raise ValueError(msg)
        return cls(cards[0].stem, root, sample=False, folder=folder, split=split)

    @property
    def title(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @cached_property
    def card(self) -> dict[str, Any]:
        """How it was trained."""
        return read_sealed(self.folder / f"{self.name}.json", "train it again")

    @property
    def words(self) -> str:
        """What its training differs in from the plain one."""
        recipe = self.card["recipe"]
        objective = recipe.get("objective", PLAIN)
        if objective == PLAIN:
            # cards of older versions have no L1
            return f"plain, weight decay {recipe['weight_decay']:g}, L1 {recipe.get('l1', 0):g}"
        words = f"{objective}, radius {255 * recipe['radius']:g}/255"
        return words if objective == "adversarial" else f"{words}, strength {recipe['strength']:g}"

    @cached_property
    def images(self) -> data.Images:
        """All images of the split, in the order of their hashes."""
        return data.load(self.card["dataset"], self.split, self.root).by_hash()

    @cached_property
    def subject(self) -> Subject:
        """The folded module and the map from pixels to its input."""
        path = self.folder / f"{self.name}.safetensors"
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        compare(sha, self.card[OF_FILE], path, f"{self.name}.json", "train it again")
        model = models.build(self.card["network"], self.card["classes"])
        load_weights(model, read_weights(path), path)
        module = fold(model.eval(), torch.zeros(1, *CIFAR_SHAPE)).model
        prepare = models.preprocessing(self.card["network"])
        classes = data.SOURCES[self.card["dataset"]].classes
        return Subject(module, prepare, classes, self.title, CIFAR_SHAPE)

    @cached_property
    def network(self) -> Network:
        """The folded module, traced in its own input."""
        return self.subject.trace()

    @cached_property
    def known(self) -> torch.Tensor:
        """Which images it classifies correctly, ``(N,)``."""
        parts = self.images.pixels.split(500)
        with torch.no_grad():
            scores = [self.subject.module(self.input(part.float() / 255)) for part in parts]
        return torch.cat(scores).argmax(1) == self.images.labels
