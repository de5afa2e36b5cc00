"""
One unit over a photo
=====================

Where does a unit look, and what does each pixel mean to it? The effective hyperplane of a unit has
one weight for each pixel, and is zero outside of the unit's receptive field.
"""

from PIL import Image

import adjointbackmap as abm

# %%
# Any photo will do. This one is drawn from a test image of CIFAR-10, on a grey background.

picture = abm.data.sample().pixels[13].permute(1, 2, 0).numpy()
photo = Image.new("RGB", (640, 420), (150, 160, 170))
photo.paste(Image.fromarray(picture).resize((400, 400), Image.Resampling.BICUBIC), (120, 10))

# %%
# ``abm.image`` resizes and crops the photo as the network takes it, and remembers what it did.

x = abm.image(photo, size=32)
network = abm.trace(abm.models.load("vgg7-cifar10"), x)

# %%
# Of all units of ``conv4`` we take the one with the largest value. Its place is
# ``(row, column, channel)``.

values = abm.hyperplanes(network, x, "conv4", "RM2").value[0]
place = tuple(int(i) for i in (values == values.max()).nonzero()[0])
planes = abm.hyperplanes(network, x, "conv4", units=place, dtype="float64")
planes.plot(over=x)

# %%
# The first panel is the photo in its own pixels. White and dashed is what the network saw, gold is
# the receptive field of the unit. The other panels are zoomed to the field.
#
# The inner product of the hyperplane with the image and the biases is the value that the untouched
# model computes:

difference = float(planes.reconstruct() - planes.value)
print(f"{float(planes.reconstruct()):.12f} - {float(planes.value):.12f} = {difference:.1e}")
assert abs(difference) < 1e-12
