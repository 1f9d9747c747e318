"""Answers on their way to a client, for as long as it is there: whole, or as server-sent events.

In: the pieces of a request's sequences. Out: bytes of HTTP. However it ends, its sequences end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from owl_deploy.serve.answers import Answers
from owl_deploy.serve.errors import ApiError, error_body, error_response
from owl_deploy.serve.scheduler import Scheduler
from owl_deploy.serve.sequence import Failure, Piece, Sequence

__all__ = ["GONE", "EventStream", "Running", "stopping", "whole_answer"]

GONE = Response(status_code=499)
"""For a client that is no longer there to read it; its status is for the metrics."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Running:
    """A request that the scheduler has."""

    scheduler: Scheduler
    sequences: list[Sequence]
    pieces: asyncio.Queue[Piece]
    answers: Answers

    @contextlib.asynccontextmanager
    async def while_connected(self, receive: Receive, limit_s: float = math.inf) -> AsyncIterator[None]:
        """Leave the block when the client goes away or the time is over; however it is left, the sequences end."""
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                group.cancel_scope.deadline = anyio.current_time() + limit_s
                yield
                group.cancel_scope.cancel()
        finally:
            self.scheduler.cancel(self.sequences)

    async def next_piece(self) -> Piece:
        """Wait for a piece and take it in."""
        piece = await self.pieces.get()
        self.answers.add(piece)
        return piece


async def whole_answer(running: Running, receive: Receive) -> Response:
    """Wait for all answers of a request and return them."""
    response = GONE
    async with running.while_connected(receive):
        response = await _collected(running)
    return response  # noqa: RET504  (the block may be left in its middle)


async def _collected(running: Running) -> Response:
    while running.answers.n_open:
        piece = await running.next_piece()
        if piece.failure is not None:
            return error_response(_failed(piece.failure))
    return JSONResponse(running.answers.whole())


class EventStream(Response):
    """Chunks as they come. A failure before the first token has a status of its own, a later one is an event."""

    def __init__(self, running: Running, limit_s: float) -> None:
        """Stream the answers of a request; a client that has not read them in `limit_s` seconds is cut off."""
        super().__init__(headers=_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._running, self._limit_s = running, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        async with self._running.while_connected(receive, self._limit_s):
            piece = await self._running.next_piece()
            if piece.failure is not None:
                await error_response(_failed(piece.failure))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events(piece):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _events(self, piece: Piece) -> AsyncIterator[bytes]:
        """Yield the events from the first piece on."""
        answers = self._running.answers
        for document in answers.opening():
            yield _event(document)
        while True:
            if piece.failure is not None:
                yield _event(error_body(_failed(piece.failure)))
                return
            if (chunk := answers.chunk(piece)) is not None:
                yield _event(chunk)
            if not answers.n_open:
                break
            piece = await self._running.next_piece()
        for document in answers.closing():
            yield _event(document)
        yield b"data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def stopping() -> ApiError:
    """Return what a request is told that comes while the server ends."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5", "Connection": "close"})


def _failed(failure: Failure) -> ApiError:
    """Return what a client is told of a sequence that has no end."""
    if failure is Failure.NOT_STARTED:
        return ApiError(503, failure.value, code="not_started", headers={"Retry-After": "5"})
    if failure is Failure.CLOSED:
        return stopping()
    return ApiError(500, failure.value, code="engine_failed")
