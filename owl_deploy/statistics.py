"""What is remembered of the inputs of a linear while calibration sequences run through it."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["InputStatistic", "SquaredNorm", "outlier_ratio"]


class InputStatistic(Protocol):
    """A figure accumulated over calibration sequences, one sequence at a time."""

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features), any float type."""

    def is_finite(self) -> bool:
        """Return whether all that was taken in was finite."""


class SquaredNorm:
    """c_j: mean over sequences of the sum over tokens of x_j squared (Wanda, arXiv 2306.11695, eq. 1).

    The norm ||X_j|| of the paper is sqrt(c_j) up to a factor that is the same for all j. Sums are
    float32 whatever the model's type: one activation of 256 squared overflows float16.
    """

    def __init__(self, in_features: int) -> None:
        self.mean = torch.zeros(in_features, dtype=torch.float32)
        """c, (in_features,) float32."""
        self.n_sequences = 0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        squares = inputs.float().square().sum(dim=0)
        self.n_sequences += 1
        self.mean += (squares - self.mean) / self.n_sequences

    def is_finite(self) -> bool:
        """Return whether all inputs were finite and their squares within float32."""
        return bool(torch.isfinite(self.mean).all())

    @property
    def norm(self) -> torch.Tensor:
        """sqrt(c), (in_features,) float32."""
        return self.mean.sqrt()


def outlier_ratio(scores: list[torch.Tensor], *, owl_m: float) -> float:
    """Return the share of a block's scores above `owl_m` times their mean (OWL's LOD, 0..1).

    One mean over all linears of the block together, so large matrices dominate, as in the official
    code (which reports the share times 100). Streamed: the scores are never concatenated, and the
    sum is taken in float64.
    """
    n_scores = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / n_scores
    n_outliers = sum(int((score > owl_m * mean).sum()) for score in scores)
    return n_outliers / n_scores
