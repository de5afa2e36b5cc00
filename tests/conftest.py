"""Fixtures of the engine's tests: every network of the catalogue, traced once."""

import os
from dataclasses import dataclass
from typing import Any

import pytest
from cases import CASES, LARGER, OPERATIONS, make, operation_case
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

pytest.register_assert_rewrite("checks")

# random networks: the same few in every run, or thousands of new ones with `make random`
settings.register_profile(
    "few", max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
MOST = int(os.environ.get("RANDOM_NETWORKS", "5000"))
settings.register_profile(
    "random",
    parent=settings.get_profile("few"),
    max_examples=MOST,
    derandomize=False,
    print_blob=True,
)
settings.load_profile("few")


@dataclass(frozen=True)
class Traced:
    """A network of the catalogue with its module and two images; tests leave all of it as it is."""

    name: str
    model: nn.Module
    x: Tensor
    network: Any


@pytest.fixture(scope="session")
def traced_case():
    """Trace a network or an operation of the catalogue, or a larger network, by its name, once."""
    from adjointbackmap import trace  # not above: pytest's option for the shapes must come first

    seen: dict[str, Traced] = {}

    def get(name: str) -> Traced:
        if name not in seen:
            model, x = make(
                name if name in CASES else LARGER.get(name, lambda: operation_case(name))
            )
            seen[name] = Traced(name, model, x, trace(model, x))
        return seen[name]

    return get


@pytest.fixture(scope="session", params=CASES)
def traced(request, traced_case):
    """Every network of the catalogue in turn."""
    return traced_case(request.param)


@pytest.fixture(scope="session", params=OPERATIONS)
def operation(request, traced_case):
    """Every operation of the catalogue in turn, each after a layer with a bias."""
    return traced_case(request.param)
