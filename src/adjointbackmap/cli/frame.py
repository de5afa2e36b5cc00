"""The command line's frame: the application, its terminal, progress bars and threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from adjointbackmap.sources import NetworkOptions

app = App(
    name="adjointbackmap",
    help="Exact effective hyperplanes of any unit of any layer of a piecewise-affine network.",
    error_console=Console(stderr=True, soft_wrap=True),
    suppress_keyboard_interrupt=False,  # main catches it and says that finished work is kept
    error_formatter=lambda error: Text(f"adjointbackmap: {' '.join(str(error).split())}"),
)
study_commands = App(
    name="study",
    help="Repeat the experiments of the dissertation and compare them with its published numbers.",
)
app.command(study_commands)
console = Console()
STUDY_SCALE = 1 / 8  # the factor k of the pattern in the study
NO_NETWORK = NetworkOptions()
NOT_KEPT = "stopped; add --keep FILE to continue where a run was stopped"


def use_threads(threads: int | None) -> None:
    """Set the number of processor threads; ``None`` keeps torch's own.

    Raises:
        ValueError: If it is less than 1.
    """
    if threads is None:
        return
    if threads < 1:
        msg = f"--threads must be at least 1. Got {threads}."
        raise ValueError(msg)
    import torch

    torch.set_num_threads(threads)


@contextmanager
def progress(description: str) -> Iterator[tuple[Progress, Any]]:
    """A progress bar and its task, whose ``completed`` goes from 0 to 1."""
    with Progress(console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=1.0)
