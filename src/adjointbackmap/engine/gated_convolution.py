"""A convolution after a gate that is mostly zero: zero inputs are left out of the products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import Step
from adjointbackmap.rules.kernels import Convolution
from adjointbackmap.rules.piecewise import Gate

LARGEST_SHARE = 0.5  # of gates that are not zero; above it the whole convolution is as fast
SMALLEST_BATCH = 64  # of tangents: the matrix products of fewer are small


class AliveConvolution:
    """A convolution of whole maps that share one gate, as one matrix product per output position.

    The rows of a product are the in-channels and taps whose gate is not zero. They are the same for
    all tangents of an image. The rows that are left out are exactly zero.

    Args:
        rule: The convolution, without groups.
        gate: The gate of its input, ``(1, C, H, W)``.
    """

    def __init__(self, rule: Convolution, gate: Tensor) -> None:
        self.kernel = rule.weight.flatten(1).T.contiguous()
        # Number the elements of the map from 1 on, and read which ones each window has. The result
        # is (in-channels * taps, output positions), with 0 in the padding; float64 holds them.
        count = gate.numel()
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device=gate.device)
        geometry = (rule.weight.shape[2:], rule.dilation, rule.padding, rule.stride)
        seen = F.unfold(numbers.view(gate.shape), *map(tuple, geometry))[0].long()
        axes = zip(gate.shape[2:], rule.padding, rule.extent(), rule.stride, strict=True)
        self.extents = [(n + 2 * p - e - 1) // s + 1 for n, p, e, s in axes]
        alive = (seen > 0) & (gate.flatten()[(seen - 1).clamp_min(0)] != 0)
        channels = gate.shape[1]
        places = gate[0, 0].numel()
        channel = (seen - 1) // places
        place = (seen - 1) % places
        rows = place * channels + channel  # from the order (C, H, W) to (H, W, C)
        self.taps = [column.nonzero()[:, 0] for column in alive.T]
        self.rows = [row[tap] for row, tap in zip(rows.T, self.taps, strict=True)]

    def forward(self, tangents: Tensor) -> Tensor:
        """Convolve tangents ``(K, C, H, W)`` that are zero where the gate is."""
        # (K, H * W * C): as maps are laid out channels last, no copy. Taking some columns of it
        # reads each tangent in order, and gives the product's layout.
        by_place = tangents.permute(0, 2, 3, 1).flatten(1)
        out = tangents.new_empty(len(self.rows), len(tangents), self.kernel.shape[1])
        for found, row, tap in zip(out, self.rows, self.taps, strict=True):
            weights = self.kernel.index_select(0, tap)
            torch.mm(by_place.index_select(1, row), weights, out=found)
        return out.unflatten(0, self.extents).permute(2, 3, 0, 1)


def mostly_dead(pattern: ActivationPattern, steps: list[Step]) -> dict[int, Tensor]:
    """The gates in front of convolutions that are faster as an :class:`AliveConvolution`.

    Returns:
        Slot of a convolution's output -> gate. It is empty for several images, whose gates differ,
        and on other devices than the CPU.
    """
    made_by = {step.output.slot: step for step in steps}
    found: dict[int, Tensor] = {}
    if pattern.images > 1 or pattern.network.device.type != "cpu":
        return found
    for step in steps:
        before = made_by.get(step.inputs[0].slot) if step.inputs else None
        if before is None or not isinstance(before.rule, Gate):
            continue
        rule = step.rule
        if not isinstance(rule, Convolution) or rule.groups > 1 or len(step.output.shape) != 3:
            continue
        (gate,) = pattern.gates[before.output.slot]
        if float((gate != 0).double().mean()) <= LARGEST_SHARE:
            found[step.output.slot] = gate
    return found
