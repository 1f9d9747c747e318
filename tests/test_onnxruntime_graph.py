"""The lean graph in ONNX Runtime against torch's logits, and against the trace that optimum exports."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY
from numpy.typing import NDArray
from random_models import random_model, save
from transformers import AutoModelForCausalLM, PreTrainedModel

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.decoder import read_decoder
from owl_deploy.export.onnxruntime_graph import onnxruntime_graph
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

N_TOKENS = 24
# Logits of these models are around 1 to 10, and float32 sums in another order differ by about 1e-6.
TOLERANCE = 2e-5

# The worker's own session, which no type checker reads because it is Python 3.8.
Session: Any = importlib.import_module("owl_deploy.engines.worker.onnxruntime_session").OnnxRuntimeSession


def torch_logits(model: PreTrainedModel, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    return logits


def random_tokens(n: int = N_TOKENS, *, seed: int = 1) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(2, TINY["vocab_size"], n)


def relative_difference(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def chunked_logits(artifact: Path, tokens: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
    """Return logits (n, vocab) of a text fed in chunks through the cache that past and present share."""
    assert sum(lengths) == len(tokens)
    session = Session(str(artifact), 1, len(tokens), len(tokens))
    ends = np.cumsum(lengths)
    return np.concatenate(
        [session.forward(tokens[end - n : end], int(end - n)) for n, end in zip(lengths, ends, strict=True)]
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied": lambda: random_model("llama"),
    "llama-untied": lambda: random_model("llama", tie_word_embeddings=False),
    "llama-as-many-kv-heads": lambda: random_model("llama", num_key_value_heads=4),
    "llama-one-kv-head": lambda: random_model("llama", num_key_value_heads=1),
    "llama-wide-heads": lambda: random_model("llama", head_dim=32),
    "llama-attention-bias": lambda: random_model("llama", attention_bias=True),
    "llama-mlp-bias": lambda: random_model("llama", mlp_bias=True),
    "llama-one-block": lambda: random_model("llama", num_hidden_layers=1),
    "llama-other-theta-and-epsilon": lambda: random_model("llama", rope_theta=500.0, rms_norm_eps=0.05),
    "llama-rope-linear": lambda: random_model("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama-rope-llama3": lambda: random_model(
        "llama",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-rope-yarn": lambda: random_model(
        "llama", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    ),
    "mistral": lambda: random_model("mistral", sliding_window=None),
    "mistral-window-3": lambda: random_model("mistral", sliding_window=3),
    "mistral-window-8": lambda: random_model("mistral", sliding_window=8),
    "qwen2": lambda: random_model("qwen2"),
    "qwen2-window-5": lambda: random_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0),
}
CHUNKS = {"whole": [N_TOKENS], "two": [13, 11], "one by one": [1] * N_TOKENS, "prompt, then one by one": [9] + [1] * 15}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_torch_however_the_text_is_fed(name: str, tmp_path: Path) -> None:
    model, tokens = MODELS[name](), random_tokens()
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    expected = torch_logits(model, tokens)
    differences = {
        way: relative_difference(chunked_logits(artifact.path, tokens, lengths), expected)
        for way, lengths in CHUNKS.items()
    }
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("window", [1, 2, 7, N_TOKENS - 1])
def test_sliding_window_counts_the_same_positions_as_torch(window: int, tmp_path: Path) -> None:
    """One position more or less would show: torch with a window one longer is far off."""
    model, longer = (random_model("mistral", sliding_window=w, num_hidden_layers=1) for w in (window, window + 1))
    tokens = random_tokens()
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    expected = torch_logits(model, tokens)
    assert relative_difference(torch_logits(longer, tokens), expected) > 100 * TOLERANCE
    for lengths in CHUNKS.values():
        assert relative_difference(chunked_logits(artifact.path, tokens, lengths), expected) < TOLERANCE


def test_sliding_window_holds_on_texts_of_many_windows(tmp_path: Path) -> None:
    model, tokens = random_model("mistral", sliding_window=33), random_tokens(300)
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    expected = torch_logits(model, tokens)
    for lengths in ([300], [257] + [1] * 43):
        assert relative_difference(chunked_logits(artifact.path, tokens, lengths), expected) < TOLERANCE


def test_rows_of_a_batch_are_independent_and_padded_at_the_end(tmp_path: Path) -> None:
    model, lengths = random_model("llama"), (N_TOKENS, N_TOKENS - 7)
    artifact = export_onnx(str(save(model, tmp_path / "model")), out=tmp_path / "artifact", parity=False)
    rows = [random_tokens(n, seed=n) for n in lengths]
    shape = (2, N_TOKENS)
    input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], mask[i, : len(row)] = row, 1
    session = onnxruntime.InferenceSession(artifact.path / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((2, 2, 0, 16), np.float32)
    past = {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}
    logits = session.run(["logits"], {"input_ids": input_ids, "attention_mask": mask, **past})[0]
    for i, row in enumerate(rows):
        assert relative_difference(logits[i, : len(row)], torch_logits(model, row)) < TOLERANCE


def test_half_precision_checkpoint_is_exported_as_its_exact_float32(tmp_path: Path) -> None:
    folder = save(random_model("llama").bfloat16(), tmp_path / "model")
    artifact = export_onnx(str(folder), out=tmp_path / "artifact", parity=False)
    tokens = random_tokens()
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)
    assert relative_difference(chunked_logits(artifact.path, tokens, [N_TOKENS]), expected) < TOLERANCE


def test_plain_block_has_twelve_nodes_and_a_tied_head_lies_in_the_file_once(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "model")
    decoder = read_decoder(open_checkpoint(str(folder)), max_positions=64)
    (n_two, weights), (n_five, _) = (
        (len(model.graph.node), names)
        for model, names in (onnxruntime_graph(replace(decoder, blocks=decoder.blocks[:1] * n)) for n in (2, 5))
    )
    assert n_five - n_two == 3 * 12
    assert n_two - 2 * 12 <= 12
    assert [name for name in weights if "embed" in name or "head" in name] == ["model.embed_tokens.weight.transposed"]


@pytest.mark.parametrize("weights", ["dense", "sparse-initializer"])
def test_model_passes_the_onnx_checker_but_for_an_operator_it_does_not_know(weights: Any, tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[:, ::2] = 0
                parameter[:, 1::4] = 0
    settings = ExportSettings(weights=weights)
    artifact = export_onnx(str(save(model, tmp_path / "model")), settings, out=tmp_path / "artifact", parity=False)
    written = onnx.load_model(artifact.path / "model.onnx", load_external_data=False)
    assert len(written.graph.sparse_initializer) == (15 if weights == "sparse-initializer" else 0)
    unknown = [node for node in written.graph.node if node.op_type == "SimplifiedLayerNormalization"]
    assert len(unknown) == 1
    # ONNX Runtime keeps this operator of its own in the standard domain; elsewhere the checker lets it be.
    unknown[0].domain = "com.microsoft"
    checked = artifact.path / "checked.onnx"
    onnx.save_model(written, checked)
    onnx.checker.check_model(checked)


def test_onnxruntime_loads_without_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(random_model("qwen2", tie_word_embeddings=False), tmp_path / "model")
    artifact = export_onnx(str(folder), out=tmp_path / "artifact", parity=False)
    capfd.readouterr()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    onnxruntime.InferenceSession(artifact.path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "factor": 4.0,
                },
                "original_max_position_embeddings": 128,
            },
            "'longrope'",
        ),
        ({"head_dim": 24}, "head size 24"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save(random_model("llama", **changes), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=words):
        export_onnx(str(folder), out=tmp_path / "artifact", parity=False)
    assert not (tmp_path / "artifact").exists()


def test_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    model = random_model("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    checkpoint = open_checkpoint(str(save(model, tmp_path / "model")))
    for max_positions, windows in ((65, [None, 64]), (64, [None, None])):
        decoder = read_decoder(checkpoint, max_positions=max_positions)
        assert [block.sliding_window for block in decoder.blocks] == windows


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings(
    # optimum traces with TorchScript, which torch is about to drop and which warns of every Python branch.
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:Exporting aten.*:UserWarning",
)
def test_logits_equal_the_trace_of_optimum(family: str, tmp_path: Path) -> None:
    from optimum.exporters.onnx import main_export

    folder = save(random_model(family), tmp_path / "model")
    main_export(str(folder), output=tmp_path / "trace", task="text-generation-with-past", do_validation=False)
    trace = onnxruntime.InferenceSession(tmp_path / "trace" / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = random_tokens()
    empty = np.zeros((1, 2, 0, 16), np.float32)
    past = {entry.name: empty for entry in trace.get_inputs() if entry.name.startswith("past_key_values.")}
    expected = trace.run(
        ["logits"],
        {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, N_TOKENS), np.int64),
            "position_ids": np.arange(N_TOKENS)[None],
            **past,
        },
    )[0][0]
    artifact = export_onnx(str(folder), out=tmp_path / "artifact", parity=False)
    actual = chunked_logits(artifact.path, tokens, [N_TOKENS])
    assert relative_difference(actual, expected) < TOLERANCE
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).all()
