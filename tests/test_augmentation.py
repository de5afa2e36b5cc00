"""Augmentation: the batched functions against a plain one, image by image, pixel by pixel."""

import colorsys

import pytest
import torch
from torch.nn.functional import grid_sample

from adjointbackmap import data
from adjointbackmap.training import augmentation


def seeded():
    return torch.Generator().manual_seed(2)


def crop_twin(pixels, padding, generator):
    """Image by image: zeros around, crop at a random corner, mirror if the coin says so."""
    count, channels, height, width = pixels.shape
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    coins = torch.rand(count, generator=generator)
    out = torch.zeros(count, channels, height, width)
    for i in range(count):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = pixels[i]
        top = corners[0, i]
        left = corners[1, i]
        crop = padded[:, top : top + height, left : left + width]
        out[i] = (crop.flip(2) if coins[i] < 0.5 else crop) / 255
    return out


@pytest.mark.parametrize("padding", [0, 4])
def test_images_are_cropped_and_mirrored(padding):
    pixels = data.sample().pixels[:40]
    actual = augmentation.crop(pixels, padding, seeded())
    torch.testing.assert_close(actual, crop_twin(pixels, padding, seeded()), rtol=0, atol=0)
    original = pixels.float() / 255
    unchanged = sum(torch.equal(a, b) for a, b in zip(actual, original, strict=True))
    assert (10 <= unchanged <= 30) if padding == 0 else unchanged <= 5


def saturate_twin(image, factor):
    """Pixel by pixel to HSV and back."""
    out = torch.zeros_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            out[:, row, column] = torch.tensor(
                colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
            )
    return out


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.0, 50.0])
def test_saturation_is_that_of_hsv(factor):
    """Grey, black, white and pure colours among the pixels."""
    x = torch.rand(2, 3, 4, 5, generator=seeded())
    x[0, :, 0] = torch.tensor(
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.4, 0.4, 0.4], [1.0, 0.0, 0.0], [0.0, 0.7, 0.7]]
    ).T
    expected = torch.stack([saturate_twin(image, factor) for image in x])
    torch.testing.assert_close(
        augmentation.saturate(x, torch.full((2,), factor)), expected, rtol=0, atol=1e-6
    )


def contrast_twin(image, factor):
    return torch.stack([(channel - channel.mean()) * factor + channel.mean() for channel in image])


def test_contrast_keeps_the_mean_of_each_channel():
    x = torch.rand(3, 3, 4, 5, generator=seeded())
    factor = torch.tensor([0.0, 0.4, 1.6])
    actual = augmentation.contrast(x, factor)
    expected = torch.stack([contrast_twin(image, f) for image, f in zip(x, factor, strict=True)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.mean((2, 3)), x.mean((2, 3)))


def resize_twin(image, size):
    """Bilinear at the centres of the new pixels, border pixels repeated."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
    return grid_sample(image[None], grid[None], padding_mode="border", align_corners=False)[0]


def study_twin(pixels, generator):
    """Slow twin: flip, saturation, contrast, brightness, resize, crop, in this order."""
    count = len(pixels)
    coins, *factors = (torch.rand(count, generator=generator) for _ in range(4))
    corners = torch.randint(0, 5, (2, count), generator=generator)
    out = []
    for i in range(count):
        image = pixels[i] / 255
        image = image.flip(2) if coins[i] < 0.5 else image
        image = saturate_twin(image, 2 * factors[0][i].item())
        image = contrast_twin(image, 0.4 + 1.2 * factors[1][i])
        image = resize_twin(image + factors[2][i] - 0.5, 36)
        out.append(image[:, corners[0, i] : corners[0, i] + 32, corners[1, i] : corners[1, i] + 32])
    return torch.stack(out)


def test_the_study_changes_colours_then_resizes_and_crops():
    pixels = data.sample().pixels[:8]
    actual = augmentation.study(pixels, seeded())
    assert actual.shape == (8, 3, 32, 32)
    torch.testing.assert_close(actual, study_twin(pixels, seeded()), rtol=0, atol=1e-5)
    assert actual.min() < 0 or actual.max() > 1  # not clipped
