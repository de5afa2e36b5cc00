"""Commands that repeat the experiments of the dissertation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from adjointbackmap.cli.frame import app, console, progress, study, use_threads

TERMINAL = 7  # columns that the terminal has room for


@study.command
def verification(
    *,
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    images: int | None = None,
    images_float64: int | None = None,
    images_fc: int | None = None,
    out: Path = Path("study-verification"),
    data: Path | None = None,
    workers: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    docs: Path | None = None,
    results: Path | None = None,
    threads: int | None = None,
) -> None:
    """Every unit of every layer of the shipped networks over the test images, beside Tables 3.3, 3.4, Figs. 2.4 and 2.5.

    Stop it at any time and start it again to go on where it was; a later run with more images only adds.

    Args:
        network: Only these networks.
        images: Test images in float32, by hash; if left out, all for VGG7 and 1,000 for ResNet20.
        images_float64: In float64, and in float32 with sums in float64; if left out, 200 for VGG7 and 50 for ResNet20.
        images_fc: For the layer fc; all test images if left out.
        out: Folder of finished images and of the results, verification.json.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        workers: So many processes share the images; with --device cuda, they share the cards.
        device: Where to compute.
        docs: Page to write the tables into, such as docs/verification.md; results and figures go into folders beside it.
        results: Make the page of this earlier verification.json, and compute nothing.
        threads: Threads of the processor to use; workers share them.

    Raises:
        ValueError: If --results is given without --docs.
        RuntimeError: If a unit is off in float64.
        KeyboardInterrupt: On Ctrl-C, after the tables of what is finished.
    """
    from adjointbackmap.study.verification.page import PLACE, off_in_float64
    from adjointbackmap.study.verification.run import RESULTS, Counts, check_networks, run

    use_threads(threads)
    chosen = check_networks(network)
    counts = Counts(images, images_float64, images_fc)
    file = results or out / RESULTS
    if docs:
        PLACE.check(docs)
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
                run(out, chosen, counts, data, workers, report, device=device)
            except KeyboardInterrupt:
                if file.exists():
                    _tell(file, docs)
                raise
    off = off_in_float64(_tell(file, docs))
    if off:
        msg = f"Every unit must be within 1 % in float64. Got some that are not, in {', '.join(off)}: see the tables."
        raise RuntimeError(msg)


@study.command(name="all")
def everything(
    *,
    out: Path = Path("study"),
    network: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    image: str | None = None,
    images: int = 100,
    seed: int = 0,
    data: Path | None = None,
    sample: bool = False,
    threads: int | None = None,
) -> None:
    """All experiments of the dissertation on the shipped networks, and one page that tells what was found.

    Stop it at any time and start it again to go on where it was.

    Args:
        out: Folder of results, figures and report.html.
        network: Only these networks.
        only: Only these experiments: verification, pictures, noise, targets, scaled, many, attributions.
        image: The image of the experiments on one image: a class, or the first digits of a test image's hash; the study's
            horse and bird if left out.
        images: How many images the experiments on many take.
        seed: Of every draw.
        data: Folder of the official binary files; else ADJOINTBACKMAP_DATA, else downloaded.
        sample: Take the 200 test images of CIFAR-10 that ship, and no other data.
        threads: Threads of the processor to use.
    """
    from adjointbackmap.study.everything import check_experiments, run
    from adjointbackmap.study.setup import Setup, check_setup

    use_threads(threads)
    setup = Setup(out, check_setup(network, images, sample), image, images, seed, data, sample)
    with progress("study") as (bar, job):
        run(
            setup,
            check_experiments(only),
            lambda what, share: bar.update(job, completed=share, description=what),
        )
    report(out)


@app.command
def report(folder: Path, *, docs: Path | None = None) -> None:
    """Make the page of a study again from its results alone: figures, tables, claims.

    Args:
        folder: What study all wrote.
        docs: Page to write claims and tables into, such as docs/study.md; the results go into a folder beside it.
    """
    from adjointbackmap.report.document import PLACE, write_document
    from adjointbackmap.report.page import write_report
    from adjointbackmap.study.everything import about, sections

    told = about(folder)
    if docs:
        PLACE.check(docs)
    found = sections(folder)
    written = [
        write_report(folder, found, told),
        *(write_document(folder, found, docs) if docs else []),
    ]
    console.print(f"Written: {', '.join(map(str, written))}")


def _tell(file: Path, docs: Path | None) -> dict[str, Any]:
    """Show the results in a file, write their page, and return them."""
    from adjointbackmap.study.verification.page import show, write_page
    from adjointbackmap.study.verification.run import read

    found = read(file)
    for sheet in show(found):
        console.print(sheet.rich(TERMINAL))
    console.print(
        f"Written: {', '.join(map(str, write_page(found, file, docs) if docs else [file]))}"
    )
    return found
