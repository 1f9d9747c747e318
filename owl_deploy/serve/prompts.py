"""From the body of a request to sequences for the scheduler: prompts as tokens, settings, and every limit.

Pure work on the processor, done away from the event loop: a prompt of a megabyte takes a second to tokenise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from owl_deploy.serve.errors import ApiError
from owl_deploy.serve.model import ServedModel
from owl_deploy.serve.sampling import SamplingSettings
from owl_deploy.serve.schemas import ChatRequest, CompletionRequest, SamplingRequest
from owl_deploy.serve.sequence import Piece, Sequence

__all__ = ["Prompts", "read_prompts"]

_DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Prompts:
    """What a request asks for, checked."""

    tokens: list[list[int]]
    max_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...]
    n: int
    """Answers to each prompt."""
    n_prompt_tokens: int
    is_streamed: bool
    includes_usage: bool

    def sequences(
        self, model: ServedModel, *, client: str, arrived: float, deadline: float, emit: Callable[[Piece], None]
    ) -> list[Sequence]:
        """Return one sequence for every answer, in the order of their indices."""
        found = []
        for index in range(len(self.tokens) * self.n):
            settings = self.sampling
            if settings.seed is not None and self.n > 1:  # else all answers to one prompt would be the same
                settings = SamplingSettings(**{**vars(settings), "seed": settings.seed + index % self.n})
            found.append(
                Sequence(
                    prompt=np.array(self.tokens[index // self.n], np.int64),
                    sampling=settings,
                    max_tokens=self.max_tokens,
                    stop=self.stop,
                    end_tokens=model.end_tokens,
                    tokenizer=model.tokenizer,
                    client=client,
                    deadline=deadline,
                    emit=emit,
                    index=index,
                    arrived=arrived,
                )
            )
        return found


def read_prompts(
    request: CompletionRequest | ChatRequest, model: ServedModel, *, max_tokens: int, max_sequences: int
) -> Prompts:
    """Check a request against the model and the server's limits.

    Args:
        request: a body of the right shape.
        model: what it asks.
        max_tokens: the most that a request may ask for.
        max_sequences: prompts times answers of one request.

    Raises:
        ApiError: 400 or 404, with what is wrong.
    """
    if request.model != model.name:
        raise ApiError(
            404,
            f"there is no model {request.model[:100]!r} here, only {model.name!r}",
            code="model_not_found",
            param="model",
        )
    if isinstance(request, ChatRequest):
        tokens = [_conversation(request, model)]
        asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        n_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    else:
        tokens = _texts(request, model)
        asked = _DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        n_logprobs = request.logprobs
    n = request.n or 1
    if len(tokens) * n > max_sequences:
        raise ApiError(
            400,
            f"{len(tokens)} prompts with {n} answers each: a request gets at most {max_sequences} answers here",
            param="n",
            code="invalid_value",
        )
    return Prompts(
        tokens=tokens,
        max_tokens=_answer_length(request, tokens, asked, model.context_length, max_tokens),
        sampling=_sampling(request, model, n_logprobs),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        n=n,
        n_prompt_tokens=sum(map(len, tokens)),
        is_streamed=bool(request.stream),
        includes_usage=request.stream_options is not None and request.stream_options.include_usage,
    )


def _conversation(request: ChatRequest, model: ServedModel) -> list[int]:
    """Return the tokens of a chat's prompt."""
    if model.template is None:
        raise ApiError(
            400,
            f"{model.name} has no chat template, so it does not know conversations: ask /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    messages: list[dict[str, Any]] = []
    for message in request.messages:
        content = (
            message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
        )
        name = {"name": message.name} if message.name is not None else {}
        role = "system" if message.role == "developer" else message.role  # its newer name, which no template knows
        messages.append({"role": role, "content": content, **name})
    try:
        text = model.template.render(messages)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
    return _checked(model.encode(text, special_tokens=False), model, "messages")  # the template wrote them itself


def _texts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Return the tokens of every prompt."""
    prompt = request.prompt
    many: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    return [
        _checked(model.encode(one, special_tokens=True) if isinstance(one, str) else one, model, "prompt")
        for one in many
    ]


def _checked(tokens: list[int], model: ServedModel, param: str) -> list[int]:
    if not tokens:
        raise ApiError(400, f"{param} holds no text: the model needs a token to begin with", param=param)
    if not all(0 <= token < model.vocab_size for token in tokens):
        raise ApiError(400, f"token ids must be 0 to {model.vocab_size - 1}", param=param, code="invalid_value")
    return tokens


def _answer_length(
    request: SamplingRequest, tokens: list[list[int]], asked: int | None, context_length: int, max_tokens: int
) -> int:
    """Return how many tokens an answer may have."""
    longest = max(map(len, tokens))
    if longest >= context_length:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens and the model holds {context_length}, answer included: shorten it",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    if asked is None:
        return min(max_tokens, context_length - longest)
    if asked > max_tokens:
        raise ApiError(
            400, f"max_tokens is {asked}, and this server allows {max_tokens}", param="max_tokens", code="invalid_value"
        )
    if longest + asked > context_length:
        raise ApiError(
            400,
            f"{longest} tokens of prompt and max_tokens of {asked} are more than the model's {context_length}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked


def _sampling(request: SamplingRequest, model: ServedModel, n_logprobs: int | None) -> SamplingSettings:
    """Return a request's sampling settings, with OpenAI's defaults."""
    biases = {}
    for key, bias in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < model.vocab_size):
            raise ApiError(
                400,
                f"logit_bias: {key[:20]!r} is no token id, which is 0 to {model.vocab_size - 1}",
                param="logit_bias",
                code="invalid_value",
            )
        biases[int(key)] = bias
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        # numpy seeds its generators with numbers from 0 on.
        "seed": None if request.seed is None else request.seed % 2**64,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
    }
    return SamplingSettings(
        **{name: value for name, value in given.items() if value is not None}, logit_bias=biases, n_logprobs=n_logprobs
    )
