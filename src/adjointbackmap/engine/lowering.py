"""Turns a captured graph into a :class:`Program`, in one dtype."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from itertools import chain, count
from math import isinf
from typing import Any, cast

import torch
from torch import Tensor

from adjointbackmap.capture.graph import (
    Capture,
    ancestors,
    call_name,
    first_input,
    is_getitem,
    module_of,
    op_name,
    source_of,
)
from adjointbackmap.engine.batch_size import (
    has_batch_first,
    has_unknown_numbers,
    outputs_of,
    takes_count,
    without_batch,
)
from adjointbackmap.engine.constants import (
    DTYPE_ASSERTION,
    LIKE_SECOND,
    SHAPE_ONLY,
    SYMBOLS,
    Constants,
)
from adjointbackmap.engine.curved import (
    REFUSED_READING,
    Natures,
    Reading,
    computed,
    evaluated,
)
from adjointbackmap.engine.narrower import rounding
from adjointbackmap.engine.program import (
    IMAGE,
    KernelCall,
    Program,
    Step,
    UnsupportedOperation,
    infinities_in,
)
from adjointbackmap.rules import (
    RULES,
    Constant,
    ConstantSource,
    Entry,
    Field,
    Mask,
    Refused,
    Rule,
    Value,
)
from adjointbackmap.rules.base import Operation
from adjointbackmap.rules.curved import CURVED, FROZEN, REFUSE, Computed, CurvedCall
from adjointbackmap.rules.infinite import Infinite, finite, is_infinite
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.rules.linear import Add, Masked, PlacedEntry
from adjointbackmap.rules.natures import Nature

# Slot of the output of a refused operation. The walk goes on after it, so that the message can name
# all refused operations.
REFUSED = -1

# Why common operations have no rule.
STATISTICS = "its statistics depend on the image"
REASONS = {
    "aten.layer_norm.default": STATISTICS,
    "aten.group_norm.default": STATISTICS,
    "aten.rms_norm.default": STATISTICS,
    "aten._native_batch_norm_legit.no_stats": STATISTICS,
    "aten._native_batch_norm_legit_functional.default": STATISTICS,
}


def lower(
    capture: Capture,
    target: torch.fx.Node,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    reading: Reading = REFUSED_READING,
) -> Program:
    """Turn the part of a graph that ``target`` depends on into steps.

    Args:
        capture: The captured graph.
        target: Node that ends the network.
        tensors: Parameters and buffers by the model's names.
        dtype: Floating dtype of the steps.
        reading: What is done with curved operations.

    Raises:
        UnsupportedOperation: If operations have no rule, with the name and module of each; or if
            the target may be infinite.
    """
    return _Lowering(capture, tensors, dtype, reading).run(target)


class _Lowering:
    """Walks the graph once, and is the builder that rules use.

    See :class:`adjointbackmap.rules.Builder`.
    """

    def __init__(
        self, capture: Capture, tensors: dict[str, Tensor], dtype: torch.dtype, reading: Reading
    ) -> None:
        self.curved = reading.curved
        self.products = reading.products
        self.natures = Natures()
        self.computed: dict[int, str] = {}  # slot that gates alone may read -> why, see _compute
        self.capture = capture
        self.tensors = tensors
        self.dtype = dtype
        self.device = next((t.device for t in tensors.values()), capture.image.meta["val"].device)
        self._images = capture.image.meta["val"].shape[0]  # the number of images, a symbol
        image = Value(IMAGE, tuple(capture.image.meta["val"].shape[1:]))
        self.program = Program(image, self.device)
        self.own = capture.image.meta["val"].dtype  # the dtype that the model was captured in
        self.constants = Constants(capture, tensors, dtype, self.device)
        self.found: dict[str, Any] = {}  # node -> value, list of values, or mask
        # nodes that depend on what the model takes beside the image, and not on the image
        self.aside: set[str] = set()
        self.numbers: dict[Mask, Value] = {}  # mask -> value, for masks that are used as values
        self.numbers_of: dict[str, Value] = {}  # node of a layer -> the value of its mask
        self.flat: set[int] = set()  # slots of values that are constant on pieces
        self.factors: list[Value] = []  # those of them that multiply data
        self.known: dict[Hashable, Value] = {}  # what an entry of b is made of -> its value
        # Names that entries of b may not have. An entry made of a parameter has the parameter's.
        self.taken: set[str] = set(tensors)
        self.slots = IMAGE  # largest slot that is in use
        self.node: torch.fx.Node = capture.image
        self.refused: list[str] = []

    def run(self, target: torch.fx.Node) -> Program:
        wanted = ancestors(target)
        self.ends = {target, *(source_of(end) for end in self.capture.layers.values())}
        for node in self.capture.nodes:
            if node in wanted:
                self._visit(node)
            elif str(node.target) == DTYPE_ASSERTION and first_input(node).name in self.found:
                self._check_dtype(node)
        self._refuse_computed(target)
        if self.refused:
            expected = "be piecewise affine and " if self.curved == REFUSE else ""
            msg = (
                f"Every operation must {expected}have a rule. "
                f"Got {', '.join(self.refused)}: "
                "replace them, or cut the graph before them with until=."
            )
            raise UnsupportedOperation(msg)
        in_factors = self._in_factors()
        self.program.entries = [
            self._with_parameter(entry, entry.slot in in_factors) for entry in self.program.entries
        ]
        found = {**self.found, **self.numbers_of}
        values = {name: value for name, value in found.items() if isinstance(value, Value)}
        infinite = self.program.infinite
        self._look_at_each_image(found.get(target.name))
        aside = {value.slot for name, value in values.items() if name in self.aside}
        untold = infinite.keys() | self._without_tangent() | aside
        self.program.values = {n: v for n, v in values.items() if v.slot not in untold}
        self._leave_out_constants()
        if target.name in values and target.name not in self.program.values:
            msg = (
                "The output must be finite. Got infinite constants that reach it through "
                f"{self._described(target, '')}: cut the graph before they come in with until=."
            )
            raise UnsupportedOperation(msg)
        return self.program

    def _refuse_computed(self, target: torch.fx.Node) -> None:
        """Refuse operations whose values reach the target other than through gates."""
        found = self.found.get(target.name)
        ends = found if isinstance(found, list) else [found]
        values = [value for value in ends if isinstance(value, Value)]
        if self.computed:
            reached = self.program.with_tangents(values)
            self.refused += [why for slot, why in self.computed.items() if slot in reached]

    def _without_tangent(self) -> set[int]:
        """Slots of values that depend on a computed one other than through gates."""
        slots = set(self.computed)
        for step in self.program.steps if slots else ():
            if any(i.slot in slots for i in step.linear_inputs):
                slots.add(step.output.slot)
        return slots

    def _leave_out_constants(self) -> None:
        """Keep constants that only frozen gates read out of ``b``."""
        program = self.program
        if self.curved != FROZEN or not program.curved:
            return
        ends = [program.values[n.name] for n in self.ends if n.name in program.values]
        reached = program.with_tangents(ends)
        program.constants = [e for e in program.entries if e.slot not in reached]
        program.entries = [e for e in program.entries if e.slot in reached]

    def _look_at_each_image(self, target: Any) -> None:
        """Take an output as finite if the data may keep infinities out of it.

        The pattern of each image checks that they do.
        """
        if not isinstance(target, Value) or target.slot not in self.program.infinite:
            return
        if any(step.rule.may_leave_out for step in self.program.upstream([target])):
            del self.program.infinite[target.slot]

    def _in_factors(self) -> set[int]:
        """Slots of the values that factors are made of, without the data that masks compare."""
        needed = {factor.slot for factor in self.factors}
        for step in reversed(self.program.steps):
            if step.output.slot in needed:
                needed.update(i.slot for i in step.inputs if i.slot in self.flat)
        return needed

    def _with_parameter(self, entry: Entry, used: bool) -> Entry:
        """The entry without its parameter if the parameter has other uses too.

        Then their derivatives differ.
        """
        if entry.parameter is not None:
            used = used or bool(self.constants.uses[ConstantSource(entry.parameter)])
        return replace(entry, parameter=None) if used else entry

    # the methods of rules.base.Builder

    @property
    def op(self) -> str:
        return op_name(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [without_batch(t) for t in outputs_of(self.node)]

    @property
    def path(self) -> str:
        return module_of(self.node)[0]

    def apply(self, rule: Rule, *inputs: Any, shape: tuple[int, ...] | None = None) -> Any:
        shape = self.shape if shape is None else shape
        if inputs and isinstance(inputs[0], Mask):
            return _moved(rule, inputs[0], shape)
        self.slots += 1
        output = Value(self.slots, shape)
        self.program.steps.append(Step(rule, inputs, output, self.op))
        known: list[Field] = [() if i.slot in self.flat else None for i in inputs]
        if inputs and (all(f == () for f in known) or rule.field(*known) == ()):
            self.flat.add(output.slot)
        linear = inputs[: rule.linear_inputs(len(inputs))]
        self.natures.carry(rule, [i for i in linear if i.slot not in self.flat], output)
        if isinstance(rule, Kernel):
            self._keep_kernel(rule, inputs[0], output)
        return output

    def offset(
        self, name: str, value: Tensor, shape: tuple[int, ...], parameter: ConstantSource | None
    ) -> Value:
        derivative_of = None
        if parameter is not None:
            self.constants.uses[parameter] -= 1
            is_whole = (
                parameter.is_parameter and self.tensors[parameter.name].numel() == value.numel()
            )
            derivative_of = parameter.name if is_whole else None
        # two calls of a module on the same constants make one entry
        kwargs = tuple(self.node.kwargs.items())
        made_of = (self.op, self._identity(self.node.args), self._identity(kwargs))
        entry = self._entry(made_of, name, value, derivative_of)
        index = torch.arange(value.numel(), device=value.device).reshape(shape)
        return self._placed(entry, index, value.numel())

    def number(self, name: str, value: float, dims: int | None = None) -> Value:
        shape = (1,) * (len(self.shape) if dims is None else dims)
        if isinf(value):
            return self._infinite(torch.full(shape, value, dtype=self.dtype, device=self.device))
        tensor = torch.tensor(float(value), dtype=self.dtype, device=self.device)
        path, call = module_of(self.node)
        shown = ".".join(p for p in (call_name(path, call), name) if p)
        entry = self._entry((self.node.name, len(self.known)), shown, tensor, None)
        index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return self._placed(entry, index, 1)

    def place(self, constant: Any, shape: tuple[int, ...]) -> Value | None:
        if not isinstance(constant, Constant):
            return self.number(self.op, float(constant)) if constant else None
        if is_infinite(constant.base):
            return self._with_infinities(constant, shape)
        source = constant.source
        if not source.is_parameter and not constant.tensor.any():
            return None
        self.constants.uses[source] -= 1
        parameter = source.name if source.is_parameter else None
        entry = self._entry(source, source.name, constant.base, parameter)
        return self._placed(entry, constant.index.reshape(shape), constant.base.numel())

    def _placed(self, entry: Value, index: Tensor, size: int) -> Value:
        return self.apply(PlacedEntry(index, size), entry, shape=tuple(index.shape))

    def as_numbers(self, mask: Mask) -> Value:
        if mask not in self.numbers:
            one = self.number("one", 1.0, len(mask.shape))
            self.numbers[mask] = Masked.product(self, one, mask)
        return self.numbers[mask]

    def as_factor(self, value: Value | Mask) -> Mask | None:
        if isinstance(value, Mask):
            return value
        if value.slot not in self.flat:
            return None
        self.factors.append(value)
        # k multiplies the entries that the value is made of, but it must not multiply a factor. The
        # factor has no kinks of its own: it changes where the masks that it is made of do.
        return Mask(lambda k, v: v / k, (value,), value.shape, kinks=())

    def _infinite(self, value: Tensor) -> Value:
        return self.apply(Infinite(value[None]), shape=tuple(value.shape))

    def _with_infinities(self, constant: Constant, shape: tuple[int, ...]) -> Value | None:
        """A constant whose infinite elements have no entries."""
        # a parameter without its infinities is no longer the parameter
        source = ConstantSource(constant.source.name, constant.source.node or "finite")
        rest = Constant(finite(constant.tensor), source, finite(constant.base), constant.index)
        placed = self.place(rest, shape)
        infinite = (constant.tensor - rest.tensor).reshape(shape)  # zero where it is finite
        if not infinite.any():
            return placed
        value = self._infinite(infinite)
        return value if placed is None else self.apply(Add(), placed, value, shape=shape)

    # the methods of rules.curved.CurvedBuilder

    @property
    def call(self) -> Callable[..., Any]:
        return cast("Callable[..., Any]", self.node.target)

    def nature(self, value: Value) -> Nature:
        return self.natures[value]

    def mark(self, value: Value, nature: Nature) -> Value:
        self.natures.mark(value, nature)
        return value

    def note(self, value: Value, frozen: str) -> Value:
        path, call = module_of(self.node)
        name = call_name(path, call) or self.op
        self.program.curved[value.slot] = CurvedCall(name, self.op, frozen)
        return value

    def made_by(self, value: Value) -> tuple[Rule, tuple[Value, ...]] | None:
        found = (step for step in reversed(self.program.steps) if step.output == value)
        step = next(found, None)
        return None if step is None else (step.rule, step.inputs)

    def may_be_infinite(self, value: Value) -> bool:
        return value.slot in infinities_in(self.program.steps)

    def constant_on_pieces(self, value: Any) -> bool:
        return not isinstance(value, Value) or value.slot in self.flat

    # the walk

    def _visit(self, node: torch.fx.Node) -> None:
        self.node = node
        if node is self.capture.image:
            self.found[node.name] = self.program.image
        elif node in self.capture.given:
            self._take_given(node)
        elif node.op == "placeholder" or node.op == "get_attr":
            self.constants.take(node)
        elif isinstance(node.meta.get("val"), SYMBOLS):
            self.constants.read(node)
        elif self.aside and takes_count(node, self._images) and not self._depends_on_image(node):
            self._count_aside(node)
        elif takes_count(node, self._images):
            reason = "its numbers depend on how many images there are: write a number"
            self._refuse(node, reason)
            self.found[node.name] = Value(REFUSED, self.shape)
        elif self._depends_on_image(node):
            self._operation(node)
        else:
            try:
                self.constants.fold(node, self.found)
            except Refused as error:
                self._refuse(node, str(error))

    def _refuse(self, node: torch.fx.Node, reason: str) -> None:
        self.refused.append(self._described(node, reason))

    def _depends_on_image(self, node: torch.fx.Node) -> bool:
        kind = str(node.target)
        first = node.args[:1]
        rest = (*node.args[1:], *node.kwargs.values())
        read = rest if kind in SHAPE_ONLY else first if kind in LIKE_SECOND else (*first, *rest)
        nodes: list[torch.fx.Node] = []
        torch.fx.map_arg(read, nodes.append)
        return any(n.name in self.found for n in nodes)

    def _in_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _check_dtype(self, node: torch.fx.Node) -> None:
        """Refuse a cast that would round in the dtype of the steps.

        In the dtype of the model it changes nothing, so the graph has only an assertion of the
        dtype there.
        """
        if isinstance(self.found.get(first_input(node).name), Mask):
            return
        dtype = node.args[3] if len(node.args) > 3 else node.kwargs.get("dtype")
        is_floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if is_floating and dtype != self.dtype:
            reason = f"it casts to {dtype}, and the network computes in {self.dtype}"
            self._refuse(node, reason)

    def _take_given(self, node: torch.fx.Node) -> None:
        """Add what the model takes beside the image; gates alone read it."""
        self.slots += 1
        value = Value(self.slots, self.shape)
        self.program.given[self.capture.given.index(node)] = value
        self.flat.add(value.slot)
        self.aside.add(node.name)
        self.found[node.name] = value

    def _is_aside(self, node: torch.fx.Node) -> bool:
        data = [n.name for n in node.all_input_nodes if n.name in self.found]
        return bool(self.aside) and all(name in self.aside for name in data)

    def _set_aside(self, node: torch.fx.Node) -> None:
        """Compute an operation on what the model takes beside the image, such as a mask."""
        self.aside.add(node.name)
        if is_getitem(node):
            self.found[node.name] = self.found[first_input(node).name][cast("int", node.args[1])]
            return
        made = computed(node, self.found, self.constants)
        if made is None:
            self._refuse(node, "it mixes the rows of a batch, or is random")
            self.found[node.name] = Value(REFUSED, self.shape)
            return
        inputs, rules = made
        pairs = zip(rules, self.shapes, strict=True)
        values = [self.apply(rule, *inputs, shape=shape) for rule, shape in pairs]
        several = isinstance(node.meta["val"], tuple | list)
        self.found[node.name] = values if several else values[0]

    def _count_aside(self, node: torch.fx.Node) -> None:
        """Compute an operation on the number of rows, such as their indices in a mask."""
        # what the model takes tells the number of rows when the operation is computed
        number, value = next(iter(self.program.given.items()))
        data = {self.capture.given[number].name: value}
        function = partial(evaluated, node, data, self.constants)
        self.aside.add(node.name)
        self.found[node.name] = self.apply(Computed(function, self.shape), value)

    def _operation(self, node: torch.fx.Node) -> None:
        if self._is_aside(node):
            self._set_aside(node)
            return
        before = self._state()
        try:
            built = self._output(node) if is_getitem(node) else self._build(node)
        except Refused as error:
            self._undo(before)
            built = self._compute(node, self._described(node, str(error)), error.nature)
        except _read_from_data():
            self._refuse(node, "its shape or a number in it is read from the data")
            built = Value(REFUSED, self.shape)
        except Exception:
            # a rule may fail on the stand-in for a refused value
            if not any(self._is_refused(n) for n in node.all_input_nodes):
                raise
            built = Value(REFUSED, self.shape)
        self.found[node.name] = built
        is_layer = node in self.ends and outputs_of(node)[0].is_floating_point()
        if isinstance(built, Mask) and is_layer:
            self.numbers_of[node.name] = self.as_numbers(built)

    def _state(self) -> tuple[int, int]:
        return len(self.program.steps), len(self.program.entries)

    def _undo(self, before: tuple[int, int]) -> None:
        """Take back the steps and entries of an operation that was refused half way."""
        steps, entries = before
        gone = {entry.slot for entry in self.program.entries[entries:]}
        del self.program.steps[steps:]
        del self.program.entries[entries:]
        self.known = {key: value for key, value in self.known.items() if value.slot not in gone}

    def _compute(self, node: torch.fx.Node, why: str, nature: Nature) -> Any:
        """The output of an operation without a rule, for gates alone.

        If it reaches the output in another way, it is refused at the end.

        Args:
            node: The operation.
            why: The words of the refusal.
            nature: What it is as a factor.
        """
        made = computed(node, self.found, self.constants) if self.curved == FROZEN else None
        if made is None:
            self.refused.append(why)
            return Value(REFUSED, self.shape)
        inputs, rules = made
        values = []
        for rule, shape in zip(rules, self.shapes, strict=True):
            value = self.apply(rule, *inputs, shape=shape)
            self.computed[value.slot] = why
            self.mark(value, nature)
            values.append(value)
        return values if len(values) > 1 else values[0]

    def _is_refused(self, node: torch.fx.Node) -> bool:
        found = self.found.get(node.name)
        return isinstance(found, Value) and found.slot == REFUSED

    def _output(self, node: torch.fx.Node) -> Any:
        """One of several outputs of an operation.

        Raises:
            Refused: If the rule gives only the first output and this is another one.
        """
        whole = self.found[first_input(node).name]
        which = node.args[1]
        if isinstance(whole, list):
            return whole[cast("int", which)]
        if which == 0:
            return whole
        msg = "only the first of its outputs has a rule"
        raise Refused(msg)

    def _build(self, node: torch.fx.Node) -> Any:
        rule = RULES.get(str(node.target))
        curved = CURVED.get(str(node.target)) if self.curved != REFUSE else None
        if rule is None and curved is None:
            raise Refused(REASONS.get(str(node.target), ""))
        if not has_batch_first(node, self._images):
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)
        if has_unknown_numbers(node, self.constants.numbers):
            msg = "a number in it is that of the images of a batch, or read from the data"
            raise Refused(msg)

        taking = cast("type[Operation]", rule or curved)

        def argument(node: torch.fx.Node) -> Any:
            return self._argument(node, taking)

        args = torch.fx.map_arg(node.args, argument)
        kwargs = torch.fx.map_arg(node.kwargs, argument)
        if curved is not None and curved.is_curved(self, *args, **kwargs):
            taking = curved
        elif rule is None:
            raise Refused(REASONS.get(str(node.target), ""))
        built = taking.build(self, *args, **kwargs)
        why = "" if isinstance(built, Mask) else rounding(node, (*args, *kwargs.values()), self.own)
        if why:
            self._refuse(node, why)
        return built

    def _argument(self, node: torch.fx.Node, rule: type[Operation]) -> Any:
        """What a rule gets for a node.

        Raises:
            Refused: If the rule cannot take a list of values.
        """
        found = self.found.get(node.name)
        if node.name in self.aside and isinstance(found, Value):
            found = Mask(self._as_given, (found,), found.shape, kinks=())
        if isinstance(found, Mask) and not rule.takes_masks:
            return self.as_numbers(found)
        if isinstance(found, list) and not rule.takes_lists:
            msg = "its input has the batch in the second dimension"
            raise Refused(msg)
        constant = self.constants.get(node.name)
        if constant is None:
            return found or self.constants.numbers.get(node.name, node.meta.get("val"))
        self.constants.uses[constant.source] += 1
        tensor = self._in_dtype(constant.tensor)
        return replace(constant, tensor=tensor, base=self._in_dtype(constant.base))

    def _as_given(self, k: float, tensor: Tensor) -> Tensor:
        """What the model takes, as a mask: k does not multiply it."""
        return tensor if tensor.dtype == torch.bool else tensor.to(self.dtype)

    def _keep_kernel(self, rule: Kernel, x: Value, output: Value) -> None:
        node = self.node
        call = KernelCall(node.target, rule.weight, tuple(node.args[3:]), rule, x, output)
        self.program.kernels[node.name] = call

    def _entry(self, made_of: Hashable, name: str, value: Tensor, parameter: str | None) -> Value:
        """The value of an entry of ``b``; the entry is added on its first use.

        Args:
            made_of: What the entry is made of; equal for the same entry.
            name: Its name.
            value: Its value.
            parameter: The parameter with the same derivative, if there is one.
        """
        if made_of not in self.known:
            self.slots += 1
            self.known[made_of] = Value(self.slots, tuple(value.shape))
            self.flat.add(self.slots)
            shown = name if made_of == ConstantSource(name) else self._free_name(name)
            own = value.to(self.dtype, copy=True)  # hyperplanes keep it when the model is changed
            self.program.entries.append(Entry(shown, own, self.slots, parameter))
        return self.known[made_of]

    def _identity(self, argument: Any) -> Hashable:
        """A key that is equal for arguments that are the same constants; data have ``None``."""
        if isinstance(argument, tuple | list):
            return tuple(self._identity(a) for a in argument)
        if not isinstance(argument, torch.fx.Node):
            return argument
        constant = self.constants.get(argument.name)
        if constant is None:
            return None
        return constant.source if constant.tensor is constant.base else argument.name

    def _free_name(self, name: str) -> str:
        """The name, or the first of ``name#1``, ``name#2``, ... that no other entry has."""
        numbered = (f"{name}#{i}" for i in count(1))
        free = next(n for n in chain((name,), numbered) if n not in self.taken)
        self.taken.add(free)
        return free

    def _described(self, node: torch.fx.Node, reason: str) -> str:
        path = module_of(node)[0]
        where = f" at {path}" if path else ""
        op = op_name(first_input(node) if is_getitem(node) else node)
        return f"{op}{where}" + (f" ({reason})" if reason else "")


def _moved(rule: Rule, mask: Mask, shape: tuple[int, ...]) -> Mask:
    """A mask after a rule that moves its elements and has no gates."""
    return replace(mask, test=lambda k, *t: rule.forward((), mask.test(k, *t)), shape=shape)


def _read_from_data() -> type[Exception]:
    """The error of a shape that depends on the data; its module loads SymPy, so it comes late."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return GuardOnDataDependentSymNode
