"""Every bad input through the command line: one sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command_line import SMALL_BENCH, SMALL_PRUNE, Call, call, tree
from conftest import OwlDeploy, save_tiny_model
from safetensors.torch import load_file, save_file
from small_disk import mounted
from transformers import BertConfig

from owl_deploy.artifact import is_artifact
from owl_deploy.bench.report import write_report
from owl_deploy.bench.report_file import read_report
from owl_deploy.bench.run import run_bench
from owl_deploy.errors import OwlDeployError
from owl_deploy.export.writer import export_onnx
from owl_deploy.progress import Step
from owl_deploy.recipe import BenchSettings, EvalSettings, ExportSettings


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad") / "exported"
    export_onnx(str(tiny_model), ExportSettings(max_positions=128), out=out, parity=False)
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


def refused(folder: Path, *arguments: str | Path, code: int = 1) -> str:
    """Call the command line, expect a refusal that leaves `folder` as it was, and return its sentence."""
    before = tree(folder)
    done = call(*arguments, "--quiet")
    assert done.code == code, done
    assert done.stdout == ""
    assert tree(folder) == before
    return done.sentence


def prune_refused(model: str | Path, folder: Path, *arguments: str, code: int = 1) -> str:
    return refused(folder, "prune", "--model", model, *SMALL_PRUNE, *arguments, "--out", folder / "out", code=code)


def export_refused(model: str | Path, folder: Path, *arguments: str, code: int = 1) -> str:
    return refused(
        folder,
        "export",
        model,
        "--max-positions",
        "128",
        "--threads",
        "1",
        *arguments,
        "--out",
        folder / "out",
        code=code,
    )


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(model: Path, change_: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change_(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# Models that are not there, or are no models.


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nosuch", "no model at ./nosuch: there is no such folder or file"),
        ("no/such/folder", "no model at no/such/folder: there is no such folder or file"),
        ("nosuch.gguf", "no model at nosuch.gguf: there is no such folder or file"),
        ("demo:nosuch", "unknown demo model demo:nosuch; known are demo:smollm2-135m"),
        ("not a hub id", "'not a hub id' is neither a local model nor a valid hub id"),
    ],
)
def test_unknown_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert prune_refused(name, tmp_path) == sentence
    assert export_refused(name, tmp_path) == sentence
    assert refused(tmp_path, "eval", name) == sentence


def test_hub_id_with_offline_is_looked_for_in_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = prune_refused("nobody/nosuch", tmp_path, "--offline")
    assert sentence.startswith("no model nobody/nosuch in the local hub cache (--offline): give a local folder, ")


@pytest.mark.parametrize("flags", [[], ["--offline"]], ids=["online", "offline"])
def test_hub_id_without_network_fails_soon(
    tmp_path: Path, owl_deploy: OwlDeploy, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: connections are refused
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    started = time.monotonic()
    done = owl_deploy("prune", "--model", "nobody/nosuch", "--out", tmp_path / "out", *flags, cwd=tmp_path)
    assert time.monotonic() - started < 60  # importing on a busy machine, and no retries
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no model nobody/nosuch " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "is a file but not .gguf" in prune_refused(tmp_path / "weights.bin", tmp_path)


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    assert prune_refused(tmp_path, tmp_path) == f"{tmp_path} is not a Hugging Face model folder: it has no config.json"


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"GGUF", b"GGUF" + bytes(20), b"GGUF\x03\0\0\0" + b"\xff" * 64, b"GGUF\x03\0\0\0" + bytes(16)],
    ids=["empty", "text", "magic alone", "version 0", "huge counts", "no tensors"],
)
def test_gguf_garbage_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert "m.gguf cannot be read as a GGUF model: " in prune_refused(tmp_path / "m.gguf", tmp_path)
    cache = Path(os.environ["OWL_DEPLOY_CACHE"]) / "models"
    assert not list(cache.glob(".*")) if cache.exists() else True


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "holds only pickle weights (pytorch_model.bin), which can run code" in prune_refused(model, tmp_path)


def test_folder_without_weights_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    assert prune_refused(model, tmp_path) == f"{model} holds no .safetensors weights"


def test_code_of_a_model_is_never_run(model: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (model / "modeling_x.py").write_text(f"open({str(trap)!r}, 'w')")
    change_config(model, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"})
    for sentence in (prune_refused(model, tmp_path), refused(tmp_path, "eval", model), export_refused(model, tmp_path)):
        assert "needs code of its own (auto_map in config.json), and code from a model is never run" in sentence
    assert not trap.exists()


# Configurations.


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000], ids=["empty", "cut", "list", "zero", "deep"])
def test_config_that_is_not_json_is_named(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert prune_refused(model, tmp_path).startswith(f"cannot read {model / 'config.json'}: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nosuch"},
        {"model_type": None},
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_act": "nosuch"},
        {"rope_scaling": {"rope_type": "nosuch", "factor": 2.0}},
        {"rope_scaling": "x"},
    ],
    ids=str,
)
def test_impossible_config_is_one_sentence(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    change_config(model, **changes)
    assert str(model) in prune_refused(model, tmp_path)


def test_encoder_is_no_causal_language_model(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(BertConfig(num_hidden_layers=2).to_json_string())
    assert prune_refused(model, tmp_path)


def test_encoder_decoder_is_refused(model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="t5")
    assert "is not a causal language model that transformers knows" in prune_refused(model, tmp_path)


def test_architecture_without_decoder_blocks_is_named(model: Path, tmp_path: Path) -> None:
    change_config(model, num_hidden_layers=0)
    assert prune_refused(model, tmp_path) == f"{model}: found no decoder blocks with linears in architecture 'llama'"


def test_export_of_another_family_is_refused(model: Path, tmp_path: Path) -> None:
    change_config(model, model_type="gpt_neox")
    assert "gpt_neox" in export_refused(model, tmp_path)


# Weights.


@pytest.mark.parametrize("size", [0, 4, 100, 20_000, -1])
def test_truncated_safetensors_is_named(model: Path, tmp_path: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    for sentence in (prune_refused(model, tmp_path), export_refused(model, tmp_path), refused(tmp_path, "eval", model)):
        assert sentence.startswith(f"{file} is damaged or cut short (")
        assert sentence.endswith("): fetch or write it again")


def test_safetensors_header_garbage_is_named(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    assert "is damaged or cut short" in prune_refused(model, tmp_path)


def give_index(model: Path, content: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "..", "a/b.safetensors"])
def test_index_that_points_outside_its_folder_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    give_index(model, {"weight_map": {"x": name}})
    assert "model.safetensors.index.json points outside its folder" in prune_refused(model, tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"x": 1, "y": "a"}}, {"weight_map": None}])
def test_index_garbage_is_named(model: Path, tmp_path: Path, content: Any) -> None:
    give_index(model, content)
    assert "model.safetensors.index.json is damaged" in prune_refused(model, tmp_path)


def test_shard_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    give_index(model, {"weight_map": {"x": "model-00002-of-00002.safetensors"}})
    assert "model-00002-of-00002.safetensors is missing: the checkpoint is not complete" in prune_refused(
        model, tmp_path
    )


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("tensor", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
def test_missing_tensor_is_named_by_every_command(model: Path, tmp_path: Path, tensor: str) -> None:
    change_weights(model, lambda tensors: tensors.pop(tensor))
    for sentence in (
        prune_refused(model, tmp_path),
        prune_refused(model, tmp_path, "--method", "magnitude", "--allocation", "uniform"),
        prune_refused(model, tmp_path, "--calibration", "generated"),
        export_refused(model, tmp_path),
        refused(tmp_path, "eval", model, "--window", "64", "--max-windows", "1", "--threads", "1"),
    ):
        assert tensor in sentence


def test_tensor_of_another_shape_is_named(model: Path, tmp_path: Path) -> None:
    change_weights(model, lambda tensors: tensors.update({DOWN: torch.zeros(3, 5)}))
    assert f"tensor {DOWN} does not fit its config.json" in prune_refused(model, tmp_path)
    assert DOWN in export_refused(model, tmp_path, "--no-parity")
    assert DOWN in refused(tmp_path, "eval", model, "--window", "64", "--max-windows", "1", "--threads", "1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [DOWN, "model.embed_tokens.weight"])
def test_nan_or_inf_in_a_weight_is_named_by_every_command(
    model: Path, tmp_path: Path, tensor: str, value: float
) -> None:
    change_weights(model, lambda tensors: tensors[tensor].view(-1)[7:8].fill_(value))
    for sentence in (
        prune_refused(model, tmp_path),
        prune_refused(model, tmp_path, "--method", "magnitude", "--allocation", "uniform"),
        prune_refused(model, tmp_path, "--calibration", "generated"),
        export_refused(model, tmp_path, "--no-parity"),
        refused(tmp_path, "eval", model, "--window", "64", "--max-windows", "1", "--threads", "1"),
    ):
        assert sentence.startswith(f"tensor {tensor} holds NaN or Inf")


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_overflowing_activation_is_named(model: Path, tmp_path: Path, allocation: str) -> None:
    change_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    sentence = prune_refused(model, tmp_path, "--allocation", allocation)
    assert "model.layers.1.mlp.down_proj" in sentence or "output of block 1" in sentence
    assert "NaN or Inf" in sentence


# Tokenizers and text.


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_tokenizer_is_one_sentence(model: Path, tmp_path: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    if name == "special_tokens_map.json":  # asked only where the other has no word
        (model / "tokenizer_config.json").unlink()
    assert str(model) in prune_refused(model, tmp_path)


def test_model_without_tokenizer_is_one_sentence(model: Path, tmp_path: Path) -> None:
    for file in [*model.glob("*token*")]:
        file.unlink()
    assert f"no tokenizer in {model}" in prune_refused(model, tmp_path)


def test_too_little_calibration_text_says_how_much_there_is(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 100)
    sentence = prune_refused(tiny_model, tmp_path, "--calibration", f"text:{tmp_path / 'short.txt'}")
    assert sentence.startswith("too little calibration text: text:")
    assert "gives 100 tokens, and 4 samples of 32 need 128: lower n_samples or seq_len" in sentence


def test_empty_calibration_text_is_too_little(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for source in ("text", "jsonl"):
        sentence = prune_refused(tiny_model, tmp_path, "--calibration", f"{source}:{tmp_path / 'empty'}")
        assert "gives 0 tokens" in sentence


def test_too_little_evaluation_text_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 100)
    source = f"text:{tmp_path / 'short.txt'}"
    sentence = refused(tmp_path, "eval", tiny_model, "--text", source, "--window", "128")
    assert sentence == f"too little evaluation text: {source} gives 100 tokens, one window needs 128: lower window"


def test_sequences_longer_than_the_context_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    sentence = prune_refused(tiny_model, tmp_path, "--seq-len", "513")
    assert sentence == "seq_len 513 is longer than the model's context of 512 tokens: lower it"


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        ("nosuch", 2, "unknown text source 'nosuch'; known are generated, "),
        ("text:", 2, "unknown text source 'text:'"),
        ("text:nosuch.txt", 1, "cannot read the text nosuch.txt"),
        ("text:.", 1, "cannot read the text ."),
        ("text:binary", 1, "cannot read the text binary"),
        ("jsonl:lines", 1, "lines line 2 is not a JSON object with a field 'text'"),
        ("jsonl:lines:body", 1, "lines line 1 is not a JSON object with a field 'body'"),
        ("jsonl:numbers", 1, "numbers line 1: field 'text' is not text"),
    ],
)
def test_bad_text_source_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "lines").write_text('{"text": "a"}\nnonsense\n')
    (tmp_path / "numbers").write_text('{"text": 3}\n')
    assert prune_refused(tiny_model, tmp_path, "--calibration", source, code=code).startswith(sentence)


# Settings.


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan", "inf", "70", "half"])
def test_impossible_sparsity_is_a_usage_error(tiny_model: Path, tmp_path: Path, value: str) -> None:
    sentence = prune_refused(tiny_model, tmp_path, "--sparsity", value, code=2)
    assert sentence.startswith("command line: sparsity: ")
    assert "[0, 1)" in sentence or "valid number" in sentence
    assert repr(value) in sentence


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--method", "wnada"),
        ("--allocation", "owls"),
        ("--n-samples", "0"),
        ("--seq-len", "-3"),
        ("--owl-lambda", "0.5"),
        ("--owl-m", "nan"),
        ("--bos", "maybe"),
        ("--threads", "0"),
        ("--threads", "-2"),
        ("--threads", "1000000000000"),
        ("--threads", "many"),
        ("--threads", "²"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),
        ("--nosuch", "1"),
    ],
)
def test_impossible_flag_is_a_usage_error(tiny_model: Path, tmp_path: Path, flag: str, value: str) -> None:
    before = tree(tmp_path)
    done = call("prune", "--model", tiny_model, *SMALL_PRUNE, flag, value, "--out", tmp_path / "out", "--quiet")
    assert done.code == 2
    assert "Traceback" not in done.stderr
    assert flag.strip("-").replace("-", "_") in done.stderr.replace("-", "_").splitlines()[-1]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: x\nprune: {sparsty: 0.5}", "unknown key prune.sparsty; did you mean sparsity?"),
        ("model: x\nprune: {sparsity: 1.0}", "prune.sparsity: must be in [0, 1), got 1.0"),
        ("model: x\nbench: {baseline: y}", "bench.baseline: 'y' is not among the artifacts []"),
        ("{", "is not YAML"),
        ("", "a recipe is a mapping of keys, found NoneType"),
    ],
)
def test_bad_recipe_is_a_usage_error(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert sentence in refused(tmp_path, "run", tmp_path / "r.yaml", "--out", tmp_path / "out", code=2)


def test_missing_recipe_is_a_usage_error(tmp_path: Path) -> None:
    assert "cannot read the recipe" in refused(tmp_path, "run", tmp_path / "nosuch", "--out", tmp_path / "out", code=2)


# Artifacts.


def bench_refused(folder: Path, *arguments: str | Path, code: int) -> str:
    return refused(folder, "bench", *arguments, *SMALL_BENCH, "--out", folder / "report", code=code)


def test_artifact_without_manifest_says_how_to_get_one(artifact: Path, tmp_path: Path) -> None:
    (artifact / "owl.json").unlink()
    expected = f"{artifact} has no manifest (owl.json): export it with owl-deploy export"
    assert bench_refused(tmp_path, artifact, "--baseline", "artifact", code=1) == expected
    assert refused(tmp_path, "eval", artifact, "--window", "64", "--max-windows", "1", "--threads", "1") == expected


def test_baseline_that_is_not_among_the_artifacts_is_a_usage_error(artifact: Path, tmp_path: Path) -> None:
    sentence = bench_refused(tmp_path, artifact, "--baseline", "nosuch", code=2)
    assert sentence == "baseline nosuch is not among the artifacts: artifact"


def test_two_artifacts_of_one_name_are_a_usage_error(artifact: Path, tmp_path: Path) -> None:
    other = shutil.copytree(artifact, tmp_path / "deep" / "artifact")
    sentence = bench_refused(tmp_path, artifact, other, "--baseline", "artifact", code=2)
    assert sentence.startswith("two artifacts are named artifact")


def test_missing_artifact_is_named(tmp_path: Path) -> None:
    sentence = bench_refused(tmp_path, tmp_path / "nosuch", "--baseline", "nosuch", code=1)
    assert sentence == f"no artifact at {tmp_path / 'nosuch'}: there is no such folder"


def test_checkpoint_is_no_artifact(tiny_model: Path, tmp_path: Path) -> None:
    assert "is not an artifact: it has no model.onnx" in bench_refused(tmp_path, tiny_model, "--baseline", "x", code=1)


def test_workload_longer_than_the_artifact_is_a_usage_error(artifact: Path, tmp_path: Path) -> None:
    sentence = bench_refused(tmp_path, artifact, "--baseline", "artifact", "--past-len", "128", code=2)
    assert sentence.startswith("artifact holds 128 positions and the longest workload needs 129")


def test_damaged_stored_evaluations_are_made_anew(artifact: Path, tmp_path: Path) -> None:
    flags = ("--window", "64", "--max-windows", "1", "--threads", "1", "--json", "--quiet")
    expected = call("eval", artifact, *flags).document
    for text in ("{", "[]", '{"x": 1}', (artifact / "evaluations.json").read_text().replace("perplexity", "p")):
        (artifact / "evaluations.json").write_text(text)
        assert call("eval", artifact, *flags).document == expected


# Where results go.


def test_out_that_exists_needs_force(tiny_model: Path, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    expected = f"{out} exists already: give another --out, or --force to replace it"
    assert prune_refused(tiny_model, tmp_path) == expected
    assert export_refused(tiny_model, tmp_path) == expected
    flags = ("--baseline", "artifact", *SMALL_BENCH, "--out", out)
    assert refused(tmp_path, "bench", artifact, *flags) == expected
    assert call("bench", artifact, *flags, "--force", "--quiet").code == 0
    assert sorted(item.name for item in out.iterdir()) == ["report.csv", "report.html", "report.json", "report.md"]


def test_out_below_a_file_is_one_sentence(tiny_model: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    for arguments in (
        ("prune", "--model", tiny_model, *SMALL_PRUNE),
        ("export", tiny_model, "--no-parity"),
        ("bench", artifact, "--baseline", "artifact", *SMALL_BENCH),
    ):
        assert "file" in refused(tmp_path, *arguments, "--out", out)


def test_read_only_disk_is_one_sentence(tiny_model: Path, artifact: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=64k") as disk:
        assert "ead-only file system" in prune_refused(tiny_model, disk)
        assert "ead-only file system" in export_refused(tiny_model, disk, "--no-parity")
        assert "ead-only file system" in bench_refused(disk, artifact, "--baseline", "artifact", code=1)


# The tiny model takes 320 KiB: these sizes are full at its first shard, in the middle and at the last file.
@pytest.mark.parametrize("size", ["32k", "160k", "300k"])
def test_full_disk_leaves_no_checkpoint(tiny_model: Path, tmp_path: Path, size: str) -> None:
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        assert prune_refused(tiny_model, disk).startswith("disk full while writing ")


@pytest.mark.parametrize("size", ["16k", "200k", "372k"])
def test_full_disk_leaves_no_artifact(tiny_model: Path, tmp_path: Path, size: str) -> None:
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        assert export_refused(tiny_model, disk, "--no-parity").startswith("disk full while writing ")


def test_full_disk_leaves_no_report(artifact: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        sentence = bench_refused(disk, artifact, "--baseline", "artifact", code=1)
        assert sentence.startswith("disk full while writing ")


def test_pruning_goes_on_after_the_disk_was_full(tiny_model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=160k") as disk:
        prune_refused(tiny_model, disk)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        flags = ("prune", "--model", tiny_model, *SMALL_PRUNE, "--quiet", "--out")
        assert call(*flags, disk / "out", "--resume").code == 0
        assert call(*flags, disk / "again").code == 0
        for file in (disk / "again").iterdir():
            if file.name != "measured.json":
                assert (disk / "out" / file.name).read_bytes() == file.read_bytes()


def test_write_error_in_a_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without root: the system says that the disk is full."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OwlDeployError, match="disk full while writing"):
        write_report({"rows": []}, tmp_path / "report")
    assert tree(tmp_path) == {"report", "report/report.json"}


# Ctrl-C and SIGTERM, at a real process.


def start(tmp_path: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command line with a folder of its own for temporary files."""
    (tmp_path / "scratch").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "owl_deploy", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        # A test run in the background may have been told to ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop(process: subprocess.Popen[str], when: Callable[[psutil.Process], bool], number: signal.Signals) -> Call:
    """Send a signal as soon as a condition holds; fails where a child process is left."""
    watched = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while not when(watched):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)
    children = watched.children(recursive=True)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    return Call(process.returncode, stdout, stderr)


LEFT = "nothing half-written was left; prune and run continue with --resume, sweep by itself"
SENTENCE = {
    signal.SIGINT: f"owl-deploy: interrupted: {LEFT}",
    signal.SIGTERM: f"owl-deploy: terminated: {LEFT}",
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_prune_leaves_only_what_resume_needs(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    flags = ("--calibration", "python-docs", "--n-samples", "200", "--seq-len", "64", "--threads", "1", "--quiet")
    process = start(tmp_path, "prune", "--model", tiny_model, *flags, "--out", tmp_path / "out")
    done = stop(process, lambda _: (tmp_path / ".out.partial" / "fingerprint.json").exists(), number)
    assert (done.code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == SENTENCE[number]
    assert tree(tmp_path) == {"scratch"}


def test_interrupted_export_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "export", tiny_model, "--out", tmp_path / "out", "--threads", "1", "--quiet", "--json")
    # The parity gate runs the engine in a worker process.
    done = stop(process, lambda parent: len(parent.children()) > 0, signal.SIGINT)
    assert done.code == 130
    (tmp_path / "scratch" / ".ses").unlink(missing_ok=True)
    assert done.document == {"error": SENTENCE[signal.SIGINT].removeprefix("owl-deploy: "), "exit_code": 130}
    assert done.stderr.splitlines()[-1] == SENTENCE[signal.SIGINT]
    assert tree(tmp_path) == {"scratch"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_bench_leaves_nothing(artifact: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    before = tree(artifact)
    flags = (
        "--past-len",
        "100",
        "--prompt-len",
        "8",
        "--rounds",
        "10000",
        "--window",
        "64",
        "--max-windows",
        "1",
        "--threads",
        "1",
    )
    out = ("--baseline", "artifact", "--out", tmp_path / "report", "--quiet")
    process = start(tmp_path, "bench", artifact, *flags, *out)
    evaluated = artifact / "evaluations.json"
    done = stop(process, lambda parent: evaluated.exists() and len(parent.children()) > 0, number)
    assert (done.code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == SENTENCE[number]
    assert tree(artifact) == {*before, "evaluations.json"}
    (tmp_path / "scratch" / ".ses").unlink(missing_ok=True)  # ONNX Runtime 1.31 leaves a session id there
    assert tree(tmp_path) == {"scratch", "artifact", *(f"artifact/{name}" for name in tree(artifact))}
    assert is_artifact(artifact)


def interrupted_bench(artifact: Path, out: Path, stage: str, n_done: int) -> None:
    """Bench for five rounds, and interrupt after so many steps of a stage, of which the first is the warming up."""

    def interrupt(step: Step) -> None:
        if step.stage.startswith(stage) and step.done == n_done:
            raise KeyboardInterrupt

    settings = BenchSettings(past_len=(8,), prompt_len=(8, 16), rounds=5, decode_samples=3, prefill_samples=2)
    evaluation = EvalSettings(window=64, max_windows=1)
    with pytest.raises(KeyboardInterrupt):
        run_bench(
            [artifact],
            out=out,
            settings=settings,
            baseline="artifact",
            evaluation=evaluation,
            threads=1,
            on_step=interrupt,
        )


def test_interrupted_bench_keeps_what_it_measured(artifact: Path, tmp_path: Path) -> None:
    interrupted_bench(artifact, tmp_path / "report", "prefill of 8", 1 + 3)
    result = read_report(tmp_path / "report")
    assert result["stopped"] == "prefill of 8 tokens, after 3 of 5 rounds"
    assert [(row["phase"], row["prompt_len"], len(row["samples_ns"])) for row in result["rows"]] == [
        ("decode", 0, 5),
        ("prefill", 8, 3),
    ]
    assert "Interrupted in prefill of 8 tokens" in (tmp_path / "report" / "report.md").read_text()


def test_bench_interrupted_in_its_second_round_keeps_nothing(artifact: Path, tmp_path: Path) -> None:
    interrupted_bench(artifact, tmp_path / "report", "decode", 1 + 1)
    assert not (tmp_path / "report").exists()


def test_folder_of_a_tiny_model_is_complete(tmp_path: Path) -> None:
    """The damage above is the only thing wrong with those models."""
    model = save_tiny_model(tmp_path / "model")
    assert call("prune", "--model", model, *SMALL_PRUNE, "--out", tmp_path / "out", "--quiet").code == 0
