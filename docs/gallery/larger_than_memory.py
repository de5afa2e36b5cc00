"""
Larger than memory
==================

All hyperplanes of a layer are often larger than memory. ``abm.save`` computes them in blocks and
writes them to a store; ``abm.open`` reads any part of it.
"""

import tempfile
from pathlib import Path

from matplotlib import pyplot as plt

import adjointbackmap as abm

x = abm.data.sample()[5:6].unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
print(abm.plan(network, "conv2", "RM2"))

# %%
# The hyperplanes of one out-channel of ``conv2`` at all positions, with 4 MiB for each block.

folder = Path(tempfile.mkdtemp()) / "conv2"
channel = 9
chosen = (slice(None), slice(None), channel)
abm.save(folder, network, x, "conv2", "RM2", units=chosen, memory="4MiB")
size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
stored = abm.open(folder)
print(stored.shape, f"{size / 2**20:.1f} MiB on disk")

# %%
# The store is read with xarray. What the biases and the pixels add to each unit of the channel are
# two maps. Their sum is the map of the channel.

data = stored.to_xarray().isel(n=0)
biases = (data["bias"] * data["b"]).sum("m").values
pixels = stored.reconstruct()[0].numpy() - biases
maps = {"pixels": pixels, "biases": biases, "model": data["value"].values}
scale = abm.plots.Scale.of(maps.values())
figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained")
axes[0].imshow(x[0].permute(1, 2, 0))
axes[0].set_title("image", fontsize=9)
axes[0].set_axis_off()
for panel, (name, part) in zip(axes[1:], maps.items(), strict=True):
    drawn = scale.show(panel, part, name)
figure.colorbar(drawn, ax=axes, shrink=0.7)
figure.suptitle(f"Channel {channel} of conv2: pixels + biases = value of the model", fontsize=10)

# %%
# The largest difference is rounding of float32.

difference = abs(pixels + biases - maps["model"]).max()
print(f"largest difference {difference:.1e}, largest value {abs(maps['model']).max():.2f}")
assert difference < 1e-5
