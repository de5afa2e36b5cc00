"""
All linear regions between two images
=====================================

On a segment between two images a score is piecewise linear. ``abm.region_line`` finds every
breakpoint exactly, so the slope of each piece is known, without a grid.
"""

import torch
from matplotlib import pyplot as plt

import adjointbackmap as abm

model = abm.models.load("vgg7-cifar10").double().eval()
x = abm.data.sample()[:1].unit_interval().double()
network = abm.trace(model, x)

# %%
# A very short segment: a change of 0.15 grey levels of each pixel, down the slope of the predicted
# score.

plane = abm.hyperplanes(network, x, "output", "RM0", units="predicted")
end = x[0] - 0.15 / 255 * plane.image[0].sign()
line = abm.region_line(network, x[0], end)
print(f"{line.regions} regions, {sum(map(len, line.flips))} changes of a gate")

# %%
# The inner product of a region's hyperplane with the direction of the segment is the slope there.
# If the network were linear, the slope would be that of the image everywhere.

unit = int(model(x).argmax())
values = line.values("output")[:, :, unit]  # at the two ends of each region
slopes = (values[:, 1] - values[:, 0]) / line.widths
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.stairs(slopes, line.t, baseline=None, color="#0072b2", linewidth=1)
axes.axhline(slopes[0], color="black", linestyle="--", label="slope at the image")
axes.set_xlabel("t: 0 is the image, 1 is 0.15 grey levels away")
axes.set_ylabel("slope of the score")
axes.set_title(f"{line.regions} linear regions in 0.15 grey levels")
axes.legend()

# %%
# Slopes times widths sum to the change of the score, to rounding. At the middle of each region the
# line gives what the untouched model computes.

with torch.no_grad():
    scores = model(torch.stack([x[0], end]))[:, unit]
    middle = model(line.at(line.middles[:50]))[:, unit]
difference = float((slopes * line.widths).sum() - (scores[1] - scores[0]))
print(f"sum of slope x width minus change of the score: {difference:.1e}")
assert abs(difference) < 1e-10
assert (values.mean(1)[:50] - middle).abs().max() < 1e-10
