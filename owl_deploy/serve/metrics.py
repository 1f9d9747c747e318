"""Figures of a running server, in Prometheus' text format. Seconds and bytes throughout."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from owl_deploy.memory import rss_bytes
from owl_deploy.serve.scheduler import Scheduler

__all__ = ["CONTENT_TYPE_PLAIN_0_0_4", "ServerMetrics"]

_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """Metrics in a registry of their own. An `owl_deploy.serve.scheduler.Observer`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._queue = Histogram(
            "owl_deploy_queue_seconds", "Time from arrival to a place.", buckets=_REQUEST_S, registry=registry
        )
        self._ttft = Histogram(
            "owl_deploy_ttft_seconds",
            "Time from arrival to the first token, waiting included.",
            buckets=_REQUEST_S,
            registry=registry,
        )
        self._itl = Histogram(
            "owl_deploy_itl_seconds",
            "Time between successive tokens of a sequence, the first excluded.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._prompt_tokens = Counter("owl_deploy_prompt_tokens", "Prompt tokens that were read.", registry=registry)
        self._completion_tokens = Counter("owl_deploy_completion_tokens", "Generated tokens.", registry=registry)
        self._finished = Counter(
            "owl_deploy_sequences_finished", "Sequences by how they ended.", ["outcome"], registry=registry
        )
        self._requests = Counter(
            "owl_deploy_requests", "Answered HTTP requests.", ["route", "status"], registry=registry
        )
        # What the autoscaler sees before the first request.
        for outcome in ("stop", "length", "cancelled"):
            self._finished.labels(outcome)

    def watch(self, scheduler: Scheduler, kv_bytes: int) -> None:
        """Show the state of a scheduler too, read when it is asked for."""
        registry = self._registry
        Gauge("owl_deploy_active_requests", "Sequences that hold a place.", registry=registry).set_function(
            lambda: scheduler.n_active
        )
        Gauge("owl_deploy_queued_requests", "Sequences that wait.", registry=registry).set_function(
            lambda: scheduler.n_waiting
        )
        Gauge("owl_deploy_kv_cache_positions", "Positions of the KV cache in use.", registry=registry).set_function(
            lambda: scheduler.n_positions
        )
        Gauge("owl_deploy_kv_cache_bytes", "Largest size of the KV cache.", registry=registry).set(kv_bytes)
        Gauge("owl_deploy_resident_memory_bytes", "Resident memory of the process.", registry=registry).set_function(
            rss_bytes
        )

    def started(self, queue_s: float) -> None:
        """A sequence left the line."""
        self._queue.observe(queue_s)

    def first_token(self, ttft_s: float, n_prompt: int) -> None:
        """A sequence has its first token."""
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(n_prompt)
        self._completion_tokens.inc()

    def next_token(self, itl_s: float) -> None:
        """A sequence has another token."""
        self._itl.observe(itl_s)
        self._completion_tokens.inc()

    def finished(self, outcome: str) -> None:
        """A sequence ended."""
        self._finished.labels(outcome).inc()

    def answered(self, route: str, status: int) -> None:
        """A request got its answer's first byte."""
        self._requests.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)
