"""Weights rounded one column after the other, each time letting the columns still to come make up for the error.

In: the packed matrices of a graph, the checkpoint block by block, calibration tokens. Out: each matrix of the blocks
on the grid of its precision, in the order in which it is to be written. Zeros stay zero: what pruning removed is not
given back, and what the kept weights of a row cannot express is moved to others that were kept.

Which encoding a matrix gets is not decided here, and no byte is laid out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.errors import OwlDeployError
from owl_deploy.export.packed_graph import PackedLinear
from owl_deploy.export.packing import Encoding, default_group
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix, quantize_int4, quantize_int8
from owl_deploy.methods.inverse_hessian import invert
from owl_deploy.observation import advance_, input_groups, observe
from owl_deploy.skeleton import Skeleton
from owl_deploy.statistics import Hessian

__all__ = ["round_and_compensate", "rounded_blocks"]

_DAMPENING = 0.01
_SPAN = 128  # columns whose updates of all later ones are made as one product

Quantized = TypeVar("Quantized", Int8Matrix, Int4Matrix)


class ChooseEncoding(Protocol):
    """Tells how a matrix will be packed."""

    def __call__(self, linear: PackedLinear, shape: tuple[int, int], n_nonzeros: int) -> Encoding:
        """Return the encoding of a matrix of that shape (N, K) and so many weights that are not zero."""


def rounded_blocks(
    skeleton: Skeleton,
    packed: Mapping[str, PackedLinear],
    tokens: NDArray[np.int64],
    choose_encoding: ChooseEncoding,
) -> Iterator[tuple[str, Int8Matrix | Int4Matrix]]:
    """Yield name and rounded values of every int8 and int4 matrix of the blocks, in the order of `packed`.

    The inputs of a matrix are those that the rounded matrices before it leave, in the same block too. One block and
    its Hessians are in memory at a time.

    Args:
        skeleton: of the checkpoint.
        packed: as the graph names them; matrices outside the blocks, and those of floats, are passed over.
        tokens: calibration sequences, (n_samples, seq_len).
        choose_encoding: asked about each matrix: only a dense one has values for its zeros.

    Raises:
        OwlDeployError: an input is NaN or Inf, or a Hessian cannot be inverted.
    """
    owners = {part: linear for linear in packed.values() for part in linear.parts}
    inputs = skeleton.capture(torch.from_numpy(tokens))
    for index in range(len(skeleton.blocks)):
        with skeleton.filled(index) as block:
            found = skeleton.linears(index)
            for group in input_groups(block, inputs, index, found):
                wanted = {owners[name].name: owners[name] for name in group}
                if not any(linear.precision in ("int8", "int4") for linear in wanted.values()):
                    continue
                hessian = observe(block, inputs, index, found, [group], (Hessian,))[group[0]].statistics[0]
                assert isinstance(hessian, Hessian)
                for linear in wanted.values():
                    weight = torch.cat([found[name].weight for name in linear.parts]).cpu()
                    encoding = choose_encoding(linear, (len(weight), weight.shape[1]), int(weight.count_nonzero()))
                    try:
                        quantized = _rounded(linear, weight, encoding, hessian)
                    except (OwlDeployError, ValueError) as error:
                        raise OwlDeployError(f"{linear.name}: {error}") from error
                    borders = np.cumsum([found[name].out_features for name in linear.parts])[:-1]
                    for name, values in zip(linear.parts, np.split(quantized.dequantized(), borders), strict=True):
                        found[name].set_(torch.from_numpy(values))
                    yield linear.name, quantized
            advance_(block, inputs, index)


def _rounded(
    linear: PackedLinear, weight: torch.Tensor, encoding: Encoding, hessian: Hessian
) -> Int8Matrix | Int4Matrix:
    """Put a matrix on the grid that rounding to nearest would choose for it, with compensation."""
    array, group = weight.numpy(), default_group(linear.precision)
    if linear.precision == "int8":
        return round_and_compensate(quantize_int8(array, group), weight, hessian)
    return round_and_compensate(quantize_int4(array, group, stores_zeros=encoding == "dense"), weight, hessian)


def round_and_compensate(nearest: Quantized, weight: torch.Tensor, hessian: Hessian) -> Quantized:
    """Round kept weights to a given grid so that the product's error is small, not that of each weight.

    GPTQ (arXiv 2210.17323, section 3.3) over the weights that pruning kept. Columns are swept in the order of
    descending diag(H) ("act-order" of the official code, which costs nothing here, the grid being fixed before): w_j
    is replaced by its nearest value q, and the columns to come are moved by -(w_j - q) / U_jj U_j. A pruned weight has
    one value, zero, so that what earlier columns would have liked to move it by is passed on in turn. This is how
    SparseGPT's joint mode (arXiv 2301.00774, section 3.5) quantises, but that the mask was chosen before; which costs
    nothing (`owl_deploy.bench.joint_rounding` measures it).

    Args:
        nearest: the matrix rounded to nearest: its scales and codebook are kept.
        weight: (N, K) float32; its zeros stay.
        hessian: of the inputs, (K, K).

    Returns:
        As `nearest`, with other values.

    Raises:
        OwlDeployError: the Hessian cannot be inverted.
    """
    order = hessian.matrix.diagonal().argsort(descending=True, stable=True).cpu()
    sorted_hessian = Hessian(len(order))
    sorted_hessian.matrix = hessian.matrix.cpu()[order][:, order]
    upper = invert(sorted_hessian, _DAMPENING).upper
    levels = torch.from_numpy(nearest.levels)
    borders = (levels[1:] + levels[:-1]) / 2
    scales = torch.from_numpy(nearest.column_scales()).expand_as(weight).T[order].contiguous()
    swept = weight.T[order].contiguous()
    is_kept = swept != 0
    codes = torch.empty(swept.shape, dtype=torch.uint8)
    n_columns = len(swept)
    for start in range(0, n_columns, _SPAN):
        end = min(start + _SPAN, n_columns)
        errors = torch.empty_like(swept[start:end])
        for column in range(start, end):
            wanted = torch.where(is_kept[column], swept[column], 0.0)
            code = torch.bucketize(wanted / scales[column], borders)
            rounded = torch.where(is_kept[column], levels[code] * scales[column], 0.0)
            codes[column] = code
            error = (swept[column] - rounded) / upper[column, column]
            swept[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        swept[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return nearest.with_levels(np.ascontiguousarray(in_place.T.numpy()))
