"""Time, memory and multiply-adds of a call."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHARE_OF_MEMORY = 0.8  # of the free memory; the rest is left to the system
SHORT = 0.3  # seconds of all runs together
Run = Callable[[], object]


def clock(run: Run) -> float:
    """Duration of a run in seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def kernel_says(file: str, field: str) -> int:
    """A field of a file in /proc, in bytes.

    An example is VmHWM of self/status, the peak of the resident set.

    Raises:
        OSError: If this system has no such field.
    """
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    msg = f"/proc/{file} must have a line {field}. Got none: this system does not tell."
    raise OSError(msg)


def growth(run: Run) -> float | None:
    """Growth of the resident set during a run in MiB, with the result.

    It is ``None`` if the system does not report it.
    """
    try:
        # Freed memory goes back to the system: the run could use it again, and nothing would grow.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = kernel_says("self/status", "VmRSS")
    except (OSError, AttributeError):
        run()
        return None
    run()
    return max(0, kernel_says("self/status", "VmHWM") - before) / 2**20


@contextmanager
def within_memory() -> Iterator[None]:
    """Limit the memory of a call.

    A call that wants more than most of the free memory raises an error. Without the limit, the
    system would kill the process.
    """
    import resource

    try:
        free = kernel_says("meminfo", "MemAvailable")
        limit = kernel_says("self/status", "VmSize") + int(SHARE_OF_MEMORY * free)
    except OSError:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    hard = before[1]  # negative if there is none
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def time_and_memory(run: Run, repeats: int) -> dict[str, Any]:
    """Median time of several runs, and the memory of one run before them.

    The run for the memory does not count for the time.
    """
    mib = growth(run)
    times = [clock(run) for _ in range(repeats)]
    # Short calls are noisy and cheap: they run more often.
    while repeats > 1 and sum(times) < SHORT and len(times) < 10 * repeats:
        times.append(clock(run))
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "runs": len(times),
        "mib": mib,
    }


def extrapolated(
    found: dict[str, Any], fixed: float, count: int, total: int, of: str
) -> dict[str, Any]:
    """The time of all units or columns, from that of some.

    The fixed part, such as the forward pass, is counted once.
    """
    if count == total:
        return found
    scaled = {
        key: fixed + max(0.0, found[key] - fixed) * total / count for key in ("seconds", "fastest")
    }
    return {**found, **scaled, "measured": f"{count} of {total:,} {of}"}


class Counter(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and matrix products.

    ``touching`` counts those that read a tangent's window.

    A convolution that pads its windows multiplies zeros at their edges. ``touching`` leaves these
    products out.
    """

    products = 0
    touching = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.convolution.default:
            given, weight, _, stride, *_, groups = args
            products = out.numel() * weight[0].numel()
            self.products += products
            touching = given.numel() * weight[:, 0].numel() // groups // prod(stride)
            self.touching += min(products, touching)
        elif func in (
            aten.mm.default,
            aten.mm.out,
            aten.bmm.default,
            aten.addmm.default,
            aten.baddbmm.default,
        ):
            matrix: Tensor = args[-2]
            self.products += out.numel() * matrix.shape[-1]
            self.touching += out.numel() * matrix.shape[-1]
        return out
