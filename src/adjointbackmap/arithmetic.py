"""The arithmetic that the engine computes in: no reduced precision, whatever the user has switched on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no TF32 or bfloat16 inside float32 products; everything is put back after."""
    precision = torch.get_float32_matmul_precision()
    backends = _precision_switches()
    before = [getattr(backend, name) for backend, name, _ in backends]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            torch.set_float32_matmul_precision("highest")
            for backend, name, value in backends:
                setattr(backend, name, value)
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for (backend, name, _), value in zip(backends, before, strict=True):
                setattr(backend, name, value)


def _precision_switches() -> list[tuple[object, str, object]]:
    """The convolutions' switches: ``fp32_precision`` where this torch has it, ``allow_tf32`` before."""
    convolutions = [getattr(backend, "conv", None) for backend in (torch.backends.cudnn, torch.backends.mkldnn)]
    if all(hasattr(c, "fp32_precision") for c in convolutions):
        return [(c, "fp32_precision", "ieee") for c in convolutions]
    return [(torch.backends.cudnn, "allow_tf32", False)]
