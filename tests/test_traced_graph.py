"""Families without a lean graph: traced by optimum, against torch and transformers' own generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import call
from conftest import TINY, byte_tokenizer
from random_models import save
from test_onnxruntime_graph import random_tokens, relative_difference, torch_logits
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.engines.process import open_engine
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

TOLERANCE = 2e-5
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
FAMILIES: dict[str, Any] = {
    # Products that add their bias, a tied head, and learned positions.
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=260, n_positions=128)),
    # Rotates a quarter of a head; its block is parallel and its head not tied.
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)),
    # ALiBi, and no input for positions.
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=260)),
    # The head adds a bias.
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=64)),
    # Tensors have the names of Llama's, but what each block adds is scaled, and the logits are divided.
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**TINY, residual_multiplier=0.5, logits_scaling=3.0)),
}


def random_model(family: str, *, seed: int = 0) -> Any:
    """Return a seeded model in which no weight is left at 0 or 1."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5)
    return model


def export(model: Any, folder: Path, *, parity: bool = False, **settings: Any) -> OnnxArtifact:
    chosen = ExportSettings(max_positions=64, **settings)
    return export_onnx(str(save(model, folder / "model")), chosen, out=folder / "artifact", threads=1, parity=parity)


def logits_of(artifact: OnnxArtifact, tokens: Any, *, chunks: tuple[int, ...], **options: Any) -> Any:
    """Feed tokens in chunks, through the cache."""
    found, past_len = [], 0
    with open_engine(artifact, threads=1, n_tokens=max(chunks), capacity=64, **options) as engine:
        for n_tokens in chunks:
            found.append(engine.forward(tokens[past_len : past_len + n_tokens], past_len))
            past_len += n_tokens
    return np.concatenate(found)


@pytest.mark.parametrize("weights", ["dense", "sparse-operator"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_torch_whole_and_through_the_cache(family: str, weights: str, tmp_path: Path) -> None:
    model, tokens = random_model(family), random_tokens(24)
    artifact = export(model, tmp_path, weights=weights)
    expected = torch_logits(model, tokens)
    assert artifact.manifest["graph"] == "traced"
    for chunks in ((24,), (9, 1, 1, 13)):
        assert relative_difference(logits_of(artifact, tokens, chunks=chunks), expected) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "sparse-initializer"},
        {"weights": "sparse-operator", "precision": "int8"},
        {"precision": "fp16"},
        {"precision": "int8"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_every_kind_of_weights_passes_its_gate(settings: dict[str, Any], tmp_path: Path) -> None:
    artifact = export(random_model("gpt2"), tmp_path, parity=True, **settings)
    assert artifact.manifest["parity"]["passed"]


def test_logits_of_the_last_token_alone_equal_torch(tmp_path: Path) -> None:
    """Also where a bias is added to them, and they are divided."""
    for family in ("phi", "granite"):
        model, tokens = random_model(family), random_tokens(16)
        artifact = export(model, tmp_path / family)
        found = logits_of(artifact, tokens, chunks=(16,), last_logits_only=True)
        assert relative_difference(found, torch_logits(model, tokens)[-1:]) < TOLERANCE


def test_stepping_back_and_measuring_leave_the_cache_right(tmp_path: Path) -> None:
    model, tokens = random_model("gpt_neox"), random_tokens(24)
    expected = torch_logits(model, tokens)
    with open_engine(export(model, tmp_path), threads=1, n_tokens=8, capacity=32) as engine:
        for past_len in (0, 8, 16, 8):
            found = engine.forward(tokens[past_len : past_len + 8], past_len)
            assert relative_difference(found, expected[past_len : past_len + 8]) < TOLERANCE
            assert len(engine.measure(tokens[:1], past_len, 2)) == 2


def test_matrices_have_the_names_of_their_modules(tmp_path: Path) -> None:
    model = random_model("gpt_neox")
    artifact = export(model, tmp_path, weights="sparse-operator")
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = {matrix["name"].removesuffix(".packed") for matrix in artifact.manifest["matrices"]}
    assert names == linears | {"gpt_neox.embed_in.weight"}
    # The embedding gives one row a token.
    multiplied = [matrix for matrix in artifact.manifest["matrices"] if "embed_in" not in matrix["name"]]
    assert artifact.facts.bytes_per_decode_step["stored"] == sum(matrix["bytes"] for matrix in multiplied)


@pytest.mark.parametrize("weights", ["dense", "sparse-operator"])
def test_no_weight_is_turned_when_the_model_runs(weights: str, tmp_path: Path) -> None:
    """A tied head is the embedding turned around, in the trace at every step."""
    artifact = export(random_model("gpt2"), tmp_path, weights=weights)
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in constants]
    products = [node for node in model.graph.node if node.op_type == "SparseMatMul"]
    assert len(products) == (9 if weights == "sparse-operator" else 0)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_genai_generates_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    model: Any = random_model(family)
    artifact = export(model, tmp_path)
    prompt = byte_tokenizer()("An owl hunts")["input_ids"]
    inputs = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(inputs, eos_token_id=None, pad_token_id=0, **options)[0].tolist()
    opened = genai.Model(str(artifact.path))
    parameters = genai.GeneratorParams(opened)
    parameters.set_search_options(max_length=len(prompt) + 24)
    generator = genai.Generator(opened, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = list(generator.get_sequence(0))
    assert len(found) > len(prompt)
    assert found == expected[: len(found)]


def test_deepsparse_takes_lean_graphs_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no graph for model type 'gpt2' in target deepsparse: export take"):
        export(random_model("gpt2"), tmp_path, target="deepsparse")
    assert not (tmp_path / "artifact").exists()


def test_rotary_embedding_that_depends_on_the_length_is_refused(tmp_path: Path) -> None:
    config = StableLmConfig(**TINY, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="rope scaling 'dynamic' depends on the length of the text"):
        export(StableLmForCausalLM(config), tmp_path)


def test_family_that_optimum_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    config = XGLMConfig(vocab_size=260, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2)
    save(XGLMForCausalLM(config), tmp_path / "model")
    done = call("export", tmp_path / "model", "--out", tmp_path / "artifact", "--quiet")
    assert done.code == 1
    assert done.sentence.startswith("no graph for model type 'xglm': it has no lean one (those are llama, mistral,")
    assert "optimum cannot export it" in done.sentence
    assert not (tmp_path / "artifact").exists()
