"""A notebook in JupyterLab, for the tests of the explorer's widget and for its picture."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import FrameLocator, Page

SECONDS = 30  # that JupyterLab gets to end
FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR",
)
# It asks no other server, neither for news nor for a newer version.
SILENT = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
OPTIONS = (
    "--no-browser",
    "--allow-root",
    "--ip=127.0.0.1",
    "--port=0",
    "--IdentityProvider.token=token",
)


@contextmanager
def in_jupyterlab(folder: Path, cells: Sequence[str]) -> Iterator[str]:
    """The address of a notebook with some cells, while JupyterLab runs.

    Args:
        folder: Where JupyterLab writes; the settings of the user are not used.
        cells: Code of the cells.
    """
    root = folder / "root"
    root.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells])
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.kernelspec = spec
    nbformat.write(notebook, root / "explore.ipynb")
    command = [sys.executable, "-m", "jupyterlab", *OPTIONS, f"--ServerApp.root_dir={root}"]
    own = {name: str(folder / name.lower()) for name in FOLDERS}
    silent = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / SILENT
    silent.parent.mkdir(parents=True)
    silent.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {**os.environ, **own}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stderr is not None
    lines = iter(running.stderr.readline, "")
    port = next(found[1] for line in lines if (found := re.search(r"127.0.0.1:(\d+)/", line)))
    reading = threading.Thread(target=running.stderr.read)  # a full pipe would stop JupyterLab
    reading.start()
    try:
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=token"
    finally:
        running.terminate()
        running.wait(SECONDS)
        reading.join(SECONDS)


def run_cell(page: Page, number: int) -> None:
    """Run a cell, once the kernel is idle."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").nth(number).click()
    page.keyboard.press("Shift+Enter")


def explorer_in(page: Page) -> FrameLocator:
    """The explorer in a notebook, once it is ready."""
    inside = page.frame_locator("iframe[title='adjointbackmap explorer']")
    inside.locator("body[data-ready=yes]").wait_for()
    return inside
