"""Recurrent layers with ReLU, unrolled: one product, one sum and one gate for each moment."""

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
    r"""The parameters of :math:`h' = \mathrm{relu}(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`."""

    builder: Builder
    parameters: Sequence[Constant]  # the two kernels, then the two biases if there are any

    @property
    def size(self) -> int:
        """Length of the state."""
        return len(self.parameters[0].tensor)

    def part(self, which: int, x: Value | None) -> Value | None:
        """A kernel times a value, plus its bias; the bias alone where the value is zero."""
        bias = self.parameters[2 + which] if len(self.parameters) > 2 else None
        if x is None:
            return None if bias is None else self.builder.place(bias, (self.size,))
        kernel = tensor_of(self.parameters[which], "kernel")
        shape = (*x.shape[:-1], self.size)
        product = self.builder.apply(Product(kernel.T, data_first=True), x, shape=shape)
        offset = None if bias is None else self.builder.place(bias, aligned(bias, len(shape)))
        return self.builder.apply(Add(), product, offset, shape=shape) if offset else product

    def next(self, of_input: Value | None, state: Value | None) -> Value:
        """The state after one moment, from the part of its input and the state before; ``None`` is zero.

        Raises:
            Refused: If both are zero.
        """
        parts = [part for part in (of_input, self.part(1, state)) if part is not None]
        if not parts:
            msg = "both of its arguments are zero"
            raise Refused(msg)
        total = (
            self.builder.apply(Add(), *parts, shape=(self.size,)) if len(parts) > 1 else parts[0]
        )
        return self.builder.apply(ReLU(), total, shape=(self.size,))


def placed(builder: Builder, argument: Any) -> Value | None:
    """An input or a state that is data, or a constant ``(1, size)``; ``None`` if it is zero."""
    return (
        argument
        if isinstance(argument, Value)
        else builder.place(argument, tuple(argument.tensor.shape[1:]))
    )


@rule_for("aten.rnn_relu_cell.default")
class RecurrentCell(Operation):
    """One moment of a recurrent layer with ReLU."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Two products, their sum, and its gate."""
        x, state, *parameters = args
        cell = Cell(builder, [p for p in parameters if p is not None])
        return cell.next(cell.part(0, placed(builder, x)), placed(builder, state))


@rule_for("aten.rnn_relu.input")
class Recurrent(Operation):
    """A recurrent layer with ReLU and the batch first, in one direction or both, of any depth."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Any]:
        """The outputs of every moment, and a list of the last states, which have the batch second.

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
        each = 4 if given["has_biases"] else 2
        directions = 2 if given["bidirectional"] else 1
        last: list[Value] = []
        for layer in range(given["num_layers"]):
            outputs = []
            for backwards in range(directions):
                cell = Cell(builder, parameters[:each])
                del parameters[:each]
                state = placed(builder, one_of(hx, layer * directions + backwards))
                states = list(cls.unrolled(builder, cell, x, state, bool(backwards)))
                last.append(states[-1])
                outputs.append(together(builder, states[::-1] if backwards else states))
            x = outputs[0] if directions == 1 else side_by_side(builder, outputs)
        return [x, last]

    @staticmethod
    def unrolled(
        builder: Builder, cell: Cell, x: Value, state: Value | None, backwards: bool
    ) -> Iterator[Value]:
        """The states of every moment in the order of their computation."""
        products = cast("Value", cell.part(0, x))
        moments = range(x.shape[0])
        for moment in reversed(moments) if backwards else moments:
            of_input = builder.apply(Select(1, moment), products, shape=(cell.size,))
            state = cell.next(of_input, state)
            yield state


def one_of(states: Any, which: int) -> Constant:
    """The first state of one layer, from the constant of all, ``(layers, 1, size)``.

    Raises:
        Refused: If the states depend on the image.
    """
    tensor_of(states, "first state")
    return replace(states, tensor=states.tensor[which], index=states.index[which])


def together(builder: Builder, states: Sequence[Value]) -> Value:
    """States ``(size,)`` as one value ``(moments, size)``."""
    shape = (1, *states[0].shape)
    longer = [builder.apply(Reshape(shape), state, shape=shape) for state in states]
    joined = (len(states), *states[0].shape)
    return builder.apply(
        Concatenate(1, [shape] * len(states), range(len(states))), *longer, shape=joined
    )


def side_by_side(builder: Builder, outputs: Sequence[Value]) -> Value:
    """The outputs of both directions as features of one value."""
    shapes = [o.shape for o in outputs]
    joined = (shapes[0][0], sum(s[-1] for s in shapes))
    return builder.apply(Concatenate(2, shapes, range(len(outputs))), *outputs, shape=joined)
