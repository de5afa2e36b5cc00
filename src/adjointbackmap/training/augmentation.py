"""Augmentation of training images: ours, and the study's in TensorFlow's definitions, as a few functions on a batch.

The random numbers are drawn on the CPU, one per image, so that they are the same on every device.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

SATURATION = (0.0, 2.0)
CONTRAST = (0.4, 1.6)
BRIGHTNESS = (-0.5, 0.5)
RESIZED = 4  # rows and columns more than the image has


def crop(
    pixels: UInt8[Tensor, "n 3 h w"], padding: int, generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Flip half of the images and crop each at random from its zero-padded self.

    Args:
        pixels: Bytes ``(N, 3, H, W)``.
        padding: Pixels added on every side before the crop.
        generator: Source of the random numbers, on the CPU.

    Returns:
        Pixels in [0, 1], ``(N, 3, H, W)``.
    """
    corners = torch.randint(0, 2 * padding + 1, (2, len(pixels)), generator=generator)
    flipped = torch.rand(len(pixels), generator=generator) < 0.5
    cut = _cut(F.pad(pixels, (padding,) * 4), corners, pixels.shape[2:])
    return _flip(cut, flipped).float() / 255


def study(pixels: UInt8[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """The study's augmentation: flip, saturation, contrast, brightness, resize and crop [Wan2022, sections 2.5.1.2, 3.5.1.1].

    Each image has its own factors, uniform in the study's ranges. The study does not say that it clips, and TensorFlow's
    functions do not clip floating-point images: neither do we, so that pixels may leave [0, 1]. The resize is bilinear
    between the centres of pixels, as TensorFlow 2 does it.

    Args:
        pixels: Bytes ``(N, 3, H, W)``.
        generator: Source of the random numbers, on the CPU.

    Returns:
        Pixels on the scale of [0, 1], ``(N, 3, H, W)``.
    """
    count, _, height, width = pixels.shape

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(pixels.device)

    x = _flip(pixels.float() / 255, torch.rand(count, generator=generator) < 0.5)
    x = saturate(x, uniform(*SATURATION))
    x = contrast(x, uniform(*CONTRAST))
    x = x + uniform(*BRIGHTNESS).view(-1, 1, 1, 1)
    x = F.interpolate(x, (height + RESIZED, width + RESIZED), mode="bilinear", align_corners=False)
    return _cut(x, torch.randint(0, RESIZED + 1, (2, count), generator=generator), pixels.shape[2:])


def saturate(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Multiply the saturation of HSV by a factor and cut it off at 1, as ``tf.image.adjust_saturation``.

    With hue and value V kept, the distance V - c of a channel is proportional to the saturation (V - min) / V, so that
    no hue is needed: V - c grows by the factor, or by 1 / saturation where that is less.

    Args:
        x: Images in [0, 1], ``(N, 3, H, W)``.
        factor: Factor of each image, at least 0.

    Example:
        >>> x = torch.tensor([0.8, 0.4, 0.6]).view(1, 3, 1, 1)
        >>> saturate(x, torch.zeros(1)).flatten()
        tensor([0.8000, 0.8000, 0.8000])
    """
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    largest = value / spread.clamp_min(torch.finfo(x.dtype).tiny)
    return value - (value - x) * torch.minimum(factor.view(-1, 1, 1, 1), largest)


def contrast(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Multiply the distance of each pixel from its channel's mean, as ``tf.image.adjust_contrast``.

    Args:
        x: Images ``(N, 3, H, W)``.
        factor: Factor of each image.

    Example:
        >>> contrast(torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 1, 2), torch.tensor([0.5]))[0, 0]
        tensor([[0.3000, 0.5000]])
    """
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * factor.view(-1, 1, 1, 1)


def _flip(x: Shaped[Tensor, "n 3 h w"], flipped: Bool[Tensor, " n"]) -> Shaped[Tensor, "n 3 h w"]:
    return torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(3), x)


def _cut(
    x: Shaped[Tensor, "n 3 hx wx"], corners: Int64[Tensor, "2 n"], size: torch.Size
) -> Shaped[Tensor, "n 3 h w"]:
    """A window of each image, whose first row and column are its corner."""
    rows = corners[0][:, None] + torch.arange(size[0])
    columns = corners[1][:, None] + torch.arange(size[1])
    image = torch.arange(len(x))[:, None, None]
    index = (t.to(x.device) for t in (image, rows[:, :, None], columns[:, None, :]))
    return x.permute(0, 2, 3, 1)[tuple(index)].permute(0, 3, 1, 2)
