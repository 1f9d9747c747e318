"""Wanda: weights by activations (arXiv 2306.11695)."""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Goal, Linear, Method, Pruned, prune_lowest
from owl_deploy.statistics import SquaredNorm

__all__ = ["METHOD", "prune", "score"]


def score(weight: torch.Tensor, statistic: SquaredNorm) -> torch.Tensor:
    """Return abs(W_ij) * ||X_j||, (out, in) float32 (eq. 1 of the paper)."""
    return weight.abs() * statistic.norm


def prune(linear: Linear, goal: Goal) -> Pruned:
    """Zero the lowest scores of every output row; the other weights stay as they are."""
    return Pruned(torch.where(prune_lowest(score(linear.weight, linear.statistic), goal), linear.weight, 0.0))


METHOD = Method(name="wanda", new_statistic=SquaredNorm, prune=prune)
