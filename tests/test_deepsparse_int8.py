"""Products of 8-bit integers for DeepSparse: ranges, graph and artifact, against a simulation in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_deepsparse_graph
import torch
from command_line import call
from pydantic import ValidationError
from random_models import random_model, save
from test_onnxruntime_graph import random_tokens, relative_difference, torch_logits

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines.bridge import bridge_status
from owl_deploy.export.activation_quantization import QuantizationPlan, plan_quantization
from owl_deploy.export.decoder import read_decoder
from owl_deploy.export.int8_graph import quantize_columns
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings
from owl_deploy.skeleton import open_skeleton

CALIBRATION = np.stack([random_tokens(24), random_tokens(24)[::-1]])
SETTINGS: dict[str, Any] = {"target": "deepsparse", "precision": "int8", "max_positions": 64, "seq_len": 24}
FAMILIES = ["llama", "qwen2", "gemma", "opt"]


def plan_of(folder: Path) -> QuantizationPlan:
    checkpoint = open_checkpoint(str(folder))
    return plan_quantization(open_skeleton(checkpoint), read_decoder(checkpoint, max_positions=64), CALIBRATION)


@contextmanager
def simulated(model: Any, plan: QuantizationPlan) -> Iterator[None]:
    """Round inputs and weights of the plan's linears as integers would be, in floats."""
    hooks = []
    for name, linear in model.named_modules():
        if (how := plan.linears.get(name)) is None:
            continue
        smoothing = torch.ones(linear.in_features) if how.smoothing is None else torch.from_numpy(how.smoothing)
        weight = linear.weight * smoothing
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        linear.weight.data = (weight / scales).round().clamp(-127, 127) * scales

        def rounded(_: Any, inputs: Any, how: Any = how, smoothing: Any = smoothing) -> Any:
            codes = (inputs[0] / smoothing / how.scale).round() + how.zero_point
            return ((codes.clamp(0, 255) - how.zero_point) * how.scale,)

        hooks.append(linear.register_forward_pre_hook(rounded))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_rounded_inputs_and_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by ONNX Runtime, which knows the same operators."""
    model, tokens = random_model(family), random_tokens(24)
    folder = save(model, tmp_path / "model")
    plan = plan_of(folder)
    monkeypatch.setattr("owl_deploy.export.writer.plan_quantization", lambda *_: plan)
    artifact = export_onnx(str(folder), ExportSettings(**SETTINGS), out=tmp_path / "artifact", parity=False)
    found = test_deepsparse_graph.chunked_logits(artifact.path, tokens, [24])
    plain = torch_logits(model, tokens)
    with torch.no_grad(), simulated(model, plan):
        expected = torch_logits(model, tokens)
    assert relative_difference(found, expected) < 0.02  # a value halfway between two integers may go either way
    assert 0.001 < relative_difference(expected, plain) < 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_evened_out_channels_change_nothing_but_the_ranges(family: str, tmp_path: Path) -> None:
    model: Any = random_model(family)
    plan = plan_of(save(model, tmp_path / "model"))
    tokens = random_tokens(16)
    expected = torch_logits(model, tokens)
    offset = 1.0 if family == "gemma" else 0.0
    with torch.no_grad():
        for name, (gain, *bias) in plan.norms.items():
            norm = model.get_submodule(name)
            norm.weight.copy_(torch.from_numpy(gain) - offset)
            if bias:
                norm.bias.copy_(torch.from_numpy(bias[0]))
        for name, how in plan.linears.items():
            if how.smoothing is not None:
                model.get_submodule(name).weight.mul_(torch.from_numpy(how.smoothing))
    assert len(plan.norms) == 4
    assert relative_difference(torch_logits(model, tokens), expected) < 1e-5


def test_last_linear_of_an_mlp_and_the_head_stay_in_floats(tmp_path: Path) -> None:
    plan = plan_of(save(random_model("llama"), tmp_path / "model"))
    parts = {name.split(".")[-1] for name in plan.linears}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_range_holds_every_input_and_zero(tmp_path: Path) -> None:
    for how in plan_of(save(random_model("opt"), tmp_path / "model")).linears.values():
        assert 0 <= how.zero_point <= 255
        assert how.scale > 0


def test_zeros_stay_zeros_and_no_weight_moves_by_more_than_half_a_step() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(7, 40)) * (rng.random((7, 40)) < 0.3)).astype(np.float32)
    weight[3] = 0
    codes, scales = quantize_columns(weight)
    assert codes.shape == (40, 7)
    assert ((codes.T == 0) >= (weight == 0)).all()
    assert (np.abs(codes.T * scales[:, None] - weight) <= 0.5001 * scales[:, None]).all()


def test_linears_of_one_input_share_its_integers(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "model")
    artifact = export_onnx(str(folder), ExportSettings(**SETTINGS), out=tmp_path / "artifact", parity=False)
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    n_blocks = artifact.facts.n_blocks
    assert kinds.count("MatMulInteger") == 6 * n_blocks
    assert kinds.count("QuantizeLinear") == 3 * n_blocks
    encodings = {matrix["encoding"] for matrix in artifact.manifest["matrices"]}
    assert encodings == {"int8", "dense"}


@pytest.mark.deepsparse
@pytest.mark.slow
@pytest.mark.skipif(not bridge_status().is_available, reason=bridge_status().reason)
def test_artifact_passes_its_gate_in_deepsparse(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "model")
    flags = ("--target", "deepsparse", "--precision", "int8", "--seq-len", "24", "--max-positions", "64", "--quiet")
    done = call("export", folder, *flags, "--out", tmp_path / "artifact", "--json")
    assert done.code == 0
    assert done.document["parity"]["passed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "deepsparse", "precision": "int8", "weights": "sparse-initializer"}, "needs weights dense"),
        ({"target": "deepsparse", "precision": "int4"}, "precision int4 needs weights sparse-operator"),
        ({"target": "deepsparse", "precision": "int8", "head_precision": "int8"}, "head_precision int8 needs"),
        ({"n_samples": 4}, "n_samples 4 needs rounding gptq, or target deepsparse of precision int8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportSettings(**settings)
