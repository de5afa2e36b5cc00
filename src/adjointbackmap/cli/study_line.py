"""The command study line."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adjointbackmap.cli.frame import console, help_examples, progress, study_commands, use_threads
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import Switch

NETWORKS = "cifar10"  # the ending of the networks that are measured by default
EXAMPLES = help_examples(
    "adjointbackmap study line --network vgg7-cifar10 --images 5 --sample",
    "adjointbackmap study line --images 100 --data FOLDER --docs docs/study-line.md",
)


@study_commands.command(help_epilogue=EXAMPLES)
def line(
    *,
    out: Path = Path("study"),
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    images: int = 100,
    seed: int = 0,
    data: Path | None = None,
    sample: Switch = False,
    docs: Path | None = None,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Find every linear region from images to their adversarial images of experiment 1.

    The tables show where on the segment the class changes, and how far the hyperplane of the label
    has turned by then; and the same for random images at the same distance. A stopped run continues
    when the same command is run again. Slow: minutes for an image.

    Args:
        out: Folder of the study. The results go into its folder line.
        network: Names of the networks; by default those of CIFAR-10.
        images: Number of images of each network, drawn from those that it classifies correctly.
        seed: Seed of the draws of images and random directions.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        sample: Use only the 200 test images of CIFAR-10 that ship.
        docs: Page to write the tables into, such as docs/study-line.md. Their numbers go into the
            folder results next to it.
        threads: Number of processor threads.
        output: How tables are printed.
    """
    from adjointbackmap.files.disk import hold_folder
    from adjointbackmap.study.adversarial.lines import compute_lines
    from adjointbackmap.study.adversarial.lines_page import (
        LINE_PLACE,
        line_tables,
        summarised,
        write_line_page,
    )
    from adjointbackmap.study.setup import Setup, check_setup

    use_threads(threads)
    if docs:
        LINE_PLACE.check(docs)
    able = check_setup(network, images, sample)
    names = tuple(name for name in able if network or name.endswith(NETWORKS))
    setup = Setup(out, names, None, images, seed, data, sample)
    with hold_folder(out), progress("study line") as (bar, job):

        def show(what: str, share: float) -> None:
            if bar.tasks[job].description != what:
                bar.reset(job, description=what)
            bar.update(job, completed=share)

        folder = compute_lines(setup, show)
    found = summarised(folder)
    output.tables(console, *(sheet.rich() for sheet in line_tables(found)))
    written = write_line_page(found, docs) if docs else [folder]
    output.text(console, f"Written: {', '.join(map(str, written))}")
