"""The export stage as a whole: what the folder holds, what its manifest says, and who can run it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from conftest import TINY, OwlDeploy, byte_tokenizer, save_tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.engines.process import open_worker
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.export.writer import export_onnx
from owl_deploy.pruning import prune
from owl_deploy.recipe import ExportSettings, PruneSettings
from owl_deploy.text import Encoder

FILES = {
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    "owl.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}


@pytest.fixture(scope="session")
def pruned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 70 % of its linears' weights at zero."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    settings = PruneSettings(method="magnitude", allocation="uniform", sparsity=0.7)
    prune(str(tiny_model), settings, out=folder, threads=1)
    return folder


def export(model: Path, out: Path, *, parity: bool = False, force: bool = False, **settings: Any) -> OnnxArtifact:
    return export_onnx(str(model), ExportSettings(**settings), out=out, threads=1, parity=parity, force=force)


def change_tensors_(model: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Add tensors to a checkpoint's only weight file, and remove those given as None."""
    tensors = {**load_file(model / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def greedy_tokens(folder: Path, prompt: list[int], n_tokens: int) -> list[int]:
    """Return the prompt and its continuation by onnxruntime-genai, as a user would call it."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens: list[int] = generator.get_sequence(0).tolist()
    return tokens


def torch_greedy_tokens(model: Path, prompt: list[int], n_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt])
    tokens: list[int] = (
        AutoModelForCausalLM.from_pretrained(model)
        .generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n_tokens, do_sample=False)[0]
        .tolist()
    )
    return tokens


def test_command_prints_what_it_wrote(owl_deploy: OwlDeploy, pruned_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    result = owl_deploy(
        "export", pruned_model, "--weights", "sparse-initializer", "--out", out, "--threads", "1", "--json", "--quiet"
    )
    assert (result.returncode, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    manifest = open_artifact(out).manifest
    assert summary["artifact"] == str(out)
    assert {key: summary[key] for key in summary if key != "artifact"} == {
        key: manifest[key] for key in summary if key != "artifact"
    }
    assert (summary["target"], summary["weights"], summary["precision"]) == (
        "onnxruntime",
        "sparse-initializer",
        "fp32",
    )
    assert summary["parity"]["passed"]
    assert summary["parity"]["top1_agreement"] == 1.0
    assert {item.name for item in out.iterdir()} == FILES


def test_command_says_in_words_what_each_matrix_took(pruned_model: Path, tmp_path: Path) -> None:
    flags = ("--weights", "sparse-initializer", "--no-parity", "--quiet")
    result = call("export", pruned_model, "--out", tmp_path / "artifact", *flags)
    assert result.code == 0
    assert result.stdout.count(": coo-varint, predicted ") == 14
    assert "1 of 15 matrices are dense" in result.stdout
    assert "Parity:" not in result.stdout


@pytest.mark.parametrize("target", ["onnxruntime", "deepsparse"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("weights", ["dense", "sparse-initializer"])
def test_manifest_agrees_with_the_files_and_the_model(target: str, is_tied: bool, weights: str, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "dense", tie_word_embeddings=is_tied)
    model = tmp_path / "pruned"
    prune(str(source), PruneSettings(method="magnitude", allocation="uniform", sparsity=0.8), out=model, threads=1)
    artifact = export(model, tmp_path / "artifact", target=target, weights=weights)
    manifest, facts = artifact.manifest, artifact.facts
    loaded = AutoModelForCausalLM.from_pretrained(model)

    files = [item for item in artifact.path.iterdir() if item.name != "owl.json"]
    assert manifest["bytes_on_disk"] == sum(item.stat().st_size for item in files)

    # A decode step multiplies by every linear, the head among them, and gathers one row of the embedding.
    linears = [module.weight for module in loaded.modules() if isinstance(module, nn.Linear)]
    assert facts.bytes_per_decode_step == {
        "dense": 4 * sum(weight.numel() for weight in linears),
        "nonzero": 4 * sum(int(weight.count_nonzero()) for weight in linears),
    }

    matrices = {matrix["name"]: matrix for matrix in manifest["matrices"]}
    tensors = {name: tensor.detach() for name, tensor in loaded.named_parameters() if tensor.ndim == 2}
    for name, matrix in matrices.items():
        tensor = tensors[name.removesuffix(".transposed")]
        stored = tensor.T if name.endswith(".transposed") else tensor
        assert matrix["shape"] == list(stored.shape)
        assert matrix["sparsity"] == pytest.approx(float((tensor == 0).float().mean()), abs=1e-6)
        assert 0 <= matrix["bytes"] - matrix["predicted_bytes"] <= 12
        assert matrix["bytes"] <= 4 * tensor.numel()
        if weights == "dense":
            assert (matrix["encoding"], matrix["is_external"]) == ("dense", True)
    assert {name.removesuffix(".transposed") for name in matrices} == tensors.keys()
    n_elements = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices.values())
    assert manifest["bytes_dense"] == facts.bytes_dense == 4 * n_elements

    in_blocks = [tensor for name, tensor in tensors.items() if ".layers." in name]
    n_zeros = sum(int((tensor == 0).sum()) for tensor in in_blocks)
    assert facts.sparsity["target"] == 0.8
    assert facts.sparsity["linears"] == pytest.approx(n_zeros / sum(tensor.numel() for tensor in in_blocks))
    n_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    assert facts.sparsity["model"] == pytest.approx(n_zeros / n_parameters)


def test_manifest_says_where_the_artifact_comes_from(pruned_model: Path, tmp_path: Path) -> None:
    artifact = export(pruned_model, tmp_path / "artifact")
    assert artifact.manifest["checkpoint"] == json.loads((pruned_model / "owl.json").read_text())
    weights = {item.name for item in pruned_model.glob("*.safetensors")}
    assert artifact.manifest["checkpoint_sha256"].keys() == {"config.json", *weights}
    assert artifact.manifest["parity"] is None
    assert artifact.manifest["versions"].keys() >= {"onnx", "onnxruntime", "torch", "transformers"}


def test_sparse_artifact_of_a_pruned_model_is_smaller(pruned_model: Path, tmp_path: Path) -> None:
    sizes = {
        weights: export(pruned_model, tmp_path / weights, weights=weights).manifest["bytes_on_disk"]
        for weights in ("dense", "sparse-initializer")
    }
    # 70 % of the blocks are zeros; a non-zero takes 5 to 6 bytes instead of 4. The embedding stays dense.
    assert sizes["sparse-initializer"] < 0.8 * sizes["dense"]


@pytest.mark.parametrize("weights", ["dense", "sparse-initializer"])
def test_half_precision_takes_less_of_the_disk_and_computes_the_same(
    weights: str, pruned_model: Path, tmp_path: Path
) -> None:
    whole = export(pruned_model, tmp_path / "fp32", weights=weights)
    half = export(pruned_model, tmp_path / "fp16", weights=weights, precision="fp16", parity=True)
    assert half.manifest["parity"]["passed"]
    kinds = {matrix["precision"] for matrix in half.manifest["matrices"]}
    assert kinds == {"fp16"}
    sizes = [sum(matrix["bytes"] for matrix in one.manifest["matrices"]) for one in (half, whole)]
    # Positions take as much as before.
    assert sizes[0] < (0.51 if weights == "dense" else 0.75) * sizes[1]


def test_weight_beyond_half_precision_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = 7e4
    source = tmp_path / "large"
    shutil.copytree(tiny_model, source)
    model.save_pretrained(source)
    with pytest.raises(OwlDeployError, match=r"layers\.1\.mlp\.down_proj\.weight holds values beyond 65504"):
        export(source, tmp_path / "artifact", precision="fp16")
    assert not (tmp_path / "artifact").exists()


def test_dense_model_stays_dense_as_sparse_initializers(tiny_model: Path, tmp_path: Path) -> None:
    artifact = export(tiny_model, tmp_path / "artifact", weights="sparse-initializer")
    assert {matrix["encoding"] for matrix in artifact.manifest["matrices"]} == {"dense"}
    assert artifact.facts.sparsity == {"target": 0.0, "linears": 0.0, "model": 0.0}
    dense = export(tiny_model, tmp_path / "dense")
    for name in ("model.onnx", "model.onnx.data"):
        assert (artifact.path / name).read_bytes() == (dense.path / name).read_bytes()


@pytest.mark.deepsparse
@pytest.mark.parametrize("is_tied", [True, False])
def test_sparseml_reads_the_same_zeros_and_the_same_numbers(is_tied: bool, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "dense", tie_word_embeddings=is_tied)
    model = tmp_path / "pruned"
    prune(str(source), PruneSettings(method="magnitude", allocation="uniform", sparsity=0.8), out=model, threads=1)
    artifact = export(model, tmp_path / "artifact", target="deepsparse", weights="sparse-initializer")
    with open_worker("deepsparse") as worker:
        seen = worker.ask("check-sparse", model=str(artifact.path / "model.onnx"))

    parameters = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    matrices = {matrix["name"]: matrix for matrix in artifact.manifest["matrices"]}
    multiplied = matrices.keys() - {"model.embed_tokens.weight"}
    assert seen["linears"].keys() == multiplied
    for name, linear in seen["linears"].items():
        weight = parameters[name.removesuffix(".transposed")].detach().T
        assert linear["shape"] == matrices[name]["shape"] == list(weight.shape)
        n_zeros = weight.numel() - int(weight.count_nonzero())
        assert linear["sparsity"] == pytest.approx(n_zeros / weight.numel())
        assert matrices[name]["sparsity"] == pytest.approx(n_zeros / weight.numel())
    assert seen["sha256"] == {
        name: hashlib.sha256(parameters[name.removesuffix(".transposed")].detach().T.numpy().tobytes()).hexdigest()
        for name in matrices
        if matrices[name]["encoding"] != "dense"
    }
    assert len(seen["sha256"]) == 14


def test_export_is_the_same_every_time(pruned_model: Path, tmp_path: Path) -> None:
    folders = [export(pruned_model, tmp_path / name, weights="sparse-initializer").path for name in "ab"]
    for name in sorted(FILES):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("max_positions", [16, 100, 100_000])
def test_context_is_what_was_asked_for_up_to_the_models_own(
    max_positions: int, tiny_model: Path, tmp_path: Path
) -> None:
    artifact = export(tiny_model, tmp_path / "artifact", parity=True, max_positions=max_positions)
    longest = min(max_positions, TINY["max_position_embeddings"])
    genai = json.loads((artifact.path / "genai_config.json").read_text())
    assert artifact.facts.max_positions == longest
    assert (genai["model"]["context_length"], genai["search"]["max_length"]) == (longest, longest)


@pytest.mark.parametrize("weights", ["dense", "sparse-initializer"])
def test_genai_generates_the_tokens_of_transformers(weights: str, pruned_model: Path, tmp_path: Path) -> None:
    """From a copy of the folder, without its manifest: nothing outside of the model's files is needed."""
    artifact = export(pruned_model, tmp_path / "artifact", weights=weights)
    copy = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    shutil.rmtree(artifact.path)
    (copy / "owl.json").unlink()
    words = ["An", "owl", "hunts", "at", "night", "when", "mice", "come", "out"]
    prompts = [byte_tokenizer()(" ".join(words[i:] + words[:i]))["input_ids"] for i in range(len(words))]
    prompts.append(prompts[0][:1])
    assert len(prompts) == 10
    for prompt in prompts:
        tokens = greedy_tokens(copy, prompt, 64)
        assert len(tokens) > len(prompt) + 5
        assert tokens == torch_greedy_tokens(pruned_model, prompt, 64)


def test_genai_reads_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    artifact = export(tiny_model, tmp_path / "artifact")
    tokenizer = genai.Tokenizer(genai.Model(str(artifact.path)))
    text = "An owl, at night: 70 %\n"
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == byte_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["a zero more", "a zero less"])
def test_zeros_that_are_not_those_of_the_manifest_are_refused(value: float, pruned_model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    source = Path(shutil.copytree(pruned_model, tmp_path / "changed"))
    (shard,) = (file for file in source.glob("*.safetensors") if f"{name}.weight" in load_file(file))
    tensors = load_file(shard)
    weight = tensors[f"{name}.weight"]
    first = (weight == 0).nonzero()[0] if value else weight.nonzero()[0]
    weight[tuple(first)] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(OwlDeployError, match=rf"the zeros of {name} are not those of its manifest"):
        export(source, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("weights", ["dense", "sparse-initializer", "sparse-operator"])
def test_what_another_tool_pruned_is_counted(weights: str, pruned_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pruned_model, tmp_path / "foreign"))
    ours = export(source, tmp_path / "ours", weights=weights).manifest["sparsity"]
    (source / "owl.json").unlink()
    found = export(source, tmp_path / "artifact", weights=weights).manifest["sparsity"]
    assert found["linears"] == pytest.approx(ours["linears"], abs=1e-6)
    assert 0 < found["model"] < found["linears"]


def test_zeros_that_a_dense_model_has_anyway_are_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(source / "model.safetensors")[name]
    change_tensors_(source, {name: weight.masked_fill(torch.rand(weight.shape) < 0.15, 0)})
    assert set(export(source, tmp_path / "artifact").manifest["sparsity"].values()) == {0.0}


@pytest.mark.parametrize(("target", "merges"), [("deepsparse", ["o w", "ow l"]), ("onnxruntime", None)])
def test_merges_are_text_where_an_old_tokenizer_reads_them(
    target: str, merges: list[str] | None, tiny_model: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    written = json.loads((source / "tokenizer.json").read_text())
    vocab = written["model"]["vocab"]
    pairs = [["o", "w"], ["ow", "l"]]
    written["model"].update(vocab={**vocab, "ow": len(vocab), "owl": len(vocab) + 1}, merges=pairs)
    (source / "tokenizer.json").write_text(json.dumps(written))
    artifact = export(source, tmp_path / "artifact", target=target)
    found = json.loads((artifact.path / "tokenizer.json").read_text())
    assert found["model"]["merges"] == (merges or pairs)
    assert found["model"]["vocab"]["owl"] == len(vocab) + 1
    assert Encoder.open(artifact.path).encode("owl").tolist() == Encoder.open(source).encode("owl").tolist()


def test_tensor_without_a_place_in_the_graph_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    name = "model.layers.1.self_attn.q_norm.weight"
    change_tensors_(model, {name: torch.ones(16)})
    with pytest.raises(UnsupportedModelError, match=rf"no place in the graph for tensor {name} \(1 in all\)"):
        export(model, tmp_path / "artifact")
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_bias_in_some_blocks_only_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    change_tensors_(model, {"model.layers.1.mlp.up_proj.bias": torch.ones(96)})
    with pytest.raises(UnsupportedModelError, match="no place in the graph"):
        export(model, tmp_path / "artifact")


def test_frequencies_that_old_checkpoints_hold_are_let_be(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    change_tensors_(model, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert export(model, tmp_path / "artifact").path.is_dir()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_checkpoint_without_a_weight_is_refused(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    change_tensors_(model, {name: None})
    with pytest.raises(UnsupportedModelError, match=name):
        export(model, tmp_path / "artifact")
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_existing_folder_is_refused_unless_forced(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(OwlDeployError, match="exists already: give another --out, or --force"):
        export(tiny_model, out)
    assert (out / "mine").read_text() == "precious"
    assert {item.name for item in export(tiny_model, out, force=True).path.iterdir()} == FILES


def test_failure_while_weights_are_written_leaves_nothing(pruned_model: Path, tmp_path: Path) -> None:
    settings = ExportSettings(target="deepsparse", weights="sparse-initializer")
    with pytest.raises(OwlDeployError, match="DeepSparse reads them from nowhere else"):
        export_onnx(str(pruned_model), settings, out=tmp_path / "artifact", threads=1, inline_limit=1000)
    assert list(tmp_path.iterdir()) == []


def test_damaged_generation_settings_are_one_clear_error(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_text("{")
    with pytest.raises(OwlDeployError, match=r"cannot read .*generation_config\.json"):
        export_onnx(str(model), out=tmp_path / "artifact", threads=1, parity=False)
    assert not (tmp_path / "artifact").exists()
