"""What the untouched model computes: inputs and outputs of its layers, from one forward pass of the module itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adjointbackmap.arithmetic import exact
from adjointbackmap.capture import call_name, listening, pick
from adjointbackmap.casting import in_dtype
from adjointbackmap.network import OUTPUT, Layer, Network

FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
IMAGES_AT_ONCE = 64  # in one call of the model


@dataclass(frozen=True)
class Recorded:
    """Inputs of the layers' convolution or linear calls, and the layers' outputs, by name, each ``(N, ...)``."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def record(network: Network, images: Tensor, layers: Sequence[Layer]) -> Recorded:
    """Run the untouched model and keep what goes into and comes out of layers.

    Nothing of the trace is used but the layers' names: a change of the model's forward shows here. Whether the model is
    as it was traced is for the caller to check, once for a call.

    Args:
        network: Traced network.
        images: Batch ``(N, *in_shape)`` in the dtype of the pass.
        layers: Layers to keep.

    Returns:
        What was recorded.
    """
    with exact(images.device):
        found = [record_call(network, part, layers) for part in images.split(IMAGES_AT_ONCE)]
    if len(found) == 1:
        return found[0]
    inputs = {name: torch.cat([f.inputs[name] for f in found]) for name in found[0].inputs}
    outputs = {name: torch.cat([f.outputs[name] for f in found]) for name in found[0].outputs}
    return Recorded(inputs, outputs)


def record_call(network: Network, x: Tensor, layers: Sequence[Layer], call: Callable[[Tensor], Any] | None = None) -> Recorded:
    """One call of the model, see :func:`record`.

    For a dtype other than the model's, the same module runs with its parameters cast for the call.

    Args:
        network: Traced network.
        x: Batch ``(N, *in_shape)`` in the dtype of the pass.
        layers: Layers to keep.
        call: How the module is called, where not plainly: to differentiate by its parameters.

    Returns:
        What was recorded.
    """
    call = call or partial(_call, network)
    recorded = _recorded(network, x, layers, call)
    if len(x) == 1 and any(recorded.outputs[layer.name].shape != (1, *layer.out_shape) for layer in layers):
        # a forward that squeezes has dropped the batch of one: two copies of the image keep theirs
        twice = _recorded(network, x.expand(2, *x.shape[1:]), layers, call)
        return Recorded(*({name: t[:1] for name, t in kept.items()} for kept in (twice.inputs, twice.outputs)))
    return recorded


def _recorded(network: Network, x: Tensor, layers: Sequence[Layer], call: Callable[[Tensor], Any]) -> Recorded:
    """What one call of the module gives."""
    kept = Recorded({}, {})
    names = {layer.name for layer in layers}
    wanted = [*layers, network.layers[network.until]] if network.until else layers
    calls = {layer.call: layer for layer in wanted if layer.call is not None}
    heard = {layer.module: layer.name for layer in wanted if layer.module is not None}

    def function(call: str, x: Tensor, output: Tensor) -> None:
        if call in calls:
            kept.inputs[calls[call].name] = x.clone()  # a later operation in place does not reach it
            if calls[call].module is None:
                kept.outputs[calls[call].name] = output.clone()

    def module(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if name in heard and isinstance(output, Tensor):
            kept.outputs[heard[name]] = output.clone()

    with _module_stack(network.model) as stack, listening(network.model, module), _Kernels(stack, function):
        output = call(x.clone(memory_format=torch.contiguous_format))  # it may write into it
    if OUTPUT in names:
        kept.outputs[OUTPUT] = kept.outputs[network.until] if network.until else pick(output, network.output)
    return kept


def _call(network: Network, x: Tensor) -> Any:
    """The untouched model; in another dtype than its own, with all its tensors cast."""
    if x.dtype == network.dtype:
        return network.model(x)
    with in_dtype(network.model, x.dtype):
        return network.model(x)


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """Call a module with other parameters and buffers, given by the first name of each.

    ``functional_call`` is given every tensor of every module once: it leaves a module changed that it meets under two names.
    """
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    swapped = {}
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        swapped.update({".".join(filter(None, (path, n))): tensors[names[id(t)]] for n, t in own.items() if t is not None})
    return torch.func.functional_call(model, swapped, (x,), tie_weights=False)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the module calls that are running, innermost last."""
    stack: list[str] = [""]
    calls: dict[str, int] = {}
    handles = []

    def enter(path: str) -> Callable:
        def before(module: nn.Module, inputs: tuple) -> None:
            calls[path] = calls.get(path, -1) + 1
            stack.append(call_name(path, calls[path]))

        return before

    try:
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(enter(path)))
                handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Kernels(TorchFunctionMode):
    """Sees every convolution and linear call, functional ones too, with the module that makes it."""

    def __init__(self, stack: list[str], hear: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.stack, self.hear = stack, hear
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS:
            inside = f"{self.stack[-1]}/{name}"
            self.seen[inside] = self.seen.get(inside, -1) + 1
            self.hear(f"{inside}:{self.seen[inside]}", args[0] if args else kwargs["input"], output)
        return output
