"""The command bench."""

from pathlib import Path

from adjointbackmap.cli.frame import app, console, help_examples, progress, use_threads
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import Switch


@app.command(
    help_epilogue=help_examples("adjointbackmap bench --quick", "adjointbackmap bench --only conv3")
)
def bench(
    *,
    only: str = "",
    repeats: int | None = None,
    quick: Switch = False,
    out: Path | None = None,
    docs: Path | None = None,
    threads: int | None = None,
    before: Path | None = None,
    output: Output = TABLES,
) -> None:
    """Measure time and memory of this package and of other libraries on an idle machine.

    A stopped run continues when the same command is run again.

    Args:
        only: Part of the names of the entries to measure, such as vgg7, conv3 or classes.
        repeats: Number of runs; the median of their times is taken. The default is 5, or 1 with
            --quick.
        quick: Measure a part of the entries, for a quick look.
        out: File for the finished entries. The default is benchmark.json, or benchmark-quick.json
            with --quick.
        docs: Page to write the tables into, such as docs/speed.md.
        threads: Number of processor threads.
        before: Worktree of an older commit, whose package is measured in the same run.
        output: How tables are printed.

    Raises:
        RuntimeError: If the plan's choice is much slower than the fastest method.
    """
    from adjointbackmap.benchmark.figures import DEFECT, defects
    from adjointbackmap.benchmark.runs import SPEED_PLACE, run_benchmark
    from adjointbackmap.benchmark.table import short, speed_markdown, where_measured

    use_threads(threads)
    if docs:
        SPEED_PLACE.check(docs)
    file = out or Path("benchmark-quick.json" if quick else "benchmark.json")
    with progress("warming up") as (bar, job):

        def report(name: str, share: float) -> None:
            bar.update(job, completed=share, description=name)

        found = run_benchmark(file, only, quick, repeats, report, before)
    output.text(console, where_measured(found))
    output.tables(console, *(sheet.rich() for sheet in short(found)))
    if docs:
        SPEED_PLACE.fill(docs, speed_markdown(found))
    page = f" and {docs}" if docs else ""
    output.text(console, f"Written: {file}{page}")
    far = defects(found)
    if far:
        msg = (
            f"The plan must be at most {DEFECT} times as slow as the best method. "
            f"Got more in {', '.join(far)}."
        )
        raise RuntimeError(msg)
