"""Prune a matrix from left to right, each time letting the columns still to come make up for what went.

The sweep that SparseGPT and ISC share: in go a matrix, an inverse Hessian and a score, out comes the pruned and
updated matrix. Knows nothing of what the score measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from owl_deploy.methods.inverse_hessian import InverseHessian, invert
from owl_deploy.methods.method import Goal, Linear, Pruned, keep_all_but_lowest, n_pruned, prune_lowest
from owl_deploy.statistics import Hessian

__all__ = ["Score", "prune_and_compensate", "prune_by"]

Score: TypeAlias = Callable[[torch.Tensor, slice], torch.Tensor]
"""(weights (out, n) as they are by now, the n columns they are) -> (out, n), lowest goes first."""


def prune_by(
    score: Callable[[InverseHessian], Score], linear: Linear, goal: Goal, *, block_size: int, dampening: float
) -> Pruned:
    """Zero the lowest scores of a linear, in slabs or groups of columns, and update the columns that follow.

    Args:
        score: made from the inverse Hessian of the linear's inputs.
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


def prune_and_compensate(
    weight: torch.Tensor, goal: Goal, hessian: InverseHessian, score: Score, *, block_size: int
) -> Pruned:
    """Prune the lowest scores and update the rest (SparseGPT, arXiv 2301.00774, algorithm 1).

    Columns are swept from left to right. Zeroing w_j costs e^2 / 2 with e = w_j / U_jj, and the columns to its right
    are moved by -e U_j: U_jj^2 is the corner of the inverse of H restricted to columns j and later, and U_j / U_jj
    is the first row of that inverse over its corner, so this is the OBS update with all earlier columns fixed.
    Columns to the left are never revisited, so the result is above the least-squares optimum of its mask.

    Unstructured, the mask of a block of columns is chosen as the sweep enters it, over the whole (out, block) slab
    together: rows may differ, slabs hardly. A slab prunes n_pruned(weights up to its end) less n_pruned(weights up to
    its start), so that the matrix prunes exactly `n_pruned(out * in)`; the official code prunes rank floor(slab *
    sparsity) and all that is not above it, one too many per slab. Of equal scores the first in row-major order goes
    first. With a pattern, the mask of a group is chosen as the sweep reaches it, from weights that all columns
    before have updated; the block size then only says when later columns are updated, and is rounded up to a
    multiple of the group.

    Weights of dead inputs are zeroed whatever their score, and count among the pruned.

    Args:
        weight: (out, in) float32, left as it is.
        goal: sparsity of the matrix, or a pattern whose groups divide `in`.
        hessian: of the linear's inputs.
        score: of weights that are compared within a slab or a group.
        block_size: columns of a slab.

    Returns:
        The matrix, with "loss" in the notes: the sum of e^2 / 2, which is 1/2 tr(d H d^T) for the damped H and the
        change d that all rows went through, dead inputs left out.

    Raises:
        ValueError: `block_size` is below 1, or `in` is no multiple of the pattern's group.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    columns = weight.shape[1]
    if goal.pattern is None:
        span = block_size
    else:
        span = goal.pattern.of
        block_size = -(-block_size // span) * span
        goal.pattern.check_columns(columns)

    # Transposed, a column is contiguous, and so are all columns from one to another.
    swept = torch.where(hessian.dead[:, None], 0.0, weight.T).contiguous()
    upper = hessian.upper
    loss = 0.0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty_like(swept[start:end])
        for column in range(start, end):
            if (column - start) % span == 0:
                chosen = slice(column, min(column + span, end))
                kept = _mask(score(swept[chosen].T, chosen), goal, chosen, hessian.dead[chosen]).T.contiguous()
            kept_here = kept[(column - start) % span]
            error = torch.where(kept_here, 0.0, swept[column]) / upper[column, column]
            swept[column] = torch.where(kept_here, swept[column], 0.0)
            swept[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        swept[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        loss += float(errors.double().square().sum()) / 2
    return Pruned(swept.T.contiguous(), {"loss": loss})


def _mask(score: torch.Tensor, goal: Goal, columns: slice, dead: torch.Tensor) -> torch.Tensor:
    """Return which weights of some columns to keep, (out, n) bool."""
    if goal.pattern is not None:
        mask = prune_lowest(score, goal)
    else:
        rows = len(score)
        count = n_pruned(rows * columns.stop, goal.sparsity) - n_pruned(rows * columns.start, goal.sparsity)
        mask = keep_all_but_lowest(score.reshape(1, -1), count).reshape(score.shape)
    # An input whose squares underflow is dead and yet has products with others, which would move its weights.
    return mask & ~dead
