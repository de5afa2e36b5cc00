"""
The linear regions of a plane
=============================

Three images span a plane. ``abm.region_map`` cuts a window of it into exact convex polygons, one
linear map each, and finds the decision boundary.
"""

import torch
from torch import nn

import adjointbackmap as abm

# %%
# A small network learns to tell animals from vehicles on the 200 images that ship.

images = abm.data.sample()
x = images.unit_interval().double()
is_vehicle = torch.isin(images.labels, torch.tensor([0, 1, 8, 9])).long()
torch.manual_seed(0)
layers = [nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(8, 2)).double()
optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(150):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(x), is_vehicle).backward()
    optimiser.step()
network = abm.trace(model.eval(), x[:1])

# %%
# The window around a ship, a frog and a car. Thin lines are the borders of linear regions, black
# is the decision boundary.

ship, frog, car = (x[int((images.labels == c).nonzero()[0])] for c in (8, 6, 1))
window = ((-0.3, 1.3), (-0.3, 1.3))
found = abm.region_map(network, ship, frog - ship, car - ship, window)
figure = found.plot(names=["animal", "vehicle"], marks=["ship", "frog", "car"])

# %%
# The areas of the polygons sum to the window's area. ``map_test`` compares gates and values with
# those of the model at random points.

print(f"{len(found.polygons)} polygons cover {found.covered:.12f} of the window")
print(abm.map_test(found))
assert found.complete
assert abs(found.covered - 1) < 1e-10
