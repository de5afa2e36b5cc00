"""Pieces of work in threads, each of which computes with one processor thread.

PyTorch divides each operation among its threads, and they wait for each other after each. If
another process takes one of the cores, all wait for the slowest one. Pieces of work that do not
wait for each other lose only what the other process takes. They also share out the copying, which
PyTorch does in one thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from adjointbackmap.capture.precision import exact

T = TypeVar("T")
R = TypeVar("R")

# Held while the number of threads of this thread and that of later threads differ.
_STARTING = threading.Lock()


def threads_for(device: torch.device, room: int | None, each: int) -> int:
    """Number of threads that compute batches at the same time.

    It is 1 on other devices than the CPU, and where the memory has room for one batch only.

    Args:
        device: The device.
        room: Bytes for all batches together; ``None`` without a bound.
        each: Bytes of one batch.
    """
    if device.type != "cpu":
        return 1
    most = torch.get_num_threads()
    return most if room is None else max(1, min(most, room // max(1, each)))


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results of some work on the CPU, in the order of the items.

    An item more than there are threads is taken at a time.

    Args:
        work: The work. It is called without gradients, in full precision.
        items: Its arguments.
        threads: Number of threads. With one, the caller's thread computes, and each operation has
            all of PyTorch's threads.

    Example:
        >>> list(in_threads(lambda n: n * n, range(4), threads=2))
        [0, 1, 4, 9]
    """
    if threads == 1:
        yield from map(work, items)
        return

    # memory that begins in inference mode can be written in inference mode only
    mode = torch.is_inference_mode_enabled()

    def computed(item: T) -> R:
        with torch.inference_mode(mode), exact(torch.device("cpu")):
            return work(item)

    with _single_threads(threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(computed, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Operations of the caller's thread have one processor thread, if the device is the CPU.

    A pass of one image is short. On a busy machine its many operations would wait for each other's
    threads longer than they compute.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    with _STARTING:
        torch.set_num_threads(1)
        _set_for_later_threads(before)
    try:
        yield
    finally:
        with _STARTING:
            torch.set_num_threads(before)


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose operations have one processor thread each."""
    with _STARTING:
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(count, "adjointbackmap", _take_one_thread)
        begun = threading.Barrier(count + 1)
        for _ in range(count):
            pool.submit(begun.wait)
        begun.wait()
        torch.set_num_threads(before)
    return pool


def _take_one_thread() -> None:
    # The first question in a thread sets the number of later threads in it, so it comes before.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _set_for_later_threads(number: int) -> None:
    """Set the number of threads that is valid for threads that begin later.

    PyTorch's number is a setting of each thread. Setting it in one thread also sets the number with
    which later threads begin.
    """
    other = threading.Thread(target=torch.set_num_threads, args=(number,))
    other.start()
    other.join()
