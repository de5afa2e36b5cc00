"""Checks of models and examples: what is wrong with each, and what to pass instead."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

# Parts of the names of PyTorch's packages with quantised modules.
QUANTISED = (".quantized", "quantization.observer", "quantization.fake_quantize")
# PyTorch's package with the classes of exported modules.
EXPORTED = "torch.export"


def check_kind(model: object) -> None:
    """Check that a model is one whose forward can be followed.

    Raises:
        TypeError: If it is no module, is compiled, or has a sparse parameter or buffer.
        ValueError: If it is quantised, spread over several devices, or has parameters without a
            shape.
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
        msg = (
            f"The model must be Python modules. Got {compiled[0]}, which is compiled: "
            "pass the module that it was made of."
        )
        raise TypeError(msg)
    for path, module in model.named_modules():
        found = _unfit(module)
        if found:
            what, remedy = found
            where = path or "the model itself"
            msg = f"The model must be of ordinary modules. Got {what} at {where}: {remedy}."
            raise ValueError(msg)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    without = [name for name, t in tensors if t.device.type == "meta"]
    if without:
        msg = (
            "Parameters and buffers must have values. "
            f"Got {without[0]} on the device meta: load it."
        )
        raise ValueError(msg)
    sparse = [
        f"{name} ({str(t.layout).removeprefix('torch.')})"
        for name, t in tensors
        if t.layout != torch.strided
    ]
    if sparse:
        listed = ", ".join(sparse[:3])
        msg = f"Parameters and buffers must be dense. Got {listed}: register them with .to_dense()."
        raise TypeError(msg)


def _unfit(module: nn.Module) -> tuple[str, str] | None:
    """Description of a module that cannot be followed, and what to do; ``None`` for others."""
    kind = type(module)
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if any(part in kind.__module__ for part in QUANTISED):
        return f"the quantised {kind.__name__}", "pass the model as it was before quantisation"
    if any(isinstance(tensor, UninitializedParameter) for tensor in own):
        what = f"{kind.__name__}, whose parameters have no shape yet"
        return what, "run the model on a batch once"
    if any(tensor.is_inference() for tensor in own):
        what = f"{kind.__name__} with tensors of inference mode"
        return what, "make or load the model outside of torch.inference_mode()"
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        what = f"DataParallel on {len(module.device_ids)} devices"
        return what, "pass the module inside, model.module"
    return None


def is_exported(module: nn.Module) -> bool:
    """Whether ``torch.export`` made a module.

    The mode of such a module is fixed: calling ``eval()`` raises.
    """
    return any(kind.__module__.startswith(EXPORTED) for kind in type(module).__mro__)


def in_train_mode(model: nn.Module) -> list[str]:
    """Paths of the modules in train mode.

    In an exported model, modules that only hold others are left out: their mode has no effect.
    """
    exported = is_exported(model)
    paths = []
    for path, module in model.named_modules():
        only_holds_others = exported and (is_exported(module) or type(module) is nn.Module)
        if module.training and not only_holds_others:
            paths.append(path or "the model itself")
    return paths


def batch_of(example: Tensor) -> Tensor:
    """An example as a batch of at least two images: ``torch.export`` would fix a batch of one.

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
        msg = (
            "The example must be a batch (N, ...) of floating numbers. "
            f"Got {tuple(example.shape)} of {example.dtype}."
        )
        if not example.is_floating_point():
            msg = f"{msg} For token numbers name their embedding with after=."
        raise ValueError(msg)
    repeated = example.detach().expand(max(2, len(example)), *example.shape[1:])
    return repeated.clone(memory_format=torch.contiguous_format)


def advice(model: nn.Module, example: Tensor) -> str:
    """What to pass instead of an example that a model does not take."""
    tensors = (*model.parameters(), *model.buffers())
    tensor = next((t for t in tensors if t.is_floating_point()), example)
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
    dtypes = {str(t.dtype): name for name, t in model.named_parameters() if t.is_floating_point()}
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} in {name}" for dtype, name in dtypes.items())
        return f"give all parameters one dtype, model.float(), for there are {found}"
    return "pass an example that it takes, or wrap the model in a module of one tensor"


def takes(model: nn.Module, example: Callable[[], Tensor]) -> bool:
    """Whether a model runs on an example as a batch, and gives one output per image."""
    try:
        batch = batch_of(example())
        with torch.no_grad():
            given = model(batch)
    except Exception:  # a model may raise anything
        return False
    return not isinstance(given, Tensor) or given.shape[:1] == batch.shape[:1]
