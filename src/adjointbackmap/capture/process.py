"""What all threads share: the lock of captures, and error streams that are quiet for one thread."""

import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

CAPTURING = threading.RLock()
"""Held during a capture: ``torch.export`` changes global state, so only one thread may run it."""

IGNORED = (
    # PyTorch warns about its own code
    (FutureWarning, ""),
    # and about attributes that a forward sets; here they are set on a copy of the model
    (UserWarning, "The tensor attribute"),
)
"""Warnings that are left out during a capture: category, and how the message begins."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what this thread writes to the error stream, and PyTorch's logs and warnings in it.

    At the end only our own additions are removed. Nothing is restored to an earlier state, because
    another thread may have changed it in the meantime.
    """
    with ExitStack() as stack:
        stack.enter_context(_quiet_stream())
        stack.enter_context(_quiet_loggers())
        for ignored in IGNORED:
            stack.enter_context(_ignoring(*ignored))
        yield


class _OtherThreads:
    """A stream that drops what one thread writes."""

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
        ours.thread = None  # another thread may have kept the stream, and install it again later
        if sys.stderr is ours:
            sys.stderr = before


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Filter PyTorch's log handlers, which keep the error stream that they were made with."""
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
    """A message pattern for a warnings filter that matches in one thread only.

    It stops matching when ``thread`` is set to ``None``. That is needed because another thread may
    have copied the list of filters and install it again later.
    """

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
