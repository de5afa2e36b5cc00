"""The command study calm."""

from functools import partial
from pathlib import Path

from adjointbackmap.cli.frame import console, help_examples, progress, study_commands, use_threads
from adjointbackmap.cli.output import TABLES, Output

EXAMPLES = help_examples(
    "adjointbackmap study calm runs/plain runs/adversarial runs/linear --out study-calm",
)


@study_commands.command(help_epilogue=EXAMPLES)
def calm(
    twin: Path,
    candidates: list[Path],
    *,
    images: int = 100,
    seed: int = 0,
    data: Path | None = None,
    out: Path = Path("study-calm"),
    docs: Path | None = None,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Compare networks that were trained for calm hyperplanes with their plain twin.

    The network is chosen on validation images, by the rule of docs/study-calm.md. Then the twin and
    the chosen network are measured on test images. A stopped run continues when the same command is
    run again.

    Args:
        twin: Folder of the plain training of the same seed, from adjointbackmap train.
        candidates: Folders of the other trainings.
        images: Number of images of each network, of those that it classifies correctly.
        seed: Seed of all draws.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        out: Folder for finished images and the results.
        docs: Page to write the tables into, such as docs/study-calm.md. Their numbers go into the
            folder results next to it.
        threads: Number of processor threads.
        output: How tables are printed.

    Raises:
        ValueError: If a folder has no finished training, or two have the same name.
    """
    from adjointbackmap.files.disk import hold_folder
    from adjointbackmap.study.calm.candidates import Candidate
    from adjointbackmap.study.calm.choice import CALM_PLACE, choose, other_sheet, outcome_sheet
    from adjointbackmap.study.calm.measure import measure_candidate
    from adjointbackmap.study.calm.page import RESULTS, write_calm_page
    from adjointbackmap.study.setup import write_json

    use_threads(threads)
    if docs:
        CALM_PLACE.check(docs)
    folders = _by_name([twin, *candidates])
    with hold_folder(out), progress("study calm") as (bar, job):

        def show(what: str, share: float) -> None:
            if bar.tasks[job].description != what:
                bar.reset(job, description=what)
            bar.update(job, completed=share)

        def measured(name: str, split: str) -> dict[str, object]:
            one = Candidate.of(folders[name], data, split)
            return measure_candidate(one, images, seed, out, partial(show, f"{name}: {split}"))

        found = {"validation": [measured(name, "validation") for name in folders], "test": []}
        choice = choose(found["validation"][0], found["validation"][1:])
        names = [twin.name, *([choice.title] if choice.title else [])]
        found["test"] = [measured(name, "test") for name in names]
        write_json(out / RESULTS, found)
    for split, networks in found.items():
        sheets = (outcome_sheet(f"{split} images", networks), other_sheet(networks))
        output.tables(console, *(sheet.rich() for sheet in sheets))
    output.text(console, f"Chosen: {choice.title or 'none'}; {choice.reason}")
    written = write_calm_page(found, docs) if docs else [out / RESULTS]
    output.text(console, f"Written: {', '.join(map(str, written))}")


def _by_name(folders: list[Path]) -> dict[str, Path]:
    """Name of a folder -> the folder.

    Raises:
        ValueError: If two have the same name.
    """
    found = {folder.name: folder for folder in folders}
    if len(found) != len(folders):
        msg = (
            "Each training must have a folder of its own name, which the tables show. "
            f"Got {', '.join(folder.name for folder in folders)}: rename one."
        )
        raise ValueError(msg)
    return found
