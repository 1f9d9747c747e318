"""Quality of a model: perplexity, and closeness to a reference, by the published protocol.

In: checkpoints (run by torch) and artifacts (run by their own engine), a text, a window. Out: one
`Evaluation` per model, with every setting beside the number. It never times anything.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from owl_deploy.artifact import is_artifact, open_artifact
from owl_deploy.engines.peer import is_peer, open_peer
from owl_deploy.engines.process import EngineProcess, open_engine
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.files import file_sha256, write_json
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import EvalSettings
from owl_deploy.text import Encoder, evaluation_text, tokens_sha256
from owl_deploy.threads import resolve_threads

__all__ = [
    "Evaluation",
    "LanguageModel",
    "Windows",
    "divergence",
    "evaluate",
    "evaluation_windows",
    "log_likelihoods",
    "open_encoder",
    "open_language_model",
]

log = logging.getLogger(__name__)

# Tokens per call of an engine that is compiled for fixed shapes: long enough to multiply at full
# speed, short enough that the logits (256 x 49152 float32 = 48 MiB) are cheap to hand over.
_CHUNK = 256

# Rows of logits at a time: 32 x 49152 float32 stay in the second and third cache; 256 take three times as long.
_ROWS = 32


class LanguageModel(Protocol):
    """What can be evaluated."""

    name: str

    def logits(self, tokens: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        """Return the logits (n - start, vocab) float32 of tokens start to n - 1, each seeing those before it.

        With a start, what is known of the text before is used again as far as the two begin alike.
        """


@dataclass(frozen=True)
class Windows:
    """Evaluation text as tokens, cut into windows."""

    text: str
    tokens: NDArray[np.int64]
    """(n_windows, window) int64: not overlapping, from the start of the text, tail dropped."""
    starts_with_bos: bool

    @property
    def sha256(self) -> str:
        """Hash of the tokens."""
        return tokens_sha256(self.tokens)


@dataclass(frozen=True)
class Evaluation:
    """Quality of one model on one text, with the settings that the numbers depend on."""

    perplexity: float
    text: str
    window: int
    n_windows: int
    starts_with_bos: bool
    tokens_sha256: str
    engine: str
    kl_divergence: float | None = None
    """Mean over positions of KL(reference || model), in nats."""
    top1_agreement: float | None = None
    """Share of positions where model and reference have the same most likely token."""
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy eval --json` prints."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate(
    models: Sequence[str],
    settings: EvalSettings = EvalSettings(),
    *,
    reference: str | None = None,
    threads: int | Literal["auto"] = "auto",
    offline: bool = False,
    on_step: OnStep = silent,
) -> list[Evaluation]:
    """Measure perplexity, and closeness to a reference, of checkpoints and artifacts.

    The text is tokenised once by the tokenizer of the first model, as one string. All models see
    the same windows, and the reference runs once per window. An artifact keeps its results in its
    own `evaluations.json` and is not run again for the same text, window and reference.

    Args:
        models: checkpoints or artifacts, by path or name.
        settings: text and windows.
        reference: the model that KL divergence and agreement are taken against.
        threads: of torch and the engines.
        offline: never ask a hub.

    Returns:
        One evaluation per model, in order.

    Raises:
        OwlDeployError: and its subclasses.
    """
    n_threads = resolve_threads(threads).n
    windows = evaluation_windows(open_encoder(models[0], offline=offline), settings)
    key = _settings_key(windows, reference, offline=offline)
    known = [_stored(model, key) for model in models]
    missing = [model for model, evaluation in zip(models, known, strict=True) if evaluation is None]
    computed = _evaluate(missing, windows, reference, n_threads, offline, on_step) if missing else []
    for model, evaluation in zip(missing, computed, strict=True):
        _store(model, key, evaluation)
    fresh = iter(computed)
    return [evaluation if evaluation is not None else next(fresh) for evaluation in known]


def _evaluate(
    models: Sequence[str], windows: Windows, reference: str | None, n_threads: int, offline: bool, on_step: OnStep
) -> list[Evaluation]:
    """Run every model over every window, side by side."""
    sums = [_Sums() for _ in models]
    n_windows, window = windows.tokens.shape
    with ExitStack() as stack:
        opened = [stack.enter_context(open_language_model(m, n_threads, window, offline=offline)) for m in models]
        judge = (
            stack.enter_context(open_language_model(reference, n_threads, window, offline=offline))
            if reference
            else None
        )
        done = 0
        for row in windows.tokens:
            expected = judge.logits(row) if judge else None
            for model, total in zip(opened, sums, strict=True):
                total.add(model.logits(row), row, expected)
                done += 1
                on_step(Step("evaluating", done, n_windows * len(models), f"perplexity {total.perplexity:.2f}"))
    return [
        Evaluation(
            perplexity=total.perplexity,
            text=windows.text,
            window=window,
            n_windows=n_windows,
            starts_with_bos=windows.starts_with_bos,
            tokens_sha256=windows.sha256,
            engine=model.name,
            kl_divergence=float(np.mean(total.kl)) if reference else None,
            top1_agreement=float(np.mean(total.top1)) if reference else None,
            reference=reference,
        )
        for model, total in zip(opened, sums, strict=True)
    ]


class _Sums:
    """Figures of one model, window by window; all windows are of one length, so plain means are right."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.kl: list[float] = []
        self.top1: list[float] = []

    def add(self, logits: NDArray[np.float32], tokens: NDArray[np.int64], expected: NDArray[np.float32] | None) -> None:
        if not np.isfinite(logits).all():
            raise OwlDeployError("the model's logits hold NaN or Inf: no perplexity can be given")
        self.nll.append(mean_nll(logits, tokens))
        if expected is not None:
            kl, top1 = divergence(expected, logits)
            self.kl.append(kl)
            self.top1.append(top1)

    @property
    def perplexity(self) -> float:
        """Exp of the mean over windows of the mean negative log-likelihood per token."""
        return perplexity(self.nll)


def perplexity(window_nlls: Sequence[float]) -> float:
    """Return exp(mean of window means), in which every window counts the same (published protocol)."""
    return math.exp(min(float(np.mean(window_nlls)), 700.0))


def mean_nll(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> float:
    """Return the mean negative log-likelihood, in nats, of each token after the first.

    Args:
        logits: (n, vocab); row i predicts token i + 1, and the last row nothing.
        tokens: (n,).
    """
    return -float(log_likelihoods(logits[:-1], tokens[1:]).mean())


def log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the log-likelihood of one token per row, in nats, (n,).

    Args:
        logits: (n, vocab).
        targets: (n,), the tokens.
    """
    chosen: NDArray[np.float64] = logits[np.arange(len(targets)), targets].astype(np.float64)
    log_sums: NDArray[np.float64] = np.concatenate([_log_sums(rows) for rows in _pieces(logits)])
    chosen -= log_sums
    return chosen


def divergence(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean KL(expected || actual) in nats, and the share of rows with the same argmax.

    Args:
        expected: logits of the reference, (n, vocab).
        actual: logits of the model, (n, vocab).
    """
    kl = 0.0
    for rows, others in zip(_pieces(expected), _pieces(actual), strict=True):
        log_sums = _log_sums(rows)
        p = np.exp(rows - log_sums[:, None].astype(np.float32))
        kl -= float((p.sum(axis=1, dtype=np.float64) * (log_sums - _log_sums(others))).sum())
        p *= rows - others
        kl += float(p.sum(dtype=np.float64))
    return kl / len(expected), float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean())


def _pieces(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    return (logits[start : start + _ROWS] for start in range(0, len(logits), _ROWS))


def _log_sums(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log(sum(exp(row))) of every row, (n,).

    Exponentials are float32 and sums float64: a ninth of the time of float64 throughout, and eight digits.
    """
    largest = logits.max(axis=1, keepdims=True)
    log_sums: NDArray[np.float64] = np.log(np.exp(logits - largest).sum(axis=1, dtype=np.float64))
    log_sums += largest[:, 0]
    return log_sums


def evaluation_windows(encoder: Encoder, settings: EvalSettings) -> Windows:
    """Cut the evaluation text into windows (protocol of GPTQ, SparseGPT and Wanda).

    Raises:
        OwlDeployError: the text is shorter than one window.
    """
    tokens = encoder.encode(evaluation_text(settings.text))
    n_windows = len(tokens) // settings.window
    if n_windows == 0:
        raise OwlDeployError(
            f"too little evaluation text: {settings.text} gives {len(tokens)} tokens, one window needs "
            f"{settings.window}: lower window"
        )
    n_windows = min(n_windows, settings.max_windows or n_windows)
    starts_with_bos = encoder.bos_token_id is not None and int(tokens[0]) == encoder.bos_token_id
    return Windows(settings.text, tokens[: n_windows * settings.window].reshape(n_windows, -1), starts_with_bos)


@contextmanager
def open_language_model(model: str, threads: int, window: int, *, offline: bool = False) -> Iterator[LanguageModel]:
    """Open a checkpoint in torch, or an artifact or a peer in its own engine, for texts of `window` tokens."""
    if _is_run_by_an_engine(model):
        artifact = open_artifact(Path(model)) if is_artifact(Path(model)) else open_peer(Path(model))
        if window > artifact.facts.max_positions:
            raise UnsupportedModelError(
                f"window {window} is longer than the {artifact.facts.max_positions} positions of {artifact.name}: "
                "lower it"
            )
        # Compiled for one number of tokens, which must then divide the window; ONNX Runtime takes any.
        is_fixed = artifact.facts.target == "deepsparse"
        chunk = math.gcd(_CHUNK, window) if is_fixed else min(_CHUNK, window)
        with open_engine(artifact, threads=threads, n_tokens=chunk, capacity=window) as engine:
            yield _EngineModel(engine, chunk, is_fixed=is_fixed)
        return
    import torch

    from owl_deploy.checkpoint import open_checkpoint
    from owl_deploy.generation import load_torch_model

    torch.set_num_threads(threads)
    yield _TorchModel(load_torch_model(open_checkpoint(model, offline=offline)))


class _TorchModel:
    """A transformers model."""

    name = "torch"

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen = np.empty(0, dtype=np.int64)
        self._cache: Any = None

    def logits(self, tokens: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        from owl_deploy.generation import torch_logits

        return torch_logits(self.model, tokens) if start == 0 else self._tail(tokens, start)

    def _tail(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Compute only what the cache does not hold."""
        import torch
        from transformers import DynamicCache

        n_known = min(_n_alike(self._seen, tokens), start)
        self._seen = tokens[:0]
        if n_known:
            self._cache.crop(n_known)
        else:
            self._cache = DynamicCache()  # without the config: layers with a sliding window could not be cut back
        inputs = torch.from_numpy(tokens[n_known:])[None]
        with torch.inference_mode():
            output = self.model(input_ids=inputs, past_key_values=self._cache, use_cache=True)
        self._seen = tokens.copy()
        logits: NDArray[np.float32] = output.logits[0, start - n_known :].float().numpy()
        return logits


class _EngineModel:
    """An artifact in its engine, fed in chunks: of exactly `chunk` tokens if `is_fixed`, else of at most that."""

    def __init__(self, engine: EngineProcess, chunk: int, *, is_fixed: bool) -> None:
        self.name = engine.engine
        self.engine = engine
        self.chunk = chunk
        self.is_fixed = is_fixed
        self._seen = np.empty(0, dtype=np.int64)

    def logits(self, tokens: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        n_known = min(_n_alike(self._seen, tokens), start)
        if self.is_fixed:
            n_known -= n_known % self.chunk
        self._seen = tokens[:0]
        rows = []
        for first in range(n_known, len(tokens), self.chunk):
            piece = tokens[first : first + self.chunk]
            # What fills up the last chunk stands behind all that is asked for: no token sees it.
            filling = self.chunk - len(piece) if self.is_fixed else 0
            logits = self.engine.forward(np.pad(piece, (0, filling)), first)[: len(piece)]
            rows.append(logits[max(start - first, 0) :])
        self._seen = tokens.copy()
        return np.concatenate(rows)


def _n_alike(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return how many tokens two texts have in common from their start."""
    n = min(len(first), len(second))
    differs = first[:n] != second[:n]
    return int(differs.argmax()) if differs.any() else n


def _is_run_by_an_engine(model: str) -> bool:
    """Return whether this is a folder of ours, which keeps its own evaluations, rather than a checkpoint."""
    return is_artifact(Path(model)) or is_peer(Path(model))


def open_encoder(model: str, *, offline: bool) -> Encoder:
    """Open the tokenizer of a checkpoint or an artifact."""
    if is_artifact(Path(model)):
        return Encoder.open(Path(model))
    from owl_deploy.checkpoint import open_checkpoint

    return Encoder.open(open_checkpoint(model, offline=offline).path)


def _settings_key(windows: Windows, reference: str | None, *, offline: bool) -> str:
    """Return what a stored evaluation must agree in to be used again."""
    judged_by: str | dict[str, str] | None = None
    if reference is not None and is_artifact(Path(reference)):
        judged_by = file_sha256(Path(reference) / "owl.json")
    elif reference is not None:
        from owl_deploy.checkpoint import open_checkpoint

        judged_by = open_checkpoint(reference, offline=offline).fingerprint
    # The hash knows nothing of rows: two windows of 64 tokens hash as one of 128.
    return json.dumps([windows.text, windows.tokens.shape, windows.sha256, judged_by])


def _stored(model: str, key: str) -> Evaluation | None:
    """Return an evaluation that an artifact keeps, if it has this one."""
    file = Path(model) / "evaluations.json"
    if not _is_run_by_an_engine(model):
        return None
    try:
        return Evaluation(**_read_evaluations(file)[key])
    except (KeyError, TypeError):  # not there, or written by another version
        return None


def _store(model: str, key: str, evaluation: Evaluation) -> None:
    """Keep an evaluation beside the artifact that it belongs to."""
    if not _is_run_by_an_engine(model):
        return
    file = Path(model) / "evaluations.json"
    try:
        write_json(file, {**_read_evaluations(file), key: evaluation.to_json()})
    except OwlDeployError as error:  # a read-only volume, say: the result is there all the same
        log.warning("the evaluation is not kept for next time: %s", error)


def _read_evaluations(file: Path) -> dict[str, Any]:
    """Return the evaluations that a file keeps: none where it is not there or damaged, for they can be made anew."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
