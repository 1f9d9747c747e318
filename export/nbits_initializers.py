"""Weights of a graph of MatMulNBits, written into an ONNX model: codes, scales, norms and biases.

In: a model whose nodes name their weights, what each quantised matrix is made of, and a checkpoint. Out: the model
with its initializers, all of them in `model.onnx.data`, and what each matrix took. One matrix is in memory at a time.

The codes are those of ONNX Runtime's own quantiser, so that the dense baseline is what others publish with it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.export.decoder import WeightSource
from owl_deploy.export.initializers import (
    DATA_FILE,
    StoredMatrix,
    TensorSource,
    external_tensor,
    read_stacked,
    stored_tensor,
    write_dense_weights,
)
from owl_deploy.export.nbits_graph import BLOCK_SIZE, NBitsLinear
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import Precision

__all__ = ["nbits_bytes", "quantize_nbits", "write_nbits_initializers"]

_STORED_AS: dict[Precision, Literal["nbits8", "nbits4"]] = {"int8": "nbits8", "int4": "nbits4"}


def write_nbits_initializers(
    model: onnx.ModelProto,
    weights: dict[str, WeightSource],
    quantized: dict[str, NBitsLinear],
    checkpoint: TensorSource,
    folder: Path,
    *,
    on_step: OnStep = silent,
) -> list[StoredMatrix]:
    """Add every weight to `model`, write `model.onnx` and `model.onnx.data`.

    A matrix whose rows are gathered too lies in the file once, under two names.

    Args:
        model: changed in place.
        weights: initializer name -> source, of what is not quantised.
        quantized: what is quantised, in the order of the file.
        checkpoint: gives the tensors.
        folder: where the files go.

    Returns:
        One entry per matrix; vectors are not listed.
    """
    n_steps = len(weights) + len(quantized)
    with (folder / DATA_FILE).open("wb") as data:
        stored = write_dense_weights(model, weights, checkpoint, data, n_steps=n_steps, on_step=on_step)
        for done, linear in enumerate(quantized.values(), start=len(weights) + 1):
            stored.append(_write_matrix(model, linear, checkpoint, data))
            on_step(Step("writing weights", done, n_steps, linear.precision))
        data.flush()
        os.fsync(data.fileno())
    onnx.save_model(model, folder / "model.onnx")
    return stored


def quantize_nbits(
    weight: NDArray[np.float32], bits: int, *, is_symmetric: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Round a weight in blocks of 32 columns as ONNX Runtime does.

    The scale of a symmetric block is its weight of the largest magnitude over -2^(bits - 1), so that this one is exact
    and the other sign has a step less. Otherwise it is the range of the block and zero over 2^bits - 1.

    Args:
        weight: (out, in), finite.
        bits: 4 or 8.
        is_symmetric: whether the zero point is 2^(bits - 1) everywhere.

    Returns:
        Codes (out, ceil(in / 32), 4 x bits), scales (out, ceil(in / 32)) and zero points, meaningless where symmetric,
        (out, ceil(ceil(in / 32) x bits / 8)), low bits first; a weight is about scale x (code - zero point), and zeros
        are exact.
    """
    from onnxruntime.capi import _pybind_state

    quantize = {4: _pybind_state.quantize_matmul_4bits, 8: _pybind_state.quantize_matmul_8bits}[bits]
    n_rows, n_columns = weight.shape
    n_blocks = -(-n_columns // BLOCK_SIZE)
    codes = np.zeros((n_rows, n_blocks, BLOCK_SIZE * bits // 8), np.uint8)
    scales = np.zeros((n_rows, n_blocks), np.float32)
    zero_points = np.zeros((n_rows, -(-n_blocks * bits // 8)), np.uint8)
    quantize(
        codes, np.ascontiguousarray(weight.T), scales.reshape(-1), zero_points.reshape(-1),
        BLOCK_SIZE, n_rows, n_columns, is_symmetric,
    )  # fmt: skip
    return codes, scales, zero_points


def nbits_bytes(shape: tuple[int, int], bits: int, *, is_symmetric: bool = True) -> int:
    """Return the bytes of codes, scales and, where there are any, zero points of a matrix (out, in)."""
    n_blocks = -(-shape[1] // BLOCK_SIZE)
    zero_points = 0 if is_symmetric else -(-n_blocks * bits // 8)
    return shape[0] * (n_blocks * (BLOCK_SIZE * bits // 8 + 4) + zero_points)


def _write_matrix(
    model: onnx.ModelProto, linear: NBitsLinear, checkpoint: TensorSource, data: BinaryIO
) -> StoredMatrix:
    """Quantise one matrix, write it with its bias, and name what the nodes read of it."""
    weight = read_stacked(checkpoint, [f"{part}.weight" for part in linear.parts])
    shape, n_nonzeros = (weight.shape[0], weight.shape[1]), int(np.count_nonzero(weight))
    codes, scales, zero_points = quantize_nbits(weight, linear.bits, is_symmetric=linear.is_symmetric)
    del weight

    initializers = model.graph.initializer
    whole = stored_tensor(linear.codes_name, codes, data)
    if linear.is_multiplied:
        initializers.append(whole)
    if linear.is_gathered:
        place = {entry.key: int(entry.value) for entry in whole.external_data if entry.key in ("offset", "length")}
        rows = (shape[0], shape[1] * linear.bits // 8)
        initializers.append(external_tensor(linear.rows_name, onnx.TensorProto.UINT8, rows, **place))
    initializers.append(stored_tensor(linear.scales_name, scales, data))
    if not linear.is_symmetric:
        initializers.append(stored_tensor(linear.zero_points_name, zero_points, data))
    if linear.has_bias:
        bias = read_stacked(checkpoint, [f"{part}.bias" for part in linear.parts])
        initializers.append(stored_tensor(linear.bias_name, bias, data))
    return StoredMatrix(
        name=linear.codes_name if linear.is_multiplied else linear.rows_name,
        shape=shape,
        n_nonzeros=n_nonzeros,
        encoding=_STORED_AS[linear.precision],
        is_external=True,
        predicted_bytes=nbits_bytes(shape, linear.bits, is_symmetric=linear.is_symmetric),
        bytes=codes.nbytes + scales.nbytes + (0 if linear.is_symmetric else zero_points.nbytes),
        precision=linear.precision,
    )
