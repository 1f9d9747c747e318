"""Training that gives quality back and keeps every zero."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from command_line import call
from pydantic import ValidationError
from random_models import random_model, save
from safetensors.torch import load_file, save_file
from torch import nn

from owl_deploy import recovery
from owl_deploy.artifact import open_artifact
from owl_deploy.block_recovery import output_error, pruned_positions, recover_block_
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.distillation import distillation_loss
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.evaluation import evaluate
from owl_deploy.generation import load_torch_model
from owl_deploy.masked_training import MaskedAdamW
from owl_deploy.pipeline import run
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import EvalSettings, PruneSettings, RecoverSettings, recipe_from_mapping
from owl_deploy.recovery import recover
from owl_deploy.skeleton import open_skeleton

SMALL: dict[str, Any] = {
    "calibration": "python-docs",
    "n_samples": 12,
    "seq_len": 32,
    "epochs": 3,
    "batch_size": 4,
    "forward_dtype": "float32",
}
SETTINGS = RecoverSettings(**SMALL, learning_rate=1e-3)
PRUNE = {"method": "wanda", "allocation": "uniform", "sparsity": 0.6, "calibration": "python-docs"}


def pruned(folder: Path, out: Path, **changes: Any) -> Path:
    settings = PruneSettings(**{**PRUNE, "n_samples": 8, "seq_len": 32, **changes})
    return prune(str(folder), settings, out=out, threads=1).checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a dense model and its sparse twin."""
    folder = tmp_path_factory.mktemp("recovery")
    dense = save(random_model("llama"), folder / "dense")
    return dense, pruned(dense, folder / "sparse")


@pytest.fixture(scope="module")
def recovered(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recovered") / "out"
    return recover(str(models[1]), str(models[0]), SETTINGS, out=out, threads=1).checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def tree(folder: Path) -> dict[str, bytes]:
    names = sorted(path.name for path in folder.iterdir() if path.name != "measured.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_errors_fall_on_sequences_that_were_not_trained_on(recovered: Path) -> None:
    blocks = json.loads((recovered / "owl.json").read_text())["recovery"]["blocks"]
    assert [block["index"] for block in blocks] == [0, 1]
    for block in blocks:
        assert block["after"] == min(block["curve"])
        assert block["after"] < 0.97 * block["before"]


def test_model_is_nearer_to_the_dense_one_on_another_text(models: tuple[Path, Path], recovered: Path) -> None:
    kind = EvalSettings(text="python-docs", window=64, max_windows=8)  # the part of it that no calibration draws from
    before, after = evaluate([str(models[1]), str(recovered)], kind, reference=str(models[0]), threads=1)
    assert after.kl_divergence is not None
    assert before.kl_divergence is not None
    assert after.kl_divergence < before.kl_divergence


def test_zeros_are_the_same_bits_and_the_rest_of_the_blocks_moved(models: tuple[Path, Path], recovered: Path) -> None:
    before, after = tensors(models[1]), tensors(recovered)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".layers." not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        assert torch.equal(tensor == 0, after[name] == 0), name
        assert (after[name].numpy().view(np.uint32)[(tensor == 0).numpy()] == 0).all()  # plus zero, not minus
        assert not torch.equal(tensor, after[name]), name


def test_manifest_is_that_of_pruning_with_what_training_did(models: tuple[Path, Path], recovered: Path) -> None:
    before, after = (json.loads((folder / "owl.json").read_text()) for folder in (models[1], recovered))
    training = after.pop("recovery")
    assert after == before
    assert training["method"] == "blockwise"
    assert training["reference"] == str(models[0])
    assert training["n_held_out"] == 1
    assert training["calibration"]["n_samples"] == 12
    assert training["settings"] == SETTINGS.model_dump(mode="json")
    assert training["checkpoint_sha256"] == open_checkpoint(str(models[1])).fingerprint
    measured = json.loads((recovered / "measured.json").read_text())
    assert len(measured["blocks"]) == 2


def test_dense_model_is_found_by_the_manifest(models: tuple[Path, Path], recovered: Path, tmp_path: Path) -> None:
    again = recover(str(models[1]), None, SETTINGS, out=tmp_path / "out", threads=1).checkpoint
    assert tree(again) == tree(recovered)


def test_stopped_run_goes_on_to_the_same_bytes(
    models: tuple[Path, Path], recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trained: list[int] = []

    def stop_at_second(block: Any, inputs: Any, targets: Any, index: int, *rest: Any, **options: Any) -> Any:
        trained.append(index)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return recover_block_(block, inputs, targets, index, *rest, **options)

    monkeypatch.setattr(recovery, "recover_block_", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        recover(str(models[1]), str(models[0]), SETTINGS, out=out, threads=1)
    assert not out.exists()
    recover(str(models[1]), str(models[0]), SETTINGS, out=out, threads=1, resume=True)
    assert trained == [0, 1, 1]
    assert tree(out) == tree(recovered)
    assert not (tmp_path / ".out.partial").exists()


def test_resume_with_other_settings_is_refused_by_name(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "recover_block_", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(str(models[1]), None, SETTINGS, out=tmp_path / "out", threads=1)
    other = SETTINGS.model_copy(update={"epochs": 4})
    with pytest.raises(OwlDeployError, match="epochs was 3 and is now 4"):
        recover(str(models[1]), None, other, out=tmp_path / "out", threads=1, resume=True)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_keep_their_zeros_too(family: str, tmp_path: Path) -> None:
    """Transposed weights, and experts that are parts of one parameter."""
    dense = save(random_model(family), tmp_path / "dense")
    sparse = pruned(dense, tmp_path / "sparse", method="magnitude")
    out = recover(str(sparse), str(dense), SETTINGS, out=tmp_path / "out", threads=1).checkpoint
    before, after = tensors(sparse), tensors(out)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if name.endswith("weight"))
    assert json.loads((out / "owl.json").read_text())["mask_sha256"]


def test_checkpoint_in_bfloat16_keeps_type_and_mask(tmp_path: Path) -> None:
    model: Any = random_model("llama")
    model.to(torch.bfloat16)
    dense = save(model, tmp_path / "dense")
    sparse = pruned(dense, tmp_path / "sparse")
    out = recover(str(sparse), str(dense), SETTINGS, out=tmp_path / "out", threads=1).checkpoint
    before, after = tensors(sparse), tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)


def test_sparse_checkpoint_of_others_gets_a_manifest(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sparse = models
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (foreign / name).write_bytes((dense / name).read_bytes())
    save_file(tensors(sparse), foreign / "model.safetensors", metadata={"format": "pt"})
    out = recover(str(foreign), str(dense), SETTINGS, out=tmp_path / "out", threads=1).checkpoint
    found, expected = (json.loads((folder / "owl.json").read_text()) for folder in (out, sparse))
    assert found["mask_sha256"] == expected["mask_sha256"]
    assert found["sparsity"]["linears"] == pytest.approx(expected["sparsity"]["linears"])


def one_block(models: tuple[Path, Path]) -> Any:
    skeleton = open_skeleton(open_checkpoint(str(models[1])))
    dense = open_skeleton(open_checkpoint(str(models[0])))
    tokens = torch.randint(0, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    inputs = recovery._for_training(skeleton.capture(tokens))
    with dense.filled(0) as block, torch.no_grad():
        targets = recovery._outputs(block, inputs, 0)
    return skeleton, inputs, targets


def test_optimiser_never_has_a_state_for_pruned_weights(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton, inputs, targets = one_block(models)
    made: list[torch.optim.Optimizer] = []
    real = torch.optim.AdamW

    def watched(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    with skeleton.filled(0) as block:
        masks = pruned_positions(block, ["self_attn.q_proj.weight", "mlp.down_proj.weight"])
        recover_block_(block, inputs, targets, 0, masks, SETTINGS, n_held_out=1, seed=0)
        parameters = dict(block.named_parameters())
        for name, mask in masks.items():
            state = made[0].state[parameters[name]]
            assert mask.any()
            assert not state["exp_avg"][mask].any()
            assert not state["exp_avg_sq"][mask].any()
            assert state["exp_avg"][~mask].any()


def test_relative_rates_move_parameters_by_shares_of_their_size() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 16, generator=generator)
    pruned = torch.rand(values.shape, generator=generator) < 0.7
    values[pruned] = 0
    parameters = {"small": nn.Parameter(values.clone()), "large": nn.Parameter(100 * values)}
    optimizer = MaskedAdamW(parameters, dict.fromkeys(parameters, pruned), 0.05, is_relative=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step(0.1)  # the learning rate at its highest
    moved = {
        name: parameter.detach() - factor * values
        for (name, parameter), factor in zip(parameters.items(), (1, 100), strict=True)
    }
    size = float(values[~pruned].square().mean().sqrt())
    # the first step of Adam is one learning rate, whatever the gradient
    torch.testing.assert_close(moved["small"][~pruned].abs(), torch.full((int((~pruned).sum()),), 0.05 * size))
    torch.testing.assert_close(moved["large"], 100 * moved["small"], rtol=1e-4, atol=1e-4)
    later = MaskedAdamW(parameters, {}, 0.05, is_relative=True)
    later.load(optimizer.state())
    assert {key: float(rate) for key, rate in later.state().items() if key.startswith("rate/")} == {
        "rate/small": pytest.approx(0.05 * size),
        "rate/large": pytest.approx(5 * size),
    }


def test_best_values_are_kept_where_training_only_does_harm(models: tuple[Path, Path]) -> None:
    skeleton, inputs, targets = one_block(models)
    harmful = SETTINGS.model_copy(update={"learning_rate": 0.05, "epochs": 1})
    with skeleton.filled(0) as block:
        before = {name: parameter.clone() for name, parameter in block.named_parameters()}
        found = recover_block_(block, inputs, targets, 0, {}, harmful, n_held_out=1, seed=0)
        assert found.curve[0] > found.before
        assert found.after == found.before
        assert all(torch.equal(before[name], parameter) for name, parameter in block.named_parameters())


def test_budget_holds_within_one_step(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, inputs, targets = one_block(models)
    now = [0.0]
    monkeypatch.setattr("owl_deploy.block_recovery.time.monotonic", lambda: now[0])
    steps = []
    real = torch.optim.AdamW.step

    def slow_step(self: Any, *rest: Any) -> Any:
        now[0] += 2.0
        steps.append(now[0])
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    endless = SETTINGS.model_copy(update={"epochs": 1000})
    with skeleton.filled(0) as block:
        found = recover_block_(block, inputs, targets, 0, {}, endless, n_held_out=1, seed=0, deadline=5.0)
    assert steps == [2.0, 4.0, 6.0]
    assert len(found.curve) >= 1
    assert found.after < found.before


def test_budget_is_shared_among_the_blocks(models: tuple[Path, Path], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 100_000, "budget": 2.0})
    started = time.monotonic()
    report = recover(str(models[1]), None, settings, out=tmp_path / "out", threads=1)
    assert time.monotonic() - started < 60  # 100 000 epochs would take hours
    assert all(len(block["curve"]) >= 1 for block in report.facts["recovery"]["blocks"])


def test_error_is_relative_to_each_token() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [3000.0, 4000.0]]])
    found = torch.tensor([[[3.0, 3.0], [3000.0, 3000.0]]])
    assert output_error(found, wanted) == pytest.approx(1 / 25)


def test_loss_that_is_no_number_is_one_sentence(models: tuple[Path, Path]) -> None:
    skeleton, inputs, targets = one_block(models)
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "epochs": 20})
    with skeleton.filled(0) as block, pytest.raises(OwlDeployError, match=r"block 0 (is NaN or Inf|diverges)"):
        recover_block_(block, inputs, targets, 0, {}, wild, n_held_out=1, seed=0)


def test_reference_of_another_architecture_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = save(random_model("llama", intermediate_size=80), tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"no dense twin of .*gate_proj\.weight is \(80, 64\) there"):
        recover(str(models[1]), str(other), SETTINGS, out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_names_no_dense_model_needs_one(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = call("recover", str(models[0]), "--out", str(tmp_path / "out"))
    assert result.code == 1
    assert "name it with --reference" in result.sentence


def test_zeros_that_are_not_those_of_the_manifest_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    changed = pruned(models[0], tmp_path / "changed")
    shard = next(path for path in sorted(changed.glob("*.safetensors")) if "layers.1." in str(list(load_file(path))))
    weights = load_file(shard)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = torch.ones_like(weights[name])
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(OwlDeployError, match="q_proj are not those of its manifest"):
        recover(str(changed), str(models[0]), SETTINGS, out=tmp_path / "out", threads=1)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("45", 45), (12, 12)])
def test_budget_is_read_with_its_unit(text: Any, seconds: float) -> None:
    assert RecoverSettings.model_validate({"budget": text}).budget == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "5d", "0s", "nan", "1e999"])
def test_budget_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="budget"):
        RecoverSettings.model_validate({"budget": text})


def test_command_line_trains_and_says_how_far_every_block_is(models: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--calibration", "python-docs", "--n-samples", "8", "--seq-len", "32", "--epochs", "1"]
    result = call("recover", str(models[1]), *options, "--threads", "1", "--out", str(tmp_path / "out"))
    assert result.code == 0
    assert "error before" in result.stdout
    assert str(tmp_path / "out") in result.stdout
    document = call("recover", str(models[1]), *options, "--out", str(tmp_path / "out"), "--force", "--json").document
    assert len(document["recovery"]["blocks"]) == 2


def test_products_in_bfloat16_train_as_well(models: tuple[Path, Path], tmp_path: Path) -> None:
    for settings in (SETTINGS, DISTILL):
        rounded = settings.model_copy(update={"forward_dtype": "bfloat16"})
        facts = recover(str(models[1]), None, rounded, out=tmp_path / settings.method, threads=1).facts["recovery"]
        assert facts["products"] == "bfloat16"
        before, after = (
            (facts["blocks"][1]["before"], facts["blocks"][1]["after"])
            if settings is SETTINGS
            else (facts["curve"][0]["loss"], facts["curve"][-1]["loss"])
        )
        assert after < 0.98 * before


def test_target_that_exists_is_refused_before_any_work(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in call("recover", str(models[1]), "--out", str(tmp_path / "out")).sentence


def test_targets_of_the_prefix_train_too(models: tuple[Path, Path], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"targets": "prefix"})
    facts = recover(str(models[1]), None, settings, out=tmp_path / "out", threads=1).facts
    assert all(block["after"] < block["before"] for block in facts["recovery"]["blocks"])


DISTILL = RecoverSettings(**SMALL, method="distill", learning_rate=1e-3, n_checks=3)


@pytest.fixture(scope="module")
def distilled(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "out"
    return recover(str(models[1]), str(models[0]), DISTILL, out=out, threads=1).checkpoint


def test_distillation_lowers_the_divergence_on_sequences_that_were_not_trained_on(distilled: Path) -> None:
    curve = json.loads((distilled / "owl.json").read_text())["recovery"]["curve"]
    assert [check["step"] for check in curve] == [0, 3, 6, 9]
    assert curve[-1]["loss"] < 0.97 * curve[0]["loss"]


def test_distillation_keeps_zeros_and_what_is_outside_the_blocks(models: tuple[Path, Path], distilled: Path) -> None:
    before, after = tensors(models[1]), tensors(distilled)
    for name, tensor in before.items():
        if ".layers." in name:
            assert torch.equal(tensor == 0, after[name] == 0), name
            assert not torch.equal(tensor, after[name]), name
        else:
            assert torch.equal(tensor, after[name]), name


def test_distilled_checkpoint_has_the_loss_that_was_measured(models: tuple[Path, Path], distilled: Path) -> None:
    facts = json.loads((distilled / "owl.json").read_text())["recovery"]
    checkpoint = open_checkpoint(str(models[0]))
    tokens = torch.from_numpy(calibration_tokens(checkpoint, DISTILL, seed=0).tokens)[-facts["n_held_out"] :]
    found, wanted = (load_torch_model(open_checkpoint(str(folder))) for folder in (distilled, models[0]))
    losses = []
    for row in tokens:
        with torch.no_grad():
            p, q = (torch.softmax(model(row[None]).logits[0].double(), -1) for model in (wanted, found))
        losses.append(float((p * (p / q).log()).sum(-1).mean()))
    assert np.mean(losses) == pytest.approx(min(check["loss"] for check in facts["curve"]), rel=1e-4)


def test_stopped_distillation_goes_on_to_the_same_bytes(
    models: tuple[Path, Path], distilled: Path, tmp_path: Path
) -> None:
    out, steps = tmp_path / "out", []

    def stop(step: Step) -> None:
        if step.stage == "distilling":
            steps.append(step.done)
            if len(steps) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(str(models[1]), str(models[0]), DISTILL, out=out, threads=1, on_step=stop)
    recover(str(models[1]), str(models[0]), DISTILL, out=out, threads=1, resume=True, on_step=stop)
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]  # from the last check on
    assert tree(out) == tree(distilled)


def test_distillation_with_recomputed_activations_gives_the_same(
    models: tuple[Path, Path], distilled: Path, tmp_path: Path
) -> None:
    settings = DISTILL.model_copy(update={"gradient_checkpointing": True})
    again = recover(str(models[1]), None, settings, out=tmp_path / "out", threads=1).checkpoint
    first, second = tensors(distilled), tensors(again)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "spp"}, {"method": "lora"}, {"gradient_checkpointing": True, "batch_size": 3}],
    ids=["distill", "spp", "lora", "recomputed, uneven batches"],
)
def test_two_processes_train_as_one_does(models: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = RecoverSettings(**{**DISTILL.model_dump(), **changes})
    one, two = (
        recover(str(models[1]), None, settings, out=tmp_path / device, threads=2, device=device)
        for device in ("cpu", "cpu,cpu")
    )
    losses = [[check["loss"] for check in report.facts["recovery"]["curve"]] for report in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    first, second = tensors(one.checkpoint), tensors(two.checkpoint)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-5)
    assert one.facts["mask_sha256"] == two.facts["mask_sha256"]


def test_two_processes_from_the_command_line(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a relative folder, whose name is no URL."""
    monkeypatch.chdir(tmp_path)
    flags = ("--calibration", "python-docs", "--n-samples", "4", "--seq-len", "16", "--epochs", "1", "--threads", "2")
    done = call("recover", models[1], "--method", "distill", *flags, "--device", "cpu,cpu", "--out", "a b%20", "--json")
    assert done.code == 0, done.stderr
    assert done.document["checkpoint"] == "a b%20"
    assert (tmp_path / "a b%20" / "owl.json").is_file()


def test_two_processes_that_are_stopped_go_on_to_the_same_bytes(models: tuple[Path, Path], tmp_path: Path) -> None:
    whole = recover(str(models[1]), None, DISTILL, out=tmp_path / "whole", device="cpu,cpu", threads=2).checkpoint
    out, steps = tmp_path / "out", []

    def stop(step: Step) -> None:
        if step.stage == "distilling":
            steps.append(step.done)
            if step.done == 5 and len(steps) == 5:
                raise KeyboardInterrupt

    arguments: dict[str, Any] = {"out": out, "device": "cpu,cpu", "threads": 2, "on_step": stop}
    with pytest.raises(KeyboardInterrupt):
        recover(str(models[1]), None, DISTILL, **arguments)
    assert not out.exists()
    recover(str(models[1]), None, DISTILL, **arguments, resume=True)
    assert steps[5] in (4, 7)  # from a check on: the processes may have been a few steps ahead of what they told
    assert tree(out) == tree(whole)


def test_error_of_one_of_two_processes_is_one_sentence(models: tuple[Path, Path], tmp_path: Path) -> None:
    wild = DISTILL.model_copy(update={"learning_rate": 1.0})
    with pytest.raises(OwlDeployError, match=r"^distillation diverges: [^\n]*$"):
        recover(str(models[1]), str(models[1]), wild, out=tmp_path / "out", device="cpu,cpu", threads=2)
    assert not (tmp_path / "out").exists()


def test_killed_process_ends_the_others_with_one_sentence(models: tuple[Path, Path], tmp_path: Path) -> None:
    children: set[int] = set()

    def kill(step: Step) -> None:
        if step.stage == "distilling" and not children:
            found = psutil.Process().children(recursive=True)
            trainers = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
            children.update(child.pid for child in trainers)
            trainers[-1].kill()

    settings = DISTILL.model_copy(update={"epochs": 1000})
    with pytest.raises(OwlDeployError, match="of 2 that train together ended"):
        recover(str(models[1]), None, settings, out=tmp_path / "out", device="cpu,cpu", threads=2, on_step=kill)
    assert len(children) == 2
    alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=10)[1]
    assert alive == []


def test_distillation_loss_is_the_divergence_times_the_squared_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    tokens = torch.tensor([0, 3, 6, 2, 1])
    p, q = (torch.softmax(values.double() / 2, -1) for values in (wanted, logits))
    divergence = float((p * (p / q).log()).sum(-1).mean()) * 4
    found = distillation_loss(logits, wanted, tokens, temperature=2.0, cross_entropy=0.0)
    assert float(found) == pytest.approx(divergence, rel=1e-5)
    text = -np.mean([float(torch.log_softmax(logits[i].double(), -1)[tokens[i + 1]]) for i in range(4)])
    mixed = distillation_loss(logits, wanted, tokens, temperature=2.0, cross_entropy=0.25)
    assert float(mixed) == pytest.approx(0.75 * divergence + 0.25 * text, rel=1e-5)


def test_budget_of_distillation_holds_within_one_step(models: tuple[Path, Path], tmp_path: Path) -> None:
    settings = DISTILL.model_copy(update={"epochs": 100_000, "budget": 1.5})
    report = recover(str(models[1]), None, settings, out=tmp_path / "out", threads=1)
    measured = json.loads((report.checkpoint / "measured.json").read_text())["curve"]
    assert 1.5 <= measured[-1]["seconds"] < 1.5 + 30
    assert report.facts["recovery"]["curve"][-1]["loss"] < report.facts["recovery"]["curve"][0]["loss"]


def test_distillation_that_diverges_is_one_sentence(models: tuple[Path, Path], tmp_path: Path) -> None:
    """From its own twin, with nothing to gain, every step of that size is one away."""
    wild = DISTILL.model_copy(update={"learning_rate": 1.0})
    with pytest.raises(OwlDeployError, match="distillation diverges"):
        recover(str(models[1]), str(models[1]), wild, out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.0},
        {"n_checks": 3},
        {"method": "distill", "targets": "prefix"},
        {"method": "distill", "rank": 4},
        {"method": "spp", "targets": "prefix"},
    ],
)
def test_settings_of_another_method_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="is not for method"):
        RecoverSettings(**settings)


def recipe_with(model: Path, **changes: Any) -> Any:
    document = {
        "model": str(model),
        "threads": 1,
        "prune": {**PRUNE, "n_samples": 4, "seq_len": 32},
        "recover": {**SMALL, "calibration": "generated", "n_samples": 4, "epochs": 1},
        "export": [
            {"name": "one-shot", "weights": "sparse-operator"},
            {"name": "recovered", "weights": "sparse-operator", "checkpoint": "recovered"},
        ],
        "eval": {"text": "python-docs", "window": 64, "max_windows": 2},
    }
    return recipe_from_mapping({**document, **changes})


def test_recipe_recovers_between_prune_and_export(models: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_with(models[0])
    result = run(recipe, out=tmp_path / "run")
    assert result.checkpoint == tmp_path / "run" / "recovered"
    judged = [Path(model).name for model, _ in result.evaluations]
    assert judged == ["checkpoint", "recovered", "one-shot", "recovered"]
    one_shot, recovered = (open_artifact(path) for path in result.artifacts)
    assert one_shot.manifest["parity"]["passed"]
    assert recovered.manifest["parity"]["passed"]
    assert one_shot.manifest["checkpoint"]["mask_sha256"] == recovered.manifest["checkpoint"]["mask_sha256"]
    assert one_shot.manifest["checkpoint_sha256"] != recovered.manifest["checkpoint_sha256"]


def test_recovered_checkpoint_is_reused_until_something_changes(models: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_with(models[0], export=[])
    out = tmp_path / "run"
    times = []
    for again in (recipe, recipe, recipe_with(models[0], export=[], seed=1)):
        run(again, out=out)
        times.append((out / "recovered" / "owl.json").stat().st_mtime_ns)
    assert times[0] == times[1]
    assert times[1] != times[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover": None}, "recovered is of checkpoint recovered, and the recipe has no recover stage"),
        ({"eval": {"text": "generated"}}, "recover.calibration and eval.text are both generated"),
        ({"recover": {"epochs": 0}}, "recover.epochs"),
        ({"recover": {"metod": "distill"}}, "metod"),
    ],
)
def test_recipes_that_cannot_be_are_refused(models: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OwlDeployError, match=message):
        recipe_with(models[0], **changes)
