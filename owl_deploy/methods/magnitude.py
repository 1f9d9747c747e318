"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Goal, Linear, Method, Pruned, prune_lowest

__all__ = ["METHOD", "prune"]


def prune(linear: Linear, goal: Goal) -> Pruned:
    """Zero the weights of smallest magnitude, compared within the whole matrix, or within groups with a pattern.

    The baseline of the SparseGPT and Wanda codes thresholds at the magnitude of rank
    floor(n * sparsity) and prunes all that is not above it: one weight too many, and all ties. Here
    exactly the asked number is pruned, ties by position.
    """
    magnitudes = linear.weight.abs()
    score = magnitudes if goal.pattern else magnitudes.reshape(1, -1)
    return Pruned(torch.where(prune_lowest(score, goal).reshape(linear.weight.shape), linear.weight, 0.0))


METHOD = Method(name="magnitude", new_statistic=None, prune=prune)
