"""Weights in files. No code in a file is run, and damaged or foreign files are refused."""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.files.checked import DamagedFile, check_file, shortened

# The checksum after the ZIP file that torch.save writes. Readers of ZIP files allow bytes after the
# end of the archive.
TRAILER = re.compile(rb"\nsha256 ([0-9a-f]{64})\n\Z")
TRAILER_BYTES = 73  # 1 for each of the line breaks, 7 for "sha256 ", 64 for the checksum


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Name -> tensor, from a file of weights.

    No code in the file is run: it is a safetensors file, or ``torch.load`` reads it with
    ``weights_only``. If its card ``NAME.json`` or a list ``SHA256SUMS`` in the same folder has a
    checksum of the file, the two are compared.

    Args:
        path: File ``.safetensors``, or one that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFile: If it is damaged.
        ValueError: If it does not hold tensors with names.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"Weights must be in a file. Got {path}, which is none."
        raise FileNotFoundError(msg)
    check_file(path)
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not _are_weights(found):
        got = f"a dict with {_some(found)}" if isinstance(found, dict) else type(found).__name__
        msg = f"{path} must hold tensors by name. Got {got}: save model.state_dict() alone."
        raise ValueError(msg)
    return found


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path | str) -> None:
    """Put weights into a model.

    Args:
        model: A module.
        weights: Name -> tensor.
        path: The file of the weights, for the message.

    Raises:
        ValueError: If they are those of another model.
    """
    try:
        model.load_state_dict(weights)
    # a model whose class loads in its own way may raise the last three
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        msg = (
            f"{path} must have the weights of {type(model).__name__}. "
            f"Got others: {shortened(error, 300)}"
        )
        raise ValueError(msg) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, from a safetensors file.

    Raises:
        DamagedFile: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        msg = (
            f"{path} must be a safetensors file. "
            f"It could not be read ({shortened(error)}): fetch or write it again."
        )
        raise DamagedFile(msg) from error


def read_torch(path: Path) -> Any:
    """The content of a file of ``torch.save``: tensors, numbers, text and containers of these.

    Its checksums are compared.

    Raises:
        DamagedFile: If it is damaged, or a pickle of other objects.
    """
    content = path.read_bytes()
    sealed = TRAILER.search(content[-TRAILER_BYTES:])
    if sealed and hashlib.sha256(content[:-TRAILER_BYTES]).hexdigest().encode() != sealed[1]:
        msg = (
            f"{path} must match the checksum at its end. "
            "Got a damaged file: fetch or write it again."
        )
        raise DamagedFile(msg)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            _compare_checksums(content)
        with warnings.catch_warnings(action="ignore"):  # a damaged pickle causes many of them
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        if isinstance(error, pickle.UnpicklingError):
            msg = (
                f"{path} must hold tensors. "
                "Got a damaged file, or a pickle of other objects, which is not loaded: "
                "save model.state_dict() alone, or fetch the file again."
            )
            raise DamagedFile(msg) from error
        reason = shortened(error) or type(error).__name__
        msg = (
            f"{path} must be what torch.save wrote. "
            f"It could not be read ({reason}): fetch or write it again."
        )
        raise DamagedFile(msg) from error


def torch_bytes(content: Any) -> bytes:
    """The bytes that ``torch.save`` writes, with a checksum at the end.

    ``torch.load`` itself compares no checksum.
    """
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue() + b"\nsha256 %s\n" % hashlib.sha256(file.getvalue()).hexdigest().encode()


def _compare_checksums(content: bytes) -> None:
    """Compare the members of a ZIP file with their checksums, which ``torch.load`` does not.

    Raises:
        ValueError: If one does not match.
    """
    bad = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if bad is not None:
        msg = f"bad checksum of {bad}"
        raise ValueError(msg)


def _are_weights(found: Any) -> bool:
    """Whether the content of a file is a dict with names as keys and at least one tensor."""
    if not isinstance(found, dict):
        return False
    named = all(isinstance(key, str) for key in found)
    return named and any(isinstance(value, Tensor) for value in found.values())


def _some(found: dict[Any, Any]) -> str:
    """The first keys, for a message."""
    return shortened(", ".join(map(str, found)) or "nothing", 60)
