"""The command line's frame: the application, its terminal, progress bars and threads."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from adjointbackmap.cli.lines import LinesOfProgress
from adjointbackmap.sources import NetworkOptions

app = App(
    name="adjointbackmap",
    help="Exact effective hyperplanes of any unit of any layer of a piecewise-affine network.",
    error_console=Console(stderr=True, soft_wrap=True),
    default_parameter=Parameter(negative_iterable=()),  # no --empty-layer beside --layer
    suppress_keyboard_interrupt=False,  # main catches it and says that finished work is kept
    error_formatter=lambda error: Text(f"adjointbackmap: {' '.join(str(error).split())}"),
)
study_commands = App(
    name="study",
    help="Repeat the experiments of the dissertation and compare them with its published numbers.",
)
app.command(study_commands)
app.register_install_completion_command()  # --install-completion, for bash, zsh and fish
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


def check_device(device: str) -> None:
    """Raise if there is no such device.

    Raises:
        ValueError: If PyTorch cannot use a GPU.
    """
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        msg = (
            "--device cuda needs a GPU that PyTorch can use. "
            f"Got PyTorch {torch.__version__} without one: leave --device out."
        )
        raise ValueError(msg)


def check_extra(what: str, extra: str, **libraries: str) -> None:
    """Raise before any work if a library of an extra is missing.

    Args:
        what: What needs it.
        extra: Name of the extra.
        libraries: Module -> name of the package.

    Raises:
        ImportError: If one is missing; the message has the command that installs it.
    """
    missing = [name for module, name in libraries.items() if not _is_installed(module)]
    if missing:
        msg = (
            f"{what} needs {', '.join(missing)}. Got an installation without: "
            f"pip install 'adjointbackmap[{extra}]'."
        )
        raise ImportError(msg)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def help_examples(*lines: str) -> str:
    """Command lines that ``--help`` shows below the options."""
    return "\n".join(["Examples:", "", "```bash", *lines, "```"])


@contextmanager
def progress(description: str) -> Iterator[tuple[Any, Any]]:
    """A progress bar and its task, whose ``completed`` goes from 0 to 1.

    Where the output is not a terminal, a line on standard error for each step.
    """
    if not console.is_terminal:
        lines = LinesOfProgress(description)
        yield lines, lines.job
        return
    with Progress(console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=1.0)
