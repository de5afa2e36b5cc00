"""Kept images of verify: an impossible or damaged line is named and computed again."""

import json
import sys
import warnings
from contextlib import suppress

import pytest
from cases import make
from damage import harm

import adjointbackmap as abm
from adjointbackmap import cli
from adjointbackmap.exactness import verification as runs
from adjointbackmap.exactness.layer_check import HISTOGRAM_EDGES, LayerCheck
from adjointbackmap.files.checked import DamagedFileWarning


@pytest.fixture(scope="module")
def three():
    """A network, three images, their total, and lines of an older version without checksums."""
    model, x = make("plain-conv-chain", 3)
    network = abm.trace(model, x)
    names = ["a", "b", "c"]
    terms = runs.terms_of(network)
    found = dict(runs.verified(network, x, terms, names))
    lines = [{"job": runs.job_of(network, terms)}]
    lines += [
        {"name": name, "result": {k: check.to_dict() for k, check in found[name].items()}}
        for name in names
    ]
    return network, x, names, abm.verify(network, x, names=names), json.dumps(lines)


def forged(change):
    """A change of the errors of the first layer of image b."""

    def forge(lines):
        change(next(iter(lines[2]["result"].values())))

    return forge


def missing_layer(lines):
    """One layer less."""
    lines[2]["result"].popitem()


def of_another_image(lines):
    """The errors of the next image."""
    lines[2]["result"] = lines[3]["result"]


FORGERIES = {
    "share-of-149-percent": (
        forged(lambda e: e.update(within=e["units"] * 3 // 2)),
        "a histogram that does not fit the units within 1 %",
    ),
    "more-units": (forged(lambda e: e.update(units=e["units"] + 1)), "units instead of"),
    "histogram": (forged(lambda e: e["signed"].__setitem__(0, 3)), "a histogram of"),
    "shifted-histogram": (
        forged(lambda e: e["signed"].append(e["signed"].pop(0))),
        "a histogram that does not fit|a largest error that does not fit",
    ),
    "negative": (forged(lambda e: e.update(zero=-1)), "counts that are no counts"),
    "all-zero": (
        forged(lambda e: e.update(rounded=e["units"])),
        "too many units of zero or of rounding",
    ),
    "text": (
        forged(lambda e: e.update(scaled="0")),
        "errors that are no errors|no errors of units",
    ),
    "largest": (
        forged(lambda e: e.update(largest=0.5)),
        "a largest error that does not fit the histogram",
    ),
    "outside": (
        forged(lambda e: e.update(outside=0.5)),
        "an outside value without a unit outside 1 %",
    ),
    "worst-unit": (
        forged(lambda e: e.update(worst=["b", [0, 99, 0]])),
        "a worst unit that does not exist",
    ),
    "no-field": (forged(lambda e: e.pop("zero")), "units|no errors"),
    "other-field": (forged(lambda e: e.update(share=1.49)), "has no errors of units"),
    "missing-layer": (missing_layer, "it has other layers than"),
    "another-image": (of_another_image, "a worst unit that does not exist"),
    "nothing": (lambda lines: lines[2].update(result={}), "it has other layers than"),
    "number": (lambda lines: lines[2].update(result=3), "it has other layers than"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_line_that_cannot_be_is_computed_again(three, tmp_path, forgery):
    """The file and the line are named, and nothing of it is in the total."""
    network, x, names, total, lines = three
    change, reason = FORGERIES[forgery]
    entries = json.loads(lines)
    keep = tmp_path / "kept.jsonl"
    change(entries)
    keep.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if forgery == "no-field":
        reason = "cannot be right"  # a count left out is zero, which may fit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = abm.verify(network, x, names=names, keep=keep)
    said = [str(warning.message) for warning in caught if warning.category is DamagedFileWarning]
    assert found == total
    assert (
        any(f"{keep}: line 3 cannot be right: " in text for text in said) or forgery == "no-field"
    )
    assert any(part in text for text in said for part in reason.split("|")) or forgery == "no-field"


def test_lines_of_an_older_version_are_used_with_a_word(three, tmp_path):
    """All of them fit."""
    network, x, names, total, lines = three
    keep = tmp_path / "kept.jsonl"
    keep.write_text("".join(json.dumps(entry) + "\n" for entry in json.loads(lines)))
    with pytest.warns(
        DamagedFileWarning, match="of an older version: 3 of its lines have no checksum"
    ):
        assert abm.verify(network, x, names=names, keep=keep) == total
    assert keep.read_text().count("\n") == 4


@pytest.mark.parametrize("seed", range(20))
def test_damaged_file_gives_the_same_total(three, tmp_path, seed):
    """Or is refused by its name."""
    network, x, names, total, _ = three
    keep = tmp_path / "kept.jsonl"
    abm.verify(network, x, names=names, keep=keep)
    harm(tmp_path, seed, "*.jsonl")
    refusal = ""
    with warnings.catch_warnings(action="ignore"):
        try:
            assert abm.verify(network, x, names=names, keep=keep) == total
        except ValueError as error:
            refusal = str(error)
    assert not refusal or f"{keep} must hold results of this job" in refusal


def test_errors_of_an_image_fit_each_other():
    """NaN and infinity are in the last bins; what is exactly 1 % is within."""
    size = 2 * len(HISTOGRAM_EDGES) + 1
    signed = [0] * size
    signed[-1] = 1
    signed[len(HISTOGRAM_EDGES) + HISTOGRAM_EDGES.index(0.01)] = 1
    check = LayerCheck("fc", 2, 1, 1, 0, 0, float("nan"), 1.0, 0.5, ("a", (1,)), signed)
    assert LayerCheck.of_image(check.to_dict(), "fc", "a", (2,)).signed == signed
    with pytest.raises(ValueError, match="fc has 2 units instead of 3"):
        LayerCheck.of_image(check.to_dict(), "fc", "a", (3,))
    with pytest.raises(ValueError, match="fc has no errors of units"):
        LayerCheck.of_image(["fc"], "fc", "a", (2,))


def test_command_says_it_in_one_line(monkeypatch):
    """Without the place in our code, which other warnings have."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back at the end
    monkeypatch.setattr(sys, "argv", ["adjointbackmap", "--version"])
    with suppress(SystemExit):
        cli.main()
    place = ("records.py", 3)
    ours = DamagedFileWarning("kept.jsonl: line 2")
    text = warnings.formatwarning(ours, DamagedFileWarning, *place)
    assert text == "adjointbackmap: kept.jsonl: line 2\n"
    other = warnings.formatwarning(UserWarning("other"), UserWarning, *place)
    assert "records.py:3: UserWarning: other" in other
