"""Which levels to give to the members of a sum, searched by evolution: only a fitness goes in.

In: for every item the lowest and the highest level it can have, and a function that says how bad the levels of all
items are on numbered sequences. Out: levels with the same sum as at the start, and how the fitness fell. What an item
is, and what a level does to a model, is not known here, but for `LevelGrid`, which turns levels into sparsities.

Method: EvoPress (arXiv 2410.14649, algorithm 1), an elitist (1 + lambda) search. It differs from the paper's code in
this: sequences of the last selection are always the same ones, all there are, so that the fitness of the parent need
not be measured again and never rises; the code draws them anew in every generation, out of thousands.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owl_deploy.allocation import MAX_SPARSITY
from owl_deploy.errors import OwlDeployError
from owl_deploy.progress import OnStep, Step, silent

__all__ = ["Evolved", "Fitness", "LevelGrid", "Levels", "Selection", "evolve", "level_grid", "mutant", "selections"]

Levels = tuple[int, ...]
"""One per item, 0 where it is as at the start."""

Fitness = Callable[[Levels, Sequence[int]], float]
"""(levels, numbers of sequences) -> how far from the dense model they are; lower is better."""

_MOST_SWAPS = 3
_MOST_DRAWS = 100
"""Tries for offspring unlike its parent and its siblings, before there are taken to be none."""


@dataclass(frozen=True)
class LevelGrid:
    """Sparsities that linears can have: a level more or less is the same number of weights in every one of them.

    So levels with the sum 0 have the mean sparsity of the start exactly, whatever the sizes.
    """

    n_weights: tuple[int, ...]
    start: tuple[float, ...]
    """Sparsity of every linear at level 0."""
    step: float
    """Weights by which neighbouring levels differ."""
    lowest: Levels
    highest: Levels

    def sparsity(self, i: int, level: int) -> float:
        """Return the sparsity of linear `i` at a level, in [0, 0.99], or as at the start."""
        if level == 0:
            return self.start[i]
        return min(max(self.start[i] + level * self.step / self.n_weights[i], 0.0), MAX_SPARSITY)

    def sparsities(self, levels: Levels) -> list[float]:
        """Return the sparsity of every linear."""
        return [self.sparsity(i, level) for i, level in enumerate(levels)]


@dataclass(frozen=True)
class Selection:
    """One of the rounds that the offspring of a generation goes through."""

    n_sequences: int
    """That its fitness is measured on."""
    n_survivors: int


@dataclass(frozen=True)
class Evolved:
    """The outcome of a search."""

    levels: Levels
    curve: tuple[float, ...]
    """Fitness of the parent on all sequences: at the start, and after every whole generation. Never rises."""

    @property
    def n_generations(self) -> int:
        """Whole generations."""
        return len(self.curve) - 1


def level_grid(n_weights: Sequence[int], start: Sequence[float], *, step: float, n_levels: int) -> LevelGrid:
    """Lay out the levels of linears.

    The paper takes a million weights for models of 7B, which is 0.034 of their mean linear, and 8 levels each side. A
    search of minutes makes a few dozen generations, not 400 of 64 offspring, and needs longer strides: SmolLM2-135M at
    60 % came from 1.557 to 1.396 nats in 20 generations of 8 with a step of 0.1, and to 1.335 with 0.2.
    A linear too small for one step up or down has no levels on that side.

    Args:
        n_weights: of every linear.
        start: sparsity of every linear at level 0, in [0, 1).
        step: as a share of the mean of `n_weights`.
        n_levels: most levels on each side of the start.

    Raises:
        ValueError: the lengths differ, or a number is out of range.
    """
    if len(n_weights) != len(start) or not n_weights or min(n_weights) < 1 or not all(0 <= s < 1 for s in start):
        raise ValueError(f"need a size and a sparsity for every linear, got {list(n_weights)} and {list(start)}")
    if not step > 0 or n_levels < 0:
        raise ValueError(f"step must be above 0 and n_levels not below, got {step} and {n_levels}")
    weights = step * sum(n_weights) / len(n_weights)

    def room(size: int, share: float) -> int:
        # 1e-9 forgives that 0.99 - 0.6 is a little less than 0.39.
        return max(0, min(n_levels, math.floor(share * size / weights + 1e-9)))

    pairs = list(zip(n_weights, start, strict=True))
    lowest = tuple(-room(size, sparsity) for size, sparsity in pairs)
    highest = tuple(room(size, MAX_SPARSITY - sparsity) for size, sparsity in pairs)
    return LevelGrid(tuple(n_weights), tuple(start), weights, lowest, highest)


def selections(n_offspring: int, n_sequences: int) -> tuple[Selection, ...]:
    """Plan the rounds of a generation: many candidates see few sequences, few see more, one sees all.

    The paper's 64 offspring survive as 8, 2 and 1 on 1/32, 1/4 and all of the tokens. Here it is a quarter of them on
    an eighth of the sequences, one of these on half of them; rounds that would tell no more than the next are left out.
    """
    rounds = [Selection(n_sequences, 1)]
    half, eighth = -(-n_sequences // 2), -(-n_sequences // 8)
    if n_offspring > 1 and half < n_sequences:
        rounds.insert(0, Selection(half, 1))
        if n_offspring > 3 and eighth < half:
            rounds.insert(0, Selection(eighth, n_offspring // 4))
    return tuple(rounds)


def mutant(parent: Levels, lowest: Levels, highest: Levels, generator: random.Random) -> Levels:
    """Return levels that differ from the parent's by a few swaps: one item up, another one down.

    There are min(a, b) swaps with a and b drawn from 1, 2, 3: one of them in five cases of nine. Swaps may undo one
    another, and there may be none to make: then the parent is returned.
    """
    levels = list(parent)
    for _ in range(min(generator.randint(1, _MOST_SWAPS), generator.randint(1, _MOST_SWAPS))):
        up = [i for i, level in enumerate(levels) if level < highest[i]]
        if not up:
            break
        raised = generator.choice(up)
        down = [i for i, level in enumerate(levels) if level > lowest[i] and i != raised]
        if not down:
            break
        levels[raised] += 1
        levels[generator.choice(down)] -= 1
    return tuple(levels)


class _TimeIsUpError(Exception):
    """The budget is spent."""


def evolve(
    lowest: Levels,
    highest: Levels,
    fitness: Fitness,
    *,
    n_sequences: int,
    n_offspring: int,
    n_generations: int,
    budget_seconds: float | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_step: OnStep = silent,
) -> Evolved:
    """Search levels of low fitness, from all 0.

    In every generation, offspring is made of the parent by `mutant` and goes through `selections`; on fewer than all
    sequences, all of it is measured on the same ones, drawn anew in every generation. The last one left takes the
    place of the parent where it is fitter on all sequences.

    The result depends on the seed and on the number of generations done, not on time. The budget is looked at before
    each measurement but the first, so it is overrun by one of them at most; a generation that it cuts does not count.

    Args:
        lowest: level of every item, not above 0.
        highest: level of every item, not below 0.
        fitness: what is to become low; NaN is taken for infinite.
        n_sequences: that there are to measure it on.
        n_offspring: lambda, per generation.
        n_generations: most generations.
        budget_seconds: ends the search earlier; None does not.
        seed: of mutations and of the choice of sequences.
        clock: seconds; for tests.
        on_step: told of every generation.

    Raises:
        ValueError: bounds leave out level 0, or a count is below 1.
        OwlDeployError: the fitness of the start is not finite.
    """
    if len(lowest) != len(highest) or any(low > 0 or high < 0 for low, high in zip(lowest, highest, strict=False)):
        raise ValueError(f"level 0 must be within bounds, got {lowest} to {highest}")
    if n_sequences < 1 or n_offspring < 1:
        raise ValueError(f"need sequences and offspring, got {n_sequences} and {n_offspring}")
    started = clock()
    generator = random.Random(seed)
    rounds = selections(n_offspring, n_sequences)

    def measured(levels: Levels, sequences: Sequence[int]) -> float:
        if budget_seconds is not None and clock() - started >= budget_seconds:
            raise _TimeIsUpError
        value = fitness(levels, sequences)
        return math.inf if math.isnan(value) else value

    parent = (0,) * len(lowest)
    curve = [fitness(parent, range(n_sequences))]
    if not math.isfinite(curve[0]):
        raise OwlDeployError(f"the start of the search has fitness {curve[0]}: ask for a lower sparsity")
    while len(curve) <= n_generations:
        candidates = _offspring(parent, lowest, highest, n_offspring, generator)
        if not candidates:
            break  # nothing to swap
        order = generator.sample(range(n_sequences), n_sequences)
        best = math.inf
        try:
            for selection in rounds:
                sequences = sorted(order[: selection.n_sequences])
                found = [measured(levels, sequences) for levels in candidates]
                fittest = sorted(range(len(found)), key=found.__getitem__)[: selection.n_survivors]
                candidates, best = [candidates[i] for i in fittest], found[fittest[0]]
        except _TimeIsUpError:
            break
        if best < curve[-1]:
            parent = candidates[0]
        curve.append(min(best, curve[-1]))
        on_step(Step("evolution", len(curve) - 1, n_generations, f"fitness {curve[0]:.4f} -> {curve[-1]:.4f}"))
    return Evolved(parent, tuple(curve))


def _offspring(
    parent: Levels, lowest: Levels, highest: Levels, n_offspring: int, generator: random.Random
) -> list[Levels]:
    """Return mutants that are unlike the parent and each other; fewer where there are not so many."""
    found: dict[Levels, None] = {}
    for _ in range(n_offspring * _MOST_DRAWS):
        levels = mutant(parent, lowest, highest, generator)
        if levels != parent:
            found[levels] = None
        if len(found) == n_offspring:
            break
    return list(found)
