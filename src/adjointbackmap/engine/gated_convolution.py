"""A convolution behind a gate that is zero at most places: only what is alive is multiplied."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import Step
from adjointbackmap.rules.kernels import Convolution
from adjointbackmap.rules.piecewise import Gate

LARGEST_SHARE = 0.5  # of the gates that are not zero: above it, the whole convolution is as fast
SMALLEST_BATCH = 64


class AliveConvolution:
    """A convolution of whole maps that share one gate, as a matrix product at each position of its output.

    The rows of the product are the in-channels and taps whose gate is not zero there, the same for all
    tangents of an image. What is left out is exactly zero.

    Args:
        rule: The convolution, without groups.
        gate: The gate of its input, ``(1, C, H, W)``.
    """

    def __init__(self, rule: Convolution, gate: Tensor) -> None:
        self.kernel = rule.weight.flatten(1).T.contiguous()
        numbers = torch.arange(1, gate.numel() + 1, dtype=torch.float64, device=gate.device).view(
            gate.shape
        )
        geometry = (
            tuple(rule.weight.shape[2:]),
            tuple(rule.dilation),
            tuple(rule.padding),
            tuple(rule.stride),
        )
        seen = F.unfold(numbers, *geometry)[0].long()  # 0 in the padding
        self.extents = [
            (n + 2 * p - e - 1) // s + 1
            for n, p, e, s in zip(
                gate.shape[2:], rule.padding, rule.extent(), rule.stride, strict=True
            )
        ]
        alive = (seen > 0) & (gate.flatten()[(seen - 1).clamp_min(0)] != 0)
        channels = gate.shape[1]
        places = gate[0, 0].numel()
        channel = (seen - 1) // places
        place = (seen - 1) % places
        rows = place * channels + channel  # in the order (H, W, C)
        self.taps = [column.nonzero()[:, 0] for column in alive.T]
        self.rows = [row[tap] for row, tap in zip(rows.T, self.taps, strict=True)]

    def forward(self, tangents: Tensor) -> Tensor:
        """Convolve ``(K, C, H, W)``, which is zero where the gate is."""
        by_place = tangents.permute(2, 3, 1, 0).reshape(-1, len(tangents))
        out = tangents.new_empty(len(self.rows), len(tangents), self.kernel.shape[1])
        for found, row, tap in zip(out, self.rows, self.taps, strict=True):
            torch.mm(by_place[row].T, self.kernel[tap], out=found)
        return out.unflatten(0, self.extents).permute(2, 3, 0, 1)


def mostly_dead(pattern: ActivationPattern, steps: list[Step]) -> dict[int, Tensor]:
    """The gates before convolutions of one image's maps that are faster so, by the slot of the convolution's output."""
    made_by = {step.output.slot: step for step in steps}
    found: dict[int, Tensor] = {}
    if pattern.images > 1 or pattern.network.device.type != "cpu":
        return found
    for step in steps:
        before = made_by.get(step.inputs[0].slot) if step.inputs else None
        plain = (
            isinstance(step.rule, Convolution)
            and step.rule.groups == 1
            and len(step.output.shape) == 3
        )
        if not plain or before is None or not isinstance(before.rule, Gate):
            continue
        (gate,) = pattern.gates[before.output.slot]
        if float((gate != 0).double().mean()) <= LARGEST_SHARE:
            found[step.output.slot] = gate
    return found
