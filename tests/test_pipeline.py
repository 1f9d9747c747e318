"""The whole line on the seeded two-block model: recipe in, report out, and what a second run reuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call

from owl_deploy.evaluation import evaluate
from owl_deploy.pipeline import RunResult, run
from owl_deploy.recipe import EvalSettings, Recipe, recipe_from_mapping

ENGINES = ("onnxruntime", "deepsparse")


def small_recipe(model: Path, **changes: Any) -> Recipe:
    artifacts = []
    for engine in ENGINES:
        artifacts.append({"name": f"{engine}-dense", "checkpoint": "dense", "target": engine})
        artifacts.append({"name": f"{engine}-sparse", "target": engine, "weights": "sparse-initializer"})
    return recipe_from_mapping(
        {
            "model": str(model),
            "threads": 2,
            "prune": {"sparsity": 0.6, "calibration": "generated", "n_samples": 4, "seq_len": 48, **changes},
            "export": artifacts,
            "eval": {"text": "python-docs", "window": 64, "max_windows": 2},
            "bench": {
                "baseline": "onnxruntime-dense",
                "past_len": [32],
                "prompt_len": [32],
                "rounds": 3,
                "decode_samples": 4,
            },
        }
    )


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One run of the whole line, shared by the tests that only look at it."""
    return run(small_recipe(tiny_model), out=tmp_path_factory.mktemp("line"))


def rows(result: RunResult) -> list[dict[str, Any]]:
    assert result.measured is not None
    found: list[dict[str, Any]] = result.measured["rows"]
    return found


@pytest.mark.deepsparse
def test_every_artifact_has_a_row_per_workload_with_its_own_quality(finished: RunResult) -> None:
    names = {f"{engine}-{kind}" for engine in ENGINES for kind in ("dense", "sparse")}
    assert {(row["artifact"], row["phase"]) for row in rows(finished)} == {
        (name, phase) for name in names for phase in ("decode", "prefill")
    }
    for row in rows(finished):
        assert row["status"] == "ok", row["reason"]
        assert row["parity"]["passed"]
        assert len(row["samples_ns"]) == 3
        assert row["perplexity"] > 1
        assert row["ms"]["p50"] > 0
        assert row["peak_rss_bytes"] > 0
        is_dense = row["artifact"].endswith("dense")
        assert row["kl_divergence"] < 1e-6 if is_dense else row["kl_divergence"] > 1e-3
        assert row["sparsity"] == (0.0 if is_dense else pytest.approx(0.6, abs=0.01))


@pytest.mark.deepsparse
def test_engines_agree_on_the_quality_of_the_same_checkpoint(finished: RunResult) -> None:
    by_name = {row["artifact"]: row["perplexity"] for row in rows(finished)}
    for kind in ("dense", "sparse"):
        assert by_name[f"onnxruntime-{kind}"] == pytest.approx(by_name[f"deepsparse-{kind}"], rel=1e-4)


@pytest.mark.deepsparse
def test_report_is_written_in_three_forms_with_the_profile_of_the_sparse_model(finished: RunResult) -> None:
    assert finished.report is not None
    assert {file.name for file in finished.report.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "report.csv",
    }
    document = json.loads((finished.report / "report.json").read_text())
    assert [len(profile["blocks"]) for profile in document["profiles"]] == [2, 2]
    assert document["recipe"]["prune"]["sparsity"] == 0.6


@pytest.mark.deepsparse
def test_second_run_reuses_everything_and_says_so(
    finished: RunResult, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.checkpoint.parent.rglob("*")}
    with caplog.at_level(logging.INFO, logger="owl_deploy"):
        again = run(small_recipe(tiny_model), out=finished.checkpoint.parent)
    assert sum("reusing" in message for message in caplog.messages) == 1 + 4 + 1
    assert rows(again) == rows(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.checkpoint.parent.rglob("*")} == before


def test_other_sparsity_remakes_only_what_depends_on_it(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def recipe(sparsity: float) -> Recipe:
        full = small_recipe(tiny_model, sparsity=sparsity)
        return full.model_copy(update={"export": full.export[:2], "bench": None})

    run(recipe(0.5), out=tmp_path / "out")
    with caplog.at_level(logging.INFO, logger="owl_deploy"):
        run(recipe(0.6), out=tmp_path / "out")
    reused = [message for message in caplog.messages if "reusing" in message]
    assert len(reused) == 1
    assert "onnxruntime-dense" in reused[0]
    owl = json.loads((tmp_path / "out" / "artifacts" / "onnxruntime-sparse" / "owl.json").read_text())
    assert owl["sparsity"]["target"] == 0.6


def test_a_recipe_without_bench_measures_the_quality_that_it_asks_for(tiny_model: Path, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "allocation": "uniform", "sparsity": 0.5}
    quality = {"text": "python-docs", "window": 64, "max_windows": 2}
    asked = run(
        recipe_from_mapping({"model": str(tiny_model), "threads": 2, "prune": prune, "eval": quality}),
        out=tmp_path / "a",
    )
    ((model, found),) = asked.evaluations
    assert model == str(asked.checkpoint)
    expected = evaluate([model], EvalSettings.model_validate(quality), reference=str(tiny_model), threads=2)[0]
    assert found == expected
    assert asked.to_json()["evaluations"] == [{"model": model, **expected.to_json()}]
    silent = run(recipe_from_mapping({"model": str(tiny_model), "threads": 2, "prune": prune}), out=tmp_path / "b")
    assert silent.evaluations == ()


def test_command_prints_the_quality_of_a_recipe_that_only_prunes(tiny_model: Path, tmp_path: Path) -> None:
    prune = {"method": "magnitude", "allocation": "uniform", "sparsity": 0.5}
    quality = {"text": "python-docs", "window": 64, "max_windows": 2}
    recipe = {"model": str(tiny_model), "threads": 2, "prune": prune, "eval": quality}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("run", tmp_path / "r.yaml", "--out", tmp_path / "out", "--quiet")
    (found,) = call(*arguments, "--json").document["evaluations"]
    assert found["n_windows"] == 2
    assert found["kl_divergence"] > 0
    printed = call(*arguments).stdout
    assert f"{tmp_path / 'out' / 'checkpoint'} (torch)" in printed
    assert f"perplexity {found['perplexity']:.4f}" in printed
    assert f"KL divergence {found['kl_divergence']:.5f} nats" in printed
