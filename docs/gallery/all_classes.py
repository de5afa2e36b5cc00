"""
The hyperplanes of all classes
==============================

At one image, each output of a network is a linear function of the image and the biases. VGG7 has
ten classes, so there are ten hyperplanes.
"""

import adjointbackmap as abm

images = abm.data.sample()[:1]
x = images.unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
planes = abm.hyperplanes(network, x, "fc", "RM0", dtype="float64")

# %%
# Above each hyperplane is the score of its class. The largest score is bold. Next to it is the bias
# part: one weight for each of the network's 384 biases.

abm.plots.class_hyperplanes(planes, abm.data.CIFAR10_CLASSES, x[0], "A ship and its ten classes")

# %%
# A score is the sum of what the pixels and the biases add.

added = planes.contributions()
pixels = added.image.flatten(2).sum(2)[0]
biases = sum(part[0].flatten(1).sum(1) for part in added.bias.values())
for name, p, b, score in zip(
    abm.data.CIFAR10_CLASSES, pixels, biases, planes.value[0], strict=True
):
    print(f"{name:>10}: pixels {p:+8.4f} + biases {b:+8.4f} = {p + b:8.4f}, score {score:8.4f}")
assert (pixels + biases - planes.value[0]).abs().max() < 1e-12
