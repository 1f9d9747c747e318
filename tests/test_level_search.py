"""The evopress allocation: what candidates are measured by, and the prune stage from end to end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import RecipeError
from owl_deploy.evaluation import divergence
from owl_deploy.evolution import level_grid
from owl_deploy.footprint import predict_footprint
from owl_deploy.level_database import open_level_database
from owl_deploy.level_search import Candidate, fitness_tokens
from owl_deploy.progress import Step
from owl_deploy.pruning import SparsityReport, prune
from owl_deploy.recipe import PruneSettings, checked
from owl_deploy.skeleton import open_skeleton


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Species {i} of {i * 7 % 13} adapts.\n" for i in range(300)))
    return path


def settings(text: Path, **changes: Any) -> PruneSettings:
    values = {"method": "magnitude", "allocation": "evopress", "sparsity": 0.6, "calibration": f"text:{text}"}
    sizes = {"n_samples": 4, "seq_len": 48, "evopress_generations": 4, "evopress_tokens": 192, "evopress_step": 0.2}
    return PruneSettings.model_validate({**values, **sizes, **changes})


def run(model: Path, wanted: PruneSettings, out: Path, **options: Any) -> SparsityReport:
    return prune(str(model), wanted, out=out, threads=1, **options)


def distance(dense: Path, pruned: Path, tokens: Any) -> float:
    """KL from the dense model over all positions, by the code of the eval stage."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (dense, pruned)]
    with torch.inference_mode():
        logits = [[model(torch.from_numpy(row)[None]).logits[0].numpy() for row in tokens] for model in models]
    return float(np.mean([divergence(p, q)[0] for p, q in zip(*logits, strict=True)]))


def tokens_of(model: Path, wanted: PruneSettings) -> Any:
    return calibration_tokens(open_checkpoint(str(model)), wanted, seed=0).tokens


def candidate(model: Path, wanted: PruneSettings, folder: Path) -> Any:
    skeleton = open_skeleton(open_checkpoint(str(model)))
    torch.set_num_threads(1)
    sizes = [linear.weight.numel() for index in range(2) for linear in skeleton.linears(index).values()]
    grid = level_grid(sizes, [0.6] * len(sizes), step=0.2, n_levels=2)
    stack = open_level_database(skeleton, wanted, [{}, {}], folder)
    tokens = fitness_tokens(torch.from_numpy(tokens_of(model, wanted)), wanted.evopress_tokens)
    return stack, skeleton, grid, tokens


# --- Fitness ------------------------------------------------------------------------------------


def test_the_start_is_as_far_away_as_the_pruned_checkpoint(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text)
    run(tiny_model, wanted.model_copy(update={"allocation": "uniform"}), tmp_path / "out")
    expected = distance(tiny_model, tmp_path / "out", tokens_of(tiny_model, wanted))
    opened, skeleton, grid, tokens = candidate(tiny_model, wanted, tmp_path)
    with opened as database:
        found = Candidate(skeleton, database, grid, tokens).divergence((0,) * 14, range(4))
    assert found == pytest.approx(expected, abs=1e-5)


def test_levels_are_taken_on_and_off_again(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    opened, skeleton, grid, tokens = candidate(tiny_model, settings(text), tmp_path)
    start, other = (0,) * 14, (1, 0, 0, -1) + (0,) * 10
    with opened as database:
        one = Candidate(skeleton, database, grid, tokens)
        first = one.divergence(start, [0, 2])
        weight = dict(one.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
        before = weight.clone()
        there = one.divergence(other, [0, 2])
        assert (weight == 0).float().mean() == pytest.approx(grid.sparsity(0, 1), abs=1e-3)
        assert there != first
        assert one.divergence(start, [0, 2]) == first
        assert torch.equal(weight, before)
        assert Candidate(skeleton, database, grid, tokens).divergence(other, [0, 2]) == there


def test_sequences_are_meant_one_by_one(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    opened, skeleton, grid, tokens = candidate(tiny_model, settings(text), tmp_path)
    with opened as database:
        one = Candidate(skeleton, database, grid, tokens)
        single = [one.divergence((0,) * 14, [i]) for i in range(4)]
        assert one.divergence((0,) * 14, [1, 3]) == pytest.approx((single[1] + single[3]) / 2, abs=1e-5)
        one.batch_size = 1
        assert one.divergence((0,) * 14, range(4)) == pytest.approx(sum(single) / 4, abs=1e-6)


def test_a_dense_candidate_is_at_no_distance(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    _, skeleton, _, tokens = candidate(tiny_model, settings(text), tmp_path)
    dense = level_grid([linear.weight.numel() for i in (0, 1) for linear in skeleton.linears(i).values()], [0.0] * 14,
                       step=0.2, n_levels=1)  # fmt: skip
    with open_level_database(skeleton, settings(text), [{}, {}], tmp_path) as database:
        one = Candidate(skeleton, database, dense, tokens)
        assert one.divergence((0,) * 14, range(4)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "n_tokens", "expected"),
    [
        ((2, 512), 9999, [[0, 255], [512, 767], [256, 511], [768, 1023]]),
        ((2, 512), 800, [[0, 255], [512, 767], [256, 511]]),
        ((2, 512), 2, [[0, 255]]),
        ((3, 300), 512, [[0, 255], [300, 555]]),
        ((3, 10), 20, [[0, 9], [10, 19]]),
    ],
)
def test_windows_are_the_beginnings_of_all_sequences_first(
    shape: tuple[int, int], n_tokens: int, expected: list[list[int]]
) -> None:
    windows = fitness_tokens(torch.arange(math.prod(shape)).reshape(shape), n_tokens)
    assert windows[:, [0, -1]].tolist() == expected


# --- The stage ----------------------------------------------------------------------------------


def test_the_result_is_nearer_than_the_start_by_what_it_says(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, evopress_generations=8)
    report = run(tiny_model, wanted, tmp_path / "evolved")
    run(tiny_model, wanted.model_copy(update={"allocation": "uniform"}), tmp_path / "uniform")
    tokens = tokens_of(tiny_model, wanted)
    curve = report.facts["evopress"]["kl_divergence"]
    assert len(curve) == 9
    # Magnitude looks at no inputs, so that the checkpoint is the very candidate.
    assert curve[0] == pytest.approx(distance(tiny_model, tmp_path / "uniform", tokens), abs=1e-5)
    assert curve[-1] == pytest.approx(distance(tiny_model, tmp_path / "evolved", tokens), abs=1e-5)
    assert curve[-1] < curve[0]


def test_linears_differ_and_the_target_is_met(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = run(tiny_model, settings(text, method="wanda"), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "allocation.json").read_text())
    asked = {fact["name"]: fact["asked"] for fact in report.facts["linears"]}
    sizes = [math.prod(fact["shape"]) for fact in report.facts["linears"]]
    assert len(set(asked.values())) > 1
    assert np.average(list(asked.values()), weights=sizes) == pytest.approx(0.6, abs=1e-12)
    assert report.facts["sparsity"]["linears"] == pytest.approx(0.6, abs=0.005)  # whole columns of 64 or 96
    assert report.facts["evopress"]["n_linears_moved"] == sum(value != 0.6 for value in asked.values())
    assert set(asked.values()) <= set(_numbers(stored))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [found for item in (value.values() if isinstance(value, dict) else value) for found in _numbers(item)]
    return [value] if isinstance(value, float) else []


def test_the_allocation_file_makes_the_same_masks(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, method="wanda")
    first = run(tiny_model, wanted, tmp_path / "a")
    again = wanted.model_copy(update={"allocation": f"file:{tmp_path / 'a' / 'allocation.json'}"})
    assert run(tiny_model, again, tmp_path / "b").facts["mask_sha256"] == first.facts["mask_sha256"]


def test_a_search_starts_from_owl(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, owl_m=3, evopress_start="owl", evopress_generations=0)
    evolved = run(tiny_model, wanted, tmp_path / "a")
    owl = run(tiny_model, wanted.model_copy(update={"allocation": "owl"}), tmp_path / "b")
    assert evolved.facts["mask_sha256"] == owl.facts["mask_sha256"]
    assert evolved.facts["evopress"]["n_generations"] == 0


def test_a_search_is_made_once(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, n_samples=3)
    stages: list[str] = []

    def on_step(step: Step) -> None:
        stages.append(step.stage)

    first = run(tiny_model, wanted, tmp_path / "a", on_step=on_step)
    assert "evolution" in stages
    stages.clear()
    second = run(tiny_model, wanted, tmp_path / "b", on_step=on_step)
    assert "evolution" not in stages
    assert second.facts == first.facts
    run(tiny_model, wanted, tmp_path / "c", on_step=on_step, seed=1)
    assert "evolution" in stages


def test_a_search_that_time_ended_gives_the_same_again(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, evopress_generations=10**6, evopress_budget_seconds=0.3)
    first = run(tiny_model, wanted, tmp_path / "a")
    assert first.facts["evopress"]["n_generations"] < 10**6
    assert run(tiny_model, wanted, tmp_path / "b").facts == first.facts


@pytest.mark.parametrize("damage", ["[]", '{"levels": [1], "curve": [1.0]}'])
def test_a_damaged_result_is_searched_anew(
    damage: str, tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    wanted = settings(text, evopress_generations=1)
    first = run(tiny_model, wanted, tmp_path / "a")
    (file,) = (tmp_path / "cache" / "levels").glob("*.json")
    file.write_text(damage)
    assert run(tiny_model, wanted, tmp_path / "b").facts == first.facts
    assert json.loads(file.read_text())["curve"] == first.facts["evopress"]["kl_divergence"]


def test_nothing_but_the_result_is_left_in_the_cache(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    run(tiny_model, settings(text, evopress_generations=1), tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "cache" / "levels").iterdir()] == [".json"]


def test_the_whole_model_is_predicted(tiny_model: Path, text: Path) -> None:
    skeleton = open_skeleton(open_checkpoint(str(tiny_model)))
    phases = {
        method: predict_footprint(skeleton, settings(text, method=method)).whole_model["searching levels"]
        for method in ("magnitude", "sparsegpt")
    }
    whole = 4 * sum(parameter.numel() for parameter in skeleton.model.parameters())
    assert phases["magnitude"] > whole + 4 * 260 * 192
    assert phases["sparsegpt"] > whole + 2 * 4 * (3 * 64**2 + 96**2)
    uniform = settings(text).model_copy(update={"allocation": "uniform"})
    assert "searching levels" not in predict_footprint(skeleton, uniform).whole_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allocation_per": "linear"}, "allocation evopress is by linear always: leave allocation_per out"),
        ({"pattern": "keep 2 of 4", "sparsity": 0.5}, "leaves nothing to share out"),
        ({"evopress_start": "dlp"}, "evopress_start"),
        ({"evopress_step": 0}, "evopress_step"),
        ({"evopress_offspring": 0}, "evopress_offspring"),
        ({"evopress_budget_seconds": 0}, "evopress_budget_seconds"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="command line: ") as error:
        checked(PruneSettings, {"allocation": "evopress", **values}, where="command line")
    assert message in str(error.value)
