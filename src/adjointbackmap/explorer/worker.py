"""One thread that computes; work that nobody waits for any more is dropped."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """One thread that computes one answer after the other.

    Example:
        >>> worker = Worker()
        >>> worker.submit("tab-1", lambda: 1 + 1).result()
        2
        >>> worker.close()
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "explorer")
        self._newest: dict[str, Future[object]] = {}
        self._lock = threading.Lock()

    def submit(self, channel: str, work: Callable[[], T]) -> "Future[T]":
        """Queue some work.

        Earlier work of the same channel is dropped if it has not begun: its answer would be late.

        Args:
            channel: Who asks, and for what: a tab and a panel.
            work: What to compute.
        """
        future = self._pool.submit(work)
        with self._lock:
            before = self._newest.get(channel)
            self._newest[channel] = future  # type: ignore[assignment]
        if before is not None:
            before.cancel()
        future.add_done_callback(lambda done: self._forget(channel, done))
        return future

    def close(self) -> None:
        """Drop what waits, and wait for what runs."""
        self._pool.shutdown(cancel_futures=True)

    def _forget(self, channel: str, done: "Future[T]") -> None:
        with self._lock:
            if self._newest.get(channel) is done:
                del self._newest[channel]
