"""The network and the images that the options of a command name."""

import copy
import importlib
import os
import sys
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adjointbackmap.engine.network import Network
    from adjointbackmap.images.preprocessing import Preprocessing

SEVERAL = Parameter(consume_multiple=True)

CIFAR_SHAPE = (3, 32, 32)
RANDOM = "random"  # the image of numbers drawn from [0, 1]


# An option that is given or left out; --no-fold would say what its absence says.
Switch = Annotated[bool, Parameter(negative=())]


@Parameter(name="*")
@dataclass(frozen=True)
class NetworkOptions:
    """The network of a command: a shipped name, a function that builds one, or an ONNX file.

    Attributes:
        name: A shipped network, such as vgg7-cifar10. The word --name may be left out.
        model: module:function that returns a module, instead of a shipped name.
        onnx: ONNX file, instead of a shipped name.
        weights: Weights for --model: a safetensors file, or one that torch.load can read with
            weights_only.
        shape: Shape of one input of --model: channels, rows and columns. The default is 3 channels
            of --size, otherwise 3 32 32.
        fold: Merge batch norm and multipliers into the kernels first.
        curved: What to do with curved operations such as GELU, norms and attention: refuse them,
            hold their gates constant (frozen: hyperplanes are not the derivative), or take their
            derivative (tangent).
        preprocess: How --model wants its pictures: imagenet (224 pixels of 256, ImageNet's mean and
            std), cifar10 (32 pixels, the mean and std of CIFAR-10), or none (pixels from 0 to 1).
            The options below change its parts.
        size: Rows and columns of the pictures.
        resize: Shorter side of a picture before its centre is cropped to --size.
        mean: Mean of each channel of the pixels from 0 to 1, or one number.
        std: Standard deviation of each channel, or one number.
        classes: Text file with the names of the outputs, one a line.
    """

    name: str | None = None
    _: KW_ONLY
    model: str | None = None
    onnx: Path | None = None
    weights: Path | None = None
    shape: tuple[int, int, int] | None = None
    fold: Switch = False
    curved: Literal["refuse", "frozen", "tangent"] = "refuse"
    preprocess: Literal["imagenet", "cifar10", "none"] | None = None
    size: int | None = None
    resize: int | None = None
    mean: Annotated[tuple[float, ...] | None, SEVERAL] = None
    std: Annotated[tuple[float, ...] | None, SEVERAL] = None
    classes: Path | None = None


@dataclass(frozen=True)
class Subject:
    """A network that is ready to be used.

    Attributes:
        module: The network.
        prepare: Map from pixels in [0, 1] to its input.
        classes: Names of its classes; empty if they are not known.
        title: Its name for titles and files.
        shape: Shape of one input ``(C, H, W)``.
        wanted: How it wants its pictures; ``None`` for pixels in [0, 1] of its shape.
        curved: What to do with curved operations, see :func:`adjointbackmap.trace`.
    """

    module: "nn.Module"
    prepare: "nn.Module"
    classes: tuple[str, ...]
    title: str
    shape: tuple[int, ...]
    wanted: "Preprocessing | None" = None
    curved: str = "refuse"

    def preprocessing(self) -> "Preprocessing":
        """How it wants its pictures."""
        from adjointbackmap.images.preprocessing import Preprocessing

        return self.wanted or Preprocessing(size=(self.shape[1], self.shape[2]))

    def trace(self, device: str = "cpu") -> "Network":
        """Move the module to a device and trace it."""
        import torch

        from adjointbackmap.tracing import trace

        example = torch.zeros(1, *self.shape, device=device)
        network = trace(self.module.to(device), example, curved=self.curved)
        self._check_outputs(network)
        return network

    def _check_outputs(self, network: "Network") -> None:
        shape = network.layers["output"].out_shape
        if self.classes and len(shape) == 1:
            self.check_classes(shape[0])

    def trace_shipped(self) -> "Network":
        """Trace the module of a shipped network, from the graph that is kept of it.

        It is what :meth:`trace` gives, some two seconds earlier in a process that has not imported
        ``torch.export``.
        """
        import torch

        from adjointbackmap.capture.kept import kept_graph
        from adjointbackmap.tracing import trace_captured

        captured = kept_graph(self.title)
        if captured is None:
            return self.trace()
        return trace_captured(self.module, captured, torch.zeros(1, *self.shape))

    def check_classes(self, outputs: int) -> None:
        """Raise if the names of the classes are not as many as the outputs.

        Raises:
            ValueError: If they are not.
        """
        if self.classes and len(self.classes) != outputs:
            msg = (
                f"--classes must have a line for each of the {outputs} outputs. "
                f"Got {len(self.classes)} lines: mend the file."
            )
            raise ValueError(msg)

    def trace_in_pixels(self) -> "Network":
        """Trace a float64 copy of the module that takes pixels.

        The constants of the map from pixels to the input become biases.
        """
        import torch

        from adjointbackmap.tracing import trace

        whole = copy.deepcopy(torch.nn.Sequential(self.prepare, self.module)).double().eval()
        example = torch.zeros(1, *self.shape, dtype=torch.float64)
        return trace(whole, example, curved=self.curved)


def load_subject(source: NetworkOptions) -> Subject:
    """Load the network that the options name.

    Raises:
        ValueError: If they name no network, or two.
    """
    import torch

    from adjointbackmap import data, models
    from adjointbackmap.engine.folding import fold
    from adjointbackmap.images.preprocessing import Preprocessing

    _check_one_network(source)
    if source.name is None:
        subject = _own_subject(source)
    else:
        if source.name in models.names("sentences"):
            msg = (
                f"The network must take pictures. Got {source.name}, which reads sentences: "
                f'adjointbackmap text "..." --network {source.name}.'
            )
            raise ValueError(msg)
        _refuse_own_pictures(source)
        classes = data.SOURCES[models.card(source.name)["dataset"]].classes
        module = models.load(source.name)
        prepare = models.preprocessing(source.name)
        own = "cifar10" if isinstance(prepare, models.Normalise) else "none"
        wanted = Preprocessing.of(own).but(size=CIFAR_SHAPE[1:])
        subject = Subject(module, prepare, classes, source.name, CIFAR_SHAPE, wanted)
    subject = replace(subject, curved=source.curved)
    if not source.fold:
        return subject
    folded = fold(subject.module, torch.zeros(1, *subject.shape)).model
    return replace(subject, module=folded, title=f"{subject.title} (folded)")


def _check_one_network(source: NetworkOptions) -> None:
    """Raise if the options name no network, or more than one.

    Raises:
        ValueError: If they do.
    """
    from adjointbackmap import models

    ways = {"a shipped name": source.name, "--model": source.model, "--onnx": source.onnx}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        shipped = ", ".join(models.names())
        msg = (
            f"Name a shipped network ({shipped}), or give --model module:function "
            f"or --onnx FILE. Got {' and '.join(given) or 'none'}."
        )
        raise ValueError(msg)


def _own_subject(source: NetworkOptions) -> Subject:
    """The user's own network, with what the options say of its pictures.

    Raises:
        ValueError: If the options contradict each other.
    """
    from torch import nn

    from adjointbackmap.images.preprocessing import Preprocessing
    from adjointbackmap.models import Normalise

    fixed: tuple[int, ...] | None
    if source.onnx is not None:
        module, fixed, title = _of_onnx(source)
    else:
        assert source.model is not None
        module = _built(source.model, source.weights)
        fixed = source.shape
        title = source.model
    wanted = Preprocessing.of(source.preprocess)
    wanted = wanted.checked(source.size, source.mean, source.std, source.resize)
    shape = fixed or (3, *(wanted.size or CIFAR_SHAPE[1:]))
    if wanted.size not in (None, shape[1:]):
        msg = f"--shape and --size must agree. Got {shape[1:]} and {wanted.size}: leave one out."
        raise ValueError(msg)
    for name, numbers in (("--mean", wanted.mean), ("--std", wanted.std)):
        if len(numbers) not in (1, shape[0]):
            msg = (
                f"{name} must have a number for each of {shape[0]} channels, or one. "
                f"Got {len(numbers)}: give {shape[0]}, or another --shape."
            )
            raise ValueError(msg)
    is_plain = set(wanted.mean) == {0.0} and set(wanted.std) == {1.0}
    prepare = nn.Identity() if is_plain else Normalise(wanted.mean, wanted.std)
    if len(shape) == 3:
        wanted = wanted.but(size=shape[1:])
    return Subject(module, prepare, _class_names(source.classes), title, shape, wanted)


def _of_onnx(source: NetworkOptions) -> tuple["nn.Module", tuple[int, ...], str]:
    """The module of an ONNX file, the shape of one input, and its title.

    Raises:
        ValueError: If --weights or --shape come with it.
    """
    from adjointbackmap import onnx

    assert source.onnx is not None
    for option, value in (("--weights", source.weights), ("--shape", source.shape)):
        if value is not None:
            msg = (
                f"{option} must come with --model. "
                "Got --onnx, whose file has its own: leave it out."
            )
            raise ValueError(msg)
    found = onnx.read(source.onnx)
    return found.module, found.in_shape, source.onnx.stem


def _refuse_own_pictures(source: NetworkOptions) -> None:
    """Raise if options for the pictures of --model are given for a shipped network.

    Raises:
        ValueError: If there are any.
    """
    names = ("shape", "preprocess", "size", "resize", "mean", "std", "classes")
    given = [f"--{name}" for name in names if getattr(source, name) is not None]
    if given:
        msg = (
            f"{', '.join(given)} must come with --model. Got {source.name}, which has its own: "
            "leave them out."
        )
        raise ValueError(msg)


def _class_names(file: Path | None) -> tuple[str, ...]:
    """The lines of a file of classes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no text, or has no line.
    """
    if file is None:
        return ()
    if not file.is_file():
        msg = f"--classes must be a text file with a name on each line. Got {file}, which is none."
        raise FileNotFoundError(msg)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        msg = f"--classes must be a text file in UTF-8. Got {file}: write it again."
        raise ValueError(msg) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        msg = f"--classes must have a name on each line. Got {file}, which is empty."
        raise ValueError(msg)
    return names


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

    The image is a sample image by number or class, a picture file, or ``"random"`` for numbers
    drawn from [0, 1]. Where the size of a picture is not that of the network, it is resized and its
    centre is cropped; the description says so.

    Raises:
        ValueError: If there is no such image, or it cannot be read.
        FileNotFoundError: If there is no such file.
    """
    import torch

    from adjointbackmap import data

    if image == RANDOM:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(subject.shape, generator=generator), "random numbers from 0 to 1"
    sample = data.sample()
    if image in sample.classes:
        image = str(int((sample.labels == sample.classes.index(image)).nonzero()[0]))
    if image.isdigit():
        if int(image) >= len(sample):
            msg = (
                f"--image must be from 0 to {len(sample) - 1}, a class, a picture file, or "
                f"{RANDOM}. Got {image}."
            )
            raise ValueError(msg)
        chosen = sample[[int(image)]]
        name = sample.classes[int(chosen.labels)]
        pixels, steps = _fitted(chosen.pixels, subject)
        return pixels, f"sample image {image} ({name}, {chosen.hashes[0][:8]}{steps})"
    if not Path(image).expanduser().is_file():
        msg = (
            "--image must be the number or class of a sample image, a picture file, or "
            f"{RANDOM}. Got {image}."
        )
        raise FileNotFoundError(msg)
    pixels, steps = _fitted(Path(image), subject)
    name = Path(image).name
    return pixels, f"{name} ({steps.removeprefix(', ')})" if steps else name


def chosen_images(
    image: str, count: int | None, dataset: str, root: Path | None, subject: Subject
) -> "Tensor":
    """Pixels ``(N, C, H, W)`` of one image, or of ``count`` images of a data set.

    Raises:
        ValueError: If there is no such image, there are fewer than ``count``, or the network takes
            others.
    """
    if count is None:
        return find_image(image, subject)[0][None]
    if subject.shape != CIFAR_SHAPE:
        msg = (
            f"--images are pictures of shape {CIFAR_SHAPE}. "
            f"Got a network of {subject.shape}: give --image FILE."
        )
        raise ValueError(msg)
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


def _fitted(picture: "Path | Tensor", subject: Subject) -> tuple["Tensor", str]:
    """Pixels in [0, 1] of a picture in the shape of the network, and what was done, in words.

    Raises:
        ValueError: If the network's input is no picture, or the file cannot be read.
    """
    from adjointbackmap.images import image

    channels = subject.shape[0]
    if channels not in (1, 3) or len(subject.shape) != 3:
        msg = (
            "A picture must have 1 or 3 channels, rows and columns. Got a network with inputs of "
            f"{subject.shape}: give --image {RANDOM}, or use the package."
        )
        raise ValueError(msg)
    plain = subject.preprocessing().but(mean=(0.0,), std=(1.0,))  # prepare normalises
    found = image(picture, preprocess=plain, channels=channels)
    steps = "".join(f", {step}" for step in found.preparation.steps())
    return found.detach()[0], steps


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
