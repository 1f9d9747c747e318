"""The served model as requests see it: its name, its tokenizer and template, and what fits into its context."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.serve.chat_template import ChatTemplate
from owl_deploy.text import Encoder

__all__ = ["ServedModel", "open_model"]

_REPLACEMENT = "\ufffd"
"""What decoding writes in place of bytes that are no text."""


@dataclass(frozen=True)
class ServedModel:
    """Everything about a model but its graph."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_tokens: frozenset[int]
    """Tokens that end an answer."""
    vocab_size: int
    context_length: int
    """Tokens of prompt and answer together at most."""
    created: int
    """Seconds since 1970 when it was opened."""

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with the tokenizer's own first and last ones where asked for."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def token_text(self, token: int) -> str:
        """Return a token alone as text: special ones by name, a part of a character as the vocabulary has it."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text if _REPLACEMENT not in text else (self.tokenizer.id_to_token(token) or text)

    def token_bytes(self, token: int) -> list[int] | None:
        """Return the bytes of a token's text; None for a part of a character, whose bytes are not told."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return None if _REPLACEMENT in text else list(text.encode())

    def describe(self) -> dict[str, Any]:
        """Return the model as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "owl-deploy",
            "max_model_len": self.context_length,
            "has_chat_template": self.template is not None,
        }


def open_model(artifact: OnnxArtifact, *, name: str | None, context_length: int) -> ServedModel:
    """Read an artifact's tokenizer, template and end tokens.

    Raises:
        UnsupportedModelError: one of them is missing or damaged.
    """
    file = artifact.path / "genai_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["model"]["eos_token_id"]
        ends = frozenset(map(int, found if isinstance(found, list) else [found]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{file} does not say which tokens end a text: export the artifact again"
        ) from error
    return ServedModel(
        name or artifact.name,
        Encoder.open(artifact.path).tokenizer,
        ChatTemplate.open(artifact.path),
        ends,
        artifact.facts.vocab_size,
        min(context_length, artifact.facts.max_positions),
        int(time.time()),
    )
