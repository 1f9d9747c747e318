"""RIA: weights relative to their row and column, by activations (Zhang et al., "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Goal, Linear, Method, Pruned, prune_lowest
from owl_deploy.statistics import SquaredNorm

__all__ = ["METHOD", "prune", "score"]

_EXPONENT = 0.5  # of the activation norm: `a` of the paper and the default of its code


def score(weight: torch.Tensor, statistic: SquaredNorm) -> torch.Tensor:
    """Return (abs(W_ij) / sum_i abs(W_ij) + abs(W_ij) / sum_j abs(W_ij)) * ||X_j||^0.5, (out, in) float32.

    A weight of a row or a column that is zero throughout has no share of it: that term is 0, where the
    official code has 0 / 0.
    """
    magnitudes = weight.abs()
    relative = _shares(magnitudes, dim=0) + _shares(magnitudes, dim=1)
    return relative * statistic.norm**_EXPONENT


def _shares(magnitudes: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Return each element over the sum along `dim`; 0 where that sum is 0."""
    sums = magnitudes.sum(dim=dim, keepdim=True)
    return magnitudes / torch.where(sums == 0, 1.0, sums)


def prune(linear: Linear, goal: Goal) -> Pruned:
    """Zero the lowest scores of every output row, or of every group of it; the other weights stay as they are.

    The official code compares the whole matrix unless told `--per_outneuron`; rows are compared here, so that
    they come out equally sparse, as with Wanda. Its channel permutation for patterns is left out: the inputs
    of a linear would have to be reordered when the model runs.

    Raises:
        ValueError: the inputs do not divide into groups of the pattern.
    """
    return Pruned(torch.where(prune_lowest(score(linear.weight, linear.statistic), goal), linear.weight, 0.0))


METHOD = Method(name="ria", new_statistic=SquaredNorm, prune=prune)
