"""
A time series
=============

The library takes inputs with one dimension as well. A network with ``Conv1d`` learns to find a
chirp in noise; its receipt says at which times it found it.
"""

import torch
from matplotlib import pyplot as plt
from torch import nn

import adjointbackmap as abm

torch.manual_seed(0)
LENGTH = 128


def series(count):
    """Noise ``(count, 1, LENGTH)``; in every second one there is a chirp at a random time."""
    x = 0.5 * torch.randn(count, 1, LENGTH)
    time = torch.arange(24.0)
    chirp = 1.6 * torch.sin(0.035 * time**2) * torch.hann_window(24)
    starts = torch.randint(LENGTH - 24, (count,))
    for i in range(0, count, 2):
        x[i, 0, starts[i] : starts[i] + 24] += chirp
    return x, torch.arange(count) % 2, starts


model = nn.Sequential(
    nn.Conv1d(1, 12, 9, padding=4),
    nn.ReLU(),
    nn.Conv1d(12, 12, 9, padding=4),
    nn.ReLU(),
    nn.AdaptiveMaxPool1d(1),
    nn.Flatten(),
    nn.Linear(12, 2),
)
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(120):
    x, labels, _ = series(64)
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimiser.step()
model.eval()
x, labels, starts = series(400)
print(f"{100 * (model(x).argmax(1) == labels).float().mean():.0f} % of new series are right")

# %%
# The hyperplane of the score for *chirp*, at a series that has one. A contribution is the value of
# the series at a time, multiplied by the hyperplane there.

network = abm.trace(model, x[:1])
planes = abm.hyperplanes(network, x[:1], "output", "RM0", units=0, dtype="float64")
added = planes.contributions().image.flatten()
figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
top.plot(x[0, 0], color="black", linewidth=1)
top.set_ylabel("series")
bottom.bar(range(LENGTH), added, color=["#d7191c" if a > 0 else "#0072b2" for a in added], width=1)
bottom.set_ylabel("adds to the score")
bottom.set_xlabel("time")
for axes in (top, bottom):
    axes.axvspan(starts[0], starts[0] + 24, color="gold", alpha=0.3, label="the chirp")
top.legend(loc="upper right")
top.set_title("A series, and what each time adds to the score for a chirp")

# %%
# Regions of time and the biases sum to the score.

receipt = planes.receipt()
print(receipt)
assert abs(receipt.error) < 1e-12
