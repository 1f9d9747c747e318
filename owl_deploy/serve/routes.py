"""HTTP: requests are checked, handed to the scheduler, and answered in OpenAI's forms.

In: an open model and a running scheduler. Out: an ASGI application. It starts and stops nothing. Prompts and answers
are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import anyio
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owl_deploy.serve.answers import ChatAnswers, TextAnswers
from owl_deploy.serve.errors import ApiError, error_response, invalid_request
from owl_deploy.serve.event_stream import GONE, EventStream, Running, stopping, whole_answer
from owl_deploy.serve.metrics import CONTENT_TYPE_PLAIN_0_0_4, ServerMetrics
from owl_deploy.serve.model import ServedModel
from owl_deploy.serve.openapi import openapi_document
from owl_deploy.serve.prompts import read_prompts
from owl_deploy.serve.scheduler import Draining, QueueFull, Scheduler
from owl_deploy.serve.schemas import ChatRequest, CompletionRequest
from owl_deploy.serve.sequence import Piece
from owl_deploy.serve.settings import ServeSettings

__all__ = ["Service", "application"]

# Seconds behind a request's time limit in which its last bytes may still be sent to a client that reads slowly.
_GRACE_S = 5.0
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Service:
    """What routes work with."""

    model: ServedModel
    scheduler: Scheduler
    metrics: ServerMetrics
    settings: ServeSettings
    key: SecretStr | None


def application(service: Service) -> ASGIApp:
    """Return the application of a service."""
    document = openapi_document(service.model, service.settings, has_key=service.key is not None)
    asked = {"GET"}
    routes = [
        Route("/v1/models", _guarded(service, _models(service)), methods=asked),
        Route("/v1/models/{name:path}", _guarded(service, _one_model(service)), methods=asked),
        Route(
            "/v1/completions",
            _guarded(service, _answering(service, CompletionRequest, TextAnswers)),
            methods={"POST"},
        ),
        Route(
            "/v1/chat/completions",
            _guarded(service, _answering(service, ChatRequest, ChatAnswers)),
            methods={"POST"},
        ),
        *(Route(path, _live(service), methods=asked) for path in ("/health/live", "/v2/health/live")),
        *(Route(path, _ready(service), methods=asked) for path in ("/health/ready", "/v2/health/ready")),
        Route("/metrics", _metrics(service), methods=asked),
        Route("/openapi.json", _fixed(JSONResponse(document)), methods=asked),
        *(Route(path, _fixed(_page(*file)), methods=asked) for path, file in _PAGE.items()),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        HTTPException: _on_http_exception,
        ClientDisconnect: _on_disconnect,
        500: _on_defect,
    }
    paths = frozenset(route.path for route in routes)
    return _counted(Starlette(routes=routes, exception_handlers=handlers), service.metrics, paths)


Endpoint = Callable[[Request], Awaitable[Response]]


def _guarded(service: Service, endpoint: Endpoint) -> Endpoint:
    """Let requests through that carry the key, where there is one."""
    if service.key is None:
        return endpoint
    expected = f"Bearer {service.key.get_secret_value()}".encode()

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, expected):
            raise ApiError(
                401,
                "the request carries no valid API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await endpoint(request)

    return guarded


def _fixed(response: Response) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return response

    return endpoint


def _page(name: str, media_type: str) -> Response:
    content = files("owl_deploy.serve").joinpath("page", name).read_bytes()
    return Response(content, headers=_PAGE_HEADERS, media_type=media_type)


def _models(service: Service) -> Endpoint:
    return _fixed(JSONResponse({"object": "list", "data": [service.model.describe()]}))


def _one_model(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        if request.path_params["name"] != service.model.name:
            raise ApiError(404, f"there is no such model here, only {service.model.name!r}", code="model_not_found")
        return JSONResponse(service.model.describe())

    return endpoint


def _live(service: Service) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        if not service.scheduler.is_alive:
            raise ApiError(503, "the engine no longer works: restart the server", code="engine_failed")
        return JSONResponse({"status": "ok"})

    return endpoint


def _ready(service: Service) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        if service.scheduler.is_draining:
            raise stopping()
        return await _live(service)(_)

    return endpoint


def _metrics(service: Service) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return endpoint


def _answering(
    service: Service,
    kind: type[CompletionRequest] | type[ChatRequest],
    answers_of: type[TextAnswers] | type[ChatAnswers],
) -> Endpoint:
    """Return the endpoint that has the engine answer bodies of one kind."""
    settings = service.settings

    async def endpoint(request: Request) -> Response:
        arrived = time.monotonic()
        body = await _body(request, settings)
        try:
            parsed = kind.model_validate_json(body)
        except ValidationError as error:
            raise invalid_request(error) from None
        prompts = await anyio.to_thread.run_sync(
            lambda: read_prompts(
                parsed, service.model, max_tokens=settings.max_tokens, max_sequences=settings.batch_size
            )
        )
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        sequences = prompts.sequences(
            service.model,
            client=request.client.host if request.client else "",
            arrived=arrived,
            deadline=arrived + settings.request_timeout_s,
            emit=_told_to(pieces),
        )
        try:
            service.scheduler.submit(sequences)
        except QueueFull as full:
            raise ApiError(
                429,
                "too many requests are waiting",
                code="queue_full",
                headers={"Retry-After": str(full.retry_after_s)},
            ) from None
        except Draining:
            raise stopping() from None
        running = Running(service.scheduler, sequences, pieces, answers_of(service.model, prompts))
        if prompts.is_streamed:
            return EventStream(running, settings.request_timeout_s + _GRACE_S)
        return await whole_answer(running, request.receive)

    return endpoint


def _told_to(pieces: asyncio.Queue[Piece]) -> Callable[[Piece], None]:
    """Return a function that puts pieces into a queue of the running event loop, from the engine's thread."""
    loop = asyncio.get_running_loop()

    def emit(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return emit


async def _body(request: Request, settings: ServeSettings) -> bytes:
    """Read a body of JSON. Raises ApiError when it is too large, too slow or of another type."""
    # This also keeps pages of other origins out: a browser asks before it sends them JSON, and is not let.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json", code="unsupported_media_type")
    limit = int(settings.max_request_bytes)
    too_large = ApiError(
        413, f"the body has more than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(settings.receive_timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.receive_timeout_s:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_exception(_: Request, error: HTTPException) -> Response:
    """Answer what no route takes: 404 and 405."""
    return error_response(ApiError(error.status_code, error.detail, headers=dict(error.headers or {})))


async def _on_disconnect(_: Request, __: ClientDisconnect) -> Response:
    return GONE


async def _on_defect(_: Request, __: Exception) -> Response:
    """Answer what should not happen; the traceback goes to the log, the client learns nothing of our insides."""
    return error_response(ApiError(500, "the server failed at this request", code="internal_error"))


def _counted(app: ASGIApp, metrics: ServerMetrics, paths: frozenset[str]) -> ASGIApp:
    """Count answers by route and status. Paths that are no routes count as one: a client may think of millions."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.answered(scope["path"] if scope["path"] in paths else "other", message["status"])
            await send(message)

        await app(scope, receive, counting_send)

    return counted
