"""A check that a model can be pickled, whose error names the part that cannot."""

import pickle
from typing import Any

from torch import nn

from adjointbackmap.capture.casting import plain_attributes


def check_pickled(model: nn.Module) -> None:
    """Check that the classes, attributes and hooks of a model can be pickled.

    Raises:
        TypeError: If one cannot; the message names the first.
    """
    for path, module in model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        parts: dict[str, Any] = {
            f"the class {type(module).__qualname__}": type(module),
            **{f"the attribute {name}": value for name, value in plain_attributes(module).items()},
            **{f"the hook {getattr(h, '__qualname__', h)}": h for h in hooks},
        }
        for what, part in parts.items():
            reason = _why_not(part)
            if reason:
                msg = (
                    "A model must be pickled with its network. "
                    f"Got {what} of {path or 'the model'} ({reason}): define it at the top of a "
                    "file, or save hyperplanes with adjointbackmap.save."
                )
                raise TypeError(msg)


def _why_not(part: Any) -> str:
    """Python's reason why something cannot be pickled; empty if it can."""
    try:
        pickle.dumps(part)
    except Exception as error:  # an object may raise anything
        return " ".join(str(error).split())
    return ""
