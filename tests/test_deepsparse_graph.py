"""The graph for DeepSparse: its form, and its logits in this environment's ONNX Runtime against torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from random_models import random_model, save
from test_onnxruntime_graph import (
    CHUNKS,
    MODELS,
    N_TOKENS,
    TOLERANCE,
    random_tokens,
    relative_difference,
    torch_logits,
)
from transformers import PreTrainedModel

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.export.decoder import Decoder, WeightSource, read_decoder
from owl_deploy.export.deepsparse_graph import deepsparse_graph
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

DEEPSPARSE = ExportSettings(target="deepsparse", weights="dense")


def exported(model: PreTrainedModel, folder: Path) -> Path:
    return export_onnx(str(save(model, folder / "model")), DEEPSPARSE, out=folder / "artifact", parity=False).path


def decoder_of(model: PreTrainedModel, folder: Path) -> Decoder:
    return read_decoder(open_checkpoint(str(save(model, folder))), max_positions=64)


def chunked_logits(
    artifact: Path, tokens: NDArray[np.int64], lengths: list[int], *, n_padding: int = 0
) -> NDArray[np.float32]:
    """Feed a text in chunks; `n_padding` positions of a cache that is not full lie in front, full of numbers."""
    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    n_kv_heads, head_dim = (session.get_inputs()[2].shape[axis] for axis in (1, 3))
    cache = {name: np.full((1, n_kv_heads, n_padding, head_dim), 7, np.float32) for name in names}
    logits, past_len = [], 0
    for n in lengths:
        column = np.arange(n_padding + past_len + n)
        is_visible = (column >= n_padding) & (column <= n_padding + past_len + np.arange(n)[:, None])
        found, *present = session.run(
            None,
            {
                "input_ids": tokens[None, past_len : past_len + n],
                "attention_mask": (column >= n_padding).astype(np.int64)[None],
                "positions": np.arange(past_len, past_len + n)[None],
                "causal_mask": is_visible.astype(np.int64)[None, None],
                **cache,
            },
        )
        cache = dict(zip(names, present, strict=True))
        logits.append(found[0])
        past_len += n
    return np.concatenate(logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_torch_however_the_text_is_fed(name: str, tmp_path: Path) -> None:
    model, tokens = MODELS[name](), random_tokens()
    artifact, expected = exported(model, tmp_path), torch_logits(model, tokens)
    differences = {
        way: relative_difference(chunked_logits(artifact, tokens, lengths), expected) for way, lengths in CHUNKS.items()
    }
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window-3"])
def test_padding_in_front_of_a_cache_that_is_not_full_changes_nothing(name: str, tmp_path: Path) -> None:
    model, tokens = MODELS[name](), random_tokens()
    artifact, expected = exported(model, tmp_path), torch_logits(model, tokens)
    for lengths in CHUNKS.values():
        actual = chunked_logits(artifact, tokens, lengths, n_padding=5)
        assert relative_difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("window", [1, 2, 7, N_TOKENS - 1])
def test_sliding_window_counts_the_same_positions_as_torch(window: int, tmp_path: Path) -> None:
    model, tokens = random_model("mistral", sliding_window=window, num_hidden_layers=1), random_tokens()
    artifact, expected = exported(model, tmp_path), torch_logits(model, tokens)
    for lengths in CHUNKS.values():
        assert relative_difference(chunked_logits(artifact, tokens, lengths), expected) < TOLERANCE


def test_format_is_one_that_onnxruntime_1_15_reads(tmp_path: Path) -> None:
    graph, _ = deepsparse_graph(decoder_of(random_model("mistral", sliding_window=3), tmp_path))
    assert graph.ir_version <= 9
    assert [(entry.domain, entry.version <= 19) for entry in graph.opset_import] == [("", True)]
    assert {node.domain for node in graph.graph.node} == {""}


def test_no_operator_is_used_on_which_deepsparse_aborts_or_gives_up(tmp_path: Path) -> None:
    graph, _ = deepsparse_graph(decoder_of(random_model("mistral", sliding_window=3), tmp_path))
    operators = {node.op_type for node in graph.graph.node}
    assert not operators & {"Cos", "Sin", "Expand", "Tile", "CumSum"}


def test_inputs_and_outputs_are_those_of_sparseml(tmp_path: Path) -> None:
    graph, _ = deepsparse_graph(decoder_of(random_model("llama"), tmp_path))
    caches = ["0.key", "0.value", "1.key", "1.value"]
    past = [f"past_key_values.{name}" for name in caches]
    assert [value.name for value in graph.graph.input] == [
        "input_ids",
        "attention_mask",
        *past,
        "positions",
        "causal_mask",
    ]
    assert [value.name for value in graph.graph.output] == ["logits", *(f"present.{name}" for name in caches)]


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2", "llama-mlp-bias"])
def test_every_weight_is_named_and_comes_from_a_tensor_of_its_shape(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save(MODELS[name](), tmp_path)))
    graph, weights = deepsparse_graph(read_decoder(checkpoint, max_positions=64))
    constants = {tensor.name for tensor in graph.graph.initializer}
    made = {output for node in graph.graph.node for output in node.output} | {entry.name for entry in graph.graph.input}
    read = {entry for node in graph.graph.node for entry in node.input}
    assert read - made - constants == set(weights)
    assert not constants & set(weights)
    assert {tensor for source in weights.values() for tensor in source.tensors} == set(checkpoint.tensors)
    assert all(initializer.endswith(".transposed") == source.is_transposed for initializer, source in weights.items())


def test_tied_head_is_read_as_it_lies_not_transposed_at_every_step(tmp_path: Path) -> None:
    graph, weights = deepsparse_graph(decoder_of(random_model("llama"), tmp_path))
    head = next(node for node in graph.graph.node if node.output[0] == "logits")
    assert head.op_type == "MatMul"
    assert weights[head.input[1]] == WeightSource(("model.embed_tokens.weight",), True)


@pytest.mark.parametrize("weights", ["dense", "sparse-initializer"])
def test_model_passes_the_onnx_checker(weights: Any, tmp_path: Path) -> None:
    settings = ExportSettings(target="deepsparse", weights=weights)
    folder = save(random_model("llama"), tmp_path / "model")
    artifact = export_onnx(str(folder), settings, out=tmp_path / "artifact", parity=False)
    onnx.checker.check_model(artifact.path / "model.onnx", full_check=True)
