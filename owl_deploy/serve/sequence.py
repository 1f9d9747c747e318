"""One prompt and the answer that grows behind it, and the pieces in which the answer is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from owl_deploy.serve.sampling import Choice, Sampler, SamplingSettings
from owl_deploy.serve.text_stream import TextStream

__all__ = ["Failure", "FinishReason", "Piece", "Sequence"]

FinishReason = Literal["stop", "length"]


class Failure(Enum):
    """Why a sequence has no end of its own."""

    NOT_STARTED = "the request's time was over before its turn came"
    ENGINE = "the engine failed"
    CLOSED = "the server was stopped"


@dataclass(frozen=True)
class Piece:
    """What one step added to a sequence."""

    index: int
    """Number of the sequence in its request."""
    text: str = ""
    choices: tuple[Choice, ...] = ()
    """Tokens since the last piece, whether or not their text is out yet."""
    finish_reason: FinishReason | None = None
    failure: Failure | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.failure is not None


@dataclass(eq=False)
class Sequence:
    """A prompt on its way through the scheduler, which alone changes it."""

    prompt: NDArray[np.int64]
    """(n,), at least one token."""
    sampling: SamplingSettings
    max_tokens: int
    stop: tuple[str, ...]
    end_tokens: frozenset[int]
    tokenizer: Tokenizer
    client: str
    """Clients take turns when they have to wait."""
    deadline: float
    """On the clock of time.monotonic."""
    emit: Callable[[Piece], None]
    """Told every piece, on the engine's thread."""
    index: int = 0
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    """When it left the line."""
    is_cancelled: bool = False
    """Set by whoever no longer wants the answer, at any time and on any thread."""
    n_past: int = 0
    """Positions in the cache."""
    n_generated: int = 0
    newest: int = 0
    """The token that no step has run yet."""
    told_at: float = 0.0
    """When the newest token was there."""
    sampler: Sampler = field(init=False)
    text: TextStream = field(init=False)

    def __post_init__(self) -> None:
        self.sampler, self.text = Sampler(self.sampling), TextStream(self.tokenizer, self.stop)

    def is_over(self, now: float) -> bool:
        """Whether it has to leave before it is finished: nobody wants it any more, or its time has passed."""
        return self.is_cancelled or now >= self.deadline

    def extend(self, logits: NDArray[np.float32]) -> Piece:
        """Choose the next token from logits (vocab,); returns what that adds. Raises FloatingPointError."""
        choice = self.sampler.choose(logits)
        self.newest = choice.token
        self.n_generated += 1
        if choice.token in self.end_tokens:
            return Piece(self.index, self.text.finish(), (choice,), "stop")
        text = self.text.push(choice.token)
        if self.text.is_stopped:
            return Piece(self.index, text, (choice,), "stop")
        if self.n_generated >= self.max_tokens:
            return self.cut(text, (choice,))
        return Piece(self.index, text, (choice,))

    def cut(self, text: str = "", choices: tuple[Choice, ...] = ()) -> Piece:
        """Return the last piece of a sequence that ends before the model ended it."""
        return Piece(self.index, text + self.text.finish(), choices, "stop" if self.text.is_stopped else "length")
