"""Networks in ONNX files become modules of PyTorch, with onnx2torch.

A file is converted as it is. Its version of the operations is raised only where onnx2torch has no
converter for one of them, because raising can change a network.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adjointbackmap.files.checked import shortened

EXTRA = "pip install 'adjointbackmap[onnx]'"
# Versions of the operations to try where a converter is missing: 13 is the last that onnx2torch
# knows all of, but not every file can be raised so far.
RAISED = (13, 9)


@dataclass(frozen=True)
class OnnxFile:
    """A network of an ONNX file.

    Attributes:
        module: The network in eval mode, as onnx2torch gives it. It takes ``(N, *in_shape)``.
        in_shape: Shape of one input, without the batch.
        opset: Version of the operations in the file.
        raised: The version that it was raised to; ``None`` if it was converted as it is.
    """

    module: nn.Module
    in_shape: tuple[int, ...]
    opset: int
    raised: int | None


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Load a network from an ONNX file, for :func:`adjointbackmap.trace` or any other use.

    Args:
        path: The file, see :func:`read`.

    Returns:
        A module in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnx or onnx2torch is missing.
        ValueError: If it cannot be converted.

    Example:
        >>> load("missing.onnx")
        Traceback (most recent call last):
        FileNotFoundError: path must be an ONNX file. Got missing.onnx, which is none.
    """
    return read(path).module


def read(path: str | os.PathLike[str]) -> OnnxFile:
    """Read a network from an ONNX file, with the shape of its input.

    A batch that the file fixes at one image is made free, where the network allows it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnx or onnx2torch is missing.
        ValueError: If the file is no network in ONNX, has several inputs or an open size, or has an
            operation without a converter.

    Example:
        >>> read("missing.onnx")
        Traceback (most recent call last):
        FileNotFoundError: path must be an ONNX file. Got missing.onnx, which is none.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"path must be an ONNX file. Got {path}, which is none."
        raise FileNotFoundError(msg)
    onnx = _library("onnx")
    try:
        file = onnx.load(path)
        onnx.checker.check_model(file)
    except Exception as error:  # protobuf, ONNX's checker and missing data files raise various ones
        msg = (
            f"{path} must be a network in ONNX. "
            f"It could not be read ({shortened(error)}): export it again."
        )
        raise ValueError(msg) from error
    in_shape = _input_shape(file, path)
    opset = max(each.version for each in file.opset_import if each.domain in ("", "ai.onnx"))
    module, raised = _converted(onnx, _with_free_batch(onnx, file), path)
    if not _batch_is_free(module, in_shape):
        module, raised = _converted(onnx, file, path)
    return OnnxFile(module, in_shape, opset, raised)


def _library(name: str) -> Any:
    """A library that is imported when it is used.

    Raises:
        ImportError: If it is missing, or what it needs cannot be imported.
    """
    _mend_torchvision()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        msg = f"ONNX files need onnx and onnx2torch. Got {shortened(error)}: {EXTRA}."
        raise ImportError(msg) from error


def _mend_torchvision() -> None:
    """Let a torchvision for CUDA be imported beside a torch for the CPU.

    onnx2torch imports it. Its two operators for boxes are not there, and are not needed: declaring
    them is enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
    except ImportError:
        return


def _input_shape(file: Any, path: Path) -> tuple[int, ...]:
    """The shape of one input, without the batch.

    Raises:
        ValueError: If there are several inputs, or one has an open size.
    """
    constants = {each.name for each in file.graph.initializer}  # old files list them as inputs
    inputs = [each for each in file.graph.input if each.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs)
        msg = f"{path} must be a network of one input. Got {len(inputs)}: {names or 'none'}."
        raise ValueError(msg)
    sizes = [each.dim_value for each in inputs[0].type.tensor_type.shape.dim][1:]
    if not sizes or min(sizes) < 1:
        msg = (
            f"{path} must fix the size of its input, all but the batch. "
            f"Got {tuple(sizes)}, where 0 is open: export it with a fixed size."
        )
        raise ValueError(msg)
    return tuple(sizes)


def _with_free_batch(onnx: Any, file: Any) -> Any:
    """A copy in which a reshape to a batch of one keeps the batch that comes.

    In ONNX a size of 0 copies the input's.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(file)
    targets = {node.input[1] for node in copy.graph.node if node.op_type == "Reshape"}
    constants = [node for node in copy.graph.node if node.op_type == "Constant"]
    places = [each for each in copy.graph.initializer if each.name in targets]
    places += [node.attribute[0].t for node in constants if node.output[0] in targets]
    for place in places:
        shape = onnx.numpy_helper.to_array(place).copy()
        if len(shape) > 1 and shape[0] == 1:
            shape[0] = 0
            place.CopyFrom(onnx.numpy_helper.from_array(shape, place.name))
    return copy


def _batch_is_free(model: nn.Module, in_shape: tuple[int, ...]) -> bool:
    """Whether two images together give what each gives alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *in_shape, generator=generator)
    try:
        with torch.no_grad():
            together = model(x)
            apart = torch.cat([model(image[None]) for image in x])
    except (RuntimeError, ValueError, IndexError):
        return False
    return together.shape == apart.shape and torch.allclose(together, apart, 1e-3, 1e-4)


def _converted(onnx: Any, file: Any, path: Path) -> tuple[nn.Module, int | None]:
    """The module, and the version that the file was raised to.

    Raises:
        ValueError: If an operation has no converter in any of the versions.
    """
    converter = _library("onnx2torch")

    def convert(file: Any) -> nn.Module:
        module: nn.Module = converter.convert(file)
        return module.eval().requires_grad_(False)

    try:
        return convert(file), None
    except Exception as error:  # NotImplementedError, or whatever a converter raises
        first = error
    changer = importlib.import_module("onnx.version_converter")
    for version in RAISED:
        try:
            return convert(changer.convert_version(file, version)), version
        except Exception:  # the next version, or the first error below
            continue
    msg = (
        f"Every operation of {path} must have a converter in onnx2torch. "
        f"Got {shortened(first)}: export it with another opset, or as a module of PyTorch."
    )
    raise ValueError(msg) from first
