"""Adversarial examples from any source, and measurements of them: classes, noise and box."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from adjointbackmap.analysis.crossings import Prepare
from adjointbackmap.display import ShownFields
from adjointbackmap.engine.network import check_eval
from adjointbackmap.files.checked import check_file, shortened
from adjointbackmap.files.weights import read_safetensors, read_torch

BATCH = 128  # images per forward pass
KEYS = ("adversarial", "adv_inputs")  # the second is what torchattacks saves


@dataclass(frozen=True, repr=False)
class Attacked(ShownFields):
    """Images before and after an attack, as measured by :func:`examine`.

    Attributes:
        pixels: The images, ``(N, C, H, W)``.
        adversarial: The attacked images.
        before: Predicted class of each image.
        after: Predicted class of each attacked image.
        l2: Euclidean norm of each image's noise, in float64.
        linf: Largest magnitude of each image's noise, in float64.
        inside: Whether all pixels of each attacked image are in the box.
        steps: Number of steps of each image; ``None`` for examples from another source.
    """

    pixels: Float[Tensor, "n c h w"]
    adversarial: Float[Tensor, "n c h w"]
    before: Int64[Tensor, " n"]
    after: Int64[Tensor, " n"]
    l2: Float[Tensor, " n"]
    linf: Float[Tensor, " n"]
    inside: Bool[Tensor, " n"]
    steps: Int64[Tensor, " n"] | None = None

    @property
    def noise(self) -> Float[Tensor, "n c h w"]:
        """Difference that the attack added."""
        return self.adversarial - self.pixels

    def fooled(self, labels: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which images the model classifies correctly before the attack and wrongly after it."""
        return (self.before == labels.to(self.before)) & (self.after != labels.to(self.after))


def examine(
    model: nn.Module,
    pixels: Tensor,
    adversarial: Tensor,
    prepare: Prepare | None = None,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attacked:
    """Measure adversarial examples: predicted classes, norms of the noise, and the box.

    New forward passes compute the classes.

    Args:
        model: Any module in eval mode that gives ``(N, classes)``.
        pixels: Images ``(N, C, H, W)``.
        adversarial: The attacked images. They are converted to the dtype and device of ``pixels``.
        prepare: Map from pixels to the model's input; the identity by default.
        box: Smallest and largest value of a pixel.

    Raises:
        ValueError: If the model is in train mode, or the images do not fit or are not finite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
        >>> found = examine(model, torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0))
        >>> float(found.l2), bool(found.inside)
        (2.0, False)
    """
    check_eval(model, ValueError)
    images = finite_batch(pixels, "pixels")
    changed = finite_batch(adversarial, "adversarial").to(images)
    if changed.shape != images.shape:
        msg = (
            f"adversarial must have the images' shape {tuple(images.shape)}. "
            f"Got {tuple(changed.shape)}."
        )
        raise ValueError(msg)
    before, after = (scores_of(model, x, prepare).argmax(1) for x in (images, changed))
    # The result keeps the images, and the caller may write into its own.
    images = images.clone()
    changed = changed.clone()
    noise = (changed.double() - images.double()).flatten(1)
    inside = ((changed >= box[0]) & (changed <= box[1])).flatten(1).all(1)
    return Attacked(
        images,
        changed,
        before,
        after,
        noise.square().sum(1).sqrt(),
        noise.abs().amax(1),
        inside,
    )


def read_examples(path: str | Path) -> Float[Tensor, "n c h w"]:
    """Read adversarial examples from a ``.safetensors``, ``.npy``, ``.npz`` or ``.pt`` file.

    ``torch.load`` must be able to read a ``.pt`` file as weights only.

    If a card ``NAME.json`` or a list ``SHA256SUMS`` in the same folder has a checksum of the file,
    it is compared. If the file has several arrays, ``adversarial`` is read, or else ``adv_inputs``,
    the name that torchattacks uses. Bytes are converted to pixels in [0, 1].

    Raises:
        ValueError: If the file is of another kind or damaged, has no such array, or the array does
            not hold finite images ``(N, C, H, W)``.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        msg = f"Examples must be in a file that ends in {', '.join(_READERS)}. Got {path}."
        raise ValueError(msg)
    if not path.is_file():
        msg = f"Examples must be in a file. Got {path}, which is none."
        raise FileNotFoundError(msg)
    check_file(path)
    try:
        found = _READERS[path.suffix](path)
    except Exception as error:  # each reader raises its own types of errors
        msg = (
            f"{path} must hold arrays. "
            f"It could not be read: {shortened(error, 80)}: write it again."
        )
        raise ValueError(msg) from error
    if isinstance(found, dict):
        found = found[_key_of_examples(found, path)]
    return finite_batch(_bytes_as_pixels(torch.as_tensor(found)), f"Examples in {path}")


def _key_of_examples(arrays: dict[str, Any], path: Path) -> str:
    """The name of the array to read.

    Raises:
        ValueError: If the file has several arrays, none with a known name.
    """
    chosen = [key for key in KEYS if key in arrays]
    if not chosen and len(arrays) == 1:
        chosen = list(arrays)
    if not chosen:
        msg = (
            f"{path} must hold one array, or one called {' or '.join(KEYS)}. "
            f"Got {', '.join(map(str, arrays)) or 'none'}."
        )
        raise ValueError(msg)
    return chosen[0]


def examples_of(made: Any, pixels: Tensor, labels: Tensor) -> Float[Tensor, "n c h w"]:
    """Adversarial examples from another library, in a form for :func:`examine`.

    Args:
        made: One of three. An attack that is called with images and labels, as in torchattacks. The
            result of an attack of Foolbox, ``(raw, clipped, success)``, of which ``clipped`` is
            taken. A tensor of torch or eagerpy.
        pixels: Images ``(N, C, H, W)``.
        labels: Class of each image.

    Raises:
        ValueError: If the result of Foolbox has several epsilons, or the examples have another
            shape or are not finite.
        TypeError: If ``made`` is none of these.

    Example:
        >>> brighter = lambda images, labels: (images + 0.125).clamp(0, 1)
        >>> examples_of(brighter, torch.zeros(1, 1, 1, 1), torch.tensor([0])).item()
        0.125
    """
    found = made(pixels, labels) if callable(made) else made
    if isinstance(found, tuple) and len(found) == 3:  # Foolbox
        found = found[1]
        if isinstance(found, list):
            if len(found) != 1:
                msg = (
                    "The examples must be those of one epsilon. "
                    f"Got {len(found)}: pass one of them, clipped[i]."
                )
                raise ValueError(msg)
            found = found[0]
    found = getattr(found, "raw", found)  # eagerpy
    if not isinstance(found, Tensor):
        msg = (
            "Examples must be a tensor, an attack, or what Foolbox returns. "
            f"Got {type(found).__name__}."
        )
        raise TypeError(msg)
    images = finite_batch(_bytes_as_pixels(found), "Examples").to(pixels)
    if images.shape != pixels.shape:
        msg = (
            f"Examples must have the images' shape {tuple(pixels.shape)}. "
            f"Got {tuple(images.shape)}."
        )
        raise ValueError(msg)
    return images.clone()


def scores_of(
    model: nn.Module,
    pixels: Tensor,
    prepare: Prepare | None,
) -> Float[Tensor, "n classes"]:
    """Class scores of images, computed in batches without gradients."""
    with torch.no_grad():
        return torch.cat([forward(model, part, prepare) for part in pixels.split(BATCH)])


def forward(model: nn.Module, pixels: Tensor, prepare: Prepare | None) -> Tensor:
    """Class scores of images.

    Raises:
        ValueError: If the model gives something else.
    """
    given = pixels.clone()  # the model may write into its input
    scores = model(given if prepare is None else prepare(given))
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(pixels):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        msg = (
            f"The model must give one score for each class, ({len(pixels)}, classes). "
            f"Got {got}: wrap it in a module that does."
        )
        raise ValueError(msg)
    return scores


def finite_batch(images: Tensor, what: str) -> Tensor:
    """The images, detached, after checks.

    Raises:
        ValueError: If they are not a batch of finite images.
    """
    if images.dim() != 4 or not images.numel() or not images.is_floating_point():
        msg = (
            f"{what} must be floating-point images (N, C, H, W). "
            f"Got {tuple(images.shape)} of {images.dtype}."
        )
        raise ValueError(msg)
    if not images.isfinite().all():
        msg = f"{what} must be finite. Got {int((~images.isfinite()).sum())} numbers that are not."
        raise ValueError(msg)
    return images.detach()


def _bytes_as_pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": read_safetensors,
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
    ".pt": read_torch,
}
