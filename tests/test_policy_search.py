"""The search by policy gradient, against sums over every possible draw and on losses whose best masks are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from owl_deploy.errors import OwlDeployError
from owl_deploy.policy_search import MIN_HELD_OUT, Found, Masks, draw, gradient, most_probable, search, start_logits
from owl_deploy.progress import Step
from owl_deploy.recipe import StructureSettings

LOGITS = [0.3, -0.8, 1.1, 0.0]
"""Of removal, for one row of four units."""


# --- Sums over every order of removal -------------------------------------------------------------


def orders(n_units: int, n_removed: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(n_units), n_removed))


def probability(logits: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Remove one after the other, each in proportion to exp(logit) among those still there."""
    left = list(range(len(logits)))
    product = torch.ones((), dtype=torch.float64)
    for unit in order:
        product = product * torch.softmax(logits[left], dim=0)[left.index(unit)]
        left.remove(unit)
    return product


def loss_of(removed: Sequence[int]) -> float:
    """Not separable: units 1 and 2 hurt each other's absence."""
    costs = (0.5, 2.0, -1.0, 0.7)
    return sum(costs[unit] for unit in removed) + 1.5 * ({1, 2} <= set(removed)) + 10.0


def exact_gradient(logits: list[float], n_removed: int) -> torch.Tensor:
    """Gradient of the expected loss by autograd through the sum over all orders."""
    r = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([probability(r, order) * loss_of(order) for order in orders(len(logits), n_removed)]).sum()
    (found,) = torch.autograd.grad(expected, r)
    return found


def removed_of(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple((~mask).nonzero().flatten().tolist())


def losses_of(masks: torch.Tensor) -> torch.Tensor:
    """Return the loss of every row of masks."""
    known = {
        mask: loss_of([unit for unit in range(4) if not mask[unit]])
        for mask in itertools.product((False, True), repeat=4)
    }
    return torch.tensor([known[tuple(mask)] for mask in masks.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("n_removed", [1, 2, 3])
def test_mean_of_the_estimate_is_the_gradient_of_the_expected_loss(n_removed: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 20_000  # rows are independent draws of the same policy
    drawn = draw(torch.tensor([LOGITS], dtype=torch.float64).repeat(rows, 1), 4 - n_removed, generator)
    advantages = losses_of(drawn.mask) - 10.0
    estimates = torch.stack(
        [gradient([score], advantage) for score, advantage in zip(drawn.score, advantages[:, None], strict=True)]
    )
    error = estimates.std(dim=0) / math.sqrt(rows)
    exact = exact_gradient(LOGITS, n_removed)
    assert exact.abs().max() > 10 * error.max()  # the oracle is far from zero, else any estimate would do
    assert ((estimates.mean(dim=0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("n_removed", [1, 2, 3])
def test_baseline_does_not_move_the_mean_but_narrows_the_spread(n_removed: int) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = draw(torch.tensor([LOGITS], dtype=torch.float64).repeat(20_000, 1), 4 - n_removed, generator)
    losses = losses_of(drawn.mask)
    with_baseline, without = drawn.score * (losses - losses.mean())[:, None], drawn.score * losses[:, None]
    error = without.std(dim=0) / math.sqrt(len(losses))
    assert ((with_baseline.mean(dim=0) - without.mean(dim=0)).abs() < 4 * error).all()
    assert (with_baseline.std(dim=0) < without.std(dim=0)).all()


def test_score_is_the_gradient_of_the_log_probability_of_the_order_drawn() -> None:
    """All orders of one set are told apart by their scores, so each score must be that of one of them."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        drawn = draw(torch.tensor([LOGITS], dtype=torch.float64), 2, generator)
        candidates = []
        for order in itertools.permutations(removed_of(drawn.mask[0])):
            r = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
            candidates.append(torch.autograd.grad(probability(r, order).log(), r)[0])
        assert any(torch.allclose(drawn.score[0], candidate, atol=1e-12) for candidate in candidates)


def test_sets_are_drawn_as_often_as_their_probability_says() -> None:
    rows = 20_000
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    drawn = draw(logits.repeat(rows, 1), 2, torch.Generator().manual_seed(3))
    for removed in itertools.combinations(range(4), 2):
        expected = sum(float(probability(logits, order)) for order in itertools.permutations(removed))
        share = (~drawn.mask[:, list(removed)]).all(dim=1).double().mean()
        assert float(share) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / rows))


@pytest.mark.parametrize("n_kept", [0, 1, 5, 8])
def test_every_row_keeps_exactly_as_many_as_asked_for(n_kept: int) -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(logits, n_kept, torch.Generator().manual_seed(0))
    assert (drawn.mask.sum(dim=1) == n_kept).all()
    assert (most_probable(logits, n_kept).sum(dim=1) == n_kept).all()
    assert drawn.score.sum(dim=1).abs().max() < 1e-9  # adding a constant to all logits changes nothing


def test_logits_far_apart_give_finite_scores() -> None:
    logits = torch.tensor([[900.0, -900.0, 0.0, 5e4]], dtype=torch.float64)
    drawn = draw(logits, 2, torch.Generator().manual_seed(0))
    assert drawn.mask.tolist() == [[False, True, True, False]]
    assert drawn.score.isfinite().all()


def test_most_probable_set_is_that_with_the_highest_probability() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    sums = {
        removed: sum(float(probability(logits, order)) for order in itertools.permutations(removed))
        for removed in itertools.combinations(range(4), 2)
    }
    assert removed_of(most_probable(logits[None], 2)[0]) == max(sums, key=lambda removed: sums[removed])


def test_of_equal_units_the_first_are_kept() -> None:
    assert most_probable(torch.zeros(1, 5), 2).tolist() == [[True, True, False, False, False]]


# --- Where the search starts ----------------------------------------------------------------------


def test_start_is_the_order_of_the_metric_with_the_spread_asked_for() -> None:
    metric = torch.tensor([[4.0, 1.0, 2.0], [10.0, 1000.0, 100.0]])
    logits = start_logits(metric, 3.0)
    assert logits.argsort(dim=1).tolist() == [[0, 2, 1], [1, 2, 0]]
    # Logarithms of 4, 1, 2 are evenly spaced, so standardised they are +-sqrt(3/2) and 0.
    assert logits[0].tolist() == pytest.approx([-3 * math.sqrt(1.5), 3 * math.sqrt(1.5), 0.0])
    assert logits.square().mean(dim=1).sqrt().tolist() == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 5.0, 5.0]])
def test_metric_of_zeros_or_equals_starts_finite(row: list[float]) -> None:
    logits = start_logits(torch.tensor([row]), 4.0)
    assert logits.isfinite().all()
    assert logits[0, 0] >= logits[0, 1]


# --- The search -----------------------------------------------------------------------------------


def settings(**changes: Any) -> StructureSettings:
    return StructureSettings.model_validate({"n_steps": 150, "batch_size": 2, "learning_rate": 0.3, **changes})


COSTS = {
    "heads": torch.tensor([[5.0, 1.0, 3.0], [0.5, 4.0, 2.0]], dtype=torch.float64),
    "channels": torch.tensor([[3.0, 0.1, 0.2, 4.0, 0.3, 5.0], [0.1, 3.0, 4.0, 0.2, 5.0, 0.3]], dtype=torch.float64),
}
N_KEPT = {"heads": 2, "channels": 3}
TRAINING, HELD_OUT = range(4), range(4, 8)


def separable(masks: Masks, numbers: Sequence[int]) -> list[float]:
    """What is removed costs; some sequences are harder than others."""
    cost = sum(float((COSTS[kind] * ~masks[kind]).sum()) for kind in COSTS)
    return [3.0 * number + cost for number in numbers]


def flat(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {kind: torch.full(costs.shape, value, dtype=torch.float64) for kind, costs in COSTS.items()}


def run(losses: Callable[[Masks, Sequence[int]], Sequence[float]] = separable, **options: Any) -> Found:
    start = options.pop("start", flat())
    held_out = options.pop("held_out", HELD_OUT)
    given = {"seed": 0, **{key: options.pop(key) for key in ("seed", "clock", "on_step") if key in options}}
    return search(start, N_KEPT, losses, TRAINING, held_out, settings(**options), **given)


def test_search_finds_the_best_masks_of_a_separable_loss() -> None:
    found = run()
    assert {kind: mask.tolist() for kind, mask in found.masks.items()} == {
        kind: most_probable(-costs, N_KEPT[kind]).tolist() for kind, costs in COSTS.items()
    }
    assert found.best.held_out_loss < found.start.held_out_loss


def test_search_recovers_from_a_metric_that_is_the_wrong_way_round() -> None:
    found = run(start={kind: 0.5 * costs for kind, costs in COSTS.items()}, n_steps=400)
    for kind, costs in COSTS.items():
        assert torch.equal(found.masks[kind], most_probable(-costs, N_KEPT[kind]))


def test_drawn_losses_fall() -> None:
    losses = run().losses
    assert len(losses) == 150
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 1


def test_same_seed_gives_the_same_search_and_another_seed_another() -> None:
    first, second, other = run(), run(), run(seed=1)
    assert first.losses == second.losses != other.losses
    assert first.checks == second.checks
    assert all(torch.equal(first.masks[kind], second.masks[kind]) for kind in COSTS)


def test_start_is_not_changed() -> None:
    start = flat()
    run(start=start, n_steps=5)
    assert all(torch.equal(start[kind], flat()[kind]) for kind in start)


def test_result_is_the_start_where_held_out_sequences_say_the_contrary_of_the_others() -> None:
    """What helps the sequences of the training hurts those held out."""

    def deceiving(masks: Masks, numbers: Sequence[int]) -> list[float]:
        cost = sum(float((COSTS[kind] * ~masks[kind]).sum()) for kind in COSTS)
        return [cost if number in TRAINING else 100.0 - cost for number in numbers]

    start = {kind: 0.5 * costs for kind, costs in COSTS.items()}  # the best for what is held out
    found = run(deceiving, start=start, n_steps=300)
    assert found.checks[-1].held_out_loss > found.start.held_out_loss  # it was led astray
    assert found.best == found.start
    assert all(torch.equal(found.masks[kind], most_probable(start[kind], N_KEPT[kind])) for kind in start)


@pytest.mark.parametrize("seed", range(5))
def test_result_is_never_worse_than_the_start_on_what_is_held_out(seed: int) -> None:
    """The loss of every mask is noise: a search can only be lucky."""

    def noise(masks: Masks, numbers: Sequence[int]) -> list[float]:
        key = sum(int((mask.flatten() * torch.arange(mask.numel()) ** 2).sum()) for mask in masks.values())
        return [((key + seed) * 7919 % 101) / 10 + number for number in numbers]

    found = run(noise, n_steps=40, check_every=5, seed=seed)
    assert found.best.held_out_loss == min(check.held_out_loss for check in found.checks)
    assert math.fsum(noise(found.masks, HELD_OUT)) / 4 == found.best.held_out_loss <= found.start.held_out_loss


# Gains of 1 + d on two sequences and 1 - d on two have a mean of 1 and a standard error of d / sqrt(3).
@pytest.mark.parametrize(("spread", "is_taken"), [(0.0, True), (1.7, True), (1.75, False)])
def test_masks_are_taken_only_if_the_paired_gain_exceeds_its_standard_error(spread: float, is_taken: bool) -> None:
    """Sequences differ much more than masks do: losses that are not paired would tell nothing."""

    def losses(masks: Masks, numbers: Sequence[int]) -> list[float]:
        cost = float(separable(masks, [0])[0])
        return [1000.0 * number + cost * (1 + spread * (1 if number % 2 else -1)) for number in numbers]

    found = run(losses, n_steps=200)
    assert found.candidate is not None
    gain = found.candidate.gain
    assert gain == pytest.approx(found.start.held_out_loss - found.candidate.held_out_loss)
    assert gain > 0.1
    assert found.candidate.gain_error == pytest.approx(gain * spread / math.sqrt(3), abs=1e-9)
    assert (found.best == found.candidate) == is_taken
    assert (found.best == found.start) == (not is_taken)


def test_fewer_than_four_held_out_sequences_cannot_tell_gain_from_chance() -> None:
    """Every one of them gains the same."""
    for n_held_out in range(1, MIN_HELD_OUT + 1):
        found = run(held_out=HELD_OUT[:n_held_out], n_steps=100)
        assert found.candidate is not None
        assert found.candidate.gain > 1
        assert math.isinf(found.candidate.gain_error) == (n_held_out < 4)
        assert (found.best == found.start) == (n_held_out < 4)


def test_masks_without_a_finite_loss_are_no_candidates() -> None:
    start = most_probable(flat()["heads"], N_KEPT["heads"])

    def losses(masks: Masks, numbers: Sequence[int]) -> list[float]:
        is_start = torch.equal(masks["heads"], start)
        return [1.0 if is_start or number in TRAINING else math.inf for number in numbers]

    found = run(losses, n_steps=5)
    assert found.best == found.start
    assert any(math.isinf(check.held_out_loss) for check in found.checks)
    assert found.candidate is None or math.isfinite(found.candidate.held_out_loss)


def test_checks_are_at_the_start_at_every_nth_step_and_at_the_end() -> None:
    for n_steps, expected in ((50, [0, 20, 40, 50]), (40, [0, 20, 40])):
        checks = run(n_steps=n_steps, check_every=20).checks
        assert [check.step for check in checks if not check.is_draw] == expected
        assert [check.step for check in checks if check.is_draw] == expected[1:]


def test_draw_that_was_the_best_of_the_steps_is_tried_too() -> None:
    """The most probable masks never move here, so only a draw can be better than the start."""
    found = run(start={kind: 0.5 * costs for kind, costs in COSTS.items()}, n_steps=10, learning_rate=1e-9)
    assert (found.best.step, found.best.is_draw) == (10, True)
    assert math.fsum(separable(found.masks, HELD_OUT)) / 4 == pytest.approx(found.best.held_out_loss)
    assert found.best.held_out_loss < found.start.held_out_loss == found.checks[-1].held_out_loss


def test_no_steps_keep_what_the_metric_keeps() -> None:
    found = run(start={kind: -costs for kind, costs in COSTS.items()}, n_steps=0)
    assert found.losses == ()
    assert found.checks == (found.best,)
    assert found.candidate is None
    assert all(torch.equal(found.masks[kind], most_probable(-COSTS[kind], N_KEPT[kind])) for kind in COSTS)


def test_training_sees_no_held_out_sequence_and_every_other_one() -> None:
    seen: list[set[int]] = []

    def watched(masks: Masks, numbers: Sequence[int]) -> list[float]:
        seen.append(set(numbers))
        return separable(masks, numbers)

    run(watched, n_steps=10, check_every=100)
    assert seen[0] == seen[-1] == set(HELD_OUT)
    assert set().union(*seen[1:-2]) == set(TRAINING)


def test_larger_batch_than_there_are_sequences_takes_all() -> None:
    sizes: set[int] = set()

    def watched(masks: Masks, numbers: Sequence[int]) -> list[float]:
        sizes.add(len(numbers))
        return separable(masks, numbers)

    run(watched, n_steps=3, batch_size=100, held_out=HELD_OUT[:3])
    assert sizes == {4, 3}


class Clock:
    """Ten seconds per sequence."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def losses(self, masks: Masks, numbers: Sequence[int]) -> list[float]:
        self.now += 10.0 * len(numbers)
        return separable(masks, numbers)


@pytest.mark.parametrize("budget", [25.0, 100.0, 110.0, 500.0])
def test_time_budget_is_kept_to_one_step(budget: float) -> None:
    clock = Clock()
    options: dict[str, Any] = {"held_out": HELD_OUT[:2], "clock": clock}
    found = run(clock.losses, n_steps=10_000, check_every=10_000, budget_seconds=budget, **options)
    a_step, a_check = 2 * 2 * 10.0, 2 * 2 * 10.0
    assert clock.now - 1000.0 < max(budget, a_check) + a_step
    # It stops no sooner than it must: one step and check more would be too long.
    assert clock.now - 1000.0 + a_step >= budget
    assert found.checks[-1].step == len(found.losses) < 10_000


def test_time_is_not_looked_at_without_a_budget() -> None:
    clock = Clock()
    assert len(run(clock.losses, n_steps=30, clock=clock).losses) == 30


def test_every_step_is_reported_with_its_loss() -> None:
    steps: list[Step] = []
    found = run(n_steps=3, on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(f"loss {loss:.4f}" in step.note for step, loss in zip(steps, found.losses, strict=True))
    assert all(f"start {found.start.held_out_loss:.4f}" in step.note for step in steps)


def test_step_with_a_loss_that_is_not_finite_teaches_nothing() -> None:
    calls = 0

    def sometimes(masks: Masks, numbers: Sequence[int]) -> list[float]:
        nonlocal calls
        calls += 1
        return [math.nan if calls % 7 == 3 else loss for loss in separable(masks, numbers)]

    found = run(sometimes, n_steps=300, check_every=1000)
    assert any(math.isnan(loss) for loss in found.losses)
    assert all(set(mask.sum(dim=1).tolist()) == {N_KEPT[kind]} for kind, mask in found.masks.items())
    assert math.isfinite(found.best.held_out_loss)
    assert found.best.held_out_loss < found.start.held_out_loss


def test_start_whose_loss_is_not_finite_is_refused() -> None:
    with pytest.raises(OwlDeployError, match="keep more heads or channels"):
        run(lambda masks, numbers: [math.inf for _ in numbers])


def test_losses_that_are_all_equal_leave_the_start() -> None:
    found = run(lambda masks, numbers: [1.0 for _ in numbers], n_steps=30)
    assert found.best.step == 0
    assert all(check.held_out_loss == 1.0 for check in found.checks)
