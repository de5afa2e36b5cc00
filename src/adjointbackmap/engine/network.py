"""The traced network: its layers, its bias vector, and its steps in each dtype."""

import copy
import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.capture.casting import cast
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.entering import Embedded, Entrance, Example
from adjointbackmap.capture.fingerprints import Names, attributes_read, fingerprint, named_tensors
from adjointbackmap.capture.graph import Capture, ancestors, capture, explained
from adjointbackmap.capture.model_check import check_kind, in_train_mode
from adjointbackmap.capture.pickling import check_pickled
from adjointbackmap.capture.process import CAPTURING
from adjointbackmap.display import Shown, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.biases import Biases
from adjointbackmap.engine.constants import depends_on_dtype
from adjointbackmap.engine.curved import REFUSED_READING, Reading
from adjointbackmap.engine.layers import (
    OUTPUT,
    Layer,
    end_node,
    ends_of,
    layer_of_module,
    layers_in_graph,
)
from adjointbackmap.engine.lowering import lower
from adjointbackmap.engine.plans import Plan
from adjointbackmap.engine.program import KernelCall, Program, UnsupportedOperation
from adjointbackmap.rules.curved import FROZEN, NOTE, CurvedCall


class Network(Shown):
    """A traced module, from :func:`adjointbackmap.trace`.

    Attributes:
        model: The user's module, which is not changed; its parameters are the network's.
        layers: Name -> :class:`Layer`, in the order of execution.
        in_shape: Shape of one input, such as ``(3, 32, 32)``.
        until: Name of the layer that ends the network; ``None`` for the module's output.
        output: Which of the module's outputs that is, if it has several.
        reading: What the trace did with curved operations, and with products of two values.
        entrance: Where the input enters, if that is after a module of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Capture,
        planner: Callable[..., Plan],
        until: str | nn.Module | None = None,
        output: int | str | None = None,
        read: Names = MappingProxyType({}),
        reading: Reading = REFUSED_READING,
        entrance: Entrance | None = None,
    ) -> None:
        self.reading = reading
        self.entrance = entrance
        self.model = model
        self.output = output
        if until is model:
            until = OUTPUT
        elif isinstance(until, nn.Module):
            calls = {end.name: end.module for end in ends_of(model, captured)}
            until = layer_of_module(model, until, calls)
        self._planner = planner  # an argument, because the planner's module imports this one
        self.until = None if until == OUTPUT else until
        target = end_node(model, captured, until, output)
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
        is_cut = self.until is not None
        self.layers: dict[str, Layer] = layers_in_graph(
            model, captured, target, self.program(), is_cut
        )

    def _summary(self) -> Summary:
        return showing.of_network(self)

    @cached_property
    def curved(self) -> tuple[CurvedCall, ...]:
        """Every curved call that a layer depends on, other than through gates.

        It is empty for a piecewise-affine network.

        Example:
            >>> from adjointbackmap import trace
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.GELU()).eval()
            >>> [call] = trace(model, torch.rand(1, 1, 5, 5), curved="frozen").curved
            >>> call.name, call.operation, call.frozen
            ('1', 'gelu', 'the quotient gelu(u) / u')
        """
        program = self.program()
        reached = program.with_tangents(layer.value for layer in self.layers.values())
        return tuple(call for slot, call in program.curved.items() if slot in reached)

    @property
    def is_derivative(self) -> bool:
        """Whether the image part of a hyperplane is the derivative of the unit's value."""
        return self.reading.curved != FROZEN or not self.curved

    @property
    def curved_settings(self) -> dict[str, str]:
        """What files must say of the reading; empty for a piecewise-affine network."""
        return asdict(self.reading) if self.curved else {}

    @property
    def note(self) -> str:
        """What pictures and reports must say of the hyperplanes; empty if they are derivatives."""
        return "" if self.is_derivative else NOTE

    def read_as(self, curved: str) -> "Network":
        """The same network with another reading of curved operations, see ``trace``.

        Args:
            curved: ``"frozen"`` or ``"tangent"``.

        Raises:
            ValueError: If it is none of these.
        """
        reading = Reading(curved, self.reading.products)
        ends = (self.until, self.output, self._read)
        return Network(self.model, self._capture, self._planner, *ends, reading, self.entrance)

    @property
    def after(self) -> str | None:
        """Name of the module whose output is the network's input; ``None`` for the model's own."""
        return None if self.entrance is None else self.entrance.after

    def embed(self, given: Example) -> Embedded:
        """What the module ``after`` gives, for what the model takes.

        Args:
            given: A batch such as token numbers ``(N, T)``, or a tuple or dict of tensors, of the
                shape of the example of the trace.

        Returns:
            The output of the module, ``(N, *in_shape)``. It is accepted wherever an image is, and
            carries what the model took, such as masks.

        Raises:
            TypeError: If it is no tensor, or tuple or dict of tensors.
            ValueError: If the network was traced without ``after=``, or the shape is another.

        Example:
            >>> from adjointbackmap import hyperplanes, trace
            >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)).eval()
            >>> network = trace(model, torch.tensor([[1, 2, 3]]), after="0")
            >>> words = network.embed(torch.tensor([[4, 5, 6]]))
            >>> words.shape
            torch.Size([1, 3, 4])
            >>> planes = hyperplanes(network, words, "output")
            >>> bool((planes.reconstruct() - planes.value).abs().max() < 1e-5)
            True
        """
        if self.entrance is None:
            msg = (
                "embed needs a network that begins after a module. Got one that takes the model's "
                "own input: trace it with after=."
            )
            raise ValueError(msg)
        self.check_unchanged()
        tensors = self.entrance.check(given)
        return self.entrance.embed(self.model, tuple(t.to(self.device) for t in tensors))

    def check_piecewise_affine(self, what: str) -> None:
        """Check that the network has no curved call, and reads nothing beside its input.

        Args:
            what: What needs that, such as ``"kink_distances"``.

        Raises:
            ValueError: If it has or does.
        """
        if self.program().given:
            msg = (
                f"{what} needs a network whose input is all that it reads. "
                f"Got one after {self.after!r} that reads masks or tokens: make its masks constant."
            )
            raise ValueError(msg)
        if self.curved:
            first = self.curved[0]
            msg = (
                f"{what} needs a piecewise-affine network, which has linear regions. "
                f"Got {len(self.curved)} curved calls, first {first.operation} at {first.name!r}: "
                "take a network without them."
            )
            raise ValueError(msg)

    @cached_property
    def biases(self) -> Biases:
        """The bias vector ``b`` in the model's dtype."""
        return self.biases_in(self.dtype)

    def biases_in(self, dtype: torch.dtype) -> Biases:
        """The bias vector in another dtype.

        Constants such as b' of batch norm are computed in that dtype, not rounded to it.
        """
        return Biases(self.program(dtype), dtype)

    def program(self, dtype: torch.dtype | None = None) -> Program:
        """The steps in a dtype, by default the model's."""
        dtype = dtype or self.dtype
        if dtype not in self._programs:
            if self._programs:
                self.check_unchanged()  # it may be long after the trace
            # sizes in a graph are symbols, which a capture of another thread must not use meanwhile
            with CAPTURING:
                self._programs.setdefault(dtype, self._lowered(dtype))
        return self._programs[dtype]

    def _lowered(self, dtype: torch.dtype) -> Program:
        """The steps in a dtype.

        If constants depend on the dtype, the model is captured again in that dtype.

        Raises:
            UnsupportedOperation: If the model has other steps, or cannot run, in that dtype.
        """
        tensors = named_tensors(self.model)
        if dtype == self.dtype or not depends_on_dtype(self._capture, ancestors(self._target)):
            return lower(self._capture, self._target, tensors, dtype, self.reading)
        captured, target = self._captured_in(dtype)
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        program = lower(captured, target, tensors, dtype, self.reading)
        if program.outline != self.program().outline:
            msg = (
                f"The model must have the same operations in {dtype} as in {self.dtype}. "
                f"Got others: compute in {self.dtype}."
            )
            raise UnsupportedOperation(msg)
        return program

    def _captured_in(self, dtype: torch.dtype) -> tuple[Capture, torch.fx.Node]:
        example = torch.zeros(2, *self.in_shape, dtype=dtype, device=self.device)
        try:
            copied = structural_copy(self.model, partial(cast, dtype=dtype))
            captured = capture(copied, example, self.entrance, self.dtype)
        except ValueError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            reason = explained(cause).removesuffix(".")
            msg = (
                f"The model must run in {dtype}, as model.to({dtype}) does. Got {reason}: compute "
                f"in {self.dtype}, or give tensors that the forward makes the dtype of its input."
            )
            raise UnsupportedOperation(msg) from error
        return captured, end_node(self.model, captured, self.until, self.output)

    def is_computed_in(self, dtype: torch.dtype) -> bool:
        """Whether the network has steps in a dtype; a model that casts has them in its own only."""
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
            ValueError: If there is no such layer; the message lists all layers.
        """
        if isinstance(name, nn.Module):
            if name is self.model and self.until is None:
                return self.layers[OUTPUT]
            calls = {n: layer.module for n, layer in self.layers.items()}
            name = layer_of_module(self.model, name, calls)
        if isinstance(name, str) and name in self.layers:
            return self.layers[name]
        got = repr(name)
        if not isinstance(name, str):
            # some things show themselves in several lines: a message is one
            shown = " ".join(repr(name).split())
            got = f"{shown:.40} of type {type(name).__name__}: give its name as a str"
        msg = f"A layer must be one of {', '.join(self.layers)}. Got {got}."
        raise ValueError(msg)

    def distinct_layers(self) -> list[Layer]:
        """The layers without those whose output is another one's.

        Of several layers with the same output, the one with a kernel is kept, else the first.
        """
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
            msg = (
                f"Layer {layer.name!r} has no kernel of its own: "
                "choose a convolution or a linear layer, or own_bias=True."
            )
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
        """How hyperplanes of one image are computed, see :func:`adjointbackmap.plan`.

        Example:
            >>> from adjointbackmap import trace
            >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
            >>> print(network.plan("output", "RM2", units=(0, 0, 0)))
            adjoint: 1 cotangents, 3,888 multiply-adds, 124 bytes, workspace 4.16 KiB
        """
        return self._planner(self, layer, mode, units, own_bias, method)

    def weights_hash(self) -> str:
        """SHA-256 of the model's parameters, buffers and extra states, by name."""
        digest = hashlib.sha256()
        for name, state in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            if isinstance(state, Tensor):
                flat = state.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
            else:  # an extra state, from get_extra_state
                digest.update(pickle.dumps(state))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle the model and trace it again: a graph cannot be copied or pickled."""
        self.check_unchanged()
        check_pickled(self.model)
        return self._again(self.model)

    def __copy__(self) -> "Network":
        """A network of the same model, traced again."""
        self.check_unchanged()
        make, arguments = self._again(self.model)
        return make(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        """A copy of the model, traced again; it may have local classes and hooks."""
        self.check_unchanged()
        make, arguments = self._again(copy.deepcopy(self.model, memo))
        return make(*arguments)

    def _again(self, model: nn.Module) -> tuple[Any, ...]:
        """What traces a model as this network's was: a function and its arguments."""
        example = (self.in_shape, self.dtype, self.device)
        ends = (self.until, self.output, self.reading, self.entrance)
        return _traced_again, (model, self._planner, *example, *ends)

    def check_unchanged(self) -> None:
        """Check that the model is as it was traced.

        Raises:
            RuntimeError: If a tensor, class, hook, or an attribute that the forward reads has
                changed, or a module is in train mode.
        """
        check_mode(self.model, RuntimeError)
        now = fingerprint(self.model, self._read)
        if now == self._seen:
            return
        changed = [name for name in self._seen | now if self._seen.get(name) != now.get(name)]
        if changed:
            msg = (
                "The model must be as it was traced. "
                f"Changed since: {', '.join(changed[:5])}: trace it again."
            )
            raise RuntimeError(msg)


def several(layers: Any) -> list[Any]:
    """One layer, or several, as a list.

    Raises:
        ValueError: If the list is empty.
    """
    listed = not isinstance(layers, str | nn.Module) and isinstance(layers, Iterable)
    found = list(layers) if listed else [layers]
    if not found:
        msg = (
            "Layers must be at least one. Got an empty list: "
            "give names of network.layers, or modules."
        )
        raise ValueError(msg)
    return found


def check_network(network: object) -> None:
    """Check that an argument is a traced network.

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
    reading: Reading,
    entrance: Entrance | None,
) -> Network:
    """The network of a model from a copy or a pickle."""
    example = torch.zeros(2, *in_shape, dtype=dtype, device=device)
    read = attributes_read(model, example, entrance)
    captured = capture(model, example, entrance)
    return Network(model, captured, planner, until, output, read, reading, entrance)


def check_eval(model: nn.Module, error: type[Exception]) -> None:
    """Check the kind of a model, and raise ``error`` if any of its modules is in train mode."""
    check_kind(model)
    check_mode(model, error)


def check_mode(model: nn.Module, error: type[Exception]) -> None:
    """Raise ``error`` if any module of a model is in train mode."""
    training = in_train_mode(model)
    if training:
        msg = (
            "The model must be in eval mode. "
            f"Got train mode in {', '.join(training[:3])}: call model.eval() first."
        )
        raise error(msg)
