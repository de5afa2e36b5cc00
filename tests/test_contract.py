"""What users call keeps its name and its meaning: functions, classes, modules, commands."""

import contract
import pytest

import adjointbackmap as abm


def test_every_name_is_as_promised():
    """Signatures with their defaults, members of classes, functions of public modules."""
    assert list(contract.broken(contract.kept()["names"], contract.names())) == []


def test_every_option_is_as_promised():
    """All commands, all spellings, all defaults."""
    assert list(contract.broken(contract.kept()["commands"], contract.commands())) == []


def test_every_public_name_is_promised():
    """A new one is added by ``python tests/contract.py``."""
    assert sorted(contract.kept()["names"]) == sorted(abm.__all__)


BREACHES = {
    "name": ({"a": []}, {}, " / a is missing"),
    "parameter": (["x", "y"], ["x"], " takes (x), not (x, y)"),
    "order": (["x", "y"], ["y", "x"], " takes (y, x), not (x, y)"),
    "default": (["x = 1"], ["x = 2"], " takes (x = 2), not (x = 1)"),
    "needed": (["x"], ["x", "y"], " takes (x, y), not (x)"),
    "before": (["x = 1"], ["y = 2", "x = 1"], " takes (y = 2, x = 1), not (x = 1)"),
    "keyword": (["x = 1 (by name)"], [], " takes (), not (x = 1 (by name))"),
    "kind": ("attribute", [], " is [], not attribute"),
    "option": ({"--a": "1"}, {"--a": "2"}, " / --a is 2, not 1"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_found(breach):
    promised, found, message = BREACHES[breach]
    assert list(contract.broken(promised, found)) == [message]


@pytest.mark.parametrize(
    ("promised", "found"),
    [
        (["x"], ["x", "y = 1"]),
        (["x", "z (by name)"], ["x", "y = 1", "z (by name)"]),
        ({}, {"a": 1}),
    ],
)
def test_an_addition_is_no_breach(promised, found):
    assert list(contract.broken(promised, found)) == []
