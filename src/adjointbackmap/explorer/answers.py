"""Answers of the explorer's server: a JSON head, followed by arrays of float32."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

ALIGNMENT = 4  # bytes; a Float32Array must begin at a multiple of it
LENGTH = 4  # bytes of the length of the head


def packed(head: Mapping[str, Any], arrays: Mapping[str, Tensor | np.ndarray]) -> bytes:
    """A head and arrays as bytes.

    The bytes are the length of the head in 4 bytes, the head in JSON, and the arrays in float32.
    All numbers are little-endian. The head gets ``arrays``, a list of names and shapes.

    Args:
        head: What JSON can hold.
        arrays: Name -> numbers.

    Example:
        >>> content = packed({"value": 2.5}, {"H": np.ones((1, 2))})
        >>> head, arrays = unpacked(content)
        >>> head["value"], arrays["H"].tolist()
        (2.5, [[1.0, 1.0]])
    """
    numbers = {name: _float32(array) for name, array in arrays.items()}
    listed = [{"name": name, "shape": a.shape} for name, a in numbers.items()]
    text = json.dumps({**head, "arrays": listed}).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    parts = [len(text).to_bytes(LENGTH, "little"), text]
    return b"".join([*parts, *(a.tobytes() for a in numbers.values())])


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The head and the arrays of :func:`packed`."""
    stop = LENGTH + int.from_bytes(content[:LENGTH], "little")
    head = json.loads(content[LENGTH:stop])
    arrays = {}
    for each in head.pop("arrays"):
        count = int(np.prod(each["shape"], dtype=int))
        found = np.frombuffer(content, "<f4", count, stop)
        arrays[each["name"]] = found.reshape(each["shape"])
        stop += found.nbytes
    return head, arrays


def _float32(array: Tensor | np.ndarray) -> np.ndarray:
    found = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    return np.ascontiguousarray(found, dtype="<f4")
