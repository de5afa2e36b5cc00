"""
Exact integrated gradients
==========================

Integrated gradients are the mean gradient on the segment from a baseline to the image. Usually they
are sampled. A piecewise-linear network has finitely many gradients there, so their sum is exact.
"""

import torch
from matplotlib import pyplot as plt
from torch import nn

import adjointbackmap as abm

# %%
# A small network learns to tell animals from vehicles on the 200 images that ship.

images = abm.data.sample()
x = images.unit_interval().double()
is_vehicle = torch.isin(images.labels, torch.tensor([0, 1, 8, 9])).long()
torch.manual_seed(0)
layers = [nn.Conv2d(3, 8, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 12)]
model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 2)).double()
optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(60):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(x), is_vehicle).backward()
    optimiser.step()
network = abm.trace(model.eval(), x[:1])

# %%
# The attributions of the score *vehicle* at a ship, from a black image.

ship = x[:1]
found = abm.integrated_gradients(network, ship, baseline=0.0, units=(1,))
print(f"{int(found.regions[0])} linear regions between black and the ship")


def sampled(steps):
    """The same with gradients at the middles of equal parts of the segment."""
    points = ((torch.arange(steps) + 0.5) / steps).view(-1, 1, 1, 1) * ship
    points.requires_grad_()
    (gradients,) = torch.autograd.grad(model(points)[:, 1].sum(), points)
    return ship[0] * gradients.mean(0)


# %%
# The exact attributions, and ten times the error of two samplings, on the same scale:

exact = found.image.reshape(ship[0].shape).sum(0)
panels = {"exact": exact}
for steps in (5, 50):
    panels[f"10 x error of {steps} samples"] = 10 * (sampled(steps).sum(0) - exact)
scale = abm.plots.Scale.of([exact.numpy()])
figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained")
axes[0].imshow(ship[0].permute(1, 2, 0))
axes[0].set_title("image", fontsize=9)
axes[0].set_axis_off()
for panel, (name, part) in zip(axes[1:], panels.items(), strict=True):
    drawn = scale.show(panel, part.numpy(), name)
figure.colorbar(drawn, ax=axes, shrink=0.7)
figure.suptitle("What each pixel adds to the score vehicle", fontsize=10)

# %%
# The exact attributions sum to the change of the score.

with torch.no_grad():
    change = (model(ship) - model(0 * ship))[0, 1]
print(f"exact: {float(found.total()):.12f}, change of the score: {float(change):.12f}")
assert abs(float(found.total() - change)) < 1e-10
for steps in (5, 50, 500):
    print(f"{steps:3} samples: sum minus change {float(sampled(steps).sum() - change):+.1e}")
