"""The joint sweep that the benchmark compares with: against a slow float64 one, and its two limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from random_models import random_model, save

from owl_deploy.bench.joint_rounding import joint_rounding, main, measure
from owl_deploy.export.quantization import Int8Matrix, quantize_int8
from owl_deploy.methods import sparsegpt
from owl_deploy.methods.method import Goal, Linear
from owl_deploy.statistics import Hessian

SPARSITY = 0.6


def problem(n_rows: int = 7, n_columns: int = 160) -> tuple[torch.Tensor, Hessian]:
    """Return a weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_rows, n_columns, generator=generator)
    inputs = torch.randn(400, n_columns, generator=generator) @ torch.randn(n_columns, n_columns, generator=generator)
    hessian = Hessian(n_columns)
    hessian.update(inputs)
    return weight, hessian


def slow_joint(weight: NDArray[np.float64], matrix: NDArray[np.float64], grid: Int8Matrix) -> NDArray[np.float64]:
    """Sweep as the paper says, the inverse of what is left of H made anew at every column, 128 to a mask."""
    n_columns = weight.shape[1]
    damped = matrix + 0.01 * matrix.diagonal().mean() * np.eye(n_columns)
    inverses = [np.linalg.inv(damped[column:, column:]) for column in range(n_columns)]
    scales = np.broadcast_to(grid.column_scales(), weight.shape)
    swept = weight.copy()
    for start in range(0, n_columns, 128):
        end = min(start + 128, n_columns)
        cost = np.array([inverses[column][0, 0] for column in range(start, end)])
        scores = swept[:, start:end] ** 2 / cost
        lowest = np.sort(scores, axis=None)[round(scores.size * SPARSITY) - 1]
        for column in range(start, end):
            steps = swept[:, column] / scales[:, column]
            nearest = np.clip(np.round(steps), -127, 127) * scales[:, column]
            target = np.where(scores[:, column - start] > lowest, nearest, 0)
            error = swept[:, column] - target
            inverse = inverses[column]
            swept[:, column:] -= np.outer(error / inverse[0, 0], inverse[0])
            swept[:, column] = target
    return swept


def test_the_joint_sweep_is_that_of_a_slow_float64_one() -> None:
    weight, hessian = problem()
    grid = quantize_int8(weight.numpy(), 0)
    found = joint_rounding(weight, hessian, SPARSITY, grid).numpy()
    expected = slow_joint(weight.double().numpy(), hessian.matrix.double().numpy(), grid)
    # A value on the border of two steps may fall to either side, and the columns behind it follow.
    assert (np.abs(found - expected) < 1e-5).mean() > 0.98
    np.testing.assert_array_equal(found == 0, expected == 0)


def test_on_a_fine_grid_the_joint_sweep_is_sparsegpt() -> None:
    weight, hessian = problem()
    nearest = quantize_int8(weight.numpy(), 0)
    levels = np.linspace(-8, 8, 200_001, dtype=np.float32)

    class Fine:
        """Steps of 8e-5, the same in every column."""

        def __init__(self) -> None:
            self.levels = levels

        def column_scales(self) -> NDArray[np.float32]:
            return np.ones_like(nearest.column_scales())

    found = joint_rounding(weight, hessian, SPARSITY, Fine())  # type: ignore[arg-type]
    expected = sparsegpt.prune(Linear("x", weight, hessian), Goal(SPARSITY)).weight
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_what_makes_up_for_rounding_is_between_pruning_alone_and_rounding_to_nearest() -> None:
    weight, hessian = problem()
    int8, int4 = measure(weight, hessian, "x", SPARSITY)
    assert (int8.precision, int4.precision) == ("int8", "int4")
    assert 0 < int4.pruned < int4.gptq < int4.nearest < 1
    assert int4.pruned < int4.joint < 1.1 * int4.nearest
    assert int8.nearest < 1.01 * int8.pruned  # steps so fine that there is nothing to make up for


def test_the_command_prints_one_line_per_sparsity_and_precision(tmp_path: Path) -> None:
    save(random_model("llama"), tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--every", "1", "--n-samples", "2", "--seq-len", "32"]
    done = CliRunner().invoke(main, [*arguments, "--sparsity", "0.5"])
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.output.splitlines()[2:]] == [["50%", "int8"], ["50%", "int4"]]
