"""A captured module -> :class:`Network`: its layers, the bias vector, and the steps between them."""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.capture.casting import cast
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.fingerprints import Names, fingerprint, named_tensors
from adjointbackmap.capture.graph import (
    Capture,
    ancestors,
    call_name,
    capture,
    explained,
    module_of,
    op_name,
    path_of,
    pick,
    source_of,
)
from adjointbackmap.capture.model_check import check_kind, in_train_mode
from adjointbackmap.capture.process import CAPTURING
from adjointbackmap.display import Shown, ShownFields, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.constants import depends_on_dtype
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Program, UnsupportedOperation, lower
from adjointbackmap.rules import RULES, Value, field_size
from adjointbackmap.rules.kernels import Kernel

KERNEL_MODULES = (nn.modules.conv._ConvNd, nn.Linear)
OUTPUT = "output"


@dataclass(frozen=True, repr=False)
class Layer(Shown):
    """A layer of a network, as its user knows it.

    Attributes:
        name: The module's own name, ``name:1`` for its second call, ``block.conv2d`` for a functional call; where two would
            have the same, such as a module called ``output`` that is not the last, the second is ``output#1``.
        kind: ``"Conv2d"``, ``"Linear"``, ... or the operation of a functional call.
        modes: Reconstruction modes that the layer has, of ``"RM4"`` to ``"RM0"``.
        in_shape: Shape of its input without the batch; for a module without a kernel, ``None``.
        out_shape: Shape of its output without the batch.
        receptive_field: Input pixels that one of its units depends on, per spatial axis.
        kernel: Node of its convolution or linear call, ``None`` without one.
        call: Which convolution or linear call that is, for who listens to the model.
        module: The call of a module that gives it, as :func:`adjointbackmap.capture.graph.listening` names it;
            ``None`` for others.
        value: Where its output is in the program.
    """

    name: str
    kind: str
    modes: tuple[str, ...]
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...]
    receptive_field: tuple[int, ...]
    kernel: str | None
    call: str | None
    module: str | None
    value: Value

    def _summary(self) -> Summary:
        return showing.of_layer(self)


@dataclass(frozen=True, repr=False)
class Bias(ShownFields):
    """One part of the bias vector: its name, its elements, where it lies in ``b``, the parameter with its derivative, if any."""

    name: str
    value: Tensor
    slice: slice
    parameter: str | None


class Biases(Shown, Mapping[str, Bias]):
    """The bias vector ``b`` in the order of execution: one entry per additive scalar, ``len()`` is M.

    Example:
        >>> from adjointbackmap import trace
        >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
        >>> len(network.biases), network.biases.names
        (4, ('bias',))
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = program.device
        self._parts: dict[str, Bias] = {}
        start = 0
        for entry in program.entries:
            stop = start + entry.value.numel()
            self._parts[entry.name] = Bias(
                entry.name, entry.value.clone(), slice(start, stop), entry.parameter
            )
            start = stop
        self._length = start

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(self._parts)

    @property
    def vector(self) -> Tensor:
        """The vector ``b`` of shape ``(M,)``."""
        parts = [p.value.flatten() for p in self._parts.values()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every element: ``conv1.bias[3]``, or ``b0`` for a part of one."""
        return tuple(
            f"{p.name}[{i}]" if p.value.numel() > 1 else p.name
            for p in self._parts.values()
            for i in range(p.value.numel())
        )

    def __getitem__(self, name: str) -> Bias:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return self._length

    def _summary(self) -> Summary:
        return showing.of_biases(self)


class Network(Shown):
    """A traced module: made by :func:`adjointbackmap.trace`, taken by everything else.

    Attributes:
        model: The user's module, untouched; its parameters are the network's.
        layers: Name -> :class:`Layer`, in the order of execution.
        in_shape: Shape of one input, such as ``(3, 32, 32)``.
        until: Name of the layer that ends the network, ``None`` where the module's output does.
        output: Which of the module's outputs that is, where it has several.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        planner: Callable[..., Plan],
        until: str | nn.Module | None = None,
        output: int | str | None = None,
        read: Names = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.output = output
        if until is model:
            until = OUTPUT
        elif isinstance(until, nn.Module):
            until = _name_of(model, until, {end.name: end.module for end in _ends(model, captured)})
        self._planner = (
            planner  # given from above: the planner stands on the network, not the other way round
        )
        self.until = None if until == OUTPUT else until
        target = _target(model, captured, until, output)
        self._capture = captured
        self._target = target
        self._programs: dict[torch.dtype, Program] = {}
        tensors = named_tensors(model)
        floating = [t.dtype for t in tensors.values() if t.is_floating_point()]
        self.dtype = floating[0] if floating else captured.image.meta["val"].dtype
        self.device = next((t.device for t in tensors.values()), captured.image.meta["val"].device)
        self.in_shape = tuple(captured.image.meta["val"].shape[1:])
        self._read = read
        self._seen = fingerprint(model, read)
        self.layers: dict[str, Layer] = _layers(
            model, captured, target, self.program(), self.until is not None
        )

    def _summary(self) -> Summary:
        return showing.of_network(self)

    @cached_property
    def biases(self) -> Biases:
        """The bias vector ``b`` in the model's dtype."""
        return self.biases_in(self.dtype)

    def biases_in(self, dtype: torch.dtype) -> Biases:
        """The bias vector in another dtype: constants such as b' are computed in it, not rounded to it."""
        return Biases(self.program(dtype), dtype)

    def program(self, dtype: torch.dtype | None = None) -> Program:
        """The steps in a dtype, by default the model's."""
        dtype = dtype or self.dtype
        if dtype not in self._programs:
            if self._programs:
                self.check_unchanged()  # it may be long after the trace
            with (
                CAPTURING
            ):  # the sizes in a graph are symbols, which another thread's capture must not meet
                self._programs.setdefault(dtype, self._lowered(dtype))
        return self._programs[dtype]

    def _lowered(self, dtype: torch.dtype) -> Program:
        """The steps in a dtype; where constants depend on it, from a capture of the model in that dtype.

        Raises:
            UnsupportedOperation: If the model has other steps, or cannot run, in that dtype.
        """
        tensors = named_tensors(self.model)
        if dtype == self.dtype or not depends_on_dtype(self._capture, ancestors(self._target)):
            return lower(self._capture, self._target, tensors, dtype)
        captured, target = self._captured_in(dtype)
        program = lower(
            captured,
            target,
            {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()},
            dtype,
        )
        own = self.program()
        if program.outline != own.outline:
            msg = f"The model must have the same operations in {dtype} as in {self.dtype}. Got others: compute in {self.dtype}."
            raise UnsupportedOperation(msg)
        return program

    def _captured_in(self, dtype: torch.dtype) -> tuple[Capture, torch.fx.Node]:
        example = torch.zeros(2, *self.in_shape, dtype=dtype, device=self.device)
        try:
            captured = capture(structural_copy(self.model, partial(cast, dtype=dtype)), example)
        except ValueError as error:
            reason = explained(
                error.__cause__ if isinstance(error.__cause__, Exception) else error
            ).removesuffix(".")
            msg = (
                f"The model must run in {dtype}, as model.to({dtype}) does. Got {reason}: compute in {self.dtype}, "
                "or give tensors that the forward makes the dtype of its input."
            )
            raise UnsupportedOperation(msg) from error
        return captured, _target(self.model, captured, self.until, self.output)

    def is_computed_in(self, dtype: torch.dtype) -> bool:
        """Whether the steps can be had in a dtype: a model that casts computes in its own alone."""
        try:
            self.program(dtype)
        except UnsupportedOperation:
            return False
        return True

    def layer(self, name: str | nn.Module) -> Layer:
        """A layer by its name, or by its module.

        Args:
            name: Name in :attr:`layers`, or a module of the model that is called once.

        Raises:
            ValueError: If there is none; the message lists those that are.
        """
        if isinstance(name, nn.Module):
            if name is self.model and self.until is None:
                return self.layers[OUTPUT]
            name = _name_of(self.model, name, {n: layer.module for n, layer in self.layers.items()})
        if not isinstance(name, str) or name not in self.layers:
            got = (
                repr(name)
                if isinstance(name, str)
                else f"{name!r:.40} of type {type(name).__name__}: give its name as a str"
            )
            msg = f"A layer must be one of {', '.join(self.layers)}. Got {got}."
            raise ValueError(msg)
        return self.layers[name]

    def distinct_layers(self) -> list[Layer]:
        """The layers, each value once: of two that give the same, the one with a kernel, else the first."""
        by_slot: dict[int, Layer] = {}
        for layer in sorted(self.layers.values(), key=lambda layer: layer.kernel is None):
            by_slot.setdefault(layer.value.slot, layer)
        return [layer for layer in self.layers.values() if layer in by_slot.values()]

    def kernel(self, layer: Layer, dtype: torch.dtype | None = None) -> KernelCall:
        """The convolution or linear call of a layer.

        Raises:
            ValueError: If the layer has none.
        """
        if layer.kernel is None:
            msg = f"Layer {layer.name!r} has no kernel of its own: choose a convolution or a linear layer, or own_bias=True."
            raise ValueError(msg)
        return self.program(dtype).kernels[layer.kernel]

    def plan(
        self,
        layer: str | nn.Module,
        mode: str,
        units: Any = None,
        own_bias: bool | None = None,
        method: str | None = None,
    ) -> Plan:
        """How the hyperplanes of some units of one image are computed, see :func:`adjointbackmap.plan`.

        Example:
            >>> from adjointbackmap import trace
            >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
            >>> print(network.plan("output", "RM2", units=(0, 0, 0)))
            adjoint: 1 cotangents, 3.89e-06 GMAC, 0.0 MiB, workspace 0.0 MiB
        """
        return self._planner(self, layer, mode, units, own_bias, method)

    def weights_hash(self) -> str:
        """SHA-256 of the model's parameters, buffers and extra states, by name."""
        digest = hashlib.sha256()
        for name, state in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            if isinstance(state, Tensor):
                state = (
                    state.detach()
                    .cpu()
                    .contiguous()
                    .reshape(-1)
                    .view(torch.uint8)
                    .numpy()
                    .tobytes()
                )
            else:  # of get_extra_state
                state = pickle.dumps(state)
            digest.update(state)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy and a pickle are the model, which is traced again.

        The graph of ``torch.export`` can be neither copied nor pickled.
        """
        self.check_unchanged()
        return _traced_again, (
            self.model,
            self._planner,
            self.in_shape,
            self.dtype,
            self.device,
            self.until,
            self.output,
        )

    def check_unchanged(self) -> None:
        """Hold the model against the one that was traced.

        Raises:
            RuntimeError: If a tensor, class, hook, or an attribute that the forward reads is another now,
                or a module is in train mode.
        """
        check_mode(self.model, RuntimeError)
        now = fingerprint(self.model, self._read)
        changed = [name for name in self._seen | now if self._seen.get(name) != now.get(name)]
        if changed:
            msg = f"The model must be as it was traced. Changed since: {', '.join(changed[:5])}: trace it again."
            raise RuntimeError(msg)


def several(layers: Any) -> list[Any]:
    """One layer, or several, as a list.

    Raises:
        ValueError: If there is none.
    """
    listed = not isinstance(layers, str | nn.Module) and isinstance(layers, Iterable)
    found = list(layers) if listed else [layers]
    if not found:
        msg = "Layers must be at least one. Got an empty list: give names of network.layers, or modules."
        raise ValueError(msg)
    return found


def _name_of(model: nn.Module, module: nn.Module, calls: Mapping[str, str | None]) -> str:
    """Name of the layer that a module gives; ``calls`` has the module's call behind each name.

    Raises:
        ValueError: If it gives none, or several.
    """
    paths = [path for path, other in model.named_modules(remove_duplicate=False) if other is module]
    kind = type(module).__name__
    if not paths:
        msg = f"A layer must be a module of the model, or a name. Got another {kind}: take it from network.model."
        raise ValueError(msg)
    names = [name for name, call in calls.items() if call is not None and path_of(call) in paths]
    if not names:
        msg = (
            f"A layer must be one of {', '.join(calls)}. Got {kind} {paths[0]!r}, which gives none of them: "
            "take a module that the output depends on."
        )
        raise ValueError(msg)
    if len(names) > 1:
        listed = ", ".join(map(repr, names))
        msg = f"A layer's module must be called once. Got {kind} with {len(names)} calls: give one of the names {listed}."
        raise ValueError(msg)
    return names[0]


def check_network(network: object) -> None:
    """Raise where a traced network must be and is none.

    Raises:
        TypeError: If it is anything else, such as the model itself.
    """
    if isinstance(network, Network):
        return
    kind = type(network).__name__
    first = "trace the model first"
    if isinstance(network, nn.Module):
        kind = f"{kind}, a model"
        first = "trace it first, network = adjointbackmap.trace(model, example)"
    msg = f"network must be a traced network. Got {kind}: {first}."
    raise TypeError(msg)


def _traced_again(
    model: nn.Module,
    planner: Callable[..., Plan],
    in_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    until: str | None,
    output: int | str | None,
) -> Network:
    """The network of a model that came out of a copy or a pickle."""
    example = torch.zeros(2, *in_shape, dtype=dtype, device=device)
    return Network(model, capture(model, example), planner, until, output)


def check_eval(model: nn.Module, error: type[Exception]) -> None:
    """Raise ``error`` if any module of a model is in train mode, and what :func:`check_kind` does."""
    check_kind(model)
    check_mode(model, error)


def check_mode(model: nn.Module, error: type[Exception]) -> None:
    """Raise ``error`` if any module of a model is in train mode."""
    training = in_train_mode(model)
    if training:
        msg = f"The model must be in eval mode. Got train mode in {', '.join(training[:3])}: call model.eval() first."
        raise error(msg)


def _target(
    model: nn.Module, captured: Capture, until: str | None, output: int | str | None
) -> torch.fx.Node:
    if until is None or until == OUTPUT:
        return pick(captured.outputs, output)
    named = {end.name: end.node for end in _ends(model, captured)}
    if until not in named:
        msg = f"until must be one of {', '.join(named)}. Got {until!r}: give one of these names, or a module."
        raise ValueError(msg)
    return named[until]


@dataclass(frozen=True)
class _End:
    """Where a layer ends in the graph, before anything is known of its steps."""

    name: str
    node: torch.fx.Node
    module: str | None
    kernel: torch.fx.Node | None
    call: str | None


def _ends(model: nn.Module, captured: Capture, last: torch.fx.Node | None = None) -> list[_End]:
    """The ends of the layers of modules, which have their own names, and of functional calls.

    A module called ``output`` has its name only if what it gives is ``last``, the model's output.
    """
    kernels = list(_kernel_nodes(model, captured))
    own = {heard: (node, call) for node, heard, _, call in kernels if heard is not None}
    heard = {**{name: node for name, (node, _) in own.items()}, **captured.layers}
    is_last = last is not None and OUTPUT in heard and source_of(heard[OUTPUT]) is source_of(last)
    taken = {name for name in heard if name != OUTPUT} | {OUTPUT}
    ends = []
    for name, node in heard.items():
        shown = name if name != OUTPUT or is_last else _free(name, taken)
        ends.append(_End(shown, source_of(node), name, *own.get(name, (None, None))))
    for node, module, name, call in kernels:
        if module is None:
            ends.append(_End(_free(name, taken), node, None, node, call))
    return ends


def _free(name: str, taken: set[str]) -> str:
    """The name, or the first of ``name#1``, ``name#2``, ... that is not taken; it is from now on."""
    free = next(n for n in chain((name,), (f"{name}#{i}" for i in count(1))) if n not in taken)
    taken.add(free)
    return free


def _kernel_nodes(
    model: nn.Module, captured: Capture
) -> Iterator[tuple[torch.fx.Node, str | None, str, str]]:
    """Each convolution and linear call: node, the module call that it is or ``None``, its name otherwise, and which it is."""
    seen: dict[str, int] = {}
    for node in captured.nodes:
        rule = RULES.get(str(node.target))
        if rule is None or not issubclass(rule, Kernel):
            continue
        path, call = module_of(node)
        op = op_name(node)
        inside = f"{call_name(path, call)}/{op}"
        seen[inside] = seen.get(inside, -1) + 1
        functional = call_name(f"{path}.{op}" if path else op, seen[inside])
        own = isinstance(model.get_submodule(path), KERNEL_MODULES) and seen[inside] == 0 and path
        yield node, call_name(path, call) if own else None, functional, f"{inside}:{seen[inside]}"


def _layers(
    model: nn.Module, captured: Capture, target: torch.fx.Node, program: Program, is_cut: bool
) -> dict[str, Layer]:
    wanted = ancestors(target)
    fields = program.fields
    image = program.image.shape[1:]
    order = {node: i for i, node in enumerate(captured.nodes)}
    ends = [end for end in _ends(model, captured, None if is_cut else target) if end.node in wanted]
    if not any(end.name == OUTPUT for end in ends):
        ends.append(_End(OUTPUT, target, None, None, None))
    layers: dict[str, Layer] = {}
    for end in sorted(
        ends, key=lambda end: (order[end.node], end.name == OUTPUT, -end.name.count("."))
    ):
        value = program.values.get(end.node.name)
        if value is None or not value.shape:
            continue
        kernel = (
            program.kernels[end.kernel.name]
            if end.kernel is not None and end.kernel in wanted
            else None
        )
        layers[end.name] = Layer(
            name=end.name,
            kind=_kind(model, end),
            modes=_modes(kernel, value.shape),
            in_shape=kernel.input.shape if kernel else None,
            out_shape=value.shape,
            receptive_field=field_size(fields[value.slot], image),
            kernel=end.kernel.name if end.kernel is not None and kernel is not None else None,
            call=end.call if kernel is not None else None,
            module=end.module,
            value=value,
        )
    if OUTPUT not in layers:
        shape = ", ".join(["N", *map(str, target.meta["val"].shape[1:])])
        msg = (
            "The output must be numbers that depend on the input, with a dimension beside the batch. "
            f"Got ({shape}) of {target.meta['val'].dtype}: choose another with output=, or until=."
        )
        raise ValueError(msg)
    return layers


def _kind(model: nn.Module, end: _End) -> str:
    """The module's class, the operation of a functional call, or ``output``."""
    if end.module is not None:
        return type(model.get_submodule(path_of(end.module))).__name__
    return op_name(end.kernel) if end.kernel is not None else end.name


def _modes(kernel: KernelCall | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    if len(shape) == 1:
        return ("RM0",)
    if kernel is None:
        return ("RM2", "RM1")
    return ("RM4", "RM3", "RM2", "RM1") if kernel.weight.dim() > 2 else ("RM2",)
