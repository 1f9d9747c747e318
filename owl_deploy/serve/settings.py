"""How a server is set up: every flag of `owl-deploy serve`, and its twin in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field, SecretStr

from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.recipe import Settings, Threads

__all__ = ["API_KEY", "ServeSettings", "api_key", "environment_name"]

API_KEY = "OWL_DEPLOY_API_KEY"
"""Environment variable with the key itself. There is no such flag: other users of a machine see command lines."""

_Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


class ServeSettings(Settings):
    """Where a server listens, how much it does at once, and what it refuses."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and says which."""
    threads: Threads = "auto"
    """Threads of the engine: auto (affinity and cgroup quota) or a number."""
    model_name: str | None = Field(default=None, min_length=1, max_length=200)
    """Name that requests call the model by; the artifact's folder when not given."""
    api_key_file: str | None = None
    """File with the key that requests under /v1 must carry; OWL_DEPLOY_API_KEY may hold the key itself instead."""
    batch_size: int = Field(default=8, ge=1, le=256)
    """Sequences that decode together; more raise throughput and the time between two tokens."""
    context_length: int = Field(default=4096, ge=2, le=2**20)
    """Tokens of prompt and answer of one sequence at most; the artifact may allow fewer."""
    prefill_chunk: int = Field(default=128, ge=1, le=65536)
    """Prompt tokens that are read between two steps of the others; more shorten the time to the first token and
    lengthen the gaps of those who are being answered."""
    max_tokens: int = Field(default=2048, ge=1, le=2**20)
    """Largest max_tokens that a request may ask for."""
    queue_size: int = Field(default=64, ge=0, le=100_000)
    """Sequences that wait for a place; beyond that requests are answered with 429."""
    max_request_bytes: ByteSize = Field(default=ByteSize(2**20), ge=1024, le=2**30)
    """Largest body of a request, such as 1MiB."""
    request_timeout_s: _Seconds = 300.0
    """Seconds that a request may take, waiting included; a begun answer ends there with finish_reason length."""
    receive_timeout_s: _Seconds = 20.0
    """Seconds that a client gets to send its headers, and again its body."""
    drain_timeout_s: _Seconds = 60.0
    """Seconds that begun requests get to end after SIGTERM."""


def environment_name(field: str) -> str:
    """Return the environment variable that stands in for a flag."""
    return f"OWL_DEPLOY_{field.upper()}"


def api_key(settings: ServeSettings, environment: Mapping[str, str]) -> SecretStr | None:
    """Return the key that requests must carry, None where any request is welcome.

    Raises:
        RecipeError: the key is empty, has characters that no header can hold, or is given twice.
        OwlDeployError: its file cannot be read.
    """
    given = environment.get(API_KEY)
    if settings.api_key_file is not None:
        if given is not None:
            raise RecipeError(f"api_key_file and {API_KEY} both give a key: leave one of them out")
        try:
            given = Path(settings.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OwlDeployError(f"cannot read the API key in {settings.api_key_file}: {error}") from error
    if given is None:
        return None
    key = given.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError("the API key must be one word of printable ASCII characters: write another one")
    return SecretStr(key)
