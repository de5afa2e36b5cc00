"""The network and the images that the options of a command name."""

import copy
import importlib
import os
import sys
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adjointbackmap.engine.network import Network


CIFAR_SHAPE = (3, 32, 32)


@Parameter(name="*")
@dataclass(frozen=True)
class NetworkOptions:
    """The network of a command: a shipped name, or a function that builds one.

    Attributes:
        name: A shipped network, such as vgg7-cifar10.
        model: module:function that returns a module, instead of a shipped name.
        weights: Weights for --model: a safetensors file, or one that torch.load can read with
            weights_only.
        shape: Shape of one input of --model.
        fold: Merge batch norm and multipliers into the kernels first.
    """

    name: str | None = None
    _: KW_ONLY
    model: str | None = None
    weights: Path | None = None
    shape: tuple[int, int, int] = CIFAR_SHAPE
    fold: bool = False


@dataclass(frozen=True)
class Subject:
    """A network that is ready to be used.

    Attributes:
        module: The network.
        prepare: Map from pixels in [0, 1] to its input.
        classes: Names of its classes; empty if they are not known.
        title: Its name for titles and files.
        shape: Shape of one input ``(C, H, W)``.
    """

    module: "nn.Module"
    prepare: "nn.Module"
    classes: tuple[str, ...]
    title: str
    shape: tuple[int, ...]

    def trace(self, device: str = "cpu") -> "Network":
        """Move the module to a device and trace it."""
        import torch

        from adjointbackmap.tracing import trace

        return trace(self.module.to(device), torch.zeros(1, *self.shape, device=device))

    def trace_in_pixels(self) -> "Network":
        """Trace a float64 copy of the module that takes pixels.

        The constants of the map from pixels to the input become biases.
        """
        import torch

        from adjointbackmap.tracing import trace

        whole = copy.deepcopy(torch.nn.Sequential(self.prepare, self.module)).double().eval()
        return trace(whole, torch.zeros(1, *self.shape, dtype=torch.float64))


def load_subject(source: NetworkOptions) -> Subject:
    """Load the network that the options name.

    Raises:
        ValueError: If they name no network, or two.
    """
    import torch
    from torch import nn

    from adjointbackmap import data, models
    from adjointbackmap.engine.folding import fold

    if source.model is not None and source.name is None:
        module = _built(source.model, source.weights)
        subject = Subject(module, nn.Identity(), (), source.model, source.shape)
    elif source.name is not None and source.model is None:
        classes = data.SOURCES[models.card(source.name)["dataset"]].classes
        module = models.load(source.name)
        prepare = models.preprocessing(source.name)
        subject = Subject(module, prepare, classes, source.name, CIFAR_SHAPE)
    else:
        given = "neither" if source.model is None else "both"
        shipped = ", ".join(models.names())
        msg = f"Name a shipped network ({shipped}) or give --model module:function. Got {given}."
        raise ValueError(msg)
    if not source.fold:
        return subject
    folded = fold(subject.module, torch.zeros(1, *subject.shape)).model
    return replace(subject, module=folded, title=f"{subject.title} (folded)")


def _built(model: str, weights: Path | None) -> "nn.Module":
    """The module that ``module:function`` returns, in eval mode.

    Raises:
        ValueError: If there is no such function.
        TypeError: If it returns something else.
    """
    import torch

    from adjointbackmap.files.weights import load_weights

    path, _, function = model.partition(":")
    sys.path.insert(0, os.getcwd())  # the entry point's own path lacks the current folder
    try:
        built = getattr(importlib.import_module(path), function)()
    except (ImportError, AttributeError) as error:
        msg = f"--model must be module:function, importable from here. Got {model!r}: {error}."
        raise ValueError(msg) from error
    finally:
        sys.path.pop(0)
    if not isinstance(built, torch.nn.Module):
        msg = (
            "--model must name a function that returns a torch.nn.Module. "
            f"Got {type(built).__name__}."
        )
        raise TypeError(msg)
    if weights is not None:
        load_weights(built, _weights(weights), weights)
    return built.eval()


def _weights(weights: Path) -> dict[str, "Tensor"]:
    """The tensors of a file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    from adjointbackmap.files.weights import read_weights

    if not weights.is_file():
        msg = f"--weights must be a file. Got {weights}, which is none."
        raise FileNotFoundError(msg)
    return read_weights(weights)


def find_image(image: str, subject: Subject) -> tuple["Tensor", str]:
    """Pixels in [0, 1] of one image, and a description of it.

    The image is a sample image by number or class, or a picture file.

    Raises:
        ValueError: If there is no such image.
    """
    from adjointbackmap import data

    sample = data.sample()
    if image in sample.classes:
        image = str(int((sample.labels == sample.classes.index(image)).nonzero()[0]))
    if image.isdigit() and subject.shape == CIFAR_SHAPE:
        if int(image) >= len(sample):
            msg = (
                f"--image must be from 0 to {len(sample) - 1}, a class, or a picture file. "
                f"Got {image}."
            )
            raise ValueError(msg)
        chosen = sample[[int(image)]]
        name = sample.classes[int(chosen.labels)]
        return chosen.unit_interval()[0], f"sample image {image} ({name}, {chosen.hashes[0][:8]})"
    return _picture(Path(image), subject.shape), Path(image).name


def chosen_images(
    image: str, count: int | None, dataset: str, root: Path | None, subject: Subject
) -> "Tensor":
    """Pixels ``(N, C, H, W)`` of one image, or of ``count`` images of a data set.

    Raises:
        ValueError: If there is no such image, or there are fewer than ``count``.
    """
    if count is None:
        return find_image(image, subject)[0][None]
    return find_images(count, dataset, root)


def find_images(count: int, dataset: str, root: Path | None) -> "Tensor":
    """Pixels in [0, 1] of the first images of a data set.

    They are images of the sample, or test images in the order of their hashes.

    Raises:
        ValueError: If there are fewer than ``count``.
    """
    from adjointbackmap import data

    images = data.sample() if dataset == "sample" else data.load(dataset, "test", root).by_hash()
    if not 0 < count <= len(images):
        msg = f"--images must be from 1 to {len(images)}. Got {count}."
        raise ValueError(msg)
    return images[:count].unit_interval()


def _picture(path: Path, shape: tuple[int, ...]) -> "Tensor":
    """Pixels in [0, 1] of a picture file, which is not resized.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another shape, or cannot be read.
    """
    import torch
    from matplotlib.image import imread

    from adjointbackmap.files.checked import shortened

    if not path.is_file():
        size = f"{shape[2]} x {shape[1]} pixels"
        msg = (
            f"--image must be the number or class of a sample image, or a picture file of {size}. "
            f"Got {path}."
        )
        raise FileNotFoundError(msg)
    try:
        pixels = torch.as_tensor(imread(path).copy())
    except Exception as error:  # each format has errors of its own
        msg = (
            f"--image must be a picture file. {path} could not be read ({shortened(error)}): "
            "write it again."
        )
        raise ValueError(msg) from error
    pixels = pixels.float() / 255 if not pixels.is_floating_point() else pixels
    # Files have (H, W, channels), or (H, W) if they are grey. An alpha channel is dropped.
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)[: shape[0]]
    if tuple(pixels.shape) != shape:
        msg = (
            f"The picture must have shape {shape}. "
            f"Got {tuple(pixels.shape)} in {path}: resize it first."
        )
        raise ValueError(msg)
    return pixels


def parse_units(text: str | None) -> Any:
    """Units from text: ``3,:,0`` becomes the tuple that NumPy indexing takes.

    Raises:
        ValueError: If a part is neither an int nor a slice.
    """
    if text is None or text == "predicted":
        return text
    try:
        return tuple(_unit_part(part.strip()) for part in text.split(","))
    except (ValueError, TypeError):  # not a number, or a slice of four parts
        msg = (
            "--units must be ints and slices separated by commas, such as 3,:,0:8, or predicted. "
            f"Got {text!r}."
        )
        raise ValueError(msg) from None


def _unit_part(part: str) -> int | slice:
    if ":" not in part:
        return int(part)
    return slice(*(int(bound) if bound else None for bound in part.split(":")))
