"""RIA against its worked row, a slow selection in float64, and the cases where a sum is zero."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pruning_problems import WEIGHT, bits, given_norm

from owl_deploy.methods import ria, wanda
from owl_deploy.methods.method import Goal, Linear
from owl_deploy.pattern import Pattern


def slow_score(weight: torch.Tensor, mean: torch.Tensor) -> NDArray[np.float64]:
    w, c = np.abs(weight.double().numpy()), mean.double().numpy()
    score: NDArray[np.float64] = np.zeros(w.shape)
    for i, j in np.ndindex(*w.shape):
        if w[i, j]:
            score[i, j] = (w[i, j] / sum(w[:, j]) + w[i, j] / sum(w[i])) * np.sqrt(np.sqrt(c[j]))
    return score


def slow_mask(score: NDArray[np.float64], n_pruned: int, group: int) -> NDArray[np.bool_]:
    mask = np.ones(score.shape, dtype=bool)
    for i in range(len(score)):
        for first in range(0, score.shape[1], group):
            for j in sorted(range(first, first + group), key=lambda j: (score[i, j], j))[:n_pruned]:
                mask[i, j] = False
    return mask


def random_linear(seed: int, rows: int = 9, columns: int = 24) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    statistic = given_norm(torch.rand(columns, generator=generator) * 10)
    return Linear("w", torch.randn(rows, columns, generator=generator), statistic)


def test_score_of_the_worked_example() -> None:
    score = ria.score(WEIGHT, given_norm([3, 1, 4.5, 3, 0.875, 5]))
    np.testing.assert_allclose(score[0], [0.146453, 0.875092, 0.495041, 0.077481, 0.766658, 0.372456], atol=5e-7)


@pytest.mark.parametrize("seed", range(5))
def test_score_is_that_of_the_slow_loop(seed: int) -> None:
    linear = random_linear(seed)
    expected = slow_score(linear.weight, linear.statistic.mean)
    np.testing.assert_allclose(ria.score(linear.weight, linear.statistic), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("goal", "n_pruned", "group"),
    [
        (Goal(0.5), 12, 24),
        (Goal(0.7), 17, 24),  # 16.8
        (Goal(0.5, Pattern(2, 4)), 2, 4),
        (Goal(0.25, Pattern(6, 8)), 2, 8),
    ],
)
def test_every_row_or_group_loses_its_lowest_scores(seed: int, goal: Goal, n_pruned: int, group: int) -> None:
    linear = random_linear(seed)
    mask = slow_mask(slow_score(linear.weight, linear.statistic.mean), n_pruned, group)
    pruned = ria.prune(linear, goal).weight
    expected = np.where(mask, linear.weight.numpy(), np.float32(0))
    np.testing.assert_array_equal(bits(pruned), expected.view(np.int32))  # +0.0, not -0.0


def test_mask_differs_from_that_of_wanda() -> None:
    linear = random_linear(0)
    assert not torch.equal(ria.prune(linear, Goal(0.5)).weight, wanda.prune(linear, Goal(0.5)).weight)


def test_a_row_and_a_column_of_zeros_score_zero_and_leave_the_others_finite() -> None:
    weight = WEIGHT.clone()
    weight[1], weight[:, 2] = 0, 0
    score = ria.score(weight, given_norm([3, 1, 4.5, 3, 0.875, 5]))
    assert torch.isfinite(score).all()
    assert torch.equal(score == 0, weight == 0)
    np.testing.assert_allclose(score, slow_score(weight, torch.tensor([3, 1, 4.5, 3, 0.875, 5])), rtol=1e-6)


def test_a_zero_matrix_prunes_by_column_index_without_nan() -> None:
    score = ria.score(torch.zeros(2, 4), given_norm([1, 1, 1, 1]))
    assert score.tolist() == [[0.0] * 4] * 2
    assert torch.isfinite(ria.prune(Linear("w", torch.zeros(2, 4), given_norm([1] * 4)), Goal(0.5)).weight).all()


def test_of_equal_scores_the_first_goes() -> None:
    pruned = ria.prune(Linear("w", torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2), given_norm([2] * 4)), Goal(0.5))
    assert pruned.weight.tolist() == [[0.0, 0.0, 1.0, -1.0]] * 2


def test_an_input_that_is_never_active_goes_first() -> None:
    weight = torch.tensor([[9.0, 0.1, 0.2], [8.0, 0.3, 0.1]])
    pruned = ria.prune(Linear("w", weight, given_norm([0, 1, 1])), Goal(0.3))
    assert (pruned.weight == 0).tolist() == [[True, False, False]] * 2


def test_sparsity_zero_keeps_every_weight_and_the_input_is_not_changed() -> None:
    linear = random_linear(1)
    before = linear.weight.clone()
    assert torch.equal(ria.prune(linear, Goal(0.0)).weight, before)
    ria.prune(linear, Goal(0.9))
    assert torch.equal(linear.weight, before)


def test_mask_does_not_depend_on_the_scale_of_weights_and_inputs() -> None:
    linear = random_linear(2)
    scaled = Linear("w", linear.weight * 256, given_norm(linear.statistic.mean * 16))
    assert torch.equal(ria.prune(scaled, Goal(0.5)).weight, ria.prune(linear, Goal(0.5)).weight * 256)
