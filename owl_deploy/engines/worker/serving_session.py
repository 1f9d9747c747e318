"""Generation by the loop that serves: the scheduler of `owl_deploy.serve`, with one request at a time.

Runs in the environment of owl-deploy. What a request costs here is what it costs in the server, but for HTTP.
"""

from __future__ import annotations

import json
import math
import queue
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.artifact import open_artifact
from owl_deploy.serve.batch import DecoderBatch
from owl_deploy.serve.sampling import SamplingSettings
from owl_deploy.serve.scheduler import Scheduler
from owl_deploy.serve.sequence import Piece, Sequence
from owl_deploy.serve.settings import ServeSettings
from owl_deploy.text import Encoder

_NS_PER_S = 1e9


def can_serve(folder: str) -> bool:
    """Return whether an artifact has a graph that the server runs."""
    manifest = json.loads((Path(folder) / "owl.json").read_text(encoding="utf-8"))
    return bool(manifest.get("graph") != "traced")


class ServingSession:
    """One artifact behind a scheduler of one row. It observes the scheduler: see `Observer` there."""

    def __init__(self, folder: str, threads: int, capacity: int) -> None:
        import onnxruntime

        artifact = open_artifact(Path(folder))
        self.version = onnxruntime.__version__
        self._tokenizer = Encoder.open(artifact.path).tokenizer
        rows = DecoderBatch(artifact, n_rows=1, capacity=capacity, threads=threads)
        chunk = ServeSettings().prefill_chunk
        self._scheduler = Scheduler(rows, prefill_chunk=chunk, queue_size=1, observer=self)
        self._scheduler.start()
        self._ns: list[int] = []

    def generation_ns(self, tokens: NDArray[np.int64], n_new: int) -> list[int]:
        """Return nanoseconds from the request to the first token and from each token to the next."""
        told: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._ns = []
        # Nothing ends the text early: every engine generates as many tokens.
        request = Sequence(
            tokens,
            SamplingSettings(temperature=0),
            n_new,
            (),
            frozenset(),
            self._tokenizer,
            "bench",
            math.inf,
            told.put,
        )
        self._scheduler.submit([request])
        piece = told.get()
        while not piece.is_last:
            piece = told.get()
        if piece.failure is not None:
            raise RuntimeError(piece.failure.value)
        return self._ns

    def started(self, queue_s: float) -> None:
        """Nothing waits long in a line of one."""

    def first_token(self, ttft_s: float, n_prompt: int) -> None:
        self._ns.append(round(_NS_PER_S * ttft_s))

    def next_token(self, itl_s: float) -> None:
        self._ns.append(round(_NS_PER_S * itl_s))

    def finished(self, outcome: str) -> None:
        """The last piece says so too."""
