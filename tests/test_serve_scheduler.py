"""The engine's loop over rows that remember what they were given, so that any mix-up changes an answer."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from serving import eventually

from owl_deploy.serve.sampling import SamplingSettings
from owl_deploy.serve.scheduler import Draining, QueueFull, Scheduler
from owl_deploy.serve.sequence import Failure, Piece, Sequence
from owl_deploy.serve.waiting_line import WaitingLine

TOKENIZER = byte_tokenizer().backend_tokenizer
N_TOKENS = 200


def successor(content: list[int]) -> int:
    """The next token of a text: a function of every position of it."""
    return zlib.crc32(bytes(content)) % N_TOKENS


def continuation(prompt: list[int], n: int) -> list[int]:
    content = list(prompt)
    for _ in range(n):
        content.append(successor(content))
    return content[len(prompt) :]


class RememberingRows:
    """Rows that hold tokens in place of keys and values."""

    capacity = 512

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.rows: list[list[int]] = [[] for _ in range(n_rows)]
        self.gate = threading.Event()
        self.gate.set()
        self.prefills: list[int] = []
        self.widths: list[int] = []

    def prefill(self, row: int, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        self.gate.wait(20)
        self.prefills.append(len(tokens))
        self.rows[row] = self.rows[row][:past_len] + tokens.tolist()
        assert len(self.rows[row]) == past_len + len(tokens)
        return self._logits(row)

    def decode(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        self.gate.wait(20)
        self.widths.append(len(tokens))
        for row, (token, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            self.rows[row] = [*self.rows[row][: length - 1], token]
            assert len(self.rows[row]) == length
        return np.stack([self._logits(row) for row in range(len(tokens))])

    def move(self, source: int, target: int, length: int) -> None:
        assert source != target
        self.rows[target] = self.rows[source][:length]
        self.rows[source] = []  # whoever still reads there is found out

    def _logits(self, row: int) -> NDArray[np.float32]:
        logits = np.zeros(N_TOKENS, np.float32)
        logits[successor(self.rows[row])] = 1
        return logits


class Told:
    """The observer of a scheduler, and the pieces of its sequences."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.order: list[int] = []
        self.pieces: dict[int, list[Piece]] = {}

    def started(self, queue_s: float) -> None: ...

    def first_token(self, ttft_s: float, n_prompt: int) -> None: ...

    def next_token(self, itl_s: float) -> None: ...

    def finished(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def sequence(
        self, index: int, prompt: list[int], *, max_tokens: int = 8, client: str = "", **more: Any
    ) -> Sequence:
        def emit(piece: Piece) -> None:
            if not self.pieces[index]:
                self.order.append(index)
            self.pieces[index].append(piece)

        self.pieces[index] = []
        return Sequence(
            **{
                "prompt": np.array(prompt),
                "sampling": SamplingSettings(temperature=0),
                "max_tokens": max_tokens,
                "stop": (),
                "end_tokens": frozenset(),
                "tokenizer": TOKENIZER,
                "client": client,
                "deadline": time.monotonic() + 60,
                "emit": emit,
                "index": index,
                **more,
            }
        )

    def tokens(self, index: int) -> list[int]:
        return [choice.token for piece in self.pieces[index] for choice in piece.choices]

    def is_done(self, *indices: int) -> bool:
        return all(self.pieces[index] and self.pieces[index][-1].is_last for index in indices)


@contextmanager
def scheduling(
    n_rows: int = 2, *, chunk: int = 4, queue_size: int = 100
) -> Iterator[tuple[Scheduler, RememberingRows, Told]]:
    rows, told = RememberingRows(n_rows), Told()
    scheduler = Scheduler(rows, prefill_chunk=chunk, queue_size=queue_size, observer=told)
    scheduler.start()
    try:
        yield scheduler, rows, told
    finally:
        rows.gate.set()
        scheduler.close()


prompts = st.lists(st.integers(0, N_TOKENS - 1), min_size=1, max_size=12)
requests = st.lists(st.tuples(prompts, st.integers(1, 9), st.booleans()), min_size=1, max_size=9)


@examples(deadline=None, max_examples=60)
@given(requests, st.integers(1, 4), st.integers(1, 6))
def test_sequences_get_the_answers_that_they_get_alone(
    asked: list[tuple[list[int], int, bool]], n_rows: int, chunk: int
) -> None:
    with scheduling(n_rows, chunk=chunk) as (scheduler, _, told):
        sequences = []
        for index, (prompt, max_tokens, _) in enumerate(asked):
            sequences.append(told.sequence(index, prompt, max_tokens=max_tokens))
            scheduler.submit([sequences[-1]])
        left = [i for i, (_, _, is_left) in enumerate(asked) if is_left]
        scheduler.cancel([sequences[i] for i in left])
        kept = [i for i in range(len(asked)) if i not in left]
        assert eventually(lambda: told.is_done(*kept) and scheduler.n_active == 0)
    for index in kept:
        prompt, max_tokens, _ = asked[index]
        assert told.tokens(index) == continuation(prompt, max_tokens)
    for index in left:
        prompt, max_tokens, _ = asked[index]
        assert told.tokens(index) == continuation(prompt, max_tokens)[: len(told.tokens(index))]


def test_several_decode_in_one_step() -> None:
    with scheduling(3) as (scheduler, rows, told):
        rows.gate.clear()
        scheduler.submit([told.sequence(i, [i + 1], max_tokens=20) for i in range(3)])
        rows.gate.set()
        assert eventually(lambda: told.is_done(0, 1, 2))
    assert rows.widths == [3] * 19


def test_long_prompt_delays_the_others_by_a_chunk_a_token() -> None:
    with scheduling(2, chunk=4) as (scheduler, rows, told):
        rows.gate.clear()
        scheduler.submit([told.sequence(0, [1], max_tokens=30), told.sequence(1, [2] * 43, max_tokens=1)])
        rows.gate.set()
        assert eventually(lambda: told.is_done(0, 1))
    assert rows.prefills == [1, 3, *[4] * 10]
    assert len(rows.widths) == 29


def test_cancelled_sequence_leaves_before_the_next_step() -> None:
    with scheduling(1) as (scheduler, rows, told):
        first, second = told.sequence(0, [1], max_tokens=10**6), told.sequence(1, [2], max_tokens=1)
        scheduler.submit([first, second])
        assert eventually(lambda: len(rows.widths) > 3)
        rows.gate.clear()
        assert eventually(lambda: first.n_past > 0)
        n_before = len(rows.widths)
        scheduler.cancel([first])
        rows.gate.set()
        assert eventually(lambda: told.is_done(1))
    assert len(rows.widths) <= n_before + 1  # the one that was under way
    assert told.outcomes == ["cancelled", "length"]


def test_waiting_sequence_is_cancelled_at_once() -> None:
    with scheduling(1) as (scheduler, rows, told):
        rows.gate.clear()
        waits = told.sequence(1, [2])
        scheduler.submit([told.sequence(0, [1])])
        assert eventually(lambda: scheduler.n_active == 1)
        scheduler.submit([waits])
        scheduler.cancel([waits])
        assert scheduler.n_waiting == 0
        assert told.outcomes == ["cancelled"]


def test_queue_takes_all_sequences_of_a_request_or_none() -> None:
    with scheduling(1, queue_size=2) as (scheduler, rows, told):
        rows.gate.clear()
        scheduler.submit([told.sequence(0, [1])])
        assert eventually(lambda: scheduler.n_active == 1)
        with pytest.raises(QueueFull) as refused:
            scheduler.submit([told.sequence(i, [1]) for i in range(1, 4)])
        assert refused.value.retry_after_s >= 1
        assert scheduler.n_waiting == 0
        scheduler.submit([told.sequence(i, [1]) for i in range(1, 3)])
        assert scheduler.n_waiting == 2


def test_clients_take_turns() -> None:
    with scheduling(1) as (scheduler, rows, told):
        rows.gate.clear()
        scheduler.submit([told.sequence(0, [1], client="greedy")])
        assert eventually(lambda: scheduler.n_active == 1)
        for i in range(1, 6):
            scheduler.submit([told.sequence(i, [1], client="greedy")])
        scheduler.submit([told.sequence(6, [1], client="modest")])
        rows.gate.set()
        assert eventually(lambda: told.is_done(*range(7)))
    assert told.order.index(6) == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers())))
def test_line_keeps_the_order_of_each_client(pushed: list[tuple[str, int]]) -> None:
    line: WaitingLine[tuple[str, int, int]] = WaitingLine()
    for number, (client, value) in enumerate(pushed):
        line.push(client, (client, number, value))
    popped = [line.pop() for _ in range(len(line))]
    assert len(line) == 0
    for client in "abc":
        mine = [number for who, number, _ in popped if who == client]
        assert mine == sorted(mine)
    assert sorted(number for _, number, _ in popped) == list(range(len(pushed)))


def test_time_that_is_over_ends_a_begun_answer_and_refuses_a_waiting_one() -> None:
    with scheduling(1) as (scheduler, _, told):
        begun = told.sequence(0, [1], max_tokens=10**6)
        scheduler.submit([begun])
        assert eventually(lambda: begun.n_generated > 2)
        scheduler.submit([told.sequence(1, [1], deadline=time.monotonic() - 1)])
        begun.deadline = 0
        assert eventually(lambda: told.is_done(0, 1))
    assert told.pieces[0][-1].finish_reason == "length"
    assert told.pieces[1] == [Piece(1, failure=Failure.NOT_STARTED)]


def test_place_of_a_sequence_is_free_when_its_last_piece_is_told() -> None:
    with scheduling(n_rows=2, queue_size=0) as (scheduler, rows, told):
        refused: list[int] = []

        def ask_again(index: int, **more: Any) -> Sequence:
            sequence = told.sequence(index, [1 + index % 100, 7], **more)
            tell = sequence.emit

            def emit(piece: Piece) -> None:
                tell(piece)
                if piece.is_last and index < 60:
                    try:  # one token ends at the prompt, more in a step of the other row's, and some run out of time
                        more = {"deadline": time.monotonic()} if index % 5 == 0 else {}
                        scheduler.submit([ask_again(index + 2, max_tokens=1 + index % 3, **more)])
                    except QueueFull:
                        refused.append(index)

            sequence.emit = emit
            return sequence

        rows.gate.clear()
        scheduler.submit([ask_again(0), ask_again(1)])
        rows.gate.set()
        assert eventually(lambda: bool(refused) or ({60, 61} <= told.pieces.keys() and told.is_done(60, 61)))
        assert not refused


def test_end_token_ends_and_is_counted() -> None:
    expected = continuation([5], 9)
    end = expected[4]
    with scheduling() as (scheduler, _, told):
        scheduler.submit([told.sequence(0, [5], max_tokens=9, end_tokens=frozenset([end]))])
        assert eventually(lambda: told.is_done(0))
    assert told.tokens(0) == expected[: expected.index(end) + 1]
    assert told.pieces[0][-1].finish_reason == "stop"


def test_failed_step_fails_those_in_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with scheduling(1) as (scheduler, rows, told):
        with monkeypatch.context() as broken:
            broken.setattr(rows, "decode", lambda *_: 1 / 0)
            scheduler.submit([told.sequence(0, [1])])
            assert eventually(lambda: told.is_done(0))
        assert told.pieces[0][-1].failure is Failure.ENGINE
        assert scheduler.is_alive
        scheduler.submit([told.sequence(1, [1])])
        assert eventually(lambda: told.is_done(1))
        assert told.tokens(1) == continuation([1], 8)


def test_engine_that_fails_again_and_again_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with scheduling(1) as (scheduler, rows, told):
        monkeypatch.setattr(rows, "prefill", lambda *_: 1 / 0)
        for index in range(3):
            assert scheduler.is_alive
            scheduler.submit([told.sequence(index, [1])])
            assert eventually(lambda index=index: told.is_done(index))  # type: ignore[misc]
        assert eventually(lambda: not scheduler.is_alive)


def test_logits_that_are_no_numbers_fail_their_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with scheduling(2) as (scheduler, rows, told):
        decode = rows.decode

        def damaged(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
            logits = decode(tokens, lengths)
            for row in range(len(tokens)):
                if rows.rows[row][0] == 7:
                    logits[row] = np.nan
            return logits

        monkeypatch.setattr(rows, "decode", damaged)
        scheduler.submit([told.sequence(0, [7]), told.sequence(1, [1])])
        assert eventually(lambda: told.is_done(0, 1))
    assert told.pieces[0][-1].failure is Failure.ENGINE
    assert told.tokens(1) == continuation([1], 8)


def test_draining_finishes_what_waits_and_takes_nothing_new() -> None:
    with scheduling(1) as (scheduler, rows, told):
        rows.gate.clear()
        scheduler.submit([told.sequence(0, [1]), told.sequence(1, [2])])
        scheduler.drain()
        with pytest.raises(Draining):
            scheduler.submit([told.sequence(2, [3])])
        rows.gate.set()
        assert eventually(lambda: told.is_done(0, 1))
        assert told.tokens(1) == continuation([2], 8)


def test_closing_tells_those_that_are_not_finished() -> None:
    with scheduling(1) as (scheduler, _, told):
        sequences = [told.sequence(i, [i + 1], max_tokens=10**6) for i in range(2)]
        scheduler.submit(sequences)
        assert eventually(lambda: sequences[0].n_generated > 2)
    assert told.pieces[0][-1].failure is Failure.CLOSED
    assert told.pieces[1] == [Piece(1, failure=Failure.CLOSED)]
