"""Spectra of images and hyperplanes: amplitudes by frequency, and how much of the energy is at high ones."""

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

LOWEST = -4.0  # log amplitudes stop here: a ten-thousandth of the map's largest
HIGHEST_FREQUENCY = sqrt(0.5)  # cycles per pixel, at the corner of the spectrum


@dataclass(frozen=True)
class RadialProfile:
    """Energy by radial frequency.

    Attributes:
        frequency: Middle of each bin in cycles per pixel, ``(bins,)``.
        share: Share of each map's energy in the bin, ``(*n, bins)``: sums to 1, or to 0 for a constant map.
    """

    frequency: Float[Tensor, " bins"]
    share: Float[Tensor, "*n bins"]


def log_amplitude(maps: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    r"""Centred log amplitude of each map without DC [Wan2022, Figs. 2.8-2.10], frequency zero at ``(h // 2, w // 2)``.

    :math:`\log_{10} \max(|F| / \max |F|,\ 10^{-4})`, where F is the discrete Fourier transform with F(0, 0) = 0: from -4, which
    a zero amplitude has too, to 0 at the map's largest. It does not change when a map is multiplied by a number, so that
    images and hyperplanes, which have different units, can be compared.

    Args:
        maps: Images, hyperplanes or channels of these.

    Raises:
        ValueError: If these are no maps of floating numbers.

    Example:
        >>> log_amplitude(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()  # a chessboard: the highest frequency alone
        [[0.0, -4.0], [-4.0, -4.0]]
    """
    return torch.fft.fftshift(_amplitude(maps).clamp(min=10**LOWEST).log10(), dim=(-2, -1))


def radial_energy(maps: Float[Tensor, "*n h w"], bins: int | None = None) -> RadialProfile:
    """Share of each map's energy (squared amplitude without DC) by radial frequency.

    Args:
        maps: Images, hyperplanes or channels of these.
        bins: Bins of one width up to the highest frequency, sqrt(1/2) cycles per pixel, from half the lowest one on; by
            default half as many as the smaller side has pixels.

    Raises:
        ValueError: If these are no maps of floating numbers, or there is no bin.

    Example:
        >>> wave = torch.cos(2 * torch.pi * torch.arange(16) / 4).expand(16, 16)  # a quarter cycle per pixel
        >>> profile = radial_energy(wave, bins=4)
        >>> [round(f, 2) for f in profile.frequency.tolist()], profile.share.round(decimals=3).tolist()
        ([0.12, 0.28, 0.45, 0.62], [0.0, 1.0, 0.0, 0.0])
    """
    energy = _energy(maps)
    bins = max(1, min(maps.shape[-2:]) // 2) if bins is None else bins
    if bins < 1:
        msg = f"bins must be at least 1. Got {bins}."
        raise ValueError(msg)
    edges = torch.linspace(0.5 / max(maps.shape[-2:]), HIGHEST_FREQUENCY, bins + 1, dtype=torch.float64)
    bin_of = torch.bucketize(_radius(maps), edges[1:-1].to(maps.device), right=True).flatten()
    share = energy.new_zeros(*maps.shape[:-2], bins).index_add(-1, bin_of, energy.flatten(-2))
    return RadialProfile(((edges[1:] + edges[:-1]) / 2).to(maps), share)


def high_share(maps: Float[Tensor, "*n h w"], above: float = 0.25) -> Float[Tensor, "*n"]:
    """Share of each map's energy, without DC, above a radial frequency in cycles per pixel; 0 for a constant map.

    Args:
        maps: Images, hyperplanes or channels of these.
        above: The frequency; by default that of waves of four pixels, half the highest along a row.

    Raises:
        ValueError: If these are no maps of floating numbers, or no frequency can lie above.

    Example:
        >>> high_share(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        1.0
    """
    if not 0 <= above < HIGHEST_FREQUENCY:
        msg = f"above must be a frequency from 0 to less than sqrt(1/2) = {HIGHEST_FREQUENCY:.4f} cycles per pixel. Got {above}."
        raise ValueError(msg)
    return (_energy(maps) * (_radius(maps) > above)).sum((-2, -1))


def mean_frequency(maps: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """Mean radial frequency of each map in cycles per pixel, weighted by energy, without DC; 0 for a constant map.

    Args:
        maps: Images, hyperplanes or channels of these.

    Raises:
        ValueError: If these are no maps of floating numbers.

    Example:
        >>> round(mean_frequency(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item(), 3)
        0.5
    """
    return (_energy(maps) * _radius(maps).to(maps)).sum((-2, -1))


def _amplitude(maps: Tensor) -> Tensor:
    """Amplitudes as shares of the map's largest, frequency zero first; DC and what is rounding beside the map's sum are zero.

    Raises:
        ValueError: If these are no maps of floating numbers.
    """
    if maps.dim() < 2 or not maps.is_floating_point() or 0 in maps.shape[-2:]:
        msg = f"Maps must be floating numbers of shape (..., H, W). Got {tuple(maps.shape)} of {maps.dtype}."
        raise ValueError(msg)
    amplitude = torch.fft.fft2(maps).abs()
    amplitude[..., 0, 0] = 0
    rounding = torch.finfo(maps.dtype).eps * maps.abs().sum((-2, -1), keepdim=True)
    amplitude = torch.where(amplitude > rounding, amplitude, 0)
    return _shares(amplitude, amplitude.amax((-2, -1), keepdim=True))


def _energy(maps: Tensor) -> Tensor:
    """Share of the energy at every frequency, frequency zero first; zeros for a constant map."""
    energy = _amplitude(maps).square()
    return _shares(energy, energy.sum((-2, -1), keepdim=True))


def _shares(parts: Tensor, whole: Tensor) -> Tensor:
    return parts / torch.where(whole > 0, whole, 1)


def _radius(maps: Tensor) -> Tensor:
    """Radial frequency of every place of the spectrum in cycles per pixel, ``(h, w)``; in float64, so that 1/4 is 1/4."""
    rows, columns = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=maps.device) / n for n in maps.shape[-2:])
    return torch.hypot(rows[:, None], columns)
