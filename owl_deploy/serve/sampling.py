"""Choosing the next token of one sequence from its logits.

In: logits and a request's settings. Out: a token, and log-probabilities where they are asked for. Randomness comes from
the request's seed alone: one draw per token, whatever else is decoded beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "Sampler", "SamplingSettings"]

# Of a vocabulary of 49152, sorting 1024 takes a tenth of the time of sorting all; nearly always they hold top_p.
_SORTED_FIRST = 1024
_BLOCK = 256
_STEEPEST = 1e30
"""Of 1 / temperature, as float32 can hold it."""


@dataclass(frozen=True)
class SamplingSettings:
    """What a request says about the choice of tokens."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Least share of the probability that the tokens in question have together."""
    top_k: int = 0
    """How many tokens are in question; 0 for all."""
    seed: int | None = None
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time it was generated."""
    presence_penalty: float = 0.0
    """Taken once."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n_logprobs: int | None = None
    """How many of the most likely tokens are told with each; None for no log-probabilities at all."""


@dataclass(frozen=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability in the model's own distribution, at temperature 1 and without penalties."""
    most_likely: tuple[tuple[int, float], ...] = ()
    """The most likely tokens of that distribution and their log-probabilities, best first."""


class Sampler:
    """The random numbers of one sequence, and what it generated so far."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._counts: Counter[int] = Counter()

    def choose(self, logits: NDArray[np.float32]) -> Choice:
        """Choose a token from logits (vocab,).

        Raises:
            FloatingPointError: no logit is a finite number.
        """
        settings = self._settings
        if not np.isfinite(logits.max()):
            raise FloatingPointError("the model's logits are not numbers: its weights are damaged or overflow")
        adjusted = self._adjusted(logits)
        token = int(adjusted.argmax()) if settings.temperature == 0 else self._sampled(adjusted)
        self._counts[token] += 1
        if settings.n_logprobs is None:
            return Choice(token)
        logprobs = logits - _log_sum_exp(logits)
        best = _largest(logprobs, settings.n_logprobs)
        return Choice(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits with penalties and biases."""
        settings = self._settings
        if settings.frequency_penalty == settings.presence_penalty == 0 and not settings.logit_bias:
            return logits
        adjusted = logits.copy()
        for token, count in self._counts.items():
            adjusted[token] -= settings.frequency_penalty * count + settings.presence_penalty
        for token, bias in settings.logit_bias.items():
            adjusted[token] += bias
        return adjusted

    def _sampled(self, logits: NDArray[np.float32]) -> int:
        """Draw a token at the request's temperature, among those that top_k and top_p leave."""
        settings = self._settings
        with np.errstate(over="ignore"):  # near temperature 0 all but the largest become -inf, which is right
            scaled = (logits - logits.max()) * np.float32(min(1 / settings.temperature, _STEEPEST))
        tokens = None
        if settings.top_k:
            tokens = _largest(scaled, settings.top_k)
            scaled = scaled[tokens]
        weights = np.exp(scaled)
        if settings.top_p < 1:
            kept = _nucleus(weights, settings.top_p)
            tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
        place = _drawn(weights, self._random.random())
        return place if tokens is None else int(tokens[place])


def _drawn(weights: NDArray[np.float32], share: float) -> int:
    """Return the index at which the running sum of the weights passes a share of their sum, 0 <= share < 1.

    Sums of blocks come first: running sums of a whole vocabulary of 49152 take ten times as long.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    wanted = share * sums[-1]
    block = min(int(np.searchsorted(sums, wanted, side="right")), len(sums) - 1)
    before = sums[block - 1] if block else 0.0
    first = int(starts[block])
    inside = before + np.cumsum(weights[first : first + _BLOCK], dtype=np.float64)
    # Rounding may leave the last sum of a block below what its neighbour begins with; a weight of 0 is never taken.
    place = int(np.searchsorted(inside, wanted, side="right"))
    return first + (place if place < len(inside) else int(np.flatnonzero(weights[first : first + _BLOCK])[-1]))


def _log_sum_exp(values: NDArray[np.float32]) -> float:
    largest = values.max()
    return float(largest + np.log(np.exp((values - largest).astype(np.float64)).sum()))


def _largest(values: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Return the indices of the n largest values, largest first; of equal ones, the first comes first."""
    if n == 0:
        return np.empty(0, np.int64)
    if n >= len(values):
        return np.argsort(-values, kind="stable")
    found = np.sort(np.argpartition(-values, n - 1)[:n])
    return found[np.argsort(-values[found], kind="stable")]


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Return the indices of the fewest weights that have at least top_p of the sum, largest first; at least one."""
    wanted = top_p * weights.sum(dtype=np.float64)
    for n in (_SORTED_FIRST, len(weights)):
        order = _largest(weights, n)
        sums = np.cumsum(weights[order], dtype=np.float64)
        if sums[-1] >= wanted:
            break
    return order[: int(np.searchsorted(sums, wanted)) + 1]
