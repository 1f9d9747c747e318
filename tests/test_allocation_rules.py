"""The other allocation rules, checked against worked values, plain formulas and properties that all share."""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq

from owl_deploy.allocation import (
    MAX_SPARSITY,
    alphapruning,
    dlp,
    isc,
    largest_slope,
    owl_mixed_pattern,
    preserve_proportions,
    ramp,
    uniform,
)
from owl_deploy.errors import RecipeError

QUICK = settings(derandomize=True, deadline=None, max_examples=50)

# Mean tail exponents of the blocks of LLaMA-2-7B and LLaMA-7B, as shipped with AlphaPruning.
LLAMA_2_7B = [
    *(2.136, 2.706, 3.123, 3.124, 3.142, 3.133, 3.013, 3.072, 2.808, 2.910, 2.714, 2.676, 2.844, 3.013, 3.052, 3.121),
    *(3.439, 3.688, 3.976, 3.805, 4.334, 4.274, 4.197, 4.121, 4.195, 4.093, 3.699, 4.244, 4.158, 4.085, 4.278, 3.483),
]
LLAMA_7B = [
    *(2.622, 2.890, 2.969, 2.964, 3.090, 3.064, 2.961, 2.746, 2.775, 2.609, 2.717, 2.730, 2.784, 2.852, 2.897, 3.177),
    *(3.123, 3.446, 3.872, 3.606, 3.894, 4.066, 3.755, 3.715, 3.994, 4.220, 4.102, 4.160, 3.851, 4.093, 4.160, 3.537),
]

Rule = Callable[[list[float], list[int], float], list[float]]
# Each with a spread that drives values out of [0, 0.99] for many targets.
RULES: dict[str, Rule] = {
    "alphapruning": lambda figures, n_weights, target: alphapruning(figures, n_weights, target, epsilon=0.6),
    "dlp": lambda figures, n_weights, target: dlp(figures, n_weights, target, alpha=0.3),
    "isc": lambda figures, n_weights, target: isc(figures, n_weights, target, half_width=0.3),
    "ramp": lambda figures, n_weights, target: ramp(
        n_weights, target, slope=0.9 * largest_slope(len(n_weights), target)
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_figure_rule = pytest.mark.parametrize("name", ["alphapruning", "dlp", "isc"])

Blocks = tuple[list[float], list[int]]
targets = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.01, 0.5, 0.7, 0.99, 0.995]))


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    """Figures, with ties now and then, and unequal numbers of weights of one to twelve blocks."""
    n = draw(st.integers(1, 12))
    figure = draw(st.sampled_from([st.floats(0, 10), st.integers(1, 4).map(float)]))
    figures = draw(st.lists(figure, min_size=n, max_size=n))
    return figures, draw(st.lists(st.integers(1, 10**9), min_size=n, max_size=n))


def weighted_mean(values: list[float], n_weights: list[int]) -> float:
    return float(np.average(values, weights=np.array(n_weights, dtype=float)))


def official_alphapruning(
    alphas: list[float], n_weights: list[int], sparsity: float, epsilon: float
) -> NDArray[np.float64]:
    """The published mapping, without a bound."""
    a, d = np.array(alphas), np.array(n_weights, dtype=float)
    q = (a - a.min()) / (a.max() - a.min()) * ((1 + epsilon) - (1 - epsilon)) + (1 - epsilon)
    return np.asarray(q * sparsity * d.sum() / (d * q).sum())


def official_dlp(scores: list[float], sparsity: float, alpha: float) -> NDArray[np.float64]:
    """The published formula: blocks of equal size, no clipping."""
    importance = 1 - np.array(scores) / np.sum(scores)
    r = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * alpha
    return np.asarray(1 - (r - r.mean() + (1 - sparsity)))


# AlphaPruning


@pytest.mark.parametrize(
    ("n_weights", "expected"),
    [
        ([9, 9, 9, 9], [0.472289, 0.674699, 0.877108, 0.775904]),
        ([1, 2, 2, 1], [0.455814, 0.651163, 0.846512, 0.748837]),
    ],
)
def test_alphapruning_worked_example(n_weights: list[int], expected: list[float]) -> None:
    assert alphapruning([2, 3, 4, 3.5], n_weights, 0.7) == pytest.approx(expected, abs=5e-7)


def test_alphapruning_worked_case_that_must_clip() -> None:
    alphas = [2, 3, 4, 3.5]
    unclipped = official_alphapruning(alphas, [1] * 4, 0.8, 0.5)
    assert unclipped == pytest.approx([0.376471, 0.752941, 1.129412, 0.941176], abs=5e-7)
    # With the third at 0.99 the others, in the proportion 0.5 : 1 : 1.25, share 2.21; the fourth would get 1.0045 and
    # is clipped too, which leaves 1.22 for 0.5 : 1.
    expected = [1.22 / 3, 2.44 / 3, 0.99, 0.99]
    assert alphapruning(alphas, [1] * 4, 0.8, epsilon=0.5) == pytest.approx(expected, abs=1e-12)


def test_alphapruning_gives_the_published_sparsities_of_llama_2_7b() -> None:
    actual = alphapruning(LLAMA_2_7B, [202_375_168] * 32, 0.7)
    # The exponents are rounded to 0.001 of a range of 2.198, which alone is up to 0.0002 of sparsity.
    assert [actual[i] for i in (0, 1, 2, 15, 16, 30, 31)] == pytest.approx(
        [0.4619, 0.5647, 0.6397, 0.6394, 0.6965, 0.8476, 0.7046], abs=2e-4
    )
    assert (actual.index(min(actual)), actual.index(max(actual))) == (0, 20)
    assert max(actual) == pytest.approx(0.8578, abs=2e-4)


def test_alphapruning_clips_what_the_official_code_prunes_beyond_everything() -> None:
    sizes = [202_375_168] * 32
    assert official_alphapruning(LLAMA_7B, sizes, 0.8, 0.3)[25] == pytest.approx(1.0625, abs=6e-5)
    actual = alphapruning(LLAMA_7B, sizes, 0.8)
    assert actual[25] == 0.99
    assert np.mean(actual) == pytest.approx(0.8, abs=1e-12)


def test_alphapruning_epsilon_is_the_proportion_of_the_extremes() -> None:
    actual = alphapruning(LLAMA_7B, list(range(1, 33)), 0.7, epsilon=0.2)
    assert max(actual) / min(actual) == pytest.approx(1.2 / 0.8, abs=1e-12)


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, float("nan")])
def test_alphapruning_epsilon_out_of_range_is_an_error(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\)"):
        alphapruning([2, 3], [1, 1], 0.5, epsilon=epsilon)


@QUICK
@given(model=blocks(), target=st.floats(0.05, 0.6), epsilon=st.floats(0, 0.3))
def test_alphapruning_is_the_official_mapping_where_nothing_clips(model: Blocks, target: float, epsilon: float) -> None:
    alphas, n_weights = model
    if max(alphas) - min(alphas) < 1e-6:
        alphas = [alpha + index for index, alpha in enumerate(alphas)]
    if len(alphas) == 1:
        return
    expected = official_alphapruning(alphas, n_weights, target, epsilon)
    if expected.max() > MAX_SPARSITY:
        return
    np.testing.assert_allclose(alphapruning(alphas, n_weights, target, epsilon=epsilon), expected, rtol=1e-9)


@QUICK
@given(wanted=st.lists(st.floats(1e-3, 3), min_size=1, max_size=12), seed=st.integers(0, 2**32 - 1), target=targets)
def test_scale_is_the_one_that_a_root_finder_finds(wanted: list[float], seed: int, target: float) -> None:
    n_weights = np.random.default_rng(seed).integers(1, 1000, size=len(wanted))
    q, ceiling = np.array(wanted), max(0.99, target)

    def excess(scale: float) -> float:
        return float(np.average(np.minimum(q * scale, ceiling), weights=n_weights)) - target

    high = 1.01 / q.min()  # all at the ceiling
    scale = high if excess(high) <= 0 else brentq(excess, 0.0, high, xtol=1e-15, rtol=1e-14, maxiter=500)
    actual = preserve_proportions(wanted, n_weights.tolist(), target)
    np.testing.assert_allclose(actual, np.minimum(q * scale, ceiling), atol=1e-9)


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_proportion_that_is_not_positive_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        preserve_proportions([0.5, bad], [1, 1], 0.5)


@pytest.mark.parametrize("n_weights", [[1, 0], [1]])
def test_proportions_need_a_positive_count_each(n_weights: list[int]) -> None:
    with pytest.raises(ValueError, match="one positive weight count per block"):
        preserve_proportions([0.5, 0.5], n_weights, 0.5)


# DLP


def test_dlp_worked_example() -> None:
    actual = dlp([2, 3, 4, 6], [5] * 4, 0.7)
    assert actual == pytest.approx([0.568750, 0.643750, 0.718750, 0.868750], abs=1e-12)
    assert actual == pytest.approx(official_dlp([2, 3, 4, 6], 0.7, 0.15), abs=1e-12)


def test_dlp_mean_is_weighted_by_the_number_of_weights() -> None:
    # r = 0.2 and 0; its weighted mean is 0.05.
    assert dlp([1, 2], [1, 3], 0.5, alpha=0.1) == pytest.approx([0.35, 0.55], abs=1e-12)


def test_dlp_negative_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        dlp([0.1, -0.1], [1, 1], 0.5)


def test_dlp_scores_that_are_all_zero_give_the_uniform_allocation() -> None:
    assert dlp([0.0, 0.0], [1, 2], 0.7) == [0.7, 0.7]


# ATP


def test_ramp_worked_example() -> None:
    assert ramp([3] * 4, 0.7, slope=0.02) == pytest.approx([0.67, 0.69, 0.71, 0.73], abs=1e-12)


def test_ramp_of_slope_zero_is_uniform() -> None:
    assert ramp([3, 4, 5], 0.7, slope=0) == pytest.approx([0.7] * 3, abs=1e-15)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.7, 0.2), (0.3, 0.2), (0.5, 1 / 3)])
def test_largest_slope_is_where_the_ramp_reaches_zero_or_one(sparsity: float, expected: float) -> None:
    assert largest_slope(4, sparsity) == pytest.approx(expected, abs=1e-12)


def test_ramp_of_the_largest_slope_starts_at_zero() -> None:
    assert ramp([1] * 4, 0.3, slope=largest_slope(4, 0.3)) == pytest.approx([0, 0.2, 0.4, 0.6], abs=1e-12)


def test_ramp_that_reaches_one_is_clipped() -> None:
    # The 0.01 above the ceiling is shared by the other three.
    actual = ramp([1] * 4, 0.7, slope=largest_slope(4, 0.7))
    assert actual == pytest.approx([0.4 + 0.01 / 3, 0.6 + 0.01 / 3, 0.8 + 0.01 / 3, 0.99], abs=1e-12)


@pytest.mark.parametrize("slope", [0.2001, -0.01, float("nan")])
def test_ramp_slope_out_of_range_is_one_sentence(slope: float) -> None:
    with pytest.raises(RecipeError, match=r"ramp_slope must be 0 to 0\.2 for 4 blocks at sparsity 0\.7, got ") as error:
        ramp([1] * 4, 0.7, slope=slope)
    assert f"got {slope:g}" in str(error.value)


@QUICK
@given(
    n_weights=st.lists(st.integers(1, 10**9), min_size=2, max_size=12), target=st.floats(0.1, 0.9), part=st.floats(0, 1)
)
def test_ramp_steps_between_free_blocks_are_the_slope(n_weights: list[int], target: float, part: float) -> None:
    slope = part * largest_slope(len(n_weights), target)
    values = ramp(n_weights, target, slope=slope)
    for before, after in itertools.pairwise(values):
        if before > 0 and after < MAX_SPARSITY:
            assert after - before == pytest.approx(slope, abs=1e-9)


# ISC


def test_isc_worked_example() -> None:
    assert isc([0, 1, 2, 3, 4], [8] * 5, 0.5) == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4], abs=1e-12)


def test_isc_goes_by_rank_whatever_the_order_of_the_blocks() -> None:
    assert isc([7e9, 0.1, 3.0], [8] * 3, 0.5) == pytest.approx([0.4, 0.6, 0.5], abs=1e-12)


def test_isc_ties_share_the_mean_of_their_ranks() -> None:
    # Ranks 0, 1.5, 1.5 and 3.
    assert isc([1, 2, 2, 9], [8] * 4, 0.5) == pytest.approx([0.6, 0.5, 0.5, 0.4], abs=1e-12)


def test_isc_mean_is_weighted_by_the_number_of_weights() -> None:
    # 0.6 and 0.4 have the weighted mean 0.45: both move up by 0.05.
    assert isc([1, 2], [1, 3], 0.5) == pytest.approx([0.65, 0.45], abs=1e-12)


@QUICK
@given(model=blocks(), target=targets)
def test_isc_sees_nothing_but_the_order(model: Blocks, target: float) -> None:
    figures, n_weights = model
    ranks = [float(sorted(set(figures)).index(figure)) for figure in figures]
    assert isc(figures, n_weights, target) == isc([3 * rank**3 - 5 for rank in ranks], n_weights, target)


# All of them


@every_rule
@QUICK
@given(model=blocks(), target=targets)
def test_weighted_mean_is_the_target(rule: Rule, model: Blocks, target: float) -> None:
    figures, n_weights = model
    assert weighted_mean(rule(figures, n_weights, target), n_weights) == pytest.approx(target, abs=1e-9)


@every_rule
@QUICK
@given(model=blocks(), target=targets)
def test_sparsities_stay_within_bounds(rule: Rule, model: Blocks, target: float) -> None:
    figures, n_weights = model
    assert all(0 <= value <= max(MAX_SPARSITY, target) for value in rule(figures, n_weights, target))


@pytest.mark.parametrize(
    ("name", "direction"), [("alphapruning", 1), ("dlp", 1), ("isc", -1), ("ramp", 1)], ids=lambda value: str(value)
)
@QUICK
@given(model=blocks(), target=targets)
def test_sparsity_follows_the_figure(name: str, direction: int, model: Blocks, target: float) -> None:
    figures, n_weights = model
    order = [float(index) for index in range(len(figures))] if name == "ramp" else figures
    pairs = sorted(zip(order, RULES[name](figures, n_weights, target), strict=True), key=lambda pair: pair[0])
    for (low, before), (high, after) in itertools.pairwise(pairs):
        assert direction * (after - before) >= -1e-12
        if low == high:
            assert after == pytest.approx(before, abs=1e-12)


@every_figure_rule
@QUICK
@given(model=blocks(), target=targets, factor=st.sampled_from([2.0**-20, 1e-3, 100.0]))
def test_unit_of_the_figures_does_not_matter(name: str, model: Blocks, target: float, factor: float) -> None:
    figures, n_weights = model
    if any(0 < abs(a - b) < 1e-6 for a, b in itertools.combinations(figures, 2)):
        return
    scaled = RULES[name]([figure * factor for figure in figures], n_weights, target)
    assert scaled == pytest.approx(RULES[name](figures, n_weights, target), abs=1e-7)


@every_figure_rule
@QUICK
@given(model=blocks(), target=targets, seed=st.randoms(use_true_random=False))
def test_order_of_the_blocks_does_not_matter(name: str, model: Blocks, target: float, seed: Any) -> None:
    figures, n_weights = model
    order = list(range(len(figures)))
    seed.shuffle(order)
    straight = RULES[name](figures, n_weights, target)
    shuffled = RULES[name]([figures[i] for i in order], [n_weights[i] for i in order], target)
    assert shuffled == pytest.approx([straight[i] for i in order], abs=1e-9)


@every_figure_rule
def test_equal_figures_give_the_uniform_allocation(name: str) -> None:
    assert RULES[name]([3.1] * 3, [5, 6, 7], 0.7) == uniform([5, 6, 7], 0.7) == [0.7, 0.7, 0.7]


@every_rule
def test_one_block_gets_the_target(rule: Rule) -> None:
    assert rule([3.1], [5], 0.7) == [0.7]


@every_figure_rule
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_figure_that_is_not_finite_is_an_error(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        RULES[name]([0.1, bad], [1, 1], 0.5)


@every_figure_rule
@pytest.mark.parametrize("figures", [[0.1, 0.2], [0.1, 0.1]])
def test_lengths_that_differ_are_an_error(name: str, figures: list[float]) -> None:
    with pytest.raises(ValueError, match="per block"):
        RULES[name](figures, [1, 1, 1], 0.5)


# OWL's mixed N:8


def slow_mixed_pattern(ratios: list[int], n_weights: list[int], pruned_of_8: int, spread: int) -> list[int]:
    """The rule in exact fractions; Python rounds these half to even."""
    low, width = min(ratios), max(max(ratios) - min(ratios), 1)
    r = [Fraction(ratio - low, width) * spread for ratio in ratios]
    mean = sum((a * n for a, n in zip(r, n_weights, strict=True)), Fraction(0)) / sum(n_weights)
    return [8 - min(7, max(0, pruned_of_8 - round(a - mean))) for a in r]


@pytest.mark.parametrize(
    ("ratios", "pruned_of_8", "pruned"),
    [([1.10, 0.62, 0.41, 0.35], 5, [4, 5, 6, 6]), ([1.1, 0.9, 0.41, 0.35], 4, [3, 3, 5, 5])],
)
def test_mixed_pattern_worked_examples(ratios: list[float], pruned_of_8: int, pruned: list[int]) -> None:
    assert owl_mixed_pattern(ratios, [7] * 4, pruned_of_8) == [8 - n for n in pruned]


def test_mixed_pattern_rounds_halves_to_even() -> None:
    # r - mean r = 0.5, 0.5, 0.5 and -1.5, which become 0, 0, 0 and -2.
    assert owl_mixed_pattern([0.3, 0.3, 0.3, 0.1], [7] * 4, 4) == [4, 4, 4, 2]


def test_mixed_pattern_finds_halves_that_floats_miss() -> None:
    # r = 0.5, 1 and 0, mean 0.5: the exact differences are 0, 0.5 and -0.5. In floats the second is a bit more.
    assert owl_mixed_pattern([0.03, 0.04, 0.02], [3, 1, 1], 4, spread=1) == [4, 4, 4]


def test_mixed_pattern_of_equal_ratios_is_the_same_everywhere() -> None:
    assert owl_mixed_pattern([0.3] * 3, [1, 2, 3], 5) == [3, 3, 3]


def test_mixed_pattern_keeps_one_of_eight_at_least_and_all_at_most() -> None:
    assert owl_mixed_pattern([0, 1], [1, 1], 4, spread=20) == [1, 8]


@pytest.mark.parametrize("pruned_of_8", [0, 8])
def test_mixed_pattern_that_prunes_nothing_or_everything_is_an_error(pruned_of_8: int) -> None:
    with pytest.raises(ValueError, match="1 to 7 of 8"):
        owl_mixed_pattern([0.1, 0.2], [1, 1], pruned_of_8)


@QUICK
@given(
    model=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), min_size=1, max_size=10),
    pruned_of_8=st.integers(1, 7),
    spread=st.integers(0, 12),
    unit=st.sampled_from([1.0, 0.01, 1 / 3]),
)
def test_mixed_pattern_is_the_rule_in_exact_fractions(
    model: list[tuple[int, int]], pruned_of_8: int, spread: int, unit: float
) -> None:
    ratios, n_weights = [ratio for ratio, _ in model], [n for _, n in model]
    actual = owl_mixed_pattern([ratio * unit for ratio in ratios], n_weights, pruned_of_8, spread=spread)
    assert actual == slow_mixed_pattern(ratios, n_weights, pruned_of_8, spread)
