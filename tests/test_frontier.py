"""The frontier of a sweep: pooling, Pareto points and sentences against slow versions; a tiny sweep as a whole."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from command_line import TEXT, call
from hypothesis import given
from hypothesis import strategies as st

from owl_deploy import pipeline, sweep_line, tasks
from owl_deploy.bench.frontier import Point, frontier, merged, points, sentences
from owl_deploy.bench.frontier_report import frontier_csv, frontier_plot, frontier_svg, main
from owl_deploy.bench.report_file import read_report
from owl_deploy.bench.statistics import Speedup
from owl_deploy.errors import EngineFailedError, ParityError, RecipeError
from owl_deploy.export.writer import export_onnx
from owl_deploy.pipeline import run
from owl_deploy.progress import Step
from owl_deploy.recipe import ArtifactSettings, Recipe, recipe_from_mapping
from owl_deploy.sweep import run_sweep

DENSE_INT8 = Speedup(2.5, 2.4, 2.6)


def point(
    name: str, speed: float, perplexity: float, *, over: dict[str, Speedup] | None = None, **changes: Any
) -> Point:
    known: dict[str, Any] = {
        "name": name,
        "series": name,
        "sparsity": 0.0,
        "perplexity": perplexity,
        "kl_divergence": 0.1,
        "accuracy": None,
        "decode_ms": 20 / speed,
        "speedup": Speedup(speed, 0.95 * speed, 1.05 * speed),
        "over": over or {},
        "prefill_ms": 300.0,
        "prefill_speedup": 1.0,
        "peak_rss_bytes": 10**8,
        "bytes_on_disk": 10**8,
        "is_dense": True,
        "is_baseline": False,
    }
    return Point(**{**known, **changes})


BASELINE = point("dense", 1.0, 10.0, is_baseline=True, kl_divergence=None)


def sparse(name: str, speed: float, perplexity: float, sparsity: float, **over: Speedup) -> Point:
    return point(name, speed, perplexity, sparsity=sparsity, is_dense=False, over=over)


pairs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@given(pairs)
def test_the_frontier_is_what_nothing_beats(values: list[tuple[int, int]]) -> None:
    found = [point(str(place), speed, perplexity) for place, (speed, perplexity) in enumerate(values)]
    best = {(item.speedup.p50, item.perplexity) for item in frontier(found)}
    expected = {
        (speed, perplexity)
        for speed, perplexity in values
        if not any(
            (other >= speed and worse <= perplexity and (other, worse) != (speed, perplexity))
            for other, worse in values
        )
    }
    assert best == expected
    assert len(frontier(found)) == len(expected)


def test_a_sparse_artifact_on_the_frontier_is_set_beside_the_fastest_dense_one() -> None:
    int8 = point("dense-int8", 2.5, 10.2)
    step = sparse("wanda/int8", 4.0, 22.0, 0.6, **{"dense-int8": Speedup(1.6, 1.5, 1.7)})
    first, second = sentences([BASELINE, int8, step])
    assert first == (
        "dense decodes in 20.0 ms per token at perplexity 10.0; within 10 % of that the fastest is dense-int8, 2.50x "
        "(2.38-2.62) as fast; no sparse artifact is that good."
    )
    assert second == (
        "At 60 %, wanda/int8 decodes 1.60x (1.50-1.70) as fast as dense-int8, at +0.77 nats per token (perplexity 22.0 "
        "instead of 10.2)."
    )
    assert np.log(22.0 / 10.2) == pytest.approx(0.77, abs=0.005)


def test_an_interval_that_holds_one_is_no_difference() -> None:
    step = sparse("a/int8", 2.6, 22.0, 0.6, **{"dense-int8": Speedup(1.02, 0.97, 1.08)})
    said = sentences([BASELINE, point("dense-int8", 2.5, 10.2), step])
    assert "is not shown to be faster or slower than dense-int8 (1.02x (0.97-1.08))" in said[1]


def test_what_is_beaten_in_every_cell_is_named_once() -> None:
    beaten = {"dense-int8": Speedup(0.6, 0.5, 0.7)}
    slow = [sparse(f"{cell}/fp32", 1.5, 30.0, 0.5, **beaten) for cell in "ab"]
    some = [sparse("a/fp16", 1.5, 30.0, 0.5, **beaten), sparse("b/fp16", 2.6, 30.0, 0.5)]
    said = sentences([BASELINE, point("dense-int8", 2.5, 10.2), *slow, *some])
    assert said[-1] == "dense-int8 is faster and better than every fp32, a/fp16 at 50 %."


def test_a_dense_artifact_that_beats_sparse_ones_is_named() -> None:
    slow = sparse("a/fp32", 1.5, 30.0, 0.5, **{"dense-int8": Speedup(0.6, 0.5, 0.7)})
    near = sparse("b/fp32", 2.4, 30.0, 0.7, **{"dense-int8": Speedup(0.96, 0.9, 1.02)})
    said = sentences([BASELINE, point("dense-int8", 2.5, 10.2), slow, near])
    assert said[1:] == [
        "No sparse artifact is on the frontier: for each, a dense one is as fast at a better perplexity.",
        "dense-int8 is faster and better than a/fp32 at 50 %.",
    ]


def test_without_dense_quantised_artifacts_the_baseline_is_what_sparse_ones_are_set_beside() -> None:
    said = sentences([BASELINE, sparse("a/fp32", 2.0, 10.5, 0.5)])
    assert said[0].endswith("within 10 % of that the fastest is a/fp32, 2.00x (1.90-2.10) as fast.")
    assert said[1].startswith("At 50 %, a/fp32 decodes 2.00x (1.90-2.10) as fast as dense, at +0.05 nats")


def test_without_a_baseline_there_is_nothing_to_say() -> None:
    assert sentences([sparse("a", 2.0, 10.5, 0.5)]) == ["The baseline has no result, so no speed-up can be given."]


def bench_result(slow_by: float, names: dict[str, float], seed: int, **changes: Any) -> dict[str, Any]:
    """Return a result of a decode workload: artifacts by name, with their milliseconds, on a machine slowed down."""
    generator = random.Random(seed)

    def rounds(ms: float) -> list[list[int]]:
        return [[round(1e6 * ms * slow_by * generator.uniform(0.97, 1.03)) for _ in range(8)] for _ in range(4)]

    rows = []
    for name, ms in names.items():
        samples = rounds(ms)
        middle = float(np.median(np.concatenate(samples))) / 1e6
        rows.append(
            {
                "engine": "onnxruntime",
                "artifact": name,
                "weights": "sparse-operator" if name == "int8" else "dense",
                "precision": "int8" if "int8" in name else "fp32",
                "sparsity": 0.6 if name == "int8" else 0.0,
                "phase": "decode",
                "batch": 1,
                "threads": 2,
                "prompt_len": 0,
                "past_len": 256,
                "n_new": 0,
                "status": "ok",
                "reason": None,
                "ms": {"p50": middle, "p90": middle, "min": middle, "n": 32},
                "tokens_per_s": 1e3 / middle,
                "speedup": {
                    "p50": names["dense"] / ms,
                    "low": 0.9 * names["dense"] / ms,
                    "high": 1.1 * names["dense"] / ms,
                },
                "is_baseline": name == "dense",
                "ceiling_fraction": 0.5,
                "peak_rss_bytes": 1000,
                "load_ms": 1.0,
                "perplexity": 20.0 if name == "int8" else 10.0,
                "kl_divergence": 0.5,
                "top1_agreement": 0.9,
                "evaluation": {
                    "text": "t",
                    "tokens_sha256": "0",
                    "window": 8,
                    "n_windows": 1,
                    "starts_with_bos": False,
                },
                "parity": {"passed": True},
                "samples_ns": samples,
                "notes": [],
            }
        )
    machine = {
        "cpu": "x",
        "n_cores": 2,
        "os": "linux",
        "load_before": 0.1,
        "load_after": 1.0,
        "steal_fraction": 0.0,
        "memory_bandwidth_bytes_per_s": 1e10,
    }
    head = {"created": "2026-01-01", "machine": machine, "artifacts": dict.fromkeys(names, "0"), "profiles": []}
    return {**head, "protocol": {"n_rounds": 4}, "versions": {}, "rows": rows, **changes}


def two_cells(
    failed: dict[str, dict[str, str]] | None = None, checkpoint: Literal["pruned", "recovered"] = "pruned"
) -> dict[str, Any]:
    names = {"dense": 20.0, "dense-int8": 8.0}
    cells = {
        "a-0.5": bench_result(1.0, {**names, "int8": 6.0}, 0),
        "a-0.7": bench_result(1.5, {**names, "int8": 4.0}, 1),
    }
    return merged(
        cells,
        failed or {},
        sizes={name: {"dense": 9, "int8": 3} for name in cells},
        series={"a-0.5": "a", "a-0.7": "a", "a-0.9": "a"},
        exported={
            "dense": ArtifactSettings(name="dense", checkpoint="dense"),
            "dense-int8": ArtifactSettings(name="dense-int8", checkpoint="dense", precision="int8"),
            "dense-int4": ArtifactSettings(name="dense-int4", checkpoint="dense", precision="int4"),
            "int8": ArtifactSettings(name="int8", checkpoint=checkpoint, weights="sparse-operator", precision="int8"),
        },
        recipe={},
        command="owl-deploy sweep",
        seed=0,
    )


def test_dense_artifacts_are_one_row_of_all_rounds() -> None:
    result = two_cells()
    assert [row["artifact"] for row in result["rows"]] == ["dense", "dense-int8", "a-0.5/int8", "a-0.7/int8"]
    dense, int8, *_ = result["rows"]
    assert len(dense["samples_ns"]) == len(int8["samples_ns"]) == 8
    assert int8["ms"]["p50"] == pytest.approx(np.median(np.concatenate(int8["samples_ns"])) / 1e6)
    assert int8["speedup"]["p50"] == pytest.approx(2.5, rel=0.05)  # though the second cell's machine was slower


def test_a_cells_ratios_are_those_of_its_own_rounds() -> None:
    first, second = two_cells()["rows"][2:]
    assert first["over"]["dense-int8"]["p50"] == pytest.approx(8 / 6, rel=0.03)
    assert second["over"]["dense-int8"]["p50"] == pytest.approx(8 / 4, rel=0.03)
    assert list(first["over"]) == ["dense-int8"]


def test_a_failed_cell_is_a_row_with_the_reason() -> None:
    result = two_cells({"a-0.9": {"int8": "out of memory"}})
    row = result["rows"][-1]
    assert (row["artifact"], row["status"], row["reason"]) == ("a-0.9/int8", "failed", "out of memory")
    assert [item.name for item in points(result)] == ["dense", "dense-int8", "a-0.5/int8", "a-0.7/int8"]


def test_a_dense_artifact_that_failed_is_one_row() -> None:
    rows = two_cells({cell: {"dense-int4": "parity failed"} for cell in ("a-0.5", "a-0.7")})["rows"]
    failed = [(row["artifact"], row["precision"], row["reason"]) for row in rows if row["status"] == "failed"]
    assert failed == [("dense-int4", "int4", "parity failed")]


def test_recovered_artifacts_are_a_series_of_their_own() -> None:
    *_, last = points(two_cells(checkpoint="recovered"))
    assert last.series == "a, recovered, sparse-operator int8"


def test_what_failed_parity_is_no_point() -> None:
    result = two_cells()
    result["rows"][2]["parity"] = {"passed": False}
    assert "a-0.5/int8" not in [item.name for item in points(result)]


def test_points_know_their_size_and_series() -> None:
    dense, _, first, _ = points(two_cells())
    assert (dense.bytes_on_disk, first.bytes_on_disk) == (9, 3)
    assert (dense.series, first.series) == ("onnxruntime dense fp32", "a, sparse-operator int8")


def test_the_spreadsheet_holds_every_point() -> None:
    found = points(two_cells())
    rows = list(csv.DictReader(frontier_csv(found).splitlines()))
    assert [row["artifact"] for row in rows] == [item.name for item in found]
    assert [row["on_frontier"] for row in rows] == ["False", "True", "False", "True"]


def test_the_picture_is_an_svg_with_words() -> None:
    root = ET.fromstring(frontier_svg(points(two_cells()), "Decode"))
    words = next(node.text for node in root if node.tag.endswith("desc"))
    assert words is not None
    assert "dense-int8" in words


def test_every_view_of_the_plot_has_a_value_per_mark() -> None:
    found = points(two_cells())
    plot = frontier_plot(found)
    assert plot is not None
    n_traces = len(plot.figure["data"])
    for button in plot.figure["layout"]["updatemenus"][0]["buttons"]:
        x, y = button["args"][0]["x"], button["args"][0]["y"]
        assert len(x) == len(y) == n_traces
        assert [len(values) for values in x] == [len(values) for values in y]
    assert json.dumps(plot.figure, allow_nan=False)
    assert frontier_plot(found[:1]) is None


# On a tiny model.


def mapping(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "threads": 1,
        "prune": {"calibration": TEXT, "n_samples": 4, "seq_len": 32},
        "sweep": {"grid": [{"method": "magnitude", "allocation": "uniform", "sparsity": [0.5, 0.6]}]},
        "export": [
            {"name": "dense", "checkpoint": "dense", "target": "onnxruntime"},
            {"name": "dense-int8", "checkpoint": "dense", "target": "onnxruntime", "precision": "int8"},
            {"name": "operator", "target": "onnxruntime", "weights": "sparse-operator"},
        ],
        "eval": {"text": TEXT, "window": 32, "max_windows": 1},
        "bench": {"baseline": "dense", "past_len": [8], "prompt_len": [8], "rounds": 2, "decode_samples": 4},
        **changes,
    }


def recipe(model: Path, **changes: Any) -> Recipe:
    return recipe_from_mapping(mapping(model, **changes))


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished sweep, made through the command line."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model)))
    done = call("sweep", folder / "r.yaml", "--out", folder / "out", "--json", "--quiet")
    assert done.code == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["rows"]] == ["ok", "ok"]
    return folder / "out"


TASKS = Path(__file__).parent / "tasks"
CELLS = ["magnitude-uniform-0.5", "magnitude-uniform-0.6"]


def test_a_sweep_with_artifacts_ends_in_one_report(finished: Path) -> None:
    assert sorted(item.name for item in (finished / "report").iterdir()) == [
        "frontier.csv",
        "frontier.svg",
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    result = read_report(finished / "report")
    decode = [row for row in result["rows"] if row["phase"] == "decode"]
    assert [row["artifact"] for row in decode] == ["dense", "dense-int8", *(f"{cell}/operator" for cell in CELLS)]
    assert all(len(row["samples_ns"]) == (4 if row["artifact"].startswith("dense") else 2) for row in decode)
    assert [row["sparsity"] for row in decode][2:] == [pytest.approx(0.5, abs=0.01), pytest.approx(0.6, abs=0.01)]
    assert result["bytes_on_disk"].keys() == {row["artifact"] for row in decode}


def test_the_page_can_be_made_again_from_the_figures(finished: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(finished / "report" / "report.json"), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    for file in (finished / "report").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_only_records_and_shared_artifacts_stay(finished: Path) -> None:
    assert sorted(item.name for item in (finished / "cells").iterdir()) == [f"{cell}.json" for cell in CELLS]
    assert sorted(item.name for item in (finished / "dense").iterdir()) == ["dense", "dense-int8"]


def test_nothing_published_names_a_folder(finished: Path, tiny_model: Path) -> None:
    for file in (finished / "results.json", finished / "report" / "report.json"):
        assert str(tiny_model.parent) not in file.read_text("utf-8")


def test_finished_cells_are_kept(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(finished, tmp_path / "again"))
    before = {file.name: file.read_bytes() for file in (again / "cells").iterdir()}
    run_sweep(recipe(tiny_model), out=again)
    assert {file.name: file.read_bytes() for file in (again / "cells").iterdir()} == before


def test_other_artifacts_are_made_anew(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(finished, tmp_path / "again"))
    changed = mapping(tiny_model)
    changed["export"][2]["precision"] = "int8"
    run_sweep(recipe_from_mapping(changed), out=again, only=CELLS[0])
    result = read_report(again / "report")
    decode = [row for row in result["rows"] if row["phase"] == "decode"]
    assert [(row["artifact"], row["precision"]) for row in decode] == [
        ("dense", "fp32"),
        ("dense-int8", "int8"),
        (f"{CELLS[0]}/operator", "int8"),
    ]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if "decode" in step.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe(tiny_model), out=tmp_path / "out", on_step=stop)
    cell = tmp_path / "out" / "cells" / CELLS[0]
    before = (cell / "artifacts" / "operator" / "owl.json").stat().st_mtime_ns
    seen: list[str] = []
    found = sweep_line.take_cell(
        recipe(tiny_model),
        next(iter(run_cells(tiny_model))),
        folder=cell,
        dense=tmp_path / "out" / "dense",
        with_peers=True,
        on_step=lambda step: seen.append(step.stage),
    )
    assert found["status"] == "ok"
    assert (cell / "artifacts" / "operator" / "owl.json").stat().st_mtime_ns == before
    assert "pruning blocks" not in seen


def run_cells(model: Path) -> list[Any]:
    from owl_deploy.sweep_grid import sweep_cells

    return sweep_cells(recipe(model))


def test_a_cell_that_fails_leaves_the_others(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run

    def fail_at_sixty(own: Recipe, **keywords: Any) -> Any:
        if own.prune.sparsity == 0.6:
            raise EngineFailedError("the engine died")
        return real(own, **keywords)

    monkeypatch.setattr(sweep_line, "run", fail_at_sixty)
    found = run_sweep(recipe(tiny_model), out=tmp_path / "out")
    assert [row["status"] for row in found["rows"]] == ["ok", "failed"]
    rows = read_report(tmp_path / "out" / "report")["rows"]
    assert ("magnitude-uniform-0.6/operator", "the engine died") in [(row["artifact"], row["reason"]) for row in rows]


def test_an_artifact_that_fails_leaves_the_others_of_its_cell(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_onnx

    def fail_with_int8(model: str, settings: Any, **keywords: Any) -> Any:
        if settings.precision == "int8" or settings.weights == "sparse-operator":
            raise ParityError("logits differ")
        return real(model, settings, **keywords)

    monkeypatch.setattr(pipeline, "export_onnx", fail_with_int8)
    changed = mapping(tiny_model)
    changed["export"].append({"name": "sparse-initializer", "weights": "sparse-initializer"})
    found = run_sweep(recipe_from_mapping(changed), out=tmp_path / "out", only=CELLS[0])
    assert found["rows"][0]["failed"] == ["logits differ", "logits differ"]
    decode = [row for row in read_report(tmp_path / "out" / "report")["rows"] if row["phase"] == "decode"]
    assert [(row["artifact"], row["status"], row["reason"]) for row in decode] == [
        ("dense", "ok", None),
        (f"{CELLS[0]}/sparse-initializer", "ok", None),
        ("dense-int8", "failed", "logits differ"),
        (f"{CELLS[0]}/operator", "failed", "logits differ"),
    ]


def test_tasks_are_an_axis_and_each_artifact_answers_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = tasks.evaluate_tasks

    def counted(models: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.extend(Path(model).name for model in models)
        return real(models, *arguments, **keywords)

    monkeypatch.setattr(tasks, "evaluate_tasks", counted)
    changed = mapping(tiny_model, tasks={"names": ["colours"], "path": str(TASKS), "limit": 4})
    run_sweep(recipe_from_mapping(changed), out=tmp_path / "out")
    assert sorted(asked) == ["dense", "dense-int8", "operator", "operator"]
    result = read_report(tmp_path / "out" / "report")
    assert all(row["accuracy"] == row["tasks"]["colours"]["acc_norm"] for row in result["rows"])
    assert all(row["tasks"]["colours"]["n_samples"] == 4 for row in result["rows"])
    plot = frontier_plot(points(result))
    assert plot is not None
    labels = [button["label"] for button in plot.figure["layout"]["updatemenus"][0]["buttons"]]
    assert "decode speed-up, accuracy" in labels
    lines = list(csv.DictReader((tmp_path / "out" / "report" / "frontier.csv").read_text().splitlines()))
    assert [line["accuracy"] for line in lines] == [str(item.accuracy) for item in points(result)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bench": None, "tasks": {"names": ["colours"]}}, "the recipe has no bench stage"),
        ({"bench": {"baseline": "operator"}}, "one of the dense artifacts"),
        (
            {"sweep": {"grid": [{"sparsity": [0.5]}], "evals": [{"text": "python-docs"}]}},
            "cells that are benched are measured on the recipe's eval",
        ),
    ],
)
def test_a_grid_that_cannot_be_compared_is_refused(tiny_model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_model, **changes)


def test_the_table_fits_a_hundred_columns(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(finished, tmp_path / "again"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model)))
    done = call("sweep", tmp_path / "r.yaml", "--out", again, "--quiet")
    assert done.code == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert last == f"Report: {again / 'report/report.html'}"
    assert any("magnitude-uniform-0.6" in line for line in lines)
    assert any("dense decodes in" in line for line in lines)
