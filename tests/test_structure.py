"""The structure stage: what is cut is what was masked, in every family it takes, and the result loads as any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TEXT, call, tree
from conftest import byte_tokenizer, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.evaluation import evaluate
from owl_deploy.policy_search import Found, Masks, most_probable, search
from owl_deploy.pruning import prune
from owl_deploy.recipe import EvalSettings, PruneSettings, StructureSettings
from owl_deploy.structure import StructureReport, masked, structure, structure_shape

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.15,
}
FAMILIES: dict[str, Any] = {
    "llama with all biases, tied": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral, one key per query": MistralConfig(**{**SIZES, "num_key_value_heads": 6}, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma, one key for all": GemmaConfig(**{**SIZES, "num_key_value_heads": 1}),
}


def settings(**changes: Any) -> StructureSettings:
    values = {"heads_kept": 0.67, "channels_kept": 0.7, "channel_multiple": 8, "n_steps": 4, "calibration": TEXT}
    small = {"n_samples": 6, "held_out": 0.7, "seq_len": 24, "batch_size": 2}
    return StructureSettings.model_validate({**values, **small, **changes})


def save_model(config: Any, folder: Path) -> Path:
    """Save a seeded model, with biases and norms that are not what they are initialised to."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def owl_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "owl.json").read_text())  # type: ignore[no-any-return]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def kept_masks(folder: Path, shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    sizes = {"heads": shape["n_key_value_heads"]["before"], "channels": shape["n_channels"]["before"]}
    masks = {kind: torch.zeros(shape["n_blocks"], size, dtype=torch.bool) for kind, size in sizes.items()}
    for block in owl_json(folder)["kept"]:
        for kind, mask in masks.items():
            mask[block["index"], block[kind]] = True
    return masks


Pair = tuple[Path, Path]
"""Source and result."""


@pytest.fixture(scope="module")
def cut_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Models of FAMILIES by name, each saved and cut once."""

    @cache
    def made(name: str) -> Pair:
        folder = tmp_path_factory.mktemp("structure")
        source = save_model(FAMILIES[name], folder / "source")
        structure(str(source), settings(), out=folder / "out", threads=1)
        return source, folder / "out"

    return made


@pytest.fixture(scope="module", params=FAMILIES)
def cut(request: pytest.FixtureRequest, cut_of: Callable[[str], Pair]) -> Pair:
    return cut_of(request.param)


# --- What comes out -------------------------------------------------------------------------------


@torch.inference_mode()
def test_logits_are_those_of_the_whole_model_with_units_masked(cut: tuple[Path, Path]) -> None:
    source, out = cut
    masks = kept_masks(out, owl_json(out)["shape"])
    assert not all(mask.all() for mask in masks.values())
    whole, smaller = load(source), load(out)
    blocks = whole.model.layers
    readers = {"heads": [b.self_attn.o_proj for b in blocks], "channels": [b.mlp.down_proj for b in blocks]}
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 260, (1, 40)))
    dense = whole(tokens).logits
    with masked(readers, masks):
        expected = whole(tokens).logits
    assert (expected - dense).abs().max() > 1e-2  # the masks do something
    assert torch.equal(whole(tokens).logits, dense)  # and the hooks are gone
    torch.testing.assert_close(smaller(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_masking_is_zeroing_the_weights_that_read_the_units(cut: tuple[Path, Path]) -> None:
    """The oracle for the masks themselves: a head's columns of o_proj, a channel's column of down_proj."""
    source, out = cut
    whole, smaller = load(source), load(out)
    config = whole.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    for block, kept in zip(whole.model.layers, owl_json(out)["kept"], strict=True):
        for query_head in range(config.num_attention_heads):
            if query_head // per_group not in kept["heads"]:
                block.self_attn.o_proj.weight[:, query_head * 8 : (query_head + 1) * 8] = 0
        for channel in set(range(48)) - set(kept["channels"]):
            block.mlp.down_proj.weight[:, channel] = 0
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(smaller(tokens).logits, whole(tokens).logits, rtol=1e-5, atol=1e-5)


def test_configuration_says_the_new_sizes_and_nothing_else_changes(cut: tuple[Path, Path]) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in cut)
    shape = owl_json(cut[1])["shape"]
    groups, heads = shape["n_key_value_heads"]["after"], shape["n_heads"]["after"]
    sizes = {"num_key_value_heads": groups, "num_attention_heads": heads, "intermediate_size": 32, "head_dim": 8}
    assert after == {**before, **sizes}
    assert heads % groups == 0
    assert AutoConfig.from_pretrained(cut[1]).head_dim == 8


def test_result_loads_without_a_tensor_missing_or_left_over(cut: tuple[Path, Path]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(cut[1], output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    assert sum(p.numel() for p in model.parameters()) == owl_json(cut[1])["shape"]["n_parameters"]["after"]
    before = sum(p.numel() for p in load(cut[0]).parameters())
    assert before == owl_json(cut[1])["shape"]["n_parameters"]["before"]


def test_tensors_that_are_not_cut_are_the_same(cut: tuple[Path, Path]) -> None:
    before, after = stored(cut[0]), stored(cut[1])
    assert before.keys() == after.keys()
    whole = [name for name in before if before[name].shape == after[name].shape]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(whole)
    assert all(torch.equal(before[name], after[name]) for name in whole)


def test_result_is_never_worse_than_the_metric_on_what_is_held_out(cut: tuple[Path, Path]) -> None:
    record = owl_json(cut[1])["search"]
    losses = record["held_out_loss"]
    first, *others = record["checks"]
    assert all(check["gain_error"] is not None for check in others)
    better = [check for check in others if check["gain"] > check["gain_error"]]
    assert losses["chosen"] == min((check["held_out_loss"] for check in better), default=first["held_out_loss"])
    assert losses["chosen"] <= losses["metric"] == first["held_out_loss"]


# --- One model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2(cut_of: Callable[[str], Pair]) -> Path:
    return cut_of("qwen2")[0]


@pytest.fixture(scope="module")
def qwen2_cut(cut_of: Callable[[str], Pair]) -> Path:
    return cut_of("qwen2")[1]


def run(source: Path, out: Path, **changes: Any) -> StructureReport:
    return structure(str(source), settings(**changes), out=out, threads=1)


def test_biases_are_cut_with_their_rows(qwen2: Path, qwen2_cut: Path) -> None:
    before, after = stored(qwen2), stored(qwen2_cut)
    for block in owl_json(qwen2_cut)["kept"]:
        prefix = f"model.layers.{block['index']}.self_attn"
        keys = torch.cat([before[f"{prefix}.k_proj.bias"][8 * g : 8 * g + 8] for g in block["heads"]])
        queries = torch.cat([before[f"{prefix}.q_proj.bias"][16 * g : 16 * g + 16] for g in block["heads"]])
        assert torch.equal(after[f"{prefix}.k_proj.bias"], keys)
        assert torch.equal(after[f"{prefix}.q_proj.bias"], queries)


def test_metric_is_weight_norm_times_input_norm_of_the_dense_model(qwen2: Path, tmp_path: Path) -> None:
    """Without a search exactly these units stay, computed here in float64 by hand."""
    run(qwen2, tmp_path / "out", n_steps=0)
    facts = owl_json(tmp_path / "out")
    rows = torch.from_numpy(calibration_tokens(open_checkpoint(str(qwen2)), settings(), seed=0).tokens)
    model = load(qwen2)
    seen: dict[str, list[torch.Tensor]] = {}
    for index, block in enumerate(model.model.layers):
        for kind, linear in (("heads", block.self_attn.o_proj), ("channels", block.mlp.down_proj)):
            inputs = seen.setdefault(f"{index}.{kind}", [])
            linear.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0][0].double()))
    with torch.inference_mode():
        for row in rows[:2]:  # the others are held out
            model(row[None])
    for index, block in enumerate(model.model.layers):
        for kind, linear, n_units, n_kept in (
            ("heads", block.self_attn.o_proj, 3, 2),
            ("channels", block.mlp.down_proj, 48, 32),
        ):
            norms = torch.cat(seen[f"{index}.{kind}"]).norm(dim=0) * linear.weight.double().norm(dim=0)
            metric = norms.reshape(n_units, -1).norm(dim=1)
            assert facts["kept"][index][kind] == sorted(metric.topk(n_kept).indices.tolist())


def test_same_seed_gives_the_same_files(qwen2: Path, qwen2_cut: Path, tmp_path: Path) -> None:
    run(qwen2, tmp_path / "again")
    for file in ("owl.json", "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "again" / file).read_bytes() == (qwen2_cut / file).read_bytes()


def test_type_of_the_weights_and_the_tied_head_stay(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", dtype="bfloat16")
    half = load(source).to(torch.bfloat16)
    half.save_pretrained(source)
    run(source, tmp_path / "out", heads_kept=0.5, n_steps=0)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_source_in_several_files_gives_as_many(qwen2: Path, qwen2_cut: Path, tmp_path: Path) -> None:
    load(qwen2).save_pretrained(tmp_path / "source", max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    n_files = len(list((tmp_path / "source").glob("*.safetensors")))
    assert n_files > 1
    run(tmp_path / "source", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == n_files
    several, single = stored(tmp_path / "out"), stored(qwen2_cut)
    assert several.keys() == single.keys()
    assert all(torch.equal(several[name], single[name]) for name in single)
    assert load(tmp_path / "out").config.intermediate_size == 32


def test_pruned_source_keeps_its_zeros_but_not_its_facts(qwen2: Path, tmp_path: Path) -> None:
    wanted = PruneSettings(method="magnitude", allocation="uniform", sparsity=0.5)
    prune(str(qwen2), wanted, out=tmp_path / "sparse", threads=1)
    run(tmp_path / "sparse", tmp_path / "out", n_steps=0)
    facts = owl_json(tmp_path / "out")
    assert "structure" in facts["recipe"]
    assert "linears" not in facts
    assert not (tmp_path / "out" / "allocation.json").exists()
    assert (stored(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() > 0.2


def test_result_can_be_pruned_evaluated_and_cut_again(qwen2_cut: Path, tmp_path: Path) -> None:
    run(qwen2_cut, tmp_path / "twice", heads_kept=0.5, channels_kept=0.5, n_steps=0)
    wanted = PruneSettings(calibration=TEXT, n_samples=2, seq_len=24, sparsity=0.5)
    prune(str(tmp_path / "twice"), wanted, out=tmp_path / "sparse", threads=1)
    (result,) = evaluate([str(tmp_path / "sparse")], EvalSettings(text=TEXT, window=32, max_windows=1), threads=1)
    assert result.perplexity > 1
    config = AutoConfig.from_pretrained(tmp_path / "sparse")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.intermediate_size == 16


@pytest.mark.parametrize(("n_samples", "n_held_out"), [(15, 4), (13, 3)])
def test_fewer_than_four_held_out_sequences_are_no_search(
    qwen2: Path, tmp_path: Path, n_samples: int, n_held_out: int
) -> None:
    run(qwen2, tmp_path / "out", n_samples=n_samples, held_out=0.25, n_steps=1)
    record = owl_json(tmp_path / "out")["search"]
    assert record["n_held_out"] == n_held_out
    assert (record["n_steps"], record["candidate"] is None) == ((1, False) if n_held_out == 4 else (0, True))
    assert ("takes 4 held-out sequences, there are 3" in record["chosen"]["reason"]) == (n_held_out == 3)


@pytest.mark.parametrize(
    ("spread", "is_taken", "reason"),
    [(3.0, True, "the gain is above its standard error"), (4.0, False, "no gain is above its standard error")],
)
def test_record_says_what_other_masks_gain_and_whether_they_are_taken(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float, is_taken: bool, reason: str
) -> None:
    """Four held-out sequences gain 2 + spread and 2 - spread in turn, by any masks but those of the metric."""

    def with_made_up_losses(start: Any, n_kept: Any, _: Any, *arguments: Any, **keywords: Any) -> Found:
        of_metric = most_probable(start["channels"], n_kept["channels"])

        def losses(masks: Masks, numbers: Sequence[int]) -> list[float]:
            is_other = not torch.equal(masks["channels"], of_metric)
            return [9.0 - is_other * (2 + spread * (-1) ** number) for number in numbers]

        return search(start, n_kept, losses, *arguments, **keywords)

    monkeypatch.setattr("owl_deploy.structure.search", with_made_up_losses)
    run(qwen2, tmp_path / "out", n_steps=1)
    facts = owl_json(tmp_path / "out")["search"]
    assert facts["candidate"]["gain"] == pytest.approx(2)
    assert facts["candidate"]["gain_error"] == pytest.approx(spread / math.sqrt(3))
    assert facts["chosen"] == {"step": int(is_taken), "is_draw": is_taken, "reason": reason}
    assert facts["held_out_loss"]["metric"] == 9
    assert facts["held_out_loss"]["chosen"] == (7 if is_taken else 9)
    assert (facts["swapped"]["channels"] > 0) == is_taken


def test_budget_ends_the_search_early(qwen2: Path, tmp_path: Path) -> None:
    report = run(qwen2, tmp_path / "out", n_steps=100_000, budget_seconds=0.05)
    record = report.facts["search"]
    assert record["n_steps"] == record["checks"][-1]["step"] < 100_000


def test_owl_json_says_what_was_done_with_what(qwen2: Path, qwen2_cut: Path) -> None:
    facts = owl_json(qwen2_cut)
    assert (facts["kind"], facts["format_version"]) == ("checkpoint", 1)
    assert facts["recipe"] == {"model": str(qwen2), "seed": 0, "structure": settings().model_dump(mode="json")}
    assert facts["source"]["sha256"] == open_checkpoint(str(qwen2)).fingerprint
    assert facts["calibration"]["n_samples"] == 6
    assert (facts["search"]["n_training"], facts["search"]["n_held_out"]) == (2, 4)
    assert len(facts["search"]["losses"]) == facts["search"]["n_steps"] == 4
    assert {"torch", "transformers"} <= facts["versions"].keys()
    assert [len(block["channels"]) for block in facts["kept"]] == [32, 32]
    assert [len(block["heads"]) for block in facts["kept"]] == [2, 2]
    assert {"seconds", "peak_rss_bytes"} <= json.loads((qwen2_cut / "measured.json").read_text()).keys()


# --- Counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "channels", "multiple", "expected"),
    [
        (0.67, 0.7, 8, (2, 32)),  # 33.6 channels
        (1.0, 0.7, 1, (3, 34)),
        (0.5, 1.0, 7, (2, 48)),  # 1.5 groups: halves up; a share of 1 is not rounded
        (0.01, 0.01, 16, (1, 16)),  # at least one
        (0.5, 0.99, 32, (2, 32)),  # 47.52 channels are 32 x 1.485
        (0.5, 0.99, 20, (2, 40)),  # 20 x 2.376
        (0.5, 0.99, 31, (2, 48)),  # 31 x 1.53, but there are no 62
    ],
)
def test_counts_are_rounded(
    qwen2: Path, heads: float, channels: float, multiple: int, expected: tuple[int, int]
) -> None:
    wanted = settings(heads_kept=heads, channels_kept=channels, channel_multiple=multiple)
    shape = structure_shape(open_checkpoint(str(qwen2)), wanted)
    assert (shape.n_groups_kept, shape.n_channels_kept) == expected
    assert shape.n_heads_kept == 2 * expected[0]


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "channels", "said"), [(1.0, 1.0, "heads_kept 1 and channels_kept 1"), (0.9, 0.99, "in steps of 16")]
)
def test_nothing_to_remove_is_refused(qwen2: Path, tmp_path: Path, heads: float, channels: float, said: str) -> None:
    with pytest.raises(RecipeError, match=f"{said}.*lower one of them"):
        run(qwen2, tmp_path / "out", heads_kept=heads, channels_kept=channels, channel_multiple=16)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=260),
        Phi3Config(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
    ids=["gpt2", "phi3"],
)
def test_other_architectures_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=f"architecture '{config.model_type}'.*structure takes llama"):
        run(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_there_is_refused_and_replaced_by_force(qwen2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(OwlDeployError, match="exists already"):
        run(qwen2, out)
    assert tree(out) == {"precious"}
    structure(str(qwen2), settings(n_steps=0), out=out, threads=1, force=True)
    assert "precious" not in tree(out)
    assert (out / "owl.json").exists()


def test_failure_leaves_nothing_behind(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OwlDeployError("disk full")

    monkeypatch.setattr("owl_deploy.structure.write_tensors", fail)
    with pytest.raises(OwlDeployError, match="disk full"):
        run(qwen2, tmp_path / "out", n_steps=0)
    assert tree(tmp_path) == set()


def test_weights_with_nan_are_refused(qwen2: Path, tmp_path: Path) -> None:
    load(qwen2).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OwlDeployError, match="NaN or Inf"):
        run(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heads_kept", 0), ("heads_kept", 1.1), ("channels_kept", 0), ("channels_kept", float("nan")),
        ("n_masks", 1), ("n_samples", 1), ("budget_seconds", 0), ("held_out", 0), ("held_out", 1), ("sharpness", 0),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        settings(**{key: value})


# --- Command line ---------------------------------------------------------------------------------

SMALL = ("--heads-kept", "0.67", "--channels-kept", "0.7", "--channel-multiple", "8", "--calibration", TEXT)
SEARCH = ("--n-samples", "16", "--seq-len", "24", "--n-steps", "3", "--threads", "1")


def test_command_prints_one_document(qwen2: Path, tmp_path: Path) -> None:
    done = call("structure", "--model", qwen2, *SMALL, *SEARCH, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    document = done.document
    assert document["checkpoint"] == str(tmp_path / "out")
    assert document["shape"] == owl_json(tmp_path / "out")["shape"]
    assert document["search"] == owl_json(tmp_path / "out")["search"]
    assert {"seconds", "peak_rss_bytes", "tokens_sha256"} <= document.keys()
    assert "searching structure: 3/3" in done.stderr


def test_command_prints_a_table_and_the_losses(qwen2: Path, tmp_path: Path) -> None:
    done = call("structure", "--model", qwen2, *SMALL, *SEARCH, "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert ["heads", "6", "4"] in lines
    assert ["key/value", "heads", "3", "2"] in lines
    assert ["channels", "48", "32"] in lines
    record = owl_json(tmp_path / "out")["search"]
    losses, candidate = record["held_out_loss"], record["candidate"]
    assert f"Held-out loss {losses['chosen']:.4f}; by the metric alone {losses['metric']:.4f}" in done.stdout
    assert f"gain {candidate['gain']:.4f}, standard error {candidate['gain_error']:.4f}\n" in done.stdout
    assert f": {record['chosen']['reason']}\n" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Checkpoint: {tmp_path / 'out'}"


def test_dry_run_shows_the_shape_and_writes_nothing(qwen2: Path, tmp_path: Path) -> None:
    done = call("structure", "--model", qwen2, *SMALL, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    assert done.document["checkpoint"] is done.document["search"] is None
    assert done.document["shape"]["n_channels"] == {"before": 48, "after": 32}
    done = call("structure", "--model", qwen2, *SMALL, "--out", tmp_path / "out", "--dry-run")
    assert "Nothing written" in done.stdout
    assert tree(tmp_path) == set()


def test_command_without_out_is_refused(qwen2: Path) -> None:
    done = call("structure", "--model", qwen2, *SMALL)
    assert done.code == 2
    assert "--out" in done.stderr
