"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Method, prune_lowest

__all__ = ["METHOD", "prune"]


def prune(weight: torch.Tensor, _: None, sparsity: float) -> torch.Tensor:
    """Zero the weights of smallest magnitude, compared within the whole matrix.

    The baseline of the SparseGPT and Wanda codes thresholds at the magnitude of rank
    floor(n * sparsity) and prunes all that is not above it: one weight too many, and all ties. Here
    exactly the asked number is pruned, ties by position.

    Args:
        weight: (out, in) float32.
        sparsity: share of the matrix to prune.
    """
    mask = prune_lowest(weight.abs().reshape(1, -1), sparsity).reshape(weight.shape)
    return torch.where(mask, weight, 0.0)


METHOD = Method(name="magnitude", new_statistic=None, prune=prune)
