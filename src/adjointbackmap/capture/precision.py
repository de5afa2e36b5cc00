"""Full precision while the engine computes, whatever the user has switched on."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

Switch = tuple[object, str, object]
"""Object that has the switch, name of the attribute, value that the engine needs."""


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no TF32 or bfloat16 inside float32 products.

    The user's settings are restored at the end. Gradients and autocast are settings of the thread.
    Precision is a setting of the process: it is full as long as any thread computes, and the last
    one restores it.
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
    """The precision of the process while threads compute.

    Attributes:
        threads: Number of threads that compute.
        torch_sets: Number of threads in :meth:`while_torch_sets`.
        before: Switches to restore: object, name, our value, the user's value.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.torch_sets = 0
        self.before: list[tuple[object, str, object, object]] = []

    def enter(self) -> None:
        with self.lock:
            self.threads += 1
            # the user may set switches between the first thread and this one
            found = self._set()
            self.before += [] if self.torch_sets else found

    def leave(self) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads:
                return
            # a switch that the user has set in the meantime is left alone
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
        """Set all switches that have another value, and return them.

        All are read first, because setting one can set others.
        """
        now = [(owner, name, ours, getattr(owner, name)) for owner, name, ours in _switches()]
        other = [entry for entry in now if entry[3] not in (entry[2], UNREADABLE)]
        for owner, name, ours, _ in other:
            setattr(owner, name, ours)
        return other


@contextmanager
def while_torch_sets() -> Iterator[None]:
    """Inside of :func:`exact`, run code of PyTorch that sets precision, such as ``torch.export``.

    Such code restores other values than it found. So what a thread reads in the meantime is not
    taken for the user's setting.
    """
    with _PRECISION.while_torch_sets():
        yield


class _OlderSwitches:
    """Attributes for the switches that PyTorch had before ``fp32_precision``."""

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
        except RuntimeError:  # PyTorch refuses if the user has set the newer switches
            return UNREADABLE

    @allow_tf32.setter
    def allow_tf32(self, value: bool) -> None:
        torch.backends.cudnn.allow_tf32 = value


UNREADABLE = "mixed"  # in place of a value that PyTorch refuses to read
_OLDER = _OlderSwitches()
_PRECISION = _FullPrecision()


def _switches() -> list[Switch]:
    """All switches, the older ones first, because they set some of the newer ones.

    The switches of recurrent cells are set along with those of convolutions: ``allow_tf32`` belongs
    to both, and PyTorch refuses to read it if they differ. ``torch.export`` reads it, perhaps in
    another thread.
    """
    older: list[Switch] = [(_OLDER, "precision", "highest"), (_OLDER, "allow_tf32", False)]
    backends = (torch.backends.cudnn, torch.backends.mkldnn)
    operations = [getattr(backend, name, None) for backend in backends for name in ("conv", "rnn")]
    if all(hasattr(operation, "fp32_precision") for operation in operations):
        return older + [(operation, "fp32_precision", "ieee") for operation in operations]
    return older
