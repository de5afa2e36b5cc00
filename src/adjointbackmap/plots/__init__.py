"""Pictures of images, hyperplanes and measurements. Data go in, a :class:`Drawing` comes out."""

from adjointbackmap.plots.biases import bias_parts, near_square
from adjointbackmap.plots.classes import class_hyperplanes, differences
from adjointbackmap.plots.curves import training_curves
from adjointbackmap.plots.drawing import Drawing, save
from adjointbackmap.plots.frequencies import radial_profiles, spectra
from adjointbackmap.plots.groups import by_layer, points
from adjointbackmap.plots.images import attacked, attributions
from adjointbackmap.plots.over import over_image
from adjointbackmap.plots.receipt import receipt
from adjointbackmap.plots.scale import SIGNED, Scale, centred
from adjointbackmap.plots.units import MOST_PANELS, kernel_hyperplanes, unit_hyperplanes

__all__ = [  # noqa: RUF022 - grouped by what is drawn
    # common parts of all pictures, and saving
    "Drawing",
    "save",
    "Scale",
    "SIGNED",
    "centred",
    # hyperplanes and bias parts
    "class_hyperplanes",
    "differences",
    "unit_hyperplanes",
    "kernel_hyperplanes",
    "MOST_PANELS",
    "bias_parts",
    "near_square",
    # one unit over a photo, and what adds up to its value
    "over_image",
    "receipt",
    # images
    "attacked",
    "attributions",
    # measurements
    "spectra",
    "radial_profiles",
    "points",
    "by_layer",
    "training_curves",
]
