"""Between which sparsities an allocation may choose, whatever the model's weights turn out to be.

In: a skeleton, settings. Out: the lowest and the highest sparsity of any block or linear.
"""

from __future__ import annotations

from owl_deploy.allocation import MAX_SPARSITY, largest_slope
from owl_deploy.layer_sparsities import by_rule
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Skeleton

__all__ = ["allocation_range"]


def allocation_range(skeleton: Skeleton, settings: PruneSettings) -> tuple[float, float]:
    """Return the lowest and the highest sparsity that the rule can give a block or linear.

    Those of owl, dlp, alphapruning and ramp are reached by some figures; isc and evopress stay inside theirs.
    """
    target, n_blocks = settings.sparsity, len(skeleton.blocks)
    sizes = skeleton.n_weights()
    if settings.allocation_per == "linear":
        sizes = [linear.weight.numel() for i in range(n_blocks) for linear in skeleton.linears(i).values()]
    if settings.allocation == "evopress":
        return 0.0, max(MAX_SPARSITY, target)
    if settings.allocation == "isc":
        # Ranks cannot all be at one end, and with units of unequal size the whole ladder of them moves.
        others = 1 - min(sizes) / sum(sizes)
        reach = settings.isc_half_width * (1 if len(set(sizes)) == 1 else 2 * others)
        return max(0.0, target - reach), min(max(MAX_SPARSITY, target), target + reach)
    steepest = settings.model_copy(update={"ramp_slope": largest_slope(n_blocks, target)})
    # The mean is farthest from the end at which one unit is, the smallest, while all others are at the other end.
    smallest = sizes.index(min(sizes))
    one = [float(i == smallest) for i in range(len(sizes))]
    goals = [goal for figures in (one, [1 - figure for figure in one]) for goal in by_rule(steepest, figures, sizes)]
    return min(goal.sparsity for goal in goals), max(goal.sparsity for goal in goals)
