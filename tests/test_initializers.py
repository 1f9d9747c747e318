"""Weights in ONNX files: what is stored is read back exactly, by a reader of our own and by ONNX Runtime."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.torch import save_file

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.export import initializers
from owl_deploy.export.decoder import WeightSource
from owl_deploy.export.initializers import INLINE_LIMIT, StoredMatrix, write_initializers
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

Array = NDArray[np.float32]

# Tag and length of a protobuf field are at most 6 bytes for fields under 2 GiB; values and indices have one each.
FIELD_HEADERS = 12


def sparse_matrix(shape: tuple[int, int], sparsity: float, *, seed: int = 0) -> Array:
    """Return a matrix with exactly round(sparsity x elements) zeros, at random positions."""
    generator = np.random.default_rng(seed)
    flat = generator.uniform(0.5, 1.5, shape[0] * shape[1]).astype(np.float32)
    flat[generator.permutation(flat.size)[: round(sparsity * flat.size)]] = 0
    return flat.reshape(shape)


def write(
    folder: Path,
    arrays: dict[str, Array],
    *,
    is_transposed: bool = False,
    is_sparse: bool = True,
    target: str = "onnxruntime",
    inline_limit: int = INLINE_LIMIT,
) -> dict[str, StoredMatrix]:
    """Store matrices in a model whose nodes hand each one out as it is."""
    save_file({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    nodes, outputs = [], []
    for name, array in arrays.items():
        shape = array.shape[::-1] if is_transposed else array.shape
        nodes.append(helper.make_node("Identity", [name], [f"{name}.out"]))
        outputs.append(helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, shape))
    graph = helper.make_graph(nodes, "weights", [], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    matrices = write_initializers(
        model,
        {name: WeightSource((name,), is_transposed) for name in arrays},
        open_checkpoint(str(folder)),
        folder,
        is_sparse=is_sparse,
        target=target,
        inline_limit=inline_limit,
    )
    return {matrix.name: matrix for matrix in matrices}


def read_model(folder: Path) -> onnx.ModelProto:
    return onnx.load_model(folder / "model.onnx", load_external_data=False)


def read_numbers(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """Read a tensor by the letter of onnx.proto: a typed field, raw_data, or a stretch of a file."""
    kind = {"FLOAT": "<f4", "INT32": "<i4", "INT64": "<i8"}[TensorProto.DataType.Name(tensor.data_type)]
    if tensor.data_location == TensorProto.EXTERNAL:
        assert not tensor.HasField("raw_data")
        where = {entry.key: entry.value for entry in tensor.external_data}
        content = (folder / where["location"]).read_bytes()
        offset, length = int(where["offset"]), int(where["length"])
        assert offset + length <= len(content)
        numbers = np.frombuffer(content[offset : offset + length], kind)
    elif tensor.HasField("raw_data"):
        numbers = np.frombuffer(tensor.raw_data, kind)
    else:
        assert tensor.data_type == TensorProto.INT64
        numbers = np.array(tensor.int64_data, kind)
    return numbers.reshape(tensor.dims)


def read_back(folder: Path) -> dict[str, Array]:
    """Return every initializer as a dense array; checks what the standard asks of sparse ones."""
    graph = read_model(folder).graph
    arrays: dict[str, Array] = {tensor.name: read_numbers(tensor, folder) for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        name, shape = sparse.values.name, tuple(sparse.dims)
        assert name not in arrays, "a name is dense or sparse, not both"
        values, indices = read_numbers(sparse.values, folder), read_numbers(sparse.indices, folder)
        assert values.ndim == indices.ndim == 1
        assert len(values) == len(indices)
        assert (np.diff(indices) > 0).all(), "indices are sorted and none comes twice"
        assert ((indices >= 0) & (indices < np.prod(shape))).all()
        dense = np.zeros(np.prod(shape), np.float32)
        dense[indices] = values
        arrays[name] = dense.reshape(shape)
    return arrays


def run_in_onnxruntime(folder: Path) -> dict[str, Array]:
    """Return every initializer as ONNX Runtime sees it."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name.removesuffix(".out"): array for name, array in zip(names, session.run(names, {}), strict=True)}


def assert_stored(folder: Path, arrays: dict[str, Array]) -> None:
    for read in (read_back(folder), run_in_onnxruntime(folder)):
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array, strict=True)


@pytest.mark.parametrize(
    ("options", "encoding", "is_external"),
    [
        ({"is_sparse": False}, "dense", True),
        ({}, "coo-varint", False),
        ({"target": "deepsparse"}, "coo-int32", False),
        ({"inline_limit": 0}, "coo-int32", True),
    ],
)
@pytest.mark.parametrize("shape", [(64, 96), (1, 300), (300, 1), (31, 17)])
def test_every_encoding_is_read_back_exactly(
    options: dict[str, Any], encoding: str, is_external: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    array = sparse_matrix(shape, 0.8)
    stored = write(tmp_path, {"a": array}, **options)["a"]
    assert (stored.encoding, stored.is_external, stored.shape) == (encoding, is_external, shape)
    assert stored.n_nonzeros == np.count_nonzero(array)
    assert stored.sparsity == pytest.approx(0.8, abs=0.01)
    assert_stored(tmp_path, {"a": array})


@pytest.mark.parametrize("inline_limit", [INLINE_LIMIT, 0])
def test_transposed_weights_are_stored_as_the_transpose(inline_limit: int, tmp_path: Path) -> None:
    arrays = {"sparse": sparse_matrix((32, 80), 0.9), "dense": sparse_matrix((32, 80), 0.0)}
    stored = write(tmp_path, arrays, is_transposed=True, inline_limit=inline_limit)
    assert {matrix.shape for matrix in stored.values()} == {(80, 32)}
    assert_stored(tmp_path, {name: np.ascontiguousarray(array.T) for name, array in arrays.items()})


def test_int64_indices_in_a_data_file_are_read_back_exactly(tmp_path: Path) -> None:
    """The encoding of matrices from 2^31 elements on, on a small one: only the choice looks at the size."""
    array = sparse_matrix((64, 96), 0.8)
    with (tmp_path / "model.onnx.data").open("wb") as data:
        sparse = initializers._sparse_tensor("a", array, "coo-int64", data)
    output = helper.make_tensor_value_info("a.out", TensorProto.FLOAT, array.shape)
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["a.out"])], "weights", [], [output])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, tmp_path / "model.onnx")
    assert sparse.indices.data_type == TensorProto.INT64
    assert_stored(tmp_path, {"a": array})


def brute_force_bytes(array: Array) -> dict[str, int]:
    """Return what each encoding takes, by writing it with onnx' own helpers and counting."""
    indices = np.flatnonzero(array)
    values = array.reshape(-1)[indices]
    varint = helper.make_tensor("", TensorProto.INT64, indices.shape, indices)
    return {
        "dense": len(array.tobytes()),
        "coo-varint": len(values.tobytes()) + sum(len(_varint(int(index))) for index in varint.int64_data),
        "coo-int32": len(values.tobytes()) + len(indices.astype(np.int32).tobytes()),
    }


def _varint(number: int) -> bytes:
    digits = []
    while number >= 128:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(8, 12), (64, 96), (256, 200)])  # indices of 1, up to 2 and up to 3 bytes
@pytest.mark.parametrize(("inline_limit", "sparse_encoding"), [(INLINE_LIMIT, "coo-varint"), (0, "coo-int32")])
def test_smallest_encoding_is_chosen(
    sparsity: float, shape: tuple[int, int], inline_limit: int, sparse_encoding: str, tmp_path: Path
) -> None:
    """Among dense and the sparse encoding of where the values lie; a matrix that gains nothing stays dense."""
    array = sparse_matrix(shape, sparsity)
    # A second matrix is surely sparse, so that inline_limit 0 is passed whatever becomes of the first.
    stored = write(tmp_path, {"a": array, "other": sparse_matrix((16, 16), 0.9)}, inline_limit=inline_limit)["a"]
    sizes = brute_force_bytes(array)
    expected = sparse_encoding if sizes[sparse_encoding] < sizes["dense"] else "dense"
    assert stored.encoding == expected
    assert stored.predicted_bytes == sizes[expected]
    assert 0 <= stored.bytes - stored.predicted_bytes <= FIELD_HEADERS
    if expected != "coo-varint":
        assert stored.bytes == stored.predicted_bytes
    assert read_back(tmp_path)["a"].tobytes() == array.tobytes()


def test_bytes_of_inline_matrices_are_the_growth_of_the_file(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    sizes = []
    for n in (1, 2, 3):
        folder = tmp_path / str(n)
        folder.mkdir()
        stored = write(folder, {name: sparse_matrix((200, 300), 0.7, seed=i) for i, name in enumerate(names[:n])})
        sizes.append((folder / "model.onnx").stat().st_size)
    # Around the numbers lie the node, the output, names, dims and types: some hundred bytes a matrix.
    assert sizes[1] - sizes[0] == pytest.approx(stored["b"].bytes, abs=200)
    assert sizes[2] - sizes[1] == pytest.approx(stored["c"].bytes, abs=200)


def test_vectors_are_dense_and_not_listed(tmp_path: Path) -> None:
    arrays = {"vector": np.zeros(64, np.float32), "matrix": sparse_matrix((64, 64), 0.9)}
    assert write(tmp_path, arrays).keys() == {"matrix"}
    assert_stored(tmp_path, arrays)


@pytest.mark.parametrize("inline_limit", [INLINE_LIMIT, 0])
def test_matrix_of_zeros_is_read_back(inline_limit: int, tmp_path: Path) -> None:
    arrays = {"zeros": np.zeros((16, 24), np.float32), "other": sparse_matrix((16, 24), 0.9)}
    stored = write(tmp_path, arrays, inline_limit=inline_limit)
    assert stored["zeros"].sparsity == 1.0
    assert_stored(tmp_path, arrays)


def test_data_begins_at_page_borders(tmp_path: Path) -> None:
    write(tmp_path, {"a": sparse_matrix((3, 5), 0.0), "b": sparse_matrix((32, 32), 0.9)}, inline_limit=0)
    graph = read_model(tmp_path).graph
    tensors = [*graph.initializer, graph.sparse_initializer[0].values, graph.sparse_initializer[0].indices]
    offsets = [int(entry.value) for tensor in tensors for entry in tensor.external_data if entry.key == "offset"]
    assert len(set(offsets)) == 3
    assert all(offset % 4096 == 0 for offset in offsets)


def test_checker_accepts_inline_sparse_initializers(tmp_path: Path) -> None:
    write(tmp_path, {"a": sparse_matrix((64, 96), 0.8), "b": sparse_matrix((64, 96), 0.1)})
    # Not full_check: shape inference of onnx 1.23 types it as a sparse tensor, which no operator takes.
    onnx.checker.check_model(tmp_path / "model.onnx")


def test_inline_limit_counts_all_matrices_together(tmp_path: Path) -> None:
    arrays = {name: sparse_matrix((64, 96), 0.8, seed=i) for i, name in enumerate("ab")}
    predicted = sum(matrix.predicted_bytes for matrix in write(tmp_path, arrays).values())
    for limit, encoding in ((predicted, "coo-varint"), (predicted - 1, "coo-int32")):
        assert {matrix.encoding for matrix in write(tmp_path, arrays, inline_limit=limit).values()} == {encoding}
        assert_stored(tmp_path, arrays)


def test_deepsparse_refuses_what_does_not_fit_inside_the_model(tmp_path: Path) -> None:
    with pytest.raises(OwlDeployError, match=r"do not fit inside model\.onnx \(100 bytes\).*export with weights dense"):
        write(tmp_path, {"a": sparse_matrix((64, 96), 0.8)}, target="deepsparse", inline_limit=100)


def test_deepsparse_dense_matrices_may_lie_outside_whatever_the_limit(tmp_path: Path) -> None:
    arrays = {"a": sparse_matrix((64, 96), 0.0)}
    assert write(tmp_path, arrays, target="deepsparse", inline_limit=0)["a"].encoding == "dense"
    assert_stored(tmp_path, arrays)


@pytest.mark.parametrize("inline_limit", [INLINE_LIMIT, 0])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_no_weight_is_in_memory_when_the_next_is_read(
    inline_limit: int, is_transposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive, most = initializers.read_weight, set[int](), 0

    def watched(*arguments: Any) -> Array:
        nonlocal most
        most = max(most, len(alive))
        array = read(*arguments)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        return array

    monkeypatch.setattr(initializers, "read_weight", watched)
    arrays = {f"{sparsity}": sparse_matrix((64, 96), sparsity) for sparsity in (0.0, 0.5, 0.7, 0.9, 1.0)}
    write(tmp_path, arrays, is_transposed=is_transposed, inline_limit=inline_limit)
    assert most == 0


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
        elements=st.just(0.0) | st.floats(width=32, allow_nan=False, allow_infinity=False),
        fill=st.just(0.0),
    ),
    is_transposed=st.booleans(),
    inline_limit=st.sampled_from([0, INLINE_LIMIT]),
)
def test_any_matrix_is_read_back(array: Array, is_transposed: bool, inline_limit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        stored = write(Path(name), {"a": array}, is_transposed=is_transposed, inline_limit=inline_limit)["a"]
        assert_stored(Path(name), {"a": np.ascontiguousarray(array.T) if is_transposed else array})
        assert stored.predicted_bytes <= array.nbytes
        assert 0 <= stored.bytes - stored.predicted_bytes <= FIELD_HEADERS


@pytest.mark.parametrize("limit", [INLINE_LIMIT, 0])
def test_logits_do_not_depend_on_where_weights_lie(limit: int, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    pruned = {
        name: torch.where(tensor.abs() < 0.2, 0.0, tensor) if tensor.ndim == 2 else tensor
        for name, tensor in _tensors(weights).items()
    }
    save_file(pruned, weights, metadata={"format": "pt"})
    logits = []
    for is_sparse in (False, True):
        kind = ExportSettings(weights="sparse-initializer" if is_sparse else "dense")
        artifact = export_onnx(
            str(folder), kind, out=tmp_path / str(is_sparse), threads=1, parity=False, inline_limit=limit
        )
        logits.append(_logits(artifact.path))
    encodings = {matrix["encoding"] for matrix in artifact.manifest["matrices"]}
    assert encodings == {"coo-int32" if limit == 0 else "coo-varint"}
    np.testing.assert_array_equal(logits[0], logits[1])


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(file.parent))
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def _logits(artifact: Path) -> Array:
    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((1, 2, 0, 16), np.float32)
    past = {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}
    tokens = np.arange(4, 24)[None]
    logits: Array = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **past})[0]
    return logits
