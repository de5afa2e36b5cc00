"""Gates of the activation pattern: how many differ between two inputs, and how many are within rounding of their kink."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adjointbackmap.analysis.kinks import kinks_of
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.pattern import ActivationPattern, check_images
from adjointbackmap.engine.program import IMAGE, Step

ROUNDINGS = 16  # rounding moved no activation of VGG7 and ResNet20 by more than 12 eps of its terms' magnitudes in float32


def gate_names(network: Network, dtype: torch.dtype | None = None) -> dict[int, str]:
    """Slot of every step's output -> the convolution or linear layer before it, in the order of execution.

    It names gates for people: in the study's networks each convolution has one activation, that of a residual sum included.

    Args:
        network: Traced network.
        dtype: Of the program.
    """
    program = network.program(dtype)
    layers = {program.kernels[layer.kernel].sum.slot: layer.name for layer in network.layers.values() if layer.kernel}
    names, last = {}, "input"
    for step in program.steps:
        last = layers.get(step.output.slot, last)
        names[step.output.slot] = last
    return names


def flipped(first: ActivationPattern, second: ActivationPattern) -> dict[str, Float[Tensor, " n"]]:
    """Share of the gates that differ between the patterns of two batches, by layer.

    Args:
        first: Pattern of N images.
        second: Pattern of as many, of the same network and dtype.

    Raises:
        ValueError: If they are not of the same network, dtype and number of images.

    Example:
        >>> from adjointbackmap import record_pattern, trace
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).eval(), torch.zeros(1, 2))
        >>> pattern = record_pattern(network, torch.rand(3, 2))
        >>> {layer: share.tolist() for layer, share in flipped(pattern, pattern).items()}
        {'0': [0.0, 0.0, 0.0]}
    """
    if first.network is not second.network or (first.dtype, first.images) != (second.dtype, second.images):
        msg = (
            "The two patterns must be of one network, dtype and number of images. "
            f"Got {first.images} images in {first.dtype} and {second.images} in {second.dtype}: record both alike."
        )
        raise ValueError(msg)
    names, found = gate_names(first.network, first.dtype), dict[str, list[Tensor]]()
    for slot, gates in first.gates.items():
        differ = torch.stack([a != b for a, b in zip(gates, second.gates[slot], strict=True)]).any(0)
        found.setdefault(names[slot], []).append(differ.flatten(1))
    return {layer: torch.cat(parts, 1).double().mean(1) for layer, parts in found.items()}


def near_kinks(network: Network, x: Tensor, roundings: float = ROUNDINGS) -> dict[str, Int64[Tensor, " n"]]:
    r"""How many activations are within rounding of a kink, by layer: another machine may set their gates otherwise.

    The bound is the scale of the rounding: a unit counts where
    :math:`|c - a| \le r\, \epsilon\, (\sum |w f| + |b| + |s|)` for a kink at :math:`a`, with the features :math:`f` that the
    convolution reads, the bias :math:`b` and the shortcut :math:`s`. Activations whose features are all zero do not count: no
    rounding is in them.

    Args:
        network: Traced network, whose steps between kernels and activations are sums, averages, movements and scalings.
        x: Images ``(N, C, H, W)`` in the units that the network takes.
        roundings: The factor :math:`r`, in units of the rounding error of the network's dtype.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()).eval()
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
        >>> x = torch.tensor([[3.0, 3.0], [3.0, 2.0], [0.0, 0.0]])
        >>> near_kinks(trace(model, x), x)["0"].tolist()
        [1, 0, 0]
    """
    names, found = gate_names(network), dict[str, Tensor]()
    for step, value, size in _with_sizes(network, check_images(network, x)):
        kinks = kinks_of(step.rule)
        if kinks:
            gap = torch.stack([(value - kink).abs() for kink in kinks]).amin(0)
            near = (gap <= roundings * torch.finfo(value.dtype).eps * size) & (size > 0)
            layer = names[step.output.slot]
            found[layer] = found.get(layer, 0) + near.flatten(1).sum(1)
    return found


def gate_counts(pattern: ActivationPattern) -> dict[str, int]:
    """Gates of one image by layer."""
    names, counts = gate_names(pattern.network, pattern.dtype), dict[str, int]()
    for slot, gates in pattern.gates.items():
        counts[names[slot]] = counts.get(names[slot], 0) + gates[0][0].numel()
    return counts


def _with_sizes(network: Network, images: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each step of a forward pass with its first input, and the magnitudes of the terms that this was summed from."""
    program = network.program(images.dtype)
    kernels = {call.sum.slot: replace(call, weight=call.weight.abs()) for call in program.kernels.values()}
    values = {IMAGE: images, **{e.slot: e.value.expand(len(images), *e.value.shape) for e in program.entries}}
    sizes = {slot: value.abs() for slot, value in values.items()}
    with exact(images.device):
        for step in program.steps:
            inputs, slot = [values[i.slot] for i in step.inputs], step.output.slot
            gates = step.rule.gates(1.0, *inputs)
            values[slot] = step.rule.forward(gates, *inputs)
            if slot in kernels:
                sizes[slot] = kernels[slot].apply(inputs[0].abs())
            elif gates:
                sizes[slot] = values[slot].abs()
            else:
                sizes[slot] = step.rule.forward(gates, *(sizes[i.slot] for i in step.inputs)).abs()
            yield step, inputs[0], sizes[step.inputs[0].slot]
