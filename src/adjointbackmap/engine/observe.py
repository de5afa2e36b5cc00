"""Inputs and outputs of layers, recorded in a forward pass of the untouched model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adjointbackmap.capture.casting import cast
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.entering import run
from adjointbackmap.capture.graph import call_name, convolution_name, listening, pick
from adjointbackmap.capture.precision import exact
from adjointbackmap.capture.widening import widened
from adjointbackmap.engine.layers import OUTPUT, Layer
from adjointbackmap.engine.network import Network

# PyTorch's names of the convolution and linear calls.
FUNCTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
)
IMAGES_AT_ONCE = 64  # largest batch in one call of the model


@dataclass(frozen=True)
class Recorded:
    """Tensors of layers by name, each ``(N, ...)``.

    Attributes:
        inputs: Inputs of the layers' convolution or linear calls.
        outputs: Outputs of the layers.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def record(
    network: Network, images: Tensor, layers: Sequence[Layer], at_once: int = IMAGES_AT_ONCE
) -> Recorded:
    """Run the untouched model and keep inputs and outputs of layers.

    Only the layers' names are taken from the trace, so a wrong trace cannot hide here. The model's
    own code runs on a copy of its structure, so that other threads see no hooks or casts. The
    caller checks that the model is as it was traced.

    Args:
        network: Traced network.
        images: Batch ``(N, *in_shape)`` in the dtype of the pass.
        layers: Layers to keep.
        at_once: Images in one call of the model.

    Returns:
        What was recorded.

    Raises:
        RuntimeError: If the model did not call a layer.
    """
    with exact(images.device):
        found = [record_call(network, part, layers) for part in images.split(at_once)]
    if len(found) == 1:
        return found[0]
    inputs = {name: torch.cat([f.inputs[name] for f in found]) for name in found[0].inputs}
    outputs = {name: torch.cat([f.outputs[name] for f in found]) for name in found[0].outputs}
    return Recorded(inputs, outputs)


def record_call(
    network: Network,
    x: Tensor,
    layers: Sequence[Layer],
    tensors: Mapping[str, Tensor] | None = None,
) -> Recorded:
    """Record in one call of the model, see :func:`record`.

    Args:
        network: Traced network.
        x: Batch ``(N, *in_shape)`` in the dtype of the pass.
        layers: Layers to keep.
        tensors: Parameters and buffers to run it on, by the first name of each; by default the
            model's own, cast to the dtype of the pass.

    Returns:
        What was recorded.

    Raises:
        RuntimeError: If the model did not call a layer.
    """
    recorded = _recorded_in_one_call(network, x, layers, tensors)
    outputs = recorded.outputs
    if len(x) > 1 or all(outputs[each.name].shape == (1, *each.out_shape) for each in layers):
        return recorded
    # a forward that squeezes has dropped the batch of one: it keeps a batch of two copies
    twice = _recorded_in_one_call(network, x.expand(2, *x.shape[1:]), layers, tensors)
    inputs = {name: t[:1] for name, t in twice.inputs.items()}
    return Recorded(inputs, {name: t[:1] for name, t in twice.outputs.items()})


def _recorded_in_one_call(
    network: Network, x: Tensor, layers: Sequence[Layer], tensors: Mapping[str, Tensor] | None
) -> Recorded:
    kept = Recorded({}, {})
    names = {layer.name for layer in layers}
    wanted = [*layers, network.layers[network.until]] if network.until else layers
    calls = {layer.call: layer for layer in wanted if layer.call is not None}
    heard = {layer.module: layer for layer in wanted if layer.module is not None}
    model = structural_copy(network.model, _replacement(network, x.dtype, tensors))

    # clones, because a later operation in place would change the tensors

    def function(call: str, x: Tensor, output: Tensor) -> None:
        if call in calls:
            layer = calls[call]
            kept.inputs[layer.name] = layer.place.batch_first(x).clone()
            if layer.module is None:
                kept.outputs[layer.name] = layer.place.batch_first(output).clone()

    def module(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if name in heard and isinstance(output, Tensor):
            layer = heard[name]
            kept.outputs[layer.name] = layer.place.batch_first(output).clone()

    wide = widened(network.dtype, x.dtype)
    with _module_stack(model) as stack, listening(model, module), wide, _Kernels(stack, function):
        output = run(model, x.clone(memory_format=torch.contiguous_format), network.entrance)
    _check_called(kept, wanted)
    if OUTPUT in names and network.until:
        kept.outputs[OUTPUT] = kept.outputs[network.until]
    elif OUTPUT in names:
        kept.outputs[OUTPUT] = pick(output, network.output)
    return kept


def _check_called(kept: Recorded, layers: Sequence[Layer]) -> None:
    """Check that the model called all layers, as it did when it was traced.

    Raises:
        RuntimeError: If a layer was not called, or did not call its kernel.
    """
    heard = [layer for layer in layers if (layer.module or layer.call) is not None]
    names = [layer.name for layer in heard if layer.name not in kept.outputs]
    with_kernel = [layer for layer in layers if layer.call is not None]
    names += [layer.name for layer in with_kernel if layer.name not in kept.inputs]
    if names:
        missing = ", ".join(dict.fromkeys(names))
        msg = (
            "The model must call each layer as when it was traced. "
            f"Got no call of {missing}: trace it again."
        )
        raise RuntimeError(msg)


def _replacement(
    network: Network, dtype: torch.dtype, tensors: Mapping[str, Tensor] | None
) -> Callable[[Tensor], Tensor] | None:
    """A function that gives the tensor to use for each of the model's; ``None`` to keep all."""
    if tensors is not None:
        named = [*network.model.named_parameters(), *network.model.named_buffers()]
        new = {id(own): tensors[name] for name, own in named}
        return lambda own: new.get(id(own), own)
    return None if dtype == network.dtype else partial(cast, dtype=dtype)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the module calls that are running, the innermost one last."""
    stack: list[str] = [""]
    calls: dict[str, int] = {}
    handles = []

    def enter(path: str) -> Callable[..., Any]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls[path] = calls.get(path, -1) + 1
            stack.append(call_name(path, calls[path]))

        return before

    def leave(*_: object) -> None:
        stack.pop()

    try:
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(enter(path)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Kernels(TorchFunctionMode):
    """Calls ``hear(name, input, output)`` after every convolution and linear call.

    The name has the module that makes the call, the operation, and its number in the module's call.
    """

    def __init__(self, stack: list[str], hear: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.stack = stack
        self.hear = hear
        self.seen: dict[str, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        # an exported module calls ATen operations, which have another name
        name = getattr(func, "_opname", None) or getattr(func, "__name__", "")
        if name == "convolution":
            name = convolution_name(args[1], args[6])
        if name in FUNCTIONS:
            inside = f"{self.stack[-1]}/{name}"
            self.seen[inside] = self.seen.get(inside, -1) + 1
            self.hear(f"{inside}:{self.seen[inside]}", args[0] if args else kwargs["input"], output)
        return output
