"""The plan of a pruning, against what pruning then really does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL_PRUNE, TEXT, call
from conftest import save_tiny_model
from planning import GIB, LLAMA_7B_LINEARS, settings

from owl_deploy.errors import RecipeError, UnsupportedModelError
from owl_deploy.plan import plan_pruning, write_plan
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import open_configuration

pytestmark = pytest.mark.usefixtures("known_speed")


# --- Against what prune does ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "wanda", "allocation": "owl"},
        {"method": "wanda", "allocation": "dlp", "allocation_per": "linear"},
        {"method": "magnitude", "allocation": "alphapruning", "alpha_estimator": "mid"},
        {"method": "sparsegpt", "allocation": "isc"},
        {"method": "foundation", "allocation": "ramp", "ramp_slope": 0.2},
        {"method": "dass", "allocation": "uniform"},
        {"method": "ria", "pattern": "keep 2 of 4"},
        {"method": "wanda", "pattern": "keep 3 of 8", "allocation": "owl"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_plan_says_what_prune_then_does(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    given = changes if "pattern" in changes else {"sparsity": 0.6, **changes}
    chosen = PruneSettings.model_validate({"calibration": TEXT, "n_samples": 4, "seq_len": 32, "owl_m": 3.0, **given})
    facts = plan_pruning(str(tiny_model), chosen, threads=1).facts
    done = prune(str(tiny_model), chosen, out=tmp_path / "out", threads=1).facts
    for planned, pruned in zip(facts["blocks"], done["blocks"], strict=True):
        figures = {key: value for key, value in pruned.items() if key not in ("index", "realised")}
        assert {key: planned[key] for key in figures} == figures
        assert planned["predicted"] == pytest.approx(pruned["realised"], abs=1e-12)
    for planned, pruned in zip(facts["linears"], done["linears"], strict=True):
        assert (planned["name"], planned["shape"]) == (pruned["name"], pruned["shape"])
        assert planned["sparsity"] == pruned["asked"]
        assert planned["n_zeros"] == pruned["n_zeros"]
    assert {key: facts["sparsity"][key] for key in done["sparsity"]} == pytest.approx(done["sparsity"], abs=1e-12)


def test_weighted_mean_of_what_is_asked_is_the_target(tiny_model: Path) -> None:
    facts = plan_pruning(str(tiny_model), settings(allocation_per="linear"), threads=1).facts
    assert len({linear["sparsity"] for linear in facts["linears"]}) > 2
    assert facts["sparsity"]["asked"] == pytest.approx(0.6, abs=1e-12)


@pytest.mark.parametrize("allocation_per", ["block", "linear"])
def test_written_allocation_can_be_given_to_prune(tiny_model: Path, tmp_path: Path, allocation_per: str) -> None:
    chosen = settings(allocation_per=allocation_per)
    write_plan(plan_pruning(str(tiny_model), chosen, threads=1), tmp_path / "plan")
    from_file = settings(allocation=f"file:{tmp_path / 'plan' / 'allocation.json'}")
    masks = [
        prune(str(tiny_model), one, out=tmp_path / str(i), threads=1).facts["mask_sha256"]
        for i, one in enumerate((chosen, from_file))
    ]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("changes", [{"allocation": "owl"}, {"allocation": "ramp"}])
def test_prune_after_plan_learns_nothing_twice(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = save_tiny_model(tmp_path / "model", seed=17)  # nobody else's
    stages: list[list[str]] = [[], []]

    def note(place: int) -> Any:
        def see(step: Step) -> None:
            stages[place].append(step.stage)

        return see

    facts = plan_pruning(str(model), settings(**changes), threads=1, on_step=note(0)).facts
    prune(str(model), settings(**changes), out=tmp_path / "out", threads=1, on_step=note(1))
    learned = {"owl": "inputs of the dense model", "ramp": "tuning the slope"}[changes["allocation"]]
    assert learned in stages[0]
    assert learned not in stages[1]
    assert facts["time"]["in_cache"] == [learned]
    others = sum(seconds for name, seconds in facts["time"]["phases"].items() if name != learned)
    assert facts["time"]["seconds"] == pytest.approx(others)


def test_plan_of_a_ramp_shows_the_slopes_that_were_tried(tiny_model: Path) -> None:
    facts = plan_pruning(str(tiny_model), settings(allocation="ramp"), threads=1).facts
    assert repr(facts["ramp"]["slope"]) in facts["ramp"]["losses"]


def test_plan_leaves_nothing_beside_the_model_and_prunes_nothing(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    before = {path: path.read_bytes() for path in model.iterdir()}
    plan_pruning(str(model), settings(), threads=1)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_model_facts_are_counts_of_the_model(tiny_model: Path) -> None:
    facts = plan_pruning(str(tiny_model), settings(allocation="uniform"), threads=1).facts["model"]
    in_block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    n_parameters = 2 * (in_block + 2 * 64) + 64 + 260 * 64
    assert (facts["n_blocks"], facts["n_linears"], facts["n_prunable"]) == (2, 14, 2 * in_block)
    assert facts["n_parameters"] == n_parameters
    assert facts["prunable_share"] == pytest.approx(2 * in_block / n_parameters)


def test_blocks_too_dense_to_be_faster_are_noted(tiny_model: Path) -> None:
    low = plan_pruning(str(tiny_model), settings(allocation="ramp", ramp_slope=0.5 - 1e-9, sparsity=0.5), threads=1)
    assert any(note.startswith("1 of 2 blocks are asked for less than 40%") for note in low.facts["notes"])
    high = plan_pruning(str(tiny_model), settings(allocation="uniform", sparsity=0.4), threads=1)
    assert not any("less than 40%" in note for note in high.facts["notes"])


# --- A configuration without weights -------------------------------------------------------------


def test_configuration_alone_has_the_tensors_of_the_model(llama_7b: Path) -> None:
    checkpoint = open_configuration(llama_7b)
    assert checkpoint.tensors["model.layers.31.mlp.down_proj.weight"].shape == (4096, 11008)
    assert checkpoint.dtype("lm_head.weight") == torch.float16
    assert len(checkpoint.tensors) == 32 * 9 + 3


def test_uniform_and_ramp_and_files_need_no_weights(six_blocks: Path, tmp_path: Path) -> None:
    uniform = plan_pruning(str(six_blocks), settings(allocation="uniform"), threads=1)
    assert [block["sparsity"] for block in uniform.facts["blocks"]] == [0.6] * 6
    ramp = plan_pruning(str(six_blocks), settings(allocation="ramp", ramp_slope=0.02), threads=1)
    expected = [0.55, 0.57, 0.59, 0.61, 0.63, 0.65]
    assert [block["sparsity"] for block in ramp.facts["blocks"]] == pytest.approx(expected)
    write_plan(ramp, tmp_path / "plan")
    file = plan_pruning(str(six_blocks), settings(allocation=f"file:{tmp_path}/plan/allocation.json"), threads=1)
    assert file.facts["blocks"] == ramp.facts["blocks"]
    assert file.facts["range"] is None


def test_llama_7b_is_planned_from_its_configuration(llama_7b: Path) -> None:
    facts = plan_pruning(str(llama_7b), PruneSettings(allocation="uniform"), threads=1).facts
    assert facts["model"]["n_prunable"] == LLAMA_7B_LINEARS
    assert facts["model"]["prunable_share"] == pytest.approx(0.961, abs=5e-4)
    assert facts["sparsity"]["model"] == pytest.approx(0.673, abs=5e-4)  # what papers call 70 %
    assert facts["memory"]["hidden_states_bytes"] == 128 * 2048 * 4096 * 4
    assert facts["sizes"]["checkpoint_bytes"] == pytest.approx(2 * 6_738_415_616, rel=0.001)
    sizes = {artifact["name"]: artifact["bytes"] for artifact in facts["sizes"]["artifacts"]}
    assert sizes["dense"] == pytest.approx(4 * 6_738_415_616, rel=0.001)
    # A bit per weight of the mask beside 30 % of 16 bits; embedding and head are dense.
    packed = LLAMA_7B_LINEARS * (1 + 0.3 * 16) / 8 + 2 * 2 * 32000 * 4096
    assert sizes["sparse-operator-fp16"] == pytest.approx(packed, rel=0.005)


def test_folder_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UnsupportedModelError, match="not a causal language model that transformers knows"):
        plan_pruning(str(tmp_path), settings())


def test_folder_with_pickles_alone_is_refused_as_by_prune(six_blocks: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((six_blocks / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="only pickle weights"):
        plan_pruning(str(tmp_path), settings())


# --- Memory --------------------------------------------------------------------------------------


def test_memory_that_is_not_enough_is_refused_as_by_prune(llama_7b: Path) -> None:
    with pytest.raises(RecipeError, match=r"max_memory 1\.00 GiB is not enough: even with hidden states on disk"):
        plan_pruning(str(llama_7b), settings(n_samples=128, seq_len=2048), max_memory=GIB)


def test_hidden_states_go_to_disk_where_they_do_not_fit(llama_7b: Path) -> None:
    chosen = settings(n_samples=128, seq_len=2048, allocation="uniform")
    memory = plan_pruning(str(llama_7b), chosen, artifacts=(), max_memory=100 * GIB).facts["memory"]
    assert not memory["are_hidden_states_on_disk"]
    limit = memory["peak_bytes"] - GIB
    below = plan_pruning(str(llama_7b), chosen, artifacts=(), max_memory=limit).facts["memory"]
    assert below["are_hidden_states_on_disk"]
    assert below["peak_bytes"] <= limit


# --- The command ---------------------------------------------------------------------------------


def test_command_prints_tables_and_writes_three_files(tiny_model: Path, tmp_path: Path) -> None:
    done = call("plan", "--model", tiny_model, *SMALL_PRUNE, "--out", tmp_path / "plan")
    assert done.code == 0, done.stderr
    for words in (
        "outlier ratio",
        "Sparsity:",
        "Memory: about",
        "Time: about",
        "Sizes:",
        "sparse-operator-int4: about",
    ):
        assert words in done.stdout
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.svg", "allocation.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_command_prints_one_document_that_is_plan_json(tiny_model: Path, tmp_path: Path) -> None:
    done = call("plan", "--model", tiny_model, *SMALL_PRUNE, "--json", "--out", tmp_path / "plan")
    keys = "kind format_version recipe model sparsity range blocks linears memory time sizes notes"
    assert set(done.document) == set(keys.split())
    assert done.document["kind"] == "plan"
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) == done.document


def test_command_shows_a_range_where_there_are_no_weights(six_blocks: Path) -> None:
    done = call("plan", "--model", six_blocks, "--calibration", "c4", "--quiet")
    assert done.code == 0, done.stderr
    assert "0.5667 to 0.8333" in done.stdout
    assert "needs weights" in " ".join(done.stdout.split())


def test_flags_override_the_keys_of_a_recipe(six_blocks: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: elsewhere\nseed: 7\nprune: {method: magnitude, allocation: uniform, sparsity: 0.5}\n"
        "export: [{name: only, weights: sparse-operator, precision: int8}]\n"
    )
    done = call("plan", recipe, "--model", six_blocks, "--sparsity", "0.8", "--json", "--quiet").document
    assert done["recipe"]["model"] == str(six_blocks)
    assert done["recipe"]["seed"] == 7
    assert (done["recipe"]["prune"]["method"], done["recipe"]["prune"]["sparsity"]) == ("magnitude", 0.8)
    assert [artifact["name"] for artifact in done["sizes"]["artifacts"]] == ["only"]


def test_command_without_recipe_and_model_says_what_is_missing() -> None:
    done = call("plan")
    assert done.code == 2
    assert "Missing argument 'RECIPE' (or option '--model')" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sparsity", "1.2"), "sparsity: must be in [0, 1)"),
        (("--max-memory", "1MiB"), "max_memory 0.00 GiB is not enough"),
        (("--pattern", "keep 3 of 7"), "pattern keep 3 of 7 does not fit"),
        (("--allocation", "file:/no/such.json"), "cannot read the allocation"),
    ],
)
def test_command_refuses_what_prune_refuses(six_blocks: Path, arguments: tuple[str, ...], words: str) -> None:
    done = call("plan", "--model", six_blocks, "--quiet", *arguments)
    assert done.code == 2
    assert words in done.sentence


def test_folder_that_exists_is_refused_before_any_work_and_untouched(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = call("plan", "--model", "no/such-model", "--out", tmp_path)
    assert done.code == 1
    assert "exists already: give another --out, or --force" in done.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    done = call("plan", "--model", tiny_model, *SMALL_PRUNE, "--out", tmp_path, "--force")
    assert done.code == 0, done.stderr
    assert "mine.txt" not in {path.name for path in tmp_path.iterdir()}
