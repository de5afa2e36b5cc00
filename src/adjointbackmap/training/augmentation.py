"""Augmentation of training images: our own, and the study's in TensorFlow's definitions.

Random numbers are drawn on the CPU, one per image, so that they are the same on every device.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor

# Ranges of the study's random factors and shift [Wan2022, section 2.5.1.2].
SATURATION = (0.0, 2.0)
CONTRAST = (0.4, 1.6)
BRIGHTNESS = (-0.5, 0.5)
RESIZED = 4  # rows and columns that the resize adds; the crop takes them away


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
    cut = _windows(F.pad(pixels, (padding,) * 4), corners, pixels.shape[2:])
    return _flip(cut, flipped).float() / 255


def study(pixels: UInt8[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """The study's augmentation [Wan2022, sections 2.5.1.2 and 3.5.1.1].

    The steps are flip, saturation, contrast, brightness, resize and crop. Each image has its own
    factors, uniform in the study's ranges. Pixels may leave [0, 1]: the study does not mention
    clipping, and TensorFlow's functions do not clip floating-point images. The resize is bilinear
    between the centres of pixels, as in TensorFlow 2.

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
    return _windows(
        x, torch.randint(0, RESIZED + 1, (2, count), generator=generator), pixels.shape[2:]
    )


def saturate(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Multiply the saturation of HSV by a factor, up to 1, as ``tf.image.adjust_saturation`` does.

    Hue and value V are kept. Then the distance V - c of a channel c is proportional to the
    saturation (V - min) / V, and no hue is needed: V - c is multiplied by the factor, or by
    1 / saturation if that is less.

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
    """Multiply the distance of each pixel from its channel's mean.

    ``tf.image.adjust_contrast`` does the same.

    Args:
        x: Images ``(N, 3, H, W)``.
        factor: Factor of each image.

    Example:
        >>> x = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
        >>> contrast(x, torch.tensor([0.5]))[0, 0]
        tensor([[0.3000, 0.5000]])
    """
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * factor.view(-1, 1, 1, 1)


def _flip(x: Shaped[Tensor, "n 3 h w"], flipped: Bool[Tensor, " n"]) -> Shaped[Tensor, "n 3 h w"]:
    return torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(3), x)


def _windows(
    x: Shaped[Tensor, "n 3 hx wx"], corners: Int64[Tensor, "2 n"], size: torch.Size
) -> Shaped[Tensor, "n 3 h w"]:
    """Cut a window out of each image. Its first row and column are the image's ``corners``."""
    # index has axes (image, row, column), in channels-last order
    rows = corners[0][:, None] + torch.arange(size[0])
    columns = corners[1][:, None] + torch.arange(size[1])
    image = torch.arange(len(x))[:, None, None]
    index = (t.to(x.device) for t in (image, rows[:, :, None], columns[:, None, :]))
    return x.permute(0, 2, 3, 1)[tuple(index)].permute(0, 3, 1, 2)
