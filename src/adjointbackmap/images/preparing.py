"""One call from a picture to the input of a network, and back to the pixels of the picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.display import Summary, png_of, shown_html, shown_text
from adjointbackmap.images.preprocessing import (
    Preparation,
    Preprocessing,
    prepared,
)
from adjointbackmap.images.reading import read

Numbers = float | int | Sequence[float | int]


class PreparedImage(Tensor):
    """A picture as a network takes it: a tensor ``(1, C, H, W)`` that knows its picture.

    It is a tensor, so models and every function of this package take it. What is computed from it
    is an ordinary tensor.

    Attributes:
        original: The upright picture ``(H, W, C)``: uint8, or float32 in [0, 1].
        preparation: What was done to it.
    """

    original: np.ndarray
    preparation: Preparation

    # Operations give ordinary tensors, as those of torch.nn.Parameter do.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, data: Tensor, original: np.ndarray, preparation: Preparation
    ) -> "PreparedImage":
        """Give a tensor its picture."""
        made = Tensor._make_subclass(cls, data)
        made.original = original
        made.preparation = preparation
        return made

    @property
    def pixels(self) -> Float[Tensor, "c h w"]:
        """What the network sees, before the normalisation: ``(C, H, W)`` in [0, 1]."""
        mean, std = (
            torch.tensor(part, dtype=self.dtype, device=self.device).view(-1, 1, 1)
            for part in (self.preparation.mean, self.preparation.std)
        )
        return (self.detach()[0] * std + mean).clamp(0, 1)

    def _summary(self) -> Summary:
        done = self.preparation
        facts = {
            "picture": " x ".join(map(str, done.original)),
            "steps": "; ".join(done.steps()) or "none",
        }
        shape = " x ".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return Summary(f"PreparedImage {shape} {dtype}", facts)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return shown_text(self._summary())

    def _repr_html_(self) -> str:
        return shown_html(self._summary(), [("what the network sees", png_of(self.pixels))])

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else super().__format__(spec)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[str, Any]) -> "PreparedImage":
        return PreparedImage(self.detach().clone(), self.original.copy(), self.preparation)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return PreparedImage, (self.detach().clone(), self.original, self.preparation)


def image(
    source: Any,
    size: int | tuple[int, int] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    *,
    resize: int | None = None,
    channels: int | None = None,
    preprocess: Any = None,
) -> PreparedImage:
    """Any picture as the input of a network, ``(1, C, H, W)`` in float32.

    The picture is turned as its EXIF orientation says, resized, cropped at its centre and
    normalised: ``(pixels in [0, 1] - mean) / std``. The shorter side is resized with Pillow's
    filter, so that an 8-bit picture gives to the bit what the transforms of torchvision's weights
    give for it.

    Transparent parts are put on white. A palette becomes colours, grey is repeated in all channels,
    and 16 bits of grey are kept. Of an animation, the first frame is taken. Colour profiles are not
    applied.

    Args:
        source: A path, a binary file object, a PIL image; or one picture as a NumPy array or a
            tensor: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``, uint8, uint16, bool, or floating
            numbers in [0, 1]. Where a shape allows both, an array has its channels last and a
            tensor has them first.
        size: Rows and columns that the network takes, one number for both. By default the picture
            keeps its size.
        mean: Mean of each channel for pixels in [0, 1], or one number.
        std: Standard deviation of each channel, or one number.
        resize: Shorter side before the crop, such as 256 for a crop of 224. By default the crop is
            as large as it can be.
        channels: 1 for grey or 3 for colour. By default as many as ``mean`` or ``std`` has numbers,
            otherwise 3.
        preprocess: ``"imagenet"``, ``"cifar10"`` or ``"none"``; or ``weights.transforms()`` of
            torchvision. The other arguments replace its parts.

    Returns:
        A tensor that also keeps the picture and what was done to it, see :class:`PreparedImage`.

    Raises:
        TypeError: If the source is of another type.
        ValueError: If it is no picture, or an argument does not fit it.
        FileNotFoundError: If there is no such file.

    Example:
        >>> photo = np.zeros((60, 80, 3), np.uint8)
        >>> image(photo, size=32)
        PreparedImage 1 x 3 x 32 x 32 float32
          picture: 60 x 80
          steps: resized to 32 x 42; cropped at row 0, column 5
    """
    wanted = Preprocessing.of(preprocess).checked(size, mean, std, resize)
    given = max(len(wanted.mean), len(wanted.std))
    channels = channels or (given if given > 1 else 3)
    if channels not in (1, 3):
        msg = f"channels must be 1 or 3. Got {channels}: give one of these."
        raise ValueError(msg)
    photo = read(source).with_channels(channels)
    x, done = prepared(photo, wanted)
    return PreparedImage(torch.from_numpy(x)[None], photo.pixels, done)
