"""ISC against worked values and a slow sweep; what it shares with SparseGPT is tested there."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from pruning_problems import WEIGHT, Problem, hessian_of, problems, pruned_positions, worked_linear
from slow_sweep import assert_prunes_as_slow_sweep, isc_cost, slow_damped, slow_sweep

from owl_deploy.methods import isc, sparsegpt
from owl_deploy.methods.inverse_hessian import invert
from owl_deploy.methods.method import Goal, Linear
from owl_deploy.pattern import Pattern

QUICK = settings(derandomize=True, deadline=None, max_examples=60)


def redundant(scale: float = 1.0) -> Linear:
    """A linear some of whose inputs follow from the others, so that OBS and OBD rank its weights differently."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 24, generator=generator)
    tokens[:, ::2] += 2 * tokens[:, 1::2]
    return Linear("random", torch.randn(8, 24, generator=generator), hessian_of([tokens * scale]))


def test_score_of_the_worked_example_is_that_of_the_paper() -> None:
    hessian = invert(worked_linear().statistic, 0.01)
    score = isc.score(hessian)(WEIGHT, slice(0, 6))
    np.testing.assert_allclose(
        score[0], [0.062220, 1.399694, 0.849994, 0.016080, 0.679639, 0.413245], rtol=1e-4, atol=1e-6
    )
    # The official code divides by U_jj instead of [H^-1]_jj.
    of_the_code = WEIGHT.square() * (hessian.damped.diagonal() + 1 / hessian.upper.diagonal())
    np.testing.assert_allclose(
        of_the_code[0], [0.064629, 1.692073, 0.944293, 0.020795, 1.042988, 0.529174], rtol=1e-4, atol=1e-6
    )


def test_score_of_some_columns_is_that_of_these() -> None:
    score = isc.score(invert(worked_linear().statistic, 0.01))
    assert torch.equal(score(WEIGHT[:, 2:5], slice(2, 5)), score(WEIGHT, slice(0, 6))[:, 2:5])


@pytest.mark.parametrize("with_pattern", [False, True])
def test_result_and_loss_are_those_of_the_slow_sweep(with_pattern: bool) -> None:
    @QUICK
    @given(problem=problems(with_pattern=with_pattern))
    def check(problem: Problem) -> None:
        assert_prunes_as_slow_sweep(isc.prune, problem, isc_cost)

    check()


def test_damping_is_that_asked_for() -> None:
    tokens = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) @ (torch.eye(8) + 0.5)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    damped, dead = slow_damped([tokens], 0.5)
    slow = slow_sweep(weight, Goal(0.5), damped, dead, isc_cost(damped), 128)
    assert slow.gap > 1e-3
    pruned = isc.prune(Linear("random", weight, hessian_of([tokens])), Goal(0.5), dampening=0.5)
    np.testing.assert_allclose(pruned.weight, slow.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("goal", [Goal(0.5), Goal(0.5, Pattern(2, 4))], ids=str)
def test_mask_differs_from_that_of_sparsegpt_and_the_update_follows_the_mask(goal: Goal) -> None:
    linear = redundant()
    by_isc, by_sparsegpt = isc.prune(linear, goal), sparsegpt.prune(linear, goal)
    different = (by_isc.weight == 0) != (by_sparsegpt.weight == 0)
    assert different.any()
    assert (by_isc.weight == 0).sum() == (by_sparsegpt.weight == 0).sum() == 96
    change = (by_isc.weight - linear.weight).double()
    damped = invert(linear.statistic, 0.01).damped.double()
    assert by_isc.notes["loss"] == pytest.approx(float((change @ damped @ change.T).trace()) / 2, rel=1e-3)


def test_result_does_not_depend_on_the_scale_of_the_inputs() -> None:
    pruned, scaled = (isc.prune(redundant(scale), Goal(0.5), block_size=8) for scale in (1.0, 2.0**-6))
    # With the official code's 1 / U_jj the two terms of the score would scale differently.
    assert torch.equal(pruned.weight, scaled.weight)


@pytest.mark.parametrize("block_size", [2, 128])
def test_sparsity_zero_returns_the_weight(block_size: int) -> None:
    pruned = isc.prune(worked_linear(), Goal(0.0), block_size=block_size)
    assert torch.equal(pruned.weight, WEIGHT)
    assert pruned.notes == {"loss": 0.0}


def test_dead_inputs_are_zeroed_count_as_pruned_and_are_noted() -> None:
    linear = redundant()
    linear.statistic.matrix[:, 5] = linear.statistic.matrix[5, :] = 0
    pruned = isc.prune(linear, Goal(0.25), block_size=8)
    assert not pruned.weight[:, 5].any()
    assert (pruned.weight == 0).sum() == 48
    assert pruned.notes["n_dead_inputs"] == 1


def test_first_of_equal_scores_go_first() -> None:
    linear = Linear("ties", torch.tensor([[1.0, -1, 1, 2], [-1, 1, 1, 2]]), hessian_of([torch.eye(4)]))
    assert pruned_positions(isc.prune(linear, Goal(0.5)).weight) == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_weight_is_left_as_it_is() -> None:
    linear = worked_linear()
    before = linear.weight.clone()
    isc.prune(linear, Goal(0.5), block_size=2)
    assert torch.equal(linear.weight, before)
