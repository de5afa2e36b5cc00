"""The networks of the benchmark.

They are two of the study, a ResNet-18 at 224 x 224, and two families of growing networks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap import data, models
from adjointbackmap.engine.folding import fold
from adjointbackmap.engine.network import Network
from adjointbackmap.tracing import trace

SAMPLE_IMAGES = 64  # of the entry for the classes
GROWING_CHANNELS = 16  # of the growing networks


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, with torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.downsample = nn.Identity() if inputs == outputs else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.downsample(x))


class ResNet18(nn.Module):
    """The standard layout for images of 224 x 224 [He2016], with torchvision's names."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            first = BasicBlock(widths[i - 1], widths[i], 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, BasicBlock(widths[i], widths[i])))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, 224, 224)`` to class scores."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))


def stack() -> nn.Sequential:
    """Four convolutions with a pooling between them, for images of any side."""
    convs = [
        nn.Conv2d(inputs, GROWING_CHANNELS, 3, padding=1)
        for inputs in (3, GROWING_CHANNELS, GROWING_CHANNELS, GROWING_CHANNELS)
    ]
    layers: list[nn.Module] = [part for conv in convs for part in (conv, nn.ReLU())]
    return nn.Sequential(*layers[:4], nn.AvgPool2d(2), *layers[4:])


def blocks(depth: int) -> nn.Sequential:
    """A convolution and ``depth`` residual blocks, all at one resolution."""
    return nn.Sequential(
        nn.Conv2d(3, GROWING_CHANNELS, 3, padding=1),
        nn.ReLU(),
        *(BasicBlock(GROWING_CHANNELS, GROWING_CHANNELS) for _ in range(depth)),
    )


def with_random_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without zero layers or trivial batch norms; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
            else:
                if key.startswith("m"):  # Fixup's multipliers
                    parameter.data = torch.empty_like(parameter).uniform_(0.2, 0.6)
                parameter.data += 0.1 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").normal_(0, 0.3)
                module.get_buffer("running_var").uniform_(0.5, 2)
    return model


@dataclass(frozen=True)
class BenchmarkNetwork:
    """A network, its folded module and its images ``(N, 3, side, side)``."""

    network: Network
    model: nn.Module
    x: Tensor


def built(name: str) -> tuple[nn.Module, int]:
    """The module of a name, and the side of its images.

    Such a name is ``resnet18``, ``side/64`` or ``depth/8``.
    """
    family, _, size = name.partition("/")
    if family == "side":
        return with_random_weights(stack), int(size)
    if family == "depth":
        return with_random_weights(partial(blocks, int(size))), 32
    if family == "resnet18":
        return with_random_weights(ResNet18), 224
    shipped = f"{name}-cifar10"
    if shipped in models.names():
        return models.load(shipped), 32
    return with_random_weights(partial(models.build, name)), 32


@lru_cache(maxsize=2)
def benchmark_network(name: str) -> BenchmarkNetwork:
    """A network, folded and traced, and images of the sample.

    The images are enlarged if the network takes larger ones.
    """
    model, side = built(name)
    count = SAMPLE_IMAGES if side == 32 else 2  # the classes are only measured at 32 x 32
    pixels = data.sample()[:count].unit_interval()
    x = pixels if side == 32 else F.interpolate(pixels, (side, side), mode="bilinear")
    folded = fold(model, x[:1]).model
    return BenchmarkNetwork(trace(folded, x[:2]), folded, x)


def kernel_names(name: str) -> list[str]:
    """Names of the convolutions and linear layers of a network."""
    modules = built(name)[0].named_modules()
    return [key for key, module in modules if isinstance(module, nn.Conv2d | nn.Linear)]
