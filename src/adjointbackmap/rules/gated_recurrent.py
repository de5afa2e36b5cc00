r"""LSTM, GRU and tanh recurrent layers, unrolled; their gates are frozen as in written-out cells.

LSTM: :math:`c' = [f]\,c + [i]\,g`, :math:`h' = [o] \tanh c'`. GRU:
:math:`h' = n + [z]\,(h - n)` with :math:`n = \tanh(W x + [r]\,(U h + b))`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from adjointbackmap.rules.activations import curve
from adjointbackmap.rules.base import Builder, Constant, Refused, Value, by_name
from adjointbackmap.rules.curved import CurvedOperation, curved_rule_for
from adjointbackmap.rules.linear import Add, Masked, Negate
from adjointbackmap.rules.moving import Select, Slice
from adjointbackmap.rules.multiplying import multiplied
from adjointbackmap.rules.recurrent import Cell, one_of, side_by_side, together, vector

State = list[Value | None]
"""The tensors of a cell's state; ``None`` is zero."""


class GatedCell(Cell):
    """A cell whose kernels hold several gates one below the other.

    Attributes:
        gates: Number of gates in a kernel.
        states: Number of tensors in its state.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1

    @property
    def hidden(self) -> int:
        """Length of the state."""
        return self.size // self.gates

    def gate(self, total: Value, which: int) -> Value:
        """One of the gates before its activation."""
        start = which * self.hidden
        rule = Slice(0, 1, start, start + self.hidden, 1)
        return self.builder.apply(rule, total, shape=(self.hidden,))

    def total(self, *values: Value | None) -> Value:
        """The sum of values that have one shape.

        Raises:
            Refused: If all are zero.
        """
        given = [value for value in values if value is not None]
        if not given:
            msg = "both of its arguments are zero"
            raise Refused(msg)
        first, *others = given
        for other in others:
            first = self.builder.apply(Add(), first, other, shape=first.shape)
        return first

    def curve(self, name: str, x: Value) -> Value:
        """A curved function of a value."""
        return curve(self.builder, f"{name}.default", x)

    def times(self, gate: Value, value: Value) -> Value:
        """A gate times a value, which may be a constant."""
        factor = self.builder.as_factor(value)
        if factor is not None:
            return Masked.product(self.builder, gate, factor)
        return multiplied(self.builder, gate, value)

    @abstractmethod
    def step(self, of_input: Value, state: State) -> State:
        """The next state, from the input's part of the sum."""


class LongShortTermMemory(GatedCell):
    """The cell of an LSTM."""

    gates = 4
    states = 2

    def step(self, of_input: Value, state: State) -> State:
        h, c = state
        total = self.total(of_input, self.part(1, h))
        i, f, o = (self.curve("sigmoid", self.gate(total, n)) for n in (0, 1, 3))
        new = self.times(i, self.curve("tanh", self.gate(total, 2)))
        c = new if c is None else self.total(self.times(f, c), new)
        return [self.times(o, self.curve("tanh", c)), c]


class GatedUnit(GatedCell):
    """The cell of a GRU."""

    gates = 3

    def step(self, of_input: Value, state: State) -> State:
        (h,) = state
        of_state = self.part(1, h)
        parts = [None if of_state is None else self.gate(of_state, n) for n in range(3)]
        r, z = (
            self.curve("sigmoid", self.total(self.gate(of_input, n), parts[n])) for n in range(2)
        )
        reset = None if parts[2] is None else self.times(r, parts[2])
        n = self.curve("tanh", self.total(self.gate(of_input, 2), reset))
        minus = self.builder.apply(Negate(), n, shape=n.shape)
        return [self.total(n, self.times(z, self.total(h, minus)))]


class TanhCell(GatedCell):
    """The cell of a recurrent layer with tanh."""

    gates = 1

    def step(self, of_input: Value, state: State) -> State:
        return [self.curve("tanh", self.total(of_input, self.part(1, state[0])))]


CELLS: dict[str, type[GatedCell]] = {
    "lstm": LongShortTermMemory,
    "gru": GatedUnit,
    "rnn_tanh": TanhCell,
}


def _input_part(cell: GatedCell, x: Any) -> Value:
    """The input's part of the sum.

    Raises:
        Refused: If the input is zero and there is no bias.
    """
    return cell.total(cell.part(0, vector(cell.builder, x)))


@curved_rule_for(*(f"aten.{name}_cell.default" for name in CELLS))
class GatedRecurrentCell(CurvedOperation):
    """One time step."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Any:
        x, state, *parameters = args
        kind = CELLS[builder.op.removesuffix("_cell")]
        cell = kind(builder, [p for p in parameters if p is not None])
        before = state if isinstance(state, list | tuple) else [state]
        made = cell.step(_input_part(cell, x), [vector(builder, s) for s in before])
        return made if len(made) > 1 else made[0]


@curved_rule_for(*(f"aten.{name}.input" for name in CELLS))
class GatedRecurrent(CurvedOperation):
    """A recurrent layer, batch first, of any depth, in one direction or both."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> list[Any]:
        """Append the steps of all layers, directions and time steps.

        Returns:
            The outputs of all time steps, then a list of the last states for each tensor of the
            state, see :class:`adjointbackmap.rules.recurrent.Recurrent`.

        Raises:
            Refused: If it drops units at random, or projects its state.
        """
        given = by_name(builder.call, args, kwargs)
        if given["train"] and given["dropout"]:
            msg = "it drops units at random: call model.eval()"
            raise Refused(msg)
        kind = CELLS[builder.op]
        parameters: list[Constant] = list(given["params"])
        each = 4 if given["has_biases"] else 2  # parameters of a cell
        directions = 2 if given["bidirectional"] else 1
        if len(parameters) != each * directions * given["num_layers"]:
            msg = "it projects its state: leave proj_size out"
            raise Refused(msg)
        x = given["input"]
        firsts = given["hx"] if kind.states > 1 else [given["hx"]]
        last: list[State] = []
        for layer in range(given["num_layers"]):
            outputs = []
            for backwards in range(directions):
                cell = kind(builder, parameters[:each])
                del parameters[:each]
                which = layer * directions + backwards  # directions innermost
                state: State = [vector(builder, one_of(first, which)) for first in firsts]
                states = _unrolled(cell, x, state, bool(backwards))
                last.append(states[-1])
                heard = [s[0] for s in (states[::-1] if backwards else states) if s[0] is not None]
                outputs.append(together(builder, heard))
            x = outputs[0] if directions == 1 else side_by_side(builder, outputs)
        return [x, *([state[n] for state in last] for n in range(kind.states))]


def _unrolled(cell: GatedCell, x: Value, state: State, backwards: bool) -> Sequence[State]:
    """The states of all time steps, in the order of their computation."""
    products = _input_part(cell, x)
    times = range(x.shape[0])  # shapes leave the batch out: (time, size)
    made = []
    for time in reversed(times) if backwards else times:
        of_input = cell.builder.apply(Select(1, time), products, shape=(cell.size,))
        state = cell.step(of_input, state)
        made.append(state)
    return made
