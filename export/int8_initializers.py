"""Weights of a graph of 8-bit integer products, written into an ONNX model.

In: a model whose nodes name their weights, which linears are integers, and a source of tensors. Out: the model with its
initializers, all in `model.onnx.data`, and what each matrix took. One matrix is in memory at a time.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx

from owl_deploy.export.decoder import WeightSource
from owl_deploy.export.initializers import (
    DATA_FILE,
    StoredMatrix,
    TensorSource,
    read_stacked,
    stored_tensor,
    write_dense_weights,
)
from owl_deploy.export.int8_graph import Int8Linear, quantize_columns
from owl_deploy.progress import OnStep, Step, silent

__all__ = ["write_int8_initializers"]


def write_int8_initializers(
    model: onnx.ModelProto,
    weights: dict[str, WeightSource],
    integers: dict[str, Int8Linear],
    checkpoint: TensorSource,
    folder: Path,
    *,
    on_step: OnStep = silent,
) -> list[StoredMatrix]:
    """Add every weight to `model`, write `model.onnx` and `model.onnx.data`.

    Args:
        model: changed in place.
        weights: initializer name -> source, of what stays float32.
        integers: linears that are stored as integers.
        checkpoint: gives the tensors.
        folder: where the files go.

    Returns:
        One entry per matrix; vectors are not listed.
    """
    n_steps = len(weights) + len(integers)
    with (folder / DATA_FILE).open("wb") as data:
        stored = write_dense_weights(model, weights, checkpoint, data, n_steps=n_steps, on_step=on_step)
        for done, linear in enumerate(integers.values(), start=len(weights) + 1):
            weight = read_stacked(checkpoint, [f"{linear.name}.weight"])
            n_nonzeros = int(np.count_nonzero(weight))
            if linear.inputs.smoothing is not None:
                weight = weight * linear.inputs.smoothing
            codes, scales = quantize_columns(weight)
            model.graph.initializer.append(stored_tensor(linear.codes_name, codes, data))
            together = scales * np.float32(linear.inputs.scale)
            model.graph.initializer.append(stored_tensor(linear.scales_name, together, data))
            size = codes.nbytes + together.nbytes
            shape = (codes.shape[0], codes.shape[1])
            stored.append(StoredMatrix(linear.codes_name, shape, n_nonzeros, "int8", True, size, size, "int8"))
            on_step(Step("writing weights", done, n_steps, "int8"))
        data.flush()
        os.fsync(data.fileno())
    onnx.save_model(model, folder / "model.onnx")
    return stored
