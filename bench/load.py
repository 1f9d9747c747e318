"""A load test of `owl-deploy serve`: artifacts in; out, what 1, 8 and 32 clients got from each, and of which quality.

Every artifact has a server of its own, on loopback; they take turns (A-B-A-B), so that both meet the same machine. A
client asks, reads its stream to the end, and asks again. It knows nothing of models: prompts are words, and tokens are
what the server says they are.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil
from rich.console import Console

from owl_deploy.artifact import open_artifact
from owl_deploy.bench.comparison import Result
from owl_deploy.bench.load_report import load_table, write_load_report
from owl_deploy.bench.machine import MachineWatch, machine_facts
from owl_deploy.bench.statistics import percentile
from owl_deploy.errors import EngineFailedError, OwlDeployError
from owl_deploy.evaluation import Evaluation, evaluate
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import EvalSettings
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import commit, versions

__all__ = ["LoadSettings", "measure_load"]

_WORDS = (
    "the",
    "owl",
    "of",
    "a",
    "forest",
    "hears",
    "what",
    "moves",
    "below",
    "and",
    "waits",
    "for",
    "night",
    "quietly",
)
# Seconds that a begun request gets beyond the end of its turn, and a server to load its model.
_REQUEST_S = 120.0
_MEMORY_EVERY_S = 0.25


@dataclass(frozen=True)
class LoadSettings:
    """What clients do."""

    clients: tuple[int, ...] = (1, 8, 32)
    """Numbers of clients, one after the other."""
    duration_s: float = 120.0
    """Seconds for each artifact and number of clients, all turns together."""
    n_turns: int = 2
    """Turns in which artifacts alternate."""
    warmup_s: float = 5.0
    """Seconds of the largest number of clients before anything counts, for each artifact."""
    prompt_words: int = 48
    """Words of a prompt; every request has another one."""
    max_tokens: int = 64
    """Tokens of an answer, where the model does not end it before."""
    seed: int = 0
    """Of the prompts."""

    def __post_init__(self) -> None:
        if not self.clients or min(self.clients) < 1 or max(self.clients) > 1000:
            raise ValueError(f"clients must be numbers from 1 to 1000, got {self.clients}")
        if not (0 < self.duration_s <= 86_400 and self.warmup_s >= 0 and self.n_turns > 0):
            raise ValueError("duration_s must be in (0, 86400], warmup_s at least 0 and n_turns at least 1")


@dataclass
class _Load:
    """What came of one artifact under one number of clients, all turns together. Times in nanoseconds."""

    ttft: list[list[int]] = field(default_factory=list)
    itl: list[list[int]] = field(default_factory=list)
    n_tokens: float = 0.0
    seconds: float = 0.0
    requests: list[int] = field(default_factory=list)
    """Answered by client."""
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the row's first turn, resident bytes; between turns time stands still."""


@dataclass(frozen=True)
class _Served:
    """A server that answers."""

    url: str
    model: str
    facts: dict[str, Any]
    process: psutil.Process | None
    """None where it was started by someone else."""


@contextmanager
def _server(artifact: Path, *, threads: int, batch_size: int, n_clients: int) -> Iterator[_Served]:
    """Run a server of an artifact on a free port while the block runs."""
    flags = {"port": 0, "threads": threads, "batch-size": batch_size, "queue-size": max(64, n_clients)}
    command = [sys.executable, "-m", "owl_deploy", "serve", str(artifact), "--json"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OWL_DEPLOY_API_KEY")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            document = ""
            while not document.endswith("}\n"):
                line = process.stdout.readline()
                if not line:
                    break
                document += line
            facts = json.loads(document or "{}")
            if "url" not in facts:
                process.wait(10)
                reason = facts.get("error", "it says why above")
                raise EngineFailedError(f"the server of {artifact.name} ended before it listened: {reason}")
            yield _Served(facts["url"], facts["model"], facts, psutil.Process(process.pid))
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _prompt(generator: random.Random, n_words: int) -> str:
    return " ".join(generator.choice(_WORDS) for _ in range(n_words))


async def _ask(client: httpx.AsyncClient, served: _Served, body: dict[str, Any], load: _Load, end: int) -> None:
    """Send one request and read its stream to the end; adds what it got before `end`, or what went wrong."""
    begun = time.perf_counter_ns()
    times: list[int] = []
    n_tokens, is_done = 0, False
    async with client.stream("POST", f"{served.url}/v1/completions", json=body) as stream:
        if stream.status_code != 200:
            await stream.aread()
            raise EngineFailedError(f"status {stream.status_code}: {stream.text[:200]}")
        async for line in stream.aiter_lines():
            now = time.perf_counter_ns()
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise EngineFailedError(f"in the stream: {event['error']}")
                if event.get("usage"):
                    n_tokens = event["usage"]["completion_tokens"]
                elif event["choices"] and event["choices"][0]["text"]:
                    times.append(now)
    if not is_done:
        raise EngineFailedError("the stream ended without its last event")
    if times:
        load.ttft[-1].append(times[0] - begun)
        load.itl[-1] += [after - before for before, after in pairwise(times)]
        # An event may hold more than one token; what arrives behind the end of the turn is left out.
        load.n_tokens += n_tokens * sum(at <= end for at in times) / len(times)


async def _client(served: _Served, settings: LoadSettings, load: _Load, index: int, end: int) -> None:
    """Ask until the turn is over; one connection, as a client of its own."""
    generator = random.Random(f"{settings.seed} {index} {len(load.ttft)}")
    async with httpx.AsyncClient(timeout=_REQUEST_S, trust_env=False) as client:
        while time.perf_counter_ns() < end:
            body = {
                "model": served.model,
                "prompt": _prompt(generator, settings.prompt_words),
                "max_tokens": settings.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                await _ask(client, served, body, load, end)
                load.requests[index] += 1
            except (httpx.HTTPError, OwlDeployError, ValueError, KeyError) as error:
                load.errors.append(f"client {index}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)  # a server that is gone is not asked a million times


async def _watch_memory(process: psutil.Process, load: _Load) -> None:
    """Note the server's memory until cancelled."""
    start = time.perf_counter()
    while True:
        try:
            load.memory.append((load.seconds + time.perf_counter() - start, int(process.memory_info().rss)))
        except psutil.NoSuchProcess:
            return
        await asyncio.sleep(_MEMORY_EVERY_S)


async def _turn(served: _Served, settings: LoadSettings, load: _Load, n_clients: int, seconds: float) -> None:
    """Let all clients ask for some seconds, and wait for what they began."""
    load.ttft.append([])
    load.itl.append([])
    load.requests = load.requests or [0] * n_clients
    watch = asyncio.create_task(_watch_memory(served.process, load)) if served.process else None
    end = time.perf_counter_ns() + int(seconds * 1e9)
    await asyncio.gather(*(_client(served, settings, load, index, end) for index in range(n_clients)))
    if watch is not None:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    load.seconds += seconds


def _quantiles(rounds: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """Return p50 and p95 in milliseconds, and the number of samples; None without any."""
    samples = [sample for samples in rounds for sample in samples]
    if not samples:
        return None
    return {"p50": percentile(samples, 50) / 1e6, "p95": percentile(samples, 95) / 1e6, "n": len(samples)}


def _memory(samples: list[tuple[float, int]]) -> dict[str, float] | None:
    """Return resident bytes at the beginning and end (medians of a tenth), and the slope of a line through all."""
    if len(samples) < 2:
        return None
    seconds, resident = np.array(samples, np.float64).T
    tenth = max(1, len(samples) // 10)
    return {
        "first_bytes": float(np.median(resident[:tenth])),
        "last_bytes": float(np.median(resident[-tenth:])),
        "bytes_per_minute": float(np.polyfit(seconds, resident, 1)[0] * 60),
    }


def _row(served: _Served, facts: dict[str, Any], n_clients: int, load: _Load) -> dict[str, Any]:
    return {
        "engine": "owl-deploy serve",
        **facts,
        "phase": "serve",
        "clients": n_clients,
        "threads": served.facts.get("threads"),
        "batch": served.facts.get("batch_size"),
        "ttft_ms": _quantiles(load.ttft),
        "itl_ms": _quantiles(load.itl),
        "tokens_per_s": load.n_tokens / load.seconds,
        "requests": sum(load.requests),
        "requests_per_client": {"min": min(load.requests), "max": max(load.requests)},
        "errors": len(load.errors),
        "error_examples": load.errors[:5],
        "rss": _memory(load.memory),
        "ttft_ns": load.ttft,
        "itl_ns": load.itl,
    }


def _add_gain(rows: list[dict[str, Any]]) -> None:
    """Add to each row its tokens per second over those of one client of the same artifact, where that was measured."""
    one = {row["artifact"]: row["tokens_per_s"] for row in rows if row["clients"] == 1}
    for row in rows:
        alone = one.get(row["artifact"])
        row["times_one_client"] = row["tokens_per_s"] / alone if alone else None


def _facts(artifact: Path, quality: Evaluation | None) -> dict[str, Any]:
    facts = open_artifact(artifact).facts
    return {
        "artifact": artifact.name,
        "weights": facts.weights,
        "precision": facts.precision,
        "sparsity": facts.sparsity["linears"],
        "perplexity": quality.perplexity if quality else None,
        "evaluation": quality.to_json() if quality else None,
    }


def measure_load(
    artifacts: Sequence[Path],
    settings: LoadSettings,
    *,
    evaluation: EvalSettings | None = None,
    url: str | None = None,
    threads: int = 0,
    batch_size: int = 8,
    on_step: OnStep = silent,
) -> Result:
    """Ask servers for a bounded time, and count.

    Args:
        artifacts: folders, each of which gets a server on loopback.
        settings: what clients do.
        evaluation: text and windows of each artifact's perplexity, taken before any server starts unless the artifact
            has it; without it the rows say unknown.
        url: a server that already runs, instead of artifacts; its memory and its perplexity are not seen.
        threads: of each server; 0 is what affinity and cgroup allow.
        batch_size: sequences that a server decodes together.
        on_step: told of every turn.

    Returns:
        The content of report.json: one row per number of clients and artifact.

    Raises:
        OwlDeployError: a text cannot be read.
        UnsupportedModelError: a folder is no artifact.
        EngineFailedError: a server does not start.
        ValueError: neither artifacts nor a URL are given, or both.
    """
    if bool(artifacts) == (url is not None):
        raise ValueError("give artifacts or the URL of a server, one of the two")
    count = resolve_threads(threads or "auto")
    qualities: list[Evaluation | None] = [None] * len(artifacts)
    if evaluation is not None and artifacts:
        qualities = [*evaluate(list(map(str, artifacts)), evaluation, threads=count.n, on_step=on_step)]
    described = [_facts(artifact, quality) for artifact, quality in zip(artifacts, qualities, strict=True)]
    watch = MachineWatch.start()
    with ExitStack() as stack:
        if url is None:
            servers = [
                stack.enter_context(
                    _server(artifact, threads=count.n, batch_size=batch_size, n_clients=max(settings.clients))
                )
                for artifact in artifacts
            ]
        else:
            servers = [_running(url)]
            unknown = {"weights": "", "precision": "unknown", "sparsity": None, "perplexity": None, "evaluation": None}
            described = [{"artifact": servers[0].model, **unknown}]
        rows = []
        for served in servers:
            if settings.warmup_s:
                asyncio.run(_turn(served, settings, _Load(), max(settings.clients), settings.warmup_s))
        for number, n_clients in enumerate(settings.clients):
            loads = [_Load() for _ in servers]
            for _ in range(settings.n_turns):
                for served, load in zip(servers, loads, strict=True):
                    asyncio.run(_turn(served, settings, load, n_clients, settings.duration_s / settings.n_turns))
            on_step(Step("load", number + 1, len(settings.clients), f"{n_clients} clients"))
            rows += [
                _row(served, facts, n_clients, load)
                for served, facts, load in zip(servers, described, loads, strict=True)
            ]
    _add_gain(rows)
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "owl_deploy.bench.load", *sys.argv[1:]]),
        "versions": versions("onnxruntime", "starlette", "uvicorn", "httpx", "numpy"),
        "commit": commit(),
        "machine": {**machine_facts(count), **watch.facts()},
        "protocol": asdict(settings) | {"is_interleaved": len(servers) > 1, "clients_beside_server": True},
        "rows": rows,
    }


def _running(url: str) -> _Served:
    """Return a server that already runs."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=10)
        model = answer.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise EngineFailedError(f"no server answers at {url} ({error}): start one with owl-deploy serve") from error
    return _Served(url.rstrip("/"), model, {}, None)


def _seconds(_context: click.Context, _option: click.Parameter, text: str) -> float:
    try:
        return float(text.removesuffix("s"))
    except ValueError:
        raise click.BadParameter("give seconds, such as 120s") from None


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("give whole numbers with commas between them, such as 1,8,32") from None


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--url", help="A server that runs already, instead of artifacts.")
@click.option("--clients", default="1,8,32", show_default=True, callback=_numbers, help="Clients at the same time.")
@click.option("--duration", default="120s", show_default=True, callback=_seconds, help="Of each row of the report.")
@click.option("--turns", default=2, show_default=True, help="Turns in which artifacts alternate.")
@click.option("--warmup", default="5s", show_default=True, callback=_seconds, help="Before anything counts.")
@click.option("--prompt-words", default=48, show_default=True, help="Words of each prompt.")
@click.option("--max-tokens", default=64, show_default=True, help="Tokens of each answer.")
@click.option("--text", default="python-docs", show_default=True, help="Of each artifact's perplexity.")
@click.option("--window", default=2048, show_default=True, help="Tokens of a window of that text.")
@click.option("--max-windows", default=2, show_default=True, help="Windows of it.")
@click.option("--threads", default=0, help="Threads of each server; 0 is what affinity and cgroup allow.")
@click.option("--batch-size", default=8, show_default=True, help="Sequences that a server decodes together.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.json, report.md and report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, raw samples included.")
def main(
    artifacts: tuple[Path, ...],
    url: str | None,
    clients: tuple[int, ...],
    duration: float,
    turns: int,
    warmup: float,
    prompt_words: int,
    max_tokens: int,
    text: str,
    window: int,
    max_windows: int,
    threads: int,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Put owl-deploy serve under load, and measure what its clients get.

    Exit code 1 when a request failed.

    Example: python -m owl_deploy.bench.load DENSE_ARTIFACT SPARSE_ARTIFACT --out runs/load
    """

    def show(step: Step) -> None:
        if step.stage == "load":
            click.echo(f"{step.note} done", err=True)

    try:
        settings = LoadSettings(
            clients=clients,
            duration_s=duration,
            n_turns=turns,
            warmup_s=warmup,
            prompt_words=prompt_words,
            max_tokens=max_tokens,
        )
        quality = EvalSettings(text=text, window=window, max_windows=max_windows)
        measured = measure_load(
            artifacts, settings, evaluation=quality, url=url, threads=threads, batch_size=batch_size, on_step=show
        )
        if out is not None:
            write_load_report(measured, out)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OwlDeployError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(measured, indent=1))
    else:
        Console(width=120).print(load_table(measured))
    sys.exit(1 if any(row["errors"] for row in measured["rows"]) else 0)


if __name__ == "__main__":
    # So that the servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
