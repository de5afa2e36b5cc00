"""Records: lines are read back, half-written ones dropped, other jobs' files refused."""

import json
import warnings

import pytest
from damage import harm

from adjointbackmap.exactness.journal import Record
from adjointbackmap.files.checked import DamagedFileWarning, checksum

JOB = {
    "weights sha256": "f2a2e56ce8c79882a257efd9b54b44aa26bfc9e45b09b620a9f56cad4277565f",
    "k": 0.125,
    "layers": ["conv0", "fc"],
}


def test_results_are_read_back(tmp_path):
    """Read by another object, in a new folder, with the floats and NaN as written."""
    path = tmp_path / "new" / "kept.jsonl"
    record = Record(path, JOB)
    assert not path.exists()
    record.append("a", {"error": 0.1 + 0.2})
    record.append("b", {"error": float("nan")})
    again = Record(path, JOB)
    assert record.names == again.names == {"a", "b"}
    found = dict(again.results())
    assert found["a"] == {"error": 0.1 + 0.2}
    assert found["b"]["error"] != found["b"]["error"]


def test_first_line_tells_the_job(tmp_path):
    """And each other line is a result."""
    path = tmp_path / "kept.jsonl"
    Record(path, JOB).append("a", 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"job": JOB, "checksum": checksum(JOB)},
        {"name": "a", "result": 1, "checksum": checksum([JOB, "a", 1])},
    ]


@pytest.mark.parametrize("left", [1, 9, 26], ids=["a-byte", "a-part", "all-but-the-end"])
def test_half_written_line_is_dropped(tmp_path, left):
    """A crash within a line loses that line alone; the next result stands on a line of its own."""
    path = tmp_path / "kept.jsonl"
    record = Record(path, JOB)
    record.append("a", 1)
    whole = path.read_bytes()
    record.append("b", 2)
    path.write_bytes(path.read_bytes()[: len(whole) + left])
    again = Record(path, JOB)
    assert again.names == {"a"}
    assert path.read_bytes() == whole
    again.append("b", 2)
    assert dict(Record(path, JOB).results()) == {"a": 1, "b": 2}


def test_half_written_first_line_is_dropped(tmp_path):
    """The file begins anew."""
    path = tmp_path / "kept.jsonl"
    path.write_text('{"job": {"wei')
    record = Record(path, JOB)
    record.append("a", 1)
    assert dict(Record(path, JOB).results()) == {"a": 1}


def test_name_that_is_there_twice_counts_once(tmp_path):
    """As after two runs that were started at once."""
    path = tmp_path / "kept.jsonl"
    first = Record(path, JOB)
    second = Record(path, JOB)
    first.append("a", 1)
    second.append("a", 1)
    assert list(Record(path, JOB).results()) == [("a", 1)]


def test_file_of_another_job_is_refused(tmp_path):
    """The message names what differs, all of it, and is short; the file is left as it was."""
    path = tmp_path / "kept.jsonl"
    Record(path, JOB).append("a", 1)
    before = path.read_bytes()
    expected = (
        r"kept.jsonl must hold results of this job. Got those of another "
        r"\(weights sha256 f2a2e56ce8c7..., not 0000; "
        r"k 0.125, not 1.0\): name another file."
    )
    with pytest.raises(ValueError, match=expected):
        Record(path, {**JOB, "weights sha256": "0000", "k": 1.0})
    assert path.read_bytes() == before


FOREIGN = {
    "empty": "{}\n",
    "list": "[]\n",
    "text": "what\nelse",
    "line": "what",
    "less": '{"job": {"k": 0.125}}\n',
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_of_something_else_is_refused(tmp_path, kind):
    """Nothing is appended to a file that is no record, and nothing is cut off."""
    path = tmp_path / "notes.txt"
    text = FOREIGN[kind]
    path.write_text(text)
    with pytest.raises(
        ValueError,
        match=r"notes.txt must hold results of this job. Got (something else|those of another)",
    ):
        Record(path, JOB)
    assert path.read_text() == text


HARMS = {
    "text": lambda line: "what\n",
    "list": lambda line: "[]\n",
    "name": lambda line: line.replace('"a"', '"b"'),
    "number": lambda line: line.replace('"result": 1', '"result": 2'),
    "no-checksum": lambda line: json.dumps({"name": "a", "result": 1}) + "\n",
    "checksum": lambda line: line.replace("checksum", "Checksum"),
    "bytes": lambda line: "\udcff" + line,
    "deep": lambda line: 100_000 * "[" + "\n",
    "of-another-job": lambda line: (
        json.dumps({"name": "a", "result": 1, "checksum": checksum([{}, "a", 1])}) + "\n"
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_line_is_named_and_left_out(tmp_path, harm):
    """In the midst of a file no line is passed over in silence, and no other one is lost."""
    path = tmp_path / "kept.jsonl"
    record = Record(path, JOB)
    for name in ("z", "a", "y"):
        record.append(name, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join((*lines[:2], HARMS[harm](lines[2]), lines[3])), errors="surrogateescape"
    )
    with pytest.warns(
        DamagedFileWarning,
        match=r"kept.jsonl: line 3 .*\. It is left out, and its result is computed again",
    ):
        again = Record(path, JOB)
    assert again.names == {"z", "y"}
    again.append("a", 3)
    with pytest.warns(DamagedFileWarning, match="line 3 "):
        assert dict(Record(path, JOB).results()) == {"z": 1, "y": 1, "a": 3}


def test_damaged_lines_are_named_together(tmp_path):
    """The first with its reason."""
    path = tmp_path / "kept.jsonl"
    Record(path, JOB).append("a", 1)
    with path.open("a") as file:
        file.write(20 * "what\n")
    with pytest.warns(
        DamagedFileWarning,
        match=r"line 3 is no JSON object \(also line 4, 5, 6, 7, 8, 9, 10, 11, 12\.\.\.\)",
    ):
        assert Record(path, JOB).names == {"a"}


def test_damaged_first_line_is_named(tmp_path):
    """The others belong to the job by their checksums."""
    path = tmp_path / "kept.jsonl"
    Record(path, JOB).append("a", 1)
    path.write_text(path.read_text().replace("conv0", "conv9", 1))
    with pytest.warns(
        DamagedFileWarning, match="line 1 is damaged, but the others are of this job"
    ):
        assert dict(Record(path, JOB).results()) == {"a": 1}
    with pytest.raises(
        ValueError, match=r"must hold results of this job. Got something else: name another file"
    ):
        Record(path, {**JOB, "k": 1.0})


def test_results_that_cannot_be_are_left_out(tmp_path):
    """What the reader knows of a result."""

    def positive(name, result):
        if result < 0:
            msg = f"{name} is negative"
            raise ValueError(msg)

    path = tmp_path / "kept.jsonl"
    record = Record(path, JOB)
    record.append("a", -1)
    record.append("b", 1)
    with pytest.warns(
        DamagedFileWarning, match="line 2 cannot be right: a is negative. It is left out"
    ):
        assert Record(path, JOB, positive).names == {"b"}


def test_file_of_an_older_version_is_read(tmp_path):
    """Its lines have no checksums, which is said; new ones do."""
    path = tmp_path / "kept.jsonl"
    path.write_text(json.dumps({"job": JOB}) + '\n{"name": "a", "result": 1}\n')
    with pytest.warns(
        DamagedFileWarning,
        match="of an older version: 1 of its lines have no checksum and are taken as they are",
    ):
        record = Record(path, JOB)
    record.append("b", 2)
    path.write_text(path.read_text().replace('"result": 2', '"result": 3'))
    with pytest.warns(DamagedFileWarning, match="line 3 does not match its checksum"):
        assert dict(Record(path, JOB).results()) == {"a": 1}


@pytest.mark.parametrize("seed", range(20))
def test_damage_drawn_at_random(tmp_path, seed):
    """A changed line is left out with a warning, cut off as half a line, or refuses the file."""
    path = tmp_path / "kept.jsonl"
    results = {f"image {n}": {"error": n / 7} for n in range(10)}
    record = Record(path, JOB)
    for name, result in results.items():
        record.append(name, result)
    before = path.read_text().splitlines()
    harm(tmp_path, seed)
    refusal = ""
    left = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            left = dict(Record(path, JOB).results())
        except ValueError as error:
            refusal = str(error)
    assert left.items() <= results.items()
    lost = [number for number, name in enumerate(results, start=2) if name not in left]
    cut = not path.exists() or len(path.read_bytes().splitlines()) < len(
        before
    )  # no line follows what is lost
    assert not lost or caught or "name another file" in refusal or cut
