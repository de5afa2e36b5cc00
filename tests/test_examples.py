"""The examples of the gallery and the notebooks run, and what they assert holds."""

import re
import runpy
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = sorted((DOCS / "gallery").glob("*.py"))
NOTEBOOKS = [*sorted((DOCS / "notebooks").glob("*.md")), DOCS / "which-method.md"]
CELL = re.compile(
    r"^```\{code-cell\} ipython3\n((?::[^\n]*\n)*\n?)(.*?)^```$", re.DOTALL | re.MULTILINE
)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Files are written into a folder of the test, and figures are closed."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    """Each asserts an identity."""
    assert "\nassert " in path.read_text() or "\n    assert " in path.read_text()
    runpy.run_path(str(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_of_the_notebook_run(path):
    """In their order; a failure names the line of the page."""
    pytest.importorskip("captum", reason="which-method.md compares with Captum")
    text = path.read_text()
    cells = list(CELL.finditer(text))
    assert len(cells) == text.count("```{code-cell}") > 2
    names = {"__name__": path.stem}
    for cell in cells:
        above = "\n" * text[: cell.start(2)].count("\n")
        exec(compile(above + cell[2], str(path), "exec"), names)
