"""The plan of a pruning, against what pruning and exporting then really do."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL_PRUNE, TEXT, call
from conftest import save_tiny_model
from transformers import LlamaConfig, OPTConfig

from owl_deploy import allocation, plan_plot, pruning_time
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.export.writer import export_onnx
from owl_deploy.files import folder_bytes
from owl_deploy.kernels import library_path
from owl_deploy.plan import open_configuration, plan_pruning, write_plan
from owl_deploy.plan_plot import plan_svg
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import ArtifactSettings, ExportSettings, PruneSettings, load_recipe
from owl_deploy.skeleton import open_skeleton

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted((ROOT / "recipes" / "papers").glob("*.yaml"))
LLAMA_7B_LINEARS = 6_476_005_376  # 32 blocks of 4 x 4096 x 4096 and 3 x 4096 x 11008
MEASURED_SPEED = pruning_time._flop_per_second
SVG = "{http://www.w3.org/2000/svg}"
GIB = 2**30


@pytest.fixture(autouse=True)
def _known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes a third of a second."""
    monkeypatch.setattr(pruning_time, "_flop_per_second", lambda skeleton, settings: 1e11)


def settings(**changes: Any) -> PruneSettings:
    values = {"sparsity": 0.6, "owl_m": 3.0, "calibration": TEXT, "n_samples": 4, "seq_len": 32}
    return PruneSettings.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but the configuration: transformers' defaults have the shape of LLaMA-7B."""
    folder = tmp_path_factory.mktemp("configurations") / "llama-7b"
    LlamaConfig(dtype="float16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opt_6_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configurations") / "opt-6.7b"
    sizes = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32}
    OPTConfig(**sizes, num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configurations") / "six"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaConfig(num_hidden_layers=6, vocab_size=260, **sizes).save_pretrained(folder)
    return folder


# --- Against what prune does --------------------------------------------------------------------


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


# --- Sizes --------------------------------------------------------------------------------------


def of_artifacts(artifacts: Sequence[dict[str, Any]]) -> tuple[ArtifactSettings, ...]:
    return tuple(ArtifactSettings.model_validate({"name": f"a{i}", **one}) for i, one in enumerate(artifacts))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model large enough that its weights are most of what is on the disk, and what became of it."""
    folder = tmp_path_factory.mktemp("sizes")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "tie_word_embeddings": False}
    model = save_tiny_model(folder / "model", **sizes)
    prune(str(model), settings(sparsity=0.7), out=folder / "sparse", threads=1)
    return model, folder / "sparse"


def test_size_of_the_sparse_checkpoint_is_predicted_within_3_percent(pruned: tuple[Path, Path]) -> None:
    model, sparse = pruned
    sizes = plan_pruning(str(model), settings(sparsity=0.7), threads=1).facts["sizes"]
    assert sizes["checkpoint_bytes"] == pytest.approx(folder_bytes(sparse), rel=0.03)


@pytest.mark.parametrize(
    "artifact",
    [
        {"checkpoint": "dense"},
        {"weights": "sparse-initializer"},
        {"weights": "sparse-initializer", "target": "deepsparse"},
        {"weights": "sparse-operator"},
        {"weights": "sparse-operator", "precision": "fp16"},
        {"weights": "sparse-operator", "precision": "int8"},
        {"weights": "sparse-operator", "precision": "int4"},
        {"weights": "sparse-operator", "precision": "int8", "encoding": "bitmask", "checkpoint": "dense"},
    ],
    ids=lambda artifact: "-".join(artifact.values()),
)
def test_size_of_an_artifact_is_predicted_within_3_percent(
    pruned: tuple[Path, Path], tmp_path: Path, artifact: dict[str, Any]
) -> None:
    model, sparse = pruned
    (planned,) = plan_pruning(str(model), settings(sparsity=0.7), artifacts=of_artifacts([artifact]), threads=1).facts[
        "sizes"
    ]["artifacts"]
    source = model if artifact.get("checkpoint") == "dense" else sparse
    chosen = ExportSettings.model_validate({key: value for key, value in artifact.items() if key != "checkpoint"})
    exported = export_onnx(str(source), chosen, out=tmp_path / "artifact", threads=1, parity=False)
    # The operator library is larger than this model, and would hide errors.
    library = library_path().stat().st_size if chosen.weights == "sparse-operator" else 0
    assert planned["bytes"] - library == pytest.approx(exported.manifest["bytes_on_disk"] - library, rel=0.03)
    counts: dict[str, int] = {}
    for matrix in exported.manifest["matrices"]:
        counts[matrix["encoding"]] = counts.get(matrix["encoding"], 0) + 1
    assert planned["encodings"] == counts
    assert planned["bytes_dense"] == pytest.approx(exported.manifest["bytes_dense"], rel=0.01)  # norms beside


def test_artifact_that_does_not_shrink_is_noted(tiny_model: Path) -> None:
    artifacts = of_artifacts([{"checkpoint": "dense"}, {"weights": "sparse-initializer"}])
    low = plan_pruning(str(tiny_model), settings(sparsity=0.1), artifacts=artifacts, threads=1).facts
    high = plan_pruning(str(tiny_model), settings(sparsity=0.7), artifacts=artifacts, threads=1).facts
    sentence = "The artifact a1 is not predicted to shrink."
    assert sentence in low["notes"]
    assert sentence not in high["notes"]
    assert high["sizes"]["artifacts"][1]["bytes"] < low["sizes"]["artifacts"][1]["bytes"]


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


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "owl"},
        {"allocation": "dlp"},
        {"allocation": "alphapruning"},
        {"allocation": "isc"},
        {"allocation": "ramp"},
        {"allocation": "evopress"},
    ],
)
def test_allocation_that_needs_weights_shows_the_range_of_its_rule(
    six_blocks: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = plan_pruning(str(six_blocks), settings(**changes), threads=1)
    assert plan.sparsities is None
    assert {block["sparsity"] for block in plan.facts["blocks"]} == {None}
    assert plan.facts["range"]["lowest"] < 0.6 < plan.facts["range"]["highest"]
    assert any("needs weights" in note for note in plan.facts["notes"])
    assert plan.facts["time"]["in_cache"] == []
    write_plan(plan, tmp_path / "plan")
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.svg"}


@pytest.mark.parametrize("target", [0.5, 0.95])
@pytest.mark.parametrize("per", ["block", "linear"])
@pytest.mark.parametrize("rule", ["owl", "dlp", "alphapruning", "isc"])
def test_range_holds_whatever_the_figures_and_is_reached(six_blocks: Path, rule: str, per: str, target: float) -> None:
    chosen = settings(allocation=rule, allocation_per=per, sparsity=target, alpha_epsilon=0.3)  # 0.95 is clipped
    facts = plan_pruning(str(six_blocks), chosen, artifacts=(), threads=1).facts
    low, high = facts["range"]["lowest"], facts["range"]["highest"]
    sizes = [block["n_weights"] for block in facts["blocks"]]
    if per == "linear":
        sizes = [linear["shape"][0] * linear["shape"][1] for linear in facts["linears"]]
    share: Callable[[list[float]], list[float]] = {
        "owl": lambda f: allocation.owl(f, sizes, target, owl_lambda=chosen.owl_lambda),
        "dlp": lambda f: allocation.dlp(f, sizes, target, alpha=chosen.dlp_alpha),
        "alphapruning": lambda f: allocation.alphapruning(f, sizes, target, epsilon=0.3),
        "isc": lambda f: allocation.isc(f, sizes, target, half_width=chosen.isc_half_width),
    }[rule]
    random = np.random.default_rng(0)
    draws = [random.exponential(size=len(sizes)) for _ in range(100)]
    draws += [np.eye(len(sizes))[sizes.index(min(sizes))], 1 - np.eye(len(sizes))[sizes.index(min(sizes))]]
    values = [value for figures in draws for value in share(figures.tolist())]
    assert low - 1e-9 <= min(values)
    assert max(values) <= high + 1e-9
    if rule != "isc":
        assert (min(values), max(values)) == pytest.approx((low, high), abs=1e-9)


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


# --- Recipes of papers ----------------------------------------------------------------------------


def test_there_are_recipes_of_four_papers() -> None:
    names = " ".join(path.stem for path in PAPERS)
    assert all(word in names for word in ("owl-wanda", "owl-sparsegpt", "alphapruning", "dass", "isc"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_recipe_of_a_paper_begins_by_saying_what_it_is_for_and_what_was_published(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"# \S.{20}", text)
    assert "arXiv" in text.splitlines()[0]
    assert re.search(r"# Published .*\d\.\d|# No published figure", text)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_recipe_of_a_paper_is_planned(path: Path, llama_7b: Path, opt_6_7b: Path) -> None:
    recipe = load_recipe(path)
    assert (recipe.prune.calibration, recipe.prune.n_samples, recipe.prune.seq_len) == ("c4", 128, 2048)
    assert (recipe.eval.text, recipe.eval.window, recipe.seed) == ("wikitext2", 2048, 0)
    is_opt = recipe.model.startswith("facebook/opt")
    facts = plan_pruning(str(opt_6_7b if is_opt else llama_7b), recipe.prune, artifacts=(), threads=1).facts
    n_weights = 32 * (4 * 4096**2 + 2 * 4096 * 16384) if is_opt else LLAMA_7B_LINEARS
    assert sum(block["n_weights"] for block in facts["blocks"]) == n_weights
    memory = facts["memory"]
    assert memory["hidden_states_bytes"] == 4 * GIB
    block = 4 * n_weights / 32
    held, states = memory["held_bytes"], 0 if memory["are_hidden_states_on_disk"] else 4 * GIB
    above = memory["peak_bytes"] - held - states
    if recipe.prune.isc_sensitivity == "hutchinson":
        assert memory["peak_bytes"] - held == memory["phases"]["tracing the loss"] > 4 * 4 * n_weights
    elif recipe.prune.method in ("sparsegpt", "isc"):
        # Of the widest inputs, a Hessian, its damped copy, two factors and an inverse, beside two of the others.
        widest = 16384 if is_opt else 11008
        assert block + 5 * 4 * widest**2 < above < 2 * block + 6 * 4 * widest**2 + 3 * GIB
    else:
        assert block < above < 4 * block
    assert 3600 < facts["time"]["seconds"] < 100 * 86400


def test_family_without_a_graph_has_no_artifacts_and_says_why(opt_6_7b: Path) -> None:
    facts = plan_pruning(str(opt_6_7b), PruneSettings(allocation="uniform"), threads=1).facts
    assert facts["sizes"]["artifacts"] == []
    assert "no graph for model type 'opt'" in facts["sizes"]["reason"]
    assert facts["sizes"]["checkpoint_bytes"] > 4 * 32 * 12 * 4096**2
    assert any("no graph for model type" in note for note in facts["notes"])


# --- Time and memory ------------------------------------------------------------------------------


def seconds(model: Path, **changes: Any) -> float:
    return float(plan_pruning(str(model), settings(**changes), artifacts=(), threads=1).facts["time"]["seconds"])


def test_time_of_a_forward_pass_is_two_operations_per_weight_and_token(six_blocks: Path) -> None:
    many, few = (
        plan_pruning(str(six_blocks), settings(n_samples=n), artifacts=(), threads=1).facts["time"]["phases"]
        for n in (200_000, 100_000)
    )
    name = "inputs of the dense model"
    n_weights = 6 * (4 * 64 * 64 + 3 * 64 * 96)
    attention = 6 * 2 * 32 * 64
    products = 2 * 32 * 100_000 * (n_weights + attention) / 1e11
    assert many[name] - few[name] == pytest.approx(1.3 * products, rel=1e-6)


def test_speed_is_measured_on_this_machine(six_blocks: Path) -> None:
    skeleton = open_skeleton(open_configuration(six_blocks))
    assert 1e6 < MEASURED_SPEED(skeleton, settings()) < 1e16


def test_more_work_takes_more_time(six_blocks: Path) -> None:
    plain = seconds(six_blocks, allocation="uniform")
    assert seconds(six_blocks, allocation="uniform", n_samples=4000) > plain
    assert seconds(six_blocks, allocation="uniform", true_sequential=True, n_samples=4000) > seconds(
        six_blocks, allocation="uniform", n_samples=4000
    )
    assert seconds(six_blocks, allocation="uniform", refine="dsnot") > plain
    assert seconds(six_blocks, allocation="owl") > plain
    assert seconds(six_blocks, allocation="alphapruning") > plain
    assert seconds(six_blocks, allocation="uniform", method="alps") > seconds(
        six_blocks, allocation="uniform", method="sparsegpt"
    )
    assert seconds(six_blocks, allocation="uniform", method="magnitude") < plain


def test_sampling_is_told_apart_from_the_time_of_pruning(six_blocks: Path) -> None:
    with_text = plan_pruning(str(six_blocks), settings(), artifacts=(), threads=1).facts
    sampled = plan_pruning(str(six_blocks), settings(calibration="generated"), artifacts=(), threads=1).facts
    assert with_text["time"]["sampling_seconds"] is None
    assert sampled["time"]["sampling_seconds"] > 0
    assert sampled["time"]["seconds"] == with_text["time"]["seconds"]


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


# --- The picture ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(tiny_model: Path) -> dict[str, Any]:
    return plan_pruning(str(tiny_model), settings(), artifacts=(), threads=1).facts


def words_of(svg: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_picture_is_xml_with_a_title_and_a_description(facts: dict[str, Any]) -> None:
    root = ET.fromstring(plan_svg(facts))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    by_id = {element.get("id"): element for element in root}
    labels = [by_id[name] for name in (root.get("aria-labelledby") or "").split()]
    assert [element.tag for element in labels] == [f"{SVG}title", f"{SVG}desc"]
    assert labels[0].text == "Sparsity by block: wanda, owl, 60%"
    assert "the target is 0.6" in (labels[1].text or "")


def test_picture_has_labels_on_its_axes_and_a_panel_for_the_figure(facts: dict[str, Any]) -> None:
    words = words_of(plan_svg(facts))
    assert {"sparsity asked", "outlier ratio", "decoder block", "target 0.6"} <= set(words)


def test_picture_is_the_same_bytes_twice_small_and_without_a_date(facts: dict[str, Any]) -> None:
    first = plan_svg(facts)
    assert plan_svg(facts) == first
    assert len(first) < 40_000
    assert b"dc:date" not in first


def test_picture_of_linears_that_differ_has_a_line_for_each_kind(tiny_model: Path) -> None:
    by_linear = plan_pruning(str(tiny_model), settings(allocation_per="linear"), artifacts=(), threads=1).facts
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds <= set(words_of(plan_svg(by_linear)))


def test_kinds_of_one_name_are_told_apart_and_experts_are_one_kind() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.experts.0.w1", "h.0.mlp.experts.1.w1"]
    linears = [{"name": name, "block": 0, "sparsity": 0.1 * i} for i, name in enumerate(names, start=1)]
    found = plan_plot._by_kind(linears)
    assert {kind: values[0] for kind, values in found.items()} == pytest.approx(
        {"attn.c_proj": 0.1, "mlp.c_proj": 0.2, "w1": 0.35}
    )


def test_picture_of_an_allocation_that_needs_weights_shows_its_range(six_blocks: Path) -> None:
    unknown = plan_pruning(str(six_blocks), settings(), artifacts=(), threads=1).facts
    assert "what the rule allows; which of it, weights decide" in words_of(plan_svg(unknown))


def test_names_cannot_leave_their_place_in_the_picture(facts: dict[str, Any]) -> None:
    hostile = {**facts["recipe"], "prune": {**facts["recipe"]["prune"], "method": "</title><script>$x^{"}}
    root = ET.fromstring(plan_svg({**facts, "recipe": hostile}))
    assert not list(root.iter(f"{SVG}script"))


# --- The command ------------------------------------------------------------------------------------


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


def test_plan_that_cannot_be_drawn_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> bytes:
        raise OwlDeployError("no ink")

    plan = plan_pruning(str(tiny_model), settings(), artifacts=(), threads=1)
    monkeypatch.setattr(plan_plot, "plan_svg", fail)
    with pytest.raises(OwlDeployError, match="no ink"):
        write_plan(plan, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
