"""Commands that repeat the experiments of the dissertation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from adjointbackmap.cli.frame import (
    app,
    check_device,
    check_extra,
    console,
    help_examples,
    progress,
    study_commands,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import Switch

TERMINAL_COLUMNS = 7  # more do not fit into a terminal
VERIFICATION_EXAMPLES = help_examples(
    "adjointbackmap study verification --network vgg7-cifar10 --images 100",
)
ALL_EXAMPLES = help_examples(
    "adjointbackmap study all --sample --images 20 --out study",
    "adjointbackmap study all --only noise --network vgg7-cifar10 --data FOLDER",
)


@study_commands.command(help_epilogue=VERIFICATION_EXAMPLES)
def verification(
    *,
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    images: int | None = None,
    images_float64: int | None = None,
    images_fc: int | None = None,
    images_widened: int | None = None,
    out: Path = Path("study-verification"),
    data: Path | None = None,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    docs: Path | None = None,
    results: Path | None = None,
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Verify every unit of every layer of the shipped networks over the test images.

    The tables compare with Tables 3.3 and 3.4, Figs. 2.4 and 2.5 of the dissertation. A stopped run
    continues when the same command is run again. A later run with more images computes only the
    new ones.

    Args:
        network: Names of the networks; all if left out.
        images: Number of test images in float32, in the order of their hashes. The default is all
            for VGG7 and 1,000 for ResNet20.
        images_float64: Number of images in float64, and in float32 with sums in float64. The
            default is 200 for VGG7 and 50 for ResNet20.
        images_fc: Number of images for the layer fc. The default is all test images.
        images_widened: Number of images with hyperplanes in float64 and the network's values in
            float32. The default is 1,000 for VGG7 and 100 for ResNet20.
        out: Folder for the finished images and the results (verification.json).
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        workers: Number of processes that share the images. With --device cuda, they share the GPUs.
        device: Where to compute.
        docs: Page to write the tables into, such as docs/verified-networks.md. Results and figures
            go into folders next to it.
        results: An earlier verification.json. Its page is made, and nothing is computed.
        threads: Number of processor threads. Workers share them.
        output: How tables are printed.

    Raises:
        ValueError: If --results is given without --docs.
        RuntimeError: If a unit is off in float64.
        KeyboardInterrupt: On Ctrl-C, after the tables of the finished images.
    """
    from adjointbackmap.study.verification.page import VERIFICATION_PLACE, off_in_float64
    from adjointbackmap.study.verification.results_file import RESULTS
    from adjointbackmap.study.verification.run import Counts, check_networks, verify_networks

    use_threads(threads)
    check_device(device)
    if workers is not None:
        check_extra("--workers", "cluster", distributed="Dask")
    chosen = check_networks(network)
    counts = Counts(images, images_float64, images_fc, images_widened)
    file = results or out / RESULTS
    if docs:
        VERIFICATION_PLACE.check(docs)
    elif results:
        msg = f"--results must come with the page to write. Got {results} alone: add --docs PAGE."
        raise ValueError(msg)
    if not results:
        with progress("study verification") as (bar, job):

            def report(what: str, share: float) -> None:
                if bar.tasks[job].description != what:
                    bar.reset(job, description=what)
                bar.update(job, completed=share)

            try:
                verify_networks(out, chosen, counts, data, workers, report, device=device)
            except KeyboardInterrupt:
                if file.exists():
                    _show_tables(file, docs, output)
                raise
    _check_float64(off_in_float64(_show_tables(file, docs, output)))


def _check_float64(off: Sequence[str]) -> None:
    """Check what is left of the float64 part.

    Raises:
        RuntimeError: If a network has units that are off.
    """
    if off:
        msg = (
            "Every unit must be within 1 % in float64. "
            f"Got some that are not, in {', '.join(off)}: see the tables."
        )
        raise RuntimeError(msg)


@study_commands.command(name="all", help_epilogue=ALL_EXAMPLES)
def everything(
    *,
    out: Path = Path("study"),
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    image: str | None = None,
    images: int = 100,
    seed: int = 0,
    data: Path | None = None,
    sample: Switch = False,
    threads: int | None = None,
) -> None:
    """Run all experiments of the dissertation on the shipped networks, and write one page.

    A stopped run continues when the same command is run again.

    Args:
        out: Folder for results, figures and report.html.
        network: Names of the networks; all if left out.
        only: Names of the experiments, all if left out: verification, pictures, noise, targets,
            scaled, many, attributions.
        image: Image of the experiments on one image: a class, or the first digits of a test image's
            hash. The default is the horse or the bird of the study.
        images: Number of images of the experiments on many images.
        seed: Seed of all draws.
        data: Folder of the official binary files. If left out: the folder that ADJOINTBACKMAP_DATA
            names, or a download.
        sample: Use only the 200 test images of CIFAR-10 that ship.
        threads: Number of processor threads.
    """
    from adjointbackmap.study.everything import check_experiments, run_experiments
    from adjointbackmap.study.setup import Setup, check_setup

    use_threads(threads)
    _check_study(check_experiments(only))
    setup = Setup(out, check_setup(network, images, sample), image, images, seed, data, sample)
    with progress("study") as (bar, job):

        def show(what: str, share: float) -> None:
            bar.update(job, completed=share, description=what)

        run_experiments(setup, check_experiments(only), show)
    report(out)


@app.command(help_epilogue=help_examples("adjointbackmap report study"))
def report(folder: Path, *, docs: Path | None = None) -> None:
    """Make report.html of a study again from its results: figures, tables, claims.

    With --docs, also the pages of the documentation.

    Args:
        folder: Folder that study all wrote. With --docs, also a summary that an earlier --docs
            wrote, such as docs/results/study.json.
        docs: Folder of the pages of the study, such as docs/study: its index.md has the two lines
            between which the table of pages goes. Figures and a summary go into the folders
            figures and results next to it.

    Raises:
        ValueError: If a summary is given without --docs, or no experiment has results.
    """
    from adjointbackmap.report.document import (
        INDEX,
        STUDY_PLACE,
        read_summary,
        write_document,
        write_pages,
    )
    from adjointbackmap.report.page import write_report
    from adjointbackmap.study.everything import EXPERIMENTS, about, sections
    from adjointbackmap.study.pages import PAGES

    if docs:
        STUDY_PLACE.check(docs / INDEX)
    if folder.is_file():
        if docs is None:
            msg = (
                "A summary must come with the folder of the pages. "
                f"Got {folder} alone: add --docs FOLDER."
            )
            raise ValueError(msg)
        pages = write_pages(read_summary(folder), docs, PAGES)
        console.print(f"Written: {', '.join(map(str, pages))}")
        return
    _check_study(())
    told = about(folder)
    if not any((folder / key).is_dir() for key in EXPERIMENTS):
        msg = (
            "The folder must hold the results of an experiment. "
            f"Got {folder}, where none was finished: run study all again."
        )
        raise ValueError(msg)
    found = sections(folder)
    written = [write_report(folder, found, told)]
    if docs:
        written += write_document(folder, found, docs, PAGES)
    console.print(f"Written: {', '.join(map(str, written))}")


def _check_study(experiments: Sequence[str]) -> None:
    """Raise before any work if a library is missing that experiments or the page need."""
    needed = {"jinja2": "Jinja2", "plotly": "Plotly"}
    if "attributions" in experiments:
        needed["captum"] = "Captum"
    if {"targets", "scaled"} & set(experiments):
        needed["sklearn"] = "scikit-learn"
    check_extra("The study", "study", **needed)


def _show_tables(file: Path, docs: Path | None, output: Output) -> dict[str, Any]:
    """Show the results of a file, write their page, and return the results."""
    from adjointbackmap.study.verification.page import show, write_page
    from adjointbackmap.study.verification.results_file import read_results

    found = read_results(file)
    columns = TERMINAL_COLUMNS if output == TABLES else None
    output.tables(console, *(sheet.rich(columns) for sheet in show(found)))
    written = write_page(found, file, docs) if docs else [file]
    output.text(console, f"Written: {', '.join(map(str, written))}")
    return found
