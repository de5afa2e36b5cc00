"""The site: no warning, no dead link, no lost page, and every public name is shown."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import adjointbackmap

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = (DOCS / "_build", DOCS / "examples")  # by a build of the site
PAGES = sorted(p for p in DOCS.rglob("*.md") if not any(p.is_relative_to(m) for m in MADE))
IN_REPOSITORY = re.compile(
    r"(?<![\w./-])(?:docs|src|tests|benchmarks)/(?!results/)[\w./-]*\w"
)  # results come with a run
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


# the pages as they lie in the repository


def missing_files(page):
    """Files of the repository that a page names and that do not exist."""
    return [name for name in IN_REPOSITORY.findall(page.read_text()) if not (ROOT / name).exists()]


def broken_links(page):
    """Relative links of a Markdown page that lead to no file, as a code host shows it."""
    links = [urlsplit(link) for link in LINK.findall(CODE.sub("", page.read_text()))]
    return [
        link.path for link in links if not link.scheme and not (page.parent / link.path).exists()
    ]


def unknown_keys(text):
    """Keys that a text cites and the bibliography does not have."""
    known = re.findall(r"^@\w+\{(\w+),", (DOCS / "bibliography.bib").read_text(), re.MULTILINE)
    return sorted(
        {key for key in re.findall(r"\[([A-Z][A-Za-z]+\d{4})\b", text) if key not in known}
    )


SOURCES = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_of_a_page_exist(page):
    """What a page names in the repository is there."""
    assert missing_files(page) == []
    assert broken_links(page) == []


@pytest.mark.parametrize("folder", [DOCS, ROOT / "src"], ids=lambda folder: folder.name)
def test_what_is_cited_is_in_the_bibliography(folder):
    """Pages and docstrings cite by the keys of docs/bibliography.bib."""
    files = [path for path in folder.rglob("*") if path.suffix in (".md", ".py")]
    assert unknown_keys("\n".join(path.read_text() for path in files)) == []


def test_missing_files_and_links_are_found(tmp_path):
    """The checks above see what is wrong; code is no link."""
    page = tmp_path / "page.md"
    page.write_text(
        "`tests/test_nothing.py` and docs/conf.py, [a](b.md), [c](page.md#d), "
        "[e](https://f), `x[0](y)`"
    )
    assert missing_files(page) == ["tests/test_nothing.py"]
    assert broken_links(page) == ["b.md"]
    assert unknown_keys("[Wan2022, eq. 3.6] and [Wan1999]") == ["Wan1999"]


# the site


class Read(HTMLParser):
    """Anchors of an HTML page, where it leads to, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors = set()
        self.links = []
        self.loads = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[name] for name in ("src", "href") if tag != "a" and found.get(name)]


def read_site(folder):
    """Path from the folder -> what is in the page."""
    return {
        path.relative_to(folder).as_posix(): Read(path.read_text())
        for path in sorted(folder.rglob("*.html"))
    }


def target_of(folder, page, link):
    """File that a link leads to, and the anchor there."""
    parts = urlsplit(link)
    path = (folder / page).parent / unquote(parts.path) if parts.path else folder / page
    return path.resolve().relative_to(folder.resolve()).as_posix(), unquote(parts.fragment)


def dead_links(folder, site):
    """Links and loads inside the site that lead to no file or to no anchor."""
    dead = []
    for page, read in site.items():
        for link in read.links + read.loads:
            if urlsplit(link).scheme:
                continue
            path, anchor = target_of(folder, page, link)
            if not (folder / path).is_file() or (
                anchor and path in site and anchor not in site[path].anchors
            ):
                dead.append((page, link))
    return dead


def loaded_from_elsewhere(site):
    """What a reader without a connection would miss."""
    return [
        (page, load)
        for page, read in site.items()
        for load in read.loads
        if urlsplit(load).scheme not in ("", "data")
    ]


def reached(folder, site, start="index.html"):
    """Pages that links lead to from the first one."""
    seen = set()
    waiting = [start]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        targets = {
            target_of(folder, page, link)[0]
            for link in site[page].links
            if not urlsplit(link).scheme
        }
        waiting += [target for target in targets & site.keys() if target not in seen]
    return seen


def test_problems_of_a_site_are_found(tmp_path):
    """A missing file, a missing anchor, a script from elsewhere, a page without a link to it."""
    (tmp_path / "index.html").write_text(
        '<a href="a.html#x">1</a><a href="a.html#y">2</a><a href="b.html">3</a>'
    )
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="https://c">4</a><script src="https://d"></script><img src="e.png">'
    )
    (tmp_path / "alone.html").write_text("")
    site = read_site(tmp_path)
    assert dead_links(tmp_path, site) == [
        ("a.html", "e.png"),
        ("index.html", "a.html#y"),
        ("index.html", "b.html"),
    ]
    assert loaded_from_elsewhere(site) == [("a.html", "https://d")]
    assert reached(tmp_path, site) == {"index.html", "a.html"}


def build(folder, run):
    """Build the site from a copy of the pages, with warnings as errors.

    Args:
        folder: Where to build.
        run: Whether to run the examples and the notebooks.
    """
    made = shutil.ignore_patterns("_build", "examples", "__pycache__")
    pages = shutil.copytree(DOCS, folder / "docs", ignore=made)
    shutil.copy(ROOT / "CHANGELOG.md", folder)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        folder / "doctrees",
        pages,
        folder / "html",
    ]
    environment = os.environ | {"ADJOINTBACKMAP_DOCS_RUN": str(int(run))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_examples_and_notebooks_are_in_the_site(tmp_path):
    """All of them run, and each has a picture."""
    folder = build(tmp_path, run=True)
    site = read_site(folder)
    assert dead_links(folder, site) == []
    assert loaded_from_elsewhere(site) == []
    examples = {path.stem for path in (DOCS / "gallery").glob("*.py")}
    assert len(examples) >= 12
    pages = {f"examples/{name}.html" for name in examples}
    pages |= {f"notebooks/{path.stem}.html" for path in (DOCS / "notebooks").glob("*.md")}
    for page in pages | {"which-method.html"}:
        pictures = [load for load in site[page].loads if re.search(r"_images/|data:image", load)]
        assert pictures, f"{page} has no picture"


def test_site_builds_and_is_whole(tmp_path):
    """One build: links, pages, names of the reference, commands; nothing loads from elsewhere.

    Examples and notebooks do not run here: tests/test_examples.py runs them.
    """
    pytest.importorskip("sphinx", reason="the site needs the extra docs")
    folder = build(tmp_path, run=False)
    site = read_site(folder)
    assert dead_links(folder, site) == []
    assert loaded_from_elsewhere(site) == []
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES}
    assert pages - reached(folder, site) == set()

    shown = set().union(*(site[page].anchors for page in site if page.startswith("reference/")))
    named = {f"adjointbackmap.{name}" for name in adjointbackmap.__all__}
    modules = {anchor.removeprefix("module-") for anchor in shown if anchor.startswith("module-")}
    assert named - shown - modules == set(), (
        "add these names to the page of their stage in docs/reference/"
    )

    commands = (folder / "reference/command-line.html").read_text()
    assert "adjointbackmap map --layer STR" in re.sub("<[^>]*>", "", commands)
    assert "[<a " in (folder / "theory.html").read_text(), "citations must be links"
    dashes = [page for page in site if re.search(r"[ (]\N{EN DASH}\w", (folder / page).read_text())]
    assert dashes == [], "an option such as --keep stands outside of code"
