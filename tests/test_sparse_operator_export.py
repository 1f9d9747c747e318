"""Artifacts of packed matrices: their graph, their files, their manifest, and that they compute the checkpoint.

Most of it needs no operator library: products are checked with each SparseMatMul replaced by a
MatMul over the unpacked matrix. What runs the library itself is skipped where there is none.
"""

from __future__ import annotations

import importlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import call
from conftest import TINY, byte_tokenizer
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from random_models import random_model, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.bench.measure import Workload, _bytes_per_step
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines import process
from owl_deploy.engines.process import open_engine
from owl_deploy.errors import EngineUnavailableError, OwlDeployError, ParityError, RecipeError, UnsupportedModelError
from owl_deploy.evaluation import divergence
from owl_deploy.export import parity, writer
from owl_deploy.export.cost_model import MachineClass, choose_encoding
from owl_deploy.export.machine_class import class_of, this_machine_class
from owl_deploy.export.packing import PackedHeader, pack_matrix, unpack_matrix
from owl_deploy.export.parity import DIVERGENCE_LIMITS, MAX_RELATIVE_DIFFERENCE
from owl_deploy.export.writer import export_onnx
from owl_deploy.kernels import library_path
from owl_deploy.recipe import ArtifactSettings, ExportSettings, checked, recipe_from_mapping

Logits = NDArray[np.float32]
PRECISIONS = ("fp32", "fp16", "int8", "int4")
HEAD_PRECISION = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int8"}
VALUE_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
LIBRARY = "libowl_deploy_kernels.so"

# The worker's own session, which no type checker reads because it is Python 3.8.
Session: Any = importlib.import_module("owl_deploy.engines.worker.onnxruntime_session").OnnxRuntimeSession


def library_obstacle() -> str:
    """Return why there is no operator library, nothing where there is one."""
    try:
        library_path()
    except EngineUnavailableError as error:
        return str(error)
    return ""


needs_library = pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle())

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2-biases": ("qwen2", {"tie_word_embeddings": False}),
    "all-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
}
SPARSITY = 0.6


@pytest.fixture(scope="session")
def sparse_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of seeded models whose linears have 60 % zeros at random places, by their key in MODELS."""
    folder = tmp_path_factory.mktemp("sparse-operator")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            family, changes = MODELS[name]
            save(random_model(family, sparsity=SPARSITY, **changes), folder / name)
        return folder / name

    return make


SparseModel = Callable[[str], Path]


@pytest.fixture
def any_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let exports go on without an operator library: they only copy it."""
    library = tmp_path / "installed" / LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF")
    monkeypatch.setattr(writer, "library_path", lambda: library)
    return library


def export(model: Path, out: Path, *, check: bool = False, **settings: Any) -> OnnxArtifact:
    chosen = ExportSettings(weights="sparse-operator", **{"max_positions": 128, **settings})
    return export_onnx(str(model), chosen, out=out, threads=1, parity=check)


def graph_of(artifact: OnnxArtifact) -> onnx.GraphProto:
    return onnx.load_model(artifact.path / "model.onnx", load_external_data=False).graph


def place(tensor: TensorProto) -> tuple[int, int]:
    """Return where an external tensor begins in the data file, and its length."""
    assert tensor.data_location == TensorProto.EXTERNAL
    facts = {entry.key: entry.value for entry in tensor.external_data}
    assert facts["location"] == "model.onnx.data"
    return int(facts["offset"]), int(facts["length"])


def initializers(artifact: OnnxArtifact) -> dict[str, NDArray[Any]]:
    """Return every external initializer by the letter of onnx.proto."""
    content = (artifact.path / "model.onnx.data").read_bytes()
    found = {}
    for tensor in graph_of(artifact).initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        offset, length = place(tensor)
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        assert offset + length <= len(content)
        found[tensor.name] = np.frombuffer(content[offset : offset + length], kind).reshape(tensor.dims)
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def plain_session(artifact: OnnxArtifact) -> onnxruntime.InferenceSession:
    """Load an artifact with operators of ONNX Runtime in place of ours, and unpacked matrices."""
    model = onnx.load_model(artifact.path / "model.onnx", load_external_data=False)
    arrays = initializers(artifact)
    nodes, dense = [], []
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            nodes.append(plain_attention(node))
            continue
        if node.op_type == "GatedLinearUnit":
            nodes += plain_gated_unit(node)
            continue
        if node.op_type != "SparseMatMul":
            nodes.append(node)
            continue
        weight = unpack_matrix(arrays[node.input[1]])
        assert attributes(node) == {"N": weight.shape[0], "K": weight.shape[1]}
        dense.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"{node.input[1]}.dense"))
        product = f"{node.output[0]}.product" if len(node.input) == 3 else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], dense[-1].name], [product]))
        if len(node.input) == 3:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.endswith(".packed")]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *dense])
    path = artifact.path / "plain.onnx"
    onnx.save_model(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def plain_attention(node: onnx.NodeProto) -> onnx.NodeProto:
    stacked, past_key, past_value, lengths, total, *tables = node.input
    settings = attributes(node)
    del settings["epsilon"]  # of norms that none of these models has
    assert len(tables) == 2
    return helper.make_node(
        node.op_type,
        [stacked, "", "", past_key, past_value, lengths, total, *tables],
        node.output,
        domain="com.microsoft",
        do_rotary=1,
        **settings,
    )


def plain_gated_unit(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (output,) = node.output
    assert attributes(node) == {"activation": b"silu"}
    return [
        helper.make_node("Split", node.input, [f"{output}.gate", f"{output}.up"], axis=-1, num_outputs=2),
        helper.make_node("QuickGelu", [f"{output}.gate"], [f"{output}.silu"], domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", [f"{output}.silu", f"{output}.up"], [output]),
    ]


def plain_logits(artifact: OnnxArtifact, tokens: NDArray[np.int64]) -> Logits:
    session = plain_session(artifact)
    empty = np.zeros((1, TINY["num_key_value_heads"], 0, 16), np.float32)
    past = {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}
    inputs = {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
    logits: Logits = session.run(["logits"], inputs)[0][0]
    return logits


def torch_logits(model: Path, tokens: NDArray[np.int64]) -> Logits:
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model)
        logits: Logits = loaded(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    return logits


def random_tokens(n: int = 48) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(2, TINY["vocab_size"], n)


def relative_difference(actual: Logits, expected: Logits) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# The graph.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_product_is_the_operator_and_a_block_has_eight_nodes(
    name: str, precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    graph = graph_of(export(sparse_model(name), tmp_path / "artifact", precision=precision))
    products = [node for node in graph.node if node.op_type == "SparseMatMul"]
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Transpose", "Concat")]
    n_blocks = TINY["num_hidden_layers"]
    assert (
        len(products) == 4 * n_blocks + 1
    )  # query, key and value; attention's output; gate and up; down; and the head
    assert {node.domain for node in products} == {"owl_deploy"}
    norms = [i for i, node in enumerate(graph.node) if node.op_type.endswith("SimplifiedLayerNormalization")]
    assert norms[2] - norms[0] == norms[4] - norms[2] == 8
    n_stacked = 2 * TINY["intermediate_size"]
    hidden, n_key = TINY["hidden_size"], TINY["hidden_size"] // 2
    shapes = [(attributes(node)["N"], attributes(node)["K"]) for node in products]
    block = [(hidden + 2 * n_key, hidden), (hidden, hidden), (n_stacked, hidden), (hidden, n_stacked // 2)]
    assert shapes == [*block * n_blocks, (TINY["vocab_size"], hidden)]


def test_model_says_which_version_of_the_operators_it_needs(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact")
    model = onnx.load_model(artifact.path / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 21,
        "com.microsoft": 1,
        "owl_deploy": 1,
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_model_passes_the_onnx_checker_but_for_an_operator_it_does_not_know(
    precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("all-biases"), tmp_path / "artifact", precision=precision)
    model = onnx.load_model(artifact.path / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":  # ONNX Runtime keeps it in the standard domain
            node.domain = "com.microsoft"
    onnx.save_model(model, artifact.path / "checked.onnx")
    onnx.checker.check_model(artifact.path / "checked.onnx")


def test_attention_takes_query_key_and_value_as_one_input(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    graph = graph_of(export(sparse_model("qwen2-biases"), tmp_path / "artifact"))
    made_by = {output: node for node in graph.node for output in node.output}
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == TINY["num_hidden_layers"]
    for node in attention:
        assert node.domain == "owl_deploy"
        assert made_by[node.input[0]].op_type == "SparseMatMul"
        assert len(made_by[node.input[0]].input) == 3
        assert [name.partition(".")[0] for name in node.input[1:3]] == ["past_key_values"] * 2


@pytest.mark.parametrize("name", MODELS)
def test_packed_matrices_are_the_checkpoints_rows_one_below_the_other(
    name: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model(name), tmp_path / "artifact", encoding="bitmask")
    arrays = initializers(artifact)
    checkpoint = open_checkpoint(str(sparse_model(name)))

    def tensors(kind: str, *names: str) -> NDArray[np.float32]:
        return np.concatenate([checkpoint.read(f"{name}.{kind}").numpy() for name in names])

    for i in range(TINY["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for stack, parts in (
            (f"{attention}.q_k_v_proj", [f"{attention}.{part}_proj" for part in "qkv"]),
            (f"{attention}.o_proj", [f"{attention}.o_proj"]),
            (f"{mlp}.gate_up_proj", [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            (f"{mlp}.down_proj", [f"{mlp}.down_proj"]),
        ):
            np.testing.assert_array_equal(
                unpack_matrix(arrays[f"{stack}.weight.packed"]), tensors("weight", *parts), strict=True
            )
            has_bias = f"{parts[0]}.bias" in checkpoint.tensors
            assert has_bias == (f"{stack}.bias" in arrays)
            if has_bias:
                np.testing.assert_array_equal(arrays[f"{stack}.bias"], tensors("bias", *parts), strict=True)
    head = "model.embed_tokens" if "lm_head.weight" not in checkpoint.tensors else "lm_head"
    np.testing.assert_array_equal(unpack_matrix(arrays[f"{head}.weight.packed"]), tensors("weight", head))
    np.testing.assert_array_equal(arrays["model.embed_tokens.weight"], tensors("weight", "model.embed_tokens"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_graph_computes_the_checkpoint(
    name: str, precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    """Without the operators' own rounding of activations, and with the zeros multiplied."""
    model, tokens = sparse_model(name), random_tokens()
    actual = plain_logits(export(model, tmp_path / "artifact", precision=precision), tokens)
    expected = torch_logits(model, tokens)
    limits = {"fp32": 2e-5, "fp16": 1e-2, "int8": 0.1, "int4": 0.6}
    assert relative_difference(actual, expected) < limits[precision]
    assert divergence(expected, actual)[0] < {"fp32": 1e-8, "fp16": 1e-4, "int8": 0.01, "int4": 0.5}[precision]


@pytest.mark.parametrize("encoding", ["dense", "bitmask", "index16"])
def test_encoding_changes_no_logit_but_by_rounding(
    encoding: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    tokens = random_tokens()
    logits = plain_logits(export(sparse_model("tied"), tmp_path / "artifact", encoding=encoding), tokens)
    assert relative_difference(logits, torch_logits(sparse_model("tied"), tokens)) < 2e-5


# Head and embedding.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_head_lies_in_the_file_once(
    precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    model = sparse_model("tied")
    artifact = export(model, tmp_path / "artifact", precision=precision)
    tensors = {tensor.name: tensor for tensor in graph_of(artifact).initializer}
    arrays = initializers(artifact)
    whole = "model.embed_tokens.weight.packed"
    start, length = place(tensors[whole])
    views = [name for name in tensors if name.startswith("model.embed_tokens.") and name != whole]
    assert len(views) == (2 if precision in ("int8", "int4") else 1)
    for view in views:
        offset, n_bytes = place(tensors[view])
        assert start < offset < offset + n_bytes <= start + length
    header = PackedHeader.from_bytes(arrays[whole].tobytes())
    assert (header.precision, header.encoding, header.group) == (HEAD_PRECISION[precision], "dense", 0)
    rows = arrays["model.embed_tokens.weight"].astype(np.float32)
    if len(views) == 2:
        assert arrays["model.embed_tokens.weight"].dtype == np.int8
        rows *= arrays["model.embed_tokens.weight.row_scales"]
    np.testing.assert_array_equal(rows, unpack_matrix(arrays[whole]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_untied_embedding_is_stored_beside_the_head(
    precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    model = sparse_model("untied")
    artifact = export(model, tmp_path / "artifact", precision=precision)
    arrays = initializers(artifact)
    rows = arrays["model.embed_tokens.weight"].astype(np.float32)
    if precision in ("int8", "int4"):
        rows *= arrays["model.embed_tokens.weight.row_scales"]
    checkpoint = open_checkpoint(str(model))
    embedding, head = (checkpoint.read(f"{name}.weight").numpy() for name in ("model.embed_tokens", "lm_head"))
    step = np.abs(embedding).max(axis=1, keepdims=True) / 127
    tolerance = {"fp32": 0.0, "fp16": step / 16, "int8": step, "int4": step}[precision]
    assert (np.abs(rows - embedding) <= tolerance).all()
    packed_head = unpack_matrix(arrays["lm_head.weight.packed"])
    assert np.abs(packed_head - head).max() <= (0.0 if precision == "fp32" else 0.02)
    assert "model.embed_tokens.weight.packed" not in arrays


@pytest.mark.parametrize("head_precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_head_has_a_precision_of_its_own(
    precision: str, head_precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "a", precision=precision, head_precision=head_precision)
    precisions = {matrix["name"]: matrix["precision"] for matrix in artifact.manifest["matrices"]}
    assert precisions.pop("model.embed_tokens.weight.packed") == head_precision
    # int4 keeps queries, keys and values in int8.
    attention = {value for name, value in precisions.items() if "q_k_v" in name}
    assert attention == {"int8" if precision == "int4" else precision}
    assert {value for name, value in precisions.items() if "q_k_v" not in name} == {precision}
    assert artifact.manifest["settings"]["head_precision"] == head_precision
    packed = initializers(artifact)["model.embed_tokens.weight.packed"]
    assert PackedHeader.from_bytes(packed.tobytes()).precision == head_precision


# Files and manifest.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["tied", "untied", "qwen2-biases"])
def test_manifest_agrees_with_the_files_and_the_model(
    name: str, precision: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    model = sparse_model(name)
    artifact = export(model, tmp_path / "artifact", precision=precision)
    manifest, facts = artifact.manifest, artifact.facts
    loaded = AutoModelForCausalLM.from_pretrained(model)
    linears = [module.weight for module in loaded.modules() if isinstance(module, torch.nn.Linear)]
    packed = {key: array for key, array in initializers(artifact).items() if key.endswith(".packed")}

    files = [item for item in artifact.path.iterdir() if item.name != "owl.json"]
    assert manifest["bytes_on_disk"] == sum(item.stat().st_size for item in files)
    assert facts.bytes_per_decode_step == {
        "dense": 4 * sum(weight.numel() for weight in linears),
        "nonzero": 4 * sum(int(weight.count_nonzero()) for weight in linears),
        "stored": sum(len(array) for array in packed.values()),
    }
    n_elements = sum(weight.numel() for weight in loaded.parameters() if weight.ndim == 2)
    assert facts.bytes_dense == 4 * n_elements

    is_untied = name != "tied"
    matrices = {matrix["name"]: matrix for matrix in manifest["matrices"]}
    assert matrices.keys() == packed.keys() | ({"model.embed_tokens.weight"} if is_untied else set())
    for key, array in packed.items():
        matrix, header = matrices[key], PackedHeader.from_bytes(array.tobytes())
        assert matrix["bytes"] == header.total_bytes == len(array)
        assert matrix["shape"] == list(header.shape)
        assert matrix["encoding"] == f"packed-{header.encoding}"
        assert matrix["precision"] == header.precision
        assert 0 <= matrix["bytes"] - matrix["predicted_bytes"] < 10 * header.shape[0]
        assert matrix["sparsity"] == pytest.approx(SPARSITY if ".layers." in key else 0.0, abs=0.03)
    assert (facts.weights, facts.precision) == ("sparse-operator", precision)
    assert (manifest["settings"]["encoding"], manifest["settings"]["machine"]) == ("auto", this_machine_class())


def test_bench_counts_the_bytes_that_are_stored(sparse_model: SparseModel, any_library: Path, tmp_path: Path) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact", precision="int8")
    stored = artifact.facts.bytes_per_decode_step["stored"]
    assert _bytes_per_step(artifact, Workload("decode", 1, 16, 1)) == stored + artifact.kv_bytes(16)
    plain = export_onnx(str(sparse_model("tied")), out=tmp_path / "plain", threads=1, parity=False)
    dense = plain.facts.bytes_per_decode_step["dense"]
    assert _bytes_per_step(plain, Workload("decode", 1, 16, 1)) == dense + plain.kv_bytes(16)


def test_fewer_bits_take_fewer_bytes(sparse_model: SparseModel, any_library: Path, tmp_path: Path) -> None:
    sizes = [
        sum(
            matrix["bytes"]
            for matrix in export(sparse_model("tied"), tmp_path / precision, precision=precision).manifest["matrices"]
        )
        for precision in PRECISIONS
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_packed_matrices_begin_at_page_borders(sparse_model: SparseModel, any_library: Path, tmp_path: Path) -> None:
    graph = graph_of(export(sparse_model("all-biases"), tmp_path / "artifact", precision="int8"))
    packed = [tensor for tensor in graph.initializer if tensor.name.endswith(".packed")]
    assert len(packed) == 9
    assert all(place(tensor)[0] % 4096 == 0 for tensor in packed)
    assert all(place(tensor)[0] % 64 == 0 for tensor in graph.initializer if tensor.external_data)


@pytest.mark.parametrize("encoding", ["dense", "bitmask", "index16"])
def test_encoding_that_was_asked_for_is_used(
    encoding: str, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact", encoding=encoding)
    encodings = {matrix["name"]: matrix["encoding"] for matrix in artifact.manifest["matrices"]}
    assert encodings.pop("model.embed_tokens.weight.packed") == "packed-dense"
    assert set(encodings.values()) == {f"packed-{encoding}"}


@pytest.mark.parametrize("machine", get_args(MachineClass))
def test_auto_asks_the_cost_model_of_the_named_machine_class(
    machine: Any, sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("untied"), tmp_path / "artifact", precision="int8", machine=machine)
    assert artifact.manifest["settings"]["machine"] == machine
    for matrix in artifact.manifest["matrices"]:
        if matrix["name"] != "model.embed_tokens.weight":  # which is gathered, so dense
            n_elements = matrix["shape"][0] * matrix["shape"][1]
            n_nonzeros = round((1 - matrix["sparsity"]) * n_elements)
            chosen = choose_encoding(tuple(matrix["shape"]), n_nonzeros, "int8", machine_class=machine)
            assert matrix["encoding"] == f"packed-{chosen}"


def test_export_is_the_same_every_time(sparse_model: SparseModel, any_library: Path, tmp_path: Path) -> None:
    folders = [export(sparse_model("tied"), tmp_path / name, precision="int4").path for name in "ab"]
    names = sorted(item.name for item in folders[0].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_no_packed_matrix_is_in_memory_when_the_next_is_read(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = set[int](), 0

    def watched(*arguments: Any, **options: Any) -> NDArray[np.uint8]:
        nonlocal most
        most = max(most, len(alive))
        array = pack_matrix(*arguments, **options)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        return array

    monkeypatch.setattr("owl_deploy.export.packed_initializers.pack_matrix", watched)
    export(sparse_model("all-biases"), tmp_path / "artifact")
    assert most == 0


def test_operator_library_lies_in_the_folder_and_genai_is_told(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact")
    assert (artifact.path / LIBRARY).read_bytes() == any_library.read_bytes()
    genai = json.loads((artifact.path / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY
    plain = export_onnx(str(sparse_model("tied")), out=tmp_path / "plain", threads=1, parity=False)
    genai = json.loads((plain.path / "genai_config.json").read_text())
    assert "custom_ops_library" not in genai["model"]["decoder"]["session_options"]
    assert not (plain.path / LIBRARY).exists()


# Refusals.


def no_library() -> Path:
    raise EngineUnavailableError("no operator library for this machine: build it")


def test_export_without_an_operator_library_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "library_path", no_library)
    result = call("export", tmp_path / "no-such-model", "--weights", "sparse-operator", "--out", tmp_path / "artifact")
    assert result.code == 4
    assert result.sentence == "no operator library for this machine: build it"
    assert list(tmp_path.iterdir()) == []


def test_engine_without_an_operator_library_is_unavailable(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact")
    monkeypatch.setattr(process, "library_path", no_library)
    with (
        pytest.raises(EngineUnavailableError, match="no operator library for this machine"),
        open_engine(artifact, threads=1, n_tokens=1, capacity=4),
    ):
        pass


def test_engine_is_given_the_installed_library_never_the_artifacts(
    sparse_model: SparseModel, any_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact")
    asked: list[dict[str, Any]] = []

    def ask(self: process.EngineProcess, command: str, **arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {"version": "", "load_ms": 0.0}

    monkeypatch.setattr(process.EngineProcess, "ask", ask)
    monkeypatch.setattr(process, "library_path", lambda: any_library)
    plain = export_onnx(str(sparse_model("tied")), out=tmp_path / "plain", threads=1, parity=False)
    for opened in (artifact, plain):
        with open_engine(opened, threads=1, n_tokens=1, capacity=4):
            pass
    assert [arguments["operators"] for arguments in asked] == [str(any_library), None]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"precision": "int8", "weights": "sparse-initializer"},
            "precision int8 needs weights sparse-operator, or dense in target onnxruntime, got weights "
            "sparse-initializer",
        ),
        (
            {"precision": "fp16", "target": "deepsparse"},
            "precision fp16 needs weights sparse-operator, or dense in target onnxruntime, got weights dense",
        ),
        ({"encoding": "bitmask"}, "encoding bitmask needs weights sparse-operator, got weights dense"),
        (
            {"head_precision": "int8"},
            "head_precision int8 needs weights sparse-operator, or dense in int8 or int4, got weights dense",
        ),
        ({"machine": "arm-neon"}, "machine arm-neon needs weights sparse-operator, got weights dense"),
        (
            {"weights": "sparse-operator", "target": "deepsparse"},
            "weights sparse-operator runs in target onnxruntime only, got target deepsparse",
        ),
        (
            {"weights": "sparse-operator", "precision": "int4", "encoding": "index16"},
            "encoding index16 holds no int4 values: choose bitmask, dense or auto",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        checked(ExportSettings, settings, where="command line")
    assert str(caught.value) == f"command line: {sentence}"
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"model": "x", "export": [{"name": "a"}, {"name": "b", **settings}]}, where="r.yaml")
    assert str(caught.value) == f"r.yaml: export.1: {sentence}"


def test_flags_are_the_recipe_keys(tmp_path: Path) -> None:
    result = call("export", "x", "--encoding", "bitmask", "--out", tmp_path / "artifact")
    assert result.code == 2
    assert result.sentence == "command line: encoding bitmask needs weights sparse-operator, got weights dense"
    text = call("export", "--help").stdout
    assert all(flag in text for flag in ("--precision", "--head-precision", "--encoding", "--machine"))


def test_recipe_names_an_artifact_of_the_operator() -> None:
    recipe = recipe_from_mapping(
        {"model": "x", "export": [{"name": "fast", "weights": "sparse-operator", "precision": "int4"}]}
    )
    assert recipe.export == (ArtifactSettings(name="fast", weights="sparse-operator", precision="int4"),)
    assert recipe_from_mapping(recipe.model_dump(mode="json")) == recipe


def test_machine_classes_are_those_of_the_cost_model() -> None:
    names = get_args(ExportSettings.model_fields["machine"].annotation)
    assert names == ("auto", *get_args(MachineClass))


@pytest.mark.parametrize(
    ("architecture", "features", "expected"),
    [
        ("x86_64", "sse2", "portable"),
        ("x86_64", "avx2 fma f16c bmi1 bmi2 popcnt", "x86-avx2"),
        ("x86_64", "avx2 fma f16c bmi1 bmi2 popcnt avx512f avx512bw avx512vl avx512dq", "x86-avx2"),
        (
            "x86_64",
            "avx2 fma f16c bmi1 bmi2 popcnt avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vbmi2 avx512_vnni "
            "avx512_bitalg avx512_vpopcntdq",
            "x86-avx512-vbmi2",
        ),
        ("aarch64", "fp asimd asimddp", "arm-neon"),
        ("aarch64", "fp asimd", "portable"),
        ("riscv64", "", "portable"),
    ],
)
def test_machine_class_follows_from_the_processors_features(architecture: str, features: str, expected: str) -> None:
    assert class_of(architecture, set(features.split())) == expected


def test_rows_that_do_not_lie_side_by_side_are_refused(any_library: Path, tmp_path: Path) -> None:
    """A hidden size of 36: int8 rows of 36 bytes are padded to 40 where they are packed."""
    config = LlamaConfig(**{**TINY, "hidden_size": 36, "head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"hidden size 36: .* multiple of 8 bytes"):
        export(tmp_path / "model", tmp_path / "artifact", precision="int8")
    assert not (tmp_path / "artifact").exists()
    assert export(tmp_path / "model", tmp_path / "artifact", precision="fp16").path.is_dir()


def test_tensor_without_a_place_in_the_graph_is_refused(any_library: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.q_norm.weight": torch.ones(16)}, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"no place in the graph for tensor .*q_norm"):
        export(tmp_path / "model", tmp_path / "artifact")


def test_weight_that_overflows_names_its_matrix(any_library: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 1e6
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(OwlDeployError, match=r"^model\.layers\.1\.mlp\.down_proj: .*overflow"):
        export(tmp_path / "model", tmp_path / "artifact", precision="fp16")
    assert not (tmp_path / "artifact").exists()


# The gate.


def noisy(expected: Logits, noise: float) -> Logits:
    change = np.random.default_rng(1).normal(scale=noise, size=expected.shape)
    return (expected + change).astype(np.float32)


@pytest.mark.parametrize("precision", sorted(DIVERGENCE_LIMITS))
def test_gate_of_few_bits_is_a_limit_on_the_distribution(precision: str) -> None:
    expected = np.random.default_rng(0).normal(scale=3, size=(200, 50)).astype(np.float32)
    scales = np.geomspace(1e-4, 3, 40)
    limit, n_passed = DIVERGENCE_LIMITS[precision], 0
    for scale in scales:
        actual = noisy(expected, scale)
        kl, top1 = divergence(expected, actual)
        relative = np.abs(actual - expected).max() / np.abs(expected).max()
        is_good = kl <= limit.kl_divergence and top1 >= limit.top1_agreement
        if is_good and relative <= MAX_RELATIVE_DIFFERENCE[precision]:
            assert parity._compare_logits("name", precision, expected, actual).kl_divergence == kl
            n_passed += 1
        else:
            with pytest.raises(ParityError, match=r"name: (KL divergence|the most likely token|logits differ)"):
                parity._compare_logits("name", precision, expected, actual)
    assert 0 < n_passed < len(scales)


def test_limits_grow_with_fewer_bits() -> None:
    assert list(MAX_RELATIVE_DIFFERENCE) == list(PRECISIONS)
    assert list(MAX_RELATIVE_DIFFERENCE.values()) == sorted(MAX_RELATIVE_DIFFERENCE.values())
    assert list(DIVERGENCE_LIMITS) == list(PRECISIONS[1:])
    kl = [limit.kl_divergence for limit in DIVERGENCE_LIMITS.values()]
    assert kl == sorted(kl)
    for limits in DIVERGENCE_LIMITS.values():
        assert 1 > limits.top1_agreement > limits.greedy_agreement > 0


# The operator library itself.


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_artifact_passes_the_gate_in_onnxruntime(
    name: str, precision: str, sparse_model: SparseModel, tmp_path: Path
) -> None:
    artifact = export(sparse_model(name), tmp_path / "artifact", precision=precision, check=True)
    facts = artifact.manifest["parity"]
    assert facts["passed"]
    assert facts["n_tokens"] == 128
    if precision == "fp32":
        assert facts["relative_logit_difference"] < 1e-4
        assert facts["n_greedy_tokens"] == 64


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoding", ["auto", "dense", "bitmask", "index16"])
def test_operator_computes_what_the_packed_matrices_mean(
    encoding: str, precision: str, sparse_model: SparseModel, tmp_path: Path
) -> None:
    """Against the same artifact with plain products: only the rounding of activations may differ."""
    if (encoding, precision) == ("index16", "int4"):
        return  # the format has no such matrix
    artifact = export(sparse_model("all-biases"), tmp_path / "artifact", precision=precision, encoding=encoding)
    tokens = random_tokens()
    expected = plain_logits(artifact, tokens)
    limit = 2e-5 if precision in ("fp32", "fp16") else 0.1
    for lengths in ([48], [30, 18], [1] * 48):
        session = Session(str(artifact.path), 1, 48, 48, operators=str(library_path()))
        ends = np.cumsum(lengths)
        chunks = [session.forward(tokens[end - n : end], int(end - n)) for n, end in zip(lengths, ends, strict=True)]
        assert relative_difference(np.concatenate(chunks), expected) < limit


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_loads_without_a_warning(
    precision: str, sparse_model: SparseModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = export(sparse_model("all-biases"), tmp_path / "artifact", precision=precision)
    capfd.readouterr()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    options.register_custom_ops_library(str(library_path()))
    onnxruntime.InferenceSession(artifact.path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@needs_library
def test_library_in_the_artifact_is_never_loaded_by_our_engine(sparse_model: SparseModel, tmp_path: Path) -> None:
    artifact = export(sparse_model("tied"), tmp_path / "artifact")
    (artifact.path / LIBRARY).write_bytes(b"not a library")
    with open_engine(artifact, threads=1, n_tokens=1, capacity=4) as engine:
        assert engine.forward(np.array([5]), 0).shape == (1, TINY["vocab_size"])


@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["tied", "untied", "qwen2-biases"])
def test_genai_generates_what_our_engine_computes(
    name: str, precision: str, sparse_model: SparseModel, tmp_path: Path
) -> None:
    """From a copy of the folder, without its manifest: nothing outside of the model's files is needed."""
    import onnxruntime_genai as genai

    artifact = export(sparse_model(name), tmp_path / "artifact", precision=precision)
    copy = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    (copy / "owl.json").unlink()
    prompt = byte_tokenizer()("An owl hunts")["input_ids"]
    model = genai.Model(str(copy))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 30)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0).astype(np.int64)
    assert len(tokens) > len(prompt) + 5

    with open_engine(open_artifact(artifact.path), threads=1, n_tokens=len(tokens), capacity=len(tokens)) as engine:
        logits = engine.forward(tokens[: len(prompt)], 0)[-1:]
        for position in range(len(prompt), len(tokens)):
            assert logits[0, tokens[position]] >= logits.max() - 1e-4 * np.abs(logits).max()
            logits = engine.forward(tokens[position : position + 1], position)
