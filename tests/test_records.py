"""Records: what is appended is read back, a half-written line is dropped, the file of another job is refused."""

import json

import pytest

from adjointbackmap.records import Record

JOB = {
    "weights sha256": "f2a2e56ce8c79882a257efd9b54b44aa26bfc9e45b09b620a9f56cad4277565f",
    "k": 0.125,
    "layers": ["conv0", "fc"],
}


def test_results_are_read_back(tmp_path):
    """In another folder that is made, by another object, with the floats and the NaN that were written."""
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
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"job": JOB}, {"name": "a", "result": 1}]


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
    first, second = Record(path, JOB), Record(path, JOB)
    first.append("a", 1)
    second.append("a", 1)
    assert list(Record(path, JOB).results()) == [("a", 1)]


def test_file_of_another_job_is_refused(tmp_path):
    """The message names what differs, all of it, and is short; the file is left as it was."""
    path = tmp_path / "kept.jsonl"
    Record(path, JOB).append("a", 1)
    before = path.read_bytes()
    expected = (
        r"kept.jsonl must hold results of this job. Got those of another \(weights sha256 f2a2e56ce8c7..., not 0000; "
        r"k 0.125, not 1.0\): name another file."
    )
    with pytest.raises(ValueError, match=expected):
        Record(path, {**JOB, "weights sha256": "0000", "k": 1.0})
    assert path.read_bytes() == before


FOREIGN = {"empty": "{}\n", "list": "[]\n", "text": "what\nelse", "line": "what", "less": '{"job": {"k": 0.125}}\n'}


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_of_something_else_is_refused(tmp_path, kind):
    """Nothing is appended to a file that is no record, and nothing is cut off."""
    path, text = tmp_path / "notes.txt", FOREIGN[kind]
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes.txt must hold results of this job. Got (something else|those of another)"):
        Record(path, JOB)
    assert path.read_text() == text


def test_damaged_line_is_named(tmp_path):
    """In the midst of a file no line is passed over in silence."""
    path = tmp_path / "kept.jsonl"
    record = Record(path, JOB)
    record.append("a", 1)
    record.append("b", 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "what\n" + lines[2])
    with pytest.raises(ValueError, match=r"must hold one JSON object a line. Got none in line 2: delete that line, or the file"):
        Record(path, JOB)
