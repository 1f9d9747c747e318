"""How the target sparsity is shared among decoder blocks.

In: one figure per block (its outlier ratio, say), the number of weights in each, the target.
Out: one sparsity per block whose mean, weighted by the number of weights, is the target.
Pure functions; what the figures mean and where they come from is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_SPARSITY", "owl", "preserve_target", "uniform"]

MAX_SPARSITY = 0.99
"""No block is pruned further than this (unless the target itself is higher)."""


def uniform(n_weights: Sequence[int], sparsity: float) -> list[float]:
    """Give every block the target."""
    return [sparsity] * len(n_weights)


def owl(
    outlier_ratios: Sequence[float], n_weights: Sequence[int], sparsity: float, *, owl_lambda: float
) -> list[float]:
    """Prune blocks with many outliers less (OWL, arXiv 2310.05175, section 3.2).

    With D the outlier ratios, r = (D - min D) / (max D - min D) * 2 lambda and
    s = S - (r - mean r). The paper's code takes the plain mean of r; here it is weighted by the
    number of weights, which is the same for blocks of equal size and keeps the target otherwise.
    Equal ratios divide by zero there and give the uniform allocation here; sparsities beyond
    [0, 0.99] are clipped and the excess shared out.

    Args:
        outlier_ratios: D, one per block, in any unit (only differences count).
        n_weights: prunable weights per block.
        sparsity: S, the target.
        owl_lambda: lambda; the spread of the result is 2 lambda before clipping.

    Raises:
        ValueError: the lengths differ, or a ratio is not finite.
    """
    ratios = np.asarray(outlier_ratios, dtype=np.float64)
    if len(ratios) != len(n_weights):
        raise ValueError(f"need one weight count per block, got {len(n_weights)} for {len(ratios)} blocks")
    if not np.isfinite(ratios).all():
        raise ValueError(f"outlier ratios must be finite, got {list(outlier_ratios)}")
    spread = ratios.max() - ratios.min()
    if spread == 0:
        return uniform(n_weights, sparsity)
    keep = (ratios - ratios.min()) / spread * 2 * owl_lambda
    return preserve_target(sparsity - keep, n_weights, sparsity)


def preserve_target(
    sparsities: Sequence[float] | NDArray[np.float64], n_weights: Sequence[int], target: float
) -> list[float]:
    """Shift and clip sparsities so that their weighted mean is the target exactly.

    The blocks that are not at a bound move together, so their differences stay as they were.

    Args:
        sparsities: one per block, not yet of the right mean, any finite values.
        n_weights: prunable weights per block, the weights of the mean, all positive.
        target: the mean to reach, in [0, 1).

    Returns:
        One sparsity per block in [0, max(0.99, target)].

    Raises:
        ValueError: the lengths differ or a count is not positive.
    """
    wanted, weights = np.asarray(sparsities, dtype=np.float64), np.asarray(n_weights, dtype=np.float64)
    if wanted.shape != weights.shape or (weights <= 0).any():
        raise ValueError(f"need one positive weight count per block, got {len(weights)} for {len(wanted)} blocks")
    ceiling = max(MAX_SPARSITY, target)
    budget = target * weights.sum()
    at_floor, at_ceiling = np.zeros(len(wanted), dtype=bool), np.zeros(len(wanted), dtype=bool)
    # Water filling: each pass fixes at least one more block at a bound, on the side that overshoots most.
    while True:
        free = ~(at_floor | at_ceiling)
        left = budget - ceiling * weights[at_ceiling].sum()
        shift = (left - (wanted * weights)[free].sum()) / weights[free].sum() if free.any() else 0.0
        moved = np.where(at_floor, 0.0, np.where(at_ceiling, ceiling, wanted + shift))
        below, above = free & (moved < 0), free & (moved > ceiling)
        if not below.any() and not above.any():
            return [float(value) for value in moved]
        if (-moved * weights)[below].sum() >= ((moved - ceiling) * weights)[above].sum():
            at_floor |= below
        else:
            at_ceiling |= above
