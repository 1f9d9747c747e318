"""Wanda: weights by activations (arXiv 2306.11695)."""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Method, prune_lowest
from owl_deploy.statistics import SquaredNorm

__all__ = ["METHOD", "prune", "score"]


def score(weight: torch.Tensor, statistic: SquaredNorm) -> torch.Tensor:
    """Return abs(W_ij) * ||X_j||, (out, in) float32 (eq. 1 of the paper)."""
    return weight.abs() * statistic.norm


def prune(weight: torch.Tensor, statistic: SquaredNorm, sparsity: float) -> torch.Tensor:
    """Zero the lowest scores of every output row; the other weights stay as they are.

    Args:
        weight: (out, in) float32.
        statistic: of the linear's inputs.
        sparsity: share of every row to prune.
    """
    return torch.where(prune_lowest(score(weight, statistic), sparsity), weight, 0.0)


METHOD = Method(name="wanda", new_statistic=SquaredNorm, prune=prune)
