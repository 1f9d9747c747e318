"""The sweep of SparseGPT and ISC in float64, one weight at a time, each step from an inverse of its own."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.methods.method import Goal, Linear
from owl_deploy.pattern import Pattern
from owl_deploy.statistics import Hessian

Matrix = NDArray[np.float64]

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


def hessian_of(sequences: list[torch.Tensor]) -> Hessian:
    hessian = Hessian(sequences[0].shape[1])
    for sequence in sequences:
        hessian.update(sequence)
    return hessian


def given_hessian(matrix: list[list[float]]) -> Hessian:
    """A Hessian as it is, without the inputs that would make it."""
    hessian = Hessian(len(matrix))
    hessian.matrix = torch.tensor(matrix)
    return hessian


def worked_linear() -> Linear:
    return Linear("worked", WEIGHT, hessian_of(SEQUENCES))


def slow_damped(sequences: list[torch.Tensor], dampening: float) -> tuple[Matrix, NDArray[np.bool_]]:
    """H from the tokens themselves, ones at dead inputs, diagonal raised; and which inputs are dead."""
    columns = sequences[0].shape[1]
    matrix = np.zeros((columns, columns))
    for sequence in sequences:
        for token in sequence.double().numpy():
            matrix += 2 * np.outer(token, token) / len(sequences)
    dead = np.array([all((sequence[:, column] == 0).all() for sequence in sequences) for column in range(columns)])
    matrix[dead, dead] = 1
    return matrix + dampening * np.trace(matrix) / columns * np.eye(columns), dead


def obs_cost(damped: Matrix) -> Matrix:
    """What w_j^2 is multiplied with when all columns before j are fixed."""
    return np.array([1 / np.linalg.inv(damped[column:, column:])[0, 0] for column in range(len(damped))])


def isc_cost(damped: Matrix) -> Matrix:
    """The improved saliency criterion over w^2."""
    return np.diag(damped) + 1 / np.diag(np.linalg.inv(damped))


@dataclass
class Swept:
    weight: Matrix
    loss: float
    gap: float
    """How far apart, relative to their size, the scores on either side of a cut came: float32 may cut close ones
    elsewhere."""


def slow_sweep(
    weight: torch.Tensor, goal: Goal, damped: Matrix, dead: NDArray[np.bool_], cost: Matrix, block_size: int
) -> Swept:
    """Zero one weight after the other, and give each row the OBS update of the columns that are still free."""
    swept = Swept(weight.double().numpy().copy(), 0.0, np.inf)
    w = swept.weight
    w[:, dead] = 0
    rows, columns = w.shape
    pruned = np.zeros(w.shape, dtype=bool)
    span = block_size if goal.pattern is None else goal.pattern.of
    for column in range(columns):
        if column % span == 0:
            end = min(column + span, columns)
            for group in [range(rows)] if goal.pattern is None else [[row] for row in range(rows)]:
                ranked = sorted(
                    (-1.0 if dead[j] else w[row, j] ** 2 * cost[j], row, j) for row in group for j in range(column, end)
                )
                if goal.pattern is None:
                    n = slow_n_pruned(rows * end, goal.sparsity) - slow_n_pruned(rows * column, goal.sparsity)
                else:
                    n = goal.pattern.of - goal.pattern.keep
                for _, row, j in ranked[:n]:
                    pruned[row, j] = True
                if 0 < n < len(ranked) and ranked[n][0] > 0:
                    swept.gap = min(swept.gap, (ranked[n][0] - ranked[n - 1][0]) / ranked[n][0])
        inverse = np.linalg.inv(damped[column:, column:])
        for row in range(rows):
            if pruned[row, column] or dead[column]:
                swept.loss += w[row, column] ** 2 / inverse[0, 0] / 2
                w[row, column:] -= w[row, column] / inverse[0, 0] * inverse[0]
                w[row, column] = 0
    return swept


def slow_n_pruned(n: int, sparsity: float) -> int:
    """n * sparsity as written in decimal, to the nearest integer, halves down."""
    return ceil(n * Fraction(repr(sparsity)) - Fraction(1, 2))


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
