"""Spectra of images and hyperplanes: amplitudes per frequency, and shares of the energy."""

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.display import ShownFields

LOWEST = -4.0  # smaller log amplitudes become this: 1/10000 of the map's largest
HIGHEST_FREQUENCY = sqrt(0.5)  # cycles per pixel, at the corner of the spectrum


@dataclass(frozen=True, repr=False)
class RadialProfile(ShownFields):
    """Energy per radial frequency.

    Attributes:
        frequency: Middle of each bin in cycles per pixel, ``(bins,)``.
        share: Share of each map's energy in the bin, ``(*n, bins)``. The shares sum to 1, or to 0
            for a constant map.
    """

    frequency: Float[Tensor, " bins"]
    share: Float[Tensor, "*n bins"]


def log_amplitude(maps: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    r"""Centred log amplitude of each map without DC [Wan2022, Figs. 2.8-2.10].

    Frequency zero is at ``(h // 2, w // 2)``.

    The value is :math:`\log_{10} \max(|F| / \max |F|,\ 10^{-4})`, where F is the discrete Fourier
    transform with F(0, 0) = 0. It ranges from -4, also for a zero amplitude, to 0 at the map's
    largest amplitude. Multiplying a map by a number does not change it. Images and hyperplanes,
    which have different units, can therefore be compared.

    Args:
        maps: Images, hyperplanes, or their channels.

    Raises:
        ValueError: If these are not maps of floating-point numbers.

    Example:
        >>> chessboard = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # only the highest frequency
        >>> log_amplitude(chessboard).tolist()
        [[0.0, -4.0], [-4.0, -4.0]]
    """
    return torch.fft.fftshift(_amplitude(maps).clamp(min=10**LOWEST).log10(), dim=(-2, -1))


def radial_energy(maps: Float[Tensor, "*n h w"], bins: int | None = None) -> RadialProfile:
    """Share of each map's energy (squared amplitude without DC) per radial frequency.

    Args:
        maps: Images, hyperplanes, or their channels.
        bins: Number of bins of equal width. They go from half the lowest frequency to the highest
            one, sqrt(1/2) cycles per pixel. The default is half the number of pixels of the smaller
            side.

    Raises:
        ValueError: If these are not maps of floating-point numbers, or there is no bin.

    Example:
        >>> phase = torch.arange(16) / 4  # a quarter cycle per pixel
        >>> wave = torch.cos(2 * torch.pi * phase).expand(16, 16)
        >>> profile = radial_energy(wave, bins=4)
        >>> [round(f, 2) for f in profile.frequency.tolist()]
        [0.12, 0.28, 0.45, 0.62]
        >>> profile.share.round(decimals=3).tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    energy = _energy(maps)
    bins = max(1, min(maps.shape[-2:]) // 2) if bins is None else bins
    if bins < 1:
        msg = f"bins must be at least 1. Got {bins}."
        raise ValueError(msg)
    edges = torch.linspace(
        0.5 / max(maps.shape[-2:]),
        HIGHEST_FREQUENCY,
        bins + 1,
        dtype=torch.float64,
    )
    bin_of = torch.bucketize(_radius(maps), edges[1:-1].to(maps.device), right=True).flatten()
    share = energy.new_zeros(*maps.shape[:-2], bins).index_add(-1, bin_of, energy.flatten(-2))
    return RadialProfile(((edges[1:] + edges[:-1]) / 2).to(maps), share)


def high_share(maps: Float[Tensor, "*n h w"], above: float = 0.25) -> Float[Tensor, "*n"]:
    """Share of each map's energy above a radial frequency, without DC; 0 for a constant map.

    Args:
        maps: Images, hyperplanes, or their channels.
        above: The frequency in cycles per pixel. The default belongs to waves of four pixels: half
            the highest frequency along a row.

    Raises:
        ValueError: If these are not maps of floating-point numbers, or no frequency can lie above.

    Example:
        >>> high_share(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        1.0
    """
    if not 0 <= above < HIGHEST_FREQUENCY:
        msg = (
            "above must be a frequency from 0 to less than "
            f"sqrt(1/2) = {HIGHEST_FREQUENCY:.4f} cycles per pixel. Got {above}."
        )
        raise ValueError(msg)
    return (_energy(maps) * (_radius(maps) > above)).sum((-2, -1))


def mean_frequency(maps: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Mean radial frequency of each map in cycles per pixel; 0 for a constant map.

    Frequencies are weighted by their energy, without DC.

    Args:
        maps: Images, hyperplanes, or their channels.

    Raises:
        ValueError: If these are not maps of floating-point numbers.

    Example:
        >>> round(mean_frequency(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item(), 3)
        0.5
    """
    return (_energy(maps) * _radius(maps).to(maps)).sum((-2, -1))


def _amplitude(maps: Tensor) -> Tensor:
    """Amplitudes relative to the map's largest, with frequency zero first.

    DC is set to zero. Amplitudes within the rounding error of the map's sum are set to zero too.

    Raises:
        ValueError: If these are not maps of floating-point numbers.
    """
    if maps.dim() < 2 or not maps.is_floating_point() or 0 in maps.shape[-2:]:
        msg = (
            "Maps must be floating numbers of shape (..., H, W). "
            f"Got {tuple(maps.shape)} of {maps.dtype}."
        )
        raise ValueError(msg)
    amplitude = torch.fft.fft2(maps).abs()
    amplitude[..., 0, 0] = 0
    rounding = torch.finfo(maps.dtype).eps * maps.abs().sum((-2, -1), keepdim=True)
    amplitude = torch.where(amplitude > rounding, amplitude, 0)
    return _shares(amplitude, amplitude.amax((-2, -1), keepdim=True))


def _energy(maps: Tensor) -> Tensor:
    """Share of the energy at each frequency, frequency zero first; zeros for a constant map."""
    energy = _amplitude(maps).square()
    return _shares(energy, energy.sum((-2, -1), keepdim=True))


def _shares(parts: Tensor, whole: Tensor) -> Tensor:
    return parts / torch.where(whole > 0, whole, 1)


def _radius(maps: Tensor) -> Tensor:
    """Radial frequency at each place of the spectrum in cycles per pixel, ``(h, w)``.

    It is float64, so that 1/4 is exactly 1/4.
    """
    rows, columns = (
        torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=maps.device) / n
        for n in maps.shape[-2:]
    )
    return torch.hypot(rows[:, None], columns)
