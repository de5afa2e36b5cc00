"""The command bench."""

from pathlib import Path

from adjointbackmap.cli.frame import app, console, progress, use_threads


@app.command
def bench(
    *,
    only: str = "",
    repeats: int | None = None,
    quick: bool = False,
    out: Path | None = None,
    docs: Path | None = None,
    threads: int | None = None,
) -> None:
    """Measure time and memory beside named peers on an idle machine; stop it at any time and start it again to go on.

    Args:
        only: Part of the names of what to measure, such as vgg7, conv3 or classes.
        repeats: Runs of which the median is taken; 5 if left out, 1 with --quick.
        quick: A look at a part of it, not figures to keep.
        out: File of the finished entries; benchmark.json if left out, benchmark-quick.json with --quick.
        docs: Page to write the tables into, such as docs/speed.md.
        threads: Threads of the processor to use.

    Raises:
        RuntimeError: If the plan's choice is far slower than the best of the methods.
    """
    from adjointbackmap.benchmark.runs import PLACE
    from adjointbackmap.benchmark.runs import bench as run
    from adjointbackmap.benchmark.table import DEFECT, defects, markdown, short, where_measured

    use_threads(threads)
    if docs:
        PLACE.check(docs)
    file = out or Path("benchmark-quick.json" if quick else "benchmark.json")
    with progress("warming up") as (bar, job):
        found = run(
            file,
            only,
            quick,
            repeats,
            lambda name, share: bar.update(job, completed=share, description=name),
        )
    console.print(where_measured(found), highlight=False)
    for sheet in short(found["entries"]):
        console.print(sheet.rich())
    if docs:
        PLACE.fill(docs, markdown(found))
    console.print(f"Written: {file}{f' and {docs}' if docs else ''}")
    far = defects(found)
    if far:
        msg = f"The plan must be at most {DEFECT} times as slow as the best method. Got more in {', '.join(far)}."
        raise RuntimeError(msg)
