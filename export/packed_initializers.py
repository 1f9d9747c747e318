"""Weights of a graph of SparseMatMul, written into an ONNX model: packed matrices, norms and biases.

In: a model whose nodes name their weights, what each packed matrix is made of, and a checkpoint.
Out: the model with its initializers, all of them in `model.onnx.data`, and what each matrix took.
One packed matrix and what it is made of are in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
from onnx import TensorProto

from owl_deploy.errors import OwlDeployError
from owl_deploy.export.cost_model import MachineClass, choose_encoding
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
from owl_deploy.export.packed_graph import PackedLinear
from owl_deploy.export.packing import Encoding, PackedHeader, pack_matrix, packed_bytes
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix
from owl_deploy.progress import OnStep, Step, silent

__all__ = ["chosen_encoding", "write_packed_initializers"]

_STORED_AS: dict[Encoding, Literal["packed-dense", "packed-bitmask", "packed-index16"]] = {
    "dense": "packed-dense",
    "bitmask": "packed-bitmask",
    "index16": "packed-index16",
}
_ROW_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}


def write_packed_initializers(
    model: onnx.ModelProto,
    weights: dict[str, WeightSource],
    packed: dict[str, PackedLinear],
    checkpoint: TensorSource,
    folder: Path,
    *,
    encoding: Encoding | Literal["auto"],
    machine: MachineClass,
    rounded: Iterator[tuple[str, Int8Matrix | Int4Matrix]] = iter(()),
    on_step: OnStep = silent,
) -> list[StoredMatrix]:
    """Add every weight to `model`, write `model.onnx` and `model.onnx.data`.

    A matrix whose rows are gathered is packed dense and lies in the file once: the initializers
    that Gather reads are stretches of its bytes.

    Args:
        model: changed in place.
        weights: initializer name -> source, of what is not packed.
        packed: what is packed, in the order of the file.
        checkpoint: gives the tensors.
        folder: where the files go.
        encoding: of every matrix that is not gathered; auto asks the cost model about each.
        machine: machine class that the cost model is asked about.
        rounded: names and values of int8 and int4 matrices, in the order of `packed`; others are rounded to nearest.

    Returns:
        One entry per matrix; vectors are not listed.

    Raises:
        OwlDeployError: a matrix does not fit the encoding or the precision.
    """
    n_steps = len(weights) + len(packed)
    upcoming = next(rounded, None)
    with (folder / DATA_FILE).open("wb") as data:
        stored = write_dense_weights(model, weights, checkpoint, data, n_steps=n_steps, on_step=on_step)
        for done, linear in enumerate(packed.values(), start=len(weights) + 1):
            quantized = None
            if upcoming is not None and upcoming[0] == linear.name:
                quantized, upcoming = upcoming[1], next(rounded, None)
            matrix = _write_matrix(model, linear, checkpoint, data, quantized, encoding=encoding, machine=machine)
            stored.append(matrix)
            on_step(Step("writing weights", done, n_steps, f"{matrix.encoding} {matrix.precision}"))
        data.flush()
        os.fsync(data.fileno())
    if upcoming is not None:
        raise ValueError(f"rounded values of {upcoming[0]} came out of turn, or the graph has no such matrix")
    onnx.save_model(model, folder / "model.onnx")
    return stored


def chosen_encoding(
    linear: PackedLinear,
    shape: tuple[int, int],
    n_nonzeros: int,
    *,
    encoding: Encoding | Literal["auto"],
    machine: MachineClass,
) -> Encoding:
    """Return how a matrix is packed: as asked, by the cost model, or dense where its rows are gathered."""
    if linear.is_gathered:
        return "dense"
    if encoding == "auto":
        return choose_encoding(shape, n_nonzeros, linear.precision, machine_class=machine)
    return encoding


def _write_matrix(
    model: onnx.ModelProto,
    linear: PackedLinear,
    checkpoint: TensorSource,
    data: BinaryIO,
    quantized: Int8Matrix | Int4Matrix | None,
    *,
    encoding: Encoding | Literal["auto"],
    machine: MachineClass,
) -> StoredMatrix:
    """Pack one matrix, write it with its bias, and name what the nodes read of it."""
    weight = read_stacked(checkpoint, [f"{part}.weight" for part in linear.parts])
    shape, n_nonzeros = (weight.shape[0], weight.shape[1]), int(np.count_nonzero(weight))
    chosen = chosen_encoding(linear, shape, n_nonzeros, encoding=encoding, machine=machine)
    # Scales of groups would lie between the rows that Gather reads.
    group = 0 if linear.is_gathered else None
    try:
        packed = pack_matrix(weight, precision=linear.precision, encoding=chosen, group=group, quantized=quantized)
    except (OwlDeployError, ValueError) as error:
        raise OwlDeployError(f"{linear.name}: {error}") from error
    del weight

    initializers = model.graph.initializer
    whole = stored_tensor(linear.matrix_name, packed, data)
    if linear.is_multiplied:
        initializers.append(whole)
    if linear.is_gathered:
        offset = next(int(entry.value) for entry in whole.external_data if entry.key == "offset")
        initializers.extend(_gathered_tensors(linear, PackedHeader.from_bytes(packed[:64].tobytes()), offset))
    if linear.has_bias:
        bias = read_stacked(checkpoint, [f"{part}.bias" for part in linear.parts])
        initializers.append(stored_tensor(linear.bias_name, bias, data))
    return StoredMatrix(
        name=linear.matrix_name if linear.is_multiplied else linear.rows_name,
        shape=shape,
        n_nonzeros=n_nonzeros,
        encoding=_STORED_AS[chosen],
        is_external=True,
        predicted_bytes=packed_bytes(shape, n_nonzeros, linear.precision, chosen, group),
        bytes=len(packed),
        precision=linear.precision,
    )


def _gathered_tensors(linear: PackedLinear, header: PackedHeader, offset: int) -> list[TensorProto]:
    """Return initializers that are the values and the scales of a packed dense matrix, where they lie in the file."""
    n_rows, n_columns = header.shape
    kind = _ROW_TYPES[linear.precision]
    row_bytes = n_columns * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    tensors = [
        external_tensor(
            linear.rows_name, kind, header.shape, offset=offset + header.records_offset, length=n_rows * row_bytes
        )
    ]
    if linear.precision == "int8":
        row_scales = -(-(64 + 4 * (n_rows + 1)) // 64) * 64  # behind header and row starts, see kernels/FORMAT.md
        tensors.append(
            external_tensor(
                linear.row_scales_name, TensorProto.FLOAT, (n_rows, 1), offset=offset + row_scales, length=4 * n_rows
            )
        )
    return tensors
