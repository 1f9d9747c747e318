"""Joint removal and its exact update, checked against least squares of one row at a time in float64."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pruning_problems import (
    CONDITIONED,
    SEQUENCES,
    TWO_BY_FOUR,
    WEIGHT,
    bits,
    correlated_linear,
    given_hessian,
    hessian_of,
    pruned_positions,
    slow_optimum,
    well_conditioned,
)

from owl_deploy.methods.foundation import METHOD, choose_mask, compensate, prune
from owl_deploy.methods.inverse_hessian import invert
from owl_deploy.methods.method import Goal, Linear, n_pruned, prune_lowest
from owl_deploy.pattern import Pattern


def matrix_of(linear: Linear) -> torch.Tensor:
    matrix = linear.statistic.matrix
    assert isinstance(matrix, torch.Tensor)
    return matrix


def slow_cost(row: NDArray[np.float64], removed: list[int], matrix: NDArray[np.float64]) -> float:
    """1/2 tr(d H d^T) at the best d that removes the weights, by least squares."""
    kept = [column for column in range(len(row)) if column not in removed]
    root = np.linalg.cholesky(matrix).T
    best = np.zeros(len(row))
    best[kept] = np.linalg.lstsq(root[:, kept], root @ row, rcond=None)[0]
    return float((best - row) @ matrix @ (best - row)) / 2


def slow_mask(linear: Linear, pattern: Pattern) -> NDArray[np.bool_]:
    """Try all sets of every group; what left columns became stays, H of the columns from the group on counts."""
    damped = invert(linear.statistic, 0.01).damped.double().numpy()
    weight = linear.weight.double().numpy()
    mask = np.ones(weight.shape, dtype=bool)
    for row, kept in zip(weight.copy(), mask, strict=True):
        for first in range(0, len(row), pattern.of):
            rest, matrix = row[first:], damped[first:, first:]
            sets = [list(chosen) for chosen in combinations(range(pattern.of), pattern.of - pattern.keep)]
            removed = min(sets, key=lambda chosen: slow_cost(rest, chosen, matrix))
            kept[[first + column for column in removed]] = False
            inverse = np.linalg.inv(matrix)
            rest -= rest[removed] @ np.linalg.inv(inverse[np.ix_(removed, removed)]) @ inverse[removed]
    return mask


def loss(change: torch.Tensor, matrix: torch.Tensor) -> float:
    d = change.double()
    return float((d @ matrix.double() * d).sum()) / 2


def test_update_of_the_worked_mask_is_the_worked_optimum() -> None:
    inverse = invert(given_hessian(CONDITIONED), 0.01)
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    first = compensate(TWO_BY_FOUR[:1], mask[:1], inverse)
    second = compensate(TWO_BY_FOUR[1:], mask[1:], inverse)
    np.testing.assert_allclose(first.numpy(), [[0.450311, 0, 0.725926, 0]], atol=2e-6)
    np.testing.assert_allclose(second.numpy(), [[0, 0.517355, 0, 0]], atol=2e-6)
    change = torch.cat([first, second]) - TWO_BY_FOUR
    assert loss(change, inverse.damped) == pytest.approx(0.462051, abs=2e-6)


def test_worked_problem_prunes_the_cheapest_weights_of_each_row() -> None:
    # w^2 / [H^-1]_jj of the dense weights: 1.0077 0.0944 1.0139 0.0088 and 0.3628 0.8500 0.0040 0.4314
    inverse = np.linalg.inv(CONDITIONED.double().numpy() + 0.025 * np.eye(4))
    cost = TWO_BY_FOUR.double().numpy() ** 2 / inverse.diagonal()
    expected = [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert np.array_equal(np.sort(np.argsort(cost)[:, :2]), [[1, 3], [0, 2]])
    assert pruned_positions(prune(well_conditioned(), Goal(0.5)).weight) == expected


def test_rank_deficient_worked_hessian_gives_a_finite_result_that_beats_no_update() -> None:
    hessian, weight = hessian_of(SEQUENCES), WEIGHT[:2]
    pruned = prune(Linear("x", weight, hessian), Goal(0.5))
    mask = pruned.weight != 0
    assert mask.sum(dim=1).tolist() == [3, 3]
    damped = invert(hessian, 0.01).damped
    np.testing.assert_allclose(pruned.weight.numpy(), slow_optimum(weight, mask, damped), rtol=1e-3, atol=1e-4)
    assert loss(pruned.weight - weight, damped) < loss(torch.where(mask, 0.0, weight), damped)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_update_is_least_squares_of_the_kept_columns(seed: int, sparsity: float) -> None:
    linear = correlated_linear(seed, 9, 30)
    mask = prune_lowest(torch.rand(9, 30, generator=torch.Generator().manual_seed(seed)), Goal(sparsity))
    inverse = invert(linear.statistic, 0.01)
    expected = slow_optimum(linear.weight, mask, inverse.damped)
    np.testing.assert_allclose(compensate(linear.weight, mask, inverse).numpy(), expected, rtol=1e-4, atol=2e-5)


def test_batches_do_not_change_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = correlated_linear(0, 11, 24)
    whole = prune(linear, Goal(0.5)).weight
    monkeypatch.setattr("owl_deploy.methods.foundation._BATCH_BYTES", 3 * 12 * 12 * 4)
    np.testing.assert_allclose(prune(linear, Goal(0.5)).weight.numpy(), whole.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8)], ids=str)
def test_pattern_takes_the_set_of_least_joint_cost_from_left_to_right(pattern: Pattern) -> None:
    linear = correlated_linear(3, 6, 24)
    mask = choose_mask(linear.weight, Goal(pattern.sparsity, pattern), invert(linear.statistic, 0.01), block_size=128)
    np.testing.assert_array_equal(mask.numpy(), slow_mask(linear, pattern))


def test_later_groups_beyond_the_lazy_update_see_what_earlier_ones_lost() -> None:
    linear, pattern = correlated_linear(4, 2, 136), Pattern(2, 4)
    mask = choose_mask(linear.weight, Goal(0.5, pattern), invert(linear.statistic, 0.01), block_size=128)
    np.testing.assert_array_equal(mask.numpy(), slow_mask(linear, pattern))


def test_joint_cost_prefers_a_set_that_single_costs_do_not() -> None:
    # Inputs 0 and 1 are nearly the same: either can go, for the other takes over, but not both.
    matrix = torch.tensor([[1.0, 0.99, 0, 0], [0.99, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    linear = Linear("x", torch.tensor([[1.0, 1.0, 0.4, 2.0]]), given_hessian(matrix))
    assert pruned_positions(prune(linear, Goal(0.5, Pattern(2, 4)), dampening=1e-4).weight) == [[1, 0, 1, 0]]
    assert pruned_positions(prune(linear, Goal(0.5), dampening=1e-4).weight) == [[1, 1, 0, 0]]


def test_groups_with_too_many_sets_lose_exactly_their_share_and_less_than_single_costs_would() -> None:
    linear, pattern = correlated_linear(5, 16, 64), Pattern(16, 32)
    inverse = invert(linear.statistic, 0.01)
    pruned = prune(linear, Goal(0.5, pattern)).weight
    assert ((pruned == 0).reshape(16, 2, 32).sum(dim=2) == 16).all()
    single = prune_lowest(linear.weight.square() / inverse.inverse.diagonal(), Goal(0.5, pattern))
    by_single = compensate(linear.weight, single, inverse)
    assert loss(pruned - linear.weight, inverse.damped) < loss(by_single - linear.weight, inverse.damped)


@pytest.mark.parametrize("seed", range(4))
def test_one_block_over_all_columns_is_the_cost_of_the_dense_weights(seed: int) -> None:
    linear = correlated_linear(seed, 7, 20)
    inverse = invert(linear.statistic, 0.01)
    single = np.linalg.inv(inverse.damped.double().numpy()).diagonal()
    expected = prune_lowest(linear.weight.double().square() / torch.from_numpy(single.copy()), Goal(0.35))
    assert torch.equal(choose_mask(linear.weight, Goal(0.35), inverse, block_size=20), expected)


@pytest.mark.parametrize(("sparsity", "block_size"), [(0.29, 7), (0.5, 5), (0.7, 128), (0.9, 16), (0.02, 4)])
def test_every_row_prunes_exactly_its_number_whatever_the_blocks(sparsity: float, block_size: int) -> None:
    linear = correlated_linear(1, 10, 40)
    before = linear.weight.clone()
    pruned = prune(linear, Goal(sparsity), block_size=block_size)
    assert set((pruned.weight == 0).sum(dim=1).tolist()) == {n_pruned(40, sparsity)}
    assert not np.signbit(pruned.weight.numpy()[(pruned.weight == 0).numpy()]).any()
    assert torch.equal(linear.weight, before)
    assert torch.isfinite(pruned.weight).all()


@pytest.mark.parametrize("goal", [Goal(0.5), Goal(0.7), Goal(0.5, Pattern(2, 4))], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_that_of_the_result_and_below_the_mask_of_wanda_without_update(seed: int, goal: Goal) -> None:
    linear = correlated_linear(seed, 24, 48)
    pruned = prune(linear, goal)
    matrix = matrix_of(linear)
    assert pruned.notes == {"loss": pytest.approx(loss(pruned.weight - linear.weight, matrix), rel=1e-4)}
    wanda = prune_lowest(linear.weight.abs() * matrix.diagonal().sqrt(), goal)
    assert pruned.notes["loss"] < loss(torch.where(wanda, 0.0, linear.weight), matrix)


@pytest.mark.parametrize("goal", [Goal(0.5), Goal(0.5, Pattern(2, 4))], ids=str)
def test_weights_of_dead_inputs_go_and_the_others_are_as_if_they_had_been_zero(goal: Goal) -> None:
    linear = correlated_linear(2, 5, 16, dead=(1, 6, 7))
    zeroed = linear.weight.clone()
    zeroed[:, [1, 6, 7]] = 0.0
    pruned = prune(linear, goal)
    assert (bits(pruned.weight[:, [1, 6, 7]]) == 0).all()
    assert pruned.notes["n_dead_inputs"] == 3
    np.testing.assert_array_equal(bits(pruned.weight), bits(prune(Linear("x", zeroed, linear.statistic), goal).weight))
    assert set((pruned.weight == 0).sum(dim=1).tolist()) == {8}


def test_sparsity_zero_keeps_every_weight() -> None:
    linear = correlated_linear(0, 4, 12)
    pruned = prune(linear, Goal(0.0))
    assert torch.equal(pruned.weight, linear.weight)
    assert pruned.notes == {"loss": 0.0}


def test_first_of_equal_weights_goes() -> None:
    linear = Linear("x", torch.ones(2, 8), given_hessian(torch.eye(8)))
    for goal in (Goal(0.5, Pattern(4, 8)), Goal(0.5)):
        assert pruned_positions(prune(linear, goal).weight) == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2


def test_dampening_reaches_the_hessian_and_a_raise_is_on_record() -> None:
    linear = correlated_linear(0, 4, 12)
    assert not torch.equal(prune(linear, Goal(0.5), dampening=1.0).weight, prune(linear, Goal(0.5)).weight)
    raised = prune(Linear("x", torch.ones(1, 2), given_hessian(torch.tensor([[1.0, 1.05], [1.05, 1.0]]))), Goal(0.5))
    assert raised.notes["dampening"] == pytest.approx(0.1)


@pytest.mark.parametrize(("goal", "block_size"), [(Goal(0.5, Pattern(2, 4)), 128), (Goal(0.5), 0)], ids=str)
def test_groups_that_do_not_fit_are_refused(goal: Goal, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"do not divide|at least 1"):
        prune(correlated_linear(0, 2, 10), goal, block_size=block_size)


def test_method_is_registered_under_its_name_with_its_options() -> None:
    arguments: dict[str, Any] = {"block_size": 4, "dampening": 0.1}
    assert METHOD.name == "foundation"
    assert set(METHOD.options) == set(arguments)
    METHOD.prune(correlated_linear(0, 2, 8), Goal(0.5), **arguments)
