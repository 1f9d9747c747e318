"""The parity gate: an artifact that computes something else does not come to be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from command_line import call
from conftest import save_tiny_model
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import EngineFailedError, ParityError
from owl_deploy.export import parity, writer
from owl_deploy.export.decoder import Decoder
from owl_deploy.export.onnxruntime_graph import onnxruntime_graph
from owl_deploy.export.parity import MAX_RELATIVE_DIFFERENCE, check_parity
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

Logits = NDArray[np.float32]


def unchecked(model: Path, out: Path, **settings: Any) -> OnnxArtifact:
    return export_onnx(str(model), ExportSettings(**settings), out=out, threads=1, parity=False)


def check(artifact: OnnxArtifact, model: Path) -> parity.Parity:
    return check_parity(artifact, open_checkpoint(str(model)), threads=1)


def change_first_weight_(artifact: OnnxArtifact, initializer: str, change: float) -> None:
    """Add `change` to element (0, 0) of a dense initializer, in the data file."""
    model = onnx.load_model(artifact.path / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == initializer)
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data = np.memmap(artifact.path / "model.onnx.data", dtype=np.float32, mode="r+", offset=offset, shape=(1,))
    data[0] += change
    data.flush()


def random_logits(n: int = 5, vocab_size: int = 7, *, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(size=(n, vocab_size)).astype(np.float32)


def compare(expected: Logits, actual: Logits) -> parity.Parity:
    return parity._compare_logits("name", "fp32", expected, actual)


def test_every_precision_that_can_be_asked_for_has_a_limit() -> None:
    assert MAX_RELATIVE_DIFFERENCE.keys() == set(get_args(ExportSettings.model_fields["precision"].annotation))
    assert all(0 < limit < 1 for limit in MAX_RELATIVE_DIFFERENCE.values())


def test_faithful_artifact_passes_and_the_facts_say_on_what(tiny_model: Path, tmp_path: Path) -> None:
    result = check(unchecked(tiny_model, tmp_path / "artifact"), tiny_model)
    assert result.passed
    assert (result.n_tokens, result.n_greedy_tokens) == (512, 64)
    assert result.relative_logit_difference < 1e-5
    assert result.top1_agreement == 1.0
    assert abs(result.kl_divergence) < 1e-6
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


@pytest.mark.parametrize(("max_positions", "n_tokens", "n_greedy"), [(16, 16, 11), (96, 96, 64), (90, 90, 60)])
def test_artifact_of_short_context_is_compared_on_what_fits(
    max_positions: int, n_tokens: int, n_greedy: int, tiny_model: Path, tmp_path: Path
) -> None:
    result = check(unchecked(tiny_model, tmp_path / "artifact", max_positions=max_positions), tiny_model)
    assert (result.n_tokens, result.n_greedy_tokens) == (n_tokens, n_greedy)


@pytest.mark.parametrize(
    "initializer",
    ["model.layers.1.mlp.down_proj.weight.transposed", "model.layers.0.self_attn.k_proj.weight.transposed"],
)
def test_one_changed_weight_fails_and_the_worst_place_is_named(
    initializer: str, tiny_model: Path, tmp_path: Path
) -> None:
    artifact = unchecked(tiny_model, tmp_path / "artifact")
    change_first_weight_(artifact, initializer, 0.5)
    with pytest.raises(ParityError) as caught:
        check(artifact, tiny_model)
    assert re.match(
        r"artifact: logits differ from the checkpoint by \S+ of the largest one \(allowed 0\.001\); "
        r"furthest at position \d+, token \d+: \S+ instead of \S+$",
        str(caught.value),
    )


def test_artifact_of_another_checkpoint_fails(tiny_model: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ParityError, match="logits differ"):
        check(unchecked(tiny_model, tmp_path / "artifact"), other)


def test_artifact_that_does_not_load_is_an_engine_failure(tiny_model: Path, tmp_path: Path) -> None:
    artifact = unchecked(tiny_model, tmp_path / "artifact")
    (artifact.path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(EngineFailedError, match="onnxruntime failed at load"):
        check(artifact, tiny_model)


def test_model_whose_logits_are_all_zero_passes(tiny_model: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros_like(tensors["model.norm.weight"])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = check(unchecked(model, tmp_path / "artifact"), model)
    assert result.max_abs_logit_difference == result.relative_logit_difference == 0.0


def test_limit_is_a_share_of_the_largest_reference_logit() -> None:
    expected = random_logits()
    limit = MAX_RELATIVE_DIFFERENCE["fp32"] * float(np.abs(expected).max())
    for share, is_allowed in ((0.98, True), (1.02, False)):
        actual = expected.copy()
        actual[3, 2] -= share * limit
        if is_allowed:
            result = compare(expected, actual)
            assert result.max_abs_logit_difference == pytest.approx(share * limit, rel=1e-3)
            assert result.relative_logit_difference == pytest.approx(share * MAX_RELATIVE_DIFFERENCE["fp32"], rel=1e-3)
        else:
            with pytest.raises(ParityError, match="furthest at position 3, token 2:"):
                compare(expected, actual)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logit_that_is_no_number_fails_and_is_named(value: float) -> None:
    expected = random_logits()
    actual = expected.copy()
    actual[4, 6] = value
    with pytest.raises(ParityError, match=rf"furthest at position 4, token 6: {value:g} instead of"):
        compare(expected, actual)


def test_logits_that_are_no_numbers_on_both_sides_fail() -> None:
    for value in (np.nan, np.inf):
        expected = random_logits()
        expected[1, 1] = value
        with pytest.raises(ParityError):
            compare(expected, expected.copy())


def test_logits_of_another_shape_fail() -> None:
    with pytest.raises(ParityError, match=r"logits have shape \(5, 8\), the checkpoint's have \(5, 7\)"):
        compare(random_logits(), random_logits(vocab_size=8))


class CountingEngine:
    """Answers token t with t + 1, and with 49 at one position."""

    def __init__(self, *, slips_at: int | None = None) -> None:
        self.slips_at = slips_at
        self.fed: list[tuple[int, int]] = []

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> Logits:
        (token,) = tokens
        self.fed.append((past_len, int(token)))
        logits = np.zeros((1, 50), np.float32)
        logits[0, 49 if past_len == self.slips_at else (int(token) + 1) % 50] = 1.0
        return logits


def continuation(engine: Any) -> list[int]:
    return [int(token) for token in parity._continuation(engine, np.arange(10, 14), 6)]


def test_every_token_is_fed_once_at_its_position() -> None:
    engine = CountingEngine()
    assert continuation(engine) == [14, 15, 16, 17, 18, 19]
    assert engine.fed == list(enumerate(range(10, 19)))


def test_engine_goes_on_behind_its_own_tokens() -> None:
    assert continuation(CountingEngine(slips_at=5))[:3] == [14, 15, 49]


def test_what_the_engine_says_inside_the_prompt_does_not_count() -> None:
    assert continuation(CountingEngine(slips_at=2)) == [14, 15, 16, 17, 18, 19]


def compare_greedy(tokens: list[int], **options: float) -> int:
    """The checkpoint names 14 to 19."""
    expected = np.zeros((6, 50), np.float32)
    expected[np.arange(6), np.arange(14, 20)] = 2.0
    expected[:, 49] = 1.0
    return parity._compare_greedy("name", expected, np.array(tokens), **options)


def test_equal_greedy_tokens_are_counted() -> None:
    assert compare_greedy([14, 15, 16, 17, 18, 19]) == 6


@pytest.mark.parametrize("first", [0, 2, 5])
def test_first_other_greedy_token_is_named(first: int) -> None:
    tokens = [14, 15, 16, 17, 18, 19]
    tokens[first] = 49
    message = rf"greedy token {first} is 49, the checkpoint's is {14 + first} \(its logits 1 and 2\)"
    with pytest.raises(ParityError, match=message):
        compare_greedy(tokens)


def test_share_of_equal_greedy_tokens_decides_where_others_are_allowed() -> None:
    tokens = [14, 49, 16, 49, 18, 49]
    assert compare_greedy(tokens, min_agreement=0.5) == 3
    with pytest.raises(ParityError, match=r"3 of 6 greedy tokens are the checkpoint's \(needed: 51%\)"):
        compare_greedy(tokens, min_agreement=0.51)


def test_failed_gate_is_exit_code_3_and_leaves_no_artifact(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(decoder: Decoder, **options: Any) -> Any:
        return onnxruntime_graph(replace(decoder, norm_epsilon=0.5), **options)

    monkeypatch.setattr(writer, "onnxruntime_graph", wrong)
    result = call("export", tiny_model, "--out", tmp_path / "artifact", "--threads", "1", "--json", "--quiet")
    assert result.code == 3
    assert result.sentence.startswith("artifact: logits differ from the checkpoint")
    assert result.document == {"error": result.sentence, "exit_code": 3}
    assert list(tmp_path.iterdir()) == []


def test_failed_gate_leaves_the_artifact_that_was_to_be_replaced(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = unchecked(tiny_model, tmp_path / "artifact")
    before = {item.name: item.read_bytes() for item in artifact.path.iterdir()}
    monkeypatch.setitem(MAX_RELATIVE_DIFFERENCE, "fp32", 0.0)
    with pytest.raises(ParityError, match=r"allowed 0\)"):
        export_onnx(str(tiny_model), out=artifact.path, threads=1, force=True)
    assert {item.name: item.read_bytes() for item in artifact.path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [artifact.path]
