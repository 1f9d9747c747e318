"""DaSS against its worked values and a slow selection column by column in float64."""

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pruning_problems import bits, given_norm, pruned_positions

from owl_deploy.methods import dass, wanda
from owl_deploy.methods.method import Goal, Linear, Role
from owl_deploy.pattern import Pattern

GATE = torch.tensor([[0.2, -0.5, 0.1], [0.6, 0.3, -0.4], [-0.1, 0.7, 0.9], [0.4, -0.2, 0.05]])
NEURONS = [16, 1, 0.25, 4]
# 1 = pruned
GATE_PRUNED = [[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]]
DOWN = torch.tensor([[0.3, -0.6, 0.8, 0.1], [-0.2, 0.5, 0.4, -0.9]])

gate_or_up = pytest.mark.parametrize("role", ["gate", "up"])


def random_gate(seed: int, role: Role = "gate", neurons: int = 20, columns: int = 7) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * neurons if role == "gate_up" else neurons
    weight = torch.randn(rows, columns, generator=generator)
    inputs = given_norm(torch.rand(columns, generator=generator))
    return Linear("gate", weight, inputs, role, given_norm(torch.rand(neurons, generator=generator) * 10))


def slow_pruned(weight: torch.Tensor, mean: torch.Tensor, count: int) -> NDArray[np.float32]:
    """Zero the `count` lowest of every column, the row of lower index first."""
    result, score = weight.numpy().copy(), np.abs(weight.double().numpy())
    for k, c in enumerate(mean.double().numpy()):
        score[k] *= np.sqrt(np.sqrt(c))
    for j in range(result.shape[1]):
        for k in sorted(range(len(result)), key=lambda k: (score[k, j], k))[:count]:
            result[k, j] = 0.0
    return result


def assert_same_bits(actual: torch.Tensor, expected: NDArray[np.float32]) -> None:
    """Equal, and -0.0 is not 0.0."""
    np.testing.assert_array_equal(bits(actual), expected.view(np.int32))


def test_score_of_the_worked_example() -> None:
    expected = [[0.4, 1.0, 0.2], [0.6, 0.3, 0.4], [0.070711, 0.494975, 0.636396], [0.565685, 0.282843, 0.070711]]
    np.testing.assert_allclose(dass.score(GATE, given_norm(NEURONS)), expected, atol=5e-7)


@gate_or_up
def test_gate_and_up_of_the_worked_example(role: Role) -> None:
    linear = Linear("w", GATE, given_norm([1, 1, 1]), role, given_norm(NEURONS))
    assert pruned_positions(dass.prune(linear, Goal(0.5)).weight) == GATE_PRUNED


def test_down_of_the_worked_example() -> None:
    linear = Linear("w", DOWN, given_norm(NEURONS), "down", given_norm(NEURONS))
    assert pruned_positions(dass.prune(linear, Goal(0.5)).weight) == [[0, 0, 1, 1], [0, 1, 1, 0]]


def test_halves_of_a_fused_gate_up_are_pruned_apart() -> None:
    up = GATE.flip(0) * 100
    fused = Linear("w", torch.cat([GATE, up]), given_norm([1, 1, 1]), "gate_up", given_norm(NEURONS))
    alone = Linear("w", up, given_norm([1, 1, 1]), "up", given_norm(NEURONS))
    pruned = dass.prune(fused, Goal(0.5)).weight
    assert pruned_positions(pruned[:4]) == GATE_PRUNED
    assert torch.equal(pruned[4:], dass.prune(alone, Goal(0.5)).weight)


@gate_or_up
@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.5, 10), (0.66, 13), (0.99, 20)])
def test_every_column_loses_exactly_its_lowest_scores(role: Role, sparsity: float, count: int) -> None:
    for seed in range(4):
        linear = random_gate(seed, role)
        assert linear.neurons is not None
        expected = slow_pruned(linear.weight, linear.neurons.mean, count)
        assert_same_bits(dass.prune(linear, Goal(sparsity)).weight, expected)


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.5, 5), (0.7, 8)])  # of 11: 5.5 and 7.7
def test_every_column_of_both_halves_loses_exactly_its_lowest_scores(sparsity: float, count: int) -> None:
    for seed in range(4):
        linear = random_gate(seed, "gate_up", neurons=11)
        assert linear.neurons is not None
        halves = [slow_pruned(half, linear.neurons.mean, count) for half in (linear.weight[:11], linear.weight[11:])]
        assert_same_bits(dass.prune(linear, Goal(sparsity)).weight, np.concatenate(halves))


@pytest.mark.parametrize("role", sorted(set(get_args(Role)) - {"gate", "up", "gate_up"}))
@pytest.mark.parametrize("goal", [Goal(0.5), Goal(0.5, Pattern(2, 4))], ids=["unstructured", "pattern"])
def test_down_and_attention_are_pruned_as_wanda_does(role: Role, goal: Goal) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, norm = torch.randn(6, 16, generator=generator), given_norm(torch.rand(16, generator=generator))
    linear = Linear("w", weight, norm, role, given_norm([1] * 6))
    assert torch.equal(dass.prune(linear, goal).weight, wanda.prune(linear, goal).weight)


def test_inputs_of_gate_do_not_count() -> None:
    linear = random_gate(5)
    other = Linear("gate", linear.weight, given_norm([0, 1e6, 0, 1, 2, 3, 4]), "gate", linear.neurons)
    assert torch.equal(dass.prune(other, Goal(0.5)).weight, dass.prune(linear, Goal(0.5)).weight)


def test_a_neuron_that_is_never_active_goes_first_from_gate_and_up() -> None:
    weight = torch.tensor([[1.0, 2.0], [50.0, 60.0], [3.0, 4.0]])
    linear = Linear("w", weight, given_norm([1, 1]), "up", given_norm([1, 0, 1]))
    assert pruned_positions(dass.prune(linear, Goal(0.4)).weight) == [[0, 0], [1, 1], [0, 0]]


def test_of_equal_scores_the_first_neuron_goes() -> None:
    linear = Linear("w", torch.tensor([[1.0], [-1.0], [1.0]]), given_norm([1]), "gate", given_norm([4, 4, 4]))
    assert pruned_positions(dass.prune(linear, Goal(0.6)).weight) == [[1], [1], [0]]


def test_weight_is_not_changed() -> None:
    linear = random_gate(6, "gate_up")
    before = linear.weight.clone()
    dass.prune(linear, Goal(0.5))
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("role", ["gate", "up", "gate_up"])
def test_a_pattern_for_gate_or_up_is_refused_with_a_way_out(role: Role) -> None:
    linear = random_gate(7, role, columns=8)
    with pytest.raises(
        ValueError, match=r"gate with pattern keep 2 of 4: .* only the magnitude; use unstructured, or w"
    ):
        dass.prune(linear, Goal(0.5, Pattern(2, 4)))


def test_within_a_row_the_score_orders_weights_by_magnitude_alone() -> None:
    # The reason for the refusal.
    linear = random_gate(8)
    assert linear.neurons is not None
    score = dass.score(linear.weight, linear.neurons)
    assert torch.equal(score.argsort(dim=1), linear.weight.abs().argsort(dim=1))


@pytest.mark.parametrize("role", ["gate", "up", "gate_up"])
def test_gate_and_up_without_the_statistic_of_the_neurons_are_refused(role: Role) -> None:
    with pytest.raises(ValueError, match="down projection"):
        dass.prune(Linear("w", GATE, given_norm([1, 1, 1]), role), Goal(0.5))


@pytest.mark.parametrize(("role", "n_neurons"), [("gate", 3), ("up", 8), ("gate_up", 4), ("gate_up", 3)])
def test_a_statistic_of_another_number_of_neurons_is_refused(role: Role, n_neurons: int) -> None:
    linear = Linear("w", GATE, given_norm([1, 1, 1]), role, given_norm([1] * n_neurons))
    with pytest.raises(ValueError, match=f"4 rows as {role}, its down projection {n_neurons} inputs"):
        dass.prune(linear, Goal(0.5))
