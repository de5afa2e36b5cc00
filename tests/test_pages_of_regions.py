"""The pages of linear regions and of exact gradients show the committed results."""

import json
from pathlib import Path

import integrals
import pytest
import regions
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"published-regions": (regions, "regions"), "exact-gradients": (integrals, "integrals")}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_the_results(page):
    """Between the marks stands what the command writes."""
    command, results = PAGES[page]
    found = json.loads((DOCS / "results" / f"{results}.json").read_text())
    text = (DOCS / f"{page}.md").read_text()
    place = command.PLACE
    assert f"{place.begin}\n\n{command.markdown(found)}\n\n{place.end}" in text


def test_exact_integrals_are_complete():
    """The truth that the rules are compared with sums to the change, for every image."""
    found = json.loads((DOCS / "results" / "integrals.json").read_text())
    for one in found["networks"].values():
        assert all(part["gap"] < 1e-12 for part in one["baselines"].values())


@pytest.mark.parametrize("rule", integrals.RULES)
def test_rules_integrate_what_they_must(rule):
    """The integral of t^3 on [0, 1] is 1/4; weights of every rule sum to 1."""
    places, weights = integrals.RULES[rule](200)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights @ places**3) == pytest.approx(0.25, abs=3e-3)


def test_shared_places_give_each_rule():
    """One pass over all places gives the sums of every rule alone."""
    places, weights = integrals.sampling()
    values = torch.sin(5 * places)
    for i, rule in enumerate(integrals.RULES.values()):
        for j, n in enumerate(integrals.STEPS):
            own, of_own = rule(n)
            assert float(weights[i, j] @ values) == pytest.approx(
                float(of_own @ torch.sin(5 * own))
            )


def test_needed_gradients():
    """The number from which on all errors are small enough."""
    errors = [0.2, 0.04, 0.06, 0.04, 0.03, 0.02, 0.02, 0.02]
    assert integrals.needed(errors, 0.05) == 30
    assert integrals.needed(errors, 0.01) == float("inf")


def test_five_in_a_row():
    """Against a plain search."""
    for gaps in ({7, 8, 14}, {3}, set(range(1, 40))):
        held = [n for n in range(1, 60) if all(k not in gaps for k in range(n, n + 5))]
        assert integrals.five_in_a_row(lambda n, gaps=gaps: n not in gaps) == held[0]
    assert integrals.five_in_a_row(lambda n: n % 5 != 0) is None


def test_medians_of_more_images_stay():
    """Each part comes from the results that have more images."""
    found = json.loads((DOCS / "results" / "regions.json").read_text())["networks"]["base"]
    fewer = json.loads(json.dumps(found))
    fewer["images"] |= {"points": 1, "lines": 500}
    fewer["biases"] = fewer["pgd"]["turn"] = [0.0, 0.0, 0.0]
    fewer["pgd"]["regions"] = [9.0, 9.0, 9.0]
    merged = regions.of_more_images(fewer, json.loads(json.dumps(found)))
    assert merged["biases"] == found["biases"]
    assert merged["pgd"]["turn"] == found["pgd"]["turn"]
    assert merged["pgd"]["regions"] == [9.0, 9.0, 9.0]
    assert merged["images"] == found["images"] | {"lines": 500}


def test_medians_have_intervals():
    """The interval of a constant is the constant; that of many numbers holds the median."""
    assert regions.spread([2.0] * 9) == [2.0, 2.0, 2.0]
    median, low, high = regions.spread(range(101))
    assert low < median == 50 < high


def test_a_missing_folder_is_one_sentence():
    with pytest.raises(SystemExit, match="--folder or ADJOINTBACKMAP_REAL must be a folder"):
        regions.load("resnet2b", None)
