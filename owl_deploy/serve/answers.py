"""From pieces of sequences to the JSON of OpenAI's answers, whole and in chunks.

In: pieces, in the order they came. Out: dictionaries. Nothing here knows how they are sent.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from owl_deploy.serve.model import ServedModel
from owl_deploy.serve.prompts import Prompts
from owl_deploy.serve.sampling import Choice
from owl_deploy.serve.sequence import Piece

__all__ = ["Answers", "ChatAnswers", "TextAnswers"]


class Answers(ABC):
    """The answers to one request while they grow."""

    def __init__(self, model: ServedModel, prompts: Prompts, prefix: str, kind: str) -> None:
        self._model, self._prompts = model, prompts
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
        self._kind = kind
        n = len(prompts.tokens) * prompts.n
        self._texts = [""] * n
        self._choices: list[list[Choice]] = [[] for _ in range(n)]
        self._reasons: list[str | None] = [None] * n
        self.n_open = n
        """Answers that are not finished."""

    def add(self, piece: Piece) -> None:
        """Take a piece in."""
        self._texts[piece.index] += piece.text
        self._choices[piece.index] += piece.choices
        if piece.is_last:
            self._reasons[piece.index] = piece.finish_reason
            self.n_open -= 1

    def whole(self) -> dict[str, Any]:
        """Return the answer to a request that is not streamed."""
        choices = [
            self._whole_choice(index, self._texts[index], self._choices[index]) | {"finish_reason": reason}
            for index, reason in enumerate(self._reasons)
        ]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterable[dict[str, Any]]:
        """Return the chunks that come before all text."""
        return ()

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """Return the chunk of a piece that was just taken in; None where it tells nothing."""
        if (
            not piece.text
            and not piece.is_last
            and not (piece.choices and self._prompts.sampling.n_logprobs is not None)
        ):
            return None
        choice = {"index": piece.index, **self._part(piece), "finish_reason": piece.finish_reason}
        return self._chunk([choice])

    def closing(self) -> Iterable[dict[str, Any]]:
        """Return the chunks that come behind all text."""
        if self._prompts.includes_usage:
            yield self._chunk([]) | {"usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._prompts.includes_usage else {}
        return {**self._head, "object": self._chunk_kind, "choices": choices, **usage}

    def _usage(self) -> dict[str, int]:
        """Count tokens; a prompt counts once, however many answers it has."""
        n_prompt, n_completion = self._prompts.n_prompt_tokens, sum(map(len, self._choices))
        return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}

    @property
    @abstractmethod
    def _chunk_kind(self) -> str:
        """The `object` of chunks."""

    @abstractmethod
    def _whole_choice(self, index: int, text: str, choices: list[Choice]) -> dict[str, Any]:
        """Return a whole answer, but for its finish reason."""

    @abstractmethod
    def _part(self, piece: Piece) -> dict[str, Any]:
        """Return what a piece adds to an answer."""


class TextAnswers(Answers):
    """Answers to `/v1/completions`."""

    def __init__(self, model: ServedModel, prompts: Prompts) -> None:
        super().__init__(model, prompts, "cmpl", "text_completion")
        self._offsets = [0] * self.n_open

    @property
    def _chunk_kind(self) -> str:
        return self._kind

    def _whole_choice(self, index: int, text: str, choices: list[Choice]) -> dict[str, Any]:
        self._offsets[index] = 0
        return {"index": index, "text": text, "logprobs": self._logprobs(index, choices)}

    def _part(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(piece.index, list(piece.choices))}

    def _logprobs(self, index: int, choices: list[Choice]) -> dict[str, Any] | None:
        n = self._prompts.sampling.n_logprobs
        if n is None:
            return None
        texts = [self._model.token_text(choice.token) for choice in choices]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        tops = [
            {self._model.token_text(token): logprob for token, logprob in reversed(choice.most_likely)}
            for choice in choices
        ]
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": tops if n else None,
            "text_offset": offsets,
        }


class ChatAnswers(Answers):
    """Answers to `/v1/chat/completions`."""

    def __init__(self, model: ServedModel, prompts: Prompts) -> None:
        super().__init__(model, prompts, "chatcmpl", "chat.completion")

    @property
    def _chunk_kind(self) -> str:
        return f"{self._kind}.chunk"

    def opening(self) -> Iterable[dict[str, Any]]:
        """Tell the role, as OpenAI's first chunk does."""
        for index in range(self.n_open):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _whole_choice(self, index: int, text: str, choices: list[Choice]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._logprobs(choices)}

    def _part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"delta": delta, "logprobs": self._logprobs(list(piece.choices))}

    def _logprobs(self, choices: list[Choice]) -> dict[str, Any] | None:
        if self._prompts.sampling.n_logprobs is None:
            return None
        content = []
        for choice in choices:
            tops = [self._token(token, logprob) for token, logprob in choice.most_likely]
            assert choice.logprob is not None
            content.append(self._token(choice.token, choice.logprob) | {"top_logprobs": tops})
        return {"content": content}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._model.token_text(token), self._model.token_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": raw}
