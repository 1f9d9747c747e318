"""The tiny model in DeepSparse itself, run by the bridge environment's interpreter as the benches run it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model, save
from test_onnxruntime_graph import MODELS, random_tokens, relative_difference, torch_logits
from transformers import PreTrainedModel

import owl_deploy.engines
from owl_deploy.artifact import OnnxArtifact
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines.bridge import bridge_python, bridge_status
from owl_deploy.engines.process import EngineProcess, open_engine
from owl_deploy.errors import EngineFailedError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

pytestmark = [
    pytest.mark.deepsparse,
    pytest.mark.skipif(not bridge_status().is_available, reason=bridge_status().reason),
]

# DeepSparse sums in another order than torch and has an approximate exponential; its threads wait
# by spinning, so one call of these tiny models takes up to a second where cores are shared.
TOLERANCE = 1e-4
WORKER = Path(owl_deploy.engines.__path__[0]) / "worker"


def exported(model: PreTrainedModel, folder: Path, *, weights: Any = "dense") -> OnnxArtifact:
    settings = ExportSettings(target="deepsparse", weights=weights)
    return export_onnx(str(save(model, folder / "model")), settings, out=folder / "artifact", parity=False)


@contextmanager
def opened(artifact: OnnxArtifact, *, n_tokens: int, capacity: int) -> Iterator[EngineProcess]:
    with open_engine(artifact, threads=1, n_tokens=n_tokens, capacity=capacity, timeout_s=120) as engine:
        yield engine


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """Zero three quarters of every matrix, so that sparse initializers are the smaller form."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[:, ::2] = 0
                parameter[:, 1::4] = 0
    return model


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "llama-one-kv-head", "mistral-window-8"])
def test_decode_and_prefill_equal_torch(name: str, tmp_path: Path) -> None:
    model, tokens = MODELS[name](), random_tokens(64)
    artifact, expected = exported(model, tmp_path), torch_logits(model, tokens)
    for n_tokens in (1, 16):
        with opened(artifact, n_tokens=n_tokens, capacity=64) as engine:
            chunks = [engine.forward(tokens[i : i + n_tokens], i) for i in range(0, 64, n_tokens)]
        assert relative_difference(np.concatenate(chunks), expected) < TOLERANCE


def test_logits_of_the_last_token_alone_equal_torch(tmp_path: Path) -> None:
    model, tokens = random_model("llama"), random_tokens(16)
    artifact, expected = exported(model, tmp_path), torch_logits(model, tokens)
    with open_engine(artifact, threads=1, n_tokens=16, capacity=16, last_logits_only=True) as engine:
        assert relative_difference(engine.forward(tokens, 0), expected[-1:]) < TOLERANCE


@pytest.mark.parametrize("capacity", [65, 97])
def test_cache_inside_the_engine_is_right_up_to_its_capacity(capacity: int, tmp_path: Path) -> None:
    """Compiled for exactly that many positions, DeepSparse would forget the first ones from 65 on."""
    model, tokens = random_model("llama"), random_tokens(capacity)
    with opened(exported(model, tmp_path), n_tokens=1, capacity=capacity) as engine:
        logits = np.concatenate([engine.forward(tokens[i : i + 1], i) for i in range(capacity)])
    assert relative_difference(logits, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_stepping_back_starting_anew_and_measuring_leave_the_cache_right(n_tokens: int, tmp_path: Path) -> None:
    model, tokens = random_model("llama"), random_tokens(32)
    expected = torch_logits(model, tokens)
    with opened(exported(model, tmp_path), n_tokens=n_tokens, capacity=32) as engine:
        for past_len in (0, 8, 16, 16, 0):
            for i in range(past_len, past_len + 8, n_tokens):
                logits = engine.forward(tokens[i : i + n_tokens], i)
                assert relative_difference(logits, expected[i : i + n_tokens]) < TOLERANCE
        samples = engine.measure(tokens[8 : 8 + n_tokens], 8, 3)
        assert len(samples) == 3
        assert min(samples) > 0
        for i in range(8, 16, n_tokens):
            assert (
                relative_difference(engine.forward(tokens[i : i + n_tokens], i), expected[i : i + n_tokens]) < TOLERANCE
            )


def test_prompt_shorter_than_the_compiled_length_is_padded_out_of_sight(tmp_path: Path) -> None:
    model, tokens = random_model("llama"), random_tokens(11)
    with opened(exported(model, tmp_path), n_tokens=8, capacity=16) as engine:
        logits = np.concatenate([engine.forward(tokens[:8], 0), engine.forward(tokens[8:], 8)])
    assert relative_difference(logits, torch_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    ("n", "past_len", "words"), [(9, 0, "takes 1 to 8"), (8, 9, "does not fit"), (8, 8, "were seen")]
)
def test_impossible_call_is_refused_and_the_worker_lives_on(n: int, past_len: int, words: str, tmp_path: Path) -> None:
    with opened(exported(random_model("llama"), tmp_path), n_tokens=8, capacity=16) as engine:
        with pytest.raises(EngineFailedError, match=words):
            engine.forward(random_tokens(n), past_len)
        assert engine.forward(random_tokens(8), 0).shape == (8, 260)


def test_artifact_is_left_as_it_was(tmp_path: Path) -> None:
    """DeepSparse's own way of setting lengths writes them into the file."""
    artifact = exported(random_model("llama"), tmp_path)
    before = {path.name: path.read_bytes() for path in artifact.path.iterdir() if path.is_file()}
    with opened(artifact, n_tokens=1, capacity=8) as engine:
        engine.forward(random_tokens(1), 0)
    assert {path.name: path.read_bytes() for path in artifact.path.iterdir() if path.is_file()} == before


def test_sparse_initializers_run_and_sparseml_reads_the_same_weights(tmp_path: Path) -> None:
    model, tokens = halved(random_model("llama")), random_tokens(8)
    artifact = exported(model, tmp_path, weights="sparse-initializer")
    with opened(artifact, n_tokens=8, capacity=8) as engine:
        logits = engine.forward(tokens, 0)
        found = engine.ask("check-sparse", model=str(artifact.path / "model.onnx"))
    assert relative_difference(logits, torch_logits(model, tokens)) < TOLERANCE
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    name = "model.layers.1.mlp.down_proj.weight"
    weight = checkpoint.read(name).float().numpy().T
    assert found["linears"][f"{name}.transposed"] == {"sparsity": 0.75, "shape": list(weight.shape)}
    assert len(found["linears"]) == 15
    digest = hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()
    assert found["sha256"][f"{name}.transposed"] == digest


def test_worker_files_are_valid_python_3_8() -> None:
    """The bridge may be built with any Python from 3.8 on."""
    program = "import ast, sys; [ast.parse(open(f).read(), f, feature_version=(3, 8)) for f in sys.argv[1:]]"
    files = [str(WORKER / name) for name in ("deepsparse_session.py", "sparse_check.py")]
    subprocess.run([str(bridge_python()), "-c", program, *files], check=True)
