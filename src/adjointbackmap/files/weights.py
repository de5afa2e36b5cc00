"""Weights in files: read without running anything, and damaged or foreign ones refused in one sentence."""

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

TRAILER = re.compile(
    rb"\nsha256 ([0-9a-f]{64})\n\Z"
)  # after the ZIP file, which its readers find from the end
TRAILER_BYTES = 73


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Weights by name, from safetensors or from what ``torch.load`` reads with ``weights_only``; nothing in the file is run.

    A file that its card ``NAME.json`` or a list ``SHA256SUMS`` beside it knows is compared with its checksum.

    Args:
        path: File ``.safetensors``, or one that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFile: If it is damaged.
        ValueError: If it holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"Weights must be in a file. Got {path}, which is none."
        raise FileNotFoundError(msg)
    check_file(path)
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if (
        not isinstance(found, dict)
        or not all(map(_is_name, found))
        or not any(isinstance(v, Tensor) for v in found.values())
    ):
        got = f"a dict with {_some(found)}" if isinstance(found, dict) else type(found).__name__
        msg = f"{path} must hold tensors by name. Got {got}: save model.state_dict() alone."
        raise ValueError(msg)
    return found


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path | str) -> None:
    """Put weights into a model.

    Args:
        model: A module.
        weights: Tensor by name.
        path: Where they are from, for the message.

    Raises:
        ValueError: If they are those of another model.
    """
    try:
        model.load_state_dict(weights)
    except (
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # the last three are those of a model's own loading
        msg = f"{path} must have the weights of {type(model).__name__}. Got others: {shortened(error, 300)}"
        raise ValueError(msg) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds.

    Raises:
        DamagedFile: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        msg = f"{path} must be a safetensors file. It could not be read ({shortened(error)}): fetch or write it again."
        raise DamagedFile(msg) from error


def read_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds, where that is tensors, numbers, text and containers; its checksums are compared.

    Raises:
        DamagedFile: If it is damaged, or a pickle of other objects.
    """
    content = path.read_bytes()
    sealed = TRAILER.search(content[-TRAILER_BYTES:])
    if sealed and hashlib.sha256(content[:-TRAILER_BYTES]).hexdigest().encode() != sealed[1]:
        msg = f"{path} must match the checksum at its end. Got a damaged file: fetch or write it again."
        raise DamagedFile(msg)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            _compare_checksums(content)
        with warnings.catch_warnings(action="ignore"):  # of what a damaged pickle looks like
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        if isinstance(error, pickle.UnpicklingError):
            msg = (
                f"{path} must hold tensors. Got a damaged file, or a pickle of other objects, which is not loaded: save "
                "model.state_dict() alone, or fetch the file again."
            )
            raise DamagedFile(msg) from error
        reason = shortened(error) or type(error).__name__
        msg = f"{path} must be what torch.save wrote. It could not be read ({reason}): fetch or write it again."
        raise DamagedFile(msg) from error


def torch_bytes(content: Any) -> bytes:
    """What ``torch.save`` writes, and a checksum after it: ``torch.load`` itself compares none."""
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


def _is_name(key: Any) -> bool:
    return isinstance(key, str)


def _some(found: dict[Any, Any]) -> str:
    """The first keys."""
    return shortened(", ".join(map(str, found)) or "nothing", 60)
