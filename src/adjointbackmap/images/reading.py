"""A picture file, a PIL image or an array -> upright pixels."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ORIENTATION = 0x0112  # EXIF tag: how the camera was held; 1 is upright
SIXTEEN_BITS = 65535
ON_WHITE = "transparent parts on white"
CHANNELS = (1, 3, 4)
GREY_MODES = ("1", "L", "LA", "La")
# Weights of red, green and blue in the brightness of a pixel: ITU-R BT.601, as Pillow uses them.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Photo:
    """An upright picture.

    Attributes:
        pixels: ``(H, W, C)`` with 1 or 3 channels: uint8, or float32 in [0, 1].
        notes: What was done to read it.
    """

    pixels: np.ndarray
    notes: tuple[str, ...] = ()

    def with_channels(self, channels: int) -> "Photo":
        """The same picture in grey (1) or in colour (3)."""
        found = self.pixels.shape[2]
        if found == channels:
            return self
        if channels == 3:
            note = "grey repeated in 3 channels"
            return Photo(np.repeat(self.pixels, 3, axis=2), (*self.notes, note))
        if self.pixels.dtype == np.uint8:
            grey = np.asarray(Image.fromarray(self.pixels).convert("L"))
        else:
            grey = self.pixels @ LUMA
        return Photo(grey[:, :, None], (*self.notes, "colours made grey (ITU-R BT.601)"))


def read(source: Any) -> Photo:
    """Read a picture.

    Args:
        source: A path, a binary file object, a PIL image, or an array or tensor of one picture.

    Raises:
        TypeError: If the source is of another type.
        ValueError: If it is not a picture, or its pixels have another range.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(source, Image.Image):
        return _of_pil(source)
    if isinstance(source, np.ndarray | Tensor):
        return _of_array(source)
    if isinstance(source, str | os.PathLike):
        return _of_file(_checked_path(source), str(source))
    if callable(getattr(source, "read", None)):
        return _of_file(source, f"a {type(source).__name__}")
    msg = (
        "A picture must be a path, a binary file, a PIL image or an array. "
        f"Got {type(source).__name__}: convert it to one of these."
    )
    raise TypeError(msg)


def _checked_path(source: str | os.PathLike[str]) -> Path:
    if "://" in str(source):
        msg = f"A picture must be a local file. Got {source}: download it first."
        raise ValueError(msg)
    path = Path(source).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        msg = f"A picture must be a file. Got {source}, which is {kind}: check the path."
        raise FileNotFoundError(msg)
    return path


def _of_file(file: Any, name: str) -> Photo:
    try:
        with Image.open(file) as opened:
            opened.load()
            return _of_pil(opened)
    except UnidentifiedImageError as error:
        msg = (
            f"A picture must be in a format that Pillow reads. Got {name}: save it as PNG or JPEG."
        )
        raise ValueError(msg) from error
    except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        msg = f"A picture must be complete and readable. Got {name} ({error}): save it again."
        raise ValueError(msg) from error


def _of_pil(image: Image.Image) -> Photo:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    held = image.getexif().get(ORIENTATION, 1)
    if held in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes.append(f"turned upright (EXIF orientation {held})")
    if image.mode.startswith("I"):
        return _of_integers(np.asarray(image), tuple(notes))
    if image.mode == "F":
        return Photo(_in_unit_interval(np.asarray(image))[:, :, None], tuple(notes))
    grey = image.mode in GREY_MODES
    if image.has_transparency_data:
        image, is_changed = _on_white(image)
        notes += [ON_WHITE] if is_changed else []
    elif image.mode not in ("1", "L", "P", "RGB"):
        notes.append(f"{image.mode} converted to RGB")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return Photo(pixels.reshape(*pixels.shape[:2], -1), tuple(notes))


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """A picture with transparency as a page shows it, on white; and whether that changes it."""
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    least_opaque, _ = image.getchannel("A").getextrema()
    return Image.alpha_composite(white, image), least_opaque != 255


def _of_integers(pixels: np.ndarray, notes: tuple[str, ...]) -> Photo:
    """A grey picture of 16 bits.

    Raises:
        ValueError: If it has more.
    """
    if pixels.min() < 0 or pixels.max() > SIXTEEN_BITS:
        msg = (
            f"Grey levels must be from 0 to {SIXTEEN_BITS}. "
            f"Got {pixels.min()} to {pixels.max()}: scale them to 16 bits."
        )
        raise ValueError(msg)
    levels = pixels.astype(np.float32) / SIXTEEN_BITS
    return Photo(levels[:, :, None], (*notes, "16 bits"))


def _of_array(array: np.ndarray | Tensor) -> Photo:
    is_tensor = isinstance(array, Tensor)
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    pixels = _channels_last(values, is_tensor)
    if pixels.dtype == np.uint16:
        return _composited(pixels.astype(np.float32) / SIXTEEN_BITS, ("16 bits",))
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype == np.uint8:
        return _composited(np.ascontiguousarray(pixels))
    if pixels.dtype.kind == "f":
        return _composited(_in_unit_interval(pixels))
    msg = (
        "Pixels must be uint8, uint16, bool, or floating numbers from 0 to 1. "
        f"Got {pixels.dtype}: convert them, as with array.astype('uint8')."
    )
    raise ValueError(msg)


def _channels_last(array: np.ndarray, first: bool) -> np.ndarray:
    """An array of one picture as ``(H, W, C)``.

    Args:
        array: ``(H, W)``, ``(H, W, C)``, ``(C, H, W)``, or one of these in a batch of one.
        first: Whether channels come first where the shape allows both.

    Raises:
        ValueError: If it has another shape, or no pixel.
    """
    shape = array.shape
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[:, :, None]
        first = False
    fits = [array.ndim == 3 and array.shape[axis] in CHANNELS for axis in (0, -1)]
    if not any(fits) or not array.size:
        msg = (
            "An array must be one picture of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            f"channels. Got {shape}: pass one picture at a time."
        )
        raise ValueError(msg)
    is_first = fits[0] and (first or not fits[1])
    return np.moveaxis(array, 0, -1) if is_first else array


def _in_unit_interval(pixels: np.ndarray) -> np.ndarray:
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN too
        msg = (
            "Floating pixels must be from 0 to 1. "
            f"Got {pixels.min():g} to {pixels.max():g}: divide "
            "them by their largest possible value, or pass normalised input to hyperplanes itself."
        )
        raise ValueError(msg)
    return pixels.astype(np.float32)


def _composited(pixels: np.ndarray, notes: tuple[str, ...] = ()) -> Photo:
    """Pixels of 1, 3 or 4 channels; the fourth is opacity, and what lies behind is white."""
    if pixels.shape[2] < 4:
        return Photo(pixels, notes)
    colour = pixels[:, :, :3]
    opacity = pixels[:, :, 3:]
    if pixels.dtype == np.uint8:
        picture, is_changed = _on_white(Image.fromarray(pixels))
        notes = (*notes, ON_WHITE) if is_changed else notes
        return Photo(np.asarray(picture.convert("RGB")), notes)
    notes = (*notes, ON_WHITE) if opacity.min() < 1 else notes
    return Photo(colour * opacity + (1 - opacity), notes)
