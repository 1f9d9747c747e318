"""ALPS: mask and weights found together by ADMM, then refined on the mask that it found (arXiv 2406.07831)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owl_deploy.methods.method import Goal, Linear, Method, Pruned, keep_all_but_lowest, n_pruned, prune_lowest
from owl_deploy.statistics import Hessian

__all__ = ["METHOD", "prune"]

_FIRST_RHO = 0.1
_MAX_ITERATIONS = 300
_CHECK_EVERY = 3
_MAX_REFINEMENTS = 10
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Problem:
    """min 1/2 tr((B - A) G (B - A)^T) over sparse B, in coordinates where the diagonal of G is one."""

    dense: torch.Tensor
    """A: the weight times `scale`, (out, in) float32."""
    gram: torch.Tensor
    """G: the damped Hessian over `scale` on both sides, (in, in) float32."""
    target: torch.Tensor
    """A G, (out, in) float32."""
    scale: torch.Tensor
    """Root of the diagonal of the damped Hessian, (in,) float32. |A| is thus the Wanda score, up to damping."""
    dead: torch.Tensor
    """(in,) bool: inputs that were zero in every token."""
    goal: Goal


def prune(linear: Linear, goal: Goal, *, dampening: float = 0.01) -> Pruned:
    """Minimise ||X (W - B)||^2 over all B with so many weights.

    ADMM lets a dense and a sparse copy of the weights pull at each other with a force rho that grows as the support
    settles; conjugate gradients then take the weights towards the least-squares optimum of the support. The factors
    of rho and all limits are those of the official code, but four things that it does are not done here: it restarts
    with a fifth of rho when the first three iterations hardly change the support, may stop after iteration 30 with
    a support that still changes a little, takes the support from the dense copy, and tests the refinement's
    convergence on pruned positions too, so that it always takes all ten steps. The diagonal as a preconditioner is
    one in these coordinates.

    With hardly correlated inputs, ADMM can end on a worse support than the one it started from, which is Wanda's
    compared over the matrix (or its groups). That one is refined too, and the better of both is returned.

    Args:
        linear: its statistic is a `Hessian`. Weights of inputs that were always zero are zeroed, and count as the
            first ones pruned.
        goal: sparsity of the matrix, compared within the whole of it (rows may differ), or a pattern, compared
            within its groups.
        dampening: share of the mean of H's diagonal that is added to it, above 0.

    Returns:
        The weight, with exactly `n_pruned(out * in)` pruned, or all but `keep` of every group (more where inputs
        were dead). Notes: `loss`, 1/2 tr(d H d^T) of the change d with H undamped; `iterations` of ADMM
        (0 where nothing is pruned); `n_dead_inputs` where there are any.

    Raises:
        ValueError: the columns are no multiple of the pattern's group.
    """
    hessian = linear.statistic
    assert isinstance(hessian, Hessian)
    problem = _normalised(linear.weight, hessian.matrix, goal, dampening)
    first = _support(problem, problem.dense)
    if first.all():
        weight, iterations = linear.weight.masked_fill(problem.dead, 0.0), 0
    else:
        mask, start, iterations = _search(problem, first)
        found = min(
            (_refine(problem, mask, start), mask),
            (_refine(problem, first, torch.where(first, problem.dense, 0.0)), first),
            key=lambda candidate: _loss(problem, candidate[0]),
        )
        weight = torch.where(found[1] & ~problem.dead, found[0] / problem.scale, 0.0)
    change = weight - linear.weight
    notes: dict[str, float | int] = {
        "loss": float((change @ hessian.matrix * change).sum(dtype=torch.float64)) / 2,
        "iterations": iterations,
    }
    if problem.dead.any():
        notes["n_dead_inputs"] = int(problem.dead.sum())
    return Pruned(weight, notes)


def _normalised(weight: torch.Tensor, matrix: torch.Tensor, goal: Goal, dampening: float) -> _Problem:
    dead = matrix.diagonal() == 0
    damped = matrix.clone()
    damped.diagonal().add_(dampening * matrix.diagonal().mean() + dead.float())
    scale = damped.diagonal().sqrt()
    gram = damped.div_(scale).div_(scale[:, None])
    dense = weight.masked_fill(dead, 0.0) * scale
    return _Problem(dense, gram, dense @ gram, scale, dead, goal)


def _search(problem: _Problem, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the support that ADMM found from a first one, its sparse copy of the weights, and its iterations."""
    n_kept = int(mask.sum())
    sparse, dual = torch.where(mask, problem.dense, 0.0), torch.zeros_like(problem.dense)
    eigenvalues, vectors = torch.linalg.eigh(problem.gram.double())
    # The inverses can be float32: rho, at least 0.1 beside a diagonal of one, keeps them well conditioned.
    values, vectors = eigenvalues.clamp_(min=0).float(), vectors.float()
    rho, known = _FIRST_RHO, mask
    inverse = (vectors / (values + rho)) @ vectors.T
    iteration = 0
    for iteration in range(1, _MAX_ITERATIONS + 1):
        free = (problem.target - dual + rho * sparse) @ inverse + dual / rho
        mask = _support(problem, free)
        sparse, dual = torch.where(mask, free, 0.0), torch.where(mask, 0.0, rho * free)
        if iteration % _CHECK_EVERY == 0:
            n_changed = int((mask ^ known).sum())
            if n_changed == 0:
                break
            rho *= 1.3 if n_changed > 0.1 * n_kept else 1.2 if n_changed > 0.005 * n_kept else 1.1
            inverse = (vectors / (values + rho)) @ vectors.T
            known = mask
    return mask, sparse, iteration


def _support(problem: _Problem, values: torch.Tensor) -> torch.Tensor:
    """Mark the largest values of the matrix or of each group; dead inputs go first, then the first of equal values."""
    score = values.abs().masked_fill_(problem.dead, -1.0)
    if problem.goal.pattern is not None:
        return prune_lowest(score, problem.goal)
    count = n_pruned(score.numel(), problem.goal.sparsity)
    return keep_all_but_lowest(score.reshape(1, -1), count).reshape(score.shape)


def _refine(problem: _Problem, mask: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return what conjugate gradients make of `start` on a fixed mask: every row is a system of its own."""
    weights = start
    residual = torch.where(mask, problem.target - weights @ problem.gram, 0.0)
    enough = (_TOLERANCE * torch.where(mask, problem.target, 0.0).norm(dim=1, keepdim=True)).square()
    direction, squared = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(_MAX_REFINEMENTS):
        if bool((squared <= enough).all()):
            break
        image = torch.where(mask, direction @ problem.gram, 0.0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, squared / curvature, 0.0)
        weights = weights + step * direction
        residual = residual - step * image
        previous, squared = squared, residual.square().sum(dim=1, keepdim=True)
        direction = residual + torch.where(previous > 0, squared / previous, 0.0) * direction
    return weights


def _loss(problem: _Problem, weights: torch.Tensor) -> float:
    change = weights - problem.dense
    return float((change @ problem.gram * change).sum(dtype=torch.float64)) / 2


METHOD = Method(name="alps", new_statistic=Hessian, prune=prune, options=("dampening",))
