"""How a network wants its pictures: size, crop and normalisation; and what was done to one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from adjointbackmap.display import by
from adjointbackmap.images.reading import Photo

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its pictures.

    The shorter side of a picture is resized, its centre is cropped, and its pixels in [0, 1] are
    normalised. This is the order of torchvision's weights.

    Attributes:
        size: Rows and columns of the crop; ``None`` keeps the picture's size.
        resize: Length of the shorter side before the crop. By default the crop is as large as it
            can be.
        mean: Mean of each channel, for pixels in [0, 1]; one number is for all channels.
        std: Standard deviation of each channel.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``. The first two smooth a
            picture that becomes smaller.

    Raises:
        ValueError: If the interpolation is unknown.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            names = ", ".join(FILTERS)
            msg = f"interpolation must be one of {names}. Got {self.interpolation!r}: choose one."
            raise ValueError(msg)

    @classmethod
    def of(cls, given: Any = None) -> "Preprocessing":
        """A preprocessing by itself, by the name of a preset, or as torchvision describes one.

        Args:
            given: ``"imagenet"``, ``"cifar10"``, ``"none"`` or ``None``; a preprocessing; or the
                ``transforms()`` of torchvision's weights for classification.

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(given, cls):
            return given
        if given is None or (isinstance(given, str) and given in PRESETS):
            return PRESETS[given or "none"]
        if all(hasattr(given, name) for name in ("crop_size", "resize_size", "mean", "std")):
            return cls().but(
                size=checked_size(_single(given.crop_size)),
                resize=_single(given.resize_size),
                mean=checked_numbers("mean", given.mean),
                std=checked_numbers("std", given.std),
                interpolation=given.interpolation.value,
            )
        msg = (
            f"preprocess must be one of {', '.join(PRESETS)}, or transforms() of torchvision's "
            f"weights. Got {given!r:.60}: choose one of these, or give size, mean and std."
        )
        raise ValueError(msg)

    def checked(self, size: Any, mean: Any, std: Any, resize: Any) -> "Preprocessing":
        """The same with the arguments of a user that are not ``None``.

        Raises:
            ValueError: If one is of another kind.
        """
        if resize is not None and (not isinstance(resize, int | np.integer) or resize < 1):
            msg = f"resize must be a number of pixels. Got {resize!r}: give such as 256."
            raise ValueError(msg)
        return self.but(
            size=checked_size(size),
            resize=resize,
            mean=checked_numbers("mean", mean),
            std=checked_numbers("std", std),
        )

    def but(self, **given: Any) -> "Preprocessing":
        """The same with the arguments that are not ``None``."""
        return replace(self, **{name: part for name, part in given.items() if part is not None})


PRESETS: Mapping[str, Preprocessing] = MappingProxyType(
    {
        "imagenet": Preprocessing((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "cifar10": Preprocessing(
            (32, 32), None, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
        ),
        "none": Preprocessing(),
    }
)


@dataclass(frozen=True)
class Preparation:
    """What was done to a picture.

    Attributes:
        original: Rows and columns of the upright picture.
        resized: Rows and columns after resizing.
        crop: First row, first column, rows and columns of the crop, in the resized picture.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        notes: What else was done, such as ``"transparent parts on white"``.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def in_original(self, box: Sequence[float | int]) -> Box:
        """A box of the network's pixels in the pixels of the upright picture.

        Args:
            box: First row, first column, rows and columns.

        Example:
            >>> done = Preparation((400, 800), (200, 400), (0, 100, 200, 200), (0.0,), (1.0,))
            >>> done.in_original((0, 0, 200, 200))
            (0.0, 200.0, 400.0, 400.0)
        """
        scale = [a / b for a, b in zip(self.original, self.resized, strict=True)]
        row, column, rows, columns = box
        top = (row + self.crop[0]) * scale[0]
        left = (column + self.crop[1]) * scale[1]
        return top, left, rows * scale[0], columns * scale[1]

    def steps(self) -> tuple[str, ...]:
        """What was done, in words and in order."""
        found = list(self.notes)
        if self.resized != self.original:
            found.append(f"resized to {by(self.resized)}")
        if self.crop[2:] != self.resized:
            found.append(f"cropped at row {self.crop[0]}, column {self.crop[1]}")
        if set(self.mean) != {0.0} or set(self.std) != {1.0}:
            mean, std = (", ".join(f"{n:g}" for n in part) for part in (self.mean, self.std))
            found.append(f"normalised by mean {mean} and std {std}")
        return tuple(found)


def prepared(photo: Photo, wanted: Preprocessing) -> tuple[np.ndarray, Preparation]:
    """Resize, crop and normalise a picture: the input ``(C, H, W)`` in float32, and what was done.

    Raises:
        ValueError: If the crop is larger than the resized picture, or the numbers of the
            normalisation do not fit.
    """
    height, width, channels = photo.pixels.shape
    mean = _per_channel("mean", wanted.mean, channels)
    std = _per_channel("std", wanted.std, channels)
    resized = resized_size((height, width), wanted)
    crop = _centre(resized, wanted.size or resized)
    pixels = _resized(photo.pixels, resized, wanted.interpolation)
    top, left, rows, columns = crop
    cropped = pixels[top : top + rows, left : left + columns]
    # Divided, subtracted and divided in float32 and in this order, as torchvision does.
    unit = cropped.astype(np.float32) / np.float32(255 if cropped.dtype == np.uint8 else 1)
    x = (unit - np.array(mean, np.float32)) / np.array(std, np.float32)
    done = Preparation((height, width), resized, crop, mean, std, photo.notes)
    return np.ascontiguousarray(np.moveaxis(x, -1, 0)), done


def resized_size(original: tuple[int, int], wanted: Preprocessing) -> tuple[int, int]:
    """Rows and columns after resizing.

    The shorter side becomes ``resize``, and the longer one is rounded down as torchvision does.
    Without ``resize`` the picture becomes the smallest one that covers the crop.

    Raises:
        ValueError: If the crop is larger.

    Example:
        >>> resized_size((600, 512), Preprocessing((224, 224), 256))
        (300, 256)
        >>> resized_size((600, 512), Preprocessing((224, 112)))
        (224, 191)
    """
    height, width = original
    if wanted.resize is not None:
        short = min(height, width)
        found = (wanted.resize * height // short, wanted.resize * width // short)
    elif wanted.size is None:
        found = original
    elif height * wanted.size[1] <= width * wanted.size[0]:  # rows are what is scarce
        found = (wanted.size[0], wanted.size[0] * width // height)
    else:
        found = (wanted.size[1] * height // width, wanted.size[1])
    crop = wanted.size or found
    if crop[0] > found[0] or crop[1] > found[1]:
        msg = (
            f"resize must leave at least the {by(crop)} pixels of size. Got {by(found)} from "
            f"resize={wanted.resize}: raise resize, or leave it out."
        )
        raise ValueError(msg)
    return found


def checked_size(size: Any) -> tuple[int, int] | None:
    """A size as rows and columns; one number is for both.

    Raises:
        ValueError: If it is not one or two positive integers.
    """
    if size is None:
        return None
    both = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(both) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in both):
        msg = f"size must be a number of pixels or (rows, columns). Got {size!r}: give such as 224."
        raise ValueError(msg)
    return int(both[0]), int(both[1])


def checked_numbers(name: str, given: Any) -> tuple[float, ...] | None:
    """Mean or standard deviation as numbers for channels; one number is for all.

    Raises:
        ValueError: If they are not finite numbers, or not those of pixels in [0, 1].
    """
    if given is None:
        return None
    try:
        found = tuple(float(n) for n in np.asarray(given, dtype=float).reshape(-1))
    except (TypeError, ValueError):
        found = ()
    if not found or not np.isfinite(found).all() or (name == "std" and min(found) <= 0):
        kind = "positive numbers" if name == "std" else "numbers"
        msg = f"{name} must be {kind}, one for each channel. Got {given!r:.60}: give such as 0.5."
        raise ValueError(msg)
    if name == "mean" and max(found) > 1:
        msg = (
            f"mean must be that of pixels from 0 to 1. Got {max(found):g}: divide mean and "
            "std by 255."
        )
        raise ValueError(msg)
    return found


def _per_channel(name: str, numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(numbers) == 1:
        return numbers * channels
    if len(numbers) != channels:
        msg = (
            f"{name} must have one number for each of {channels} channels, or one in all. "
            f"Got {len(numbers)}: give {channels}, or channels={len(numbers)}."
        )
        raise ValueError(msg)
    return numbers


def _centre(resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    # round() goes to the even number at one half, as in torchvision
    top, left = (round((a - b) / 2) for a, b in zip(resized, size, strict=True))
    return top, left, *size


def _resized(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Pixels ``(H, W, C)`` at another size, with Pillow's filter."""
    if pixels.shape[:2] == size:
        return pixels
    planes = [Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(pixels, -1, 0)]
    done = [np.asarray(p.resize(size[::-1], FILTERS[interpolation])) for p in planes]
    return np.stack(done, axis=-1)


def _single(numbers: Any) -> Any:
    """The number of a list of one, as torchvision writes sizes."""
    return numbers[0] if isinstance(numbers, Sequence) and len(numbers) == 1 else numbers
