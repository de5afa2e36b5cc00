"""
Five modes are sums of each other
=================================

The dissertation reconstructs a layer in five ways, RM0 to RM4. RM4 is the finest: one kernel at one
position. Sums over its dimensions give the others.
"""

from matplotlib import pyplot as plt

import adjointbackmap as abm

x = abm.data.sample()[:1].unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
OUT = 17  # one out-channel of conv1, which has 32 x 32 positions and 32 in-channels


def of(mode, *units):
    """Hyperplanes of conv1, in float64."""
    return abm.hyperplanes(network, x, "conv1", mode, units=units, dtype="float64")


# %%
# RM4 has a hyperplane for each row, column, in-channel and out-channel. We compute all in-channels
# at one position, and all positions for one in-channel.

ROW, COLUMN, IN = 12, 20, 5
every = slice(None)
kernels = of("RM4", ROW, COLUMN, every, OUT)
positions = of("RM4", every, every, IN, OUT)

# RM3 sums positions, RM2 sums in-channels (it is a unit of the layer), and RM1 sums both.
rm3, rm2, rm1 = of("RM3", every, OUT), of("RM2", every, every, OUT), of("RM1", OUT)

# %%
# Dimensions of ``image`` are the image's number, those of the units, then channel, row and column.

differences = {
    "RM4 over in-channels - RM2": kernels.image.sum(1) - rm2.image[:, ROW, COLUMN],
    "RM4 over positions - RM3": positions.image.sum((1, 2)) - rm3.image[:, IN],
    "RM2 over positions - RM1": rm2.image.sum((1, 2)) - rm1.image,
    "RM3 over in-channels - RM1": rm3.image.sum(1) - rm1.image,
}
for name, difference in differences.items():
    print(f"{name}: largest difference {difference.abs().max():.1e}")
    assert difference.abs().max() < 1e-10

# %%
# The kernel parts of one unit with the largest hyperplanes, and their sum over all in-channels. All
# panels show the unit's receptive field and have one scale; grey is zero.

parts = kernels.image[0]
largest = parts.flatten(1).norm(dim=1).argsort(descending=True)[:5].tolist()
cut = (slice(None), slice(ROW - 2, ROW + 3), slice(COLUMN - 2, COLUMN + 3))
panels = {f"RM4, in-channel {i}": parts[i][cut].numpy() for i in largest}
panels["RM2: all 32 summed"] = rm2.image[0, ROW, COLUMN][cut].numpy()
scale = abm.plots.Scale.of(panels.values())
figure, axes = plt.subplots(1, 6, figsize=(9, 2.1), layout="constrained")
for panel, (name, part) in zip(axes, panels.items(), strict=True):
    scale.show(panel, part, name, size=8.0)
figure.suptitle(f"Unit ({ROW}, {COLUMN}, {OUT}) of conv1, and five of its 32 kernels", fontsize=10)

# %%
# RM0 is the mode of fully connected layers. Its units are the outputs; there is nothing to sum.

rm0 = abm.hyperplanes(network, x, "fc", "RM0", dtype="float64")
assert rm0.image.shape == (1, 10, 3, 32, 32)
abm.reconstruction_test(rm0)
