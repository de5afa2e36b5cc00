"""
Every unit is verified
======================

``abm.verify`` reconstructs every unit of every layer from its hyperplane and compares it with the
untouched model.
"""

from matplotlib import pyplot as plt

import adjointbackmap as abm

x = abm.data.sample()[:1].unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
checks = {
    "float32": abm.verify(network, x),
    "float64": abm.verify(network, x, dtype="float64"),
}

# %%
# The error of a unit is divided by the scale of its rounding, ``sum |x h| + sum |b h|``. These are
# the largest of each layer:

figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
for (name, layers), epsilon in zip(checks.items(), (1.2e-7, 2.2e-16), strict=True):
    errors = [check.scaled for check in layers.values()]
    (drawn,) = axes.plot(list(layers), errors, "o-", label=name)
    axes.axhline(epsilon, color=drawn.get_color(), linestyle=":", label=f"epsilon of {name}")
axes.set_yscale("log")
axes.set_ylabel("largest scaled error")
axes.set_title("All units of each layer of VGG7 at one image")
axes.legend(loc="center right", fontsize=8)

# %%
# No error is more than a few times the epsilon of the arithmetic: all of them are rounding.

for name, check in checks["float64"].items():
    print(f"{name:>6}: {check.units:7,} units, largest scaled error {check.scaled:.1e}")
    assert check.scaled < 1e-14
