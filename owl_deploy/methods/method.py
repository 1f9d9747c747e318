"""What a pruning method is, and the exact selection that methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_DOWN, Decimal
from typing import Any

import torch

from owl_deploy.statistics import InputStatistic

__all__ = ["Method", "n_pruned", "prune_lowest"]


@dataclass(frozen=True)
class Method:
    """One way to make a linear sparse."""

    name: str
    new_statistic: Callable[[int], InputStatistic] | None
    """Makes the statistic of a linear's inputs from in_features; None where the method needs no data."""
    prune: Callable[[torch.Tensor, Any, float], torch.Tensor]
    """(weight (out, in) float32, its statistic or None, sparsity) -> the pruned weight, a new tensor.

    Positions that are pruned are +0.0; the others may have been updated to make up for them."""


def n_pruned(n: int, sparsity: float) -> int:
    """Return how many of `n` weights are pruned: n * sparsity to the nearest integer, halves down.

    Decimal arithmetic on the number as written: 100 * 0.29 is 29 here and 28 in binary floats. The
    official codes round down (and magnitude then prunes one more); nearest keeps the mean over
    matrices at the target.
    """
    return int((Decimal(n) * Decimal(repr(sparsity))).to_integral_value(rounding=ROUND_HALF_DOWN))


def prune_lowest(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Mark all but the lowest scores of each row.

    Args:
        score: (rows, columns).
        sparsity: share to prune, in [0, 1).

    Returns:
        Mask (rows, columns) bool, True = kept; every row prunes exactly `n_pruned(columns)`. Of
        equal scores the one with the lower column index is pruned first.
    """
    count = n_pruned(score.shape[1], sparsity)
    order = score.argsort(dim=1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)
