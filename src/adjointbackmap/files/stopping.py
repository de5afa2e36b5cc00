"""One way to stop a run: Ctrl-C, SIGTERM and a closed terminal all keep what is finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Signals that stop a run as Ctrl-C does. Windows has no SIGHUP, the signal of a closed terminal.
AS_CTRL_C = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C stopped the run.

    Attributes:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and a closed terminal raise :class:`Stopped` in the block.

    Ctrl-C raises KeyboardInterrupt in the same way. A signal that is ignored, as under nohup, or
    has a handler already stays as it is.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    chosen = [number for number in AS_CTRL_C if signal.getsignal(number) == signal.SIG_DFL]
    with _handlers(chosen, stop):
        yield


@contextmanager
def undivided() -> Iterator[None]:
    """Delay a signal that arrives in the block until its end; a second one takes effect at once."""
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if waiting:
            before[number](number, frame)
        waiting.append((number, frame))

    numbers = (signal.SIGINT, *AS_CTRL_C)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    with _handlers([number for number in numbers if callable(before[number])], wait):
        yield
    for number, frame in waiting[:1]:
        before[number](number, frame)


@contextmanager
def _handlers(numbers: list[int], handler: Any) -> Iterator[None]:
    """Handle signals during the block.

    Python allows handlers only in the main thread; in other threads nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
