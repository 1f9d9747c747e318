"""OWL's allocation, checked against worked values, a plain formula and a root finder."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from owl_deploy.allocation import MAX_SPARSITY, owl, preserve_target, uniform

QUICK = settings(derandomize=True, deadline=None, max_examples=150)

# Outlier ratios in percent of the worked example, and the sparsities per (target, lambda).
RATIOS = [1.10, 0.62, 0.41, 0.35]
WORKED = {
    (0.7, 0.08): [0.5976, 0.7000, 0.7448, 0.7576],
    (0.5, 0.08): [0.3976, 0.5000, 0.5448, 0.5576],
    (0.8, 0.08): [0.6976, 0.8000, 0.8448, 0.8576],
}

Blocks = tuple[list[float], list[int]]


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    """Outlier ratios and unequal numbers of weights of one to twelve blocks."""
    n = draw(st.integers(1, 12))
    ratios = draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    return ratios, draw(st.lists(st.integers(1, 10**9), min_size=n, max_size=n))


targets = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.01, 0.5, 0.7, 0.99, 0.995, 0.9999]))
lambdas = st.floats(0, 0.5, exclude_max=True)


def official_owl(ratios: list[float], sparsity: float, owl_lambda: float) -> NDArray[np.float64]:
    """The published formula: blocks of equal size, no clipping."""
    d = np.array(ratios)
    r = (d - d.min()) / (d.max() - d.min()) * 2 * owl_lambda
    return np.asarray(1 - (r - r.mean() + (1 - sparsity)))


def bisected(wanted: NDArray[Any], weights: NDArray[Any], target: float) -> NDArray[np.float64]:
    """Find by root search the one shift at which the clipped values have the mean `target`."""
    ceiling = max(0.99, target)

    def excess(shift: float) -> float:
        return float(np.average(np.clip(wanted + shift, 0, ceiling), weights=weights)) - target

    # At these ends all blocks are at the floor, or all at the ceiling.
    low, high = -wanted.max() - 1, 1 - wanted.min() + 1
    shift = high if excess(high) <= 0 else brentq(excess, low, high, xtol=1e-15, rtol=1e-14, maxiter=500)
    return np.asarray(np.clip(wanted + shift, 0, ceiling))


def weighted_mean(values: list[float], n_weights: list[int]) -> float:
    return float(np.average(values, weights=np.array(n_weights, dtype=float)))


def test_four_blocks_of_the_worked_example() -> None:
    assert owl([10, 5, 0, 15], [20] * 4, 0.7, owl_lambda=0.08) == pytest.approx(
        [0.673333, 0.726667, 0.780000, 0.620000], abs=5e-7
    )


@pytest.mark.parametrize(("sparsity", "owl_lambda"), WORKED)
def test_worked_tables(sparsity: float, owl_lambda: float) -> None:
    expected = WORKED[sparsity, owl_lambda]
    actual = owl(RATIOS, [7] * 4, sparsity, owl_lambda=owl_lambda)
    assert actual == pytest.approx(expected, abs=1e-12)
    assert actual == pytest.approx(official_owl(RATIOS, sparsity, owl_lambda), abs=1e-12)
    assert min(actual) < sparsity - owl_lambda  # the interval is 2 lambda wide but not centred on the target


def test_unit_of_the_ratios_does_not_matter() -> None:
    percent = owl(RATIOS, [7] * 4, 0.7, owl_lambda=0.08)
    assert owl([ratio / 100 for ratio in RATIOS], [7] * 4, 0.7, owl_lambda=0.08) == pytest.approx(percent, abs=1e-12)


def test_worked_case_that_must_clip() -> None:
    assert official_owl(RATIOS, 0.9, 0.15) == pytest.approx([0.708, 0.900, 0.984, 1.008], abs=1e-12)
    actual = owl(RATIOS, [7] * 4, 0.9, owl_lambda=0.15)
    # The 0.018 above the ceiling is shared by the other three, which move up together by a third of it ...
    # to 0.714, 0.906 and 0.990, so that the third just reaches the ceiling as well.
    assert actual == pytest.approx([0.714, 0.906, 0.990, 0.990], abs=1e-12)
    assert np.mean(actual) == pytest.approx(0.9, abs=1e-12)


def test_equal_ratios_give_the_uniform_allocation() -> None:
    assert owl([0.02] * 3, [5, 6, 7], 0.7, owl_lambda=0.08) == uniform([5, 6, 7], 0.7) == [0.7, 0.7, 0.7]


def test_one_block_gets_the_target() -> None:
    assert owl([0.02], [5], 0.7, owl_lambda=0.08) == [0.7]


def test_lambda_zero_gives_the_uniform_allocation() -> None:
    assert owl(RATIOS, [5, 6, 7, 8], 0.7, owl_lambda=0.0) == pytest.approx([0.7] * 4, abs=1e-15)


def test_mean_is_weighted_by_the_number_of_weights() -> None:
    # r = 0.2 and 0; weighted mean of r is 0.05: the big block takes 0.05 more, the small one 0.15 less.
    assert owl([1, 0], [1, 3], 0.5, owl_lambda=0.1) == pytest.approx([0.35, 0.55], abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ratio_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        owl([0.1, bad], [1, 1], 0.5, owl_lambda=0.1)


@pytest.mark.parametrize("ratios", [[0.1, 0.2], [0.1, 0.1]])
def test_lengths_that_differ_are_an_error(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="per block"):
        owl(ratios, [1, 1, 1], 0.5, owl_lambda=0.1)


def test_block_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        preserve_target([0.5, 0.5], [1, 0], 0.5)


@QUICK
@given(model=blocks(), target=targets, owl_lambda=lambdas)
def test_weighted_mean_is_the_target(model: Blocks, target: float, owl_lambda: float) -> None:
    ratios, n_weights = model
    assert weighted_mean(owl(ratios, n_weights, target, owl_lambda=owl_lambda), n_weights) == pytest.approx(
        target, abs=1e-9
    )


@QUICK
@given(model=blocks(), target=targets, owl_lambda=lambdas)
def test_sparsities_stay_within_bounds(model: Blocks, target: float, owl_lambda: float) -> None:
    ratios, n_weights = model
    values = owl(ratios, n_weights, target, owl_lambda=owl_lambda)
    assert all(0 <= value <= max(MAX_SPARSITY, target) for value in values)
    assert MAX_SPARSITY == 0.99


@QUICK
@given(model=blocks(), target=targets, owl_lambda=lambdas)
def test_more_outliers_never_mean_more_sparsity(model: Blocks, target: float, owl_lambda: float) -> None:
    ratios, n_weights = model
    values = owl(ratios, n_weights, target, owl_lambda=owl_lambda)
    by_ratio = [value for _, value in sorted(zip(ratios, values, strict=True), key=lambda pair: pair[0])]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(by_ratio))


@QUICK
@given(model=blocks(), target=st.floats(0.1, 0.9), owl_lambda=lambdas)
def test_differences_of_blocks_away_from_the_bounds_are_those_of_the_formula(
    model: Blocks, target: float, owl_lambda: float
) -> None:
    ratios, n_weights = model
    if max(ratios) - min(ratios) < 1e-6:
        return
    values = np.array(owl(ratios, n_weights, target, owl_lambda=owl_lambda))
    free = (values > 0) & (values < MAX_SPARSITY)
    moved = values - official_owl(ratios, target, owl_lambda)
    np.testing.assert_allclose(moved[free], moved[free][:1].repeat(free.sum()), atol=1e-9)


@QUICK
@given(
    wanted=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    target=targets,
)
def test_shift_is_the_one_that_a_root_finder_finds(wanted: list[float], seed: int, target: float) -> None:
    n_weights = np.random.default_rng(seed).integers(1, 1000, size=len(wanted))
    actual = preserve_target(wanted, n_weights.tolist(), target)
    np.testing.assert_allclose(actual, bisected(np.array(wanted), n_weights, target), atol=1e-9)


@pytest.mark.parametrize("target", [0.0, 0.995])
def test_extreme_targets_leave_no_choice(target: float) -> None:
    assert owl(RATIOS, [3, 1, 4, 1], target, owl_lambda=0.2) == pytest.approx([target] * 4, abs=1e-12)


def test_values_far_outside_are_brought_in_without_losing_the_target() -> None:
    assert preserve_target([5.0, -5.0, 0.0], [1, 1, 1], 0.5) == pytest.approx([0.99, 0.0, 0.51], abs=1e-12)
