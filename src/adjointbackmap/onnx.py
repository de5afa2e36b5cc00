"""Networks in ONNX files become modules of PyTorch, with onnx2torch.

A file is converted as it is. Its version of the operations is raised only where onnx2torch has no
converter for one of them, because raising can change a network.
"""

import importlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.files.checked import shortened

EXTRA = "pip install 'adjointbackmap[onnx]'"
# Versions of the operations to try where a converter is missing: 13 is the last that onnx2torch
# knows all of, but not every file can be raised so far.
RAISED = (13, 9)
SAME = 1e-4  # largest difference that is rounding in float32, relative to the largest output


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
    module, raised = _converted(onnx, file, path)
    x = torch.rand(1, *in_shape, generator=torch.Generator().manual_seed(0))
    if raised is not None:
        _check_raised(file, module, x, path)
    with suppress(ValueError):  # the file without its batch of one may be no network
        free, _ = _converted(onnx, _with_free_batch(onnx, file), path)
        module = free if _is_same(free, module, x) else module
    return OnnxFile(module, in_shape, opset, raised)


def _library(name: str) -> Any:
    """A library that is imported when it is used.

    Raises:
        ImportError: If it is missing, or what it needs cannot be imported.
    """
    mend_torchvision()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        msg = f"ONNX files need onnx and onnx2torch. Got {shortened(error)}: {EXTRA}."
        raise ImportError(msg) from error


def mend_torchvision() -> None:
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


def _is_same(free: nn.Module, module: nn.Module, x: Tensor) -> bool:
    """Whether a module gives for two images together what another gives for each alone."""
    images = torch.cat([x, 1 - x])
    try:
        with torch.no_grad():
            apart = torch.cat([module(image[None]) for image in images])
            together = free(images)
    except (RuntimeError, ValueError, IndexError):
        return False
    return together.shape == apart.shape and _is_close(together, apart)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by rounding in float32 alone."""
    most = SAME * float(expected.abs().max())
    return float((found - expected).abs().max()) <= most


def _check_raised(file: Any, module: nn.Module, x: Tensor, path: Path) -> None:
    """Compare a module of a raised version with what ONNX computes from the file itself.

    Raises:
        ValueError: If the outputs differ.
    """
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(file)
    constants = {each.name for each in file.graph.initializer}
    entry = next(name for name in evaluator.input_names if name not in constants)
    expected = torch.from_numpy(evaluator.run(None, {entry: x.numpy()})[0])
    with torch.no_grad():
        found = module(x)
    if found.numel() != expected.numel() or not _is_close(found.flatten(), expected.flatten()):
        msg = (
            f"{path} must be the same network with a newer opset. "
            "Got other outputs: export it again with opset 13."
        )
        raise ValueError(msg)


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
    except NotImplementedError as error:  # an operation has no converter in this version
        first = error
    except Exception as error:  # whatever a converter raises on a network that it cannot take
        msg = f"{path} must be a network that onnx2torch can convert. Got {shortened(error)}."
        raise ValueError(msg) from error
    changer = importlib.import_module("onnx.version_converter")
    for version in RAISED:
        # RuntimeError: the changer's own ConvertError is one
        with suppress(NotImplementedError, RuntimeError):
            return convert(changer.convert_version(file, version)), version
    msg = (
        f"Every operation of {path} must have a converter in onnx2torch. "
        f"Got {shortened(first)}: export it with another opset, or as a module of PyTorch."
    )
    raise ValueError(msg) from first
