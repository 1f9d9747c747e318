"""ISC: SparseGPT with the improved saliency criterion, OBS and OBD together (arXiv 2310.09499)."""

from __future__ import annotations

import torch

from owl_deploy.methods.compensation import Score, prune_by
from owl_deploy.methods.inverse_hessian import InverseHessian
from owl_deploy.methods.method import Goal, Linear, Method, Pruned
from owl_deploy.statistics import Hessian

__all__ = ["METHOD", "prune", "score"]


def score(hessian: InverseHessian) -> Score:
    """Return w_ij^2 (H_jj + 1 / [H^-1]_jj), with the damped H.

    The paper's formula: the cost of zeroing a weight when no other moves (OBD) plus that when all others make up for
    it (OBS), both up to the same factor. H^-1 is that of all inputs, also where the sweep has fixed earlier columns
    and U_jj^2 is what remains; the official code takes its factor once from the whole matrix too. That code computes
    w^2 (H_jj + 1 / U_jj) instead, U_jj not squared: the second term then scales with the square root of H, so that
    the mask depends on the scale of the activations. With N:M it falls back to SparseGPT's score; here a group is
    compared by the same score as a slab.
    """
    # The diagonal of U^T U without the product.
    cost = hessian.damped.diagonal() + 1 / hessian.upper.square().sum(dim=0)

    def of(weight: torch.Tensor, columns: slice) -> torch.Tensor:
        return weight.square() * cost[columns]

    return of


def prune(linear: Linear, goal: Goal, *, block_size: int = 128, dampening: float = 0.01) -> Pruned:
    """Zero the lowest ISC, in slabs or groups of columns, and update the columns that follow as SparseGPT does.

    `compensation.prune_by` says what goes in and what comes out. The mixed sparsities of the paper are no part of
    this: layer sparsities come from the allocation.
    """
    return prune_by(score, linear, goal, block_size=block_size, dampening=dampening)


METHOD = Method(name="isc", new_statistic=Hessian, prune=prune, options=("block_size", "dampening"))
