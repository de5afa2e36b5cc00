"""The server at work: an address on this machine, the browser, and a clean end."""

import socket
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

from adjointbackmap.explorer.server import Server

if TYPE_CHECKING:
    from adjointbackmap.explorer.session import Session

SECONDS = 2  # that answers get to finish after Ctrl-C


def serve(
    session: "Session | Callable[[], Session]",
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = True,
    told: Callable[[str], None] = print,
) -> None:
    """Serve the explorer until Ctrl-C.

    Args:
        session: What can be shown, or a function that makes it. The page opens before.
        host: Address to listen at.
        port: Port; 0 for a free one.
        open_browser: Whether to open the page.
        told: Gets the address of the page.

    Raises:
        OSError: If the port is taken.
        Exception: If the session cannot be made.
    """
    import uvicorn

    server = Server(session)
    with _listening(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}/{server.token}/"
        told(address)
        if open_browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            server.app(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SECONDS,
        )
        running = uvicorn.Server(config)
        server.failed = lambda: setattr(running, "should_exit", True)
        running.run(sockets=[listening])
    if server.error is not None:
        raise server.error


def _listening(host: str, port: int) -> socket.socket:
    """A socket that already accepts connections, so that the browser can come early.

    Raises:
        OSError: If the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay only if the socket names its protocol; else each answer waits some
    # 40 ms for an acknowledgement
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
    except OSError as error:
        made.close()
        msg = f"--port must be free. Got {host}:{port}, where {error.strerror}: choose another."
        raise OSError(msg) from error
    return made
