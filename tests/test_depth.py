"""Depth pruning, against models whose blocks were deleted by hand and figures of the whole model in float64."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import TEXT, call, tree
from conftest import byte_tokenizer, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import owl_deploy
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.depth import DepthReport, prune_depth
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.pruning import prune
from owl_deploy.recipe import DepthSettings, PruneSettings, checked
from owl_deploy.skeleton import Skeleton, open_skeleton

N_BLOCKS, N_SAMPLES, SEQ_LEN = 6, 3, 24
SMALL = ("--calibration", TEXT, "--n-samples", str(N_SAMPLES), "--seq-len", str(SEQ_LEN), "--threads", "1")


def base(**changes: Any) -> dict[str, Any]:
    return {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 260, "max_position_embeddings": 64},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **changes},
    }


GPT2 = {"n_embd": 32, "n_layer": N_BLOCKS, "n_head": 4, "vocab_size": 260, "n_positions": 64}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", base(tie_word_embeddings=True), "model.layers"),
    "gpt2": ("GPT2", GPT2, "transformer.h"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": N_BLOCKS, "n_head": 4, "vocab_size": 260}, "transformer.h"),
    "qwen2": ("Qwen2", base(use_sliding_window=True, sliding_window=5, max_window_layers=3), "model.layers"),
    "gemma2": ("Gemma2", base(sliding_window=5), "model.layers"),
    "gemma3": ("Gemma3Text", base(sliding_window=5, rope_local_base_freq=100.0, layer_types=None), "model.layers"),
    "glm4-moe": (  # the first two blocks have no experts; routers have a buffer that is in the checkpoint
        "Glm4Moe",
        base(**MIXTURE, n_routed_experts=4, first_k_dense_replace=2, n_shared_experts=1, n_group=1, topk_group=1),
        "model.layers",
    ),
    "qwen3-moe": ("Qwen3Moe", base(**MIXTURE, num_experts=4, mlp_only_layers=[0, 4, 5]), "model.layers"),
}
"""Configuration class, what it is made of, name of the list of blocks."""


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """Save a seeded model whose every parameter and stored buffer is random, with a byte tokenizer."""
    kind, config, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**config, **changes}))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn_like(value) * 0.2 + (1.0 if value.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of six blocks."""
    return save_tiny_model(tmp_path_factory.mktemp("depth") / "model", num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without the two blocks of the lowest influence."""
    folder = tmp_path_factory.mktemp("small")
    cut(tiny, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def shortened(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without the two of its inner blocks whose absence costs least perplexity."""
    folder = tmp_path_factory.mktemp("shortened")
    cut(tiny, folder / "out", **SHORTENED)
    return folder / "out"


SHORTENED: dict[str, Any] = {"method": "shortened", "protect_first": 1, "protect_last": 1}


@pytest.fixture(scope="module")
def tail(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its last two blocks."""
    folder = tmp_path_factory.mktemp("tail")
    cut(tiny, folder / "out", method="tail", calibration="text:missing.txt")
    return folder / "out"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The seeded models of `save_family` by name, each saved once."""
    folder = tmp_path_factory.mktemp("families")

    def saved(name: str) -> Path:
        return folder / name if (folder / name).exists() else save_family(name, folder / name)

    return saved


Family = Callable[[str], Path]


@pytest.fixture(scope="module")
def without_1_and_4(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same models without the second and the fifth of their six blocks."""
    folder = tmp_path_factory.mktemp("without-1-and-4")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as monkeypatch:
                remove_whatever_is_measured(monkeypatch, 1, 4)
                cut(family(name), folder / name)
        return folder / name

    return made


def settings(**changes: Any) -> DepthSettings:
    values = {"n_blocks": 2, "calibration": TEXT, "n_samples": N_SAMPLES, "seq_len": SEQ_LEN}
    return DepthSettings.model_validate({**values, **changes})


def cut(model: Path, out: Path | None, **changes: Any) -> DepthReport:
    return prune_depth(str(model), settings(**changes), out=out, threads=1)


def tokens_of(model: Path) -> torch.Tensor:
    return torch.from_numpy(calibration_tokens(open_checkpoint(str(model)), settings(), seed=0).tokens)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    # The cap on the scores of Gemma 2 is in its plain attention alone.
    options = {"attn_implementation": "eager"} if config_json(folder)["model_type"] == "gemma2" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def blocks_of(model: Any) -> Any:
    """The list of decoder blocks: the first list of modules."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def delete_by_hand_(model: Any, removed: list[int]) -> Any:
    blocks = blocks_of(model)
    name = next(name for name, module in model.named_modules() if module is blocks)
    kept = nn.ModuleList([block for index, block in enumerate(blocks) if index not in removed])
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], kept)
    return model


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def owl_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "owl.json").read_text())  # type: ignore[no-any-return]


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def remove_whatever_is_measured(monkeypatch: pytest.MonkeyPatch, *removed: int) -> None:
    """Let shortgpt remove the given blocks."""
    figures = [0.0 if index in removed else 1.0 for index in range(N_BLOCKS)]
    monkeypatch.setattr("owl_deploy.depth.block_influences", lambda *_: figures)


Removing = Callable[..., None]


@pytest.fixture
def removing(monkeypatch: pytest.MonkeyPatch) -> Removing:
    return partial(remove_whatever_is_measured, monkeypatch)


# --- The smaller model --------------------------------------------------------------------------


def check_logits(source: Path, out: Path, removed: list[int]) -> None:
    assert owl_json(out)["removed"] == removed
    smaller, whole = loaded(out), loaded(source)
    assert len(blocks_of(smaller)) == N_BLOCKS - len(removed)
    dense = logits_of(whole)
    expected = logits_of(delete_by_hand_(whole, removed))
    assert torch.equal(logits_of(smaller), expected)
    assert not torch.allclose(expected, dense)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_model_with_the_blocks_deleted_by_hand(
    name: str, family: Family, without_1_and_4: Family
) -> None:
    check_logits(family(name), without_1_and_4(name), [1, 4])


@pytest.mark.parametrize(("name", "removed"), [("llama", [5]), ("gemma3", [0, 2, 3])])
def test_first_and_last_blocks_go_as_any_other(
    name: str, removed: list[int], family: Family, removing: Removing, tmp_path: Path
) -> None:
    removing(*removed)
    cut(family(name), tmp_path / "out", n_blocks=len(removed))
    check_logits(family(name), tmp_path / "out", removed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "glm4-moe"])
def test_tensors_are_those_of_the_source_under_consecutive_numbers(
    name: str, family: Family, without_1_and_4: Family
) -> None:
    source, out = family(name), without_1_and_4(name)
    prefix = FAMILIES[name][2]
    before, after = stored_tensors(source), stored_tensors(out)
    for key, tensor in after.items():
        old = key
        for new_number, old_number in enumerate((0, 2, 3, 5)):
            if key.startswith(f"{prefix}.{new_number}."):
                old = key.replace(f"{prefix}.{new_number}.", f"{prefix}.{old_number}.")
        assert same_bits(tensor, before[old]), key
    n_gone = sum(key.startswith((f"{prefix}.1.", f"{prefix}.4.")) for key in before)
    assert n_gone > 4
    assert len(after) == len(before) - n_gone


def test_result_loads_without_a_missing_or_unexpected_tensor_and_tied(small: Path) -> None:
    loaded_with_info: Any = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    model, info = loaded_with_info
    assert not any(info.values())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in stored_tensors(small)


def test_half_precision_checkpoint_keeps_its_type(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    loaded(tiny, torch.bfloat16).save_pretrained(source)
    cut(source, tmp_path / "out", method="tail")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert config_json(tmp_path / "out")["dtype"] == "bfloat16"


def test_index_names_every_tensor_and_every_shard(small: Path) -> None:
    index = json.loads((small / "model.safetensors.index.json").read_text())
    stored = {file.name: load_file(file) for file in small.glob("*.safetensors")}
    assert len(stored) == 1 + 4  # a shard per block: no more is in memory at once
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored_tensors(small).values())


def test_tokenizer_and_generation_settings_come_along_and_nothing_is_left_beside(tiny: Path, small: Path) -> None:
    copied = {path.name for path in tiny.iterdir() if path.suffix == ".json"}
    assert {"generation_config.json", "tokenizer.json"} < copied
    assert all((small / name).read_bytes() == (tiny / name).read_bytes() for name in copied - {"config.json"})
    ours = {"owl.json", "measured.json", "model.safetensors.index.json"}
    assert {path.name for path in small.iterdir() if path.suffix == ".json"} == copied | ours
    assert [path.name for path in small.parent.iterdir()] == ["out"]


def test_configuration_changes_in_the_number_of_blocks_alone(tiny: Path, small: Path) -> None:
    assert config_json(small) == {**config_json(tiny), "num_hidden_layers": 4}


def test_configuration_of_gpt2_keeps_its_own_name_of_that_number(family: Family, without_1_and_4: Family) -> None:
    assert config_json(without_1_and_4("gpt2")) == {**config_json(family("gpt2")), "n_layer": 4}


def test_what_the_configuration_lists_per_block_is_cut_with_the_blocks(without_1_and_4: Family) -> None:
    assert config_json(without_1_and_4("gemma2"))["layer_types"] == [f"{name}_attention" for name in SLIDES]
    qwen2 = config_json(without_1_and_4("qwen2"))
    assert qwen2["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert qwen2["max_window_layers"] == 2
    assert config_json(without_1_and_4("qwen3-moe"))["mlp_only_layers"] == [0, 3]
    assert config_json(without_1_and_4("glm4-moe"))["first_k_dense_replace"] == 1


SLIDES = ("sliding", "sliding", "full", "full")
"""Of alternating blocks 0 to 5 what is left without 1 and 4."""


def test_list_derived_from_the_position_is_written_out(removing: Removing, tmp_path: Path) -> None:
    source = save_family("gemma2", tmp_path / "model")
    document = config_json(source)
    del document["layer_types"]  # as in the files that were published
    (source / "config.json").write_text(json.dumps(document))
    removing(1, 4)
    cut(source, tmp_path / "out")
    assert config_json(tmp_path / "out")["layer_types"] == [f"{name}_attention" for name in SLIDES]


def test_token_ids_that_are_as_many_as_blocks_are_no_list_per_block(tmp_path: Path) -> None:
    ends = [1, 2, 3, 4, 5, 6]
    source = save_tiny_model(tmp_path / "model", num_hidden_layers=N_BLOCKS, eos_token_id=ends)
    cut(source, tmp_path / "out", method="tail")
    assert config_json(tmp_path / "out")["eos_token_id"] == ends


def test_blocks_behind_the_last_one_move_up(tiny: Path, removing: Removing, tmp_path: Path) -> None:
    source = tmp_path / "model"
    model = loaded(tiny)
    model.save_pretrained(source, state_dict={**model.state_dict(), "model.layers.6.extra.weight": torch.ones(2, 2)})
    byte_tokenizer().save_pretrained(source)
    removing(1, 4)
    cut(source, tmp_path / "out")
    assert "model.layers.4.extra.weight" in stored_tensors(tmp_path / "out")
    assert "model.layers.6.extra.weight" not in stored_tensors(tmp_path / "out")


# --- Figures ------------------------------------------------------------------------------------


def influences_by_hand(model: Any, rows: torch.Tensor) -> list[float]:
    """1 - mean cosine in float64, token by token; the last hidden state of transformers is behind the norm."""
    last: list[torch.Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    cosines: list[list[float]] = [[] for _ in range(N_BLOCKS)]
    with torch.inference_mode():
        for row in rows:
            states = list(model(row[None], output_hidden_states=True, use_cache=False).hidden_states)
            states[-1] = last[-1]
            for index in range(N_BLOCKS):
                for a, b in zip(states[index][0].numpy(), states[index + 1][0].numpy(), strict=True):
                    cosines[index].append(float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)))
    hook.remove()
    assert len(cosines[0]) == N_SAMPLES * SEQ_LEN
    return [1 - float(np.mean(values)) for values in cosines]


def perplexity_by_hand(model: Any, rows: torch.Tensor) -> float:
    """Exp of the mean over sequences of the mean NLL per token."""
    with torch.inference_mode():
        logits = model(rows, use_cache=False).logits.numpy()
    nlls = []
    for row, scores in zip(rows.tolist(), logits, strict=True):
        for position in range(SEQ_LEN - 1):
            exponentials = np.exp(scores[position] - scores[position].max())
            nlls.append(-math.log(exponentials[row[position + 1]] / exponentials.sum()))
    return math.exp(float(np.mean(nlls)))


def taylor_by_hand(model: Any, rows: torch.Tensor) -> list[float]:
    """All sequences at once, whose mean is the loss that transformers computes for labels."""
    model(rows, labels=rows, use_cache=False).loss.backward()
    return [
        sum(
            float(np.abs(parameter.detach().numpy() * parameter.grad.numpy()).sum())
            for name, parameter in block.named_parameters()
            if name.endswith("weight")
        )
        for block in blocks_of(model)
    ]


def figures_of(report: DepthReport, name: str) -> list[float]:
    return [row[name] for row in report.facts["figures"]]


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_block_influence_is_that_of_all_hidden_states_in_float64(name: str, family: Family) -> None:
    source = family(name)
    report = cut(source, None)
    expected = influences_by_hand(loaded(source, torch.float64), tokens_of(source))
    assert figures_of(report, "block_influence") == pytest.approx(expected, abs=1e-5)
    assert report.removed == sorted(np.argsort(expected)[:2].tolist())


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_perplexity_is_that_of_the_model_with_one_block_deleted_by_hand(name: str, family: Family) -> None:
    source = family(name)
    report = cut(source, None, method="shortened", protect_first=0, protect_last=0)
    rows = tokens_of(source)
    model = loaded(source, torch.float64)
    expected = [perplexity_by_hand(delete_by_hand_(copy.deepcopy(model), [i]), rows) for i in range(N_BLOCKS)]
    assert figures_of(report, "perplexity") == pytest.approx(expected, rel=1e-4)
    assert report.removed == sorted(np.argsort(expected)[:2].tolist())


def test_perplexity_is_the_same_with_one_sequence_at_a_time(
    tiny: Path, shortened: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owl_deploy.block_importance._STREAM_BYTES", 1)
    assert cut(tiny, None, **SHORTENED).facts == owl_json(shortened)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_taylor_score_is_that_of_one_batch_in_float64(name: str, family: Family) -> None:
    source = family(name)
    report = cut(source, None, method="shortened", criterion="taylor", protect_first=0, protect_last=0)
    expected = taylor_by_hand(loaded(source, torch.float64), tokens_of(source))
    assert figures_of(report, "taylor") == pytest.approx(expected, rel=1e-4)
    assert report.removed == sorted(np.argsort(expected)[:2].tolist())


@pytest.mark.parametrize(
    "how", [{}, {"method": "shortened", "criterion": "taylor", "protect_first": 0, "protect_last": 0}], ids=str
)
def test_block_that_does_nothing_goes_first_and_is_not_missed(how: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", num_hidden_layers=N_BLOCKS)
    model = loaded(source)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    model.save_pretrained(source)
    assert cut(source, tmp_path / "out", n_blocks=1, **how).removed == [3]
    assert torch.equal(logits_of(loaded(tmp_path / "out")), logits_of(model))


def test_tail_removes_the_last_blocks_without_data(tail: Path) -> None:
    facts = owl_json(tail)
    assert facts["removed"] == [4, 5]
    assert facts["calibration"] is None
    assert all(set(row) == {"index", "is_protected", "is_removed"} for row in facts["figures"])


def test_blocks_of_equal_figures_go_from_the_first_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("owl_deploy.depth.block_influences", lambda *_: [1.0, 0.5, 0.5, 0.2, 0.5, 1.0])
    assert cut(tiny, None, n_blocks=3).removed == [1, 2, 3]


def test_figure_that_is_not_finite_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl_deploy.depth.block_influences", lambda *_: [1.0, math.nan, 0.5, 0.2, 0.5, 1.0])
    with pytest.raises(OwlDeployError, match="the block_influence of block 1 is nan"):
        cut(tiny, None)


# --- Protection and refusals --------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["perplexity", "taylor"])
def test_protected_blocks_stay_however_low_they_rank(tiny: Path, criterion: str) -> None:
    for first in (0, 3):
        report = cut(
            tiny,
            None,
            n_blocks=1,
            method="shortened",
            criterion=criterion,
            protect_first=first,
            protect_last=N_BLOCKS - 1 - first,
        )
        assert report.removed == [first]
        assert [row["is_protected"] for row in report.facts["figures"]] == [i != first for i in range(N_BLOCKS)]


def test_shortened_protects_the_first_four_and_the_last_two_blocks(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", num_hidden_layers=8)
    report = cut(source, None, method="shortened")
    assert report.removed == [4, 5]
    assert ["perplexity" in row for row in report.facts["figures"]] == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_blocks": 6}, "n_blocks 6 would leave nothing of a model of 6 blocks: remove at most 5"),
        ({"n_blocks": 7, "method": "tail"}, "n_blocks 7 would leave nothing"),
        (
            {"n_blocks": 1, "method": "shortened"},
            "n_blocks 1 is more than the 0 of 6 blocks that protect_first 4 and protect_last 2 leave to choose from",
        ),
        ({"n_blocks": 4, "method": "shortened", "protect_first": 2, "protect_last": 1}, "more than the 3 of 6 blocks"),
        ({"n_blocks": 1, "method": "shortened", "protect_first": 9}, "more than the 0 of 6 blocks"),
    ],
    ids=str,
)
def test_more_blocks_than_there_are_to_remove_are_refused(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        cut(tiny, tmp_path / "out", **changes)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"n_blocks": 0}, "n_blocks: input should be greater than or equal to 1, got 0"),
        ({}, "n_blocks is missing"),
        ({"n_blocks": 1, "criterion": "taylor"}, "criterion taylor needs method shortened, got method shortgpt"),
        (
            {"n_blocks": 1, "method": "tail", "protect_last": 0},
            "protect_last 0 needs method shortened, got method tail",
        ),
        ({"n_blocks": 1, "protect_first": -1}, "protect_first: input should be greater than or equal to 0, got -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        checked(DepthSettings, values, where="here")


def test_model_whose_blocks_share_weights_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shared(*arguments: Any) -> Skeleton:
        skeleton = open_skeleton(*arguments)
        blocks: Any = skeleton.blocks
        blocks[4].mlp = blocks[1].mlp
        return skeleton

    monkeypatch.setattr("owl_deploy.depth.open_skeleton", shared)
    with pytest.raises(UnsupportedModelError, match=r"blocks 1 and 4 of .* share the weight mlp\.gate_proj\.weight"):
        cut(tiny, tmp_path / "out", method="tail")
    assert tree(tmp_path) == set()


def test_model_that_scales_attention_by_the_number_of_the_block_is_refused(removing: Removing, tmp_path: Path) -> None:
    source = save_family("gpt2", tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    removing(1, 4)
    with pytest.raises(UnsupportedModelError, match=r"block 2 of .* cannot be block 1 .* attention is scaled by its"):
        cut(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    cut(source, tmp_path / "out", method="tail")  # the others keep their numbers
    assert len(blocks_of(loaded(tmp_path / "out"))) == 4


def test_block_that_computes_something_else_in_another_place_is_refused(
    tiny: Path, removing: Removing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def scaled(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output, weights = forward(self, *arguments, **keywords)
        return output / (self.layer_idx + 1), weights

    monkeypatch.setattr(attention, "forward", scaled)
    removing(1, 4)
    with pytest.raises(UnsupportedModelError, match=r"block 2 of .* cannot be block 1 .* its output on the same input"):
        cut(tiny, tmp_path / "out")
    assert tree(tmp_path) == set()


def test_model_whose_every_other_block_has_experts_is_refused(removing: Removing, tmp_path: Path) -> None:
    source = save_family("qwen3-moe", tmp_path / "model", mlp_only_layers=[], decoder_sparse_step=2)
    removing(0, 5)
    with pytest.raises(UnsupportedModelError, match="cannot lose blocks"):
        cut(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_window_that_would_slide_in_another_block_is_refused_though_a_short_text_does_not_show_it(
    removing: Removing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = save_family("gemma2", tmp_path / "model", sliding_window=40)
    removing(1, 4)

    def forget_layer_types_(_: Any, document: dict[str, Any], kept: list[int]) -> None:
        document["num_hidden_layers"] = len(kept)
        del document["layer_types"]

    monkeypatch.setattr("owl_deploy.depth._cut_config_", forget_layer_types_)
    with pytest.raises(UnsupportedModelError, match=r"block 2 of .* would be 'full_attention' instead of 'sliding"):
        cut(source, tmp_path / "out")


def test_output_that_exists_is_refused_and_untouched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OwlDeployError, match="exists already: give another --out, or --force"):
        cut(tiny, tmp_path / "out")
    assert tree(tmp_path) == {"out", "out/mine.txt"}
    prune_depth(str(tiny), settings(), out=tmp_path / "out", threads=1, force=True)
    assert "out/mine.txt" not in tree(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_run_leaves_what_was_there_even_with_force(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    def fail(*_: Any) -> None:
        raise OwlDeployError("no")

    monkeypatch.setattr("owl_deploy.depth._check_model", fail)
    with pytest.raises(OwlDeployError, match="no"):
        prune_depth(str(tiny), settings(), out=tmp_path / "out", threads=1, force=True)
    assert tree(tmp_path) == {"out", "out/mine.txt"}


# --- What is on record, and other stages --------------------------------------------------------


def test_same_work_gives_the_same_bytes(tiny: Path, shortened: Path, tmp_path: Path) -> None:
    cut(tiny, tmp_path / "again", **SHORTENED)
    for file in shortened.iterdir():
        if file.name != "measured.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_dry_run_chooses_the_same_and_writes_nothing(
    tiny: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = cut(tiny, None)
    assert planned.checkpoint is None
    assert planned.facts == owl_json(small)
    assert tree(tmp_path) == set()


def test_report_says_what_owl_json_says(tiny: Path, tmp_path: Path) -> None:
    report = cut(tiny, tmp_path / "out", method="tail")
    assert report.checkpoint == tmp_path / "out"
    assert report.facts == owl_json(tmp_path / "out")


def test_owl_json_says_what_was_done_to_what_with_which_data(tiny: Path, small: Path) -> None:
    facts = owl_json(small)
    assert (facts["kind"], facts["format_version"]) == ("checkpoint", 1)
    assert facts["recipe"] == {"model": str(tiny), "seed": 0, "depth": settings().model_dump(mode="json")}
    assert facts["source"] == {"model": str(tiny), "sha256": open_checkpoint(str(tiny)).fingerprint}
    assert facts["calibration"]["n_samples"] == N_SAMPLES
    assert [row["index"] for row in facts["figures"] if row["is_removed"]] == facts["removed"]
    assert facts["n_blocks"] == {"before": 6, "after": 4}
    for name, folder in (("before", tiny), ("after", small)):
        assert facts["n_parameters"][name] == sum(parameter.numel() for parameter in loaded(folder).parameters())
    measured = json.loads((small / "measured.json").read_text())
    assert 0 < measured["seconds"] < 600
    assert 10 * 2**20 < measured["peak_rss_bytes"] < 2**40


def test_smaller_checkpoint_can_be_pruned_and_says_so(small: Path, tmp_path: Path) -> None:
    wanted = PruneSettings(sparsity=0.5, calibration=TEXT, n_samples=2, seq_len=24)
    facts = prune(str(small), wanted, out=tmp_path / "sparse", threads=1).facts
    assert facts == owl_json(tmp_path / "sparse")
    assert (facts["kind"], set(facts["recipe"])) == ("checkpoint", {"model", "seed", "prune"})
    assert [block["index"] for block in facts["blocks"]] == [0, 1, 2, 3]
    assert facts["source"]["model"] == str(small)
    model = loaded(tmp_path / "sparse")
    zeros = [float((linear.weight == 0).float().mean()) for linear in linears_of(model)]
    assert len(zeros) == 4 * 7
    assert np.mean(zeros) == pytest.approx(0.5, abs=0.01)
    assert torch.isfinite(logits_of(model)).all()


def linears_of(model: Any) -> list[nn.Linear]:
    return [module for module in blocks_of(model).modules() if type(module) is nn.Linear]


def test_pruned_checkpoint_keeps_its_zeros_and_its_lineage(tiny: Path, tmp_path: Path) -> None:
    wanted = PruneSettings(method="magnitude", allocation="ramp", ramp_slope=0.05, sparsity=0.5)
    before = prune(str(tiny), wanted, out=tmp_path / "sparse", threads=1).facts
    cut(tmp_path / "sparse", tmp_path / "small", method="tail")
    facts = owl_json(tmp_path / "small")
    linears = linears_of(loaded(tmp_path / "small"))
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    size = sum(linear.weight.numel() for linear in linears)
    assert zeros / size < 0.45  # the last blocks of a ramp are the sparsest
    assert facts["sparsity"]["target"] == 0.5
    assert facts["sparsity"]["linears"] == pytest.approx(zeros / size, abs=1e-12)
    assert facts["sparsity"]["model"] == pytest.approx(zeros / facts["n_parameters"]["after"], abs=1e-12)
    assert 0 < facts["sparsity"]["mlp"] < 0.5
    lineage = facts["source"]["checkpoint"]
    assert (lineage["recipe"], lineage["mask_sha256"]) == (before["recipe"], before["mask_sha256"])
    assert not (tmp_path / "small" / "allocation.json").exists()  # it numbers the blocks as they were


def test_smaller_checkpoint_can_be_made_smaller_again(tiny: Path, tail: Path, tmp_path: Path) -> None:
    cut(tail, tmp_path / "three", method="tail", n_blocks=1)
    assert owl_json(tmp_path / "three")["source"]["checkpoint"]["removed"] == [4, 5]
    expected = logits_of(delete_by_hand_(loaded(tiny), [3, 4, 5]))
    assert torch.equal(logits_of(loaded(tmp_path / "three")), expected)


def test_smaller_checkpoint_is_exported_as_any_other(small: Path, tmp_path: Path) -> None:
    flags = ("--max-positions", "64", "--no-parity", "--threads", "1", "--out", tmp_path / "artifact", "--json")
    assert call("export", small, *flags).code == 0
    manifest = json.loads((tmp_path / "artifact" / "owl.json").read_text())
    assert manifest["n_blocks"] == 4
    assert manifest["checkpoint"]["removed"] == owl_json(small)["removed"]


# --- The command --------------------------------------------------------------------------------


def test_command_prints_a_table_of_the_blocks_and_what_is_left(tiny: Path, tmp_path: Path) -> None:
    done = call("depth", "--model", tiny, "--n-blocks", "2", *SMALL, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    facts = owl_json(tmp_path / "out")
    assert "block influence" in done.stdout
    for row in facts["figures"]:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"│ {row['index']} ")]
        assert f"{row['block_influence']:.5g}" in line
        assert ("removed" in line) == row["is_removed"]
    assert "4 of 6 blocks" in done.stdout
    assert f"Checkpoint: {tmp_path / 'out'}" in done.stdout


def test_command_prints_one_document(tiny: Path, tmp_path: Path) -> None:
    flags = ("--method", "shortened", "--protect-first", "1", "--protect-last", "1", *SMALL, "--quiet", "--json")
    done = call("depth", "--model", tiny, "--n-blocks", "2", *flags, "--out", tmp_path / "out")
    assert (done.code, done.stderr) == (0, "")
    document, facts = done.document, owl_json(tmp_path / "out")
    assert document["checkpoint"] == str(tmp_path / "out")
    assert (document["method"], document["criterion"]) == ("shortened", "perplexity")
    assert {key: document[key] for key in ("removed", "figures", "n_blocks", "n_parameters")} == {
        key: facts[key] for key in ("removed", "figures", "n_blocks", "n_parameters")
    }
    assert document["tokens_sha256"] == facts["calibration"]["tokens_sha256"]
    assert {"seconds", "peak_rss_bytes"} <= document.keys()


def test_dry_run_of_the_command_shows_the_table_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    done = call("depth", "--model", tiny, "--n-blocks", "2", "--method", "tail", "--dry-run", "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.stdout.count("removed") == 2
    assert "Nothing written (--dry-run)" in done.stdout
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (("--n-blocks", "0"), 2, "n_blocks: input should be greater than or equal to 1, got '0'"),
        (("--n-blocks", "6"), 2, "n_blocks 6 would leave nothing of a model of 6 blocks"),
    ],
    ids=str,
)
def test_command_refuses_in_one_sentence(
    tiny: Path, tmp_path: Path, flags: tuple[str, ...], code: int, sentence: str
) -> None:
    done = call("depth", "--model", tiny, *flags, *SMALL, "--quiet", "--out", tmp_path / "out")
    assert (done.code, done.stdout) == (code, "")
    assert sentence in done.sentence
    assert tree(tmp_path) == set()


def test_command_without_out_is_wrong_usage(tiny: Path) -> None:
    done = call("depth", "--model", tiny, "--n-blocks", "1")
    assert done.code == 2
    assert "Missing option '--out' (or '--dry-run', which writes nothing)" in done.stderr


def test_function_is_public() -> None:
    assert owl_deploy.prune_depth is prune_depth
