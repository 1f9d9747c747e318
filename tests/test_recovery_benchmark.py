"""The benchmark of recovery: its rows, what it keeps, and what fails."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from random_models import random_model, save

from owl_deploy.bench import recovery as benchmark
from owl_deploy.errors import OwlDeployError
from owl_deploy.evaluation import evaluate
from owl_deploy.recipe import EvalSettings, PruneSettings, RecoverSettings

DATA: dict[str, Any] = {"calibration": "python-docs", "n_samples": 6, "seq_len": 32}
ROWS = ["dense", "0.5-one-shot", "0.5-blockwise-60s", "0.5-blockwise-120s", "0.5-blockwise-120s-spp-60s"]


def plan_of(dense: Path, text: Path, **changes: Any) -> benchmark.Plan:
    settings: dict[str, Any] = {
        "model": str(dense),
        "sparsities": (0.5,),
        "prune": PruneSettings(method="sparsegpt", allocation="uniform", **DATA),
        "blockwise": RecoverSettings(**DATA, epochs=2),
        "budgets": (60.0, 120.0),
        "chain": (RecoverSettings(**DATA, method="spp", epochs=1, budget=60.0),),
        "evals": (EvalSettings(text=f"text:{text}", window=32, max_windows=2),),
        "threads": 1,
        "is_whole": True,
    }
    return benchmark.Plan(**{**settings, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a dense model and a text of a few windows."""
    folder = tmp_path_factory.mktemp("recovery-benchmark")
    (folder / "words.txt").write_text("Sphinx of black quartz, judge my vow. " * 6)
    return save(random_model("llama"), folder / "dense"), folder / "words.txt"


@pytest.fixture(scope="module")
def measured(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("measured")
    return out, benchmark.measure(plan_of(*inputs), out)


def test_rows_are_dense_one_shot_every_budget_and_the_chain(measured: tuple[Path, dict[str, Any]]) -> None:
    rows = measured[1]["rows"]
    assert {row["name"] for row in rows} == set(ROWS)
    assert [row["budget_s"] for row in rows] == [0, 0, 60, 120, 180]
    assert [row["status"] for row in rows] == ["ok"] * 5


def test_perplexities_are_those_of_the_checkpoints(
    measured: tuple[Path, dict[str, Any]], inputs: tuple[Path, Path]
) -> None:
    (folder,) = (measured[0] / "checkpoints").glob("*-spp-60s-*")
    few = EvalSettings(text=f"text:{inputs[1]}", window=32, max_windows=2)
    row = measured[1]["rows"][-1]
    for found, settings in ((row["evaluations"][0], few), (row["whole"], few.model_copy(update={"max_windows": None}))):
        (wanted,) = evaluate([str(folder)], settings, threads=1)
        assert found["perplexity"] == pytest.approx(wanted.perplexity)
        assert found["n_windows"] == wanted.n_windows


def test_all_four_files_name_every_row_and_no_folder(
    measured: tuple[Path, dict[str, Any]], inputs: tuple[Path, Path]
) -> None:
    out, document = measured
    assert json.loads((out / "results.json").read_text()) == document
    table = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [float(row["perplexity text:words.txt"]) for row in table] == [
        row["evaluations"][0]["perplexity"] for row in document["rows"]
    ]
    for row in document["rows"]:
        assert f"{row['evaluations'][0]['perplexity']:.2f}" in (out / "results.md").read_text()
    assert ET.fromstring((out / "results.svg").read_text()).tag.endswith("svg")
    for name in ("json", "md", "csv", "svg"):
        assert str(inputs[0].parent) not in (out / f"results.{name}").read_text()


def test_finished_rows_are_not_made_again(
    measured: tuple[Path, dict[str, Any]], inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prune", "recover", "evaluate"):
        monkeypatch.setattr(benchmark, name, None)
    assert benchmark.measure(plan_of(*inputs), measured[0]) == measured[1]


def test_failure_is_a_row_that_the_next_run_makes_again(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OwlDeployError("diverges in /some/where/else")

    plan = plan_of(*inputs, budgets=(60.0,), chain=(), is_whole=False)
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "recover", fail)
        rows = benchmark.measure(plan, tmp_path)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert rows[-1]["error"] == "diverges in else"
    assert "failed: diverges in else" in (tmp_path / "results.md").read_text()
    assert [row["status"] for row in benchmark.measure(plan, tmp_path)["rows"]] == ["ok"] * 3


def test_parts_run_one_after_another_end_in_one_table(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_of(*inputs, budgets=(60.0,), chain=(), is_whole=False)
    rows = benchmark.measure(plan, tmp_path, only=("one-shot",))["rows"]
    assert [row["name"] for row in rows] == ["dense", "0.5-one-shot"]
    other = plan_of(*inputs, sparsities=(0.6,), budgets=(60.0,), chain=(), is_whole=False)
    rows = benchmark.measure(other, tmp_path, only=("one-shot",))["rows"]
    assert [row["name"] for row in rows] == ["dense", "0.5-one-shot", "0.6-one-shot"]


def test_text_that_is_trained_on_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_of(*inputs, evals=(EvalSettings(text="python-docs", window=32, max_windows=1),))
    with pytest.raises(OwlDeployError, match="trained on and evaluated on"):
        benchmark.measure(plan, tmp_path)


@pytest.mark.parametrize("flags", [["--budget", "soon"], ["--chain", "distill"], ["--chain", "magic=5m"]])
def test_flags_that_mean_nothing_are_refused_by_their_text(flags: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(benchmark.main, [str(tmp_path), *flags])
    assert result.exit_code == 2
    assert flags[1] in result.output
