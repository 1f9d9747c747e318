"""Biases that undo the shift of pruning: means against a slow oracle, weights that stay, targets that carry them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from pydantic import ValidationError
from random_models import random_model, save
from test_recovery import SMALL, pruned, tensors

from owl_deploy.bias_correction import correct_biases_, mean_outputs, with_biases
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.evaluation import evaluate
from owl_deploy.export.writer import export_onnx
from owl_deploy.generation import load_torch_model
from owl_deploy.recipe import EvalSettings, ExportSettings, RecoverSettings
from owl_deploy.recovery import recover
from owl_deploy.skeleton import open_skeleton

BIAS = RecoverSettings(
    **{key: value for key, value in SMALL.items() if key not in ("epochs", "batch_size")}, method="bias"
)
TOKENS = torch.arange(96).reshape(3, 32) % 250


def twins(folder: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    dense = save(random_model(family), folder / "dense")
    return dense, pruned(dense, folder / "sparse", **changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp("bias"), "llama")


@pytest.fixture(scope="module")
def corrected(llama: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corrected") / "out"
    return recover(str(llama[1]), str(llama[0]), BIAS, out=out, threads=1).checkpoint


def torch_means(folder: Path) -> dict[str, torch.Tensor]:
    """Mean output of every linear of the blocks, from hooks on the whole model."""
    model = load_torch_model(open_checkpoint(str(folder)))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out.double()))
    with torch.no_grad():
        for row in TOKENS:
            model(row[None])
    return {name: torch.cat([out.flatten(0, -2) for out in outs]).mean(0) for name, outs in seen.items()}


def test_mean_outputs_are_those_of_the_whole_model(llama: tuple[Path, Path]) -> None:
    dense = open_skeleton(open_checkpoint(str(llama[0])))
    inputs = dense.capture(TOKENS)
    with dense.filled(0) as block:
        found = mean_outputs(block, inputs, 0, dense.linears(0))
    expected = torch_means(llama[0])
    assert len(found) == 7
    for name, mean in found.items():
        torch.testing.assert_close(mean, expected[name], atol=1e-5, rtol=1e-5)


def test_every_linear_has_the_wanted_mean_on_what_the_corrected_ones_leave(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    dense = open_skeleton(open_checkpoint(str(llama[0])))
    sparse = with_biases(open_skeleton(open_checkpoint(str(llama[1]))), tmp_path / "biased")
    with dense.filled(0) as block:
        wanted = mean_outputs(block, dense.capture(TOKENS), 0, dense.linears(0))
    inputs = sparse.capture(TOKENS)
    with sparse.filled(0) as block:
        before = mean_outputs(block, inputs, 0, sparse.linears(0))
        correct_biases_(block, inputs, 0, sparse.linears(0), wanted)
        after = mean_outputs(block, inputs, 0, sparse.linears(0))
    assert max(float((before[name] - wanted[name]).abs().max()) for name in wanted) > 1e-2
    for name, mean in wanted.items():
        torch.testing.assert_close(after[name], mean, atol=1e-5, rtol=1e-4)


def test_biases_of_zeros_change_nothing(llama: tuple[Path, Path], tmp_path: Path) -> None:
    sparse = open_checkpoint(str(llama[1]))
    biased = with_biases(open_skeleton(sparse), tmp_path / "biased").checkpoint
    assert {name for name in biased.tensors if name not in sparse.tensors} == {
        f"model.layers.{index}.{part}_proj.bias"
        for index in range(2)
        for part in [*(f"self_attn.{letter}" for letter in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]
    }
    with torch.no_grad():
        torch.testing.assert_close(
            load_torch_model(biased)(TOKENS).logits, load_torch_model(sparse)(TOKENS).logits, atol=0, rtol=0
        )


def test_no_weight_moves_and_the_mask_stays(llama: tuple[Path, Path], corrected: Path) -> None:
    before, after = tensors(llama[1]), tensors(corrected)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    facts = [json.loads((folder / "owl.json").read_text())["mask_sha256"] for folder in (llama[1], corrected)]
    assert facts[0] == facts[1]


def test_held_out_errors_never_rise(corrected: Path) -> None:
    recovery = json.loads((corrected / "owl.json").read_text())["recovery"]
    assert recovery["method"] == "bias"
    assert all(block["after"] <= block["before"] for block in recovery["blocks"])
    assert any(block["is_corrected"] for block in recovery["blocks"])


def test_the_corrected_model_is_nearer_to_the_dense_one(llama: tuple[Path, Path], corrected: Path) -> None:
    kind = EvalSettings(text="python-docs", window=64, max_windows=8)
    before, after = evaluate([str(llama[1]), str(corrected)], kind, reference=str(llama[0]), threads=1)
    assert after.kl_divergence is not None
    assert before.kl_divergence is not None
    assert after.kl_divergence < before.kl_divergence


@pytest.mark.parametrize(
    ("weights", "precision"), [("dense", "fp32"), ("sparse-initializer", "fp32"), ("sparse-operator", "int8")]
)
def test_onnxruntime_carries_the_biases(corrected: Path, tmp_path: Path, weights: Any, precision: Any) -> None:
    settings = ExportSettings(weights=weights, precision=precision)
    artifact = export_onnx(str(corrected), settings, out=tmp_path / "artifact", threads=1)
    assert artifact.manifest["parity"]["passed"]


@pytest.mark.deepsparse
def test_deepsparse_carries_the_biases(corrected: Path, tmp_path: Path) -> None:
    settings = ExportSettings(target="deepsparse", weights="sparse-initializer")
    assert export_onnx(str(corrected), settings, out=tmp_path / "artifact", threads=1).manifest["parity"]["passed"]


def test_smollm3_gets_biases_too(tmp_path: Path) -> None:
    dense, sparse = twins(tmp_path, "smollm3")
    done = recover(str(sparse), str(dense), BIAS, out=tmp_path / "out", threads=1).checkpoint
    assert export_onnx(str(done), out=tmp_path / "artifact", threads=1).manifest["parity"]["passed"]


def test_biases_that_are_there_are_corrected(tmp_path: Path) -> None:
    dense, sparse = twins(tmp_path, "opt")
    done = recover(str(sparse), str(dense), BIAS, out=tmp_path / "out", threads=1).checkpoint
    before, after = tensors(sparse), tensors(done)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".bias") and ".layers." in name for name in changed)


def test_a_model_without_biases_is_refused(tmp_path: Path) -> None:
    dense, sparse = twins(tmp_path, "mistral")
    with pytest.raises(UnsupportedModelError, match="'mistral' have no biases, and none can be added"):
        recover(str(sparse), str(dense), BIAS, out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["epochs", "budget", "learning_rate", "rank"])
def test_settings_of_training_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} .* is not for method bias"):
        RecoverSettings.model_validate({"method": "bias", key: 3})


def test_a_stopped_run_goes_on_to_the_same_bytes(llama: tuple[Path, Path], corrected: Path, tmp_path: Path) -> None:
    def stop(step: Any) -> None:
        if step.stage == "recovering blocks":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(str(llama[1]), str(llama[0]), BIAS, out=tmp_path / "out", threads=1, on_step=stop)
    recover(str(llama[1]), str(llama[0]), BIAS, out=tmp_path / "out", threads=1, resume=True)
    for name, value in tensors(corrected).items():
        assert torch.equal(value, tensors(tmp_path / "out")[name])


def test_the_command_line_knows_it(llama: tuple[Path, Path], tmp_path: Path) -> None:
    done = call(
        *("recover", llama[1], "--reference", llama[0], "--method", "bias", "--calibration", "python-docs"),
        *("--n-samples", "12", "--seq-len", "32", "--threads", "1", "--out", tmp_path / "out"),
    )
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_bias"] is True
