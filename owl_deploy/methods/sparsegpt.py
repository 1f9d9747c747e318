"""SparseGPT: the weights whose removal costs least go, and the others make up for it (arXiv 2301.00774)."""

from __future__ import annotations

import torch

from owl_deploy.methods.compensation import Score, prune_by
from owl_deploy.methods.inverse_hessian import InverseHessian
from owl_deploy.methods.method import Goal, Linear, Method, Pruned
from owl_deploy.statistics import Hessian

__all__ = ["METHOD", "prune", "score"]


def score(hessian: InverseHessian) -> Score:
    """Return w_ij^2 / U_jj^2: twice what it costs to zero a weight, the columns before it fixed (eq. 3 of the paper).

    U_jj^2 is the (j, j) entry of the inverse of H restricted to columns j and later.
    """
    cost = 1 / hessian.upper.diagonal().square()

    def of(weight: torch.Tensor, columns: slice) -> torch.Tensor:
        return weight.square() * cost[columns]

    return of


def prune(linear: Linear, goal: Goal, *, block_size: int = 128, dampening: float = 0.01) -> Pruned:
    """Zero what costs least to zero, in slabs or groups of columns, and update the columns that follow.

    `compensation.prune_by` says what goes in and what comes out, `compensation.prune_and_compensate` what is compared
    with what, and in which order.
    """
    return prune_by(score, linear, goal, block_size=block_size, dampening=dampening)


METHOD = Method(name="sparsegpt", new_statistic=Hessian, prune=prune, options=("block_size", "dampening"))
