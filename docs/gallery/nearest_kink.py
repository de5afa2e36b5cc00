"""
The nearest kink
================

A network is one linear map only in the linear region of the image. The region ends where a unit
changes its piece, at a *kink*. The distance to each kink is exact: ``|c| / norm(H)``.
"""

import torch
from matplotlib import pyplot as plt

import adjointbackmap as abm

x = abm.data.sample()[:1].unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
kinks = abm.kink_distances(network, x, sweep=torch.float32)
nearest = kinks.nearest("l2")
print(f"{nearest.name}, unit {nearest.unit}: l2 distance {nearest.distance('l2'):.2e}")

# %%
# The distances of all units of each operation, from the image to the class boundaries. The region
# is tiny, and the boundary of the second class is orders of magnitude farther away than the nearest
# kink.

scores = abm.hyperplanes(network, x, "output", "RM0").value[0]
first, second = scores.topk(2).indices.tolist()
border = abm.boundary(network, x[0], first, second).distance("l2")
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for i, distances in enumerate(kinks.distances.values()):
    finite = distances[0].flatten()
    finite = finite[torch.isfinite(finite) & (finite > 0)].log10().numpy()
    axes.violinplot(finite, [i], widths=0.9, showextrema=True)
axes.axhline(torch.tensor(border).log10(), color="black", linestyle="--", label="class boundary")
axes.set_xticks(range(len(kinks.distances)), list(kinks.distances), rotation=60, fontsize=8)
axes.set_ylabel("log10 of the l2 distance")
axes.set_title("Distance to the kink of each unit, by operation")
axes.legend()

# %%
# One millionth before the nearest kink the activation pattern is that of the image. One millionth
# behind it, it is another one.

double = x.double()
step = nearest.step("l2")


def pattern(share):
    """Activation pattern at a share of the step."""
    return abm.record_pattern(network, double + share * step, dtype="float64")


here = pattern(0.0)
assert pattern(1 - 1e-6).equal(here)
assert not pattern(1 + 1e-6).equal(here)
