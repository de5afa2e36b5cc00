"""From a sentence to token numbers: a tokeniser of spaces and punctuation, and a vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

PADDING = 0  # fills up the shorter sentences of a batch
UNKNOWN = 1  # stands for every word that is not in the vocabulary
SPECIAL = ("<padding>", "<unknown>")
MOST_WORDS = 64  # the longest sentence of the reviews has 61 tokens
# A word before "n't", "n't" itself, an ending after an apostrophe such as "'s", a word, or one
# punctuation mark.
TOKEN = re.compile(r"\w+(?=n't)|n't|'\w+|\w+|[^\w\s]")


def tokenise(sentence: str) -> list[str]:
    """Split a sentence into lower-case words and punctuation marks.

    Args:
        sentence: Any text.

    Returns:
        The tokens, in their order.

    Example:
        >>> tokenise("It's good, isn't it?")
        ['it', "'s", 'good', ',', 'is', "n't", 'it', '?']
    """
    return TOKEN.findall(sentence.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words that a network knows, each with its number.

    Attributes:
        words: The words by their numbers. The first two are the padding and the unknown word.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[str], at_least: int) -> "Vocabulary":
        """The words that occur in sentences at least so often, the most frequent first."""
        counts = Counter(word for sentence in sentences for word in tokenise(sentence))
        kept = [word for word, count in counts.items() if count >= at_least]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *kept))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Word -> number."""
        return {word: number for number, word in enumerate(self.words)}

    def unknown(self, sentence: str) -> list[str]:
        """The words of a sentence that the network does not know, in their order."""
        return [word for word in tokenise(sentence) if word not in self.numbers]

    def tokens(self, sentences: str | Sequence[str]) -> Int[Tensor, "n t"]:
        """The token numbers of sentences.

        Args:
            sentences: One sentence or several.

        Returns:
            Numbers ``(N, T)``, where T is the length of the longest sentence. Shorter ones are
            filled up with ``PADDING``.

        Raises:
            ValueError: If a sentence has no word, or more than ``MOST_WORDS``.

        Example:
            >>> Vocabulary((*SPECIAL, "good", "film")).tokens(["a good film", "good"]).tolist()
            [[1, 2, 3], [2, 0, 0]]
        """
        several = [sentences] if isinstance(sentences, str) else list(sentences)
        rows = [self._row(sentence) for sentence in several]
        if not rows:
            msg = "Sentences must be at least one. Got an empty list: give a sentence."
            raise ValueError(msg)
        filled = torch.full((len(rows), max(map(len, rows))), PADDING)
        for i, row in enumerate(rows):
            filled[i, : len(row)] = torch.tensor(row)
        return filled

    def _row(self, sentence: str) -> list[int]:
        """The token numbers of one sentence.

        Raises:
            ValueError: If it has no word, or too many.
        """
        row = [self.numbers.get(word, UNKNOWN) for word in tokenise(sentence)]
        if not row:
            msg = f"A sentence must have a word or a punctuation mark. Got {sentence!r}: give one."
            raise ValueError(msg)
        if len(row) > MOST_WORDS:
            msg = (
                f"A sentence must have at most {MOST_WORDS} words and punctuation marks. "
                f"Got {len(row)}: give a part of it."
            )
            raise ValueError(msg)
        return row


def of_lines(text: str) -> Vocabulary:
    """The vocabulary of a text with a word on each line, as training writes it."""
    return Vocabulary(tuple(text.split("\n")[:-1]))  # the last line ends with a line feed
