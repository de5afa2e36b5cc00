"""Spectra: known waves, Parseval's theorem, white noise, a plain Fourier transform."""

import inspect
import math

import pytest
import torch

from adjointbackmap.spectra import LOWEST, high_share, log_amplitude, mean_frequency, radial_energy

SIZES = [(8, 8), (9, 9), (8, 11), (7, 4), (32, 32), (1, 6)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def wave(rows: int, columns: int, down: int, across: int) -> torch.Tensor:
    """A cosine of ``down`` and ``across`` cycles over the map."""
    return torch.cos(phase(rows, columns, down, across))


def phase(rows: int, columns: int, down: int, across: int) -> torch.Tensor:
    places = (
        torch.arange(rows).double()[:, None] * down / rows
        + torch.arange(columns).double() * across / columns
    )
    return 2 * torch.pi * places


def plain_amplitude(image: torch.Tensor) -> torch.Tensor:
    """The amplitude at each frequency by its definition, frequency zero in the middle."""
    rows, columns = image.shape
    amplitude = torch.zeros(rows, columns, dtype=torch.float64)
    for i, down in enumerate(range(-(rows // 2), -(rows // 2) + rows)):
        for j, across in enumerate(range(-(columns // 2), -(columns // 2) + columns)):
            amplitude[i, j] = (
                (image * torch.exp(-1j * phase(rows, columns, down, across))).sum().abs()
            )
    return amplitude


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (8, 3)], ids=str)
def test_log_amplitude_is_that_of_the_definition(size):
    """Centred, without DC, relative to the largest."""
    image = noise(*size) + 3
    expected = plain_amplitude(image)
    expected[size[0] // 2, size[1] // 2] = 0
    expected = (expected / expected.max()).clamp(min=10**LOWEST).log10()
    torch.testing.assert_close(log_amplitude(image), expected)


def test_log_amplitude_of_a_scaled_map_is_the_same():
    """Images and hyperplanes have other units; tiny numbers do not vanish."""
    image = noise(2, 3, 8, 8).float()
    torch.testing.assert_close(
        log_amplitude(image * 1e-25), log_amplitude(image), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(mean_frequency(image * 1e-25), mean_frequency(image))


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_map_has_no_energy(size, dtype):
    """Its transform is DC and rounding."""
    flat = torch.full((3, *size), 0.3, dtype=dtype)
    assert (log_amplitude(flat) == LOWEST).all()
    for found in (radial_energy(flat).share, high_share(flat), mean_frequency(flat)):
        assert not found.any()


@sizes
def test_shares_sum_to_one(size):
    """No frequency is left out or counted twice, at any number of bins."""
    maps = noise(2, 3, *size)
    for bins in (None, 1, 7, 40):
        profile = radial_energy(maps, bins)
        torch.testing.assert_close(profile.share.sum(-1), torch.ones(2, 3, dtype=torch.float64))
        assert profile.share.shape[:-1] == (2, 3)
        assert profile.share.shape[-1:] == profile.frequency.shape


@pytest.mark.parametrize(
    ("size", "down", "across"),
    [((32, 32), 8, 0), ((32, 32), 3, 12), ((9, 15), 2, 5), ((9, 9), 4, 4), ((8, 8), 4, 4)],
    ids=str,
)
def test_pure_wave_lies_at_its_frequency(size, down, across):
    """All of its energy is in one bin, around its radial frequency."""
    image = wave(*size, down, across) + 5
    frequency = math.hypot(down / size[0], across / size[1])
    profile = radial_energy(image, bins=10)
    largest = profile.share.argmax()
    width = profile.frequency[1] - profile.frequency[0]
    assert profile.share[largest] == pytest.approx(1)
    assert abs(profile.frequency[largest] - frequency) <= width / 2 + 1e-9
    assert mean_frequency(image) == pytest.approx(frequency)
    assert high_share(image, frequency - 1e-6) == pytest.approx(1)
    if frequency < math.sqrt(0.5) - 1e-6:
        assert high_share(image, frequency + 1e-6) < 1e-12


def test_frequency_itself_is_not_above():
    """A wave of exactly a quarter cycle per pixel, also where 3/12 is no binary fraction."""
    for pixels in (8, 12, 20):
        assert high_share(wave(pixels, pixels, 0, pixels // 4), above=0.25) < 1e-12


@pytest.mark.parametrize("size", [(16, 16), (15, 21)], ids=str)
def test_shares_are_those_of_the_variance(size):
    """Parseval: a part with its own frequencies has its share of the pixels' variance."""
    low = 2 * wave(*size, 1, 2) + wave(*size, 2, 0)
    high = 0.7 * wave(*size, 6, 5) + 0.2 * wave(*size, 0, 7)
    image = low + high + 1.5
    expected = high.var(correction=0) / image.var(correction=0)
    torch.testing.assert_close(high_share(image), expected)
    profile = radial_energy(image, 20)
    torch.testing.assert_close(profile.share[profile.frequency > 0.25].sum(), expected)


@pytest.mark.parametrize("size", [(16, 16), (15, 11)], ids=str)
def test_white_noise_has_the_same_energy_at_every_frequency(size):
    """Shares are those of the number of frequencies, within five standard errors."""
    rows, columns = size
    radii = [
        math.hypot(min(i, rows - i) / rows, min(j, columns - j) / columns)
        for i in range(rows)
        for j in range(columns)
        if i or j
    ]
    maps = noise(2000, *size)
    cases = (
        (high_share(maps), sum(r > 0.25 for r in radii) / len(radii)),
        (mean_frequency(maps), sum(radii) / len(radii)),
    )
    for found, expected in cases:
        assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(len(maps))
        assert found.std() < 0.1


def test_maps_are_taken_one_by_one():
    """Any leading dimensions, and channels apart."""
    maps = noise(2, 3, 6, 9)
    for function in (log_amplitude, high_share, mean_frequency, lambda m: radial_energy(m).share):
        torch.testing.assert_close(function(maps)[1, 2], function(maps[1, 2]))


@pytest.mark.parametrize(
    "maps", [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(3), torch.zeros(2, 0, 4)], ids=str
)
def test_what_is_no_map_is_refused(maps):
    with pytest.raises(
        ValueError, match=r"Maps must be floating numbers of shape \(\.\.\., H, W\)\. Got"
    ):
        inspect.unwrap(mean_frequency)(maps)  # the tests' own checks would answer first


def test_impossible_bins_and_limits_are_refused():
    with pytest.raises(ValueError, match=r"bins must be at least 1\. Got 0"):
        radial_energy(noise(4, 4), bins=0)
    for above in (-0.1, 0.8):
        with pytest.raises(
            ValueError,
            match=rf"above must be a frequency from 0 to .* 0.7071 cycles per pixel. Got {above}",
        ):
            high_share(noise(4, 4), above=above)
