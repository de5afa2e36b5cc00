"""Models that are no ordinary PyTorch modules in eval mode: what is wrong with each, and what to pass instead."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

QUANTISED = (
    ".quantized",
    "quantization.observer",
    "quantization.fake_quantize",
)  # parts of the names of PyTorch's packages
EXPORTED = "torch.export"


def check_kind(model: object) -> None:
    """Raise if a model is nothing whose forward can be followed.

    Raises:
        TypeError: If it is no module, one whose code was compiled, or one with a sparse parameter or buffer.
        ValueError: If it is quantised, spread over several devices, or its parameters are not ready.
    """
    if isinstance(model, torch.export.ExportedProgram):
        msg = "The model must be a torch.nn.Module. Got ExportedProgram: pass program.module()."
        raise TypeError(msg)
    if not isinstance(model, nn.Module):
        msg = f"The model must be a torch.nn.Module. Got {type(model).__name__}: wrap it in one."
        raise TypeError(msg)
    compiled = [
        type(m).__name__
        for m in model.modules()
        if isinstance(m, torch.jit.ScriptModule) or hasattr(m, "_orig_mod")
    ]
    if compiled:
        msg = f"The model must be Python modules. Got {compiled[0]}, which is compiled: pass the module that it was made of."
        raise TypeError(msg)
    for path, module in model.named_modules():
        found = _obstacle(module)
        if found:
            what, advice = found
            msg = f"The model must be of ordinary modules. Got {what} at {path or 'the model itself'}: {advice}."
            raise ValueError(msg)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sparse = [
        f"{name} ({str(t.layout).removeprefix('torch.')})"
        for name, t in tensors
        if t.layout != torch.strided
    ]
    if sparse:
        msg = f"Parameters and buffers must be dense. Got {', '.join(sparse[:3])}: register them with .to_dense()."
        raise TypeError(msg)


def _obstacle(module: nn.Module) -> tuple[str, str] | None:
    """What a module is that cannot be followed, and what to do."""
    kind = type(module)
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if any(part in kind.__module__ for part in QUANTISED):
        return f"the quantised {kind.__name__}", "pass the model as it was before quantisation"
    if any(isinstance(tensor, UninitializedParameter) for tensor in own):
        return (
            f"{kind.__name__}, whose parameters have no shape yet",
            "run the model on a batch once",
        )
    if any(tensor.is_inference() for tensor in own):
        return (
            f"{kind.__name__} with tensors of inference mode",
            "make or load the model outside of torch.inference_mode()",
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            f"DataParallel on {len(module.device_ids)} devices",
            "pass the module inside, model.module",
        )
    return None


def is_exported(module: nn.Module) -> bool:
    """Whether ``torch.export`` made a module: then its mode is fixed, and ``eval()`` may not even be called."""
    return any(kind.__module__.startswith(EXPORTED) for kind in type(module).__mro__)


def in_train_mode(model: nn.Module) -> list[str]:
    """Paths of the modules in train mode; of an exported model, only the modules that do something."""
    exported = is_exported(model)
    return [
        path or "the model itself"
        for path, module in model.named_modules()
        if module.training and not (exported and (is_exported(module) or type(module) is nn.Module))
    ]


def batch_of(example: Tensor) -> Tensor:
    """An example as a batch of at least two: ``torch.export`` would fix a batch of one.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is no batch of floating numbers.
    """
    if not isinstance(example, Tensor):
        msg = (
            f"The example must be a torch.Tensor. Got {type(example).__name__}: a network has one "
            "input; make that of a picture with adjointbackmap.image(x)."
        )
        raise TypeError(msg)
    if example.dim() < 2 or not example.is_floating_point() or not len(example):
        msg = f"The example must be a batch (N, ...) of floating numbers. Got {tuple(example.shape)} of {example.dtype}."
        raise ValueError(msg)
    return (
        example.detach()
        .expand(max(2, len(example)), *example.shape[1:])
        .clone(memory_format=torch.contiguous_format)
    )


def advice(model: nn.Module, example: Tensor) -> str:
    """What to pass instead of an example that a model does not take."""
    tensor = next(
        (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), example
    )
    likely: dict[str, Callable[[], Tensor]] = {
        "example[None]": lambda: example[None],
        "example.movedim(-1, 1)": lambda: example.movedim(-1, 1),
        "example.movedim(-1, 0)[None]": lambda: example.movedim(-1, 0)[None],
        f"example.to({tensor.dtype})": lambda: example.to(tensor.dtype),
        f"example.to({str(tensor.device)!r})": lambda: example.to(tensor.device),
    }
    for code, changed in likely.items():
        if takes(model, changed):
            return f"pass {code}"
    return "pass an example that it takes, or wrap the model in a module of one tensor"


def takes(model: nn.Module, example: Callable[[], Tensor]) -> bool:
    """Whether a model runs on a batch of two images of an example, and gives as many outputs."""
    try:
        batch = batch_of(example())
        with torch.no_grad():
            given = model(batch)
    except Exception:  # whatever a model raises, it does not take it
        return False
    return not isinstance(given, Tensor) or given.shape[:1] == batch.shape[:1]
