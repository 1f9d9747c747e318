"""The sweep of SparseGPT and ISC in float64, one weight at a time, each step from an inverse of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import assume
from numpy.typing import NDArray
from pruning_problems import Problem

from owl_deploy.methods.method import Goal, Pruned

Matrix = NDArray[np.float64]


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


def assert_prunes_as_slow_sweep(
    prune: Callable[..., Pruned], problem: Problem, cost: Callable[[Matrix], Matrix]
) -> None:
    """Compare mask, weights and loss; leaves out problems whose mask float32 may cut elsewhere."""
    damped, dead = slow_damped(problem.sequences, 0.01)
    slow = slow_sweep(problem.weight, problem.goal, damped, dead, cost(damped), problem.block_size)
    assume(slow.gap > 1e-3)
    pruned = prune(problem.linear, problem.goal, block_size=problem.block_size)
    np.testing.assert_allclose(pruned.weight, slow.weight, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(pruned.weight == 0, slow.weight == 0)
    assert pruned.notes["loss"] == pytest.approx(slow.loss, rel=1e-3, abs=1e-6)
