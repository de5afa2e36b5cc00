"""The explorer's server: the page, and the answers that it asks for.

The page is served at once. PyTorch, which takes seconds to import, is loaded meanwhile.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from adjointbackmap.explorer.pages import MOST_BYTES, REFUSED, STATIC

if TYPE_CHECKING:
    from adjointbackmap.explorer.questions import Answer, Desk
    from adjointbackmap.explorer.session import Session

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


class Server:
    """The routes of the explorer, below a path with a token.

    Args:
        session: What can be shown, or a function that makes it while the page opens.
        token: Text that each address must have; by default a new one.

    Attributes:
        error: What went wrong when the session was made.
        failed: Called when something went wrong.
    """

    def __init__(
        self, session: "Session | Callable[[], Session]", token: str | None = None
    ) -> None:
        self._session = session
        self.token = token or secrets.token_urlsafe(16)
        self.error: Exception | None = None
        self.failed: Callable[[], None] = lambda: None

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
        # PyTorch is imported, and the first network traced, while the browser opens the page
        self._opening = asyncio.ensure_future(asyncio.to_thread(self._opened))
        yield
        await asyncio.wait([self._opening])
        if self._opening.exception() is None:  # asking for it also says that it was seen
            await asyncio.to_thread(self._opening.result().close)

    def _opened(self) -> "Desk":
        """Make the session, and begin with its first network."""
        try:
            from adjointbackmap.explorer.questions import Desk

            desk = Desk(self._session() if callable(self._session) else self._session)
        except Exception as error:
            self.error = error
            self.failed()
            raise
        desk.prepare()
        return desk

    async def _desk(self) -> "Desk":
        """Who answers, once PyTorch is there."""
        return await asyncio.shield(self._opening)

    async def _page(self, request: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    async def _start(self, request: Request) -> Response:
        try:
            desk = await self._desk()
        except REFUSED as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse(desk.start())

    async def _ask(self, request: Request) -> Response:
        """Compute an answer in the worker, unless the browser stops waiting for it."""
        question = request.path_params["question"]
        desk = await self._desk()
        if question not in desk.questions:
            return JSONResponse({"error": "There is no such question."}, 404)
        body = await _body(request)
        if body is None:
            limit = MOST_BYTES // 2**20
            return JSONResponse({"error": f"A picture must have at most {limit} MiB."}, 413)
        words = request.query_params
        channel = words.get("channel") or secrets.token_urlsafe(8)
        work = desk.ask(question, words, body, channel)
        try:
            answer = await _unless_gone(request, asyncio.wrap_future(work))
        except asyncio.CancelledError:
            return Response(status_code=NOT_WAITED_FOR)
        except REFUSED as error:
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


async def _unless_gone(request: Request, answer: "asyncio.Future[Answer]") -> "Answer | None":
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
