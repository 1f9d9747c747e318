"""The prune stage, against a driver as the published codes have it: the whole model in memory, hooks, two passes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from owl_deploy.block_pruning import mask_sha256
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.pruning import SparsityReport, prune
from owl_deploy.recipe import PruneSettings

TARGET, OWL_M, OWL_LAMBDA = 0.6, 3.0, 0.08
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMBINATIONS = [(method, how) for method in ("wanda", "magnitude") for how in ("uniform", "owl")]

Masks = dict[str, NDArray[np.bool_]]


def settings(text: Path, **changes: Any) -> PruneSettings:
    values = {"sparsity": TARGET, "owl_m": OWL_M, "owl_lambda": OWL_LAMBDA, "calibration": f"text:{text}"}
    return PruneSettings.model_validate({**values, "n_samples": 6, "seq_len": 40, **changes})


def calibration_rows(model: Path, text: Path) -> list[torch.Tensor]:
    tokens = calibration_tokens(open_checkpoint(str(model)), settings(text), seed=0).tokens
    return list(torch.from_numpy(tokens))


# --- The independent driver ---------------------------------------------------------------------


def n_lowest(n: int, sparsity: float) -> int:
    """n * sparsity to the nearest integer, halves down."""
    return ceil(n * Fraction(repr(sparsity)) - Fraction(1, 2))


def lowest_of(row: NDArray[Any], sparsity: float) -> NDArray[np.bool_]:
    """Say which values of a row are kept."""
    kept = np.ones(len(row), dtype=bool)
    kept[np.argsort(row, kind="stable")[: n_lowest(len(row), sparsity)]] = False
    return kept


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


@contextmanager
def squares_of_inputs(block: nn.Module, n_sequences: int) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Collect for every linear of a block the mean over sequences of the sum over tokens of x squared, in float64."""
    means = {name: np.zeros(linear.in_features) for name, linear in linears_of(block).items()}

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
            means[name] += np.square(inputs[0][0].numpy().astype(np.float64)).sum(axis=0) / n_sequences

        return see

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears_of(block).items()]
    yield means
    for handle in handles:
        handle.remove()


def scores_of(block: nn.Module, means: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Wanda: abs(W_ij) * sqrt(c_j)."""
    return {
        name: np.abs(linear.weight.numpy().astype(np.float64)) * np.sqrt(means[name])
        for name, linear in linears_of(block).items()
    }


@torch.inference_mode()
def published_driver(
    folder: Path, rows: list[torch.Tensor], method: str, allocation: str
) -> tuple[Masks, list[float], list[float]]:
    """Prune a whole model in memory; return masks by linear, sparsities and outlier ratios by block."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = model.model.layers

    ratios: list[float] = []
    for block in blocks:  # first pass: all blocks are dense
        with squares_of_inputs(block, len(rows)) as means:
            for row in rows:
                model(row[None], use_cache=False)
        flat = np.concatenate([score.ravel() for score in scores_of(block, means).values()])
        ratios.append(float((flat > OWL_M * flat.mean()).mean()))
    d = np.array(ratios)
    r = (d - d.min()) / (d.max() - d.min()) * 2 * OWL_LAMBDA if allocation == "owl" else np.zeros(len(d))
    sparsities = [float(s) for s in TARGET - (r - r.mean())]

    masks: Masks = {}
    for index, (block, sparsity) in enumerate(zip(blocks, sparsities, strict=True)):
        with squares_of_inputs(block, len(rows)) as means:  # second pass: the blocks before are pruned by now
            for row in rows:
                model(row[None], use_cache=False)
        for name, score in scores_of(block, means).items():
            weight = linears_of(block)[name].weight
            if method == "wanda":
                mask = np.stack([lowest_of(row, sparsity) for row in score])
            else:
                mask = lowest_of(weight.abs().numpy().ravel(), sparsity).reshape(score.shape)
            weight *= torch.from_numpy(mask)
            masks[f"model.layers.{index}.{name}"] = mask
    return masks, sparsities, ratios


# --- What our driver makes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """One run of our driver on the tiny model."""

    method: str
    allocation: str
    source: Path
    out: Path
    report: SparsityReport
    rows: list[torch.Tensor]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded letters, some more frequent than others."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    letters = np.random.default_rng(0).choice(list("aaabbcdefghij klm."), 2000)
    path.write_text("".join(letters))
    return path


@pytest.fixture(scope="module", params=COMBINATIONS, ids=["-".join(names) for names in COMBINATIONS])
def pruned(
    request: pytest.FixtureRequest, tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pruned:
    method, how = request.param
    out = tmp_path_factory.mktemp("pruned") / "out"
    report = prune(str(tiny_model), settings(text, method=method, allocation=how), out=out, threads=1)
    return Pruned(method, how, tiny_model, out, report, calibration_rows(tiny_model, text))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def is_pruned_name(name: str) -> bool:
    return name.split(".")[-2] in LINEARS


def are_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def owl_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "owl.json").read_text())  # type: ignore[no-any-return]


def test_masks_are_those_of_the_published_driver(pruned: Pruned) -> None:
    masks, _, _ = published_driver(pruned.source, pruned.rows, pruned.method, pruned.allocation)
    stored = stored_tensors(pruned.out)
    assert len(masks) == 14
    for name, mask in masks.items():
        np.testing.assert_array_equal((stored[f"{name}.weight"] != 0).numpy(), mask, err_msg=name)


def test_sparsities_and_outlier_ratios_are_those_of_the_published_driver(pruned: Pruned) -> None:
    _, sparsities, ratios = published_driver(pruned.source, pruned.rows, pruned.method, pruned.allocation)
    assert ratios[0] != ratios[1]
    blocks = owl_json(pruned.out)["blocks"]
    assert [block["index"] for block in blocks] == [0, 1]
    assert [block["sparsity"] for block in blocks] == pytest.approx(sparsities, abs=1e-12)
    if pruned.allocation == "owl":
        assert sorted(block["sparsity"] for block in blocks) == pytest.approx([TARGET - 0.08, TARGET + 0.08])
        assert [block["outlier_ratio"] for block in blocks] == pytest.approx(ratios, abs=1e-12)
    else:
        assert all("outlier_ratio" not in block for block in blocks)


def test_kept_weights_are_unchanged_and_pruned_ones_are_plus_zero(pruned: Pruned) -> None:
    before, after = stored_tensors(pruned.source), stored_tensors(pruned.out)
    for name in filter(is_pruned_name, before):
        kept = after[name] != 0
        assert are_same_bits(after[name][kept], before[name][kept])
        assert not torch.signbit(after[name][~kept]).any()


def test_tensors_outside_the_linears_of_blocks_are_untouched(pruned: Pruned) -> None:
    before, after = stored_tensors(pruned.source), stored_tensors(pruned.out)
    assert set(after) == set(before)
    others = [name for name in before if not is_pruned_name(name)]
    assert "model.embed_tokens.weight" in others
    assert len(others) == 2 + 2 * 2
    assert all(are_same_bits(before[name], after[name]) for name in others)


def test_result_loads_in_transformers_with_its_tied_head(pruned: Pruned) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pruned.source, dtype=torch.float32)
    loaded: Any = AutoModelForCausalLM.from_pretrained(pruned.out, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert are_same_bits(model.lm_head.weight, dense.lm_head.weight)
    share = np.mean([(linear.weight == 0).float().mean() for linear in linears_of(model.model.layers).values()])
    assert share == pytest.approx(TARGET, abs=0.01)


def test_every_linear_has_the_sparsity_asked_to_half_a_weight(pruned: Pruned) -> None:
    stored, facts = stored_tensors(pruned.out), owl_json(pruned.out)
    asked = {block["index"]: block["sparsity"] for block in facts["blocks"]}
    for linear in facts["linears"]:
        zeros = stored[f"{linear['name']}.weight"] == 0
        # Wanda rounds in every row, magnitude once in the matrix.
        parts = zeros if pruned.method == "wanda" else zeros.reshape(1, -1)
        wanted = parts.shape[1] * asked[int(linear["name"].split(".")[2])]
        assert (parts.sum(dim=1) - wanted).abs().max() <= 0.5 + 1e-9


def test_sparsity_in_owl_json_is_counted_in_the_stored_file(pruned: Pruned) -> None:
    stored, facts = stored_tensors(pruned.out), owl_json(pruned.out)
    n_zeros = n_weights = 0
    for linear in facts["linears"]:
        weight = stored[f"{linear['name']}.weight"]
        zeros = int((weight == 0).sum())
        assert linear["shape"] == list(weight.shape)
        assert linear["n_zeros"] == zeros
        assert linear["sparsity"] == pytest.approx(zeros / weight.numel(), abs=1e-12)
        assert linear["mask_sha256"] == mask_sha256({linear["name"]: weight != 0})
        n_zeros, n_weights = n_zeros + zeros, n_weights + weight.numel()
    assert len(facts["linears"]) == 14
    mlp = [stored[f"{linear['name']}.weight"] for linear in facts["linears"] if ".mlp." in linear["name"]]
    mlp_zeros, n_mlp = sum(int((weight == 0).sum()) for weight in mlp), sum(weight.numel() for weight in mlp)
    n_parameters = sum(tensor.numel() for tensor in stored.values())  # the tied head is stored, and counted, once
    assert facts["sparsity"] == {
        "target": TARGET,
        "linears": pytest.approx(n_zeros / n_weights, abs=1e-12),
        "model": pytest.approx(n_zeros / n_parameters, abs=1e-12),
        "mlp": pytest.approx(mlp_zeros / n_mlp, abs=1e-12),
    }
    for block in facts["blocks"]:
        mine = [linear for linear in facts["linears"] if linear["name"].split(".")[2] == str(block["index"])]
        elements = sum(linear["shape"][0] * linear["shape"][1] for linear in mine)
        assert block["realised"] == pytest.approx(sum(linear["n_zeros"] for linear in mine) / elements, abs=1e-12)


def test_owl_json_says_what_was_done_to_what_with_which_data(pruned: Pruned) -> None:
    facts = owl_json(pruned.out)
    keys = "kind format_version recipe versions source calibration sparsity blocks linears mask_sha256"
    assert set(facts) == set(keys.split())
    assert facts["kind"] == "checkpoint"
    assert facts["recipe"]["prune"]["method"] == pruned.method
    assert facts["recipe"]["prune"]["allocation"] == pruned.allocation
    assert facts["recipe"]["seed"] == 0
    weights = (pruned.source / "model.safetensors").read_bytes()
    assert facts["source"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"python", "owl-deploy", "torch", "transformers", "safetensors"} <= set(facts["versions"])
    if (pruned.method, pruned.allocation) == ("magnitude", "uniform"):
        assert facts["calibration"] is None
    else:
        tokens = torch.stack(pruned.rows).numpy().astype("<i8")
        assert facts["calibration"]["tokens_sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()


def test_measured_json_holds_seconds_and_peak_memory(pruned: Pruned) -> None:
    measured = json.loads((pruned.out / "measured.json").read_text())
    assert 0 < measured["seconds"] < 600
    assert 10 * 2**20 < measured["peak_rss_bytes"] < 2**40
    assert len(measured["blocks"]) == 2
    assert all(block["seconds"] >= 0 and block["peak_rss_bytes"] > 0 for block in measured["blocks"])


def test_report_has_the_keys_that_other_tools_rely_on(pruned: Pruned) -> None:
    document = json.loads(json.dumps(pruned.report.to_json()))
    keys = "checkpoint method allocation pattern sparsity blocks linears seconds peak_rss_bytes tokens_sha256"
    assert set(keys.split()) <= set(document)
    assert document["checkpoint"] == str(pruned.out)
    assert document["sparsity"] == owl_json(pruned.out)["sparsity"]


def test_configuration_and_tokenizer_come_along_and_nothing_is_left_beside(pruned: Pruned) -> None:
    names = {path.name for path in pruned.out.iterdir()}
    copied = {path.name for path in pruned.source.iterdir() if path.suffix == ".json"}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == copied | shards | {"owl.json", "allocation.json", "measured.json", "model.safetensors.index.json"}
    assert all((pruned.out / name).read_bytes() == (pruned.source / name).read_bytes() for name in copied)
    assert [path.name for path in pruned.out.parent.iterdir()] == ["out"]


def test_same_work_gives_the_same_bytes(pruned: Pruned, text: Path, tmp_path: Path) -> None:
    again = settings(text, method=pruned.method, allocation=pruned.allocation)
    prune(str(pruned.source), again, out=tmp_path / "again", threads=1)
    for file in pruned.out.iterdir():
        if file.name != "measured.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


# --- Other models and ways to fail --------------------------------------------------------------


def changed_model(folder: Path, changes: dict[str, torch.Tensor], **config: Any) -> Path:
    """Save the tiny model with some tensors replaced in its file."""
    save_tiny_model(folder, **config)
    tensors = load_file(folder / "model.safetensors")
    assert set(changes) <= set(tensors)
    save_file({**tensors, **changes}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_sparsity_zero_changes_no_tensor(tiny_model: Path, text: Path, tmp_path: Path, method: str) -> None:
    plain = settings(text, method=method, sparsity=0.0)
    facts = prune(str(tiny_model), plain, out=tmp_path / "out", threads=1).facts
    before, after = stored_tensors(tiny_model), stored_tensors(tmp_path / "out")
    assert all(are_same_bits(before[name], after[name]) for name in before)
    assert facts["sparsity"] == {"target": 0.0, "linears": 0.0, "model": 0.0, "mlp": 0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_keeps_its_type(text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = save_tiny_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    out = tmp_path / "out"
    prune(str(source), settings(text), out=out, threads=1)
    before, after = stored_tensors(source), stored_tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name in before:
        kept = after[name] != 0 if is_pruned_name(name) else torch.ones_like(after[name], dtype=torch.bool)
        assert torch.equal(after[name][kept], before[name][kept])
    masks, _, _ = published_driver(source, calibration_rows(source, text), "wanda", "owl")
    for name, mask in masks.items():
        np.testing.assert_array_equal((after[f"{name}.weight"] != 0).numpy(), mask, err_msg=name)


def test_untied_head_is_not_pruned(text: Path, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    prune(str(source), settings(text), out=tmp_path / "out", threads=1)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert set(after) == set(before)
    assert all(are_same_bits(before[name], after[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    masks, _, _ = published_driver(source, calibration_rows(source, text), "wanda", "owl")
    for name, mask in masks.items():
        np.testing.assert_array_equal((after[f"{name}.weight"] != 0).numpy(), mask, err_msg=name)


def test_sharded_checkpoint_gives_the_masks_of_the_whole_one(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((tiny_model / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = (
        prune(str(model), settings(text), out=tmp_path / name, threads=1)
        for name, model in (("a", tiny_model), ("b", sharded))
    )
    assert whole.facts["mask_sha256"] == parts.facts["mask_sha256"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_biases_stay_as_they_are(text: Path, tmp_path: Path) -> None:
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": torch.linspace(-1, 1, 64) for i in range(2)}
    source = changed_model(tmp_path / "model", bias, attention_bias=True)
    prune(str(source), settings(text), out=tmp_path / "out", threads=1)
    after = stored_tensors(tmp_path / "out")
    assert all(are_same_bits(after[name], value) for name, value in bias.items())


def test_zeros_that_were_there_before_count(text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    source = changed_model(tmp_path / "model", {f"{name}.weight": torch.zeros(96, 64)})
    facts = prune(str(source), settings(text), out=tmp_path / "out", threads=1).facts
    (linear,) = [linear for linear in facts["linears"] if linear["name"] == name]
    assert (linear["n_zeros"], linear["sparsity"]) == (96 * 64, 1.0)
    assert facts["blocks"][1]["realised"] > facts["blocks"][1]["sparsity"]


def test_uniform_magnitude_needs_no_calibration_text(tiny_model: Path, tmp_path: Path) -> None:
    plain = settings(tmp_path / "missing.txt", method="magnitude", allocation="uniform")
    assert prune(str(tiny_model), plain, out=tmp_path / "out", threads=1).facts["calibration"] is None


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_an_error_that_names_its_tensor(
    text: Path, tmp_path: Path, method: str, bad: float
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    value = torch.ones(32, 64)
    value[3, 5] = bad
    source = changed_model(tmp_path / "model", {name: value})
    with pytest.raises(OwlDeployError, match=rf"tensor {name} holds NaN or Inf"):
        prune(str(source), settings(text, method=method, allocation="uniform"), out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_embedding_that_is_not_finite_is_an_error_that_names_its_tensor(text: Path, tmp_path: Path) -> None:
    value = torch.full((260, 64), float("nan"))
    source = changed_model(tmp_path / "model", {"model.embed_tokens.weight": value})
    with pytest.raises(OwlDeployError, match=r"tensor model\.embed_tokens\.weight holds NaN or Inf"):
        prune(str(source), settings(text), out=tmp_path / "out", threads=1)


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_activation_that_overflows_is_an_error_that_names_its_block(
    text: Path, tmp_path: Path, allocation: str
) -> None:
    name = "model.layers.0.mlp.{}_proj.weight"
    huge = {name.format("up"): torch.full((96, 64), 1e20), name.format("down"): torch.full((64, 96), 1e30)}
    source = changed_model(tmp_path / "model", huge)
    with pytest.raises(OwlDeployError, match=r"(output of block 0|input of .*layers\.0\.mlp\.down_proj) holds NaN"):
        prune(str(source), settings(text, allocation=allocation), out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_squares_that_overflow_are_an_error_that_names_the_linear(text: Path, tmp_path: Path) -> None:
    huge = {"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), 1e20)}  # finite outputs, infinite squares
    source = changed_model(tmp_path / "model", huge)
    with pytest.raises(
        OwlDeployError, match=r"the input of model\.layers\.0\.mlp\.down_proj holds NaN or Inf, or its sq"
    ):
        prune(str(source), settings(text), out=tmp_path / "out", threads=1)


def test_output_that_exists_is_refused_and_untouched(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OwlDeployError, match="exists already: give another --out, or --force"):
        prune(str(tiny_model), settings(text), out=out, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "mine"


def test_force_replaces_what_was_there(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    prune(str(tiny_model), settings(text), out=out, threads=1, force=True)
    assert not (out / "mine.txt").exists()
    assert owl_json(out)["sparsity"]["target"] == TARGET
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_run_leaves_what_was_there_even_with_force(text: Path, tmp_path: Path) -> None:
    source = changed_model(tmp_path / "model", {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), torch.nan)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OwlDeployError, match="NaN"):
        prune(str(source), settings(text), out=out, threads=1, force=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_pruned_checkpoint_can_be_pruned_further(pruned: Pruned, text: Path, tmp_path: Path) -> None:
    further = settings(text, method=pruned.method, allocation="uniform", sparsity=0.8)
    prune(str(pruned.out), further, out=tmp_path / "out", threads=1)
    first, second = stored_tensors(pruned.out), stored_tensors(tmp_path / "out")
    facts = owl_json(tmp_path / "out")
    assert facts["recipe"]["prune"]["sparsity"] == 0.8
    assert facts["sparsity"]["linears"] == pytest.approx(0.8, abs=0.01)
    assert all(not second[name][first[name] == 0].any() for name in filter(is_pruned_name, first))
    assert set(second) == set(first)


def test_mask_hash_is_that_of_names_shapes_and_packed_bits() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    packed = bytes([0b10100100])
    assert mask_sha256({"a.b": mask}) == hashlib.sha256(b"a.b (2, 3)\n" + packed).hexdigest()
    assert mask_sha256({"a.b": mask}) != mask_sha256({"a.b": mask.reshape(3, 2)})


def test_every_shard_says_that_it_is_of_torch(pruned: Pruned) -> None:
    index = json.loads((pruned.out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(pruned.out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert name in opened.keys()  # noqa: SIM118  (no mapping)
