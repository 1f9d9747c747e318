"""Wanda and magnitude masks, checked against worked values and a slow selection of one row at a time."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pruning_problems import SEQUENCES, WEIGHT, bits, given_norm, pruned_positions
from slow_sweep import slow_n_pruned

from owl_deploy.methods import METHODS, magnitude, wanda
from owl_deploy.methods.method import Goal, Linear, Method, n_pruned, prune_lowest
from owl_deploy.pattern import Pattern, parse_pattern
from owl_deploy.recipe import PruneSettings
from owl_deploy.statistics import SquaredNorm

QUICK = settings(derandomize=True, deadline=None, max_examples=60)

SCORE = [
    [0.173205, 0.800000, 0.636396, 0.086603, 0.561249, 0.447214],
    [0.692820, 0.250000, 0.318198, 1.212436, 0.327395, 1.118034],
    [1.558846, 0.050000, 0.954594, 0.519615, 0.140312, 1.341641],
    [0.346410, 0.550000, 1.378858, 0.692820, 0.093541, 0.044721],
]
# 1 = pruned, as published: a threshold per matrix, and all that is not above it goes.
OFFICIAL_MAGNITUDE = {
    0.5: [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]],
    0.7: [[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]],
}

sparsities = st.floats(0, 0.999).map(lambda s: round(s, 3))


def slow_mask(score: NDArray[Any], sparsity: float) -> NDArray[np.bool_]:
    """Take the lowest score of each row away, one after the other; the first of equal ones goes first."""
    mask = np.ones(score.shape, dtype=bool)
    for row, kept in zip(score, mask, strict=True):
        for _ in range(slow_n_pruned(len(row), sparsity)):
            lowest = min((value, column) for column, value in enumerate(row) if kept[column])
            kept[lowest[1]] = False
    return mask


def worked_statistic() -> SquaredNorm:
    statistic = SquaredNorm(6)
    for sequence in SEQUENCES:
        statistic.update(sequence)
    return statistic


def pruned_by(method: Method, weight: torch.Tensor, statistic: SquaredNorm | None, sparsity: float) -> torch.Tensor:
    """The weight that a method makes of a linear, unstructured."""
    return method.prune(Linear("w", weight, statistic), Goal(sparsity)).weight


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Small matrices; few distinct values in some, so that ties and zeros happen."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    values = draw(st.sampled_from([st.integers(-3, 3).map(float), st.floats(-1e3, 1e3, width=32)]))
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, columns)


def test_wanda_statistic_and_score_of_the_worked_example() -> None:
    statistic = worked_statistic()
    assert statistic.mean.tolist() == [3.0, 1.0, 4.5, 3.0, 0.875, 5.0]
    np.testing.assert_allclose(wanda.score(WEIGHT, statistic).numpy(), SCORE, atol=5e-7)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, [[1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]]),
        (0.7, [[1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]),
    ],
)
def test_wanda_masks_of_the_worked_example(sparsity: float, expected: list[list[int]]) -> None:
    assert pruned_positions(pruned_by(wanda.METHOD, WEIGHT, worked_statistic(), sparsity)) == expected


def test_wanda_keeps_two_of_four_in_the_worked_example() -> None:
    linear = Linear("w", WEIGHT[:, :4], given_norm(worked_statistic().mean[:4]))
    pruned = wanda.prune(linear, Goal(0.5, Pattern(2, 4))).weight
    assert pruned_positions(pruned) == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]


@QUICK
@given(score=matrices(), keep=st.integers(1, 7), of=st.integers(2, 8))
def test_pattern_keeps_the_highest_of_every_group(score: torch.Tensor, keep: int, of: int) -> None:
    if keep >= of:
        return
    columns = score.shape[1] // of * of
    if columns == 0:
        return
    score = score[:, :columns].contiguous()
    mask = prune_lowest(score, Goal(1 - keep / of, Pattern(keep, of)))
    for group, kept in zip(score.reshape(-1, of), mask.reshape(-1, of), strict=True):
        assert int(kept.sum()) == keep
        assert group[~kept].max() <= group[kept].min()


def test_pattern_that_does_not_divide_the_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="6 columns do not divide into groups for keep 2 of 4"):
        prune_lowest(WEIGHT, Goal(0.5, Pattern(2, 4)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:4", "2:4 is ambiguous"),
        ("keep 4 of 4", "not all of them"),
        ("keep 0 of 4", "at least one"),
        ("keep 2 of 400", "at most 64"),
        ("Keep 2 of 4", "must be unstructured or"),
    ],
)
def test_pattern_that_says_nothing_clear_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_patterns_are_read_as_they_are_shown() -> None:
    assert parse_pattern("unstructured") is None
    assert parse_pattern("keep 3 of 8") == Pattern(3, 8)
    assert str(Pattern(3, 8)) == "keep 3 of 8"
    assert Pattern(3, 8).sparsity == 0.625


@pytest.mark.parametrize(("sparsity", "threshold", "n_official", "n_ours"), [(0.5, 0.35, 13, 12), (0.7, 0.5, 17, 17)])
def test_magnitude_prunes_exactly_what_was_asked_where_the_official_rule_overshoots(
    sparsity: float, threshold: float, n_official: int, n_ours: int
) -> None:
    official = (WEIGHT.abs() <= threshold).numpy()
    assert official.astype(int).tolist() == OFFICIAL_MAGNITUDE[sparsity]
    assert official.sum() == n_official
    ours = (pruned_by(magnitude.METHOD, WEIGHT, None, sparsity) == 0).numpy()
    assert ours.sum() == n_ours == slow_n_pruned(24, sparsity)
    # Rank floor(24 s) is one more than 12 at 0.5, and 17 = 16.8 rounded up at 0.7: the same order, cut elsewhere.
    assert not (ours & ~official).any()
    assert set(WEIGHT.abs().numpy()[official & ~ours].tolist()) <= {float(np.float32(threshold))}


def test_magnitude_prunes_the_first_of_equal_weights() -> None:
    weight = torch.tensor([[1.0, -1.0, 2.0], [1.0, 1.0, -2.0]])
    assert pruned_positions(pruned_by(magnitude.METHOD, weight, None, 0.5)) == [[1, 1, 0], [1, 0, 0]]


def test_magnitude_compares_within_the_matrix_and_not_within_rows() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    assert pruned_positions(pruned_by(magnitude.METHOD, weight, None, 0.5)) == [[1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("n", "sparsity", "expected"),
    [
        (100, 0.29, 29),  # 28.999999999999996 in binary floats
        (4096, 0.7, 2867),
        (11008, 0.7, 7706),  # 7705.6
        (5, 0.5, 2),  # halves down
        (3, 0.5, 1),
        (6, 0.7, 4),
        (7, 0.0, 0),
        (10, 0.05, 0),
        (1, 0.99, 1),
        (24, 1e-05, 0),  # written with an exponent
    ],
)
def test_number_of_pruned_weights_is_the_nearest_integer(n: int, sparsity: float, expected: int) -> None:
    assert n_pruned(n, sparsity) == expected == slow_n_pruned(n, sparsity)


@QUICK
@given(n=st.integers(1, 100_000), sparsity=st.floats(0, 1, exclude_max=True))
def test_number_of_pruned_weights_follows_the_decimal_as_written(n: int, sparsity: float) -> None:
    count = n_pruned(n, sparsity)
    assert count == slow_n_pruned(n, sparsity)
    assert abs(count - n * sparsity) <= 0.5 + 1e-9


@QUICK
@given(score=matrices(), sparsity=sparsities)
def test_selection_is_that_of_the_slow_loop(score: torch.Tensor, sparsity: float) -> None:
    mask = prune_lowest(score, Goal(sparsity))
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), slow_mask(score.numpy(), sparsity))


@QUICK
@given(score=matrices(), sparsity=sparsities)
def test_every_row_prunes_the_same_number_and_none_above_a_kept_score(score: torch.Tensor, sparsity: float) -> None:
    mask = prune_lowest(score, Goal(sparsity))
    assert set((~mask).sum(dim=1).tolist()) == {slow_n_pruned(score.shape[1], sparsity)}
    for row, kept in zip(score, mask, strict=True):
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


@QUICK
@given(weight=matrices(), sparsity=sparsities)
def test_magnitude_is_the_slow_selection_over_the_flat_matrix(weight: torch.Tensor, sparsity: float) -> None:
    before = weight.clone()
    pruned = pruned_by(magnitude.METHOD, weight, None, sparsity)
    mask = slow_mask(weight.abs().reshape(1, -1).numpy(), sparsity).reshape(weight.shape)
    np.testing.assert_array_equal(bits(pruned), np.where(mask, bits(weight), 0))
    assert torch.equal(weight, before)


@QUICK
@given(weight=matrices(), sparsity=sparsities, seed=st.integers(0, 2**32 - 1))
def test_wanda_keeps_weights_bit_for_bit_and_puts_plus_zero_elsewhere(
    weight: torch.Tensor, sparsity: float, seed: int
) -> None:
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    statistic = SquaredNorm(weight.shape[1])
    statistic.update(inputs)
    pruned = pruned_by(wanda.METHOD, weight, statistic, sparsity)
    score = np.abs(weight.numpy()) * np.sqrt(statistic.mean.numpy())
    np.testing.assert_array_equal(bits(pruned), np.where(slow_mask(score, sparsity), bits(weight), 0))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_sparsity_zero_keeps_every_weight(method: str) -> None:
    statistic = worked_statistic() if method == "wanda" else None
    assert torch.equal(pruned_by(METHODS[method], WEIGHT, statistic, 0.0), WEIGHT)


def test_wanda_mask_does_not_depend_on_the_scale_of_the_inputs() -> None:
    scaled = SquaredNorm(6)
    for sequence in SEQUENCES:
        scaled.update(sequence * 64)
    assert torch.equal(
        pruned_by(wanda.METHOD, WEIGHT, scaled, 0.5), pruned_by(wanda.METHOD, WEIGHT, worked_statistic(), 0.5)
    )


def test_wanda_prunes_an_input_that_is_never_active_before_all_others() -> None:
    statistic = SquaredNorm(3)
    statistic.update(torch.tensor([[1.0, 0.0, 1.0]]))
    assert pruned_positions(pruned_by(wanda.METHOD, torch.tensor([[0.1, 9.0, 0.2]]), statistic, 1 / 3)) == [[0, 1, 0]]


def test_registry_and_recipe_know_the_same_methods() -> None:
    assert set(METHODS) == set(get_args(PruneSettings.model_fields["method"].annotation))
    assert all(name == method.name for name, method in METHODS.items())
