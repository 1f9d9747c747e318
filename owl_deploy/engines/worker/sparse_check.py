"""What SparseML reads in an ONNX file with sparse initializers: a second opinion on our writer.

Runs in the bridge environment: Python 3.8, the standard library, numpy and sparseml (with the
onnx that it brings).
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "True"  # read when sparseml is imported

import numpy as np
import onnx
from onnx import numpy_helper
from sparseml.onnx.utils import onnx_nodes_sparsities
from sparseml.onnx.utils.sparse_tensor import convert_sparse_initializers_to_dense


def check_sparse_initializers(model_path: str) -> dict[str, Any]:
    """Read a model through SparseML 1.8.0, with its sparse initializers made dense by it.

    SparseML takes flat indices only, and puts values wherever they point; external data of dense
    initializers is read, of sparse ones it is not.

    Returns:
        "linears": weight of each MatMul or Gemm -> {"sparsity": zeros / elements, "shape": [...]};
        "sha256": each initializer that was sparse -> digest of its dense bytes, float32, row by row.
    """
    model = onnx.load(model_path)
    sparse_names = [tensor.values.name for tensor in model.graph.sparse_initializer]
    model = convert_sparse_initializers_to_dense(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    _, measurements = onnx_nodes_sparsities(model)
    linears = {}
    for key, measurement in measurements.items():
        name = key.partition("_inp=")[2]
        linears[name] = {"sparsity": float(measurement.sparsity), "shape": list(tensors[name].dims)}
    return {"linears": linears, "sha256": {name: _sha256(tensors[name]) for name in sparse_names}}


def _sha256(tensor: onnx.TensorProto) -> str:
    array = np.ascontiguousarray(numpy_helper.to_array(tensor), dtype="<f4")
    return hashlib.sha256(array.tobytes()).hexdigest()
