"""What all threads of the process share: the lock of captures, and a quiet time for one thread alone."""

import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

CAPTURING = threading.RLock()
"""Held during a capture: ``torch.export`` changes what all threads share, and is for one thread at a time."""

IGNORED = (
    (FutureWarning, ""),  # torch's own, about its own code
    (
        UserWarning,
        "The tensor attribute",
    ),  # set by a forward: here it is set on a copy of the model
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what this thread writes to the error stream, and what torch logs and warns of in it.

    Nothing is put back as it was found: another thread may have set it meanwhile. Only what was added is
    taken away again.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet_stream())
        stack.enter_context(_quiet_loggers())
        for ignored in IGNORED:
            stack.enter_context(_ignoring(*ignored))
        yield


class _OtherThreads:
    """A stream that leaves out what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.thread: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _quiet_stream() -> Iterator[None]:
    before = sys.stderr
    ours = _OtherThreads(sys.stderr)
    sys.stderr = ours
    try:
        yield
    finally:
        ours.thread = None  # another thread may hold it, and put it back later
        if sys.stderr is ours:
            sys.stderr = before


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Torch has handlers of its own, which hold the stream that was there at their start."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    named = [
        logging.getLogger(name)
        for name in [*logging.root.manager.loggerDict]
        if name.partition(".")[0] == "torch"
    ]
    handlers = {handler for logger in (logging.root, *named) for handler in logger.handlers}
    for handler in handlers:
        handler.addFilter(of_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(of_others)


class _OfThisThread:
    """The message of a filter of warnings, which matches in one thread for a time: a copy of the filters may outlast it."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)
        self.thread: int | None = threading.get_ident()

    def match(self, text: str) -> bool:
        return threading.get_ident() == self.thread and self.pattern.match(text) is not None


@contextmanager
def _ignoring(category: type[Warning], pattern: str) -> Iterator[None]:
    message = _OfThisThread(pattern)
    filters: list[tuple[Any, ...]] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, ("ignore", message, category, None, 0))
    try:
        yield
    finally:
        message.thread = None
        filters = warnings.filters  # type: ignore[assignment]
        filters[:] = [entry for entry in filters if entry[1] is not message]
