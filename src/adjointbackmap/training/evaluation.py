"""The accuracy of a network on images."""

import torch
from torch import nn

from adjointbackmap import data
from adjointbackmap.capture.precision import exact


def accuracy(model: nn.Module, images: data.Images, prepare: nn.Module, batch: int = 500) -> float:
    """Share of images whose largest output is their label, in float32 and eval mode.

    The mode of the model is restored.

    Args:
        model: Network of class scores.
        images: Images with labels.
        prepare: Map from pixels in [0, 1] to the network's input.
        batch: Images per forward pass.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        right = 0
        with exact(device):
            for start in range(0, len(images), batch):
                part = images[start : start + batch]
                x = prepare(part.unit_interval().to(device))
                scores = model(x.contiguous(memory_format=torch.channels_last))
                right += int((scores.argmax(1).cpu() == part.labels).sum())
    finally:
        model.train(was_training)
    return right / len(images)
