"""The page of calm networks, made from the results alone."""

from pathlib import Path
from typing import Any

from adjointbackmap.files.checked import sealed_text
from adjointbackmap.files.disk import write
from adjointbackmap.study.calm.choice import (
    CALM_PLACE,
    choose,
    other_sheet,
    outcome_sheet,
    turn_ratio,
    verdict,
)

RESULTS = "study-calm.json"


def calm_markdown(found: dict[str, Any]) -> str:
    """What was chosen, and all tables.

    Args:
        found: ``"validation"`` and ``"test"``, each a list of networks; the first is the plain one.
    """
    twin, *candidates = found["validation"]
    choice = choose(twin, candidates)
    parts = [f"Chosen: {choice.title or 'none'}; {choice.reason}."]
    tested = {one["title"]: one for one in found["test"]}
    if choice.title in tested:
        first = found["test"][0]
        ratio = turn_ratio(first, tested[choice.title])
        parts.append(
            f"On test images its median turn at 2/255 under PGD is {ratio} of the plain network's "
            f"(95 % interval over images). The aim of half is {verdict(ratio)}."
        )
    for split in ("validation", "test"):
        networks = found[split]
        if networks:
            count = len(networks[0]["images"])
            parts += [
                f"### {split.capitalize()} images, {count} of each network",
                outcome_sheet("", networks).markdown(),
                other_sheet(networks).markdown(),
            ]
    return "\n\n".join(parts)


def write_calm_page(found: dict[str, Any], page: Path) -> list[Path]:
    """Write the tables into the page, and their numbers into the folder results next to it.

    Args:
        found: See :func:`calm_markdown`.
        page: The page.
    """
    CALM_PLACE.fill(page, calm_markdown(found))
    return [page, write(page.parent / "results" / RESULTS, sealed_text(found).encode())]
