"""SparseGPT: the weights whose removal costs least go, and the others make up for it (arXiv 2301.00774)."""

from __future__ import annotations

import torch

from owl_deploy.methods.compensation import Score, prune_and_compensate
from owl_deploy.methods.inverse_hessian import InverseHessian, invert
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

    `owl_deploy.methods.compensation` says what is compared with what, and in which order.

    Args:
        linear: its statistic is a `Hessian`.
        goal: sparsity of the matrix, or a pattern.
        block_size: columns whose mask is chosen together.
        dampening: share of the mean of the diagonal that is added to the Hessian's diagonal.

    Returns:
        The matrix; its notes hold "loss" (half the squared output error over the damped Hessian), and what
        `InverseHessian.notes` has to say.

    Raises:
        OwlDeployError: the Hessian cannot be inverted.
        ValueError: `block_size` is below 1, or the pattern's group does not divide the columns.
    """
    assert isinstance(linear.statistic, Hessian)
    hessian = invert(linear.statistic, dampening)
    pruned = prune_and_compensate(linear.weight, goal, hessian, score(hessian), block_size=block_size)
    return Pruned(pruned.weight, pruned.notes | hessian.notes(dampening))


METHOD = Method(name="sparsegpt", new_statistic=Hessian, prune=prune, options=("block_size", "dampening"))
