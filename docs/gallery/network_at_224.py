"""
A residual network at 224 pixels
================================

Images of 224 x 224 have 150,528 numbers, and the unit of a layer in the middle sees a small part of
them. Windows of the receptive field keep the cost small.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import adjointbackmap as abm

torch.manual_seed(0)


class Block(nn.Module):
    """Two convolutions with batch norm and a shortcut, as in ResNet-18."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


stem = [nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
blocks = [Block(16, 32, 1), Block(32, 64, 2), Block(64, 64, 2)]
head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1000)]
model = nn.Sequential(*stem, *blocks, *head).eval()
for module in model.modules():  # batch norms as after training, with other numbers than 0 and 1
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.bias, 0, 0.2)
        module.running_mean.normal_(0, 0.2)

# %%
# A photo in the size of a camera's, drawn from a test image. ``preprocess="imagenet"`` resizes,
# crops and normalises it as the weights of torchvision ask for.

pixels = abm.data.sample().pixels[4].permute(1, 2, 0).numpy()
photo = Image.fromarray(pixels).resize((960, 720), Image.Resampling.BICUBIC)
x = abm.image(photo, preprocess="imagenet")
network = abm.trace(model, x)
print(network.layers["5.conv2"])

# %%
# One unit in the middle of the photo. Its receptive field is drawn in the photo's own pixels.

planes = abm.hyperplanes(network, x, "5.conv2", units=(13, 12, 3), dtype="float64")
planes.plot(over=x, what="contributions")

# %%
# What the pixels and the biases add sums to the value of the unit.

receipt = planes.receipt()
print(f"{receipt.total:.12f} - {receipt.value:.12f} = {receipt.error:.1e}")
assert abs(receipt.error) < 1e-12
