"""Calibration tokens: unlabelled sequences from which statistics are taken.

In: a checkpoint, a text source, sizes and a seed. Out: int64 tokens (n_samples, seq_len), full
sequences only, so that no padding can enter a statistic, with the facts to record beside a result.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.files import write_bytes
from owl_deploy.progress import OnStep, silent
from owl_deploy.text import Encoder, documents, tokens_sha256

__all__ = ["Calibration", "CalibrationSettings", "calibration_tokens"]

# Token budget read from a source, as a multiple of what is sampled: a shard of C4 holds 100 M tokens
# and reading all of it would take longer than pruning.
_READ_FACTOR = 8

# Sampled tokens that are left out so that generated text begins in the middle of a document.
_N_LEFT_OUT = 32


class CalibrationSettings(Protocol):
    """What the settings of a stage say about its calibration; sensible sizes differ from stage to stage."""

    @property
    def calibration(self) -> str:
        """Text source."""

    @property
    def n_samples(self) -> int:
        """Sequences."""

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""

    @property
    def bos(self) -> str:
        """Begin-of-sequence token: auto, always or never."""


@dataclass(frozen=True)
class Calibration:
    """Tokens and where they came from."""

    tokens: NDArray[np.int64]
    """(n_samples, seq_len) int64."""
    source: str
    seed: int
    bos: str
    """The policy asked for: auto, always or never."""
    starts_with_bos: bool
    """Whether every sequence starts with the begin-of-sequence token."""
    is_cached: bool = False
    """Whether generated text was found in the cache."""

    @property
    def sha256(self) -> str:
        """Hash of the token sequence."""
        return tokens_sha256(self.tokens)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the data, for owl.json."""
        n_samples, seq_len = self.tokens.shape
        facts = {key: value for key, value in asdict(self).items() if key not in ("tokens", "is_cached")}
        return {**facts, "n_samples": n_samples, "seq_len": seq_len, "tokens_sha256": self.sha256}


def calibration_tokens(
    checkpoint: Checkpoint, settings: CalibrationSettings, *, seed: int, on_step: OnStep = silent
) -> Calibration:
    """Return the calibration tokens of a run.

    `generated` samples them from the model itself (see `owl_deploy.generation`). Other sources:
    documents are joined in their order, cut into sequences that do not overlap, and n_samples of
    them are drawn by seed without replacement. The published protocol draws one window per long document
    and throws short ones away; joining keeps them, so small texts and models with a short
    vocabulary of long documents work (and it cannot hang).

    Raises:
        OwlDeployError: the source has too little text, or the sequences are longer than the model's context.
    """
    limit = checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and settings.seq_len > limit:
        raise OwlDeployError(
            f"seq_len {settings.seq_len} is longer than the model's context of {limit} tokens: lower it"
        )
    encoder = Encoder.open(checkpoint.path)
    if settings.calibration == "generated":
        return _generated(checkpoint, encoder, settings, seed, on_step)
    tokens = _sampled(encoder, settings, seed)
    starts = encoder.bos_token_id is not None and bool((tokens[:, 0] == encoder.bos_token_id).all())
    return Calibration(tokens, settings.calibration, seed, settings.bos, starts)


def _sampled(encoder: Encoder, settings: CalibrationSettings, seed: int) -> NDArray[np.int64]:
    """Draw sequences from the joined documents of a text source, (n_samples, seq_len)."""
    always = settings.bos == "always"
    if always and encoder.bos_token_id is None:
        raise OwlDeployError("bos: always was asked for, but the tokenizer has no begin-of-sequence token")
    body_len = settings.seq_len - 1 if always else settings.seq_len
    needed = settings.n_samples * body_len
    stream = _joined(encoder, settings, budget=needed * _READ_FACTOR)
    n_windows = len(stream) // body_len
    if n_windows < settings.n_samples:
        raise OwlDeployError(
            f"too little calibration text: {settings.calibration} gives {len(stream)} tokens, and "
            f"{settings.n_samples} samples of "
            f"{settings.seq_len} need {needed}: lower n_samples or seq_len, or name a longer text"
        )
    chosen = random.Random(seed).sample(range(n_windows), settings.n_samples)
    windows = np.stack([stream[i * body_len : (i + 1) * body_len] for i in chosen])
    if not always:
        return windows
    bos = np.full((settings.n_samples, 1), encoder.bos_token_id, dtype=np.int64)
    return np.concatenate([bos, windows], axis=1)


def _joined(encoder: Encoder, settings: CalibrationSettings, *, budget: int) -> NDArray[np.int64]:
    """Return the tokens of the source's documents one after the other, up to about `budget`."""
    pieces: list[NDArray[np.int64]] = []
    n_tokens = 0
    for text in documents(settings.calibration, "calibration"):
        pieces.append(encoder.encode(text, special_tokens=settings.bos == "auto"))
        n_tokens += len(pieces[-1])
        if n_tokens >= budget:
            break
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def _generated(
    checkpoint: Checkpoint, encoder: Encoder, settings: CalibrationSettings, seed: int, on_step: OnStep
) -> Calibration:
    """Return text that the model samples from itself, from the cache where it was made before."""
    if settings.bos == "always" and encoder.bos_token_id is None:
        raise OwlDeployError("bos: always was asked for, but the tokenizer has no begin-of-sequence token")
    opening = _opening(checkpoint, encoder, settings)
    file = _generated_file(checkpoint, settings, seed, opening)
    is_cached = file.is_file()
    if is_cached:
        tokens = np.load(file, allow_pickle=False)
    else:
        from owl_deploy.generation import sample_tokens

        tokens = sample_tokens(
            checkpoint,
            n_samples=settings.n_samples,
            seq_len=settings.seq_len,
            first=opening.first,
            n_left_out=opening.n_left_out,
            seed=seed,
            on_step=on_step,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, tokens, allow_pickle=False)
        write_bytes(file, buffer.getvalue())
    starts_with_bos = opening.first is not None and opening.n_left_out == 0
    return Calibration(tokens, "generated", seed, settings.bos, starts_with_bos, is_cached)


@dataclass(frozen=True)
class _Opening:
    """How a model begins to sample text."""

    first: int | None
    """First token; one drawn uniformly from the vocabulary when None."""
    n_left_out: int
    """Tokens at the start that are not part of the text."""


def _opening(checkpoint: Checkpoint, encoder: Encoder, settings: CalibrationSettings) -> _Opening:
    """Return with which tokens to begin, so that sequences begin as those of another text would.

    A model gives its first token a hidden state of its own, which the others attend to. Trained on sequences whose
    first token is always the same, SmolLM2-135M at 70 % loses that for all others: WikiText-2 perplexity 227 after
    half an hour, where sequences cut from the middle of documents give 124 after seven minutes.
    """
    if settings.bos == "always" or (settings.bos == "auto" and encoder.adds_bos):
        return _Opening(encoder.bos_token_id, 0)
    limit = checkpoint.config.get("max_position_embeddings")
    n_left_out = min(_N_LEFT_OUT, limit - settings.seq_len) if isinstance(limit, int) else _N_LEFT_OUT
    return _Opening(encoder.bos_token_id if n_left_out else None, n_left_out)


def _generated_file(checkpoint: Checkpoint, settings: CalibrationSettings, seed: int, opening: _Opening) -> Path:
    sizes = [settings.n_samples, settings.seq_len]
    key = json.dumps([checkpoint.fingerprint, seed, *sizes, opening.first, opening.n_left_out])
    return owl_deploy_cache() / "generated" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


def must_be_sampled(checkpoint: Checkpoint, settings: CalibrationSettings, *, seed: int) -> bool:
    """Return whether `calibration_tokens` would have the whole model sample text first."""
    if settings.calibration != "generated":
        return False
    opening = _opening(checkpoint, Encoder.open(checkpoint.path), settings)
    return not _generated_file(checkpoint, settings, seed, opening).is_file()
