"""The loop of the engine: which sequences wait, which read their prompt, and which decode, step by step.

In: sequences, submitted from any thread. Out: their pieces, on the engine's own thread. It knows nothing of HTTP or
JSON.

A step reads at most `prefill_chunk` prompt tokens and then decodes one token for every sequence that has read its
prompt. So a long prompt delays the others by one chunk per token, and a place that becomes free is taken at the next
step. Decoding rows are the first of the cache: a row that ends is filled with the last one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from owl_deploy.serve.sequence import Failure, Piece, Sequence
from owl_deploy.serve.waiting_line import WaitingLine

__all__ = ["Draining", "Observer", "QueueFull", "Rows", "Scheduler"]

_LOGGER = logging.getLogger(__name__)
_HOPELESS = 3
"""Failed steps in a row after which a restart is the better choice."""


class Rows(Protocol):
    """What runs the graph: see `owl_deploy.serve.batch.DecoderBatch`."""

    n_rows: int
    capacity: int

    def prefill(self, row: int, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Run tokens behind the cache of a row."""

    def decode(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one token more for the first rows."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row."""


class Observer(Protocol):
    """What is told of times and counts, on the engine's thread; seconds throughout."""

    def started(self, queue_s: float) -> None:
        """A sequence left the line."""

    def first_token(self, ttft_s: float, n_prompt: int) -> None:
        """A sequence has its first token."""

    def next_token(self, itl_s: float) -> None:
        """A sequence has another token."""

    def finished(self, outcome: str) -> None:
        """A sequence ended: stop, length, cancelled, or what failed."""


class QueueFull(Exception):  # noqa: N818  (not an error of the program)
    """No more sequences may wait."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Draining(Exception):  # noqa: N818
    """The server finishes what it began and takes nothing new."""


class Scheduler:
    """Sequences in a batch of rows, run by a thread of its own; `submit`, `cancel` and `drain` are for others."""

    def __init__(self, rows: Rows, *, prefill_chunk: int, queue_size: int, observer: Observer) -> None:
        self._rows, self._chunk, self._queue_size, self._observer = rows, prefill_chunk, queue_size, observer
        self._waiting: WaitingLine[Sequence] = WaitingLine()
        self._decoding: list[Sequence] = []
        """The sequence at position i has row i of the cache."""
        self._reading: Sequence | None = None
        """Reads its prompt into the row behind the decoding ones."""
        self._wanted = threading.Condition()
        """Guards the waiting line and the two flags below."""
        self._is_draining = self._is_closed = False
        self._mean_s = 1.0
        """Running mean of the seconds that a sequence holds a row."""
        self._n_failures = 0
        """Steps that failed since one did not."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs, and its last steps did not all fail."""
        return self._thread.is_alive() and self._n_failures < _HOPELESS

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_draining

    @property
    def n_waiting(self) -> int:
        """Sequences in the line."""
        with self._wanted:
            return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Sequences that hold a row."""
        return len(self._decoding) + (self._reading is not None)

    @property
    def n_positions(self) -> int:
        """Positions of the KV cache that are in use."""
        reading = self._reading
        return sum(sequence.n_past for sequence in [*self._decoding, *([reading] if reading else [])])

    def submit(self, sequences: Many[Sequence]) -> None:
        """Let the sequences of one request wait for their turn: all of them or none.

        Raises:
            QueueFull: the line would be longer than `queue_size`, and there are no free rows for them.
            Draining: the server ends.
        """
        with self._wanted:
            if self._is_draining or self._is_closed:
                raise Draining
            n_free = max(0, self._rows.n_rows - self.n_active)
            n_after = len(self._waiting) + len(sequences)
            if n_after > self._queue_size + n_free:
                raise QueueFull(max(1, min(60, math.ceil(self._mean_s * n_after / self._rows.n_rows))))
            for sequence in sequences:
                self._waiting.push(sequence.client, sequence)
            self._wanted.notify()

    def cancel(self, sequences: Many[Sequence]) -> None:
        """Drop sequences: those that wait at once, those that run before the next step. Harmless for ended ones."""
        with self._wanted:
            for sequence in sequences:
                sequence.is_cancelled = True
                if self._waiting.remove(sequence.client, sequence):
                    self._observer.finished("cancelled")

    def drain(self) -> None:
        """Take nothing new; what was submitted goes on."""
        with self._wanted:
            self._is_draining = True

    def close(self) -> None:
        """End the loop after its step and fail what is not finished."""
        with self._wanted:
            self._is_closed = True
            self._wanted.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wanted:
                while not (self._is_closed or self._waiting or self._decoding or self._reading):
                    self._wanted.wait()
                if self._is_closed:
                    waiting = self._waiting.take_all()
                    break
            try:
                self._step()
                self._n_failures = 0
            except Exception:  # whatever the engine raises: those in it are told, and the server goes on
                _LOGGER.exception("a step of the engine failed")
                self._n_failures += 1
                self._fail(Failure.ENGINE)
        for sequence in waiting:
            self._end(sequence, Piece(sequence.index, failure=Failure.CLOSED))
        self._fail(Failure.CLOSED)

    def _fail(self, failure: Failure) -> None:
        """End every sequence that holds a row."""
        running = [*self._decoding, *([self._reading] if self._reading else [])]
        self._decoding, self._reading = [], None
        for sequence in running:
            self._end(sequence, Piece(sequence.index, failure=failure))

    def _step(self) -> None:
        """Read some prompt tokens, then decode one token of every sequence that can."""
        now = time.monotonic()
        if (reading := self._reading) is not None and reading.is_over(now):
            self._reading = None
            self._dismiss(reading)
        for row in reversed(range(len(self._decoding))):
            if (sequence := self._decoding[row]).is_over(now):
                self._vacate(row)
                self._dismiss(sequence)
        self._read_prompts()
        self._decode()

    def _dismiss(self, sequence: Sequence) -> None:
        """Tell a sequence that left before it was finished."""
        if sequence.is_cancelled:
            self._observer.finished("cancelled")
        elif sequence.n_generated:
            self._end(sequence, sequence.cut())
        else:
            self._end(sequence, Piece(sequence.index, failure=Failure.NOT_STARTED))

    def _read_prompts(self) -> None:
        """Read up to one chunk of prompt tokens, of as many sequences as that takes."""
        left = self._chunk
        while left:
            sequence = self._reading = self._reading or self._next()
            if sequence is None:
                return
            tokens = sequence.prompt[sequence.n_past : sequence.n_past + left]
            logits = self._rows.prefill(len(self._decoding), tokens, sequence.n_past)
            sequence.n_past += len(tokens)
            left -= len(tokens)
            if sequence.n_past == len(sequence.prompt):
                # From here on it decodes, so that a failure of this very token finds it among the running ones.
                self._reading = None
                self._decoding.append(sequence)
                if (last := self._advance(sequence, logits)) is not None:
                    self._decoding.pop()
                    self._end(sequence, last)

    def _next(self) -> Sequence | None:
        """Take the next sequence whose time is not over out of the line, where a row is free."""
        while len(self._decoding) < self._rows.n_rows:
            with self._wanted:
                if not self._waiting:
                    return None
                sequence = self._waiting.pop()
            now = time.monotonic()
            if not sequence.is_over(now):
                sequence.started = now
                self._observer.started(now - sequence.arrived)
                return sequence
            self._dismiss(sequence)
        return None

    def _decode(self) -> None:
        """Run one token more for all sequences that have read their prompt."""
        if not self._decoding:
            return
        tokens = np.array([sequence.newest for sequence in self._decoding])
        lengths = np.array([sequence.n_past + 1 for sequence in self._decoding])
        logits = self._rows.decode(tokens, lengths)
        for sequence in self._decoding:
            sequence.n_past += 1
        pieces = [self._advance(sequence, row) for sequence, row in zip(self._decoding, logits, strict=True)]
        for row, last in reversed([*enumerate(pieces)]):
            if last is not None:
                sequence = self._decoding[row]
                self._vacate(row)
                self._end(sequence, last)

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> Piece | None:
        """Give a sequence its next token and tell it.

        Returns:
            The last piece of a sequence that is finished. The caller tells it after it has freed the row: a client that
            has its answer and asks at once again must find the place that it held.
        """
        try:
            piece = sequence.extend(logits)
        except FloatingPointError as error:
            _LOGGER.error("%s", error)
            return Piece(sequence.index, failure=Failure.ENGINE)
        now = time.monotonic()
        if sequence.n_generated == 1:
            self._observer.first_token(now - sequence.arrived, len(sequence.prompt))
        else:
            self._observer.next_token(now - sequence.told_at)
        sequence.told_at = now
        if piece.is_last:
            return piece
        if piece.choices or piece.text:
            sequence.emit(piece)
        return None

    def _end(self, sequence: Sequence, piece: Piece) -> None:
        """Tell a sequence's last piece."""
        if sequence.started:
            self._mean_s += 0.1 * (time.monotonic() - sequence.started - self._mean_s)
        self._observer.finished(piece.failure.name.lower() if piece.failure else str(piece.finish_reason))
        sequence.emit(piece)

    def _vacate(self, row: int) -> None:
        """Take a decoding sequence out of its row, and close the gap."""
        last = self._decoding.pop()
        if row < len(self._decoding):
            self._decoding[row] = last
            self._rows.move(len(self._decoding), row, last.n_past)
        if self._reading is not None and self._reading.n_past:
            self._rows.move(len(self._decoding) + 1, len(self._decoding), self._reading.n_past)
