"""From a model and a picture to the explorer in a notebook."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adjointbackmap import data, models
from adjointbackmap.engine.network import Network
from adjointbackmap.explanations import channels_of, input_of, module_of, traced, wanted_by
from adjointbackmap.explorer.session import DEFAULT_IMAGE, Loaded, Session
from adjointbackmap.images.preparing import Numbers
from adjointbackmap.images.preprocessing import Preprocessing
from adjointbackmap.planes.query import bytes_of
from adjointbackmap.sources import Subject

if TYPE_CHECKING:
    from adjointbackmap.explorer.widget import ExplorerWidget


def explore(
    model: nn.Module | Network | str,
    image: Any = DEFAULT_IMAGE,
    *,
    classes: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    resize: int | None = None,
    preprocess: Any = None,
    view: str = "",
    memory: str = "2GiB",
) -> "ExplorerWidget":
    """Show the explorer in a notebook: point at a unit, see its hyperplane and its receipt.

    It is the page of the command ``adjointbackmap explore``. The kernel answers it, so no server is
    needed. A model on a GPU is copied to the CPU.

    Args:
        model: A module in eval mode; a traced network, which saves the trace; or the name of a
            shipped network.
        image: A picture as :func:`adjointbackmap.image` takes it; the class of a sample image, such
            as ``"ship"``; or the input of the network as a tensor of floating numbers,
            ``(C, H, W)`` or ``(1, C, H, W)``.
        classes: As for :func:`adjointbackmap.explain`.
        size: As for :func:`adjointbackmap.explain`.
        mean: As for :func:`adjointbackmap.explain`.
        std: As for :func:`adjointbackmap.explain`.
        resize: As for :func:`adjointbackmap.explain`.
        preprocess: As for :func:`adjointbackmap.explain`.
        view: What is seen first, such as ``"#layer=conv3&unit=9,6,5&mode=RM2"``.
        memory: Memory for the activation patterns of networks at images. The least recently used
            ones go first.

    Returns:
        A widget. Its ``view`` is what is seen, as text.

    Raises:
        ImportError: If anywidget is not installed.
        TypeError: If the model or the picture is of another type.
        ValueError: If the picture or another argument does not fit the model.

    Example:
        >>> widget = explore("vgg7-cifar10", "ship", view="#layer=conv3&unit=9,6,5&mode=RM2")
        >>> widget.view
        '#layer=conv3&unit=9,6,5&mode=RM2'
        >>> widget.close()
    """
    try:
        from adjointbackmap.explorer.widget import ExplorerWidget
    except ImportError as error:
        msg = (
            "explore needs anywidget. Got an installation without: "
            "pip install 'adjointbackmap[notebook]'."
        )
        raise ImportError(msg) from error
    network = _on_cpu(model)
    module, named = module_of(network)
    wanted = wanted_by(network, module, preprocess).checked(size, mean, std, resize)
    picture = image
    if isinstance(image, str) and image in data.CIFAR10_CLASSES:
        sample = data.sample()
        picture = sample.pixels[int((sample.labels == sample.classes.index(image)).nonzero()[0])]
    x = input_of(picture, module, wanted, channels_of(network, module))
    if not isinstance(network, Network):
        network = traced(module, x.detach(), picture, wanted)
    names = tuple(classes) if classes is not None else named or ()
    title = model if isinstance(model, str) else type(module).__name__
    subject = _subject(module, names, title, tuple(network.in_shape), wanted)
    _check_names(subject, network)
    session = Session(Loaded(subject, network), bytes_of(memory))
    session.first_picture = _first_image(session, image, x, subject)
    return ExplorerWidget(session, view)


def _on_cpu(model: Any) -> Any:
    """The model, or a copy on the CPU if it is elsewhere."""
    module = model.model if isinstance(model, Network) else model
    if not isinstance(module, nn.Module):
        return model
    tensors = (*module.parameters(), *module.buffers())
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return model
    return copy.deepcopy(module).cpu()


def _subject(
    module: nn.Module,
    classes: tuple[str, ...],
    title: str,
    shape: tuple[int, ...],
    wanted: Preprocessing,
) -> Subject:
    """What the explorer has to know of a model.

    Raises:
        ValueError: If its input is no picture.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        msg = (
            "The explorer shows networks of pictures with 1 or 3 channels. "
            f"Got inputs of {shape}: use hyperplanes."
        )
        raise ValueError(msg)
    is_plain = set(wanted.mean) == {0.0} and set(wanted.std) == {1.0}
    prepare = nn.Identity() if is_plain else models.Normalise(wanted.mean, wanted.std)
    return Subject(module, prepare, classes, title, shape, wanted.but(size=shape[1:]))


def _check_names(subject: Subject, network: Network) -> None:
    """Check that each output has a name, if any has.

    Raises:
        ValueError: If they are not as many.
    """
    shape = network.layers["output"].out_shape
    if subject.classes and shape != (len(subject.classes),):
        outputs = " x ".join(map(str, shape))
        msg = f"classes must be one name for each of {outputs} outputs. Got {len(subject.classes)}."
        raise ValueError(msg)


def _first_image(session: Session, image: Any, x: Tensor, subject: Subject) -> str:
    """The name of the picture that is shown first; one of the user's is kept as an upload."""
    if isinstance(image, str) and image in data.CIFAR10_CLASSES:
        return session.first(image)
    if isinstance(image, Tensor) and image.is_floating_point():
        wanted = subject.preprocessing()
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (wanted.mean, wanted.std))
        return session.keep_picture(x.detach()[0] * std.to(x) + mean.to(x), "your tensor")
    return session.keep_picture(image, _name_of(image))


def _name_of(image: Any) -> str:
    """A name for people of a picture: that of its file, or its type."""
    from os import PathLike
    from pathlib import Path

    is_path = isinstance(image, str | PathLike)
    return Path(image).name if is_path else f"your {type(image).__name__}"
