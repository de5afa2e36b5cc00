"""A network that reads sentences, and what each word and each bias adds to one of its units."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adjointbackmap.capture.entering import Embedded
from adjointbackmap.display import Shown, Summary, Table
from adjointbackmap.engine.network import Network
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.planes.receipts import BIASES
from adjointbackmap.text import page
from adjointbackmap.text.words import MOST_WORDS, PADDING, Vocabulary, tokenise
from adjointbackmap.tracing import trace

FROZEN = "frozen"


@dataclass(frozen=True, repr=False)
class Reading(Shown):
    """What words and biases add to one unit at a sentence: they sum to its value.

    Attributes:
        sentence: The sentence.
        words: Each word or punctuation mark, and what it adds, in the order of the sentence.
        biases: Each part of the bias vector, and what it adds; the small ones in one line.
        value: What the untouched model computes for the unit.
        unit: The unit in words, such as ``output, positive``.
        title: Name of the network.
        predicted: Name of the class that the network chooses.
        unknown: Words that the network does not know.
        note: What must be said of the hyperplane; empty if it is the derivative.
        planes: The hyperplane, in the shape ``(1, 1, T, D)`` of one unit.
    """

    sentence: str
    words: tuple[tuple[str, float], ...]
    biases: tuple[tuple[str, float], ...]
    value: float
    unit: str
    title: str
    predicted: str
    unknown: tuple[str, ...]
    note: str
    planes: Hyperplanes = field(compare=False)

    @property
    def of_words(self) -> float:
        """What all words add."""
        return sum(amount for _, amount in self.words)

    @property
    def of_biases(self) -> float:
        """What all biases add."""
        return sum(amount for _, amount in self.biases)

    @property
    def total(self) -> float:
        """Words and biases together."""
        return self.of_words + self.of_biases

    @property
    def error(self) -> float:
        """The sum minus the model's value: rounding."""
        return self.total - self.value

    def html(self) -> str:
        """A whole page that needs nothing else: the words coloured by what they add."""
        return page.whole(self)

    def _repr_html_(self) -> str:
        return page.part(self)

    def _summary(self) -> Summary:
        facts = {
            "unit": self.unit,
            "prediction": self.predicted,
            "words + biases": f"{self.of_words:+.5g} {self.of_biases:+.5g} = {self.total:.5g}",
            "value of the model": f"{self.value:.5g}",
            "difference": f"{self.error:.1e}",
        }
        if self.unknown:
            facts["unknown words"] = ", ".join(self.unknown)
        if self.note:
            facts["gates"] = self.note
        tables = {
            "": Table(("word", "adds"), [(w, f"{amount:+.5g}") for w, amount in self.words]),
            "biases": Table(("part", "adds"), [(n, f"{amount:+.5g}") for n, amount in self.biases]),
        }
        return Summary(f"Reading of {self.title}", facts, tables)


class Reader(Shown):
    """A network that reads sentences, with the words that it knows.

    Args:
        model: Takes token numbers ``(N, T)`` and gives class scores ``(N, classes)``.
        vocabulary: Its words.
        classes: Names of its classes.
        title: Its name.
        after: Name of the module that gives the embeddings of tokens.
        curved: What to do with curved operations, see :func:`adjointbackmap.trace`.

    Example:
        >>> from adjointbackmap import models
        >>> reader = models.reader("textcnn-reviews")
        >>> reading = reader.read("A moving, thoughtful film.")
        >>> [word for word, _ in reading.words], reading.predicted
        (['a', 'moving', ',', 'thoughtful', 'film', '.'], 'positive')
        >>> abs(reading.error) < 1e-12
        True
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Vocabulary,
        classes: Sequence[str],
        title: str,
        after: str = "embed",
        curved: str = FROZEN,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.classes = tuple(classes)
        self.title = title
        self.after = after
        self.curved = curved

    def _summary(self) -> Summary:
        facts = {
            "words": f"{len(self.vocabulary):,}",
            "classes": ", ".join(self.classes),
            "longest sentence": f"{MOST_WORDS} words and punctuation marks",
        }
        return Summary(f"Reader {self.title}", facts)

    @cached_property
    def network(self) -> Network:
        """The network after the embedding, for ``MOST_WORDS`` tokens; traced when needed."""
        example = torch.full((1, MOST_WORDS), PADDING)
        example[0, 0] = PADDING + 1  # a sentence has at least one word
        return trace(self.model, example, after=self.after, curved=self.curved)

    def tokens(self, sentences: str | Sequence[str]) -> Tensor:
        """Token numbers ``(N, MOST_WORDS)``, filled up.

        Raises:
            ValueError: If a sentence has no word, or too many.
        """
        found = self.vocabulary.tokens(sentences)
        missing = MOST_WORDS - found.shape[1]
        return nn.functional.pad(found, (0, missing), value=PADDING)

    def embed(self, sentences: str | Sequence[str]) -> Embedded:
        """The input of :attr:`network` for sentences, ``(N, MOST_WORDS, D)``."""
        return self.network.embed(self.tokens(sentences))

    def scores(self, sentences: str | Sequence[str]) -> Float[Tensor, "n classes"]:
        """Class scores of sentences, from the model itself."""
        with torch.no_grad():
            return self.model(self.vocabulary.tokens(sentences))

    def read(
        self,
        sentence: str,
        layer: str = "output",
        units: Any = None,
        dtype: torch.dtype | str = "float64",
    ) -> Reading:
        """What each word and each bias adds to one unit.

        Args:
            sentence: Any text of at most ``MOST_WORDS`` words and punctuation marks.
            layer: Name of a layer of :attr:`network`.
            units: The unit, a tuple of ints; by default the predicted class.
            dtype: Precision.

        Raises:
            ValueError: If the sentence is empty or too long, there is no such layer, or ``units``
                is not one unit.
        """
        if units is None and layer != "output":
            shape = self.network.layer(layer).out_shape
            msg = (
                f"units must be one unit of {layer!r}, whose output has the shape {shape}. "
                "Got none: give a tuple of ints."
            )
            raise ValueError(msg)
        x = self.embed(sentence)
        chosen = "predicted" if units is None else units
        planes = hyperplanes(self.network, x, layer, units=chosen, dtype=dtype)
        if planes.value.numel() != 1:
            msg = f"units must be one unit. Got {planes.value.numel()}: give a tuple of ints."
            raise ValueError(msg)
        words = tokenise(sentence)
        # (1, units, T, D) -> one amount for each token; those after the sentence add nothing
        each = planes.contributions().image.sum(-1).flatten().tolist()
        receipt = planes.receipt()
        biases = [(line.name, line.amount) for line in receipt.lines if line.kind == BIASES]
        predicted = self.classes[int(self.scores(sentence).argmax())]
        return Reading(
            sentence=sentence,
            words=tuple(zip(words, each[: len(words)], strict=True)),
            biases=tuple(biases),
            value=float(planes.value),
            unit=self._unit_in_words(layer, planes, predicted if units is None else None),
            title=self.title,
            predicted=predicted,
            unknown=tuple(self.vocabulary.unknown(sentence)),
            note=self.network.note,
            planes=planes,
        )

    def _unit_in_words(self, layer: str, planes: Hyperplanes, predicted: str | None) -> str:
        if predicted is not None:
            return f"{layer}, {predicted}"
        if layer == "output":
            return f"{layer}, {self.classes[int(planes.units.flat.flatten()[0])]}"
        return planes.single().name
