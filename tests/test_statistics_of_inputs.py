"""What is remembered of a linear's inputs, and OWL's outlier ratio, against float64 formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.statistics import SquaredNorm, outlier_ratio

QUICK = settings(derandomize=True, deadline=None, max_examples=60)


def direct_mean(sequences: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """c_j = 1/N * sum over sequences of the sum over tokens of x_j squared."""
    total: NDArray[np.float64] = sum((np.square(x).sum(axis=0) for x in sequences), np.zeros(sequences[0].shape[1]))
    return total / len(sequences)


def slow_outlier_ratio(scores: list[NDArray[np.float32]], owl_m: float) -> float:
    """Concatenate all scores of the block in float64, as the published code does."""
    flat = np.concatenate([score.astype(np.float64).ravel() for score in scores])
    return float((flat > owl_m * flat.mean()).mean())


def updated(sequences: list[torch.Tensor]) -> SquaredNorm:
    statistic = SquaredNorm(sequences[0].shape[1])
    for sequence in sequences:
        statistic.update(sequence)
    return statistic


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_statistic_is_the_mean_over_sequences_of_sums_of_squares(seed: int, lengths: list[int], scale: float) -> None:
    generator = np.random.default_rng(seed)
    sequences = [scale * generator.standard_normal((length, 5)) for length in lengths]
    statistic = updated([torch.from_numpy(x).float() for x in sequences])
    assert statistic.n_sequences == len(lengths)
    np.testing.assert_allclose(statistic.mean.numpy(), direct_mean(sequences), rtol=2e-6)
    np.testing.assert_allclose(statistic.norm.numpy(), np.sqrt(direct_mean(sequences)), rtol=2e-6)


def test_it_is_a_root_of_a_mean_of_squares_and_not_a_mean_of_norms() -> None:
    statistic = updated([torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.0]])])
    assert statistic.norm.tolist() == pytest.approx([1.0, 2.121320], abs=5e-7)


def test_sequences_are_counted_and_not_tokens() -> None:
    token = torch.tensor([[2.0]])
    assert updated([token.repeat(3, 1)]).mean.item() == 12
    assert updated([token, token, token]).mean.item() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_are_float32_whatever_the_type_of_the_inputs(dtype: torch.dtype) -> None:
    inputs = torch.full((4, 3), 300.0, dtype=dtype)  # 300 squared is above the largest float16
    statistic = updated([inputs])
    assert statistic.mean.dtype == torch.float32
    assert statistic.is_finite()
    assert statistic.mean.tolist() == [4 * 300.0**2] * 3


def test_long_sums_of_bfloat16_inputs_do_not_stall() -> None:
    sequence = torch.ones(4096, 2, dtype=torch.bfloat16)
    assert updated([sequence] * 8).mean.tolist() == [4096.0, 4096.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_inputs_that_are_not_finite_or_overflow_are_seen_even_when_good_ones_follow(bad: float) -> None:
    good = torch.ones(2, 3)
    statistic = updated([good, torch.tensor([[1.0, bad, 1.0]]), good])
    assert not statistic.is_finite()
    assert updated([good, good]).is_finite()


def test_inputs_are_not_changed() -> None:
    inputs = torch.full((2, 2), 3.0)
    updated([inputs])
    assert inputs.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_toy_block_has_one_outlier_of_twelve() -> None:
    scores = [torch.tensor([[1.0, 1, 1, 13], [2, 1, 1, 1]]), torch.full((1, 4), 0.5)]
    percent = 100 * outlier_ratio(scores, owl_m=5)
    assert percent == pytest.approx(8.333333, abs=5e-7)


@pytest.mark.parametrize(
    ("low", "high", "percent"),
    [((1.0, 18), 30.0, 10), ((1.0, 19), 30.0, 5), ((1.0, 19), 3.0, 0), ((1.0, 17), 30.0, 15)],
)
def test_worked_blocks_of_twenty_scores(low: tuple[float, int], high: float, percent: float) -> None:
    value, count = low
    scores = [torch.tensor([value] * count + [high] * (20 - count)).reshape(4, 5)]
    assert 100 * outlier_ratio(scores, owl_m=5) == pytest.approx(percent, abs=1e-12)


def test_mean_is_over_the_whole_block_and_not_over_each_linear() -> None:
    quiet, loud = torch.full((2, 2), 0.1), torch.full((1, 2), 10.0)
    assert outlier_ratio([quiet, loud], owl_m=2) == pytest.approx(2 / 6)
    assert outlier_ratio([loud], owl_m=2) == 0


def test_score_at_the_threshold_is_no_outlier() -> None:
    assert outlier_ratio([torch.tensor([[1.0, 1.0, 4.0]])], owl_m=2) == 0  # mean 2, threshold 4
    assert outlier_ratio([torch.zeros(3, 4)], owl_m=5) == 0


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=7),
    owl_m=st.sampled_from([1.0, 2.5, 3.0, 5.0, 10.0]),
)
def test_ratio_is_that_of_all_scores_in_one_vector(seed: int, shapes: list[tuple[int, int]], owl_m: float) -> None:
    generator = np.random.default_rng(seed)
    scores = [np.exp(2 * generator.standard_normal(shape)).astype(np.float32) for shape in shapes]
    assert outlier_ratio([torch.from_numpy(score) for score in scores], owl_m=owl_m) == pytest.approx(
        slow_outlier_ratio(scores, owl_m), abs=1e-12
    )


def test_mean_of_many_scores_is_taken_in_float64() -> None:
    # 2^24 ones and one more: a float32 running sum would stand still.
    scores = [torch.ones(1, 2**22) for _ in range(5)] + [torch.full((1, 8), 2.0)]
    assert outlier_ratio(scores, owl_m=1.0) == pytest.approx(8 / (5 * 2**22 + 8), rel=1e-12)
