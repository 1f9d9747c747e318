"""The lean graph of every decoder family against torch: dense and packed in ONNX Runtime, and as for DeepSparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import test_deepsparse_graph
import test_onnxruntime_graph
import torch
from conftest import byte_tokenizer
from numpy.typing import NDArray
from random_models import random_model, save
from test_export import greedy_tokens
from test_onnxruntime_graph import N_TOKENS, TOLERANCE, random_tokens, relative_difference, torch_logits
from test_sparse_operator_export import needs_library
from transformers import PreTrainedModel

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines.bridge import bridge_status
from owl_deploy.engines.process import open_engine
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.decoder import Decoder, read_decoder
from owl_deploy.export.deepsparse_graph import deepsparse_graph
from owl_deploy.export.families import FAMILIES
from owl_deploy.export.onnxruntime_graph import onnxruntime_graph, sparse_operator_graph
from owl_deploy.export.writer import export_onnx
from owl_deploy.kernels import library_path
from owl_deploy.recipe import ExportSettings

LONGROPE: dict[str, Any] = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.3 * i for i in range(8)],
        "long_factor": [4.0 + i for i in range(8)],
    },
    "original_max_position_embeddings": 64,
}
CHUNKS = {"whole": [N_TOKENS], "prompt, then one by one": [9] + [1] * 15}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {}),
    "smollm3-window-6": ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    "qwen2-window-in-one-block": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-without-bias": ("qwen3", {"attention_bias": False}),
    "gemma": ("gemma", {}),
    "gemma-exact-gelu": ("gemma", {"hidden_act": "gelu", "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-rope-linear": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": ("phi3", {}),
    "phi3-half-rotary": (
        "phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    ),
    "phi3-longrope": ("phi3", LONGROPE),
    "opt": ("opt", {}),
    "opt-gelu-without-bias": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "llama-with-a-key-of-mistral": ("llama", {"sliding_window": 3}),
}
DIALECTS = {
    "dense": ExportSettings(max_positions=64),
    "sparse-operator": ExportSettings(weights="sparse-operator", max_positions=64),
    "deepsparse": ExportSettings(target="deepsparse", max_positions=64),
}


def decoder_of(model: PreTrainedModel, folder: Path, *, max_positions: int = 64) -> Decoder:
    return read_decoder(open_checkpoint(str(save(model, folder))), max_positions=max_positions)


def logits_in_onnxruntime(artifact: Path, tokens: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
    return test_onnxruntime_graph.chunked_logits(artifact, tokens, lengths)


def logits_with_the_operator(artifact: Path, tokens: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
    session = test_onnxruntime_graph.Session(str(artifact), 1, len(tokens), len(tokens), str(library_path()))
    ends = np.cumsum(lengths)
    return np.concatenate(
        [session.forward(tokens[end - n : end], int(end - n)) for n, end in zip(lengths, ends, strict=True)]
    )


def logits_behind_padding(artifact: Path, tokens: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
    return test_deepsparse_graph.chunked_logits(artifact, tokens, lengths, n_padding=3)


CHUNKED_LOGITS: dict[str, Callable[..., NDArray[np.float32]]] = {
    "dense": logits_in_onnxruntime,
    "sparse-operator": logits_with_the_operator,
    "deepsparse": logits_behind_padding,
}


@pytest.mark.parametrize("dialect", ["dense", pytest.param("sparse-operator", marks=needs_library), "deepsparse"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_torch_however_the_text_is_fed(name: str, dialect: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    model, tokens = random_model(family, sparsity=0.5, **changes), random_tokens()
    folder = save(model, tmp_path / "model")
    artifact = export_onnx(str(folder), DIALECTS[dialect], out=tmp_path / "artifact", parity=False)
    expected = torch_logits(model, tokens)
    differences = {
        way: relative_difference(CHUNKED_LOGITS[dialect](artifact.path, tokens, lengths), expected)
        for way, lengths in CHUNKS.items()
    }
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3", {"no_rope_layers": [0, 0, 1]}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma2", {"attn_logit_softcapping": 2.2}),
        ("gemma2", {"final_logit_softcapping": 6.2}),
        ("gemma2", {"query_pre_attn_scalar": 11}),
        ("gemma2", {"sliding_window": 6}),
        ("gemma2", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        ("gemma3_text", {"rope_local_base_freq": 55.0}),
        ("gemma3_text", {"rope_theta": 3300.0}),
        ("phi3", {"sliding_window": 8}),
        ("opt", {"activation_function": "gelu"}),
    ],
)
def test_what_is_compared_depends_on_what_makes_the_family(family: str, changes: dict[str, Any]) -> None:
    """Else a graph that leaves it out would pass too: the exact GELU is the closest to what it stands for."""
    tokens = random_tokens()
    expected, other = (torch_logits(random_model(family, **some), tokens) for some in ({}, changes))
    assert relative_difference(other, expected) > 5 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_artifact_passes_its_gate(family: str, tmp_path: Path) -> None:
    folder = save(random_model(family), tmp_path / "model")
    artifact = export_onnx(str(folder), out=tmp_path / "artifact", threads=1)
    assert artifact.manifest["model_type"] == family
    assert artifact.manifest["parity"]["passed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_genai_generates_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    model: Any = random_model(family)
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    prompt = byte_tokenizer()("An owl hunts")["input_ids"]
    inputs = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(inputs, **options)[0].tolist()
    assert len(expected) > len(prompt) + 5
    assert greedy_tokens(artifact.path, prompt, 40) == expected


@pytest.mark.deepsparse
@pytest.mark.slow
@pytest.mark.skipif(not bridge_status().is_available, reason=bridge_status().reason)
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "opt"])
def test_deepsparse_itself_computes_the_family(family: str, tmp_path: Path) -> None:
    """The engine that is opened refuses a graph of which it compiles a part only."""
    model, tokens = random_model(family), random_tokens(32)
    folder = save(model, tmp_path / "model")
    artifact = export_onnx(str(folder), DIALECTS["deepsparse"], out=tmp_path / "artifact", parity=False)
    for n_tokens in (1, 16):
        with open_engine(artifact, threads=1, n_tokens=n_tokens, capacity=32, timeout_s=120) as engine:
            chunks = [engine.forward(tokens[i : i + n_tokens], i) for i in range(0, 32, n_tokens)]
        assert relative_difference(np.concatenate(chunks), torch_logits(model, tokens)) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "dense", "packed"),
    [
        ("llama", {}, 12, 8),
        ("qwen2", {}, 11, 8),
        ("smollm3", {}, 12, 8),
        ("phi3", {}, 10, 8),
        ("opt", {}, 12, 8),
        ("gemma", {}, 12, 8),
        # What a block adds is normalised before it is added: two nodes more.
        ("gemma2", {}, 14, 10),
        # ONNX Runtime's GroupQueryAttention does not normalise heads on CPUs: query and key are each taken apart into
        # heads, normalised, and put together again. Ours does.
        ("qwen3", {"attention_bias": False}, 12 + 6, 8),
        ("gemma3_text", {}, 14 + 6, 10),
    ],
)
def test_block_has_no_more_nodes_than_the_family_needs(
    family: str, changes: dict[str, Any], dense: int, packed: int, tmp_path: Path
) -> None:
    decoder = decoder_of(random_model(family, **changes), tmp_path)
    few, many = (replace(decoder, blocks=decoder.blocks[:1] * n) for n in (2, 5))
    assert n_nodes(onnxruntime_graph(many)[0]) - n_nodes(onnxruntime_graph(few)[0]) == 3 * dense
    few_packed, many_packed = (
        sparse_operator_graph(one, precision="fp32", head_precision="fp32")[0] for one in (few, many)
    )
    assert n_nodes(many_packed) - n_nodes(few_packed) == 3 * packed


def n_nodes(model: onnx.ModelProto) -> int:
    return len(model.graph.node)


@pytest.mark.parametrize("write", [onnxruntime_graph, deepsparse_graph])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_has_its_place(family: str, write: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save(random_model(family), tmp_path)))
    graph, weights = write(read_decoder(checkpoint, max_positions=64))
    constants = {tensor.name for tensor in graph.graph.initializer}
    made = {output for node in graph.graph.node for output in node.output} | {entry.name for entry in graph.graph.input}
    read = {entry for node in graph.graph.node for entry in node.input if entry}
    assert read - made - constants == set(weights)
    used = [tensor for source in weights.values() for tensor in source.tensors]
    assert set(used) == set(checkpoint.tensors)


def test_norms_of_gemma_lie_in_the_file_as_one_plus_their_weight(tmp_path: Path) -> None:
    model = random_model("gemma2")
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    norms = [name for name in model.state_dict() if name.endswith("norm.weight")]
    assert len(norms) == 4 * 3 + 1
    stored = {tensor.name: tensor for tensor in onnx.load_model(artifact.path / "model.onnx").graph.initializer}
    for name in norms:
        expected = 1 + model.state_dict()[name].numpy()
        assert np.array_equal(onnx.numpy_helper.to_array(stored[name]), expected)


def test_rows_of_a_batch_padded_at_the_end_have_positions_of_their_own(tmp_path: Path) -> None:
    model, lengths = random_model("opt"), (N_TOKENS, N_TOKENS - 7)
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    rows = [random_tokens(n, seed=n) for n in lengths]
    input_ids, mask = np.zeros((2, N_TOKENS), np.int64), np.zeros((2, N_TOKENS), np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], mask[i, : len(row)] = row, 1
    session = onnxruntime.InferenceSession(artifact.path / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((2, 4, 0, 16), np.float32)
    past = {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}
    logits = session.run(["logits"], {"input_ids": input_ids, "attention_mask": mask, **past})[0]
    for i, row in enumerate(rows):
        assert relative_difference(logits[i, : len(row)], torch_logits(model, row)) < TOLERANCE


def test_learned_positions_count_as_gathered_not_as_multiplied(tmp_path: Path) -> None:
    folder = save(random_model("opt", tie_word_embeddings=False), tmp_path / "model")
    manifest = export_onnx(str(folder), out=tmp_path / "artifact", parity=False).manifest
    n_embedding, n_positions = 260 * 64, (512 + 2) * 64
    assert manifest["bytes_dense"] - manifest["bytes_per_decode_step"]["dense"] == 4 * (n_embedding + n_positions)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_queries_and_keys_keep_int8_in_int4_however_they_are_stacked(family: str, tmp_path: Path) -> None:
    decoder = decoder_of(random_model(family), tmp_path)
    _, _, packed = sparse_operator_graph(decoder, precision="int4", head_precision="int8")
    found = {name.rpartition(".")[2]: linear.precision for name, linear in packed.items() if ".layers.0." in name}
    stacked = "qkv_proj" if family == "phi3" else "q_k_v_proj"
    assert found == {stacked: "int8", "o_proj": "int4", "gate_up_proj": "int4", "down_proj": "int4"}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "opt with do_layer_norm_before False: export takes True"),
        ("opt", {"word_embed_proj_dim": 32}, "opt with word_embed_proj_dim 32: export takes 64"),
        ("opt", {"_remove_final_layer_norm": True}, "opt with _remove_final_layer_norm True: export takes False"),
        ("opt", {"activation_function": "tanh"}, "activation 'tanh'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True: export takes False"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0: export takes None"),
        ("phi3", LONGROPE, "'longrope' .* up to 64 positions: export with max_positions 64"),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types 'chunked_attention'"),
    ],
)
def test_variant_without_a_graph_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        decoder_of(random_model(family, **changes), tmp_path, max_positions=65)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, r"8 rotary values of a head of 16 \(partial_rotary_factor\)"),
        ("opt", {"hidden_size": 80, "word_embed_proj_dim": 80}, "head size 20"),
    ],
)
def test_heads_that_onnxruntime_does_not_take_are_for_deepsparse_only(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, tokens = random_model(family, **changes), random_tokens()
    folder = save(model, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=words):
        export_onnx(str(folder), DIALECTS["dense"], out=tmp_path / "artifact", parity=False)
    artifact = export_onnx(str(folder), DIALECTS["deepsparse"], out=tmp_path / "artifact", parity=False)
    actual = logits_behind_padding(artifact.path, tokens, [N_TOKENS])
    assert relative_difference(actual, torch_logits(model, tokens)) < TOLERANCE
