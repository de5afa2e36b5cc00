"""What others would do for the same hyperplanes: the peers of benchmarks/speed.py, each with the image and the bias parts.

A peer computes some units of a layer, spread over it, or some columns; ``chunk`` is how many it batches.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

CAPTUM = importlib.util.find_spec("captum") is not None
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Reached(Exception):
    """Carries what a layer gives, so that the pass ends there."""


class UpTo(nn.Module):
    """A model that ends at one of its layers."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for images ``(N, C, H, W)``."""

        def stop(module: nn.Module, given: tuple, out: Tensor) -> None:
            raise Reached(out)

        handle = self.model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            return self.model(x)
        except Reached as reached:
            return reached.args[0]
        finally:
            handle.remove()


@dataclass(frozen=True)
class Work:
    """A layer of a folded network at one image or several, as autograd sees it.

    Attributes:
        model: The folded network; a copy of it is used.
        layer: Name of the layer.
        x: The images, ``(N, C, H, W)``.
        memory_format: A name of ``FORMATS``, for the kernels and the images.
    """

    model: nn.Module
    layer: str
    x: Tensor
    memory_format: str = "contiguous"

    @cached_property
    def module(self) -> UpTo:
        """The network up to the layer, without gradients of its kernels."""
        return UpTo(copy.deepcopy(self.model).requires_grad_(False).to(memory_format=FORMATS[self.memory_format]), self.layer)

    @cached_property
    def images(self) -> Tensor:
        """The images in the memory format."""
        return self.x.contiguous(memory_format=FORMATS[self.memory_format])

    @cached_property
    def biases(self) -> dict[str, Tensor]:
        """The biases that the layer depends on, by name."""
        every = {n: p.detach().clone().requires_grad_() for n, p in self.module.named_parameters() if n.endswith("bias")}
        out = self(self.images, every)
        used = torch.autograd.grad(out.sum(), list(every.values()), allow_unused=True)
        return {n: b.detach() for (n, b), g in zip(every.items(), used, strict=True) if g is not None}

    @property
    def entries(self) -> int:
        """Length of these biases."""
        return sum(b.numel() for b in self.biases.values())

    def __call__(self, x: Tensor, biases: dict[str, Tensor]) -> Tensor:
        """What the layer gives for images and biases."""
        return functional_call(self.module, biases, (x,))

    def forward(self) -> Tensor:
        """One pass, as every peer needs it once."""
        return self(self.images, self.biases)

    def recorded(self, units: int) -> tuple[Tensor, list[Tensor]]:
        """Some units with the graph behind them, and the image and biases that they depend on."""
        leaves = [self.images.detach().clone().requires_grad_(), *(b.clone().requires_grad_() for b in self.biases.values())]
        return spread(self(leaves[0], dict(zip(self.biases, leaves[1:], strict=True))), units), leaves


def spread(out: Tensor, units: int) -> Tensor:
    """Some units, evenly over a layer's output of one image."""
    flat = out.flatten()
    step = len(flat) // units
    return flat[: units * step : step]


def by_jacrev(work: Work, units: int, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """``torch.func.jacrev`` over the image and the biases."""
    return jacrev(lambda x, b: spread(work(x, b), units), (0, 1), chunk_size=chunk)(work.images, work.biases)


def by_batched_grad(work: Work, units: int, chunk: int) -> list[tuple[Tensor, ...]]:
    """``torch.autograd.grad(is_grads_batched=True)`` in blocks of units."""
    out, leaves = work.recorded(units)
    blocks = torch.eye(units).split(chunk)
    return [torch.autograd.grad(out, leaves, block, retain_graph=True, is_grads_batched=True) for block in blocks]


def by_loop(work: Work, units: int, chunk: int = 1) -> list[tuple[Tensor, ...]]:
    """One backward pass for each unit."""
    out, leaves = work.recorded(units)
    return [torch.autograd.grad(unit, leaves, retain_graph=True) for unit in out]


def by_jacfwd(work: Work, columns: int, chunk: int) -> list[Tensor]:
    """``torch.func.jacfwd`` over some pixels, each a column of every unit, in blocks, since it batches all that it is given.

    The columns of biases cost the same: it takes every tangent through the whole network.
    """
    pixels, biases = work.images.contiguous().flatten(), work.biases

    def block(start: int) -> Tensor:
        def of(part: Tensor) -> Tensor:
            return work(torch.cat([pixels[:start], part, pixels[start + chunk :]]).view(work.x.shape), biases)

        return jacfwd(of)(pixels[start : start + chunk])

    return [block(start) for start in range(0, columns, chunk)]


def by_neuron_gradient(work: Work, units: int, chunk: int = 1) -> list[Tensor]:
    """Captum's ``NeuronGradient``, image part only: a call for each unit."""
    from captum.attr import NeuronGradient

    model = work.module.model
    method = NeuronGradient(model, model.get_submodule(work.layer))
    with torch.no_grad():
        shape = work.forward().shape[1:]
    size = shape.numel()
    places = [torch.unravel_index(torch.tensor(n * (size // units)), shape) for n in range(units)]
    return [method.attribute(work.images, tuple(int(i) for i in place)) for place in places]


# ten classes of a batch of images


def classes_by_jacrev(work: Work, images: int, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """``vmap`` of ``jacrev``: all classes of some images, ``chunk`` images at once."""
    jacobian = jacrev(lambda x, b: work(x[None], b)[0], (0, 1))
    return vmap(jacobian, (0, None), chunk_size=chunk)(work.images[:images], work.biases)


def classes_by_grad(work: Work, images: int, chunk: int = 1) -> list[Tensor]:
    """One backward pass for each class, all images at once: image parts only, since autograd sums those of the biases."""
    x = work.images[:images].detach().clone().requires_grad_()
    out = work(x, work.biases)
    return [torch.autograd.grad(scores.sum(), x, retain_graph=True)[0] for scores in out.T]


def classes_by_input_x_gradient(work: Work, images: int, chunk: int = 1) -> list[Tensor]:
    """Captum's ``InputXGradient``, image part only: a call for each class, all images at once."""
    from captum.attr import InputXGradient

    method, x = InputXGradient(work.module.model), work.images[:images]
    classes = work.forward().shape[1]
    return [method.attribute(x.detach().clone().requires_grad_(), target=c) for c in range(classes)]


@dataclass(frozen=True)
class Peer:
    """A peer.

    Attributes:
        call: Takes the work, how many units, columns or images, and how many at once.
        whole: Whether it gives image and bias parts.
        chunks: What to try for ``chunk``.
        of: What is counted: units, columns, or images.
    """

    call: Callable[[Work, int, int], object]
    whole: bool = True
    chunks: tuple[int, ...] = (1,)
    of: str = "units"


CHUNKS = (32, 64, 128)
PEERS = {
    "jacrev": Peer(by_jacrev, chunks=CHUNKS),
    "is_grads_batched": Peer(by_batched_grad, chunks=CHUNKS),
    "jacfwd": Peer(by_jacfwd, chunks=(16, 64), of="columns"),
    "backward per unit": Peer(by_loop),
    "Captum NeuronGradient": Peer(by_neuron_gradient, whole=False),
}
CLASS_PEERS = {
    "vmap of jacrev": Peer(classes_by_jacrev, chunks=(4, 16, 64), of="images"),
    "backward per class": Peer(classes_by_grad, whole=False, of="images"),
    "Captum InputXGradient": Peer(classes_by_input_x_gradient, whole=False, of="images"),
}
