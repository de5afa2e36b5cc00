"""Gates of the activation pattern: which differ between two inputs, and which are near a kink.

A gate is near a kink if rounding alone could set it to another value.
"""

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

# In float32, rounding moved no activation of VGG7 or ResNet20 by more than 12 eps of the sum of
# its terms' magnitudes. The limit leaves a margin.
KINK_ROUNDINGS = 16


def gate_names(network: Network, dtype: torch.dtype | None = None) -> dict[int, str]:
    """Map the slot of each step's output to the convolution or linear layer before it.

    The map gives gates readable names. In the study's networks each convolution has one activation.
    The activation after a residual sum belongs to the convolution before the sum.

    Args:
        network: Traced network.
        dtype: The dtype of the program.
    """
    program = network.program(dtype)
    layers = {
        program.kernels[layer.kernel].sum.slot: layer.name
        for layer in network.layers.values()
        if layer.kernel
    }
    names = {}
    last = "input"
    for step in program.steps:
        last = layers.get(step.output.slot, last)
        names[step.output.slot] = last
    return names


def flipped(first: ActivationPattern, second: ActivationPattern) -> dict[str, Float[Tensor, " n"]]:
    """Share of the gates that differ between the patterns of two batches, per layer and image.

    Args:
        first: Pattern of N images.
        second: Pattern of N images, of the same network and dtype.

    Raises:
        ValueError: If network, dtype or number of images differ.

    Example:
        >>> from adjointbackmap import record_pattern, trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).eval()
        >>> network = trace(model, torch.zeros(1, 2))
        >>> pattern = record_pattern(network, torch.rand(3, 2))
        >>> {layer: share.tolist() for layer, share in flipped(pattern, pattern).items()}
        {'0': [0.0, 0.0, 0.0]}
    """
    kinds = [(pattern.dtype, pattern.images) for pattern in (first, second)]
    if first.network is not second.network or kinds[0] != kinds[1]:
        msg = (
            "The two patterns must be of one network, dtype and number of images. Got "
            f"{first.images} images in {first.dtype} and {second.images} in {second.dtype}: "
            "record both alike."
        )
        raise ValueError(msg)
    names = gate_names(first.network, first.dtype)
    found = dict[str, list[Tensor]]()
    for slot, gates in first.gates.items():
        pairs = zip(gates, second.gates[slot], strict=True)
        differ = torch.stack([a != b for a, b in pairs]).any(0)
        found.setdefault(names[slot], []).append(differ.flatten(1))
    return {layer: torch.cat(parts, 1).double().mean(1) for layer, parts in found.items()}


def near_kinks(
    network: Network,
    x: Tensor,
    roundings: float = KINK_ROUNDINGS,
) -> dict[str, Int64[Tensor, " n"]]:
    r"""Count the activations that are within rounding of a kink, per layer and image.

    Another machine may round differently and set their gates to other values. A unit counts if
    :math:`|c - a| \le r\, \epsilon\, (\sum |w f| + |b| + |s|)` for a kink at :math:`a`. Here
    :math:`f` are the features that the convolution reads, :math:`b` is the bias and :math:`s` is
    the shortcut. If all these terms are zero, the unit does not count: zeros are not rounded.

    Args:
        network: Traced network. Between a kernel and its activation it may only have sums,
            averages, movements and scalings.
        x: Images ``(N, C, H, W)`` in the units of the network's input.
        roundings: The factor :math:`r`, in units of the rounding error of the network's dtype.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()).eval()
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
        >>> x = torch.tensor([[3.0, 3.0], [3.0, 2.0], [0.0, 0.0]])
        >>> near_kinks(trace(model, x), x)["0"].tolist()
        [1, 0, 0]
    """
    names = gate_names(network)
    found = dict[str, Tensor]()
    for step, value, size in _with_sizes(network, check_images(network, x)):
        kinks = kinks_of(step.rule)
        if kinks:
            gap = torch.stack([(value - kink).abs() for kink in kinks]).amin(0)
            near = (gap <= roundings * torch.finfo(value.dtype).eps * size) & (size > 0)
            layer = names[step.output.slot]
            found[layer] = found.get(layer, 0) + near.flatten(1).sum(1)
    return found


def gate_counts(pattern: ActivationPattern) -> dict[str, int]:
    """Number of gates of one image, per layer."""
    names = gate_names(pattern.network, pattern.dtype)
    counts = dict[str, int]()
    for slot, gates in pattern.gates.items():
        counts[names[slot]] = counts.get(names[slot], 0) + gates[0][0].numel()
    return counts


def _with_sizes(network: Network, images: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Yield each step of a forward pass with its first input and the size of that input's terms.

    The size is the sum of the magnitudes of the terms from which the input was computed.
    """
    program = network.program(images.dtype)
    kernels = {
        call.sum.slot: replace(call, weight=call.weight.abs()) for call in program.kernels.values()
    }
    values = {
        IMAGE: images,
        **{e.slot: e.value.expand(len(images), *e.value.shape) for e in program.entries},
    }
    sizes = {slot: value.abs() for slot, value in values.items()}
    with exact(images.device):
        for step in program.steps:
            inputs = [values[i.slot] for i in step.inputs]
            slot = step.output.slot
            gates = step.rule.gates(1.0, *inputs)
            values[slot] = step.rule.forward(gates, *inputs)
            if slot in kernels:
                sizes[slot] = kernels[slot].apply(inputs[0].abs())
            elif gates:
                sizes[slot] = values[slot].abs()
            else:
                sizes[slot] = step.rule.forward(gates, *(sizes[i.slot] for i in step.inputs)).abs()
            yield step, inputs[0], sizes[step.inputs[0].slot]
