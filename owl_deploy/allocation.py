"""How the target sparsity is shared among decoder blocks.

In: one figure per block (its outlier ratio, say), the number of weights in each, the target.
Out: one sparsity per block whose mean, weighted by the number of weights, is the target.
Pure functions; what the figures mean and where they come from is not known here.

The published rules know no upper bound (OWL, AlphaPruning and DLP all reach sparsities above 1 at high
targets) and most of them take the plain mean over blocks. Here every rule ends in one of two
redistributions, which bring the values into [0, 0.99] and their weighted mean to the target:
`preserve_target` keeps differences, for rules that add; `preserve_proportions` keeps ratios, for rules
that multiply. Where nothing is clipped and all blocks are of one size, both give the published values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from owl_deploy.errors import RecipeError

__all__ = [
    "MAX_SPARSITY",
    "alphapruning",
    "dlp",
    "isc",
    "largest_slope",
    "owl",
    "owl_mixed_pattern",
    "preserve_proportions",
    "preserve_target",
    "ramp",
    "uniform",
]

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
    ratios = _finite(outlier_ratios, n_weights, "outlier ratios")
    if ratios.max() == ratios.min():
        return uniform(n_weights, sparsity)
    return preserve_target(sparsity - _min_max(ratios) * 2 * owl_lambda, n_weights, sparsity)


def owl_mixed_pattern(
    outlier_ratios: Sequence[float], n_weights: Sequence[int], pruned_of_8: int, *, spread: float = 2.0
) -> list[int]:
    """Let blocks with many outliers keep more of every 8 weights (OWL's mixed N:8, official code).

    With D the outlier ratios, r = (D - min D) / (max D - min D) * spread and n = N - round(r - mean r), halves
    to even, weights per 8 are pruned. The official code takes the plain mean of r; here it is weighted, as in
    `owl`. It also lets n leave 0..8; here every block keeps at least one of 8. Counts are whole, so their mean is
    only near N (5, 4, 6 and 6 pruned, say, for N = 5): what comes out has to be counted, not assumed.

    Args:
        outlier_ratios: D, one per block, in any unit (only differences count).
        n_weights: prunable weights per block.
        pruned_of_8: N, 1 to 7: how many of 8 the middle block loses (the first number of the official "5:8").
        spread: difference of the counts of the extreme blocks before rounding (Lambda of the official code).

    Returns:
        How many of every 8 successive inputs each block keeps, 1 to 8; 8 is a dense block.

    Raises:
        ValueError: the lengths differ, a ratio is not finite, or N is out of range.
    """
    if not 1 <= pruned_of_8 <= 7:
        raise ValueError(f"1 to 7 of 8 can be pruned, got {pruned_of_8}")
    ratios = _finite(outlier_ratios, n_weights, "outlier ratios")
    keep = _min_max(ratios) * spread
    keep -= np.average(keep, weights=np.asarray(n_weights, dtype=np.float64))
    # Without the inner rounding, the last bit of the mean would decide which way exact halves go.
    pruned = pruned_of_8 - np.rint(keep.round(9))
    return [8 - int(count) for count in pruned.clip(0, 7)]


def alphapruning(
    alphas: Sequence[float], n_weights: Sequence[int], sparsity: float, *, epsilon: float = 0.3
) -> list[float]:
    """Prune blocks with heavy-tailed spectra less (AlphaPruning, arXiv 2410.10912, section 3).

    With a the tail exponents, q = (a - min a) / (max a - min a) * 2 epsilon + 1 - epsilon and s = eta q with the
    eta that makes the weighted mean S, so the extremes are in the proportion (1 - epsilon) to (1 + epsilon).
    The official code is followed but for what it leaves open: equal exponents divide by zero there and give
    the uniform allocation here; sparsities above 0.99 are clipped (it reaches 1.06 for LLaMA-7B at S = 0.8) and
    the excess shared out in proportion.

    Args:
        alphas: tail exponent per block, the mean over its linears; only differences and their order count.
        n_weights: prunable weights per block.
        sparsity: S, the target.
        epsilon: in [0, 1).

    Raises:
        ValueError: the lengths differ, an exponent is not finite, or epsilon is out of range.
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")
    exponents = _finite(alphas, n_weights, "tail exponents")
    if exponents.max() == exponents.min():
        return uniform(n_weights, sparsity)
    return preserve_proportions(_min_max(exponents) * 2 * epsilon + 1 - epsilon, n_weights, sparsity)


def dlp(scores: Sequence[float], n_weights: Sequence[int], sparsity: float, *, alpha: float = 0.15) -> list[float]:
    """Prune blocks with large typical scores more (DLP, arXiv 2505.23807).

    With x the scores, the importance is I = 1 - x / sum x, r = (I - min I) / (max I - min I) * 2 alpha and
    s = S - (r - mean r), as OWL does with outlier ratios; mean and clipping are as in `owl`.

    Args:
        scores: one per block, not negative, in any unit: the median of its Wanda scores in the paper (the official
            unstructured path takes their mean).
        n_weights: prunable weights per block.
        sparsity: S, the target.
        alpha: the spread of the result is 2 alpha before clipping.

    Raises:
        ValueError: the lengths differ, or a score is negative or not finite.
    """
    figures = _finite(scores, n_weights, "scores")
    if (figures < 0).any():
        raise ValueError(f"scores must not be negative, got {list(scores)}")
    # Min-max scaling undoes the sum and the one: what is left of the importance is the sign.
    return owl([-score for score in scores], n_weights, sparsity, owl_lambda=alpha)


def ramp(n_weights: Sequence[int], sparsity: float, *, slope: float) -> list[float]:
    """Prune each block by the same amount more than the one before (ATP, arXiv 2502.14770).

    s_i = S - slope (L - 1) / 2 + slope i for blocks i = 0 .. L - 1. Equal blocks are assumed there; here the whole
    ramp moves until the weighted mean is S. A ramp that would reach 1 is clipped at 0.99.

    Args:
        n_weights: prunable weights per block, in the order of the blocks.
        sparsity: S, the target.
        slope: beta, 0 to `largest_slope`. Of no effect on a single block.

    Raises:
        RecipeError: the slope is out of range.
    """
    n_blocks = len(n_weights)
    if n_blocks == 1:
        return uniform(n_weights, sparsity)
    largest = largest_slope(n_blocks, sparsity)
    if not 0 <= slope <= largest:
        raise RecipeError(
            f"ramp_slope must be 0 to {largest:.6g} for {n_blocks} blocks at sparsity {sparsity:g}, got {slope:g}"
        )
    steps = np.arange(n_blocks, dtype=np.float64) - (n_blocks - 1) / 2
    return preserve_target(sparsity + slope * steps, n_weights, sparsity)


def largest_slope(n_blocks: int, sparsity: float) -> float:
    """Return the slope with which `ramp` just reaches 0 or 1: min(2 S, 2 (1 - S)) / (L - 1); 0 for one block."""
    return min(2 * sparsity, 2 * (1 - sparsity)) / (n_blocks - 1) if n_blocks > 1 else 0.0


def isc(
    sensitivities: Sequence[float], n_weights: Sequence[int], sparsity: float, *, half_width: float = 0.1
) -> list[float]:
    """Prune sensitive blocks less, by rank (arXiv 2310.09499, section 3.3).

    With ranks 0 .. K - 1 of ascending sensitivity, s = S + half_width - rank * 2 half_width / (K - 1). Equal
    sensitivities share the mean of their ranks, so that the order of the blocks says nothing. The paper's plain
    mean is S; here the values move until the weighted one is, and are clipped to [0, 0.99].

    Args:
        sensitivities: one per block, in any unit (only their order counts).
        n_weights: prunable weights per block.
        sparsity: S, the target.
        half_width: largest deviation from S in blocks of equal size.

    Raises:
        ValueError: the lengths differ, or a sensitivity is not finite.
    """
    figures = _finite(sensitivities, n_weights, "sensitivities")
    if figures.max() == figures.min():
        return uniform(n_weights, sparsity)
    _, position, counts = np.unique(figures, return_inverse=True, return_counts=True)
    rank: NDArray[np.float64] = (counts.cumsum() - (counts + 1) / 2)[position]
    return preserve_target(sparsity + half_width - rank * 2 * half_width / (len(figures) - 1), n_weights, sparsity)


def _finite(figures: Sequence[float], n_weights: Sequence[int], what: str) -> NDArray[np.float64]:
    """Return one finite figure per block, (blocks,); ValueError otherwise."""
    values = np.asarray(figures, dtype=np.float64)
    if len(values) != len(n_weights):
        raise ValueError(f"need one weight count per block, got {len(n_weights)} for {len(values)} blocks")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} must be finite, got {list(figures)}")
    return values


def _min_max(figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale figures to [0, 1]; all zero where they are equal."""
    spread = float(figures.max() - figures.min())
    scaled: NDArray[np.float64] = (figures - figures.min()) / (spread if spread > 0 else 1.0)
    return scaled


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


def preserve_proportions(
    proportions: Sequence[float] | NDArray[np.float64], n_weights: Sequence[int], target: float
) -> list[float]:
    """Scale and clip sparsities so that their weighted mean is the target exactly.

    The blocks that are not at the ceiling are scaled together, so their ratios stay as they were. There is no
    floor to reach: what is positive stays so.

    Args:
        proportions: one per block, in any unit, all positive and finite.
        n_weights: prunable weights per block, the weights of the mean, all positive.
        target: the mean to reach, in [0, 1).

    Returns:
        One sparsity per block in [0, max(0.99, target)].

    Raises:
        ValueError: the lengths differ, or a count or a proportion is not positive.
    """
    wanted, weights = np.asarray(proportions, dtype=np.float64), np.asarray(n_weights, dtype=np.float64)
    if wanted.shape != weights.shape or (weights <= 0).any():
        raise ValueError(f"need one positive weight count per block, got {len(weights)} for {len(wanted)} blocks")
    if not (np.isfinite(wanted) & (wanted > 0)).all():
        raise ValueError(f"proportions must be positive and finite, got {list(proportions)}")
    ceiling = max(MAX_SPARSITY, target)
    budget = target * weights.sum()
    at_ceiling = np.zeros(len(wanted), dtype=bool)
    # Each pass scales the rest up, so a block once at the ceiling belongs there.
    while True:
        free = ~at_ceiling
        left = budget - ceiling * weights[at_ceiling].sum()
        scale = left / (wanted * weights)[free].sum() if free.any() else 0.0
        scaled = np.where(at_ceiling, ceiling, wanted * scale)
        above = free & (scaled > ceiling)
        if not above.any():
            return [float(value) for value in scaled.clip(0, None)]
        at_ceiling |= above
