"""Recurrent layers with ReLU, unrolled: a product, a sum and a gate for each time step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from adjointbackmap.rules.base import (
    Builder,
    Constant,
    Operation,
    Refused,
    Value,
    by_name,
    rule_for,
    tensor_of,
)
from adjointbackmap.rules.joining import Concatenate
from adjointbackmap.rules.linear import Add, Product, aligned
from adjointbackmap.rules.moving import Reshape, Select
from adjointbackmap.rules.piecewise import ReLU


@dataclass(frozen=True)
class Cell:
    r"""One cell: :math:`h' = \mathrm{relu}(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Attributes:
        builder: What appends the steps.
        parameters: The kernels of input and state, then their biases if there are any.
    """

    builder: Builder
    parameters: Sequence[Constant]

    @property
    def size(self) -> int:
        """Length of the state."""
        return len(self.parameters[0].tensor)

    def part(self, which: int, x: Value | None) -> Value | None:
        """A kernel times a value plus its bias; the bias alone if the value is zero (``None``).

        Args:
            which: 0 for the input's kernel and bias, 1 for the state's.
            x: The value.
        """
        bias = self.parameters[2 + which] if len(self.parameters) > 2 else None
        if x is None:
            return None if bias is None else self.builder.place(bias, (self.size,))
        kernel = tensor_of(self.parameters[which], "kernel")
        shape = (*x.shape[:-1], self.size)
        product = self.builder.apply(Product(kernel.T, data_first=True), x, shape=shape)
        offset = None if bias is None else self.builder.place(bias, aligned(bias, len(shape)))
        return self.builder.apply(Add(), product, offset, shape=shape) if offset else product

    def next(self, of_input: Value | None, state: Value | None) -> Value:
        """The next state.

        Args:
            of_input: The input's part of the sum; ``None`` is zero.
            state: The state before; ``None`` is zero.

        Raises:
            Refused: If both are zero.
        """
        parts = [part for part in (of_input, self.part(1, state)) if part is not None]
        if not parts:
            msg = "both of its arguments are zero"
            raise Refused(msg)
        shape = (self.size,)
        total = self.builder.apply(Add(), *parts, shape=shape) if len(parts) > 1 else parts[0]
        return self.builder.apply(ReLU(), total, shape=shape)


def vector(builder: Builder, argument: Any) -> Value | None:
    """An input or a state as a value, which may be a constant ``(1, size)``; ``None`` if zero."""
    if isinstance(argument, Value):
        return argument
    return builder.place(argument, tuple(argument.tensor.shape[1:]))


@rule_for("aten.rnn_relu_cell.default")
class RecurrentCell(Operation):
    """One time step of a recurrent layer with ReLU."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        x, state, *parameters = args
        cell = Cell(builder, [p for p in parameters if p is not None])
        return cell.next(cell.part(0, vector(builder, x)), vector(builder, state))


@rule_for("aten.rnn_relu.input")
class Recurrent(Operation):
    """A recurrent layer with ReLU, batch first, of any depth, in one direction or both."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Any]:
        """Append the steps of all layers, directions and time steps.

        Returns:
            The outputs of all time steps, and a list of the last states. The list stands for the
            first dimension: PyTorch's last states have the batch in the second one.

        Raises:
            Refused: If it drops units at random.
        """
        given = by_name(torch.ops.aten.rnn_relu.input, args, kwargs)
        if given["train"] and given["dropout"]:
            msg = "it drops units at random: call model.eval()"
            raise Refused(msg)
        x = given["input"]
        hx = given["hx"]
        parameters = list(given["params"])
        each = 4 if given["has_biases"] else 2  # parameters of a cell
        directions = 2 if given["bidirectional"] else 1
        last: list[Value] = []
        for layer in range(given["num_layers"]):
            outputs = []
            for backwards in range(directions):
                cell = Cell(builder, parameters[:each])
                del parameters[:each]
                # the first states are (layers * directions, 1, size), directions innermost
                state = vector(builder, one_of(hx, layer * directions + backwards))
                states = list(cls.unrolled(builder, cell, x, state, bool(backwards)))
                last.append(states[-1])
                outputs.append(together(builder, states[::-1] if backwards else states))
            x = outputs[0] if directions == 1 else side_by_side(builder, outputs)
        return [x, last]

    @staticmethod
    def unrolled(
        builder: Builder, cell: Cell, x: Value, state: Value | None, backwards: bool
    ) -> Iterator[Value]:
        """The states of all time steps, in the order of their computation."""
        products = cast("Value", cell.part(0, x))
        times = range(x.shape[0])  # shapes leave the batch out: (time, size)
        for time in reversed(times) if backwards else times:
            of_input = builder.apply(Select(1, time), products, shape=(cell.size,))
            state = cell.next(of_input, state)
            yield state


def one_of(states: Any, which: int) -> Constant:
    """The first state of one layer and direction, from the constant of all of them.

    Raises:
        Refused: If the states depend on the image.
    """
    tensor_of(states, "first state")
    return replace(states, tensor=states.tensor[which], index=states.index[which])


def together(builder: Builder, states: Sequence[Value]) -> Value:
    """States ``(size,)`` as one value ``(time, size)``."""
    shape = (1, *states[0].shape)
    longer = [builder.apply(Reshape(shape), state, shape=shape) for state in states]
    joined = (len(states), *states[0].shape)
    rule = Concatenate(1, [shape] * len(states), range(len(states)))
    return builder.apply(rule, *longer, shape=joined)


def side_by_side(builder: Builder, outputs: Sequence[Value]) -> Value:
    """The outputs ``(time, size)`` of both directions as features of one value."""
    shapes = [o.shape for o in outputs]
    joined = (shapes[0][0], sum(s[-1] for s in shapes))
    return builder.apply(Concatenate(2, shapes, range(len(outputs))), *outputs, shape=joined)
