"""The inverse of a Hessian as the methods that make up for pruned weights need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owl_deploy.errors import OwlDeployError
from owl_deploy.statistics import Hessian

__all__ = ["InverseHessian", "invert"]

_MAX_DAMPENING = 1.0


@dataclass(frozen=True)
class InverseHessian:
    """H with its dead inputs set to one and its diagonal raised, and the inverse of that. All (in, in) float32."""

    damped: torch.Tensor
    """H + dampening * mean(diag H) I."""
    upper: torch.Tensor
    """U, upper triangular with positive diagonal, U^T U = damped^-1."""
    dead: torch.Tensor
    """(in,) bool: inputs that were zero in every token. Their weights say nothing and are to be zeroed."""
    dampening: float
    """The share of the mean diagonal that was added: the asked one, or ten times more as often as that failed."""

    @property
    def inverse(self) -> torch.Tensor:
        """damped^-1."""
        return self.upper.T @ self.upper

    def notes(self, asked: float) -> dict[str, float | int]:
        """Return what should be on record: dead inputs, and a damping that had to be raised."""
        notes: dict[str, float | int] = {}
        if self.dampening != asked:
            notes["dampening"] = self.dampening
        if self.dead.any():
            notes["n_dead_inputs"] = int(self.dead.sum())
        return notes


def invert(hessian: Hessian, dampening: float) -> InverseHessian:
    """Damp and invert a Hessian; the result is kept with it, since several linears may share their inputs.

    Where Cholesky factorisation fails, damping is raised tenfold up to 1, and the raise is on record: never a silent
    fall-back (the maintained codes fall back to the identity, which is magnitude pruning).

    Args:
        hessian: of the linear's inputs.
        dampening: share of the mean of the diagonal that is added to it (`percdamp` of the official code), above 0.

    Raises:
        OwlDeployError: it cannot be factorised even with damping 1.
        ValueError: `dampening` is not above 0 (nor could it be raised).
    """
    if not dampening > 0:
        raise ValueError(f"dampening must be above 0, got {dampening}")
    known = hessian.inverses.get(dampening)
    if known is None:
        known = hessian.inverses[dampening] = _invert(hessian.matrix, dampening)
    return known


def _invert(matrix: torch.Tensor, dampening: float) -> InverseHessian:
    dead = matrix.diagonal() == 0
    mean = float(torch.where(dead, 1.0, matrix.diagonal()).mean())
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(dead.float() + dampening * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return InverseHessian(damped, upper, dead, dampening)
        if dampening >= _MAX_DAMPENING:
            raise OwlDeployError(
                f"a Hessian of {len(matrix)} inputs cannot be inverted even with dampening {dampening}: use more "
                "calibration tokens (n_samples, seq_len), or a method without compensation such as wanda"
            )
        dampening = min(dampening * 10, _MAX_DAMPENING)
