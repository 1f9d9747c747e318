"""Weights written into an ONNX model: dense, or as sparse initializers where that is smaller.

In: a model whose nodes name their weights, and a checkpoint. Out: the model with its initializers,
dense ones in `model.onnx.data`, and what each matrix took. One tensor is in memory at a time,
besides what is stored inside model.onnx itself.

ONNX's helpers for external data pass over sparse initializers (onnx 1.23), so offsets are written
here; and no engine multiplies them as sparse ones: ONNX Runtime expands them when it loads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from owl_deploy.errors import OwlDeployError
from owl_deploy.export.decoder import WeightSource
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import Precision

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIGNMENT",
    "DATA_FILE",
    "INLINE_LIMIT",
    "StoredMatrix",
    "TensorSource",
    "external_tensor",
    "read_stacked",
    "read_weight",
    "smallest_encoding",
    "stored_tensor",
    "write_dense_weights",
    "write_initializers",
]

Encoding = Literal[
    "dense",
    "coo-varint",
    "coo-int32",
    "coo-int64",
    "packed-dense",
    "packed-bitmask",
    "packed-index16",
    "nbits8",
    "nbits4",
    "int8",
]

INLINE_LIMIT = 2_000_000_000
"""Bytes that model.onnx may hold: protobuf stops at 2 GiB, and the graph itself takes some."""

DATA_FILE = "model.onnx.data"
"""File beside model.onnx that holds the large initializers."""

ALIGNMENT = 4096
"""Every tensor of the data file begins at a multiple, so that engines can map it at a page border."""


class Shaped(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""


class TensorSource(Protocol):
    """Where weights come from: a checkpoint, or a trace."""

    @property
    def tensors(self) -> Mapping[str, Shaped]:
        """Its tensors by name."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""


@dataclass(frozen=True)
class StoredMatrix:
    """How one matrix was stored, and what it was predicted to take."""

    name: str
    shape: tuple[int, int]
    """As stored: (in, out) where transposed, (out, in) where packed."""
    n_nonzeros: int
    encoding: Encoding
    is_external: bool
    predicted_bytes: int
    bytes: int
    precision: Precision = "fp32"

    @property
    def sparsity(self) -> float:
        """Zeros over elements."""
        return 1 - self.n_nonzeros / (self.shape[0] * self.shape[1])


def write_initializers(
    model: onnx.ModelProto,
    weights: dict[str, WeightSource],
    checkpoint: TensorSource,
    folder: Path,
    *,
    is_sparse: bool,
    target: str,
    inline_limit: int = INLINE_LIMIT,
    on_step: OnStep = silent,
) -> list[StoredMatrix]:
    """Add every weight to `model`, write `model.onnx` and, where needed, `model.onnx.data`.

    A sparse matrix is stored as its non-zero values and their flattened, sorted positions, in the
    smallest form that the target reads: `coo-varint` (int64 as protobuf varints, 1 to 5 bytes each;
    inside model.onnx only; passes onnx.checker) or `coo-int32` (`coo-int64` from 2^31 elements on;
    int32 is read by both engines and refused by the checker). A matrix stays dense where that is
    not larger. Past `inline_limit` values and positions go to the data file, from which DeepSparse
    reads no sparse initializer.

    Args:
        model: changed in place.
        weights: initializer name -> source.
        checkpoint: gives the tensors.
        folder: where the files go.
        is_sparse: whether sparse encodings are considered at all.
        target: engine that will read the files.
        inline_limit: bytes that model.onnx may hold.

    Returns:
        One entry per matrix; vectors are always dense and not listed.

    Raises:
        OwlDeployError: the target would need a data file that it cannot read.
    """
    plan: dict[str, tuple[Encoding, int]] = {}
    is_external = False
    if is_sparse:
        # The protobuf that DeepSparse needs is pure Python: the parity gate of SmolLM2 at 70 %, which loads the
        # model twice, took 174 s with varints and 29 s with raw int32.
        allows_varint = target == "onnxruntime"
        plan = {
            name: _smallest(read_weight(checkpoint, source), allows_varint=allows_varint)
            for name, source in weights.items()
        }
        inline_bytes = sum(size for encoding, size in plan.values() if encoding != "dense")
        is_external = inline_bytes > inline_limit
        if is_external and target == "deepsparse":
            raise OwlDeployError(
                f"sparse initializers of {inline_bytes} bytes do not fit inside model.onnx ({inline_limit} "
                "bytes), and DeepSparse "
                "reads them from nowhere else: export with weights dense"
            )
    stored: list[StoredMatrix] = []
    with (folder / DATA_FILE).open("wb") as data:
        for done, (name, source) in enumerate(weights.items(), start=1):
            array = read_weight(checkpoint, source)
            encoding, predicted = (
                _smallest(array, allows_varint=False) if is_external else plan.get(name, ("dense", array.nbytes))
            )
            if encoding == "dense":
                model.graph.initializer.append(stored_tensor(name, array, data))
                size = array.nbytes
            else:
                sparse = _sparse_tensor(name, array, encoding, data if is_external else None)
                model.graph.sparse_initializer.append(sparse)
                size = _payload_bytes(sparse.values) + _payload_bytes(sparse.indices)
            if array.ndim == 2:
                shape, n_nonzeros = (array.shape[0], array.shape[1]), int(np.count_nonzero(array))
                in_data_file = encoding == "dense" or is_external
                kind: Precision = "fp16" if source.is_half else "fp32"
                stored.append(StoredMatrix(name, shape, n_nonzeros, encoding, in_data_file, predicted, size, kind))
            del array  # before the next one is read
            on_step(Step("writing weights", done, len(weights), encoding))
        data.flush()
        os.fsync(data.fileno())
    onnx.save_model(model, folder / "model.onnx")
    return stored


def write_dense_weights(
    model: onnx.ModelProto,
    weights: Mapping[str, WeightSource],
    checkpoint: TensorSource,
    data: BinaryIO,
    *,
    n_steps: int,
    on_step: OnStep,
) -> list[StoredMatrix]:
    """Add weights to `model` as they are; their bytes go to `data`.

    Args:
        model: changed in place.
        weights: initializer name -> source.
        checkpoint: gives the tensors.
        data: the data file, written at its end.
        n_steps: matrices in the whole file, for the progress told.
        on_step: told of every weight.

    Returns:
        One entry per matrix; vectors are not listed.
    """
    stored = []
    for done, (name, source) in enumerate(weights.items(), start=1):
        array = read_weight(checkpoint, source)
        model.graph.initializer.append(stored_tensor(name, array, data))
        if array.ndim == 2:
            shape, n_nonzeros = (array.shape[0], array.shape[1]), int(np.count_nonzero(array))
            stored.append(StoredMatrix(name, shape, n_nonzeros, "dense", True, array.nbytes, array.nbytes))
        on_step(Step("writing weights", done, n_steps, "dense"))
    return stored


def read_weight(checkpoint: TensorSource, source: WeightSource) -> NDArray[Any]:
    """Return a weight as it lies in the ONNX file, float32 or float16 and contiguous.

    Raises:
        OwlDeployError: it is to be float16, and a value is beyond 65504.
    """
    array = read_stacked(checkpoint, source.tensors)
    if source.offset:
        array += np.float32(source.offset)
    if source.is_half:
        if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
            raise OwlDeployError(f"{source.tensors[0]} holds values beyond 65504, which fp16 cannot: export with fp32")
        return np.ascontiguousarray((array.T if source.is_transposed else array).astype(np.float16))
    return np.ascontiguousarray(array.T if source.is_transposed else array)


def read_stacked(checkpoint: TensorSource, names: Sequence[str]) -> NDArray[np.float32]:
    """Return tensors of the checkpoint one below the other, as float32, with one of them besides in memory."""
    if len(names) == 1:
        alone: NDArray[np.float32] = checkpoint.read(names[0]).float().numpy()
        return alone
    first, *others = (checkpoint.tensors[name].shape for name in names)
    stack = np.empty((sum(shape[0] for shape in (first, *others)), *first[1:]), np.float32)
    start = 0
    for name in names:
        part = checkpoint.read(name).float().numpy()
        stack[start : start + len(part)] = part
        start += len(part)
    return stack


def _smallest(array: NDArray[Any], *, allows_varint: bool) -> tuple[Encoding, int]:
    indices = np.flatnonzero(array)
    varint_bytes = _varint_bytes(indices) if allows_varint else None
    return smallest_encoding(array.shape, len(indices), varint_bytes, value_bytes=array.itemsize)


def smallest_encoding(
    shape: tuple[int, ...], n_nonzeros: int, varint_bytes: int | None, *, value_bytes: int = 4
) -> tuple[Encoding, int]:
    """Return the smallest encoding of a weight, and the bytes that it takes.

    Args:
        shape: of the weight; a vector is always dense.
        n_nonzeros: values to be stored.
        varint_bytes: of their positions, as protobuf varints; None where the target does not read these.
        value_bytes: of each value.
    """
    size = math.prod(shape)
    sizes: dict[Encoding, int] = {"dense": value_bytes * size}
    if len(shape) == 2:
        if varint_bytes is not None:
            sizes["coo-varint"] = value_bytes * n_nonzeros + varint_bytes
        if size < 2**31:
            sizes["coo-int32"] = (value_bytes + 4) * n_nonzeros
        else:
            sizes["coo-int64"] = (value_bytes + 8) * n_nonzeros
    best = min(sizes, key=lambda encoding: sizes[encoding])  # dense is first: it wins ties
    return best, sizes[best]


def _varint_bytes(indices: NDArray[np.int64]) -> int:
    """Return the bytes of sorted, non-negative integers as protobuf varints: seven bits in each."""
    borders = np.searchsorted(indices, [1 << (7 * k) for k in range(1, 10)])
    return len(indices) + int((len(indices) - borders).sum())


def _sparse_tensor(name: str, array: NDArray[Any], encoding: Encoding, data: BinaryIO | None) -> onnx.SparseTensorProto:
    """Return a matrix as flattened, sorted coordinates and values."""
    indices = np.flatnonzero(array)
    sparse = onnx.SparseTensorProto(dims=array.shape)
    sparse.values.CopyFrom(stored_tensor(name, array.reshape(-1)[indices], data))
    if encoding == "coo-varint":
        sparse.indices.CopyFrom(
            onnx.TensorProto(data_type=onnx.TensorProto.INT64, dims=[len(indices)], int64_data=indices)
        )
    else:
        kind = np.int32 if encoding == "coo-int32" else np.int64
        sparse.indices.CopyFrom(stored_tensor(f"{name}.indices", indices.astype(kind), data))
    return sparse


def stored_tensor(name: str, array: NDArray[Any], data: BinaryIO | None) -> onnx.TensorProto:
    """Return a tensor whose bytes lie in `data`, at a page border, or inside the proto where `data` is None."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if data is None:
        return onnx.TensorProto(name=name, dims=array.shape, data_type=kind, raw_data=array.tobytes())
    data.write(b"\0" * (-data.tell() % ALIGNMENT))
    tensor = external_tensor(name, kind, array.shape, offset=data.tell(), length=array.nbytes)
    data.write(array.data)
    return tensor


def external_tensor(name: str, kind: int, shape: tuple[int, ...], *, offset: int, length: int) -> onnx.TensorProto:
    """Return a tensor of an ONNX data type that is a stretch of the data file, in bytes."""
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _payload_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes that a tensor's numbers take, wherever they lie."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    if tensor.raw_data:
        return len(tensor.raw_data)
    without_numbers = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, name=tensor.name)
    return tensor.ByteSize() - without_numbers.ByteSize()
