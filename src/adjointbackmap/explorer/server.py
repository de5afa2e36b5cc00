"""The explorer's server: the page, and the answers that it asks for."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from adjointbackmap.explorer import others, panels, whatif
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.explorer.worker import Worker

STATIC = Path(__file__).parent / "static"
MOST_BYTES = 20 * 2**20  # of an upload
NOT_WAITED_FOR = 204  # status of an answer that was dropped; the browser logs no error for it
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
Answer = bytes | dict[str, Any]
Ask = Callable[[Session, Place, Request, bytes], Answer]


def _edited(body: bytes) -> torch.Tensor:
    """Pixels in float64 from the body of a request.

    Raises:
        ValueError: If the body is no list of numbers.
    """
    if len(body) % 8 or not body:
        msg = f"An edited image must be numbers of float64. Got {len(body)} bytes."
        raise ValueError(msg)
    return torch.frombuffer(bytearray(body), dtype=torch.float64)


def _maps(session: Session, place: Place, request: Request, body: bytes) -> Answer:
    start, count = (int(request.query_params.get(name, 1)) for name in ("start", "count"))
    return panels.maps_answer(session, place, start, count)


def _breakpoints(session: Session, place: Place, request: Request, body: bytes) -> Answer:
    regions = int(request.query_params.get("regions", 1))
    return whatif.breakpoints_answer(session, place, _edited(body), regions)


# Name of a question -> what answers it, in the worker's thread.
QUESTIONS: dict[str, Ask] = {
    "network": lambda s, p, r, b: panels.network_answer(s, p),
    "overview": lambda s, p, r, b: panels.overview_answer(s, p),
    "samples": lambda s, p, r, b: panels.samples_answer(s),
    "maps": _maps,
    "unit": lambda s, p, r, b: panels.unit_answer(s, p),
    "modes": lambda s, p, r, b: panels.modes_answer(s, p),
    "others": lambda s, p, r, b: others.others_answer(s, p),
    "npz": lambda s, p, r, b: panels.npz_answer(s, p),
    "kink": lambda s, p, r, b: whatif.kink_answer(s, p),
    "boundary": lambda s, p, r, b: whatif.boundary_answer(s, p),
    "attack": lambda s, p, r, b: whatif.attack_answer(s, p),
    "whatif": lambda s, p, r, b: whatif.whatif_answer(s, p, _edited(b)),
    "breakpoints": _breakpoints,
    "upload": lambda s, p, r, b: {"id": s.add(b, r.query_params.get("name", "picture"))},
}

# These take seconds. They have a thread of their own, so that units are shown meanwhile.
SLOW = frozenset({"kink", "boundary", "attack", "breakpoints", "others"})


class Server:
    """The routes of the explorer, below a path with a token.

    Args:
        session: What can be shown.
        token: Text that each address must have; by default a new one.
    """

    def __init__(self, session: Session, token: str | None = None) -> None:
        self.session = session
        self.token = token or secrets.token_urlsafe(16)
        self.worker = Worker()
        self.slow = Worker()

    def app(self) -> Starlette:
        """The application, for any server of ASGI."""
        base = f"/{self.token}"
        routes = [
            Route(f"{base}/", self._page),
            Route(f"{base}/api/start", self._start),
            Route(f"{base}/api/{{question}}", self._ask, methods=["GET", "POST"]),
            Mount(f"{base}/static", StaticFiles(directory=STATIC)),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan)
        app.add_middleware(_Headers)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # the first network is traced while the browser opens the page
        first = partial(self.session.at, self.session.first_network, self.session.first_image)
        self.worker.submit("start", first)
        yield
        for worker in (self.worker, self.slow):
            await asyncio.to_thread(worker.close)

    async def _page(self, request: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    async def _start(self, request: Request) -> Response:
        """What the page shows first; it is known before the network is traced."""
        session = self.session
        return JSONResponse(
            {
                "networks": session.names(),
                "net": session.first_network,
                "img": session.first_image,
                "upload": MOST_BYTES,
            }
        )

    async def _ask(self, request: Request) -> Response:
        """Compute an answer in the worker, unless the browser stops waiting for it."""
        question = request.path_params["question"]
        asked = QUESTIONS.get(question)
        if asked is None:
            return JSONResponse({"error": "There is no such question."}, 404)
        body = await _body(request)
        if body is None:
            limit = MOST_BYTES // 2**20
            return JSONResponse({"error": f"A picture must have at most {limit} MiB."}, 413)
        words = request.query_params
        names = ("net", "img", "layer", "unit", "mode")
        place = Place(*(words.get(name, "") for name in names))
        channel = words.get("channel") or secrets.token_urlsafe(8)
        worker = self.slow if question in SLOW else self.worker
        work = worker.submit(channel, partial(asked, self.session, place, request, body))
        try:
            answer = await _unless_gone(request, asyncio.wrap_future(work))
        except asyncio.CancelledError:
            return Response(status_code=NOT_WAITED_FOR)
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            return JSONResponse({"error": str(error)}, 400)
        if answer is None:
            return Response(status_code=NOT_WAITED_FOR)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return Response(answer, media_type="application/octet-stream")


async def _body(request: Request) -> bytes | None:
    """The body of a request; ``None`` if it is too long."""
    parts = []
    length = 0
    async for part in request.stream():
        length += len(part)
        if length > MOST_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(request: Request, answer: "asyncio.Future[Answer]") -> Answer | None:
    """The answer; ``None`` if the browser closes the connection before it is there."""
    gone = asyncio.ensure_future(_closed(request.receive))
    try:
        both: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()  # of work that has begun, only the answer is dropped
            return None
        return answer.result()
    finally:
        gone.cancel()


async def _closed(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until the connection is closed."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Headers:
    """Adds headers to each answer: nothing is cached, and the page asks no other server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await self.app(scope, receive, with_headers)
