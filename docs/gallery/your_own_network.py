"""
A network of your own
=====================

Any ``torch.nn.Module`` in eval mode will do, if its operations are piecewise affine. Here a small
network learns to tell animals from vehicles, on the 200 images that ship, in a few seconds.
"""

import torch
import torch.nn.functional as F
from torch import nn

import adjointbackmap as abm

torch.manual_seed(0)
images = abm.data.sample()
x = images.unit_interval()
is_vehicle = torch.isin(images.labels, torch.tensor([0, 1, 8, 9])).long()


class Small(nn.Module):
    """Two convolutions with a residual branch, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 8 * 8, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(2 * x - 1)))
        x = F.max_pool2d(x + F.leaky_relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


model = Small()
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(40):
    optimiser.zero_grad()
    F.cross_entropy(model(x), is_vehicle).backward()
    optimiser.step()
model.eval()
accuracy = (model(x).argmax(1) == is_vehicle).float().mean()
print(f"{100 * accuracy:.0f} % of the images it learned from")

# %%
# ``explain`` traces the model and explains its largest output. The layers are those of the module;
# the number that ``2 * x - 1`` subtracts is a bias too.

found = abm.explain(model, x[0], classes=("animal", "vehicle"), dtype="float64")
found.plot("contributions")

# %%
# The lines of the receipt sum to what the module computes in float64.

print(found.receipt)
assert abs(found.receipt.error) < 1e-12
