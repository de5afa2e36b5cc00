"""The command that opens the explorer."""

from adjointbackmap.cli.frame import (
    NO_NETWORK,
    app,
    check_extra,
    console,
    help_examples,
    use_threads,
)
from adjointbackmap.sources import NetworkOptions

EXPLORE_EXAMPLES = help_examples(
    "adjointbackmap explore",
    "adjointbackmap explore resnet20-cifar10 --image frog",
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
    """
    check_extra("explore", "explore", starlette="starlette", uvicorn="uvicorn")
    from adjointbackmap.explorer.running import serve
    from adjointbackmap.explorer.session import DEFAULT_NETWORK, Session
    from adjointbackmap.planes.query import bytes_of

    use_threads(threads)
    is_named = source.name is not None or source.model is not None
    chosen = source if is_named else NetworkOptions(DEFAULT_NETWORK, fold=source.fold)
    session = Session(chosen, bytes_of(memory), image)
    serve(session, host, port, browser, _told)


def _told(address: str) -> None:
    console.print(f"The explorer is at {address} (Ctrl-C ends it)", soft_wrap=True, highlight=False)
