"""The gate every artifact passes before it exists: it must compute what its checkpoint computes.

In: an artifact and its checkpoint. Out: how far their logits are apart on fixed real text, and whether
the checkpoint names the tokens by which the artifact continues it in its own engine. The checkpoint
runs block by block in torch, so that any model fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.engines.process import EngineProcess, open_engine
from owl_deploy.errors import ParityError
from owl_deploy.evaluation import divergence
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import open_skeleton
from owl_deploy.streamed_logits import streamed_logits
from owl_deploy.text import Encoder, evaluation_text

__all__ = ["DIVERGENCE_LIMITS", "MAX_RELATIVE_DIFFERENCE", "DivergenceLimit", "Parity", "check_parity"]

MAX_RELATIVE_DIFFERENCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.25, "int4": 0.95}
"""Per precision, from fine to coarse: largest logit difference allowed, as a share of the largest reference logit.

With few bits a single logit may be far off where the distribution is not; there it only catches a broken one.
"""


@dataclass(frozen=True)
class DivergenceLimit:
    """How far the next-token distributions of an artifact may be from those of its checkpoint."""

    kl_divergence: float
    """Largest mean over the positions of the text, in nats."""
    top1_agreement: float
    """Least share of positions of the text with the same most likely token."""
    greedy_agreement: float
    """The same in the artifact's greedy continuation, fed through the cache: lower, because greedy text repeats itself,
    and one close call then counts many times. A cache that is used wrongly comes nowhere near."""


DIVERGENCE_LIMITS = {
    "fp16": DivergenceLimit(kl_divergence=0.001, top1_agreement=0.97, greedy_agreement=0.8),
    "int8": DivergenceLimit(kl_divergence=0.02, top1_agreement=0.85, greedy_agreement=0.5),
    "int4": DivergenceLimit(kl_divergence=0.5, top1_agreement=0.60, greedy_agreement=0.25),
}
"""Per precision that may name another token now and then; in fp32 every greedy token must be the checkpoint's.

The distributions of a pruned model are flat, and its most likely token is often a close call: SmolLM2-135M with
SparseGPT at 60 and 70 % in int8 names the checkpoint's at 91 to 93 % of 1024 positions, at a KL divergence of 0.009 to
0.016.
"""

# Few positions are few samples: the first 128 of the text have 84 and 87 % in the cases above.
_PREFILL_TOKENS = 512
_MAX_LOGITS = 1 << 25
_PROMPT_TOKENS = 32
_GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Parity:
    """How close an artifact is to its checkpoint."""

    max_abs_logit_difference: float
    relative_logit_difference: float
    """The largest difference over the largest reference logit, both absolute."""
    kl_divergence: float
    top1_agreement: float
    n_tokens: int
    """Positions of the compared text."""
    n_greedy_tokens: int
    """Tokens of the artifact's greedy continuation that the checkpoint names too; in fp32 all of them."""
    passed: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        return asdict(self)


def check_parity(
    artifact: OnnxArtifact, checkpoint: Checkpoint, *, threads: int, name: str | None = None, on_step: OnStep = silent
) -> Parity:
    """Compare an artifact in its engine with its checkpoint in torch.

    The text is the held-out part of the Python language reference: one prefill of 512 tokens (fewer
    where the vocabulary is so large that their logits pass 128 MiB), then 64 greedy tokens of the
    artifact behind a prompt of 32, token by token through the KV cache; less where the artifact's
    context is shorter. The checkpoint runs over the same tokens. The limits are
    those of the coarsest precision in the artifact.

    Args:
        artifact: what was exported, perhaps still under a temporary name.
        checkpoint: what it was exported from.
        threads: of the engine.
        name: what to call the artifact in messages; its folder's name where not given.

    Raises:
        ParityError: the logits or a greedy token differ, in few bits too many of them; the message names what.
        EngineUnavailableError: the engine cannot run the artifact at all.
    """
    name, limit = name or artifact.name, artifact.facts.max_positions
    precision = _coarsest_precision(artifact)
    n_prefill = min(_PREFILL_TOKENS, max(1, _MAX_LOGITS // artifact.facts.vocab_size), limit)
    text = Encoder.open(checkpoint.path).encode(evaluation_text("python-docs"))[:n_prefill]
    prompt = text[: min(_PROMPT_TOKENS, limit // 3)]
    n_greedy = min(_GREEDY_TOKENS, limit - len(prompt))
    with open_engine(artifact, threads=threads, n_tokens=len(text), capacity=len(text)) as engine:
        actual = engine.forward(text, 0)
    on_step(Step("checking parity", 1, 3, "prefill"))
    with open_engine(artifact, threads=threads, n_tokens=1, capacity=len(prompt) + n_greedy) as engine:
        continuation = _continuation(engine, prompt, n_greedy)
    on_step(Step("checking parity", 2, 3, f"{n_greedy} greedy tokens"))
    expected = _expected(checkpoint.path, tuple(checkpoint.fingerprint.items()), text.tobytes())
    parity = _compare_logits(name, precision, expected, actual)
    # The same path, were it the checkpoint that went on: one pass says what it names behind each token.
    path = np.concatenate([prompt, continuation[:-1]])
    named = _expected(checkpoint.path, tuple(checkpoint.fingerprint.items()), path.tobytes())[len(prompt) - 1 :]
    is_exact = precision not in DIVERGENCE_LIMITS
    min_agreement = 1.0 if is_exact else DIVERGENCE_LIMITS[precision].greedy_agreement
    n_equal = _compare_greedy(name, named, continuation, min_agreement=min_agreement)
    on_step(Step("checking parity", 3, 3, f"logits {parity.relative_logit_difference:.1e}"))
    return replace(parity, n_greedy_tokens=n_equal)


def _coarsest_precision(artifact: OnnxArtifact) -> str:
    """Return the precision of the blocks or of the head, whichever has fewer bits."""
    precision = artifact.facts.precision
    found = (precision, artifact.manifest["settings"]["head_precision"])
    return max(found, key=list(MAX_RELATIVE_DIFFERENCE).index)


@lru_cache(maxsize=4)  # a recipe exports the same two checkpoints for every engine
def _expected(path: Path, _fingerprint: tuple[tuple[str, str], ...], tokens: bytes) -> NDArray[np.float32]:
    """Return a checkpoint's logits (n, vocab) of int64 tokens; the fingerprint is there to be compared."""
    skeleton = open_skeleton(open_checkpoint(str(path)))
    return streamed_logits(skeleton, np.frombuffer(tokens, np.int64)[None].copy())[0]


def _compare_logits(name: str, precision: str, expected: NDArray[np.float32], actual: NDArray[np.float32]) -> Parity:
    """Return the distances, or raise naming the position that is furthest off."""
    if actual.shape != expected.shape:
        raise ParityError(f"{name}: logits have shape {actual.shape}, the checkpoint's have {expected.shape}")
    with np.errstate(invalid="ignore"):  # Inf - Inf is NaN, which the limit refuses
        difference = np.abs(actual - expected)
    largest = float(difference.max()) if np.isfinite(actual).all() else float("inf")
    relative = largest / (float(np.abs(expected).max()) or 1.0)  # a model may answer zeros
    limit = MAX_RELATIVE_DIFFERENCE[precision]
    if not relative <= limit:
        position, token = np.unravel_index(int(np.nan_to_num(difference, nan=np.inf).argmax()), difference.shape)
        raise ParityError(
            f"{name}: logits differ from the checkpoint by {relative:.2e} of the largest one (allowed {limit:g}); "
            f"furthest at position {position}, token {token}: {actual[position, token]:.6g} instead of "
            f"{expected[position, token]:.6g}"
        )
    kl, top1 = divergence(expected, actual)
    divergence_limit = DIVERGENCE_LIMITS.get(precision)
    if divergence_limit is not None and not kl <= divergence_limit.kl_divergence:
        raise ParityError(
            f"{name}: KL divergence from the checkpoint is {kl:.3g} nats "
            f"(allowed in {precision}: {divergence_limit.kl_divergence:g}): export with more bits"
        )
    if divergence_limit is not None and not top1 >= divergence_limit.top1_agreement:
        raise ParityError(
            f"{name}: the most likely token is the checkpoint's at {top1:.1%} of positions "
            f"(needed in {precision}: {divergence_limit.top1_agreement:.0%}): export with more bits"
        )
    return Parity(largest, relative, kl, top1, n_tokens=len(expected), n_greedy_tokens=0)


def _continuation(engine: EngineProcess, prompt: NDArray[np.int64], n_tokens: int) -> NDArray[np.int64]:
    """Feed a prompt and then the engine's own most likely tokens, one by one; returns these, (n_tokens,)."""
    tokens = [int(token) for token in prompt]
    for position in range(len(prompt) + n_tokens - 1):
        logits = engine.forward(np.array(tokens[position : position + 1]), position)[0]
        if position + 1 == len(tokens):
            tokens.append(int(logits.argmax()))
    return np.array(tokens[len(prompt) :])


def _compare_greedy(
    name: str, expected: NDArray[np.float32], tokens: NDArray[np.int64], *, min_agreement: float = 1.0
) -> int:
    """Return how many greedy tokens are those of the reference, given all that stand before them.

    Where all must be, raise at the first that is not.

    Args:
        expected: logits of the reference in front of each token, (n, vocab).
        tokens: what the artifact went on with, (n,).
    """
    wanted = expected.argmax(axis=1)
    differs = wanted != tokens
    if differs.any() and min_agreement == 1.0:
        first = int(differs.argmax())
        raise ParityError(
            f"{name}: greedy token {first} is {tokens[first]}, the checkpoint's is {wanted[first]} (its logits "
            f"{expected[first, tokens[first]]:.6g} and {expected[first, wanted[first]]:.6g})"
        )
    n_equal = int((~differs).sum())
    if n_equal < min_agreement * len(tokens):
        raise ParityError(
            f"{name}: {n_equal} of {len(tokens)} greedy tokens are the checkpoint's "
            f"(needed: {min_agreement:.0%}): export with more bits"
        )
    return n_equal
