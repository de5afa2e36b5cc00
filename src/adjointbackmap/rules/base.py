"""What a rule is, and how rules turn an ATen operation into steps that are linear in [x; b]."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from adjointbackmap.rules.field import Field, Reach, union, windowed

R = TypeVar("R", bound="Operation")

CHANNELS_LAST = {
    ("cpu", torch.float32)
}  # measured: in float64, and on an H200 in float32 too, they are slower so

Gates = tuple[Tensor, ...]
Signs = frozenset[int]
"""Which infinities a value can hold: of -1 and 1."""
Shape = tuple[int, ...]


class Refused(Exception):
    """An operation that has a rule is used in a way that is not piecewise affine; the message says how."""


@dataclass(frozen=True)
class Value:
    """A tensor of the network that depends on the image: its number and its shape without the batch."""

    slot: int
    shape: Shape


@dataclass(frozen=True)
class Entry:
    """An additive constant of the network: its part of the bias vector ``b``.

    ``parameter`` is the module's parameter whose derivative is the entry's, where there is one.
    """

    name: str
    value: Tensor
    slot: int
    parameter: str | None


@dataclass(frozen=True)
class Source:
    """What constants are made of: a parameter or buffer of the model, or a node of the graph.

    Two constants are parts of one entry of ``b`` where their sources are equal. The name of a node is for people:
    a parameter may have the same.
    """

    name: str
    node: str | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter or buffer, which its name identifies."""
        return self.node is None


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the image: the elements ``base[index]`` of ``source``."""

    tensor: Tensor
    source: Source
    base: Tensor
    index: Tensor


@dataclass(frozen=True)
class Mask:
    """A tensor that is constant on pieces, such as a comparison of data: ``test(k, *inputs)``, of ``shape`` beside the batch."""

    test: Callable[..., Tensor]
    inputs: tuple[Value, ...]
    shape: Shape


@runtime_checkable
class Builder(Protocol):
    """What a rule's ``build`` may ask of the trace."""

    @property
    def shape(self) -> Shape:
        """Shape of the operation's output without the batch."""

    @property
    def shapes(self) -> list[Shape]:
        """Shapes of all of the operation's outputs without the batch."""

    @property
    def op(self) -> str:
        """Name of the operation, such as ``conv2d``."""

    @property
    def path(self) -> str:
        """The module that makes the operation."""

    dtype: torch.dtype
    device: torch.device

    def apply(self, rule: "Rule", *inputs: Any, shape: Shape | None = None) -> Any:
        """Append a step, and give its :class:`Value`; its shape is the operation's own unless given.

        A movement of a :class:`Mask` is no step: it gives the mask that was moved.
        """

    def offset(self, name: str, value: Tensor, shape: Shape, parameter: Source | None) -> Value:
        """What this operation adds, as a part of the bias vector and a value of the given shape.

        The same operation on the same constants, such as another call of a module, gives the same part.
        ``parameter`` is the constant whose derivative is the part's, where there is one.
        """

    def number(self, name: str, value: float) -> Value:
        """A new entry of one number, named after this operation, as a value that fits any position.

        An infinite number is no entry, see :mod:`adjointbackmap.rules.infinite`.
        """

    def as_numbers(self, mask: Mask) -> Value:
        """A mask as a value: the mask times an entry of 1."""

    def place(self, constant: Any, shape: Shape) -> Value | None:
        """A constant as a value of the given shape beside the batch; ``None`` if it is exactly zero."""


def tensor_of(argument: Any, what: str) -> Any:
    """The tensor of a constant argument.

    Raises:
        Refused: If the argument depends on the image.
    """
    if isinstance(argument, Value | Mask):
        msg = f"its {what} depends on the image"
        raise Refused(msg)
    return argument.tensor if isinstance(argument, Constant) else argument


class Operation(ABC):
    """How an ATen operation becomes steps; :class:`Rule` is one that is a step itself."""

    takes_masks: ClassVar[bool] = False
    takes_lists: ClassVar[bool] = (
        False  # values in front of the batch, such as the last states of a recurrent layer
    )

    @classmethod
    @abstractmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """Turn the arguments of the ATen operation into steps.

        Returns:
            The operation's :class:`Value`, a list of them if it has several outputs, or a :class:`Mask`.
        """


class Rule(Operation):
    """One operation: linear in its inputs once its gates are known.

    Tangents and cotangents come as a folded batch ``(N * K, *shape)``: ``K`` of them for each of ``N``
    images, while gates are ``(N, *shape)`` and are broadcast. A subclass gives ``forward``; ``adjoint``
    is derived from it (the vector-Jacobian product of a linear map is exact at any point) unless it is
    written by hand for speed. Of an input that only the gates read, the cotangent is ``None``.
    """

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """One step on the first argument."""
        return builder.apply(cls(*args[1:], **kwargs), args[0])

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """What the activation pattern keeps of this operation at its inputs, whose kinks lie at ``scale`` times their place."""
        return ()

    @abstractmethod
    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """The linear map at the gates."""

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """The transpose of :meth:`forward`: one cotangent for each input of the given shapes."""
        zeros = [cotangent.new_zeros(len(cotangent), *shape) for shape in shapes]
        return torch.func.vjp(lambda *tangents: self.forward(gates, *tangents), *zeros)[1](
            cotangent
        )

    def infinities(self, *inputs: Signs) -> Signs:
        """Which infinities the output can hold, from those of the inputs; by default all of them."""
        return frozenset[int]().union(*inputs)

    def positional(self) -> bool:
        """Whether every output position depends on the inputs at that position alone, gates apart in the same way."""
        return False

    def reach(self) -> Reach | None:
        """Which positions of its one input each output position reads; ``None`` where no spatial rule is known."""
        return None

    def field(self, *fields: Field) -> Field:
        """Receptive field of the output, from those of the inputs; the whole image where no spatial rule is known."""
        if self.positional():
            return union(fields)
        reach = self.reach()
        return windowed(fields[0], *reach) if reach else None


RULES: dict[str, type[Operation]] = {}
"""ATen operation -> its rule."""


def rule_for(*ops: str) -> Callable[[type[R]], type[R]]:
    """Make a class the rule of ATen operations, such as ``"aten.relu.default"``."""

    def register(rule: type[R]) -> type[R]:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


class Local(Rule):
    """A rule that reads a window around each position, so that a part of the map is enough for a part of its output."""

    @abstractmethod
    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """The map on a part, padded with zeros as :func:`torch.nn.functional.pad` does, without its own padding."""

    def origin(self, first: Sequence[int]) -> list[int] | None:
        """Where the first position of :meth:`valid` is for a part from ``first`` on, if not where the window says."""
        return None


class Pointwise(Rule):
    """A rule whose output at a position depends on its inputs at that position alone."""

    def positional(self) -> bool:
        """It does."""
        return True


class Aten(Rule):
    """A linear ATen operation applied to every tangent as it is; the adjoint is derived."""

    op: ClassVar[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """The operation itself."""
        return self.op(tangents[0], *self.args, **self.kwargs)


def filled(args: Sequence[Any], required: int, *defaults: Any) -> list[Any]:
    """Positional arguments, followed by the defaults of those that are left out after the ``required`` ones."""
    return [*args, *defaults[len(args) - required :]]


def by_name(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an ATen operation by PyTorch's names for them, with the defaults of those that are left out."""
    arguments = op._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def keep_batch(dims: Sequence[int], x: Value | Mask) -> list[int]:
    """Dimensions counted from the front, none of them the batch.

    Raises:
        Refused: If one is the batch.
    """
    counted = [d % (len(x.shape) + 1) for d in dims]
    if 0 in counted:
        msg = "it goes over the images of a batch"
        raise Refused(msg)
    return counted


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor in memory as it is computed fastest."""
    if tensor.dim() == 4 and channels_last(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def channels_last(like: Tensor) -> bool:
    """Whether maps are computed fastest channels last."""
    return (like.device.type, like.dtype) in CHANNELS_LAST


def unfilled(like: Tensor, shape: Shape) -> Tensor:
    """A batch as long as another, whose numbers are never read: PyTorch's adjoints ask for the input."""
    layout = (
        torch.channels_last if len(shape) == 3 and channels_last(like) else torch.contiguous_format
    )
    return torch.empty(
        len(like), *shape, dtype=like.dtype, device=like.device, memory_format=layout
    )


def gated(gate: Tensor, tangents: Tensor) -> Tensor:
    """Multiply ``(N * K, *shape)`` by gates ``(N, *shape)``, the same for all ``K`` tangents of an image."""
    if len(gate) == len(tangents):
        return gate * tangents
    return (tangents.unflatten(0, (len(gate), -1)) * gate.unsqueeze(1)).flatten(0, 1)
