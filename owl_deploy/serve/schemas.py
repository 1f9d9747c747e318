"""Bodies of requests and answers: what OpenAI's interface calls them, with the limits of this server.

Unknown fields and those that would change an answer without being supported are refused, not ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatAnswer",
    "ChatChunk",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "ErrorAnswer",
    "Health",
    "ModelList",
    "ModelObject",
    "SamplingRequest",
    "Usage",
]

_TEXT = 4096
_LARGEST_SEED = 2**63 - 1


class _Request(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(_Request):
    """How an answer is streamed."""

    include_usage: bool = False
    """Whether a last chunk tells the tokens used."""


Stop = Annotated[str, Field(min_length=1, max_length=_TEXT)]


class SamplingRequest(_Request):
    """What completions and chats have in common."""

    model: str
    """Name of the served model."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers to each prompt; 1 when not given."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    """Strings before which the answer ends."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most likely token; 1 when not given."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the probability that the tokens in question have together; 1 when not given."""
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """How many tokens are in question; 0, and when not given, all."""
    seed: Annotated[int, Field(ge=-_LARGEST_SEED, le=_LARGEST_SEED)] | None = None
    """Of all random choices; the same request with the same seed gets the same answer."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    """Added to the logits of tokens, by their ids."""
    user: str | None = None
    """Ignored."""


class CompletionRequest(SamplingRequest):
    """A text to go on with."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    """One text or several, as strings or as token ids."""
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Tokens of an answer at most; 16 when not given."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the most likely tokens are told with each."""
    echo: Literal[False] | None = None
    """Not supported."""
    best_of: Literal[1] | None = None
    """Not supported."""
    suffix: None = None
    """Not supported."""


class TextPart(_Request):
    """A text as part of a message."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    """Ignored, unless the model's chat template uses it."""


class ResponseFormat(_Request):
    """The form of an answer."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Tokens of an answer at most; when not given, what the context and the server allow."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """The same, by its newer name."""
    logprobs: bool | None = None
    """Whether the log-probability of each token is told."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the most likely tokens are told with each; needs logprobs."""
    response_format: ResponseFormat | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """Answers to a completion request, or a chunk of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """The same, with the most likely tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """Answers to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelObject(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of prompt and answer together at most."""
    has_chat_template: bool
    """Whether it can be asked under /v1/chat/completions."""


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ModelObject]


class Health(BaseModel):
    """A state of the server."""

    status: Literal["ok"]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that was not served."""

    error: ErrorDetail
