"""One figure per decoder block or per linear of the dense model, from which an allocation shares out its target.

In: a skeleton, what calibration showed of it, which linears belong together. Out: a float for each of these units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from owl_deploy.dense_inputs import norm_of
from owl_deploy.methods.wanda import score as wanda_score
from owl_deploy.observation import Observed
from owl_deploy.progress import OnStep, Step
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton
from owl_deploy.spectrum import hill_alpha_of
from owl_deploy.statistics import median, outlier_ratio

__all__ = ["FIGURE_NAMES", "Unit", "allocation_figures"]

FIGURE_NAMES = {"owl": "outlier_ratio", "dlp": "median_score", "alphapruning": "alpha", "isc": "sensitivity"}
"""The allocations that need a figure, and what it is called in owl.json."""

Unit = Mapping[str, Prunable]
"""Linears of one block that get one sparsity: all of them, or one."""


def allocation_figures(
    skeleton: Skeleton,
    settings: PruneSettings,
    units: list[list[Unit]],
    seen: list[dict[str, Observed]] | None,
    traces: Mapping[str, float] | None,
    on_step: OnStep,
) -> list[list[float]]:
    """Return, per block, the figure of every unit that `settings.allocation` needs.

    outlier_ratio: `statistics.outlier_ratio` of its Wanda scores. median_score: their median (DLP,
    arXiv 2505.23807; its code takes the mean in the unstructured path). alpha: mean over its linears of the tail
    exponent (AlphaPruning). sensitivity: mean over its linears of the mean of the Hessian's diagonal, that of the
    loss (arXiv 2310.09499; the paper sums over the linears, which makes the same ranks) or of the linear's own
    squared output error, which is cheap.

    Args:
        skeleton: of the dense model.
        settings: which figure.
        units: per block.
        seen: of `dense_inputs`; None for alphapruning, and for isc with traces.
        traces: mean of the loss Hessian's diagonal by linear; None but for isc that asks for it.
        on_step: told of every block.
    """
    figure_of = _figure_of(settings)
    n_blocks = len(skeleton.blocks)
    figures: list[list[float]] = []
    for index in range(n_blocks):
        known = seen[index] if seen is not None else {}
        if traces is not None:
            figures.append([float(np.mean([traces[name] for name in unit])) for unit in units[index]])
        else:
            with skeleton.filled(index):
                figures.append([figure_of(unit, known) for unit in units[index]])
        note = f"{FIGURE_NAMES[settings.allocation]} {np.mean(figures[-1]):.4g}"
        on_step(Step("figures of the dense model", index + 1, n_blocks, note))
    return figures


def _figure_of(settings: PruneSettings) -> Callable[[Unit, Mapping[str, Observed]], float]:
    def scores(unit: Unit, seen: Mapping[str, Observed]) -> list[torch.Tensor]:
        return [wanda_score(linear.weight, norm_of(seen[name])) for name, linear in unit.items()]

    def alpha(unit: Unit, _: Mapping[str, Observed]) -> float:
        estimator, aspect_ratio = settings.alpha_estimator, settings.alpha_aspect_ratio
        return float(
            np.mean(
                [
                    hill_alpha_of(linear.weight.cpu(), name=name, estimator=estimator, aspect_ratio=aspect_ratio)
                    for name, linear in unit.items()
                ]
            )
        )

    def sensitivity(unit: Unit, seen: Mapping[str, Observed]) -> float:
        return float(np.mean([float(2 * norm_of(seen[name]).mean.mean()) for name in unit]))

    return {
        "owl": lambda unit, seen: outlier_ratio(scores(unit, seen), owl_m=settings.owl_m),
        "dlp": lambda unit, seen: median(scores(unit, seen)),
        "alphapruning": alpha,
        "isc": sensitivity,
    }[settings.allocation]
