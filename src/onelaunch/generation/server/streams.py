"""Responses that notice a client that leaves, or that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
STALLED_SECONDS = 300.0
"""How long a client may leave what was sent unread before its stream ends."""


def encode(data: Any) -> bytes:
    """JSON in UTF-8, compact."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class JsonResponse(Response):
    """JSON, compact."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class EventStream(Response):
    """Server-sent events from an iterator of bytes. Where the client leaves, or reads nothing for
    `STALLED_SECONDS`, the iterator is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await _until_gone(self._send_all(send), receive)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]

    async def _send_all(self, send: Send) -> None:
        async for events in self._events:
            async with asyncio.timeout(STALLED_SECONDS):
                await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of some work; None, and the work is cancelled, where the client has left."""
    return await _until_gone(work, request.receive)


async def _until_gone(work: Awaitable[T], receive: Callable[[], Awaitable[Any]]) -> T | None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
