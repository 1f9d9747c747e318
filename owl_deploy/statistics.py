"""What is remembered of the inputs of a linear while calibration sequences run through it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["Hessian", "InputStatistic", "SquaredNorm", "median", "outlier_ratio"]


class InputStatistic(Protocol):
    """A figure accumulated over calibration sequences, one sequence at a time."""

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features), any float type."""

    def merge(self, other: Any) -> None:
        """Take in what another of the same kind has seen of other sequences, perhaps on another device."""

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
        self.mean = self.mean.to(squares.device)
        self.mean += (squares - self.mean) / self.n_sequences

    def merge(self, other: SquaredNorm) -> None:
        """Take in what another has seen of other sequences."""
        self.n_sequences += other.n_sequences
        self.mean += (other.mean.to(self.mean.device) - self.mean) * (other.n_sequences / max(1, self.n_sequences))

    def is_finite(self) -> bool:
        """Return whether all inputs were finite and their squares within float32."""
        return bool(torch.isfinite(self.mean).all())

    @property
    def norm(self) -> torch.Tensor:
        """sqrt(c), (in_features,) float32."""
        return self.mean.sqrt()


class Hessian:
    """H: mean over sequences of 2 X X^T, the Hessian of a linear's squared output error (SparseGPT, arXiv 2301.00774).

    X is (in_features, tokens) of one sequence; the diagonal is twice `SquaredNorm.mean`. Sums are float32.
    """

    def __init__(self, in_features: int) -> None:
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32)
        """H, (in_features, in_features) float32, symmetric."""
        self.n_sequences = 0
        self.inverses: dict[float, Any] = {}
        """By damping; kept by `owl_deploy.methods.inverse_hessian`."""

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        x = inputs.float()
        self.inverses.clear()
        self.n_sequences += 1
        self.matrix = self.matrix.to(x.device)
        self.matrix *= (self.n_sequences - 1) / self.n_sequences
        self.matrix.addmm_(x.T, x, alpha=2 / self.n_sequences)

    def merge(self, other: Hessian) -> None:
        """Take in what another has seen of other sequences."""
        self.inverses.clear()
        self.n_sequences += other.n_sequences
        share = other.n_sequences / max(1, self.n_sequences)
        self.matrix.lerp_(other.matrix.to(self.matrix.device), share)

    def is_finite(self) -> bool:
        """Return whether all inputs were finite and their products within float32."""
        return bool(torch.isfinite(self.matrix).all())


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


def median(scores: list[torch.Tensor]) -> float:
    """Return the lower median of all elements of some tensors that hold no negative number.

    Streamed and exact: the bits of such float32 numbers are in the order of the numbers, so a histogram of
    the upper half of the bits finds the upper half of the median's, and a second one the lower half.
    """
    rank = (sum(score.numel() for score in scores) - 1) // 2
    upper = sum(torch.bincount(_bits(score) >> 16, minlength=1 << 15) for score in scores)
    assert isinstance(upper, torch.Tensor)
    high, rank = _bin_of(upper, rank)
    lower = sum(torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16) for bits in map(_bits, scores))
    assert isinstance(lower, torch.Tensor)
    low, _ = _bin_of(lower, rank)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bits(score: torch.Tensor) -> torch.Tensor:
    """Return the bits of float32 numbers that are not negative, (n,) int32."""
    return score.abs().contiguous().reshape(-1).view(torch.int32)


def _bin_of(histogram: torch.Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the element of a rank, and its rank within the bin."""
    ends = histogram.cumsum(0)
    found = int(torch.searchsorted(ends, rank, right=True))
    return found, rank - int(ends[found] - histogram[found])
