"""What is asked of every linear of a model: the target, shared out by an allocation.

In: a skeleton, settings, calibration. Out: a goal per linear, and the figures that led to them. The rules
themselves are in `owl_deploy.allocation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl_deploy import allocation
from owl_deploy.allocation_figures import FIGURE_NAMES, Unit, allocation_figures
from owl_deploy.allocation_file import is_by_linear, load_allocation
from owl_deploy.block_pruning import statistic_kinds
from owl_deploy.methods import Goal
from owl_deploy.observation import Observed
from owl_deploy.pattern import Pattern, parse_pattern
from owl_deploy.progress import OnStep
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Skeleton
from owl_deploy.statistics import SquaredNorm

__all__ = [
    "LayerSparsities",
    "by_rule",
    "needs_dense_inputs",
    "needs_search",
    "needs_traces",
    "needs_tuning",
    "of_linears",
    "share_out",
]


@dataclass(frozen=True)
class LayerSparsities:
    """The outcome of an allocation."""

    goals: list[dict[str, Goal]]
    """Per block, by linear."""
    blocks: list[float]
    """Sparsity asked of every block: the mean over its linears, weighted by their size."""
    is_by_linear: bool
    """Whether linears of a block may differ."""
    figures: list[list[float]] | None = None
    """Per block, one for all its linears or one for each; None where the allocation needs none."""
    settings: PruneSettings | None = None
    tuning: dict[str, Any] | None = None
    """What was tried, where something was tuned or searched; for owl.json, under the name of the allocation."""

    def figures_of_block(self, index: int) -> dict[str, float]:
        """Return what owl.json says of a block besides its sparsity: the mean figure, by its name."""
        if self.figures is None or self.settings is None:
            return {}
        return {FIGURE_NAMES[self.settings.allocation]: float(np.mean(self.figures[index]))}


def needs_dense_inputs(settings: PruneSettings) -> bool:
    """Return whether the allocation looks at the inputs of the dense model's linears."""
    if settings.allocation == "isc":
        return settings.isc_sensitivity == "layerwise"
    if settings.allocation == "evopress":
        return settings.evopress_start == "owl" or statistic_kinds(settings) == (SquaredNorm,)
    return settings.allocation in ("owl", "dlp")


def needs_traces(settings: PruneSettings) -> bool:
    """Return whether the allocation ranks Hessian traces of the loss of the whole model."""
    return settings.allocation == "isc" and settings.isc_sensitivity == "hutchinson"


def needs_tuning(settings: PruneSettings) -> bool:
    """Return whether the allocation has a slope to be tuned."""
    return settings.allocation == "ramp" and settings.ramp_slope is None


def needs_search(settings: PruneSettings) -> bool:
    """Return whether the sparsities of linears are searched, with the whole model in memory."""
    return settings.allocation == "evopress"


def share_out(
    skeleton: Skeleton,
    settings: PruneSettings,
    seen: list[dict[str, Observed]] | None,
    traces: dict[str, float] | None,
    on_step: OnStep,
) -> LayerSparsities:
    """Share the target among blocks or linears.

    Args:
        skeleton: of the dense model.
        settings: allocation, target and pattern.
        seen: of `dense_inputs`, where `needs_dense_inputs` says so.
        traces: mean of the loss Hessian's diagonal by linear, where `isc` asks for it.
        on_step: told of every block that had to be looked at.

    Raises:
        RecipeError: a file does not fit, or a slope is out of range.
        OwlDeployError: a spectrum has no tail, or was pruned already.
    """
    by_linear = settings.allocation_per == "linear"
    if settings.allocation.startswith("file:"):
        path = Path(settings.allocation.removeprefix("file:"))
        by_linear = is_by_linear(path)
    n_blocks = len(skeleton.blocks)
    units: list[list[Unit]] = []
    for index in range(n_blocks):
        linears = skeleton.linears(index)
        units.append([{name: linear} for name, linear in linears.items()] if by_linear else [linears])
    sizes = [sum(linear.weight.numel() for linear in unit.values()) for block in units for unit in block]
    figures = None
    if settings.allocation in FIGURE_NAMES:
        figures = allocation_figures(skeleton, settings, units, seen, traces, on_step)
    flat = [figure for block in figures for figure in block] if figures is not None else []
    if settings.allocation.startswith("file:"):
        pattern = parse_pattern(settings.pattern)
        names = [name for block in units for unit in block for name in unit] if by_linear else None
        goals = [Goal(value, pattern) for value in load_allocation(path, sizes, settings.sparsity, names=names)]
    else:
        goals = by_rule(settings, flat, sizes)
    of_unit = iter(goals)
    per_block = [{name: goal for unit in block for goal in [next(of_unit)] for name in unit} for block in units]
    means = [_mean(block, skeleton, index) for index, block in enumerate(per_block)]
    return LayerSparsities(per_block, means, by_linear, figures, settings)


def of_linears(skeleton: Skeleton, settings: PruneSettings, sparsities: Mapping[str, float]) -> LayerSparsities:
    """Ask for a given sparsity of every linear."""
    per_block = [
        {name: Goal(sparsities[name]) for name in skeleton.linears(index)} for index in range(len(skeleton.blocks))
    ]
    means = [_mean(block, skeleton, index) for index, block in enumerate(per_block)]
    return LayerSparsities(per_block, means, is_by_linear=True, settings=settings)


def by_rule(settings: PruneSettings, figures: list[float], sizes: list[int]) -> list[Goal]:
    """Return what a rule, no file and no search, asks of every unit.

    Args:
        settings: allocation, target and pattern; `ramp_slope` must be known.
        figures: of the units, where the allocation needs any.
        sizes: weights of the units.
    """
    pattern = parse_pattern(settings.pattern)
    if pattern is not None and settings.allocation == "owl":
        kept = allocation.owl_mixed_pattern(
            figures, sizes, pattern.of - pattern.keep, spread=settings.owl_pattern_spread
        )
        return [_pattern_goal(count, pattern.of) for count in kept]
    return [Goal(value, pattern) for value in _sparsities(settings, figures, sizes)]


def _sparsities(settings: PruneSettings, figures: list[float], sizes: list[int]) -> list[float]:
    target = settings.sparsity
    if settings.allocation == "uniform":
        return allocation.uniform(sizes, target)
    if settings.allocation == "ramp":
        assert settings.ramp_slope is not None, "to be tuned before"
        return allocation.ramp(sizes, target, slope=settings.ramp_slope)
    if settings.allocation == "owl":
        return allocation.owl(figures, sizes, target, owl_lambda=settings.owl_lambda)
    if settings.allocation == "dlp":
        return allocation.dlp(figures, sizes, target, alpha=settings.dlp_alpha)
    if settings.allocation == "isc":
        return allocation.isc(figures, sizes, target, half_width=settings.isc_half_width)
    return allocation.alphapruning(figures, sizes, target, epsilon=settings.alpha_epsilon)


def _pattern_goal(keep: int, of: int) -> Goal:
    """Ask for so many of a group; all of them is a dense linear."""
    return Goal(0.0) if keep == of else Goal(1 - keep / of, Pattern(keep, of))


def _mean(goals: dict[str, Goal], skeleton: Skeleton, index: int) -> float:
    values = [goal.sparsity for goal in goals.values()]
    if len(set(values)) == 1:
        return values[0]  # exactly: a mean would round
    return float(np.average(values, weights=[skeleton.linears(index)[name].weight.numel() for name in goals]))
