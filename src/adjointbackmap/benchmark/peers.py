"""Other libraries that can compute the same hyperplanes, each used in its fastest way.

A peer computes some units of a layer, evenly spaced, or some columns of all units. ``chunk`` is the
number of units or columns in one batch. The result has image parts ``(units, pixels)`` and bias
parts ``(units, biases)``. The bias parts are ``None`` if the peer does not compute them.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
Planes = tuple[Tensor, Tensor | None]
# The parts that a peer computes.
IMAGE_AND_BIAS = "image and bias"
ONLY_IMAGE = "image only"


class LayersReached(Exception):
    """Raised to end a forward pass early."""


class UpTo(nn.Module):
    """A model that ends at the last of some layers and returns their outputs, flat and joined."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layers for some images, ``(N, units)``."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            seen.append(out.flatten(1))
            if len(seen) == len(self.layers):
                raise LayersReached

        handles = [
            self.model.get_submodule(layer).register_forward_hook(keep) for layer in self.layers
        ]
        try:
            self.model(x)
        except LayersReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(seen, 1) if len(seen) > 1 else seen[0]


@dataclass(frozen=True)
class Work:
    """Units of layers of a folded network, for one or more images, as autograd sees them.

    Attributes:
        model: The folded network; a copy of it is used.
        layers: Names of the layers.
        x: The images, ``(N, C, H, W)``.
        numbers: Indices of the units in the flat output; ``None`` for all.
        memory_format: A key of ``MEMORY_FORMATS``, for the kernels and the images.
    """

    model: nn.Module
    layers: tuple[str, ...]
    x: Tensor
    numbers: Tensor | None = None
    memory_format: str = "contiguous"

    @cached_property
    def module(self) -> UpTo:
        """The network up to the layers; its kernels need no gradients."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        laid_out: Any = {"memory_format": MEMORY_FORMATS[self.memory_format]}
        return UpTo(model.to(**laid_out), self.layers)

    @cached_property
    def images(self) -> Tensor:
        """The images in the memory format."""
        return self.x.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

    @cached_property
    def biases(self) -> dict[str, Tensor]:
        """The biases that the layers depend on, keyed by name."""
        every = {
            n: p.detach().clone().requires_grad_()
            for n, p in self.module.named_parameters()
            if n.endswith("bias")
        }
        total = self(self.images[:1], every).sum()
        used = torch.autograd.grad(total, list(every.values()), allow_unused=True)
        pairs = zip(every.items(), used, strict=True)
        return {name: bias.detach() for (name, bias), grad in pairs if grad is not None}

    @cached_property
    def vector(self) -> Tensor:
        """The extended input: the image and the biases in one vector."""
        return torch.cat([self.x[0].flatten(), *(b.flatten() for b in self.biases.values())])

    @cached_property
    def bounded(self) -> Any:
        """The network as auto_LiRPA's graph."""
        from auto_LiRPA import BoundedModule

        return BoundedModule(copy.deepcopy(self.module), self.x, device="cpu", verbose=0)

    def __call__(self, x: Tensor, biases: dict[str, Tensor]) -> Tensor:
        """Outputs of the layers for some images and biases."""
        return functional_call(self.module, biases, (x,))

    def forward(self) -> Tensor:
        """One forward pass; every peer needs it once."""
        return self(self.images, self.biases)

    def at(self, vector: Tensor) -> Tensor:
        """Outputs of the layers for one extended input."""
        lengths = [self.x[0].numel(), *(b.numel() for b in self.biases.values())]
        pixels, *parts = vector.split(lengths)
        pairs = zip(self.biases.items(), parts, strict=True)
        biases = {name: part.view(bias.shape) for (name, bias), part in pairs}
        return self(pixels.view(self.x[:1].shape), biases)[0]

    @cached_property
    def units(self) -> Tensor:
        """Indices of the units in the flat output."""
        return torch.arange(self.forward().shape[1]) if self.numbers is None else self.numbers

    def spread(self, count: int) -> Tensor:
        """Indices of ``count`` units, evenly spaced."""
        return self.units[:: len(self.units) // count][:count]

    def recorded(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Some units with their autograd graph, and the image and biases that they depend on."""
        leaves = [
            self.images.detach().clone().requires_grad_(),
            *(b.clone().requires_grad_() for b in self.biases.values()),
        ]
        out = self(leaves[0], dict(zip(self.biases, leaves[1:], strict=True)))
        return out[0, self.spread(count)], leaves

    def with_outputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs of the layers, the images, and outputs of the modules that add the biases."""
        kept = []
        images = x.detach().clone().requires_grad_()
        modules = [self.module.get_submodule(name.removesuffix(".bias")) for name in self.biases]
        handles = [
            m.register_forward_hook(lambda module, given, out: kept.append(out), prepend=True)
            for m in modules
        ]
        out = self.module(images)
        for handle in handles:
            handle.remove()
        return out, [images, *kept]


def parts_of_gradients(gradients: tuple[Tensor, ...]) -> Planes:
    """Image and bias parts from gradients of several units, each ``(units, *shape)``.

    The first gradient is that of the images. The others are those of the outputs that the biases
    are added to.
    """
    image, *others = gradients
    biases = [g.flatten(2).sum(2) if g.dim() > 2 else g for g in others]
    return image.flatten(1), torch.cat(biases, 1)


def joined(blocks: list[Planes]) -> Planes:
    """Blocks of units, joined into one."""
    images, biases = zip(*blocks, strict=True)
    return torch.cat(images), None if biases[0] is None else torch.cat(biases)


def by_jacrev(work: Work, units: int, chunk: int) -> Planes:
    """``torch.func.jacrev`` over the image and the biases."""
    places = work.spread(units)
    jacobian = jacrev(lambda x, b: work(x, b)[0, places], (0, 1), chunk_size=chunk)
    image, biases = jacobian(work.images, work.biases)
    return image.flatten(1), torch.cat([b.flatten(1) for b in biases.values()], 1)


def by_batched_grad(work: Work, units: int, chunk: int) -> Planes:
    """``torch.autograd.grad(is_grads_batched=True)`` in blocks of units."""
    out, leaves = work.recorded(units)

    def of(block: Tensor) -> Planes:
        found = torch.autograd.grad(out, leaves, block, retain_graph=True, is_grads_batched=True)
        return parts_of_gradients(found)

    return joined([of(block) for block in torch.eye(units).split(chunk)])


def by_loop(work: Work, units: int, chunk: int = 1) -> Planes:
    """One backward pass per unit."""
    out, leaves = work.recorded(units)
    found = [torch.autograd.grad(unit, leaves, retain_graph=True) for unit in out]
    return parts_of_gradients(tuple(torch.stack(parts) for parts in zip(*found, strict=True)))


def by_repeating(work: Work, units: int, chunk: int) -> Planes:
    """One backward pass over copies of the image, with one unit per copy.

    The bias parts are the gradients at the places where the biases are added.
    """

    def block(places: Tensor) -> Planes:
        out, leaves = work.with_outputs(work.images.expand(len(places), -1, -1, -1))
        return parts_of_gradients(torch.autograd.grad(out.gather(1, places[:, None]).sum(), leaves))

    return joined([block(places) for places in work.spread(units).split(chunk)])


def by_jacfwd(work: Work, columns: int, chunk: int) -> Tensor:
    """``torch.func.jacfwd`` over some scalars of the extended input, ``(all units, columns)``.

    It runs in blocks, since one call batches all of its columns. Each tangent passes through the
    whole network.
    """
    vector = work.vector

    def block(start: int, stop: int) -> Tensor:
        def of(part: Tensor) -> Tensor:
            return work.at(torch.cat([vector[:start], part, vector[stop:]]))

        return jacfwd(of)(vector[start:stop])

    return torch.cat([block(k, min(k + chunk, columns)) for k in range(0, columns, chunk)], 1)


def by_neuron_gradient(work: Work, units: int, chunk: int = 1) -> Planes:
    """Captum's ``NeuronGradient``, with one call per unit."""
    from captum.attr import NeuronGradient

    model = work.module.model
    method = NeuronGradient(model, model.get_submodule(work.layers[-1]))
    x = work.images.detach().clone().requires_grad_()
    found = [method.attribute(x, lambda out, n=n: out.flatten(1)[:, n]) for n in work.spread(units)]
    return torch.cat(found).flatten(1), None


def by_crown(work: Work, units: int, chunk: int) -> Planes:
    """auto_LiRPA's linear bound at eps 0, where it equals the affine map.

    Interval bounds are used for the inner layers.
    """
    from auto_LiRPA import BoundedTensor, PerturbationLpNorm

    bounded = work.bounded
    outputs = work.forward().shape[1]
    ball = BoundedTensor(work.x, PerturbationLpNorm(norm=float("inf"), eps=0.0))
    end = bounded.output_name[0]
    start = bounded.input_name[0]
    wanted = {end: {start}}
    options: dict[str, Any] = {"return_A": True, "needed_A_dict": wanted, "bound_upper": False}

    def block(places: Tensor) -> Planes:
        seeds = torch.zeros(1, len(places), outputs)
        seeds[0, torch.arange(len(places)), places] = 1
        found = bounded.compute_bounds((ball,), C=seeds, method="CROWN-IBP", **options)
        return found[2][end][start]["lA"][0].flatten(1).detach(), None

    return joined([block(places) for places in work.spread(units).split(chunk)])


# ten classes of a batch; parts are (images, classes, pixels) and (images, classes, biases)


def classes_by_jacrev(work: Work, images: int, chunk: int) -> Planes:
    """``vmap`` of ``jacrev``: all classes of some images, in batches of ``chunk`` images."""
    jacobian = jacrev(lambda x, b: work(x[None], b)[0], (0, 1))
    image, biases = vmap(jacobian, (0, None), chunk_size=chunk)(work.images[:images], work.biases)
    return image.flatten(2), torch.cat([b.flatten(2) for b in biases.values()], 2)


def classes_by_grad(work: Work, images: int, chunk: int = 1) -> Planes:
    """One backward pass per class for all images.

    Autograd sums the bias parts over the images.
    """
    x = work.images[:images].detach().clone().requires_grad_()
    out = work(x, work.biases)
    found = [torch.autograd.grad(scores.sum(), x, retain_graph=True)[0] for scores in out.T]
    return torch.stack(found, 1).flatten(2), None


def classes_by_fullgrad(work: Work, images: int, chunk: int = 1) -> Planes:
    """FullGrad of each class for all images at once [Srinivas2019].

    It takes the gradients of the images and those at the places where biases are added.
    """
    out, leaves = work.with_outputs(work.images[:images])
    slopes = [torch.autograd.grad(scores.sum(), leaves, retain_graph=True) for scores in out.T]
    image, bias = zip(*map(parts_of_gradients, slopes), strict=True)
    return torch.stack(image, 1), torch.stack(bias, 1)


def classes_by_input_x_gradient(work: Work, images: int, chunk: int = 1) -> Planes:
    """Captum's ``InputXGradient``, with one call per class for all images.

    Its image parts are multiplied by the image.
    """
    from captum.attr import InputXGradient

    method = InputXGradient(work.module.model)
    x = work.images[:images]
    classes = range(work(x[:1], work.biases).shape[1])
    found = [method.attribute(x.detach().clone().requires_grad_(), target=c) for c in classes]
    return torch.stack(found, 1).detach().flatten(2), None


@dataclass(frozen=True)
class Peer:
    """Another library or method that computes hyperplanes.

    Attributes:
        call: Takes the work, the number of units, columns or images, and the number in one batch.
        gives: The parts that it computes.
        chunks: Values of ``chunk`` to try.
        of: What the numbers count: units, columns, or images.
        needs: The library that must be installed.
        times_image: Whether its image parts are multiplied by the image.
    """

    call: Callable[[Work, int, int], Any]
    gives: str = IMAGE_AND_BIAS
    chunks: tuple[int, ...] = (1,)
    of: str = "units"
    needs: str | None = None
    times_image: bool = False

    @property
    def is_missing(self) -> bool:
        """Whether its library is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


CHUNKS = (8, 16, 32, 64)
PEERS = {
    "jacrev": Peer(by_jacrev, chunks=CHUNKS),
    "jacfwd": Peer(by_jacfwd, chunks=(32, 64, 128, 256), of="columns"),
    "is_grads_batched": Peer(by_batched_grad, chunks=CHUNKS),
    "repeated image": Peer(by_repeating, chunks=CHUNKS),
    "backward per unit": Peer(by_loop),
    "Captum NeuronGradient": Peer(by_neuron_gradient, ONLY_IMAGE, needs="captum"),
    "auto_LiRPA at eps 0": Peer(
        by_crown,
        "image, biases in one number",
        CHUNKS,
        needs="auto_LiRPA",
    ),
}
CLASS_PEERS = {
    "vmap of jacrev": Peer(classes_by_jacrev, chunks=(4, 8, 16, 64), of="images"),
    "FullGrad": Peer(classes_by_fullgrad, of="images"),
    "backward per class": Peer(classes_by_grad, ONLY_IMAGE, of="images"),
    "Captum InputXGradient": Peer(
        classes_by_input_x_gradient,
        ONLY_IMAGE,
        of="images",
        needs="captum",
        times_image=True,
    ),
}
