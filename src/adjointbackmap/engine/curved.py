"""What a trace does with curved operations: what values are made by, and what gates alone read."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from adjointbackmap.capture.graph import is_getitem
from adjointbackmap.engine.batch_size import outputs_of, without_batch
from adjointbackmap.engine.constants import SYMBOLS, Constants
from adjointbackmap.rules import Constant, Mask, Rule, Value, moving, rearranging
from adjointbackmap.rules.curved import (
    GATE,
    PRODUCTS,
    READINGS,
    REFUSE,
    Computed,
)
from adjointbackmap.rules.linear import Add, Masked, Multiply, Negate
from adjointbackmap.rules.natures import Nature
from adjointbackmap.rules.piecewise import HardSigmoid
from adjointbackmap.rules.pooling import AdaptiveAveragePooling, AveragePooling, Mean

# Rules through which a value stays what it was made by: movements, broadcasting, sums with
# constants, and products with constants or frozen gates.
MOVEMENTS: tuple[type[Rule], ...] = tuple(
    rule
    for room in (moving, rearranging)
    for _, rule in inspect.getmembers(room, inspect.isclass)
    if issubclass(rule, Rule) and rule.__module__ == room.__name__
)
CARRIERS: tuple[type[Rule], ...] = (*MOVEMENTS, Multiply, Negate, Add, Masked)
AVERAGES: tuple[type[Rule], ...] = (
    Mean,
    AveragePooling,
    AdaptiveAveragePooling,
)  # of squares they are squares still


@dataclass(frozen=True)
class Reading:
    """What a trace does with curved operations.

    Attributes:
        curved: ``"refuse"``, ``"frozen"`` or ``"tangent"``.
        products: ``"gate"`` or ``"half"``, see :func:`adjointbackmap.trace`.
    """

    curved: str = REFUSE
    products: str = GATE

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: If one is none of its choices.
        """
        for name, choices in (("curved", READINGS), ("products", PRODUCTS)):
            got = getattr(self, name)
            if got not in choices:
                listed = ", ".join(map(repr, choices))
                msg = f"{name} must be one of {listed}. Got {got!r}: give one of these."
                raise ValueError(msg)


REFUSED_READING = Reading()


class Natures:
    """What each value is made by, see :class:`adjointbackmap.rules.curved.Nature`."""

    def __init__(self) -> None:
        self._of: dict[int, Nature] = {}

    def __getitem__(self, value: Value) -> Nature:
        return self._of.get(value.slot, Nature.PLAIN)

    def mark(self, value: Value, nature: Nature) -> None:
        """Write down what a value is made by."""
        self._of[value.slot] = nature

    def carry(self, rule: Rule, data: Sequence[Value], output: Value) -> None:
        """Write down what the output of a step is made by.

        Args:
            rule: The step's rule.
            data: Its linear inputs that depend on the image.
            output: Its output.
        """
        if isinstance(rule, HardSigmoid):
            self._of[output.slot] = Nature.SIGMOID
            return
        natures = {self[value] for value in data}
        if len(data) == 1:
            (nature,) = natures
            keeps = isinstance(rule, AVERAGES) and nature == Nature.SQUARES
            if isinstance(rule, CARRIERS) or keeps:
                self._of[output.slot] = nature
                return
        if natures & {Nature.GATE_ONLY, Nature.SOFTMAX}:
            self._of[output.slot] = Nature.GATE_ONLY


def computed(
    node: torch.fx.Node, found: Mapping[str, Any], constants: Constants
) -> tuple[list[Value], list[Computed]] | None:
    """How to compute an operation without a rule.

    Args:
        node: The operation.
        found: Name of a node -> what the walk made of it.
        constants: The constants of the graph.

    Returns:
        The inputs, and a rule for each output; ``None`` if the operation is random, mixes the
        images of a batch, or reads something else than tensors and numbers.
    """
    if is_getitem(node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    data = {n.name: found[n.name] for n in node.all_input_nodes if n.name in found}
    if is_random or _goes_over_batch(node) or any(map(_is_unknown, data.values())):
        return None
    inputs = [i for part in data.values() for i in _inputs_of(part)]
    function = partial(evaluated, node, data, constants)
    outputs = outputs_of(node)
    numbers = range(len(outputs)) if len(outputs) > 1 else [None]
    shapes = [without_batch(output) for output in outputs]
    rules = [Computed(function, shape, n) for n, shape in zip(numbers, shapes, strict=True)]
    return inputs, rules


def _goes_over_batch(node: torch.fx.Node) -> bool:
    """Whether an operation reads the dimension of the batch."""
    call = cast("torch._ops.OpOverload", node.target)
    names = [argument.name for argument in call._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    dims = [v for n, v in given.items() if n in ("dim", "dims", "dim0", "dim1")]
    rank = max((n.meta["val"].dim() for n in node.all_input_nodes if _is_tensor(n)), default=0)
    rank += str(node.target) == "aten.unsqueeze.default"  # its dimension is one of the output
    numbers = [d for dim in dims for d in (dim if isinstance(dim, list | tuple) else [dim])]
    return any(d is None or (isinstance(d, int) and d % max(rank, 1) == 0) for d in numbers)


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_unknown(part: Any) -> bool:
    """Whether a part is a list, or the stand-in for a refused value."""
    return not isinstance(part, Mask) and not (isinstance(part, Value) and part.slot >= 0)


def _inputs_of(part: Value | Mask) -> tuple[Value, ...]:
    return part.inputs if isinstance(part, Mask) else (part,)


def evaluated(
    node: torch.fx.Node, data: Mapping[str, Any], constants: Constants, *tensors: Tensor
) -> Any:
    """The operation of a node on a batch.

    Args:
        node: The operation.
        data: Name of a node -> the value or mask that it is.
        constants: The constants of the graph.
        *tensors: The inputs of all values and masks, in their order.
    """
    given = iter(tensors)
    known: dict[str, Any] = {}
    for name, part in data.items():
        own = [next(given) for _ in _inputs_of(part)]
        known[name] = part.test(1.0, *own) if isinstance(part, Mask) else own[0]

    def argument(other: torch.fx.Node) -> Any:
        if other.name in known:
            return known[other.name]
        constant = constants.get(other.name)
        if isinstance(constant, Constant):
            tensor = constant.tensor
            shape = other.meta["val"].shape
            if len(shape) and not isinstance(shape[0], int):  # the graph repeats it for each image
                tensor = tensor.expand(len(tensors[0]), *tensor.shape[1:])
            return tensor.to(constants.dtype) if tensor.is_floating_point() else tensor
        value = other.meta.get("val")
        if isinstance(value, SYMBOLS):
            return constants.number_of(other, len(tensors[0]))
        return value

    call = cast("Callable[..., Any]", node.target)
    args = torch.fx.map_arg(node.args, argument)
    return call(*args, **torch.fx.map_arg(node.kwargs, argument))
