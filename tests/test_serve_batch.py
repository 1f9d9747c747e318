"""Rows of one batch against the checkpoint in torch, each row alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_models import random_model, save
from serving import tiny_artifact
from transformers import AutoModelForCausalLM

from owl_deploy.artifact import open_artifact
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings
from owl_deploy.serve.batch import DecoderBatch
from owl_deploy.serve.model import open_model

TEXTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 250, 20], [100], [30, 31]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("batch"))


def opened(folder: Path, *, n_rows: int = 4, capacity: int = 64) -> DecoderBatch:
    return DecoderBatch(open_artifact(folder), n_rows=n_rows, capacity=capacity, threads=1)


def reference(model: Path) -> Callable[[list[int]], NDArray[np.float32]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()

    def last_logits(tokens: list[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = loaded(torch.tensor([tokens])).logits[0, -1].float().numpy()
        return logits

    return last_logits


def assert_rows_agree(batch: DecoderBatch, expected: Callable[[list[int]], NDArray[np.float32]]) -> None:
    """Read four texts in chunks of different lengths, then decode them together."""
    texts = [list(text) for text in TEXTS]
    for row, text in enumerate(texts):
        cut = len(text) // 2
        if cut:
            batch.prefill(row, np.array(text[:cut]), 0)
        logits = batch.prefill(row, np.array(text[cut:]), cut)
        np.testing.assert_allclose(logits, expected(text), atol=2e-4)
    for step in range(5):
        for row, text in enumerate(texts):
            text.append(40 + 7 * step + row)
        logits = batch.decode(np.array([text[-1] for text in texts]), np.array([len(text) for text in texts]))
        for row, text in enumerate(texts):
            np.testing.assert_allclose(logits[row], expected(text), atol=2e-4)


def test_rows_of_different_lengths_decode_together_as_each_alone(artifact: Path) -> None:
    assert_rows_agree(opened(artifact), reference(artifact.parent / "model"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt", "phi3", "qwen3"])
def test_other_families_decode_together_too(tmp_path: Path, family: str) -> None:
    model = save(random_model(family), tmp_path / "model")
    settings = ExportSettings(target="onnxruntime", weights="dense")
    export_onnx(str(model), settings, out=tmp_path / "artifact", threads=1, parity=False)
    assert_rows_agree(opened(tmp_path / "artifact"), reference(model))


def test_moved_row_goes_on_where_it_was(artifact: Path) -> None:
    batch, expected = opened(artifact), reference(artifact.parent / "model")
    batch.prefill(3, np.array(TEXTS[1]), 0)
    batch.move(3, 0, len(TEXTS[1]))
    batch.prefill(3, np.array([1, 2, 3]), 0)
    logits = batch.decode(np.array([77]), np.array([len(TEXTS[1]) + 1]))
    np.testing.assert_allclose(logits[0], expected([*TEXTS[1], 77]), atol=2e-4)


def test_row_is_as_good_as_new_for_the_next_text(artifact: Path) -> None:
    batch, expected = opened(artifact), reference(artifact.parent / "model")
    batch.prefill(0, np.arange(10, 60), 0)
    np.testing.assert_allclose(batch.prefill(0, np.array([5, 6]), 0), expected([5, 6]), atol=2e-4)


def test_tokens_beyond_the_cache_are_a_programmers_mistake(artifact: Path) -> None:
    batch = opened(artifact, capacity=8)
    for row, n_tokens, past_len in ((0, 9, 0), (0, 1, 8), (4, 1, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            batch.prefill(row, np.zeros(n_tokens, np.int64), past_len)
    with pytest.raises(ValueError, match="do not fit"):
        batch.decode(np.zeros(1, np.int64), np.array([9]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"target": "deepsparse"}, "--target onnxruntime"), ({"graph": "traced"}, "one sequence at a time")],
)
def test_artifact_of_another_kind_is_refused(
    tmp_path: Path, artifact: Path, changes: dict[str, str], words: str
) -> None:
    manifest = json.loads((artifact / "owl.json").read_text())
    (tmp_path / "owl.json").write_text(json.dumps({**manifest, **changes}))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UnsupportedModelError, match=words):
        opened(tmp_path)


def test_cache_that_does_not_fit_is_refused_with_what_to_do(artifact: Path) -> None:
    with pytest.raises(OwlDeployError, match="lower --batch-size or --context-length"):
        opened(artifact, n_rows=10**6, capacity=10**6)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"eos_token_id": "x"}}', "[" * 10**5])
def test_damaged_configuration_is_refused(tmp_path: Path, artifact: Path, content: str) -> None:
    (tmp_path / "genai_config.json").write_text(content)
    (tmp_path / "owl.json").write_text((artifact / "owl.json").read_text())
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UnsupportedModelError, match="export the artifact again"):
        open_model(open_artifact(tmp_path), name=None, context_length=8)


@pytest.mark.parametrize("template", ["{% for", "{{ 1 +"])
def test_template_that_is_none_is_refused(tmp_path: Path, template: str) -> None:
    folder = tiny_artifact(tmp_path, template=template)
    with pytest.raises(UnsupportedModelError, match="chat template"):
        open_model(open_artifact(folder), name=None, context_length=8)


def test_template_reaches_nothing_of_python(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path, template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    model = open_model(open_artifact(folder), name=None, context_length=8)
    assert model.template is not None
    with pytest.raises(ValueError, match="refuses"):
        model.template.render([{"role": "user", "content": "hi"}])
