"""A captured graph -> steps that are linear in the image and the bias vector, in one dtype."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from math import isinf, prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

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
from adjointbackmap.engine.constants import (
    DTYPE_ASSERTION,
    LIKE_SECOND,
    SHAPE_ONLY,
    SYMBOLS,
    Constants,
)
from adjointbackmap.engine.narrower import rounding
from adjointbackmap.rules import (
    RULES,
    Axis,
    Constant,
    ConstantSource,
    Entry,
    Field,
    Mask,
    Refused,
    Rule,
    Value,
)
from adjointbackmap.rules.base import Signs
from adjointbackmap.rules.infinite import Infinite, finite, is_infinite
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.rules.linear import Add, Masked, PlacedEntry

IMAGE = 0  # slot of the image
REFUSED = -1  # slot of what has no rule, so that all that have none are found
CHUNK = 128  # tangents or cotangents that are computed as one batch on the CPU; 32 to 128 are the fastest,
NUMBERS = 2**24  # as long as the largest map of a batch is no longer than this
NUMBERS_ON_DEVICE = (
    2**26
)  # on another device: each operation costs its start, however few numbers it has

NUMBERS_TAKEN = {
    "Tensor",
    "number",
    "Optional[number]",
}  # types of arguments that are computed with, unlike extents

# Why common operations have no rule.
STATISTICS = "its statistics depend on the image"
REASONS = {
    "aten.layer_norm.default": STATISTICS,
    "aten.group_norm.default": STATISTICS,
    "aten.rms_norm.default": STATISTICS,
    "aten._native_batch_norm_legit.no_stats": STATISTICS,
    "aten._native_batch_norm_legit_functional.default": STATISTICS,
}


# Operations in which a number is a value, not a place or an extent.
ARITHMETIC = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "clamp",
    "clamp_min",
    "clamp_max",
    "masked_fill",
    "where",
}


class UnsupportedOperation(ValueError):
    """The network has operations that are not piecewise affine, or that have no rule; the message names them all."""


@dataclass(frozen=True)
class Step:
    """One rule applied to earlier values, for an ATen operation."""

    rule: Rule
    inputs: tuple[Value, ...]
    output: Value
    op: str


@dataclass(frozen=True)
class KernelCall:
    """A convolution or linear call: the ATen operation, its kernel, and where its input and weighted sum are."""

    op: Any
    weight: Tensor
    rest: tuple[Any, ...]
    rule: Kernel
    input: Value
    sum: Value

    def apply(self, x: Tensor) -> Tensor:
        """The weighted sum of an input ``(N, ...)``, without bias, by PyTorch's own operation."""
        return self.op(x, self.weight, None, *self.rest)


@dataclass
class Program:
    """The steps of a network on a device, its entries of the bias vector, and where each node's value is.

    ``kernels`` holds the convolution and linear calls by the node that made them.
    """

    image: Value
    device: torch.device
    steps: list[Step] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    kernels: dict[str, KernelCall] = field(default_factory=dict)

    @cached_property
    def chunk(self) -> int:
        """Tangents or cotangents of one image that are computed as one batch."""
        on_cpu = self.device.type == "cpu"
        return max(
            1, min(CHUNK, NUMBERS // self.largest) if on_cpu else NUMBERS_ON_DEVICE // self.largest
        )

    @cached_property
    def largest(self) -> int:
        """Numbers of the largest map of one image."""
        return max(
            prod(value.shape) for value in (self.image, *(step.output for step in self.steps))
        )

    @property
    def outline(self) -> tuple[list[Any], ...]:
        """What the programs of one network in two dtypes have in common: operations, slots and shapes."""
        steps = [(step.op, step.inputs, step.output) for step in self.steps]
        return steps, [(e.slot, e.value.shape) for e in self.entries], list(self.kernels)

    def upstream(self, targets: Iterable[Value]) -> list[Step]:
        """The steps that the targets depend on, in order."""
        slots = frozenset(target.slot for target in targets)
        if slots not in self._upstream:
            self._upstream[slots] = self._leading_to(slots)
        return list(self._upstream[slots])

    @cached_property
    def _upstream(self) -> dict[frozenset[int], list[Step]]:
        """What :meth:`upstream` found: one call asks for the same targets many times."""
        return {}

    def _leading_to(self, slots: frozenset[int]) -> list[Step]:
        needed = set(slots)
        kept = []
        for step in reversed(self.steps):
            if step.output.slot in needed:
                needed.update(i.slot for i in step.inputs)
                kept.append(step)
        return kept[::-1]

    @cached_property
    def infinite(self) -> dict[int, Signs]:
        """Which infinities each value can hold; empty where no constant is infinite."""
        held: dict[int, Signs] = {}
        if any(isinstance(step.rule, Infinite) for step in self.steps):
            for step in self.steps:
                held[step.output.slot] = step.rule.infinities(
                    *(held.get(i.slot, frozenset()) for i in step.inputs)
                )
        return {slot: signs for slot, signs in held.items() if signs}

    @cached_property
    def fields(self) -> dict[int, Field]:
        """Receptive field of every value, once all steps are there."""
        spatial = max(len(self.image.shape) - 1, 0)
        fields: dict[int, Field] = {e.slot: () for e in self.entries}
        fields[IMAGE] = (Axis(),) * spatial if spatial else None
        for step in self.steps:
            known = [
                fields[i.slot] if _meet(i, step) or fields[i.slot] == () else None
                for i in step.inputs
            ]
            fields[step.output.slot] = (
                step.rule.field(*known) if any(f != () for f in known) else ()
            )
        return fields


def _meet(value: Value, step: Step) -> bool:
    """Whether an input has the output's positions, where the rule goes position by position."""
    return not step.rule.positional() or value.shape[1:] == step.output.shape[1:]


def lower(
    capture: Capture, target: torch.fx.Node, tensors: dict[str, Tensor], dtype: torch.dtype
) -> Program:
    """Turn the part of a graph that ``target`` depends on into steps.

    Args:
        capture: The captured graph.
        target: Node that ends the network.
        tensors: Parameters and buffers by the model's names.
        dtype: Floating dtype of the steps.

    Raises:
        UnsupportedOperation: Naming every operation without a rule, with its module path; or if the target may be infinite.
    """
    return _Lowering(capture, tensors, dtype).run(target)


class _Lowering:
    """Walks the graph once; the rules' ``build`` methods call back, see :class:`adjointbackmap.rules.Builder`."""

    def __init__(self, capture: Capture, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.capture = capture
        self.tensors = tensors
        self.dtype = dtype
        self.device = next((t.device for t in tensors.values()), capture.image.meta["val"].device)
        self.program = Program(
            Value(IMAGE, tuple(capture.image.meta["val"].shape[1:])), self.device
        )
        self.own = capture.image.meta["val"].dtype  # that in which the model was captured
        self.constants = Constants(capture, tensors, dtype, self.device)
        self.found: dict[
            str, Any
        ] = {}  # node -> what its rule built: a value, a list of them, a mask
        self.numbers: dict[Mask, Value] = {}  # masks that were needed as values
        self.numbers_of: dict[str, Value] = {}  # the same by node, of layers
        self.flat: set[int] = set()  # slots of values that are constant on pieces
        self.factors: list[Value] = []  # those of them that multiply data
        self.known: dict[Hashable, Value] = {}  # what a part of b is made of -> its value
        self.taken: set[str] = set(tensors)  # names of parts of b; a parameter keeps its own
        self.slots = IMAGE
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
        if self.refused:
            msg = (
                f"Every operation must be piecewise affine and have a rule. Got {', '.join(self.refused)}: "
                "replace them, or cut the graph before them with until=."
            )
            raise UnsupportedOperation(msg)
        in_factors = self._in_factors()
        self.program.entries = [
            self._with_whole_parameter(entry, entry.slot in in_factors)
            for entry in self.program.entries
        ]
        found = {**self.found, **self.numbers_of}
        infinite = self.program.infinite
        self._look_at_each_image(found.get(target.name))
        self.program.values = {
            n: v for n, v in found.items() if isinstance(v, Value) and v.slot not in infinite
        }
        if (
            target.name in found
            and target.name not in self.program.values
            and isinstance(found[target.name], Value)
        ):
            msg = (
                f"The output must be finite. Got infinite constants that reach it through {self._described(target, '')}: "
                "cut the graph before they come in with until=."
            )
            raise UnsupportedOperation(msg)
        return self.program

    def _look_at_each_image(self, target: Any) -> None:
        """Take an output for finite that data may keep infinities out of: the pattern of each image is looked at."""
        if not isinstance(target, Value) or target.slot not in self.program.infinite:
            return
        if any(step.rule.may_leave_out for step in self.program.upstream([target])):
            del self.program.infinite[target.slot]

    def _in_factors(self) -> set[int]:
        """Slots of what the factors are made of, without the data that their masks look at."""
        needed = {factor.slot for factor in self.factors}
        for step in reversed(self.program.steps):
            if step.output.slot in needed:
                needed.update(i.slot for i in step.inputs if i.slot in self.flat)
        return needed

    def _with_whole_parameter(self, entry: Entry, used: bool) -> Entry:
        """The parameter's derivative is the entry's only where it is used as an entry and as nothing else."""
        if entry.parameter is not None:
            used = used or bool(self.constants.uses[ConstantSource(entry.parameter)])
        return replace(entry, parameter=None) if used else entry

    # what a rule may ask (see rules.base.Builder)

    @property
    def op(self) -> str:
        return op_name(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [_without_batch(t) for t in _outputs_of(self.node)]

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
        if isinstance(rule, Kernel):
            self._keep_kernel(rule, inputs[0], output)
        return output

    def offset(
        self, name: str, value: Tensor, shape: tuple[int, ...], parameter: ConstantSource | None
    ) -> Value:
        whole = (
            parameter is not None
            and parameter.is_parameter
            and self.tensors[parameter.name].numel() == value.numel()
        )
        if parameter is not None:
            self.constants.uses[parameter] -= 1
        made_of = (
            self.op,
            self._identity(self.node.args),
            self._identity(tuple(self.node.kwargs.items())),
        )
        entry = self._entry(
            made_of, name, value, parameter.name if parameter is not None and whole else None
        )
        return self._placed(
            entry, torch.arange(value.numel(), device=value.device).reshape(shape), value.numel()
        )

    def number(self, name: str, value: float, dims: int | None = None) -> Value:
        dims = len(self.shape) if dims is None else dims
        if isinf(value):
            return self._infinite(
                torch.full((1,) * dims, value, dtype=self.dtype, device=self.device)
            )
        tensor = torch.tensor(float(value), dtype=self.dtype, device=self.device)
        path, call = module_of(self.node)
        shown = ".".join(p for p in (call_name(path, call), name) if p)
        entry = self._entry((self.node.name, len(self.known)), shown, tensor, None)
        return self._placed(
            entry, torch.zeros((1,) * dims, dtype=torch.int64, device=self.device), 1
        )

    def place(self, constant: Any, shape: tuple[int, ...]) -> Value | None:
        if not isinstance(constant, Constant):
            return self.number(self.op, float(constant)) if constant else None
        if is_infinite(constant.base):
            return self._with_infinities(constant, shape)
        source = constant.source
        if not source.is_parameter and not constant.tensor.any():
            return None
        self.constants.uses[source] -= 1
        entry = self._entry(
            source, source.name, constant.base, source.name if source.is_parameter else None
        )
        return self._placed(entry, constant.index.reshape(shape), constant.base.numel())

    def _placed(self, entry: Value, index: Tensor, size: int) -> Value:
        return self.apply(PlacedEntry(index, size), entry, shape=tuple(index.shape))

    def as_numbers(self, mask: Mask) -> Value:
        if mask not in self.numbers:
            self.numbers[mask] = Masked.product(
                self, self.number("one", 1.0, len(mask.shape)), mask
            )
        return self.numbers[mask]

    def as_factor(self, value: Value | Mask) -> Mask | None:
        if isinstance(value, Mask) or value.slot not in self.flat:
            return value if isinstance(value, Mask) else None
        self.factors.append(value)
        # k multiplies the entries that the value is made of, but no factor
        # it changes only where the masks do that the value is made of
        return Mask(lambda k, v: v / k, (value,), value.shape, ())

    def _infinite(self, value: Tensor) -> Value:
        return self.apply(Infinite(value[None]), shape=tuple(value.shape))

    def _with_infinities(self, constant: Constant, shape: tuple[int, ...]) -> Value | None:
        """A constant whose infinite elements are no entries."""
        source = ConstantSource(
            constant.source.name, constant.source.node or "finite"
        )  # no longer the parameter itself
        rest = Constant(finite(constant.tensor), source, finite(constant.base), constant.index)
        placed = self.place(rest, shape)
        infinite = (constant.tensor - rest.tensor).reshape(shape)  # zero where it is finite
        if not infinite.any():
            return placed
        value = self._infinite(infinite)
        return value if placed is None else self.apply(Add(), placed, value, shape=shape)

    # the walk

    def _visit(self, node: torch.fx.Node) -> None:
        self.node = node
        if node is self.capture.image:
            self.found[node.name] = self.program.image
        elif node.op == "placeholder" or node.op == "get_attr":
            self.constants.take(node)
        elif isinstance(node.meta.get("val"), SYMBOLS):
            self.constants.read(node)
        elif _takes_count(node, self.capture.image.meta["val"].shape[0]):
            self.refused.append(
                self._described(
                    node, "its numbers depend on how many images there are: write a number"
                )
            )
            self.found[node.name] = Value(REFUSED, self.shape)
        elif self._depends_on_image(node):
            self._operation(node)
        else:
            try:
                self.constants.fold(node, self.found)
            except Refused as error:
                self.refused.append(self._described(node, str(error)))

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
        """Refuse a cast that changes nothing at the trace, but would round in the dtype of the steps."""
        dtype = node.args[3] if len(node.args) > 3 else node.kwargs.get("dtype")
        is_mask = isinstance(self.found.get(first_input(node).name), Mask)
        if (
            not is_mask
            and isinstance(dtype, torch.dtype)
            and dtype.is_floating_point
            and dtype != self.dtype
        ):
            self.refused.append(
                self._described(
                    node, f"it casts to {dtype}, and the network computes in {self.dtype}"
                )
            )

    def _operation(self, node: torch.fx.Node) -> None:
        try:
            built = self._output(node) if is_getitem(node) else self._build(node)
        except (Refused, GuardOnDataDependentSymNode) as error:
            reason = (
                str(error)
                if isinstance(error, Refused)
                else "its shape or a number in it is read from the data"
            )
            self.refused.append(self._described(node, reason))
            built = Value(REFUSED, self.shape)
        except Exception:
            if not any(self._is_refused(n) for n in node.all_input_nodes):
                raise
            built = Value(REFUSED, self.shape)  # no rule expects what stands for a refused value
        self.found[node.name] = built
        if (
            isinstance(built, Mask)
            and node in self.ends
            and _outputs_of(node)[0].is_floating_point()
        ):
            self.numbers_of[node.name] = self.as_numbers(built)

    def _is_refused(self, node: torch.fx.Node) -> bool:
        found = self.found.get(node.name)
        return isinstance(found, Value) and found.slot == REFUSED

    def _output(self, node: torch.fx.Node) -> Any:
        """One of several outputs; of a rule that gives one, the first.

        Raises:
            Refused: If it is another.
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
        if rule is None:
            raise Refused(REASONS.get(str(node.target), ""))
        first = _outputs_of(node)[0]
        batch = self.capture.image.meta["val"].shape[0]
        if (
            not first.dim()
            or first.shape[0] != batch
            or any(isinstance(s, torch.SymInt) for s in first.shape[1:])
        ):
            msg = "it moves the batch out of the first dimension"
            raise Refused(msg)

        symbols = [
            a
            for a in node.args
            if isinstance(a, torch.fx.Node) and isinstance(a.meta.get("val"), SYMBOLS)
        ]
        if self.op in ARITHMETIC and any(a.name not in self.constants.numbers for a in symbols):
            msg = "a number in it is that of the images of a batch, or read from the data"
            raise Refused(msg)

        def argument(node: torch.fx.Node) -> Any:
            found = self.found.get(node.name)
            if isinstance(found, Mask) and not rule.takes_masks:
                return self.as_numbers(found)
            if isinstance(found, list) and not rule.takes_lists:
                msg = "its input has the batch in the second dimension"
                raise Refused(msg)
            constant = self.constants.get(node.name)
            if constant is not None:
                self.constants.uses[constant.source] += 1
                return replace(
                    constant,
                    tensor=self._in_dtype(constant.tensor),
                    base=self._in_dtype(constant.base),
                )
            return found or self.constants.numbers.get(node.name, node.meta.get("val"))

        args = torch.fx.map_arg(node.args, argument)
        kwargs = torch.fx.map_arg(node.kwargs, argument)
        built = rule.build(self, *args, **kwargs)
        why = "" if isinstance(built, Mask) else rounding(node, (*args, *kwargs.values()), self.own)
        if why:
            self.refused.append(self._described(node, why))
        return built

    def _keep_kernel(self, rule: Kernel, x: Value, output: Value) -> None:
        node = self.node
        call = KernelCall(node.target, rule.weight, tuple(node.args[3:]), rule, x, output)
        self.program.kernels[node.name] = call

    def _entry(self, made_of: Hashable, name: str, value: Tensor, parameter: str | None) -> Value:
        """The part of b that is made of something, added on its first use."""
        if made_of not in self.known:
            self.slots += 1
            self.known[made_of] = Value(self.slots, tuple(value.shape))
            self.flat.add(self.slots)
            shown = name if made_of == ConstantSource(name) else self._free_name(name)
            own = value.to(self.dtype, copy=True)  # hyperplanes keep to it
            self.program.entries.append(Entry(shown, own, self.slots, parameter))
        return self.known[made_of]

    def _identity(self, argument: Any) -> Hashable:
        """What is equal for arguments that are the same constants; the data counts for none."""
        if isinstance(argument, tuple | list):
            return tuple(self._identity(a) for a in argument)
        if not isinstance(argument, torch.fx.Node):
            return argument
        constant = self.constants.get(argument.name)
        if constant is None:
            return None
        return constant.source if constant.tensor is constant.base else argument.name

    def _free_name(self, name: str) -> str:
        """The name, or the first of ``name#1``, ``name#2``, ... that no other part of b has."""
        numbered = (f"{name}#{i}" for i in count(1))
        free = next(n for n in chain((name,), numbered) if n not in self.taken)
        self.taken.add(free)
        return free

    def _described(self, node: torch.fx.Node, reason: str) -> str:
        path = module_of(node)[0]
        where = f" at {path}" if path else ""
        op = op_name(first_input(node) if is_getitem(node) else node)
        return f"{op}{where}" + (f" ({reason})" if reason else "")


def _takes_count(node: torch.fx.Node, images: int | torch.SymInt) -> bool:
    """Whether an operation computes with the number of images, which shapes may depend on, but no number of the network."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    given = [
        *zip(arguments, node.args, strict=False),
        *((a, node.kwargs[a.name]) for a in arguments if a.name in node.kwargs),
    ]
    taken = [v for a, v in given if isinstance(v, torch.fx.Node) and str(a.type) in NUMBERS_TAKEN]
    return any(_symbols(node.meta.get("val")) & _symbols(images) for node in taken)


def _moved(rule: Rule, mask: Mask, shape: tuple[int, ...]) -> Mask:
    """A mask whose elements a rule without gates moves."""
    return replace(mask, test=lambda k, *t: rule.forward((), mask.test(k, *t)), shape=shape)


def _symbols(number: Any) -> set[Any]:
    """What a number that is known only when the network runs depends on."""
    return (
        number.node.expr.free_symbols
        if isinstance(number, torch.SymInt | torch.SymFloat)
        else set()
    )


def _outputs_of(node: torch.fx.Node) -> list[Tensor]:
    value = node.meta["val"]
    return list(value) if isinstance(value, tuple | list) else [value]


def _without_batch(tensor: Tensor) -> tuple[int, ...]:
    """Shape beside the batch; an extent that hangs on the batch, which is refused, as 1."""
    return tuple(n if isinstance(n, int) else 1 for n in tensor.shape[1:])
