"""
An adversarial example and its hyperplanes
==========================================

Noise that nobody sees changes the class. The image and its adversarial example are in different
linear regions, so they have different hyperplanes.
"""

import torch

import adjointbackmap as abm
from adjointbackmap.attacks import Attack, basic_iterative

images = abm.data.sample()
horses = images[images.labels == 7][:1]
pixels, labels = horses.unit_interval(), horses.labels
model = abm.models.load("vgg7-cifar10")
attack = Attack(1 / 255, iterations=10, until_success=True)
found = basic_iterative(model, pixels, labels, attack)
names = [abm.data.CIFAR10_CLASSES[int(c)] for c in (found.before[0], found.after[0])]
print(f"{names[0]} becomes {names[1]} after {int(found.steps[0])} steps of 1/255")

# %%
# The noise is enlarged twenty times in the third panel.

abm.plots.attacked(
    found.pixels[0], found.adversarial[0], "Basic iterative method", tuple(names), factor=20.0
)

# %%
# The adversarial image has its own hyperplanes, which give its scores. The hyperplanes of the
# original image do not.

network = abm.trace(model, pixels)
both = torch.cat([found.pixels, found.adversarial])
planes = abm.hyperplanes(network, both, "fc", "RM0", dtype="float64")
theirs = planes.value[1]  # scores of the adversarial image
right = planes.reconstruct(both.double())[1]
wrong = planes.reconstruct(both.double().flip(0))[0]  # hyperplanes of the original image
for name, score, own, other in zip(abm.data.CIFAR10_CLASSES, theirs, right, wrong, strict=True):
    print(f"{name:>10}: score {score:8.4f}, own hyperplane {own:8.4f}, original's {other:8.4f}")
assert (right - theirs).abs().max() < 1e-12
assert (wrong - theirs).abs().max() > 0.01
