"""Scales of colours for signed maps. Panels that are compared share one scale."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from adjointbackmap.planes.thumbnails import PERCENTILE, limit_of
from adjointbackmap.plots.drawing import MEDIUM

SIGNED = "RdBu_r"  # red is positive, blue negative, white zero


@dataclass(frozen=True)
class Scale:
    """The numbers at the two ends of the colour range.

    Attributes:
        low: Number that is black or the darkest blue.
        high: Number that is white or the darkest red.
        colour_map: Name of matplotlib's colour map for maps of one channel.
        beyond: Share of the numbers other than zero that are beyond the two ends.
        largest: The largest magnitude, if some numbers are beyond the ends.
    """

    low: float
    high: float
    colour_map: str = SIGNED
    beyond: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], normalised: bool = False) -> "Scale":
        """The scale of several panels.

        Zero is at its centre, or the study's normalisation maps all panels together to [0, 1].

        Args:
            parts: Data of the panels.
            normalised: Whether the ends are the smallest and the largest number [Wan2022, section
                4.3.1]. Otherwise zero is at the centre.

        Example:
            >>> part = np.array([-1.0, 3.0])
            >>> signed, normalised = Scale.of([part]), Scale.of([part], normalised=True)
            >>> signed.low, signed.high, normalised.low, normalised.high
            (-3.0, 3.0, -1.0, 3.0)
        """
        sized = [p for p in parts if p.size]
        low = min((float(p.min()) for p in sized), default=0.0)
        high = max((float(p.max()) for p in sized), default=0.0)
        if normalised:
            return cls(low, high if high > low else low + 1.0, "gray")
        limit = max(-low, high) or 1.0
        return cls(-limit, limit)

    @classmethod
    def clipped(cls, parts: Sequence[np.ndarray], normalised: bool = False) -> "Scale":
        """The scale of several panels that ends at the 99.5th percentile of their magnitudes.

        A few large numbers then do not make all other panels look empty. Zeros do not count. The
        study's normalisation clips nothing.

        Args:
            parts: Data of the panels.
            normalised: As for :meth:`of`.

        Example:
            >>> scale = Scale.clipped([np.array([0.0, -1.0] * 500), np.array([50.0])])
            >>> scale.high, scale.largest, round(scale.beyond, 4)
            (1.0, 50.0, 0.002)
        """
        if normalised or not any(part.size for part in parts):
            return cls.of(parts, normalised)
        magnitudes = np.abs(np.concatenate([part.ravel() for part in parts]))
        limit = limit_of(magnitudes)
        beyond = (magnitudes > limit).sum() / max(1, (magnitudes > 0).sum())
        return cls(-limit, limit, SIGNED, float(beyond), float(magnitudes.max()))

    def colours(self, part: np.ndarray) -> np.ndarray:
        """A map with three channels ``(3, H, W)`` as colours ``(H, W, 3)`` from 0 to 1."""
        return ((np.moveaxis(part, 0, -1) - self.low) / (self.high - self.low)).clip(0, 1)

    def show(
        self,
        axes: Axes,
        part: np.ndarray,
        title: str = "",
        size: float = MEDIUM,
        bold: bool = False,
    ) -> AxesImage:
        """Draw a map: ``(3, H, W)`` in its own colours, ``(H, W)`` in the colour map."""
        colours = self.colours(part) if part.ndim == 3 else part
        drawn = axes.imshow(
            colours,
            cmap=self.colour_map,
            vmin=self.low,
            vmax=self.high,
            interpolation="nearest",
        )
        axes.set_aspect("equal" if part.shape[-2] > 1 else "auto")
        axes.set_title(title, fontsize=size, fontweight="bold" if bold else "normal")
        axes.set_xticks([])
        axes.set_yticks([])
        return drawn

    def words(self, unit: str, channels: bool = True) -> str:
        """The scale in words, for a caption.

        Args:
            unit: Unit of the numbers.
            channels: Whether the maps have three channels, so that their own colours are shown.

        Example:
            >>> Scale(-2.0, 2.0).words("logits per pixel value")
            'grey is zero, black -2 and white 2 logits per pixel value'
        """
        signed = self.colour_map == SIGNED
        dark, light, middle = (
            ("blue", "red", "white") if signed and not channels else ("black", "white", "grey")
        )
        ends = f"{dark} {self.low:.3g} and {light} {self.high:.3g} {unit}"
        if not signed:
            return f"normalised to [0, 1], {ends}"
        return f"{middle} is zero, {ends}{self._clipping()}"

    def _clipping(self) -> str:
        """How many numbers are beyond the ends, in words; empty if there are none."""
        if not self.beyond:
            return ""
        return (
            f" (the {PERCENTILE:g}th percentile; {100 * self.beyond:.2g} % of the numbers are "
            f"beyond, the largest {self.largest:.3g})"
        )


PIXEL_SCALE = Scale(0.0, 1.0, "gray")


def centred(part: Float[Tensor, "c h w"], scale: float) -> np.ndarray:
    """A signed image part ``(C, H, W)`` as colours ``(H, W, C)``.

    Zero is mid-grey and ``scale`` is white.

    Example:
        >>> import torch
        >>> centred(torch.zeros(3, 1, 1), 1.0).tolist()
        [[[0.5, 0.5, 0.5]]]
    """
    return Scale(-(scale or 1.0), scale or 1.0).colours(part.cpu().double().numpy())


def drawable(parts: Tensor, units: int = 1) -> np.ndarray:
    """Parts ``(*units, ...)`` as maps that can be drawn.

    Three channels stay, other numbers of channels are summed, and parts without rows and columns
    are flat.

    Args:
        parts: Image parts.
        units: Number of dimensions of the units.

    Example:
        >>> import torch
        >>> [drawable(torch.zeros(2, *s)).shape for s in ((3, 4, 5), (2, 4, 5), (6,), (2, 7))]
        [(2, 3, 4, 5), (2, 4, 5), (2, 1, 6), (2, 2, 7)]
    """
    inner = parts.dim() - units
    if inner == 3 and parts.shape[units] != 3:
        parts = parts.sum(units)
    elif inner == 1:
        parts = parts.unsqueeze(units)
    elif inner > 3:
        parts = parts.flatten(units + 1)
    return parts.cpu().numpy()
