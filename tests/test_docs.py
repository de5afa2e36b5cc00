"""The pages do what they say: their Python blocks run, and the list of operations is complete."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from adjointbackmap.capture.decompositions import TAKEN_APART
from adjointbackmap.cli import app
from adjointbackmap.rules import RULES
from adjointbackmap.rules.curved import CURVED

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/quick-start.md",
    "docs/attacking.md",
    "docs/your-own-network.md",
    "docs/adding-an-operation.md",
    "docs/verifying.md",
    "docs/larger-than-memory.md",
    "docs/analysis.md",
    "docs/lines.md",
    "docs/curved.md",
    "docs/faq.md",
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def rules():
    """Rules that a page registers are taken back."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_the_page_run(page):
    """The Python blocks of a page run in order and their asserts hold; failures name the line."""
    text = (ROOT / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    names = {"__name__": page}
    for block in blocks:
        above = "\n" * text[: block.start(1)].count("\n")
        exec(compile(above + block[1], str(ROOT / page), "exec"), names)


def test_rules_of_the_pages_are_taken_back():
    """The operations that a page adds have no rule afterwards."""
    assert "aten.cumulative_trapezoid.dx" not in RULES
    assert all(name.startswith("aten.") for name in RULES)


def listed_operations():
    """The operations in the first column of the tables of docs/operations.md."""
    tables, _ = (ROOT / "docs/operations.md").read_text().split("## Ties and kinks")
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_operation_with_a_rule_is_listed():
    """docs/operations.md names each operation that has a rule, and no other."""
    assert listed_operations() == {name.split(".")[1] for name in RULES} | {
        name.split(".")[0] for name in TAKEN_APART
    }


def test_every_curved_operation_is_listed():
    """The table of curved operations names each that has a rule, and no other."""
    text = (ROOT / "docs/operations.md").read_text().split("\n## Curved operations\n")[1]
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == {name.split(".")[1] for name in CURVED}


COMMAND = re.compile(r"^ *(?:\S*/)?adjointbackmap ([a-z].*)$", re.MULTILINE)
COMMANDS = [
    (page.relative_to(ROOT).as_posix(), line)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for line in COMMAND.findall(page.read_text())
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_of_the_pages_exist(page, line):
    """The command line accepts the words of each command that a page shows."""
    app.parse_args(shlex.split(line, comments=True), exit_on_error=False, print_error=False)


def test_a_command_that_does_not_exist_is_found():
    """The check above sees an option that is wrong."""
    with pytest.raises(CycloptsError, match=r"--no-such-option"):
        app.parse_args(
            ["verify", "vgg7-cifar10", "--no-such-option"], exit_on_error=False, print_error=False
        )
