"""A model and a picture -> what adds up to one of its outputs, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap import data, models
from adjointbackmap.capture.model_check import takes
from adjointbackmap.display import Shown, Summary, shown_html
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.images.preparing import Numbers, image
from adjointbackmap.images.preprocessing import Preprocessing
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes
from adjointbackmap.planes.receipts import Receipt
from adjointbackmap.plots.drawing import Drawing
from adjointbackmap.tracing import trace

MOST_SIDE = 512  # pixels of a picture that is taken in its own size without being asked
MOST_SCORES = 5  # shown
RECEIPT = "receipt"
HEADINGS = {
    "hyperplane": "Hyperplane",
    "contributions": "Contributions x * H",
    "channels": "Channels of the hyperplane",
    "spectrum": "Spectrum of the hyperplane",
}


@dataclass(frozen=True, repr=False, eq=False)
class Explanation(Shown):
    """What adds up to one unit of a network at one image. It shows itself in a notebook.

    Attributes:
        network: The traced network; pass it to the next :func:`explain` to save the trace.
        image: The image as the network took it, ``(1, C, H, W)``.
        planes: The hyperplane of the unit.
        receipt: What regions of the image and each layer's biases add to the unit.
        scores: The outputs of the model, ``(classes,)``; ``None`` if the output is not flat.
        classes: Names of the outputs.
    """

    network: Network
    image: Tensor
    planes: Hyperplanes
    receipt: Receipt
    scores: Tensor | None
    classes: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """The unit in words, with the name of its class."""
        plane = self.receipt.plane
        if self.classes is None or plane.mode != "RM0" or plane.layer != OUTPUT:
            return plane.name
        return f"{self.classes[plane.place['out_feature']]} ({plane.name})"

    def plot(self, what: str = "contributions", title: str | None = None) -> Drawing:
        """The unit over the picture.

        Args:
            what: ``"hyperplane"``, ``"contributions"``, ``"channels"``, ``"spectrum"`` or
                ``"receipt"``.
            title: Heading of the figure.

        Raises:
            ValueError: If ``what`` is unknown.
        """
        if what == RECEIPT:
            return self.receipt.plot(self._over(), title or f"Receipt of {self.name}")
        heading = title or f"{HEADINGS.get(what, what)} of {self.name}"
        return self.planes.plot(self._over(), what, title=heading)

    def _over(self) -> Tensor | None:
        return self.image if self.image.dim() == 4 else None

    def _summary(self) -> Summary:
        found = self.receipt._summary()
        facts = {**found.facts, "unit": f"{self.name} ({self.planes.mode})"}
        if self.scores is not None:
            top = self.scores.topk(min(MOST_SCORES, len(self.scores)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            facts["largest outputs"] = ", ".join(f"{self._class(i)} {v:.4g}" for i, v in pairs)
        title = f"Explanation of {type(self.network.model).__name__}"
        return Summary(title, facts, found.tables)

    def _repr_html_(self) -> str:
        found = self._summary()
        # without the table, which the waterfall shows
        return shown_html(Summary(found.title, found.facts), self._pictures())

    def _class(self, index: int) -> str:
        return str(index) if self.classes is None else self.classes[index]

    def _pictures(self) -> list[tuple[str, bytes]]:
        drawings = [self.plot(RECEIPT)]
        if self.image.dim() == 4:
            drawings.insert(0, self.plot("contributions"))
        return [("", drawing._repr_png_()) for drawing in drawings]


def explain(
    model: nn.Module | Network | str,
    source: Any,
    unit: Any = "predicted",
    layer: str | nn.Module = OUTPUT,
    *,
    classes: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    resize: int | None = None,
    preprocess: Any = None,
    by: str = "region",
    dtype: torch.dtype | str | None = None,
) -> Explanation:
    """Trace a model, compute the hyperplane of one unit, and list what adds up to its value.

    Args:
        model: A module in eval mode; a traced network, which saves the trace; or the name of a
            shipped network.
        source: A picture as :func:`adjointbackmap.image` takes it, or the input of the network as a
            tensor of floating numbers, ``(C, H, W)`` or ``(1, C, H, W)``.
        unit: ``"predicted"`` for the largest output; the number or the name of a class; or a tuple
            over the dimensions of the layer's units, such as ``(row, column, channel)``.
        layer: Name of a layer, or a module of the model.
        classes: Names of the outputs. Shipped networks have theirs.
        size: Rows and columns that the model takes. Traced and shipped networks have theirs. By
            default the picture keeps its size, up to 512 pixels.
        mean: As for :func:`adjointbackmap.image`. Shipped networks have theirs.
        std: As for :func:`adjointbackmap.image`.
        resize: As for :func:`adjointbackmap.image`.
        preprocess: As for :func:`adjointbackmap.image`, such as ``"imagenet"``.
        by: ``"region"`` or ``"channel"``, for the lines of the receipt.
        dtype: ``"float64"`` for a sum that closes to the last digits.

    Returns:
        The network, the image, the hyperplane and the receipt.

    Raises:
        TypeError: If the model or the picture is of another type.
        ValueError: If the picture, the unit or another argument does not fit the model.

    Example:
        >>> ship = data.sample().pixels[0]
        >>> found = explain("vgg7-cifar10", ship)
        >>> found.name, abs(found.receipt.error) < 1e-4
        ('ship (output, unit 8)', True)
    """
    module, named = module_of(model)
    wanted = wanted_by(model, module, preprocess).checked(size, mean, std, resize)
    x = input_of(source, module, wanted, channels_of(model, module))
    network = model if isinstance(model, Network) else traced(module, x.detach(), source, wanted)
    names = tuple(classes) if classes is not None else named
    chosen = unit
    _check_unit(network, unit, layer)
    if isinstance(unit, str) and unit != "predicted":
        chosen = _index(unit, names)
    planes = hyperplanes(network, x, layer, units=_one_unit(chosen), dtype=dtype)
    if prod(planes.value.shape) != 1:
        msg = (
            f"unit must be one unit. Got {unit!r}, which is {planes.units.count}: give an int, a "
            "class or a tuple of ints, one for each dimension."
        )
        raise ValueError(msg)
    scores = _scores(network, planes.x)
    _check_names(names, scores)
    return Explanation(network, x, planes, planes.receipt(by=by), scores, names)


def module_of(model: Any) -> tuple[nn.Module, tuple[str, ...] | None]:
    """The module, and the names of its classes if they are known.

    Raises:
        TypeError: If the model is of another type.
    """
    if isinstance(model, str):
        cifar10 = models.card(model)["dataset"] == "cifar10"
        return models.load(model), data.CIFAR10_CLASSES if cifar10 else data.CIFAR100_CLASSES
    if isinstance(model, Network):
        return model.model, _shipped_classes(model.model)
    if isinstance(model, nn.Module):
        return model, _shipped_classes(model)
    msg = (
        f"model must be a torch.nn.Module, a traced network or a name. Got {type(model).__name__}: "
        "give one of these."
    )
    raise TypeError(msg)


def _shipped_classes(module: nn.Module) -> tuple[str, ...] | None:
    """Classes of a network of the study, by the number of its outputs."""
    if not isinstance(module, models.VGG7 | models.ResNet20 | models.FixupResNet20):
        return None
    known = {10: data.CIFAR10_CLASSES, 100: data.CIFAR100_CLASSES}
    return known.get(module.fc.out_features)


def wanted_by(model: Any, module: nn.Module, preprocess: Any) -> Preprocessing:
    """How the model wants its pictures, where it is not said."""
    found = Preprocessing.of(preprocess)
    if preprocess is None and isinstance(module, models.VGG7 | models.ResNet20):
        plain = getattr(module, "batch_norm", True)
        found = Preprocessing.of("none" if plain else "cifar10").but(size=(32, 32))
    if preprocess is None and isinstance(module, models.FixupResNet20):
        found = Preprocessing.of("cifar10")
    if isinstance(model, Network) and len(model.in_shape) == 3:
        found = found.but(size=model.in_shape[1:])
    return found


def channels_of(model: Any, module: nn.Module) -> int:
    """Channels that the model takes: those of its first convolution, if that can be a picture."""
    if isinstance(model, Network):
        found = model.in_shape[0]
    else:
        kernels = (m for m in module.modules() if isinstance(m, nn.Conv2d))
        found = next((kernel.in_channels for kernel in kernels), 3)
    return found if found in (1, 3) else 3


def input_of(source: Any, module: nn.Module, wanted: Preprocessing, channels: int) -> Tensor:
    """The input of the model, on its device and in its dtype.

    Raises:
        ValueError: If a tensor has several images, or a picture is large and its size is not given.
    """
    if isinstance(source, Tensor) and source.is_floating_point():
        x = source
        if x.dim() in (1, 2, 3):  # without a batch
            x = x[None]
        if len(x) != 1:
            msg = (
                f"A tensor must be one image. Got {len(x)}: explain them one by one, as with x[:1]."
            )
            raise ValueError(msg)
    else:
        x = image(source, preprocess=wanted, channels=channels)
        rows, columns = x.shape[2:]
        if wanted.size is None and max(rows, columns) > MOST_SIDE:
            msg = (
                f"size must be given for a picture of more than {MOST_SIDE} pixels. Got {rows} x "
                f"{columns}: give what the model takes, as in size=224 or preprocess='imagenet'."
            )
            raise ValueError(msg)
    like = next((p for p in module.parameters() if p.is_floating_point()), x)
    if (x.dtype, x.device) == (like.dtype, like.device):
        return x
    return x.to(like.device, like.dtype)


def traced(module: nn.Module, x: Tensor, source: Any, wanted: Preprocessing) -> Network:
    """The traced module.

    Raises:
        ValueError: If it cannot be traced. For a picture in its own size, the message names the
            argument that gives another size.
    """
    try:
        return trace(module, x)
    except ValueError as error:
        own_size = wanted.size is None and not isinstance(source, Tensor)
        if module.training or not own_size or takes(module, lambda: x):
            raise
        rows, columns = x.shape[2:]
        msg = (
            f"size must be given for a model that does not take {rows} x {columns} pixels, the "
            "picture's own size. Got None: give what the model takes, as in size=32."
        )
        raise ValueError(msg) from error


def _check_unit(network: Network, unit: Any, layer: str | nn.Module) -> None:
    """Check that no class is asked for in a layer of feature maps.

    Raises:
        ValueError: If one is.
    """
    found = network.layer(layer)
    if isinstance(unit, str) and len(found.out_shape) != 1:
        shape = " x ".join(map(str, found.out_shape))
        msg = (
            f"unit must be a tuple such as (row, column, channel) in {found.name}, which gives "
            f"{shape} numbers. Got {unit!r}: classes are units of the output."
        )
        raise ValueError(msg)


def _index(name: str, classes: tuple[str, ...] | None) -> int:
    """The number of a class.

    Raises:
        ValueError: If there are no names, or the name is none of them.
    """
    if classes is None:
        msg = f"unit must be a number where classes have no names. Got {name!r}: pass classes=."
        raise ValueError(msg)
    if name not in classes:
        few = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        msg = (
            f"unit must be predicted, a number or one of {few}. Got {name!r}: choose one of these."
        )
        raise ValueError(msg)
    return classes.index(name)


def _one_unit(unit: Any) -> Any:
    return (unit,) if isinstance(unit, int) else unit


def _scores(network: Network, x: Tensor) -> Tensor | None:
    """The outputs of the model itself, if they are flat."""
    layer = network.layers[OUTPUT]
    if len(layer.out_shape) != 1:
        return None
    return record(network, x, [layer]).outputs[OUTPUT][0]


def _check_names(names: tuple[str, ...] | None, scores: Tensor | None) -> None:
    if names is not None and scores is not None and len(names) != len(scores):
        msg = f"classes must be one name for each of {len(scores)} outputs. Got {len(names)}."
        raise ValueError(msg)
