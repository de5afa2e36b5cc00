"""Two small networks that read sentences: a convolutional network and a transformer.

Both take token numbers ``(N, T)`` and give a score for each class ``(N, 2)``. Shorter sentences of
a batch are filled up with zeros, which change nothing: each sentence has the scores that it has
alone, to rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap.text.reviews import CLASSES
from adjointbackmap.text.words import MOST_WORDS, PADDING

WIDTHS = (3, 4, 5)  # words in a window, as in the paper
FEATURES = 100  # for each width, as in the paper
CNN_WIDTH = 48  # numbers of a word; the paper has 300, which would not fit into 3 MB
EMBEDDING_START = 0.3  # deviation of the numbers of a word: with PyTorch's 1, training is slow
PLACE_START = 0.02  # of the numbers of a place: much less, so that words come first
TRANSFORMER_WIDTH = 48
HEADS = 4
BLOCKS = 2
DROPOUT = 0.5  # of the embeddings, and of what is classified
BLOCK_DROPOUT = 0.2


class TextCNN(nn.Module):
    """Convolutional network for sentences with ReLU and the maximum over time [Kim2014].

    It is piecewise affine in the embeddings of the words.

    Args:
        words: Number of words in the vocabulary.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, CNN_WIDTH, padding_idx=PADDING)
        self.embed.weight.data.mul_(EMBEDDING_START)
        for width in WIDTHS:
            # as many zeros at both ends as let every window with at least one word count
            conv = nn.Conv1d(CNN_WIDTH, FEATURES, width, padding=width - 1)
            self.add_module(f"conv{width}", conv)
        self.drop = nn.Dropout(DROPOUT)
        self.fc = _classifier(len(WIDTHS) * FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers ``(N, T)`` to class scores ``(N, 2)``."""
        x = self.drop(self.embed(tokens)).transpose(1, 2)
        is_word = (tokens != PADDING)[:, None]  # (N, 1, T)
        features = []
        for width in WIDTHS:
            u = F.relu(getattr(self, f"conv{width}")(x))
            # window i covers the words i - width + 1 to i: the first ones always have a word
            has_word = F.pad(is_word, (width - 1, 0), value=True)
            features.append(torch.where(has_word, u, 0.0).max(-1).values)
        return self.fc(self.drop(torch.cat(features, 1)))


class Block(nn.Module):
    """Pre-norm block of a transformer: attention, then two linear layers with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(BLOCK_DROPOUT)

    def forward(self, x: Tensor, is_word: Tensor | None = None) -> Tensor:
        """Map ``(N, T, D)`` to the same shape; attention looks at the words alone."""
        n, t, width = x.shape
        # (N, T, 3 D) -> three of (N, T, D) -> three of (N, heads, T, D / heads)
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.view(n, t, HEADS, width // HEADS).transpose(1, 2) for part in parts)
        mask = None if is_word is None else is_word[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, t, width)))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


class SentenceTransformer(nn.Module):
    """Small pre-norm encoder with GELU; the mean over the words is classified.

    Args:
        words: Number of words in the vocabulary.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, TRANSFORMER_WIDTH, padding_idx=PADDING)
        self.embed.weight.data.mul_(EMBEDDING_START)
        self.places = nn.Parameter(PLACE_START * torch.randn(MOST_WORDS, TRANSFORMER_WIDTH))
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block(TRANSFORMER_WIDTH) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(TRANSFORMER_WIDTH)
        self.fc = _classifier(TRANSFORMER_WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers ``(N, T)`` to class scores ``(N, 2)``."""
        is_word = tokens != PADDING  # (N, T)
        x = self.drop(self.embed(tokens) + self.places[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, is_word)
        words = torch.where(is_word[:, :, None], self.norm(x), 0.0)
        return self.fc(self.drop(words.sum(1) / is_word.sum(1, keepdim=True)))


def _classifier(width: int) -> nn.Linear:
    """A linear layer that starts at zero.

    The gradients of the two classes are then opposite in every step, and so are their scores.
    """
    layer = nn.Linear(width, len(CLASSES))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "textcnn": TextCNN,
    "transformer": SentenceTransformer,
}
"""Architecture -> its class."""
