"""The report: everything in one file, made from sections alone."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from adjointbackmap import cli, plots
from adjointbackmap.report.document import (
    STUDY_PLACE,
    QuestionPage,
    read_summary,
    write_document,
)
from adjointbackmap.report.page import render, write_report
from adjointbackmap.report.sections import Claim, Picture, Scene, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.report.verdicts import group_claims
from adjointbackmap.study import pages as study_pages

ABOUT = {
    "version": "9.9",
    "date": "2001-02-03",
    "settings": {"a-network": "seed 0"},
    "environment": {"cpu": "a processor"},
    "seconds": {"noise": 61.4},
}


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all that were opened are closed in order."""

    EMPTY = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture
def folder(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1])
    plots.save(figure, tmp_path / "noise" / "lines.png", formats=("png", "svg"))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line and return its exit status and its errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["adjointbackmap", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, " ".join(capsys.readouterr().err.split())

    return run


def section(*blocks):
    return Section("noise", "Noise & <more>", ("Run on `one` image.",), blocks)


def test_page_holds_all_that_it_shows(folder):
    """Links stay inside, files lie beside the page, tags are closed, and text is escaped."""
    blocks = (
        Claim("Noise < signal.", "3 of 10", False, "all"),
        Claim("It cannot be told.", "0 of 0", None),
        Table(
            Sheet("Losses", ["layer", "loss"], [["**conv1**", "<0.5"]]),
            "Low is good.",
            Sheet("Table 4.1", ["class"], [["cat"]]),
        ),
        Picture(Path("noise/lines.png"), "A line.", "Fig. 4.2"),
    )
    text = write_report(folder, [section(*blocks)], ABOUT).read_text()
    tags = Tags(text)
    assert tags.open == []
    assert [i["src"].partition(",")[0] for i in tags.of("img")] == ["data:image/png;base64"]
    assert all(i["alt"] for i in tags.of("img"))
    ids = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    for link in tags.of("a"):
        inside = link["href"].startswith("#")
        assert link["href"][1:] in ids if inside else (folder / link["href"]).is_file()
    assert tags.of("script") == tags.of("link") == []
    escaped = ("Noise &lt; signal.", "&lt;0.5", "Noise &amp; &lt;more&gt;")
    for shown in (*escaped, "0 of 2 claims hold", "does not hold", "cannot tell", "Table 4.1"):
        assert shown in text
    assert "**" not in text
    assert not re.search(r"(src|href)=.https?:", text)


def test_scenes_bring_their_script(folder):
    """Plotly is in the page, once; a name that would end the script does not."""
    scene = Scene(
        {"red": [[0.0, 1.0, 2.0]], "black": [[1.0, 1.0, 1.0]]},
        {"red": ["</script>"]},
        "tSNE",
        "Points.",
    )
    text = render(folder, [section(scene, scene)], ABOUT)
    assert text.count("Plotly.newPlot(") >= 2
    assert len(Tags(text).of("script")) == 3
    assert "Plotly" not in render(folder, [section()], ABOUT)


def test_picture_that_is_missing_is_named(folder):
    """With its path."""
    with pytest.raises(
        FileNotFoundError,
        match=r"must be in the folder of the results. Got .*other\.png, which is not there",
    ):
        render(folder, [section(Picture(Path("other.png"), "Nothing."))], ABOUT)


PLAN = (
    QuestionPage("small", "Is it small?", "noise", "The lead.", ("noise/lines.png",), ("|e|",)),
    QuestionPage("rest", "What else?", "noise", "The other lead.", ("noise/missing.png",)),
    QuestionPage("none", "Without results?", "targets", "", ()),
)
BLOCKS = (
    Claim("|e| is small.", "3 of 4", True, network="a"),
    Claim("It is.", "1", None),
    Claim("|e| is small.", "1 of 4", False, network="b"),
    Table(Sheet("Losses of |e|", ["layer"], [["conv1"]]), "Low is good."),
    Picture(Path("noise/lines.png"), "A line.", "Fig. 4.2", "Lines"),
)


@pytest.fixture
def docs(folder):
    """A folder of pages with the table's place in index.md."""
    docs = folder / "docs" / "study"
    docs.mkdir(parents=True)
    text = f"Above.\n\n{STUDY_PLACE.begin}\nearlier\n{STUDY_PLACE.end}\n\nBelow.\n"
    (docs / "index.md").write_text(text)
    return docs


def test_pages_share_the_claims_tables_and_pictures(folder, docs):
    """By their phrases; bars in cells are no borders; the rest of index.md stays."""
    written = write_document(folder, [section(*BLOCKS)], docs, PLAN)
    names = ["index.md", "small.md", "rest.md", "claims.md"]
    assert written == [*(docs / name for name in names), docs.parent / "results" / "study.json"]
    text = (docs / "small.md").read_text()
    for line in (
        "# Is it small?",
        "![Lines](../figures/study/noise-lines.png)",
        "*A line. Beside Fig. 4.2.*",
        "| \\|e\\| is small. | holds for 1 of 2 networks, not for b |",
        "| a | 3 of 4 |  | holds |",
        "| b | 1 of 4 |  | does not hold |",
        "<details><summary>Losses of |e|: 1 row</summary>",
        "| conv1 |",
        "Low is good.",
        "Run on `one` image.",
    ):
        assert f"{line}\n" in text
    assert text.count("<details>") == text.count("</details>") == 3
    assert "It is." not in text
    other = (docs / "rest.md").read_text()
    assert "| It is. | cannot tell |" in other
    assert "small" not in other
    index = (docs / "index.md").read_text()
    assert index.startswith("Above.\n")
    assert index.endswith("Below.\n")
    assert "earlier" not in index
    assert "| [Is it small?](small.md) | 0 of 1 |" in index
    assert "| It is. | cannot tell |" in (docs / "claims.md").read_text()
    figure = docs.parent / "figures" / "study" / "noise-lines.png"
    drawn = [Image.open(path).convert("RGB") for path in (figure, folder / "noise" / "lines.png")]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    (again,) = read_summary(written[-1])
    key = repr
    assert sorted(again.blocks, key=key) == sorted(BLOCKS, key=key)


def test_verdict_of_several_networks_names_the_others():
    """If they are few; what cannot be told is no failure."""
    verdicts = {"a": True, "b": None, "c": False, "d": True}
    claims = [Claim("It is.", "1", holds, network=name) for name, holds in verdicts.items()]
    (group,) = group_claims(claims)
    assert group.verdict == "holds for 2 of 4 networks, not for c; cannot tell for b"
    assert group.holds is False
    assert group_claims(claims[:2])[0].holds is None
    assert group_claims(claims[::3])[0].verdict == "holds for both networks"
    off = [Claim("No.", "0", False, network=name) for name in "abcde"]
    assert group_claims(off)[0].verdict == "holds for none of 5 networks"


def test_cifar100_stands_apart():
    """Its networks are named after the others, and count for no verdict."""
    verdicts = {"a-cifar10": True, "b-cifar10": True, "a-cifar100": False}
    claims = [Claim("It is.", "1", holds, network=name) for name, holds in verdicts.items()]
    (group,) = group_claims(claims)
    assert group.holds is True
    words = "holds for both networks. CIFAR-100: holds for 0 of 1 network, not for a-cifar100"
    assert group.verdict == words
    (alone,) = group_claims(claims[2:])
    assert (alone.holds, alone.verdict) == (False, f"CIFAR-100: {words.split(': ')[1]}")


def test_command_makes_the_pages_of_a_summary(folder, docs, run, monkeypatch):
    """The same text as with the results; without a folder, or with another file, it is one line."""
    monkeypatch.setattr(study_pages, "PAGES", PLAN)
    file = write_document(folder, [section(*BLOCKS)], docs, PLAN)[-1]
    before = {path.name: path.read_text() for path in docs.iterdir()}
    (docs / "small.md").unlink()
    assert run("report", file, "--docs", docs)[0] == 0
    assert {path.name: path.read_text() for path in docs.iterdir()} == before
    (status, message) = run("report", file)
    assert status == 2
    assert "A summary must come with the folder of the pages" in message
    file.write_text("{}")
    (status, message) = run("report", file, "--docs", docs)
    assert status == 2
    assert "must be a summary that report --docs wrote" in message


def test_folder_without_a_place_is_refused(folder):
    """Before anything is written."""
    (folder / "index.md").write_text("No marks.\n")
    with pytest.raises(
        ValueError, match=r"--docs must be a page with the lines .* Got .*index\.md: add them"
    ):
        write_document(folder, [], folder, PLAN)
    assert not (folder / "results").exists()


def test_claims_are_folded_below_the_first_pictures(folder):
    """What was found comes first; long tables are folded; cells have their column's name."""
    long = Table(Sheet("Long", ["layer"], [["conv1"]] * 13))
    text = render(folder, [section(*BLOCKS, long)], ABOUT)
    order = ["What was found", "|e| is small.", "<figure>", '<details class="claim false">']
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert "1 of 3 claims hold here" in text
    assert "<summary>Long: 13 rows</summary>" in text
    assert '<td data-label="layer">conv1</td>' in text
    assert Tags(text).open == []
