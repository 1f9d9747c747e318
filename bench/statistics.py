"""Statistics of latency samples: raw nanoseconds in, percentiles and speed-ups out.

Pure functions on numbers. A *round* is one visit to one engine; its samples are neighbours in time. This module does
not know what was timed, on which machine, or how the figures are shown.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NS_PER_MS = 1e6
# Below 100 samples the 99th percentile is one of the two largest samples: an anecdote, so it is left out.
_MIN_SAMPLES_FOR_P99 = 100


_OF_AN_ANSWER: dict[str, Callable[[Sequence[int]], list[int]]] = {
    "ttft_ms": lambda answer: [answer[0]],
    "itl_ms": lambda answer: list(answer[1:]),
    "tpot_ms": lambda answer: [round(sum(answer[1:]) / (len(answer) - 1))],
}


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the baseline: above 1 is faster, below 1 is slower.

    `p50` is the ratio of medians, `low` and `high` the ends of its confidence interval.
    """

    p50: float
    low: float
    high: float

    @property
    def no_difference_shown(self) -> bool:
        """True if the interval contains 1: the samples show neither a gain nor a loss."""
        return self.low <= 1.0 <= self.high


def percentile(samples_ns: Sequence[int], q: float) -> float:
    """Return the q-th percentile (q in 0..100) in nanoseconds, interpolated linearly between samples."""
    if not samples_ns:
        raise ValueError("no samples, so no percentile")
    return float(np.percentile(np.asarray(samples_ns, dtype=np.float64), q))


def summary_ms(rounds: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """Summarise all samples of all rounds: p50, p90 and min in milliseconds, and n, their number.

    p99 (milliseconds) is present only from 100 samples up.
    """
    samples_ns = [sample for samples in rounds for sample in samples]
    summary: dict[str, float | int] = {
        "p50": percentile(samples_ns, 50) / _NS_PER_MS,
        "p90": percentile(samples_ns, 90) / _NS_PER_MS,
        "min": min(samples_ns) / _NS_PER_MS,
        "n": len(samples_ns),
    }
    if len(samples_ns) >= _MIN_SAMPLES_FOR_P99:
        summary["p99"] = percentile(samples_ns, 99) / _NS_PER_MS
    return summary


def generation_summary(
    rounds: Sequence[Sequence[Sequence[int]]],
    baseline_rounds: Sequence[Sequence[Sequence[int]]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Summarise answers: time to first token (TTFT), gaps between tokens (ITL), and mean time per token (TPOT).

    Args:
        rounds: per round its answers, each of two tokens or more: nanoseconds to the first one, then the gaps.
        baseline_rounds: those of the baseline; None when there are none to compare with.
        seed: of the bootstrap.

    Returns:
        `ttft_ms`, `itl_ms`, `tpot_ms`: each as `summary_ms` has it, with `speedup` {p50, low, high} or None. TPOT is
        one number per answer, (end - first token) / (tokens - 1).
    """
    summaries: dict[str, dict[str, Any]] = {}
    for name, values_of in _OF_AN_ANSWER.items():
        values = [[value for answer in answers for value in values_of(answer)] for answers in rounds]
        speedup = None
        if baseline_rounds is not None:
            base = [[value for answer in answers for value in values_of(answer)] for answers in baseline_rounds]
            speedup = asdict(speedup_interval(base, values, seed=seed))
        summaries[name] = {**summary_ms(values), "speedup": speedup}
    return summaries


def speedup_interval(
    baseline_rounds: Sequence[Sequence[int]],
    rounds: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    n_resamples: int = 2000,
    confidence: float = 0.95,
) -> Speedup:
    """Return the ratio of medians, baseline over case, with a two-level bootstrap interval.

    A shared machine drifts: clock, neighbours and page placement change between rounds far more than between the
    samples of one round. Samples of a round are therefore not independent, and a bootstrap over the pooled samples is
    too sure of itself: in a simulation with 5-20 rounds of 15 samples its 95 % interval held the true ratio in 87-91 %
    of the trials, this one in 96-97 %. Here each resample first draws rounds with replacement, then samples with
    replacement within each drawn round. The engines were run in turn (A-B-A-B), so round k of the baseline and round k
    of the case met the same state of the machine: both take the *same* drawn rounds, and drift that they share cancels
    in the ratio.

    Hierarchical (cluster) bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8; for
    benchmarks: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013. Percentile interval. With one
    round only, the interval knows nothing of the drift.

    Args:
        baseline_rounds: raw nanoseconds, one list per round.
        rounds: the case's nanoseconds; as many rounds, not necessarily as many samples.
        seed: of the resampling; the same input and seed give the same interval.
        n_resamples: number of bootstrap resamples.
        confidence: of the interval, in (0, 1).
    """
    if len(baseline_rounds) != len(rounds):
        raise ValueError(
            f"rounds are compared in pairs: got {len(baseline_rounds)} of the baseline, {len(rounds)} here"
        )
    if not rounds or not all(baseline_rounds) or not all(rounds):
        raise ValueError("every round needs at least one sample")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(rounds), size=(n_resamples, len(rounds)))
    ratios = _resampled_medians(baseline_rounds, drawn, generator) / _resampled_medians(rounds, drawn, generator)
    low, high = np.quantile(ratios, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    pooled = [
        np.concatenate([np.asarray(samples, dtype=np.float64) for samples in r]) for r in (baseline_rounds, rounds)
    ]
    return Speedup(p50=float(np.median(pooled[0]) / np.median(pooled[1])), low=float(low), high=float(high))


def _resampled_medians(
    rounds: Sequence[Sequence[int]], drawn: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return one median per resample; `drawn` (n_resamples, n_rounds) says which rounds each resample consists of.

    Rounds of unequal length count equally: from each, as many samples are drawn as a round has on average.
    """
    lengths = np.array([len(samples) for samples in rounds])
    padded = np.zeros((len(rounds), lengths.max()))
    for row, samples in zip(padded, rounds, strict=True):
        row[: len(samples)] = samples
    n_drawn = round(float(lengths.mean()))
    which = (generator.random((*drawn.shape, n_drawn)) * lengths[drawn][:, :, None]).astype(np.int64)
    resamples = padded[drawn[:, :, None], which]
    medians: NDArray[np.float64] = np.median(resamples.reshape(len(drawn), -1), axis=1)
    return medians
