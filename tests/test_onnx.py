"""Errors of ONNX files that need no library; tests/optional/test_others.py has the networks."""

import importlib
from pathlib import Path

import pytest

import adjointbackmap as abm
from adjointbackmap.sources import NetworkOptions, load_subject


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an ONNX file. Got .*no.onnx"):
        abm.onnx.load(tmp_path / "no.onnx")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").touch()
    import_module = importlib.import_module

    def without(name, *package):
        if name == "onnx":
            msg = "No module named 'onnx'"
            raise ImportError(msg)
        return import_module(name, *package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        ImportError, match=r"Got No module .*: pip install 'adjointbackmap\[onnx\]'"
    ):
        abm.onnx.load(tmp_path / "a.onnx")


@pytest.mark.parametrize("other", [{"weights": Path("w")}, {"shape": (1, 2, 2)}])
def test_options_of_modules_do_not_fit(tmp_path, other):
    with pytest.raises(ValueError, match=r"must come with --model. Got --onnx"):
        load_subject(NetworkOptions(onnx=tmp_path / "a.onnx", **other))
