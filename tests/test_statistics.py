"""Statistics of latency samples, checked against hand counts and a simulation with a known answer."""

from itertools import chain

import numpy as np
import pytest

from owl_deploy.bench.statistics import Speedup, percentile, speedup_interval, summary_ms

Rounds = list[list[int]]


def simulated_rounds(
    generator: np.random.Generator, speedup: float, n_rounds: int = 10, n_samples: int = 15
) -> tuple[Rounds, Rounds]:
    """Return (baseline, case) in ns: 10 % drift shared by paired rounds, 3 % of its own per round, 5 % per sample."""
    drift = generator.normal(0.0, 0.10, size=(n_rounds, 1))

    def engine(median_ns: float) -> Rounds:
        own = generator.normal(0.0, 0.03, size=(n_rounds, 1))
        noise = generator.normal(0.0, 0.05, size=(n_rounds, n_samples))
        rounds: Rounds = (median_ns * np.exp(drift + own + noise)).astype(np.int64).tolist()
        return rounds

    return engine(20e6), engine(20e6 / speedup)


def one_round(rounds: Rounds) -> Rounds:
    return [list(chain.from_iterable(rounds))]


def test_percentile_interpolates_between_samples() -> None:
    assert percentile([40, 10, 20, 30], 50) == 25.0
    assert percentile([10, 20], 90) == pytest.approx(19.0)
    assert percentile([7], 99) == 7.0


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_summary_pools_rounds_and_speaks_milliseconds() -> None:
    assert summary_ms([[1_000_000, 3_000_000], [2_000_000]]) == {
        "p50": 2.0,
        "p90": pytest.approx(2.8),
        "min": 1.0,
        "n": 3,
    }


@pytest.mark.parametrize(("n", "has_p99"), [(99, False), (100, True)])
def test_p99_needs_a_hundred_samples(n: int, has_p99: bool) -> None:
    assert ("p99" in summary_ms([list(range(1, n + 1))])) is has_p99


def test_speedup_of_constant_samples_is_exact() -> None:
    assert speedup_interval([[30, 30], [30, 30]], [[10, 10], [10, 10]]) == Speedup(3.0, 3.0, 3.0)


def test_speedup_is_seeded() -> None:
    baseline, case = simulated_rounds(np.random.default_rng(1), speedup=1.3)
    assert speedup_interval(baseline, case, seed=5) == speedup_interval(baseline, case, seed=5)
    assert speedup_interval(baseline, case, seed=5) != speedup_interval(baseline, case, seed=6)


def test_drift_shared_by_paired_rounds_cancels() -> None:
    drifting = [[1000 * k] * 5 for k in (10, 11, 20, 12, 15)]
    halved = [[sample // 2 for sample in samples] for samples in drifting]
    assert speedup_interval(drifting, halved) == Speedup(2.0, 2.0, 2.0)


def test_difference_is_shown_only_outside_one() -> None:
    assert Speedup(1.02, 0.97, 1.08).no_difference_shown
    assert Speedup(1.00, 1.00, 1.00).no_difference_shown
    assert not Speedup(1.20, 1.10, 1.30).no_difference_shown
    assert not Speedup(0.80, 0.70, 0.90).no_difference_shown


def test_rounds_of_unequal_length_are_accepted() -> None:
    speedup = speedup_interval([[20, 22, 21], [20]], [[10, 11], [10, 10, 10, 12]])
    assert speedup.low <= speedup.p50 <= speedup.high
    assert speedup.p50 == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("baseline", "case", "message"),
    [([[1]], [[1], [1]], "pairs"), ([], [], "at least one"), ([[1], []], [[1], [1]], "at least one")],
)
def test_wrong_rounds_are_errors(baseline: Rounds, case: Rounds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speedup_interval(baseline, case)


def test_wrong_confidence_is_an_error() -> None:
    with pytest.raises(ValueError, match="confidence"):
        speedup_interval([[1]], [[1]], confidence=95)


def test_interval_covers_the_true_ratio_and_pooling_the_rounds_would_not() -> None:
    generator = np.random.default_rng(3)
    true_speedup, n_trials, n_covered, n_covered_pooled = 1.25, 200, 0, 0
    for _ in range(n_trials):
        baseline, case = simulated_rounds(generator, true_speedup)
        interval = speedup_interval(baseline, case, n_resamples=300)
        n_covered += interval.low <= true_speedup <= interval.high
        pooled = speedup_interval(*(one_round(rounds) for rounds in (baseline, case)), n_resamples=300)
        n_covered_pooled += pooled.low <= true_speedup <= pooled.high
    assert 0.91 <= n_covered / n_trials <= 0.995
    assert n_covered_pooled < n_covered
