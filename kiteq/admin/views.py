"""The answers of the HTTP port: what the broker reports, as JSON or as Prometheus reads it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kiteq.admin.metrics import CONTENT_TYPE, read_figures, render
from kiteq.pipe import reports

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from kiteq.pipe.core import Core

__all__ = ["application", "bounded"]

ANSWER_SECONDS_MAX: Final = 10.0
"""An answer that is not made within this is given up, with status 503."""
RENDERED_AT_ONCE: Final = 1
"""Answers become text in threads; with very many groups that takes seconds of a processor."""

JSON_TYPE: Final = "application/json"
NOT_KEPT: Final = {"cache-control": "no-store"}

log = structlog.get_logger()


class _Views:
    """One method for each path. What is read is read on the loop, what is written as text in a thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._threads = trio.CapacityLimiter(RENDERED_AT_ONCE)

    async def stat(self, _request: Request) -> Response:
        """Answer with counters and sizes."""
        return await self._json(await reports.stat(self._core))

    async def binds(self, _request: Request) -> Response:
        """Answer with every binding, by topic and group."""
        return await self._json(await reports.bindings_by_topic(self._core))

    async def healthz(self, _request: Request) -> Response:
        """Answer 200 while the broker serves, else 503; with the reasons when something is wrong."""
        health = reports.health(self._core)
        answer: dict[str, Any] = {"status": health.status}
        if health.reasons:
            answer["reasons"] = health.reasons
        return _json_response(answer, 503 if health.status == "unavailable" else 200)

    async def metrics(self, _request: Request) -> Response:
        """Answer with what Prometheus scrapes."""
        return await self._text(render, await read_figures(self._core), CONTENT_TYPE)

    async def _json(self, value: Any) -> Response:
        return await self._text(_json_line, value, JSON_TYPE)

    async def _text(self, write: Callable[[Any], bytes], value: Any, media_type: str) -> Response:
        text = await trio.to_thread.run_sync(write, value, limiter=self._threads)
        return Response(text, 200, NOT_KEPT, media_type)


def _json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _json_response(value: Any, status: int) -> Response:
    return Response(_json_line(value), status, NOT_KEPT, JSON_TYPE)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json_response({"error": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


def application(core: Core) -> ASGIApp:
    """Return the ASGI application that answers for a broker."""
    views = _Views(core)
    paths: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/stat": views.stat,
        "/binds": views.binds,
        "/healthz": views.healthz,
        "/metrics": views.metrics,
    }
    routes = [Route(path, view) for path, view in paths.items()]
    answering = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
    answering.router.redirect_slashes = False
    return bounded(answering)


def bounded(application: ASGIApp) -> ASGIApp:
    """Return an application whose answers take at most `ANSWER_SECONDS_MAX`, and whose defects are logged."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False

        async def note_and_send(message: Any) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        with trio.move_on_after(ANSWER_SECONDS_MAX) as time:
            try:
                await application(scope, receive, note_and_send)
            except Exception:
                log.exception("an HTTP request failed", path=scope["path"])
        if time.cancelled_caught and not is_begun:
            await _json_response({"error": "this takes too long now"}, 503)(scope, receive, send)

    return answer
