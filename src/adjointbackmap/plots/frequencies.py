"""Spectra of images and hyperplanes: pictures of amplitudes, and lines of energy per frequency."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from adjointbackmap.planes.thumbnails import PERCENTILE
from adjointbackmap.plots.drawing import (
    COLOURS,
    MARKERS,
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    colour_bar,
    finished,
    new_figure,
    wrapped,
)
from adjointbackmap.plots.scale import PIXEL_SCALE, Scale
from adjointbackmap.spectra import LOWEST, RadialProfile, high_share, log_amplitude

CHANNELS = ("red", "green", "blue")
ABOVE = 0.25  # cycles per pixel, above which the share of the energy is given
AMPLITUDES = Scale(LOWEST, 0.0, "viridis")
BAND = (0.1, 0.9)  # quantiles at the ends of a band around a line


def spectra(maps: Mapping[str, Float[Tensor, "3 h w"]], title: str) -> Drawing:
    """One row per map: the map, and the log amplitudes of its channels without DC.

    See [Wan2022, Figs. 2.8-2.10].

    All spectra share one scale, see :func:`adjointbackmap.spectra.log_amplitude`. Below each
    spectrum is the share of its energy above a quarter cycle per pixel.

    Args:
        maps: Heading -> image in [0, 1] or hyperplane, ``(3, H, W)``.
        title: Heading of the figure.

    Raises:
        ValueError: If there is no map, or they have different shapes.
    """
    shapes = {tuple(part.shape) for part in maps.values()}
    if len(shapes) != 1:
        msg = (
            f"There must be maps of one shape. Got {', '.join(map(str, sorted(shapes))) or 'none'}."
        )
        raise ValueError(msg)
    stacked = torch.stack(list(maps.values()))
    amplitudes = log_amplitude(stacked).cpu().numpy()
    shares = high_share(stacked, ABOVE).cpu().numpy()
    figure = new_figure(WIDTH, 1.2 + 2.1 * len(maps), title)
    shown: list[Axes] = []
    for r, (name, part) in enumerate(zip(maps, stacked.cpu().numpy(), strict=True)):
        axes = figure.add_subplot(len(maps), 4, 4 * r + 1)
        scale = _scale_of(part)
        scale.show(axes, part, "map" if r == 0 else "")
        if scale != PIXEL_SCALE:
            axes.set_xlabel(f"±{scale.high:.3g}", fontsize=MEDIUM)
        axes.set_ylabel(wrapped(name, 1.8, MEDIUM), fontsize=MEDIUM)
        for c, channel in enumerate(CHANNELS):
            shown.append(figure.add_subplot(len(maps), 4, 4 * r + c + 2))
            drawn = AMPLITUDES.show(shown[-1], amplitudes[r, c], channel if r == 0 else "")
            shown[-1].set_xlabel(f"above {ABOVE:g}: {100 * shares[r, c]:.1f} %", fontsize=MEDIUM)
    colour_bar(figure, drawn, shown, "log10(amplitude / largest of the channel)")
    caption = (
        "spectra without DC on one scale, frequency zero in the middle, half a cycle per pixel at "
        f"the edges; below each, the share of its energy above {ABOVE:g} cycles per pixel. "
        "Maps: images from 0 to 1; in signed ones grey is zero, black and white are the numbers ± "
        f"below each, the {PERCENTILE:g}th percentile of its magnitudes"
    )
    numbers = {
        "maps": stacked.cpu().numpy(),
        "log_amplitude": amplitudes,
        "high_share": shares,
        "titles": np.array(list(maps)),
    }
    return finished(figure, numbers, caption)


def radial_profiles(profiles: Mapping[str, RadialProfile], title: str) -> Drawing:
    """One line per profile: the share of the energy at each radial frequency.

    A band shows the range of most of the profile's maps.

    Args:
        profiles: Heading -> profile of one or more maps; the line is their mean.
        title: Heading of the figure.

    Raises:
        ValueError: If there is no profile.
    """
    if not profiles:
        msg = "There must be at least one profile to draw. Got none."
        raise ValueError(msg)
    figure = new_figure(WIDTH * 0.8, 4.4, title)
    axes = figure.add_subplot()
    numbers = {"titles": np.array(list(profiles))}
    for i, (name, profile) in enumerate(profiles.items()):
        frequency = profile.frequency.cpu().numpy()
        share = profile.share.cpu().numpy().reshape(-1, len(frequency))
        numbers |= {f"frequency_{i}": frequency, f"share_{i}": share}
        axes.plot(
            frequency,
            share.mean(0),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=name,
        )
        if len(share) > 1:
            axes.fill_between(
                frequency,
                *np.quantile(share, BAND, axis=0),
                color=COLOURS[i % len(COLOURS)],
                alpha=0.15,
                linewidth=0,
            )
    axes.set_yscale("log")
    axes.set_xlabel("radial frequency in cycles per pixel", fontsize=MEDIUM)
    axes.set_ylabel("share of the energy in a bin, without DC", fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL)
    axes.legend(fontsize=MEDIUM)
    caption = (
        "lines: mean over the maps or channels of each; bands: from the 10 % quantile to the 90 % "
        "quantile of these"
    )
    return finished(figure, numbers, caption)


def _scale_of(part: np.ndarray) -> Scale:
    """The scale of pixels if all numbers are from 0 to 1, otherwise one with zero at its centre."""
    return PIXEL_SCALE if part.min() >= 0 and part.max() <= 1 else Scale.clipped([part])
