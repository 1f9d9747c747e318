"""The prune stage on every decoder family: sparsity exact, all else untouched, and the file loads and runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_families import FAMILIES, TIED, H, V, save_model
from transformers import AutoModelForCausalLM

from owl_deploy.calibration import Calibration
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.methods.method import n_pruned
from owl_deploy.pruning import SparsityReport, prune
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import open_skeleton


@pytest.fixture
def _random_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no tokenizer: calibrate on random tokens."""
    tokens = np.random.default_rng(3).integers(4, V, size=(4, 24), dtype=np.int64)
    calibration = Calibration(tokens, "random", 3, "never", starts_with_bos=False)
    monkeypatch.setattr("owl_deploy.pruning.calibration_tokens", lambda *_, **__: calibration)
    monkeypatch.setattr("owl_deploy.pruning.must_be_sampled", lambda *_, **__: False)


def pruned(name: str, folder: Path, method: str) -> SparsityReport:
    save_model(FAMILIES[name], folder / "dense")
    settings = PruneSettings(method=method, allocation="uniform", sparsity=0.5, min_expert_tokens=1)  # type: ignore[arg-type]
    return prune(str(folder / "dense"), settings, out=folder / "sparse", threads=1)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.usefixtures("_random_tokens")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_of_every_linear_has_the_sparsity_and_the_model_still_runs(name: str, tmp_path: Path) -> None:
    report = pruned(name, tmp_path, "wanda")
    skeleton = open_skeleton(open_checkpoint(str(tmp_path / "sparse")))
    unseen = {fact["name"] for fact in report.facts["linears"] if "fallback" in fact.get("notes", {})}
    assert all(".experts." in key for key in unseen)
    changed = set()
    for index in range(len(skeleton.blocks)):
        names = skeleton.block_tensors(index)
        with skeleton.filled(index):
            for key, linear in skeleton.linears(index).items():
                zeros = (linear.weight == 0).sum(dim=1)
                if key in unseen:  # by magnitude, within the matrix
                    assert int(zeros.sum()) == n_pruned(linear.weight.numel(), 0.5)
                else:
                    assert set(zeros.tolist()) == {n_pruned(linear.in_features, 0.5)}
                changed.add(names[linear.parameter])
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "sparse")
    assert before.keys() == after.keys()
    assert {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])} == changed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(4, 28)[None]).logits).all()
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == (name in TIED)
    assert report.facts["sparsity"]["linears"] == pytest.approx(0.5, abs=1e-9)


@pytest.mark.usefixtures("_random_tokens")
@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral"])
def test_compensation_fits_fused_transposed_and_expert_weights(name: str, tmp_path: Path) -> None:
    facts = pruned(name, tmp_path, "sparsegpt").facts
    assert facts["sparsity"]["linears"] == pytest.approx(0.5, abs=1e-2)
    assert all("loss" in fact["notes"] for fact in facts["linears"])


@pytest.mark.usefixtures("_random_tokens")
@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "llama4"])
def test_dass_finds_gate_and_up_of_every_mlp(name: str, tmp_path: Path) -> None:
    facts = pruned(name, tmp_path, "dass").facts
    gates = [fact for fact in facts["linears"] if fact.get("role") in ("gate", "up", "gate_up")]
    assert gates
    weights = stored(tmp_path / "sparse")
    for fact in gates:
        weight = weights.get(f"{fact['name']}.weight")
        if weight is not None and fact["role"] != "gate_up":  # compared within columns, not rows
            assert set((weight == 0).sum(dim=0).tolist()) == {n_pruned(len(weight), 0.5)}


@pytest.mark.usefixtures("_random_tokens")
@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_experts_with_too_few_tokens_are_pruned_by_magnitude_on_record(allocation: str, tmp_path: Path) -> None:
    """Those of block 0 too, whose inputs may be known from the allocation."""
    save_model(FAMILIES["mixtral"], tmp_path / "dense")
    settings = PruneSettings(allocation=allocation, owl_m=2, sparsity=0.5, min_expert_tokens=1000)
    facts = prune(str(tmp_path / "dense"), settings, out=tmp_path / "sparse", threads=1).facts
    experts = [fact for fact in facts["linears"] if ".experts." in fact["name"]]
    assert experts
    assert all(fact["notes"]["fallback"] == "magnitude" for fact in experts)
    assert all(0 <= fact["notes"]["n_tokens"] <= 4 * 24 for fact in experts)
    assert not any("notes" in fact for fact in facts["linears"] if ".experts." not in fact["name"])
    assert all(fact["shape"][1] in (H, 24, 48) for fact in experts)
