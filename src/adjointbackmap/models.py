"""The five networks of the study, built with the names and the conventions of its tables.

Two more read sentences; they are built in :mod:`adjointbackmap.text.networks`.

Layers are called ``conv0`` ... ``conv18`` and ``fc`` as in Tables A.1, A.2, B.1, B.4 and B.5 of
[Wan2022]. TensorFlow's conventions are kept: leaky ReLU with slope 0.2, batch norm with eps 0.001,
"same" padding (at stride 2: nothing before, one after), average pooling that leaves padding out of
the count. The tables list one more activation after ``fc``; our networks return its linear output,
from which every published value is taken.
"""

from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap.files.checked import OF_FILE, compare, read_sealed, sha256_of
from adjointbackmap.files.weights import load_weights, read_safetensors
from adjointbackmap.text.networks import NETWORKS as OF_SENTENCES
from adjointbackmap.text.readers import FROZEN, Reader
from adjointbackmap.text.reviews import CLASSES as OF_REVIEWS
from adjointbackmap.text.words import Vocabulary, of_lines

# Defaults of TensorFlow, which the study used. PyTorch's are 0.01 and 0.00001.
LEAKY_SLOPE = 0.2
BATCH_NORM_EPS = 0.001
SMALL_START = 0.1  # of He's deviation: a branch adds a few per cent to its block at first
INSTALL_AGAIN = "install the package again"
# In- and out-channels of each convolution, and of each residual block.
VGG7_CHANNELS = ((3, 32), (32, 32), (32, 64), (64, 64), (64, 96), (96, 96))
BLOCK_CHANNELS = ((32, 32),) * 3 + ((32, 64),) + ((64, 64),) * 2 + ((64, 96),) + ((96, 96),) * 2
# Mean and standard deviation of CIFAR-10's pixels per channel, as the study gives them.
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution without bias under TensorFlow's "same" padding."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        padding = 1 if stride == 1 else 0
        super().__init__(in_channels, out_channels, 3, stride, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)``; at stride 2 pad one row below and one column to the right."""
        return super().forward(x if self.stride == (1, 1) else F.pad(x, (0, 1, 0, 1)))


def _shortcut(x: Tensor, out_channels: int) -> Tensor:
    """Identity, or every second pixel with the missing channels appended as zeros."""
    missing = out_channels - x.shape[1]
    if not missing:
        return x
    # padding of the last axis comes first: columns, rows, channels
    return F.pad(F.avg_pool2d(x, 1, stride=2), (0, 0, 0, 0, 0, missing))


class VGG7(nn.Module):
    """Six convolutions and a linear layer.

    Table B.1 has batch norm, Table A.1 has no biases.

    Without batch norm the kernels are initialised with He's variance. With PyTorch's own variance
    the signal would fade from layer to layer.
    """

    def __init__(self, classes: int = 10, batch_norm: bool = True) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(VGG7_CHANNELS):
            self.add_module(f"conv{i}", Conv3x3(inputs, outputs))
            if batch_norm:
                self.add_module(f"bn{i}", nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS))
            else:
                nn.init.kaiming_normal_(self.get_parameter(f"conv{i}.weight"), nonlinearity="relu")
        self.fc = nn.Linear(96, classes, bias=False)
        self.batch_norm = batch_norm

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, 32, 32)`` to class scores ``(N, classes)``."""
        for i in range(len(VGG7_CHANNELS)):
            x = getattr(self, f"conv{i}")(x)
            if self.batch_norm:
                x = getattr(self, f"bn{i}")(x)
            x = F.relu(x)
            if i in (1, 3):  # the study's "same" pooling, without the padding in the count
                x = F.avg_pool2d(x, 3, stride=2, ceil_mode=True)
        return self.fc(x.mean((2, 3)))


class ResNet20(nn.Module):
    """Nine residual blocks with batch norm and leaky ReLU (Table B.4, with the stem's ``bn0``)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv0 = Conv3x3(3, 32)
        self.bn0 = nn.BatchNorm2d(32, eps=BATCH_NORM_EPS)
        for i, (inputs, outputs) in enumerate(BLOCK_CHANNELS):
            # block i has the convolutions 2 i + 1 and 2 i + 2
            for j, before in ((2 * i + 1, inputs), (2 * i + 2, outputs)):
                stride = 1 if before == outputs else 2
                self.add_module(f"conv{j}", Conv3x3(before, outputs, stride))
                self.add_module(f"bn{j}", nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS))
        self.fc = nn.Linear(96, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, 32, 32)`` to class scores ``(N, classes)``."""

        def unit(j: int, x: Tensor) -> Tensor:
            return getattr(self, f"bn{j}")(getattr(self, f"conv{j}")(x))

        x = F.leaky_relu(unit(0, x), LEAKY_SLOPE)
        for i, (_, outputs) in enumerate(BLOCK_CHANNELS):
            branch = unit(2 * i + 2, F.leaky_relu(unit(2 * i + 1, x), LEAKY_SLOPE))
            x = F.leaky_relu(branch + _shortcut(x, outputs), LEAKY_SLOPE)
        return self.fc(x.mean((2, 3)))


class FixupResNet20(nn.Module):
    """Nine residual blocks with a scalar multiplier each.

    Table A.2 has no biases, Table B.5 has 37 scalar biases.

    ``b0`` ... ``b36`` are the scalar biases, ``m2`` ... ``m18`` the multipliers, numbered as in the
    tables. Both are zero-dimensional parameters. The initialisation is Fixup's: the second
    convolution of each block and ``fc`` start at zero.
    """

    def __init__(self, classes: int = 10, biases: bool = True) -> None:
        super().__init__()
        self.conv0 = Conv3x3(3, 32)
        for i, (inputs, outputs) in enumerate(BLOCK_CHANNELS):
            stride = 1 if inputs == outputs else 2
            self.add_module(f"conv{2 * i + 1}", Conv3x3(inputs, outputs, stride))
            self.add_module(f"conv{2 * i + 2}", Conv3x3(outputs, outputs))
            self.register_parameter(f"m{2 * i + 2}", nn.Parameter(torch.ones(())))
        self.fc = nn.Linear(96, classes, bias=False)
        for i in range(37 if biases else 0):
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(())))
        self.biases = biases
        self._initialise()

    def _initialise(self) -> None:
        """Fixup: in each of L blocks, L^(-1/2) for the first convolution, 0 for the second.

        Without biases the second starts small. The shortcut of a wider block adds zeros to the new
        channels: at 0 they would stay on the kink of ReLU, where no gradient comes.
        """
        blocks = len(BLOCK_CHANNELS)
        nn.init.kaiming_normal_(self.conv0.weight, mode="fan_out", nonlinearity="relu")
        for i in range(blocks):
            first, second = (self.get_parameter(f"conv{2 * i + j}.weight") for j in (1, 2))
            nn.init.kaiming_normal_(first, mode="fan_out", nonlinearity="relu")
            first.data.mul_(blocks**-0.5)
            if self.biases:
                nn.init.zeros_(second)
            else:
                nn.init.kaiming_normal_(second, mode="fan_out", nonlinearity="relu")
                second.data.mul_(SMALL_START)
        nn.init.zeros_(self.fc.weight)

    def _plus(self, i: int, x: Tensor) -> Tensor:
        """Add the scalar bias ``b{i}``, if the network has biases."""
        return x + getattr(self, f"b{i}") if self.biases else x

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``(N, 3, 32, 32)`` to class scores ``(N, classes)``."""
        x = F.relu(self._plus(0, self.conv0(x)))
        for i, (inputs, outputs) in enumerate(BLOCK_CHANNELS):
            first, second = (getattr(self, f"conv{2 * i + j}") for j in (1, 2))
            # block i has the biases 4 i + 1 to 4 i + 4
            shifted = self._plus(4 * i + 1, x)
            branch = F.relu(self._plus(4 * i + 2, first(shifted)))
            branch = second(self._plus(4 * i + 3, branch)) * getattr(self, f"m{2 * i + 2}")
            shortcut = x if inputs == outputs else _shortcut(shifted, outputs)
            x = F.relu(self._plus(4 * i + 4, branch) + shortcut)
        return self.fc(x.mean((2, 3)))


class Normalise(nn.Module):
    """Map pixels in [0, 1] to zero mean and unit variance per channel.

    Args:
        mean: Mean of each channel, or one for all. The default is the study's.
        std: Standard deviation of each channel, or one for all.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise ``(..., 3, H, W)``."""
        mean = self.mean
        std = self.std
        if mean.device != pixels.device:  # only then: torch.export records any `to` as a cast
            mean = mean.to(pixels.device)
            std = std.to(pixels.device)
        return (pixels - mean) / std


ARCHITECTURES: dict[str, tuple[Callable[[int], nn.Module], type[nn.Module]]] = {
    "vgg7-nobias": (lambda classes: VGG7(classes, batch_norm=False), Normalise),
    "fixup-resnet20-nobias": (lambda classes: FixupResNet20(classes, biases=False), Normalise),
    "vgg7": (VGG7, nn.Identity),
    "resnet20": (ResNet20, nn.Identity),
    "fixup-resnet20": (FixupResNet20, Normalise),
}
"""Architecture -> its constructor for a number of classes, and the class of its preprocessing."""


def architecture(name: str) -> str:
    """Architecture of a network.

    It is ``"vgg7"`` for ``"vgg7"``, ``"vgg7-cifar10"`` and ``"vgg7-cifar100"``, and ``"textcnn"``
    for ``"textcnn-reviews"``.

    Raises:
        ValueError: If ``name`` is neither an architecture nor one followed by a data set.
    """
    stem = name.removesuffix("-cifar100").removesuffix("-cifar10")
    sentences = stem.removesuffix("-reviews")
    if sentences in OF_SENTENCES:
        return sentences
    if stem not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        msg = (
            f"A network must be one of {known}, or one of these with -cifar10 or -cifar100. "
            f"Got {name!r}."
        )
        raise ValueError(msg)
    return stem


def build(name: str, classes: int = 10) -> nn.Module:
    """Build a network with its own initialisation, in train mode.

    Args:
        name: ``"vgg7-nobias"``, ``"fixup-resnet20-nobias"``, ``"vgg7"``, ``"resnet20"`` or
            ``"fixup-resnet20"``; or ``"textcnn"`` or ``"transformer"``, which read sentences.
        classes: Number of outputs of ``fc``; for the networks of sentences the number of words
            that they know.

    Returns:
        A module that takes ``(N, 3, 32, 32)`` and gives ``(N, classes)``, or token numbers
        ``(N, T)`` and gives ``(N, 2)``.

    Example:
        >>> kernels = [p for p in build("resnet20").parameters() if p.dim() > 1]
        >>> sum(p.numel() for p in kernels)
        729888
    """
    stem = architecture(name)
    if stem in OF_SENTENCES:
        return OF_SENTENCES[stem](classes)
    return ARCHITECTURES[stem][0](classes)


def preprocessing(name: str) -> nn.Module:
    """Map from pixels in [0, 1] to the input of a network.

    It is the study's normalisation, or the identity; the identity too for networks of sentences.

    Args:
        name: An architecture or a shipped name.

    Example:
        >>> preprocessing("vgg7-cifar10")
        Identity()
    """
    stem = architecture(name)
    return nn.Identity() if stem in OF_SENTENCES else ARCHITECTURES[stem][1]()


def names(takes: str = "images") -> tuple[str, ...]:
    """Names of the trained networks that ship with the package.

    Args:
        takes: ``"images"`` for the networks of the study, ``"sentences"`` for those that take token
            numbers, or ``"all"``.

    Raises:
        ValueError: If ``takes`` is none of these.

    Example:
        >>> "vgg7-cifar10" in names()
        True
        >>> names("sentences")
        ('textcnn-reviews', 'transformer-reviews')
    """
    if takes not in ("images", "sentences", "all"):
        msg = f"takes must be images, sentences or all. Got {takes!r}: give one of these."
        raise ValueError(msg)
    suffix = ".safetensors"
    found = [f.name for f in _assets().iterdir() if f.name.endswith(suffix)]
    every = sorted(name.removesuffix(suffix) for name in found)
    if takes == "all":
        return tuple(every)
    return tuple(name for name in every if takes_sentences(name) == (takes == "sentences"))


def takes_sentences(name: str) -> bool:
    """Whether a network takes the token numbers of sentences.

    Args:
        name: An architecture or a shipped name.

    Raises:
        ValueError: If there is no such architecture.

    Example:
        >>> takes_sentences("textcnn-reviews"), takes_sentences("vgg7-cifar10")
        (True, False)
    """
    return architecture(name) in OF_SENTENCES


def vocabulary(name: str) -> Vocabulary:
    """The words that a shipped network of sentences knows.

    Args:
        name: One of ``names("sentences")``.

    Raises:
        ValueError: If it is none of these, or its file is damaged.

    Example:
        >>> vocabulary("textcnn-reviews").tokens("a good film").shape
        torch.Size([1, 3])
    """
    if name not in names("sentences"):
        known = ", ".join(names("sentences"))
        msg = f"A network of sentences must be one of {known}. Got {name!r}: name one."
        raise ValueError(msg)
    with as_file(_assets() / f"{name}.words.txt") as path:
        compare(sha256_of(path), card(name)["words sha256"], path, "its card", INSTALL_AGAIN)
        return of_lines(path.read_text(encoding="utf-8"))


def load(name: str) -> nn.Module:
    """Load a trained network in eval mode.

    Args:
        name: One of ``names("all")``.

    Raises:
        ValueError: If no such network is shipped, or its file is damaged.

    Example:
        >>> load("vgg7-cifar10").training
        False
    """
    about = card(name)
    model = build(name, about["words" if takes_sentences(name) else "classes"])
    with as_file(_assets() / f"{name}.safetensors") as path:
        if OF_FILE in about:
            compare(sha256_of(path), about[OF_FILE], path, "its card", INSTALL_AGAIN)
        load_weights(model, read_safetensors(path), path)
    return model.eval()


def reader(name: str, curved: str = FROZEN) -> Reader:
    """A shipped network that reads sentences, with its words.

    Args:
        name: One of ``names("sentences")``.
        curved: What to do with curved operations, see :func:`adjointbackmap.trace`. It changes
            nothing for ``"textcnn-reviews"``, which is piecewise affine.

    Raises:
        ValueError: If it is none of these, or its file is damaged.

    Example:
        >>> reader("transformer-reviews").read("a gripping story").predicted
        'positive'
    """
    words = vocabulary(name)
    return Reader(load(name), words, OF_REVIEWS, name, curved=curved)


def card(name: str) -> dict[str, Any]:
    """The card of a trained network.

    It has data, recipe, seed, accuracies, time, machine, and the SHA-256 of the weights' file.

    Raises:
        ValueError: If no such network is shipped, or the card is damaged.

    Example:
        >>> card("vgg7-cifar10")["dataset"]
        'cifar10'
    """
    _check_shipped(name)
    with as_file(_assets() / f"{name}.json") as path:
        return read_sealed(path, INSTALL_AGAIN)


def _assets() -> Traversable:
    return files("adjointbackmap") / "assets"


def _check_shipped(name: str) -> None:
    if name not in names("all"):
        msg = f"A shipped network must be one of {', '.join(names('all'))}. Got {name!r}."
        raise ValueError(msg)
