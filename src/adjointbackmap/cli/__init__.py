"""The command line.

Each command is a function. It imports torch only when it runs, so that ``--help`` is fast.
"""

import signal
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from adjointbackmap.cli import (
    attack,
    bench,
    checking,
    explore,
    looking,
    networks,
    regions,
    study,
    study_calm,
    study_line,
    text,
)
from adjointbackmap.cli.frame import app, console
from adjointbackmap.files.checked import DamagedFileWarning
from adjointbackmap.files.stopping import Stopped, stoppable

_with_place = warnings.formatwarning
__all__ = [
    "app",
    "attack",
    "bench",
    "checking",
    "console",
    "explore",
    "looking",
    "main",
    "networks",
    "regions",
    "study",
    "study_calm",
    "study_line",
    "text",
]


def main() -> None:
    """Run the command line.

    Bad input gives one line and exit status 2. Ctrl-C and SIGTERM keep finished work.
    """
    warnings.formatwarning = _one_line
    try:
        with stoppable():
            app()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        # a Text, for the brackets of adjointbackmap[cluster] are no markup
        line = Text.assemble(("adjointbackmap:", "bold red"), f" {error}")
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        Console(stderr=True).print(str(stop) or "stopped; finished work is kept")
        # shells expect 128 + the number of the signal
        sys.exit(128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT))


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """A warning of this package as one line; other warnings as Python shows them."""
    if issubclass(category, DamagedFileWarning):
        return f"adjointbackmap: {message}\n"
    return _with_place(message, category, *place, **more)
