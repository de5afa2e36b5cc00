"""The terms of a unit's inner product, and how their order and precision change its error."""

from collections.abc import Sequence
from math import fsum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.capture.precision import exact
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.exactness.layer_check import SHARE_LIMIT, UnitOfImage
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes, relative_error

SUM_ORDERS = ("in turn", "by size", "pairwise", "float64 sums", "float64", "network alone")

BATCH = 50  # images per forward pass


def products(planes: Hyperplanes, dtype: torch.dtype) -> Tensor:
    """The terms x h and b h of every unit, multiplied in ``dtype``.

    The shape is ``(N, *units, C * H * W + M)``.
    """
    biases = planes.network.biases_in(planes.x.dtype).vector
    factors = torch.cat([planes.x.flatten(1), biases.expand(len(planes.x), -1)], 1).to(dtype)
    parts = torch.cat([planes.image.flatten(-3), planes.bias], -1).to(dtype)
    return parts * factors.view(len(factors), *(1,) * (parts.dim() - 2), -1)


def orders(
    network: Network,
    image: Tensor,
    place: UnitOfImage,
    layer: str,
    scale: float,
) -> dict[str, Any]:
    """Sum the terms of one unit of a convolution in several orders and precisions.

    Args:
        network: Traced network in float32.
        image: The image ``(C, H, W)``.
        place: Name of the image, and the unit ``(channel, row, column)``.
        layer: Name of the layer.
        scale: The factor k of the pattern.

    Returns:
        The place, the value, the sum of the terms' magnitudes, and a relative error for each of
        ``SUM_ORDERS``. The first three sum in float32: one term after the other, from the smallest
        to the largest, and in pairs. ``"float64 sums"`` sums in float64 with the float32
        hyperplane. ``"float64"`` computes everything in float64. ``"network alone"`` uses no
        hyperplane: it compares the network's float32 value with its float64 value.
    """
    channel, row, column = place[1]
    arguments = (network, image, layer, "RM2", (row, column, channel), False, scale)
    planes = hyperplanes(*arguments)
    double = hyperplanes(*arguments, dtype=torch.float64)
    value = planes.value.cpu()
    terms = products(planes, torch.float32).flatten().cpu()
    sums = torch.tensor(
        [
            np.add.accumulate(terms.numpy())[-1],  # not torch.cumsum, which adds in float64
            np.add.accumulate(terms[terms.abs().argsort()].numpy())[-1],
            terms.sum(),
            fsum(products(planes, torch.float64).flatten().tolist()),
        ],
        dtype=torch.float64,
    )
    errors = relative_error(sums, value.expand(len(sums))).tolist()
    for total in (double.reconstruct(), planes.value.double()):
        errors.append(float(relative_error(total, double.value)))
    return {
        "place": place,
        "value": float(value),
        "magnitude": float(terms.abs().double().sum()),
        "errors": dict(zip(SUM_ORDERS, errors, strict=True)),
    }


def outside_alone(network: Network, images: Tensor, layers: Sequence[str]) -> dict[str, int]:
    """Count units whose float32 value is more than 1 % off their float64 value, per layer.

    The values are without the layer's own bias. No hyperplane is involved.

    Args:
        network: Traced network in float32.
        images: Batch in float32.
        layers: Names of layers with a kernel.
    """
    chosen = [network.layer(name) for name in layers]
    counts = dict.fromkeys(layers, 0)
    with exact(images.device):
        for part in images.split(BATCH):
            single = record(network, part, chosen)
            double = record(network, part.double(), chosen)
            for name in layers:
                layer = network.layer(name)
                value = network.kernel(layer, torch.float32).apply(single.inputs[name]).double()
                right = network.kernel(layer, torch.float64).apply(double.inputs[name])
                counts[name] += int((relative_error(right, value).abs() > SHARE_LIMIT).sum())
    return counts
