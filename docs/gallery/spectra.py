"""
Spectra of hyperplanes and of white noise
=========================================

To the eye the hyperplane of a class looks like noise. Are there patterns that the eye does not see?
The energy at each frequency answers this.
"""

import torch

import adjointbackmap as abm

images = abm.data.sample()[:10]
x = images.unit_interval()
network = abm.trace(abm.models.load("vgg7-cifar10"), x)
planes = abm.hyperplanes(network, x, "fc", "RM0", units="predicted")

# %%
# ``radial_energy`` gives the share of the energy at each radial frequency, for each channel.

maps = {
    "test images": x,
    "hyperplanes of the predicted classes": planes.image,
    "white noise": torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
}
profiles = {name: abm.spectra.radial_energy(part) for name, part in maps.items()}
abm.plots.radial_profiles(profiles, "Where the energy is: ten images and their hyperplanes")

# %%
# Images have most energy at low frequencies. The hyperplanes of this network have almost the
# spectrum of white noise, with less energy at the lowest frequencies.
#
# The shares of each map sum to one. Those above a quarter cycle per pixel are:

for name, part in maps.items():
    assert (profiles[name].share.sum(-1) - 1).abs().max() < 1e-5
    print(f"{name}: {100 * abm.spectra.high_share(part).mean():.1f} % above 0.25 cycles per pixel")
