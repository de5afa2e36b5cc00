"""The command that opens the explorer."""

from pathlib import Path
from typing import TYPE_CHECKING

from adjointbackmap.cli.frame import (
    NO_NETWORK,
    app,
    check_extra,
    console,
    help_examples,
    use_threads,
)
from adjointbackmap.sources import NetworkOptions

if TYPE_CHECKING:
    from adjointbackmap.explorer.session import Session

EXPLORE_EXAMPLES = help_examples(
    "adjointbackmap explore",
    "adjointbackmap explore resnet20-cifar10 --image frog",
    "adjointbackmap explore transformer-reviews",
    "adjointbackmap explore --export page.html",
    "adjointbackmap explore --model mine:build --weights mine.safetensors --size 64",
)


@app.command(help_epilogue=EXPLORE_EXAMPLES)
def explore(
    source: NetworkOptions = NO_NETWORK,
    *,
    image: str = "ship",
    port: int = 0,
    host: str = "127.0.0.1",
    browser: bool = True,
    memory: str = "2GiB",
    threads: int | None = None,
    export: Path | None = None,
    export_layer: str | None = None,
    export_size: str = "20MB",
    export_channels: int | None = None,
) -> None:
    """Open a page in the browser that shows the hyperplane of any unit and its receipt.

    The page works until Ctrl-C. It sends nothing to other machines.

    Args:
        source: The network that is shown first. The default is vgg7-cifar10.
        image: A sample image by number, the first sample image of a class, or a picture file.
        port: Port of the page. The default is a free one.
        host: Address to listen at. With another one than 127.0.0.1, other machines can open the
            page if they have its whole address.
        browser: Whether to open the browser.
        memory: Memory for the activation patterns of networks at images. The least recently used
            ones go first.
        threads: Number of processor threads.
        export: File to write, instead of opening a page: one page for this network at this image,
            which needs no server. It has all outputs and channels, and the units of one layer.
        export_layer: The layer whose units are in the file. The default is one in the middle.
        export_size: Largest size of the file. Channels whose units do not fit are left out.
        export_channels: Most channels of each layer in the file. The default is all.
    """
    check_extra("explore", "explore", starlette="starlette", uvicorn="uvicorn")
    from adjointbackmap.explorer.running import serve

    def session() -> "Session":
        from adjointbackmap.explorer.session import DEFAULT_NETWORK, Session
        from adjointbackmap.planes.query import bytes_of

        use_threads(threads)
        is_named = any((source.name, source.model, source.onnx))
        chosen = source if is_named else NetworkOptions(DEFAULT_NETWORK, fold=source.fold)
        made = Session(chosen, bytes_of(memory), image)
        made.check()  # bad options end the command, with a sentence here
        return made

    if export is None:
        serve(session, host, port, browser, _told)
    else:
        _export(session(), export, export_layer, export_size, export_channels)


def _export(
    session: "Session", path: Path, layer: str | None, size: str, channels: int | None
) -> None:
    """Write the explorer as one file, and say what is in it."""
    from adjointbackmap.explorer.export import exported
    from adjointbackmap.files import disk
    from adjointbackmap.planes.query import bytes_of

    with console.status("Computing the hyperplanes of the page"):
        page, counts = exported(session, layer, bytes_of(size), channels)
    disk.write(path, page.encode())
    units = ", ".join(f"{count:,} units of {name}" for name, count in counts.items())
    few = f"all outputs, at most {channels} channels of each layer"
    known = "all outputs and channels" if channels is None else few
    megabytes = len(page.encode()) / 1e6
    console.print(f"Written: {path}, {megabytes:.1f} MB: {known}, and {units}")


def _told(address: str) -> None:
    console.print(f"The explorer is at {address} (Ctrl-C ends it)", soft_wrap=True, highlight=False)
