"""The five networks of the study, built with the names and the conventions of its tables.

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

    It is ``"vgg7"`` for ``"vgg7"``, ``"vgg7-cifar10"`` and ``"vgg7-cifar100"``.

    Raises:
        ValueError: If ``name`` is neither an architecture nor one followed by a data set.
    """
    stem = name.removesuffix("-cifar100").removesuffix("-cifar10")
    if stem not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        msg = (
            f"A network must be one of {known}, or one of these with -cifar10 or -cifar100. "
            f"Got {name!r}."
        )
        raise ValueError(msg)
    return stem


def build(name: str, classes: int = 10) -> nn.Module:
    """Build a network of the study with its own initialisation, in train mode.

    Args:
        name: ``"vgg7-nobias"``, ``"fixup-resnet20-nobias"``, ``"vgg7"``, ``"resnet20"`` or
            ``"fixup-resnet20"``.
        classes: Number of outputs of ``fc``.

    Returns:
        A module that takes ``(N, 3, 32, 32)`` and gives ``(N, classes)``.

    Example:
        >>> kernels = [p for p in build("resnet20").parameters() if p.dim() > 1]
        >>> sum(p.numel() for p in kernels)
        729888
    """
    return ARCHITECTURES[architecture(name)][0](classes)


def preprocessing(name: str) -> nn.Module:
    """Map from pixels in [0, 1] to the input of a network.

    It is the study's normalisation, or the identity.

    Args:
        name: An architecture or a shipped name.

    Example:
        >>> preprocessing("vgg7-cifar10")
        Identity()
    """
    return ARCHITECTURES[architecture(name)][1]()


def names() -> tuple[str, ...]:
    """Names of the trained networks that ship with the package.

    Example:
        >>> "vgg7-cifar10" in names()
        True
    """
    suffix = ".safetensors"
    found = [f.name for f in _assets().iterdir() if f.name.endswith(suffix)]
    return tuple(sorted(name.removesuffix(suffix) for name in found))


def load(name: str) -> nn.Module:
    """Load a trained network of the study in eval mode.

    Args:
        name: One of :func:`names`.

    Raises:
        ValueError: If no such network is shipped, or its file is damaged.

    Example:
        >>> load("vgg7-cifar10").training
        False
    """
    about = card(name)
    model = build(name, classes=about["classes"])
    with as_file(_assets() / f"{name}.safetensors") as path:
        if OF_FILE in about:
            compare(sha256_of(path), about[OF_FILE], path, "its card", INSTALL_AGAIN)
        load_weights(model, read_safetensors(path), path)
    return model.eval()


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
    if name not in names():
        msg = f"A shipped network must be one of {', '.join(names())}. Got {name!r}."
        raise ValueError(msg)
