"""Would one sweep that prunes and rounds at once be better than rounding what pruning left?

    python -m owl_deploy.bench.joint_rounding

In: a dense model, calibration text. Out: a table of the errors that products are left with, of some linears with the
inputs of the dense model: pruned by SparseGPT, then rounded to nearest, rounded by GPTQ over the kept weights (what
`export --rounding gptq` does), or pruned and rounded column by column in one sweep (SparseGPT's joint mode). No
checkpoint is written. The joint mode exists here alone, because it does not pay: the measurement is why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch

from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.export.compensated_rounding import round_and_compensate
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix, quantize_int4, quantize_int8
from owl_deploy.methods import sparsegpt
from owl_deploy.methods.inverse_hessian import invert
from owl_deploy.methods.method import Goal, Linear
from owl_deploy.observation import input_groups, observe_and_advance_
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import open_skeleton
from owl_deploy.statistics import Hessian

__all__ = ["Errors", "joint_rounding", "measure"]

_DAMPENING = 0.01
_BLOCK = 128  # columns whose mask is chosen at once: SparseGPT's


@dataclass(frozen=True)
class Errors:
    """Of one linear at one sparsity and precision: tr(D H D^T) / tr(W H W^T), D what was taken from the weight W."""

    name: str
    sparsity: float
    precision: str
    pruned: float
    """By SparseGPT, before anything is rounded."""
    nearest: float
    gptq: float
    joint: float


def joint_rounding(
    weight: torch.Tensor, hessian: Hessian, sparsity: float, grid: Int8Matrix | Int4Matrix
) -> torch.Tensor:
    """Prune and round in one sweep: SparseGPT's joint mode (arXiv 2301.00774, section 3.5).

    The mask is that of `sparsegpt` on weights that were moved by rounding errors too, and every column that comes
    later makes up for both.

    Args:
        weight: (N, K) float32, dense.
        hessian: of the inputs, (K, K).
        sparsity: share of the weights to prune.
        grid: its scales and codebook are those to round to; its values are not read.

    Returns:
        (N, K) float32, zeros and values of the grid.
    """
    inverse = invert(hessian, _DAMPENING)
    levels = torch.from_numpy(grid.levels)
    borders = (levels[1:] + levels[:-1]) / 2
    scales = torch.from_numpy(grid.column_scales()).expand_as(weight)
    cost = sparsegpt.score(inverse)
    swept, found = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        columns = slice(start, min(start + _BLOCK, weight.shape[1]))
        scores = cost(swept[:, columns], columns)
        is_kept = scores > scores.flatten().kthvalue(round(scores.numel() * sparsity)).values
        for column in range(columns.start, columns.stop):
            nearest = levels[torch.bucketize(swept[:, column] / scales[:, column], borders)] * scales[:, column]
            found[:, column] = torch.where(is_kept[:, column - start], nearest, 0.0)
            error = (swept[:, column] - found[:, column]) / inverse.upper[column, column]
            swept[:, column + 1 :].addr_(error, inverse.upper[column, column + 1 :], alpha=-1)
    return found


def measure(weight: torch.Tensor, hessian: Hessian, name: str, sparsity: float) -> Iterator[Errors]:
    """Yield the errors of a linear in int8 and in int4, on the grids that export would choose for it pruned.

    Args:
        weight: (N, K) float32, dense.
        hessian: of its inputs.
        name: of the linear.
        sparsity: share of the weights to prune.
    """
    whole = float(((weight @ hessian.matrix) * weight).sum(dtype=torch.float64))

    def error(found: torch.Tensor) -> float:
        lost = (weight - found).double()
        return float(((lost @ hessian.matrix.double()) * lost).sum()) / whole

    pruned = sparsegpt.prune(Linear(name, weight, hessian), Goal(sparsity), dampening=_DAMPENING).weight

    def errors(precision: str, nearest: Int8Matrix | Int4Matrix, gptq: Int8Matrix | Int4Matrix) -> Errors:
        rounded = [torch.from_numpy(grid.dequantized()) for grid in (nearest, gptq)]
        found = [pruned, *rounded, joint_rounding(weight, hessian, sparsity, nearest)]
        return Errors(name, sparsity, precision, *map(error, found))

    int8 = quantize_int8(pruned.numpy(), 0)
    yield errors("int8", int8, round_and_compensate(int8, pruned, hessian))
    int4 = quantize_int4(pruned.numpy(), 64)
    yield errors("int4", int4, round_and_compensate(int4, pruned, hessian))


def _linears(model: str, every: int, n_samples: int, seq_len: int) -> Iterator[tuple[str, torch.Tensor, Hessian]]:
    """Yield one linear per tensor of inputs, of some blocks of a dense model, with the Hessian of those inputs."""
    checkpoint = open_checkpoint(model)
    settings = PruneSettings(calibration="python-docs", n_samples=n_samples, seq_len=seq_len)
    skeleton = open_skeleton(checkpoint)
    inputs = skeleton.capture(torch.from_numpy(calibration_tokens(checkpoint, settings, seed=0).tokens))
    for index in range(len(skeleton.blocks)):
        with skeleton.filled(index) as block:
            found = skeleton.linears(index)
            groups = input_groups(block, inputs, index, found)
            seen = observe_and_advance_(block, inputs, index, found, groups, (Hessian,))
            for group in groups if index % every == 0 else []:
                hessian: Any = seen[group[0]].statistics[0]
                yield group[0], found[group[0]].weight.cpu(), hessian


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="demo:smollm2-135m", help="A dense model.")
@click.option("--sparsity", type=click.FloatRange(0.01, 0.99), multiple=True, default=(0.5, 0.7), help="Repeatable.")
@click.option("--every", default=10, help="Blocks from one whose linears are measured to the next.")
@click.option("--n-samples", default=16, help="Calibration sequences, of python-docs.")
@click.option("--seq-len", default=512, help="Tokens per sequence.")
def main(model: str, sparsity: tuple[float, ...], every: int, n_samples: int, seq_len: int) -> None:
    """Print the means over linears (geometric, since the errors of linears differ by orders of magnitude)."""
    errors = [
        row
        for name, weight, hessian in _linears(model, every, n_samples, seq_len)
        for share in sparsity
        for row in measure(weight, hessian, name, share)
    ]
    click.echo(f"{model}, {len({row.name for row in errors})} linears, {n_samples} x {seq_len} tokens of python-docs")
    click.echo("relative error      pruned   nearest      gptq     joint")
    for share, precision in dict.fromkeys((row.sparsity, row.precision) for row in errors):
        rows = [row for row in errors if (row.sparsity, row.precision) == (share, precision)]
        kinds = [[row.pruned, row.nearest, row.gptq, row.joint] for row in rows]
        means = "".join(f"{mean:10.5f}" for mean in np.exp(np.log(kinds).mean(axis=0)))
        click.echo(f"{share:4.0%} {precision:>10}{means}")


if __name__ == "__main__":
    main()
