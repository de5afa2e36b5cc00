"""The report: everything in one file, made from sections alone."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from adjointbackmap import cli, plots
from adjointbackmap.report.document import STUDY_PLACE, read_summary, study_markdown, write_document
from adjointbackmap.report.page import render, write_report
from adjointbackmap.report.sections import Claim, Picture, Scene, Section, Table
from adjointbackmap.report.sheets import Sheet

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


def test_document_has_claims_and_tables_between_its_marks(folder):
    """Bars in cells are no borders; a summary is beside it; the rest of the page stays."""
    page = folder / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(f"Above.\n\n{STUDY_PLACE.begin}\nearlier\n{STUDY_PLACE.end}\n\nBelow.\n")
    blocks = (
        Claim("|e| is small.", "3 of 4", True),
        Table(Sheet("Losses", ["layer"], [["conv1"]]), "Low is good."),
    )
    written = write_document(folder, [section(*blocks)], page)
    text = page.read_text()
    assert text.startswith("Above.\n")
    assert text.endswith("Below.\n")
    assert "earlier" not in text
    for line in (
        "### Noise & <more>",
        "| \\|e\\| is small. | 3 of 4 |  | holds |",
        "*Losses*",
        "| conv1 |",
        "Low is good.",
    ):
        assert f"\n{line}\n" in text
    assert written == [page, page.parent / "results" / "study.json"]
    assert read_summary(written[1]) == [section(*blocks)]


def test_page_of_the_study_is_made_of_its_summary():
    """Between the marks of docs/study.md are the sections of docs/results/study.json."""
    docs = Path(__file__).parents[1] / "docs"
    sections = read_summary(docs / "results" / "study.json")
    text = (docs / "study.md").read_text()
    assert f"{STUDY_PLACE.begin}\n\n{study_markdown(sections)}\n\n{STUDY_PLACE.end}" in text


def test_command_makes_a_page_of_a_summary(folder, run):
    """The same text as with the results; without a page, or with another file, it is one line."""
    page = folder / "study.md"
    page.write_text(f"{STUDY_PLACE.begin}\n{STUDY_PLACE.end}\n")
    (_, file) = write_document(folder, [section(Claim("It is.", "1", None))], page)
    text = page.read_text()
    page.write_text(f"{STUDY_PLACE.begin}\n{STUDY_PLACE.end}\n")
    assert run("report", file, "--docs", page)[0] == 0
    assert page.read_text() == text
    (status, message) = run("report", file)
    assert status == 2
    assert "A summary must come with the page to write" in message
    file.write_text("{}")
    (status, message) = run("report", file, "--docs", page)
    assert status == 2
    assert "must be a summary that report --docs wrote" in message


def test_page_without_a_place_is_refused(folder):
    """Before anything is written."""
    (folder / "page.md").write_text("No marks.\n")
    with pytest.raises(
        ValueError, match=r"--docs must be a page with the lines .* Got .*page\.md: add them"
    ):
        write_document(folder, [], folder / "page.md")
