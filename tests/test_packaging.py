"""What is installed: the wheel, its page on a package index, and its extras."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adjointbackmap import models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_A_CLONE = {"dev", "docs", "others"}  # extras of people who work on the package
MOST_MEGABYTES = 25  # the wheel is downloaded by everyone


class Targets(HTMLParser):
    """Addresses of links and pictures, and the names that links inside the page may lead to."""

    def __init__(self, html):
        super().__init__()
        self.addresses = []
        self.names = set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[key] for key in ("href", "src") if key in found]
        self.names |= {found[key] for key in ("id", "name") if key in found}


def unreachable(html):
    """The addresses that need a file beside the page, or lead nowhere in it."""
    page = Targets(html)
    inside = {f"#{name}" for name in page.names}
    return [
        address
        for address in page.addresses
        if not address.startswith("https://") and address not in inside
    ]


@pytest.fixture(scope="module")
def long_description():
    """The text that a package index shows."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="the text needs the extra dev")
    words = [sys.executable, "-m", "hatch_fancy_pypi_readme"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_page_of_the_index_needs_no_other_file(long_description):
    """It is rendered as the index does it; every link of it leads somewhere."""
    markdown = pytest.importorskip("readme_renderer.markdown", reason="the page needs extra dev")
    html = markdown.render(long_description)
    assert re.search(r"<h1[^>]*>adjointbackmap", html)
    assert unreachable(html) == []


def test_page_of_the_index_has_the_words_of_the_readme(long_description):
    """Links become their words; the picture and its caption are left out."""
    readme = (ROOT / "README.md").read_text()
    words = re.findall(r"\w+", re.sub(r"!\[.*\n\n\*Made by [^*]*\*|\]\([^)]*\)", "", readme))
    assert re.findall(r"\w+", long_description) == words
    assert "](" not in long_description


def test_links_that_lead_nowhere_are_found():
    """The check above sees a relative link, a relative picture and a missing heading."""
    html = '<a href="docs/a.md"></a><img src="a.png"><a href="#b"></a><a href="https://a.b"></a>'
    assert unreachable(html) == ["docs/a.md", "a.png", "#b"]


def test_all_has_every_extra_of_a_user():
    (requirement,) = EXTRAS["all"]
    named = re.fullmatch(r"adjointbackmap\[([\w,]+)\]", requirement)[1].split(",")
    assert set(named) == set(EXTRAS) - FOR_A_CLONE - {"all"}


# the wheel


def say(*words, folder, **environment):
    """Run a command without this checkout, and return what it prints."""
    kept = {key: os.environ[key] for key in os.environ if not key.startswith("PYTHON")}
    ran = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    say(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_what_a_user_needs(wheel):
    """Types, the stub of the public names, the licence, each shipped network and the sample."""
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        head = Parser().parsestr(content.read(metadata).decode())
    assets = {f"{name}.{kind}" for name in models.names("all") for kind in ("safetensors", "json")}
    assets |= {f"{name}.words.txt" for name in models.names("sentences")}
    needed = {f"adjointbackmap/assets/{name}" for name in assets | {"cifar10-sample.bin"}}
    needed |= {"adjointbackmap/py.typed", "adjointbackmap/__init__.pyi"}
    assert needed <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"adjointbackmap"}
    assert head["License-Expression"] == "MIT"
    assert head["Description-Content-Type"] == "text/markdown"
    assert set(head.get_all("Provides-Extra")) == set(EXTRAS)
    assert wheel.stat().st_size < MOST_MEGABYTES * 10**6


@pytest.mark.slow
def test_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    """In a new environment and an empty folder: the demo runs, and an extra is named if missing."""
    here = tmp_path / "here"
    here.mkdir()
    say(sys.executable, "-m", "venv", tmp_path / "env", folder=here)
    binaries = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    pip = (binaries / "python", "-m", "pip", "install", "--quiet", "-c", constraints)
    say(*pip, wheel, folder=here)
    place = "import adjointbackmap as abm; print(abm.__file__)"
    found = say(binaries / "python", "-c", place, folder=here).strip()
    assert Path(found).is_relative_to(tmp_path / "env")
    text = say(binaries / "adjointbackmap", "demo", folder=here, OMP_NUM_THREADS="1")
    assert "110,602 hyperplanes" in text
    pictures = {path.name for path in (here / "adjointbackmap-demo").iterdir()}
    assert {"hyperplanes-ship.png", "hyperplanes-ship.npz"} <= pictures
    study = (binaries / "adjointbackmap", "study", "all", "--sample")
    ran = subprocess.run(
        list(map(str, study)), cwd=here, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith("pip install 'adjointbackmap[study]'.")
