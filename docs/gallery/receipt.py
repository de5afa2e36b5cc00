"""
The receipt of a score
======================

A receipt lists what adds up to the value of one unit: regions of the image, then the biases of each
layer. Nothing is left over.
"""

import adjointbackmap as abm

photo = abm.data.sample().pixels[7]
found = abm.explain("resnet20-cifar10", photo, dtype="float64")
found.plot("receipt")

# %%
# Each bar begins where the bar above it ends. The last two bars are the sum of the lines and the
# value of the untouched model. The same as text:

print(found.receipt)
assert abs(found.receipt.error) < 1e-10

# %%
# By channel of the image instead of by region:

by_channel = found.planes.receipt(by="channel")
for line in by_channel.lines[:3]:
    print(f"{line.name:>6}: {line.amount:+.4f}")
assert abs(by_channel.total - found.receipt.total) < 1e-10
