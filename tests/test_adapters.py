"""Adapters: that they begin as nothing, merge into what they were, and leave every zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from random_models import random_model, save
from test_recovery import DISTILL, models, pruned, tensors, tree  # noqa: F401  (a fixture)

from owl_deploy.adapters import attach, merge
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.generation import load_torch_model
from owl_deploy.progress import Step
from owl_deploy.recipe import RecoverSettings
from owl_deploy.recovery import recover
from owl_deploy.skeleton import open_skeleton

Method = Literal["spp", "lora"]
METHODS: list[Method] = ["spp", "lora"]
TOKENS = torch.arange(40)[None] * 5


def settings(method: Method, **changes: Any) -> RecoverSettings:
    return DISTILL.model_copy(update={"method": method, "rank": 4, "learning_rate": 1e-2, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def adapted(folder: Path, method: Method, *, rank: int = 4) -> tuple[Any, list[str]]:
    checkpoint = open_checkpoint(str(folder))
    return attach(load_torch_model(checkpoint), open_skeleton(checkpoint), method, rank=rank, seed=0)


def moved(model: Any, names: list[str]) -> Any:
    """Move every new parameter somewhere, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_adapters_change_nothing(method: Method, family: str, tmp_path: Path) -> None:
    folder = save(random_model(family, sparsity=0.6), tmp_path / "model")
    before = logits(load_torch_model(open_checkpoint(str(folder))))
    model, names = adapted(folder, method)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    n_new = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert 0 < n_new < 0.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_computes_what_the_adapted_one_did(method: Method, family: str, tmp_path: Path) -> None:
    folder = save(random_model(family, sparsity=0.6), tmp_path / "model")
    plain = load_torch_model(open_checkpoint(str(folder)))
    model, names = adapted(folder, method)
    moved(model, names)
    expected = logits(model)
    merged = merge(model, method)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(plain), atol=1e-3)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_merged_spp_has_the_zeros_it_had(models: tuple[Path, Path]) -> None:  # noqa: F811
    before = dict(load_torch_model(open_checkpoint(str(models[1]))).named_parameters())
    model, names = adapted(models[1], "spp")
    merged = merge(moved(model, names), "spp")
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter == 0, before[name] == 0), name


def test_spp_is_the_formula_of_the_paper(models: tuple[Path, Path]) -> None:  # noqa: F811
    plain = dict(load_torch_model(open_checkpoint(str(models[1]))).named_parameters())
    model, names = adapted(models[1], "spp", rank=16)
    new = {name: parameter for name, parameter in moved(model, names).named_parameters() if name in names}
    path = "model.layers.1.mlp.gate_proj"
    a, b = (new[f"{path}.parametrizations.weight.0.{part}"] for part in ("a", "b"))
    weight = plain[f"{path}.weight"]
    expected = weight.clone()
    n_rows = len(weight)
    for row in range(n_rows):
        expected[row] += weight[row] * a[row // (-(-n_rows // 16))] * b[row]
    torch.testing.assert_close(merge(model, "spp").get_parameter(f"{path}.weight"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_training_adapters_keeps_zeros_and_all_outside(
    method: Method,
    models: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    out = recover(str(models[1]), None, settings(method), out=tmp_path / "out", threads=1).checkpoint
    before, after = tensors(models[1]), tensors(out)
    for name, tensor in before.items():
        assert torch.equal(tensor == 0, after[name] == 0), name
        assert torch.equal(tensor, after[name]) == ("proj" not in name), name
    training = json.loads((out / "owl.json").read_text())["recovery"]
    assert training["curve"][-1]["loss"] < training["curve"][0]["loss"]
    assert ("pruned_again" in training) == (method == "lora")


def test_loss_of_pruning_lora_again_is_that_of_the_file(models: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    report = recover(str(models[1]), None, settings("lora"), out=tmp_path / "out", threads=1)
    again = report.facts["recovery"]["pruned_again"]
    assert again["before"] == min(check["loss"] for check in report.facts["recovery"]["curve"])
    # Training that has nothing to do begins with the loss of the checkpoint.
    idle = settings("spp", epochs=1, learning_rate=1e-12)
    found = recover(str(report.checkpoint), str(models[0]), idle, out=tmp_path / "idle", threads=1)
    assert found.facts["recovery"]["curve"][0]["loss"] == pytest.approx(again["after"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_training_of_adapters_goes_on_to_the_same_bytes(
    method: Method,
    models: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    whole = recover(str(models[1]), None, settings(method), out=tmp_path / "whole", threads=1).checkpoint

    def stop(step: Step) -> None:
        if step.stage == "distilling" and step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(str(models[1]), None, settings(method), out=tmp_path / "out", threads=1, on_step=stop)
    again = recover(str(models[1]), None, settings(method), out=tmp_path / "out", threads=1, resume=True).checkpoint
    assert tree(again) == tree(whole)


def test_experts_of_one_parameter_take_no_adapters(tmp_path: Path) -> None:
    dense = save(random_model("gpt_oss"), tmp_path / "dense")
    sparse = pruned(dense, tmp_path / "sparse", method="magnitude")
    with pytest.raises(UnsupportedModelError, match="holds several experts, which adapters do not take"):
        recover(str(sparse), str(dense), settings("spp"), out=tmp_path / "out", threads=1)
