"""A tiny artifact and a server of it in the test process, on a free port of loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
from conftest import save_tiny_model

from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings
from owl_deploy.serve.routes import Service
from owl_deploy.serve.server import Server, open_service
from owl_deploy.serve.settings import ServeSettings

TEMPLATE = """{% for message in messages %}{% if message.role == 'system' and not loop.first %}
{{- raise_exception('a system message must come first') }}{% endif %}{{ message.role[0] + ':' + message.content + '/' }}
{%- endfor %}{% if add_generation_prompt %}a:{% endif %}"""


def tiny_artifact(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Export the tiny seeded model, with a chat template unless told otherwise."""
    model = save_tiny_model(folder / "model")
    out = folder / "tiny"
    export_onnx(str(model), ExportSettings(target="onnxruntime", weights="dense"), out=out, threads=1, parity=False)
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    return out


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    service: Service

    @property
    def client(self) -> openai.OpenAI:
        """The official client; it asks once and waits for half a minute at most."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=30)

    def connection(self) -> socket.socket:
        """Return a socket to the server, for what no client would send."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def send(self, request: bytes) -> tuple[int, Any]:
        """Send raw bytes that ask the server to close; returns the status of its answer, and its body or JSON."""
        with self.connection() as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body) if b"application/json" in head else body

    def post(self, path: str, body: bytes, *headers: str) -> tuple[int, Any]:
        """Post a body of declared JSON."""
        lines = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {len(body)}", *headers]
        if not any(line.lower().startswith("content-type:") for line in headers):
            lines.append("Content-Type: application/json")
        return self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def ask(self, path: str, **body: Any) -> tuple[int, Any]:
        """Post a JSON object that names the served model."""
        return self.post(path, json.dumps({"model": "tiny", **body}).encode())


@contextlib.contextmanager
def serving(artifact: Path, *, environment: dict[str, str] | None = None, **settings: Any) -> Iterator[Running]:
    """Serve an artifact while the block runs."""
    chosen = ServeSettings(**{"port": 0, "threads": 1, "batch_size": 4, "context_length": 512, **settings})
    service, _ = open_service(artifact, chosen, environment or {})
    is_ready = threading.Event()
    server = Server(service, on_ready=is_ready.set)
    with socket.create_server((chosen.host, 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert is_ready.wait(30)
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join(30)
            service.scheduler.close()


def eventually(claim: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until a claim holds; returns whether it did in time."""
    end = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
