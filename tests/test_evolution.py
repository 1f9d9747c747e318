"""The search of levels: on sums of independent terms, whose best levels are known."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_deploy.errors import OwlDeployError
from owl_deploy.evolution import Evolved, Fitness, Levels, Selection, evolve, level_grid, mutant, selections
from owl_deploy.progress import Step


def separable(weights: Sequence[float]) -> Fitness:
    """Each item costs its weight times 2 to the power of its level, the same on all sequences."""
    return lambda levels, _: sum(weight * 2**level for weight, level in zip(weights, levels, strict=True))


def search(
    fitness: Fitness,
    n: int,
    *,
    reach: int = 3,
    n_generations: int = 60,
    n_offspring: int = 8,
    n_sequences: int = 8,
    seed: int = 0,
) -> Evolved:
    return evolve(
        (-reach,) * n,
        (reach,) * n,
        fitness,
        n_sequences=n_sequences,
        n_offspring=n_offspring,
        n_generations=n_generations,
        seed=seed,
    )


# --- Finding ------------------------------------------------------------------------------------


def test_a_sensitive_item_goes_down_and_the_others_up() -> None:
    found = search(separable([100, 1, 1, 1]), 4)
    assert found.levels == (-3, 1, 1, 1)
    assert found.curve[-1] == 100 / 8 + 6


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_levels_is_found(seed: int) -> None:
    weights = [random.Random(seed).lognormvariate(0, 2) for _ in range(4)]
    fitness = separable(weights)
    every = [levels for levels in itertools.product(range(-2, 3), repeat=4) if sum(levels) == 0]
    best = min(every, key=lambda levels: fitness(levels, range(8)))
    assert search(fitness, 4, reach=2, seed=seed).levels == best


def test_no_generations_leave_the_start() -> None:
    assert search(separable([9, 1]), 2, n_generations=0) == Evolved((0, 0), (10,))


def test_a_single_item_has_nothing_to_swap_with() -> None:
    found = search(separable([9]), 1)
    assert (found.levels, found.n_generations) == ((0,), 0)


def test_few_possible_offspring_are_enough() -> None:
    assert search(separable([9, 1]), 2, reach=1, n_offspring=50).levels == (-1, 1)


def test_nan_is_worse_than_anything() -> None:
    def fitness(levels: Levels, _: Sequence[int]) -> float:
        return math.nan if levels[0] < 0 else 5.0 - levels[0]

    assert search(fitness, 2).levels == (3, -3)


def test_a_start_that_is_not_finite_is_refused() -> None:
    with pytest.raises(OwlDeployError, match="start of the search has fitness inf: ask for a lower sparsity"):
        search(lambda *_: math.inf, 3)


@pytest.mark.parametrize(("lowest", "highest"), [((1, 0), (2, 2)), ((0, 0), (1, -1)), ((0,), (0, 0))])
def test_bounds_that_leave_out_the_start_are_refused(lowest: Levels, highest: Levels) -> None:
    with pytest.raises(ValueError, match="level 0 must be within bounds"):
        evolve(lowest, highest, separable([1, 1]), n_sequences=1, n_offspring=1, n_generations=1)


# --- What always holds --------------------------------------------------------------------------


@st.composite
def bounds(draw: st.DrawFn) -> tuple[Levels, Levels]:
    n = draw(st.integers(1, 6))
    limits = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    return tuple(-low for low in draw(limits)), tuple(draw(limits))


@given(bounds(), st.integers(0, 1000))
def test_every_individual_keeps_the_sum_and_the_bounds(limits: tuple[Levels, Levels], seed: int) -> None:
    lowest, highest = limits
    seen: list[Levels] = []

    def fitness(levels: Levels, sequences: Sequence[int]) -> float:
        seen.append(levels)
        return random.Random(f"{levels} {seed}").random()

    evolve(lowest, highest, fitness, n_sequences=3, n_offspring=4, n_generations=6, seed=seed)
    for levels in seen:
        assert sum(levels) == 0
        assert all(low <= level <= high for low, level, high in zip(lowest, levels, highest, strict=True))


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=30)
def test_the_curve_never_rises_and_ends_at_the_result(seed: int, n_offspring: int, n_sequences: int) -> None:
    def noisy(levels: Levels, sequences: Sequence[int]) -> float:
        return sum(random.Random(f"{levels} {i} {seed}").random() for i in sequences) / len(sequences)

    found = search(noisy, 5, n_generations=8, n_offspring=n_offspring, n_sequences=n_sequences, seed=seed)
    assert list(found.curve) == sorted(found.curve, reverse=True)
    assert found.n_generations == 8
    assert found.curve[-1] == noisy(found.levels, range(n_sequences))


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    fitness = separable([random.Random(i).random() for i in range(30)])
    runs = [search(fitness, 30, n_generations=5, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].levels != runs[2].levels


def test_more_generations_go_on_where_fewer_ended() -> None:
    fitness = separable([random.Random(i).random() for i in range(30)])
    short, long = (search(fitness, 30, n_generations=n) for n in (5, 9))
    assert long.curve[:6] == short.curve


def test_every_generation_is_told() -> None:
    steps: list[Step] = []
    evolve((-1, -1), (1, 1), separable([3, 1]), n_sequences=1, n_offspring=1, n_generations=2, on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(1, 2), (2, 2)]
    assert steps[-1].note == "fitness 4.0000 -> 3.5000"


# --- Selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_offspring", "n_sequences", "expected"),
    [
        (16, 8, [(1, 4), (4, 1), (8, 1)]),
        (64, 20, [(3, 16), (10, 1), (20, 1)]),
        (3, 8, [(4, 1), (8, 1)]),
        (1, 8, [(8, 1)]),
        (8, 2, [(1, 1), (2, 1)]),
        (8, 1, [(1, 1)]),
    ],
)
def test_rounds_of_a_generation(n_offspring: int, n_sequences: int, expected: list[tuple[int, int]]) -> None:
    assert selections(n_offspring, n_sequences) == tuple(Selection(*pair) for pair in expected)


def test_a_round_compares_on_the_same_sequences_and_the_last_on_all() -> None:
    calls: list[tuple[int, ...]] = []

    def fitness(levels: Levels, sequences: Sequence[int]) -> float:
        calls.append(tuple(sequences))
        return 1.0

    search(fitness, 6, n_generations=2)
    assert calls[0] == tuple(range(8))
    generations = [calls[1:12], calls[12:]]
    for rounds in generations:
        assert len(set(rounds[:8])) == 1
        assert len(rounds[0]) == 1
        assert len(set(rounds[8:10])) == 1
        assert len(rounds[8]) == 4
        assert set(rounds[0]) < set(rounds[8])
        assert rounds[10:] == [tuple(range(8))]


# --- Mutation -----------------------------------------------------------------------------------


def test_one_swap_in_five_of_nine_mutations_two_in_three_three_in_one() -> None:
    generator = random.Random(0)
    counts = [0, 0, 0, 0]
    parent, reach = (0,) * 2000, (9,) * 2000  # so many that no item is drawn twice
    for _ in range(900):
        levels = mutant(parent, tuple(-n for n in reach), reach, generator)
        counts[sum(level for level in levels if level > 0)] += 1
    assert counts[0] == 0
    assert counts[1] == pytest.approx(500, abs=60)
    assert counts[2] == pytest.approx(300, abs=60)
    assert counts[3] == pytest.approx(100, abs=40)


def test_without_room_the_parent_is_its_own_mutant() -> None:
    generator = random.Random(0)
    assert mutant((0, 0), (0, 0), (5, 5), generator) == (0, 0)
    assert mutant((0, 0), (-5, -5), (0, 0), generator) == (0, 0)
    assert mutant((0, 0), (-5, 0), (5, 0), generator) == (0, 0)


# --- Time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "n_whole"), [(0.5, 0), (11, 0), (11.5, 1), (22, 1), (22.5, 2), (99, 3)])
def test_time_is_overrun_by_one_measurement_at_most(budget: float, n_whole: int) -> None:
    now = [0.0]
    fitness = separable([random.Random(i).random() for i in range(30)])

    def slow(levels: Levels, sequences: Sequence[int]) -> float:
        now[0] += 1
        return fitness(levels, sequences)

    found = evolve(
        (-3,) * 30,
        (3,) * 30,
        slow,
        n_sequences=8,
        n_offspring=8,
        n_generations=3,
        budget_seconds=budget,
        clock=lambda: now[0],
    )
    assert now[0] <= max(1, math.ceil(budget))
    assert found.n_generations == n_whole
    # A generation that time cut leaves no trace.
    assert found == search(fitness, 30, n_generations=n_whole)


# --- Grid ---------------------------------------------------------------------------------------


def test_worked_grid() -> None:
    grid = level_grid([100, 300], [0.6, 0.6], step=0.1, n_levels=8)
    assert grid.step == 20
    assert grid.lowest == (-3, -8)
    assert grid.highest == (1, 5)
    assert grid.sparsities((-3, 3)) == pytest.approx([0.0, 0.8], abs=1e-12)
    assert grid.sparsities((0, 0)) == [0.6, 0.6]


def test_a_linear_smaller_than_a_step_stays() -> None:
    grid = level_grid([1, 100], [0.5, 0.5], step=0.2, n_levels=3)
    assert (grid.lowest, grid.highest) == ((0, -3), (0, 3))


def test_a_start_above_the_ceiling_only_comes_down() -> None:
    grid = level_grid([10, 10], [0.995, 0.995], step=0.1, n_levels=2)
    assert grid.highest == (0, 0)
    assert grid.sparsity(0, 0) == 0.995


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 0.999)), min_size=1, max_size=8),
    st.floats(0.01, 1),
    st.integers(0, 9),
    st.integers(0, 1000),
)
def test_swaps_keep_the_weighted_mean_and_the_range(
    linears: list[tuple[int, float]], step: float, n_levels: int, seed: int
) -> None:
    sizes, start = [size for size, _ in linears], [sparsity for _, sparsity in linears]
    grid = level_grid(sizes, start, step=step, n_levels=n_levels)
    generator, levels = random.Random(seed), (0,) * len(sizes)
    for _ in range(10):
        levels = mutant(levels, grid.lowest, grid.highest, generator)
    sparsities = grid.sparsities(levels)
    expected = math.fsum(size * sparsity for size, sparsity in linears)
    assert math.fsum(s * size for s, size in zip(sparsities, sizes, strict=True)) == pytest.approx(
        expected, abs=1e-7 * sum(sizes)
    )
    assert all(0 <= s <= max(0.99, before) for s, before in zip(sparsities, start, strict=True))


@pytest.mark.parametrize(
    ("sizes", "start", "step", "n_levels"),
    [([], [], 0.1, 1), ([1], [0.5, 0.5], 0.1, 1), ([1], [1.0], 0.1, 1), ([0], [0.5], 0.1, 1), ([1], [0.5], 0, 1)],
)
def test_impossible_grids_are_refused(sizes: list[int], start: list[float], step: float, n_levels: int) -> None:
    with pytest.raises(ValueError, match=r"need a size|step must"):
        level_grid(sizes, start, step=step, n_levels=n_levels)
