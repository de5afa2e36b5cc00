"""The arithmetic that the engine computes in: no reduced precision, whatever the user has switched on."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

Switch = tuple[object, str, object]
"""What has it, its name, and what it must be."""


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no TF32 or bfloat16 inside float32 products; everything is put back after.

    Gradients and autocast are the thread's own. Precision is the whole process's: it is full as long as
    any thread computes, and put back by the last.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        _PRECISION.enter()
        try:
            yield
        finally:
            _PRECISION.leave()


class _FullPrecision:
    """The switches of the process while threads compute: how many do, and what the user had set."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.torch_sets = 0
        self.before: list[
            tuple[object, str, object, object]
        ] = []  # what has the switch, its name, ours, the user's

    def enter(self) -> None:
        with self.lock:
            self.threads += 1
            found = self._set()  # what it is at the first thread, and what the user has set since
            self.before += [] if self.torch_sets else found

    def leave(self) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads:
                return
            still_ours = [entry for entry in self.before if getattr(entry[0], entry[1]) == entry[2]]
            for owner, name, _, users in still_ours:
                setattr(owner, name, users)
            self.before.clear()

    @contextmanager
    def while_torch_sets(self) -> Iterator[None]:
        with self.lock:
            self.torch_sets += 1
        try:
            yield
        finally:
            with self.lock:
                self.torch_sets -= 1
                self._set()

    def _set(self) -> list[tuple[object, str, object, object]]:
        """Set what is not as it must be; all are read first, for some are set with others."""
        now = [(owner, name, ours, getattr(owner, name)) for owner, name, ours in _switches()]
        other = [entry for entry in now if entry[3] not in (entry[2], UNREADABLE)]
        for owner, name, ours, _ in other:
            setattr(owner, name, ours)
        return other


@contextmanager
def while_torch_sets() -> Iterator[None]:
    """Inside of :func:`exact`: code of torch's that sets precision, as ``torch.export`` does, and puts it back to something else.

    What any thread finds set meanwhile is not the user's.
    """
    with _PRECISION.while_torch_sets():
        yield


class _OlderSwitches:
    """Switches that torch had before ``fp32_precision``, as attributes."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)

    @property
    def allow_tf32(self) -> object:
        try:
            return torch.backends.cudnn.allow_tf32
        except RuntimeError:  # torch refuses to read it where the user has set the newer ones
            return UNREADABLE

    @allow_tf32.setter
    def allow_tf32(self, value: bool) -> None:
        torch.backends.cudnn.allow_tf32 = value


UNREADABLE = "mixed"
_OLDER = _OlderSwitches()
_PRECISION = _FullPrecision()


def _switches() -> list[Switch]:
    """The older ones first, which set some of the newer.

    Recurrent cells go with convolutions, and ``allow_tf32`` with both: torch refuses to read it where they differ, in
    ``torch.export`` as well, which another thread may be in.
    """
    older: list[Switch] = [(_OLDER, "precision", "highest"), (_OLDER, "allow_tf32", False)]
    backends = (torch.backends.cudnn, torch.backends.mkldnn)
    operations = [getattr(backend, name, None) for backend in backends for name in ("conv", "rnn")]
    if all(hasattr(operation, "fp32_precision") for operation in operations):
        return older + [(operation, "fp32_precision", "ieee") for operation in operations]
    return older
