"""Linears to prune: worked matrices, statistics given outright, and seeded or drawn inputs. Knows no method.

The worked matrices stand in more than one test module, each with what its method should make of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.methods.method import Goal, Linear
from owl_deploy.pattern import Pattern
from owl_deploy.statistics import Hessian, SquaredNorm

WEIGHT = torch.tensor(
    [
        [0.10, -0.80, 0.30, 0.05, -0.60, 0.20],
        [-0.40, 0.25, -0.15, 0.70, 0.35, -0.50],
        [0.90, -0.05, 0.45, -0.30, 0.15, 0.60],
        [-0.20, 0.55, -0.65, 0.40, -0.10, 0.02],
    ]
)
SEQUENCES = [
    torch.tensor([[1, 0, 2, -1, 0.5, 3], [0, 1, -2, 1, 0.5, 0]]),
    torch.tensor([[2, -1, 0, 0, 1, 1], [1, 0, 1, 2, -0.5, 0]]),
]
"""Four tokens, so that the Hessian of the six inputs has rank four."""

TWO_BY_FOUR = torch.tensor([[0.5, -0.2, 0.8, 0.1], [-0.3, 0.6, 0.05, -0.7]])
CONDITIONED = torch.tensor([[4.0, 1, 0, 0], [1, 3, 1, 0], [0, 1, 2, 0.5], [0, 0, 0.5, 1]])


def hessian_of(sequences: list[torch.Tensor]) -> Hessian:
    hessian = Hessian(sequences[0].shape[1])
    for sequence in sequences:
        hessian.update(sequence)
    return hessian


def given_hessian(matrix: torch.Tensor | list[list[float]]) -> Hessian:
    """A Hessian as it is, without the inputs that would make it."""
    hessian = Hessian(len(matrix))
    hessian.matrix = torch.as_tensor(matrix).clone()
    return hessian


def given_norm(mean: torch.Tensor | list[float]) -> SquaredNorm:
    """The mean of squares as it is, without the inputs that would make it."""
    statistic = SquaredNorm(len(mean))
    statistic.mean = torch.as_tensor(mean, dtype=torch.float32)
    return statistic


def worked_linear() -> Linear:
    return Linear("worked", WEIGHT, hessian_of(SEQUENCES))


def well_conditioned() -> Linear:
    return Linear("worked", TWO_BY_FOUR, given_hessian(CONDITIONED))


def correlated_linear(seed: int, rows: int, columns: int, dead: tuple[int, ...] = ()) -> Linear:
    """Correlated inputs of unequal size, many more tokens than columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.4 * torch.eye(columns)
    mixing[:, list(dead)] = 0.0
    sequences = [torch.randn(8 * columns, columns, generator=generator) @ mixing for _ in range(2)]
    return Linear("linear", torch.randn(rows, columns, generator=generator), hessian_of(sequences))


@dataclass
class Problem:
    """A linear, the tokens it has seen, and what is asked of it."""

    weight: torch.Tensor
    sequences: list[torch.Tensor]
    goal: Goal
    block_size: int

    @property
    def linear(self) -> Linear:
        return Linear("random", self.weight, hessian_of(self.sequences))


@st.composite
def problems(draw: st.DrawFn, *, with_pattern: bool = False) -> Problem:
    """Small matrices and correlated tokens, more of these than inputs; some inputs dead."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    goal = Goal(round(draw(st.floats(0, 0.999)), 3))
    if with_pattern:
        of = draw(st.integers(2, 5))
        goal = Goal(0.5, Pattern(draw(st.integers(1, of - 1)), of))
        columns = of * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator)
    alive = torch.rand(columns, generator=generator) > draw(st.sampled_from([0, 0, 0.3]))
    sequences = [torch.randn(4 * columns, columns, generator=generator) @ mixing * alive for _ in range(3)]
    weight = torch.randn(rows, columns, generator=generator)
    return Problem(weight, sequences, goal, draw(st.integers(1, 16)))


def slow_optimum(weight: torch.Tensor, mask: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    """Of one row at a time, the least-squares weights of the kept columns of a root of H, float64."""
    root = np.linalg.cholesky(damped.double().numpy()).T
    dense = weight.double().numpy()
    best = np.zeros_like(dense)
    for row, kept in enumerate(mask.numpy()):
        best[row, kept] = np.linalg.lstsq(root[:, kept], root @ dense[row], rcond=None)[0]
    return torch.from_numpy(best)


def pruned_positions(weight: torch.Tensor) -> list[list[int]]:
    return (weight == 0).int().tolist()


def bits(weight: torch.Tensor) -> NDArray[np.int32]:
    """The float32 values as integers, so that -0.0 is not 0.0."""
    return weight.contiguous().numpy().view(np.int32)
