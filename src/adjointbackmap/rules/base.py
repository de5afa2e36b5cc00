"""What a rule is, and how it turns an ATen operation into steps that are linear in [x; b].

A step is one rule at its place in the network, with its inputs and its output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from adjointbackmap.rules.field import Field, Reach, union, windowed
from adjointbackmap.rules.kinks import Kinks
from adjointbackmap.rules.natures import Nature

R = TypeVar("R", bound="Operation")

# Device and dtype for which maps are laid out channels last. Measured: convolutions are slower
# in this layout in float64, and in float32 on an H200.
CHANNELS_LAST = {("cpu", torch.float32)}

Gates = tuple[Tensor, ...]
Signs = frozenset[int]
"""The infinities that a value can hold: -1 for minus infinity, 1 for plus infinity."""
Shape = tuple[int, ...]


class Refused(Exception):
    """An operation with a rule is used in a way that is not piecewise affine.

    The message says how. It completes a sentence that names the operation and its module.

    Attributes:
        nature: What the output is as a factor, if gates alone read it.
    """

    nature = Nature.GATE_ONLY


class SoftmaxValue(Refused):
    """A softmax with frozen gates: it is a gate alone."""

    nature = Nature.SOFTMAX

    def __init__(self) -> None:
        super().__init__(
            "it is a value of its own, not a factor of a product: cut the network before it"
        )


@dataclass(frozen=True)
class Value:
    """A tensor of the network that depends on the image.

    Attributes:
        slot: Its number, by which the steps find it.
        shape: Its shape without the batch.
    """

    slot: int
    shape: Shape


@dataclass(frozen=True)
class Entry:
    """An additive constant of the network: one part of the bias vector ``b``.

    Attributes:
        name: Name for people, unique in the network.
        value: The constant.
        slot: Number of the value that the steps read.
        parameter: The module's parameter with the same derivative, if there is one.
    """

    name: str
    value: Tensor
    slot: int
    parameter: str | None


@dataclass(frozen=True)
class ConstantSource:
    """What a constant is made of: a parameter or buffer of the model, or a node of the graph.

    Two constants with equal sources belong to the same entry of ``b``.

    Attributes:
        name: Name of the parameter or buffer. For a node the name is for people only, and a
            parameter may have the same.
        node: Name of the node, ``None`` for a parameter or buffer.
    """

    name: str
    node: str | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter or buffer, so that its name identifies it."""
        return self.node is None


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the image.

    Attributes:
        tensor: The tensor, a batch of one if it has a batch.
        source: What it is made of.
        base: The tensor of the source.
        index: Flat index into ``base`` of each element of ``tensor``.
    """

    tensor: Tensor
    source: ConstantSource
    base: Tensor
    index: Tensor


@dataclass(frozen=True)
class Mask:
    """A tensor that is constant on each piece, such as a comparison of data.

    Attributes:
        test: Gives the tensor: ``test(k, *inputs)``, where the inputs are ``k`` times as large.
        inputs: The values that it is computed from.
        shape: Its shape without the batch.
    """

    test: Callable[..., Tensor]
    inputs: tuple[Value, ...]
    shape: Shape
    kinks: Kinks | None = None  # where the tensor changes; None if that is unknown


@runtime_checkable
class Builder(Protocol):
    """What the trace offers to a rule's ``build``."""

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
        """Name of the module that calls the operation."""

    dtype: torch.dtype
    device: torch.device
    curved: str
    products: str

    @property
    def call(self) -> Any:
        """The ATen operation itself."""

    def nature(self, value: Value) -> Nature:
        """What a value is made by."""

    def mark(self, value: Value, nature: Nature) -> Value:
        """Write down what a value is made by, and return the value."""

    def note(self, value: Value, frozen: str) -> Value:
        """Write down that a curved call makes a value and what it freezes; return the value."""

    def made_by(self, value: Value) -> tuple["Rule", tuple[Value, ...]] | None:
        """The rule that makes a value, and its inputs; ``None`` for the image and entries."""

    def may_be_infinite(self, value: Value) -> bool:
        """Whether infinite constants, such as those of masks, may reach a value."""

    def constant_on_pieces(self, value: Any) -> bool:
        """Whether an argument does not depend on the image, or is constant on each piece."""

    def apply(self, rule: "Rule", *inputs: Any, shape: Shape | None = None) -> Any:
        """Append a step and return its output.

        Args:
            rule: The rule of the step.
            *inputs: Its inputs.
            shape: Shape of the output without the batch; by default the operation's own.

        Returns:
            The output as a :class:`Value`. If the input is a :class:`Mask`, no step is appended,
            and the moved mask is returned.
        """

    def offset(
        self, name: str, value: Tensor, shape: Shape, parameter: ConstantSource | None
    ) -> Value:
        """A constant that this operation adds, as an entry of the bias vector.

        The same operation on the same constants gives the same entry. A second call of a module
        is an example.

        Args:
            name: Name of the entry.
            value: The constant.
            shape: Shape of the returned value without the batch.
            parameter: The parameter with the same derivative as the entry, if there is one.
        """

    def number(self, name: str, value: float, dims: int | None = None) -> Value:
        """A new entry of one number, as a value that broadcasts to every position.

        The entry's name is that of this operation's module and ``name``. An infinite number gets no
        entry, see :mod:`adjointbackmap.rules.infinite`. The value has ``dims`` dimensions, by
        default as many as the operation's output.
        """

    def as_numbers(self, mask: Mask) -> Value:
        """A mask as a value: the mask times an entry whose value is 1."""

    def as_factor(self, value: Value | Mask) -> Mask | None:
        """A value that is constant on each piece, as a mask that multiplies data.

        It is ``None`` for other values. The scale k does not change the mask.
        """

    def place(self, constant: Any, shape: Shape) -> Value | None:
        """A constant as a value of the given shape without the batch.

        It is ``None`` if the constant is exactly zero, because zeros need no entry.
        """


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
    """How an ATen operation becomes steps; a :class:`Rule` is also a step itself.

    Attributes:
        takes_masks: Whether an argument may be a :class:`Mask`.
        takes_lists: Whether an argument may be a list of values. A list stands for a dimension in
            front of the batch, as in the last states of a recurrent layer.
    """

    takes_masks: ClassVar[bool] = False
    takes_lists: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """Turn the arguments of the ATen operation into steps.

        Returns:
            The operation's :class:`Value`, a list of them if it has several outputs, or a
            :class:`Mask`.
        """


class Rule(Operation):
    """One operation: linear in its inputs once its gates are known.

    Tangents and cotangents come as a folded batch ``(N * K, *shape)``: ``K`` of them for each of
    ``N`` images. Gates are ``(N, *shape)``, and all ``K`` tangents of an image share them. A
    subclass gives ``forward``. Its ``adjoint`` is derived, because the vector-Jacobian product of a
    linear map is exact at any point. It is written by hand only where that is faster. An input
    that only the gates read has the cotangent ``None``.

    Attributes:
        may_leave_out: Whether the data decide which infinities of the inputs reach the output, as
            in a mask. Then they are looked for at each image.
        takes_infinities: Whether :meth:`output` gives the output of inputs that may be infinite.
    """

    may_leave_out: ClassVar[bool] = False
    takes_infinities: ClassVar[bool] = False

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        """Append one step on the first argument; the other arguments are the rule's."""
        return builder.apply(cls(*args[1:], **kwargs), args[0])

    def gates(self, scale: float, *inputs: Tensor) -> Gates:
        """What the activation pattern stores for this operation, given its inputs.

        The inputs are ``scale`` times as large as in the network, so a kink at 6 is at
        ``6 * scale``.
        """
        return ()

    def linear_inputs(self, count: int) -> int:
        """How many of ``count`` inputs are linear; gates alone read the others, which follow."""
        return count

    def output(self, gates: Gates, *inputs: Tensor) -> Tensor:
        """The output in the forward pass that records the pattern."""
        return self.forward(gates, *inputs)

    def kinks(self) -> Kinks | None:
        """Where the gates change, in terms of the inputs; ``None`` if that is unknown."""
        return () if type(self).gates is Rule.gates else None

    @abstractmethod
    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        """The linear map at the gates."""

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor | None, ...]:
        """The transpose of :meth:`forward`: one cotangent for each input, of the given shapes."""
        zeros = [cotangent.new_zeros(len(cotangent), *shape) for shape in shapes]
        pull_back = torch.func.vjp(lambda *tangents: self.forward(gates, *tangents), *zeros)[1]
        return pull_back(cotangent)

    def infinities(self, *inputs: Signs) -> Signs:
        """The infinities that the output can hold; by default those of all inputs."""
        return frozenset[int]().union(*inputs)

    def positional(self) -> bool:
        """Whether an output position depends on inputs and gates at that position alone."""
        return False

    def reach(self) -> Reach | None:
        """The positions of the input that each output position reads.

        ``None`` if no spatial rule is known. Only a rule with one input has a reach.
        """
        return None

    def field(self, *fields: Field) -> Field:
        """Receptive field of the output, from the fields of the inputs.

        It is the whole image if no spatial rule is known.
        """
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
    """A rule that reads a window around each position.

    So a part of the map is enough to compute a part of the output.
    """

    @abstractmethod
    def valid(self, window: Tensor, pad: Sequence[int]) -> Tensor:
        """Apply the operation to a part of the map, without the operation's own padding.

        Args:
            window: The part, with batch and channels in front.
            pad: Zeros to add first, in the order of :func:`torch.nn.functional.pad`.
        """

    def origin(self, first: Sequence[int]) -> list[int] | None:
        """Output position of the first row of :meth:`valid`, per axis.

        ``None`` means the position that the stride gives.

        Args:
            first: Input position of the part's first row, per axis.
        """
        return None


class Pointwise(Rule):
    """A rule whose output at a position depends on its inputs at that position alone."""

    def positional(self) -> bool:
        return True


class Aten(Rule):
    """A linear ATen operation that is applied to every tangent; the adjoint is derived."""

    op: ClassVar[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return self.op(tangents[0], *self.args, **self.kwargs)


def filled(args: Sequence[Any], required: int, *defaults: Any) -> list[Any]:
    """Positional arguments, completed by defaults.

    Args:
        args: The arguments that were given.
        required: Number of arguments without a default; they come first.
        *defaults: The defaults of the others, in their order.
    """
    return [*args, *defaults[len(args) - required :]]


def by_name(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an ATen operation by PyTorch's names, completed by PyTorch's defaults."""
    arguments = op._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def keep_batch(dims: Sequence[int], x: Value | Mask) -> list[int]:
    """Dimensions as numbers from the front, where the batch is 0.

    Raises:
        Refused: If one is the batch.
    """
    counted = [d % (len(x.shape) + 1) for d in dims]
    if 0 in counted:
        msg = "it goes over the images of a batch"
        raise Refused(msg)
    return counted


def laid_out(tensor: Tensor) -> Tensor:
    """The same tensor in the memory layout that is fastest to compute with."""
    if tensor.dim() == 4 and channels_last(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def channels_last(like: Tensor) -> bool:
    """Whether maps of this device and dtype are laid out channels last."""
    return (like.device.type, like.dtype) in CHANNELS_LAST


def unfilled(like: Tensor, shape: Shape) -> Tensor:
    """A batch as long as ``like`` with arbitrary numbers.

    PyTorch's adjoints ask for the forward input, but read only its shape and its layout.
    """
    is_map = len(shape) == 3
    layout = torch.channels_last if is_map and channels_last(like) else torch.contiguous_format
    size = (len(like), *shape)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def gated(gate: Tensor, tangents: Tensor) -> Tensor:
    """Multiply tangents ``(N * K, *shape)`` by gates ``(N, *shape)``.

    All ``K`` tangents of an image get the same gate.
    """
    if len(gate) == len(tangents):
        return gate * tangents
    # (N, K, *shape) times (N, 1, *shape)
    return (tangents.unflatten(0, (len(gate), -1)) * gate.unsqueeze(1)).flatten(0, 1)


def gated_in_place(gate: Tensor, cotangents: Tensor) -> Tensor:
    """The same as :func:`gated`, written into the cotangents, which saves the memory of another."""
    # (N, K, *shape) times (N, 1, *shape)
    cotangents.unflatten(0, (len(gate), -1)).mul_(gate.unsqueeze(1))
    return cotangents
