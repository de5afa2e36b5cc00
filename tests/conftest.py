"""Fixtures of the engine's tests: every network of the catalogue, traced once."""

from dataclasses import dataclass
from typing import Any

import pytest
from cases import CASES, make
from torch import Tensor, nn


@dataclass(frozen=True)
class Traced:
    """A network of the catalogue with its module and two images; tests leave all of it as it is."""

    name: str
    model: nn.Module
    x: Tensor
    network: Any


@pytest.fixture(scope="session")
def traced_case():
    """Trace a network of the catalogue by its name, once."""
    from adjointbackmap import trace  # not above: pytest's option for the shapes must come first

    seen: dict[str, Traced] = {}

    def get(name: str) -> Traced:
        if name not in seen:
            model, x = make(name)
            seen[name] = Traced(name, model, x, trace(model, x))
        return seen[name]

    return get


@pytest.fixture(scope="session", params=CASES)
def traced(request, traced_case):
    """Every network of the catalogue in turn."""
    return traced_case(request.param)
