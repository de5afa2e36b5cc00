"""Memory of large results: zeros that cost nothing until they are written."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the longest vector of a processor


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that are not written: on the CPU the system gives each page when it is first used.

    NumPy also asks for huge pages. Measured for 210 MB, to take the memory and write it once:
    28 ms; with :func:`torch.zeros` 110 ms, and with :func:`torch.empty` 100 ms.

    Args:
        shape: Shape of the tensor.
        dtype: Its dtype.
        device: Its device.

    Example:
        >>> lazy_zeros((2, 3), torch.float64, torch.device("cpu")).sum()
        tensor(0., dtype=torch.float64)
    """
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    # NumPy has no bfloat16, so these are bytes
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(tuple(shape))
