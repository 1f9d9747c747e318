"""Opening everything, listening, and ending well: what `owl-deploy serve` does.

In: an artifact's folder and settings. It returns when SIGTERM or SIGINT has come and the begun requests are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from owl_deploy.artifact import open_artifact
from owl_deploy.errors import OwlDeployError
from owl_deploy.serve.batch import DecoderBatch
from owl_deploy.serve.metrics import ServerMetrics
from owl_deploy.serve.model import open_model
from owl_deploy.serve.routes import Service, application
from owl_deploy.serve.scheduler import Scheduler
from owl_deploy.serve.settings import ServeSettings, api_key
from owl_deploy.threads import resolve_threads

__all__ = ["ServeFacts", "open_service", "serve"]

# Connections beyond those that may have a request: they are told 503 before they cost more than a socket.
_SPARE_CONNECTIONS = 256


@dataclass(frozen=True)
class ServeFacts:
    """What a server says of itself when it begins to listen."""

    url: str
    model: str
    threads: int
    threads_source: str
    batch_size: int
    context_length: int
    kv_cache_bytes: int
    """Size of the KV cache once every sequence is as long as it may be."""
    has_api_key: bool
    has_chat_template: bool

    def text(self) -> str:
        """Return the same for people."""
        return (
            f"{self.model} at {self.url} with {self.threads} threads ({self.threads_source}): "
            f"{self.batch_size} sequences of {self.context_length} tokens together, "
            f"{self.kv_cache_bytes / 2**20:.0f} MiB of keys and values at most, "
            f"{'with' if self.has_chat_template else 'no'} chat template, "
            f"{'with' if self.has_api_key else 'no'} API key"
        )


def open_service(
    artifact: Path, settings: ServeSettings, environment: Mapping[str, str] = os.environ
) -> tuple[Service, ServeFacts]:
    """Load an artifact and start its engine.

    Returns:
        The service, whose scheduler the caller closes, and its facts, with a URL that holds once it listens.

    Raises:
        OwlDeployError: the artifact or a setting is at fault; the message says which.
    """
    key = api_key(settings, environment)
    opened = open_artifact(artifact)
    model = open_model(opened, name=settings.model_name, context_length=settings.context_length)
    threads = resolve_threads(settings.threads)
    rows = DecoderBatch(opened, n_rows=settings.batch_size, capacity=model.context_length, threads=threads.n)
    metrics = ServerMetrics()
    scheduler = Scheduler(rows, prefill_chunk=settings.prefill_chunk, queue_size=settings.queue_size, observer=metrics)
    metrics.watch(scheduler, rows.kv_bytes)
    scheduler.start()
    facts = ServeFacts(
        url="",
        model=model.name,
        threads=threads.n,
        threads_source=threads.source,
        batch_size=settings.batch_size,
        context_length=model.context_length,
        kv_cache_bytes=rows.kv_bytes,
        has_api_key=key is not None,
        has_chat_template=model.template is not None,
    )
    return Service(model, scheduler, metrics, settings, key), facts


def serve(artifact: Path, settings: ServeSettings, *, on_ready: Callable[[ServeFacts], None]) -> None:
    """Serve an artifact until SIGTERM or SIGINT, then answer what was begun.

    Raises:
        OwlDeployError: the artifact, a setting or the address is at fault.
    """
    # First the address: who waits a minute for a model to load should not learn then that the port is taken.
    with contextlib.closing(_listening(settings)) as listener:
        service, facts = open_service(artifact, settings)
        try:
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            server = Server(service, on_ready=lambda: on_ready(ServeFacts(**{**vars(facts), "url": url})))
            server.run(sockets=[listener])
        finally:
            service.scheduler.close()


def _listening(settings: ServeSettings) -> socket.socket:
    """Return a socket bound to the address, which does not accept connections yet. Raises OwlDeployError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    except (OSError, UnicodeError) as error:
        raise OwlDeployError(
            f"cannot listen on {settings.host} port {settings.port}: {error}; give another --host or --port"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, which says when it listens, takes nothing new once it is to stop, and cuts clients that send nothing."""

    def __init__(self, service: Service, *, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = service.settings
        config = uvicorn.Config(
            application(service),
            http=_protocol(settings.receive_timeout_s),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.batch_size + settings.queue_size + _SPARE_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        )
        super().__init__(config)
        self._scheduler, self._on_ready = service.scheduler, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop well at SIGTERM and SIGINT; unlike uvicorn, raise neither again: a drained server is no failure."""
        loop = asyncio.get_running_loop()
        numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        except (RuntimeError, ValueError):  # not in the main thread: whoever runs it ends it
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take nothing new, and stop when what was begun is done; a second Ctrl-C does not wait for that."""
        self._scheduler.drain()
        super().handle_exit(sig, frame)


def _protocol(receive_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP with a time limit for headers, which it lacks: a client may else hold a socket for ever."""

    class PatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Let the clock run exactly while a request's headers are on their way."""
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(receive_timeout_s, self.transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return PatientProtocol
