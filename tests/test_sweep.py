"""A grid of pruned checkpoints on the two-block model: order, resume, failures, and the tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TEXT, Call, call, tree

from owl_deploy import run_sweep, sweep
from owl_deploy.allocation_file import save_allocation
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.evaluation import evaluate
from owl_deploy.files import file_sha256
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import EvalSettings, Recipe, recipe_from_mapping
from owl_deploy.sweep import plan
from owl_deploy.sweep_grid import sweep_cells, with_local_texts

GRID: list[dict[str, Any]] = [
    {"method": ["magnitude", "wanda"], "allocation": "uniform", "sparsity": [0.7, 0.5]},
    {"method": "wanda", "allocation": "owl", "sparsity": 0.7},
    {"method": "wanda", "pattern": "keep 2 of 4"},
]
EVALS: list[dict[str, Any]] = [
    {"text": "python-docs", "window": 32, "max_windows": 2},
    {"text": TEXT, "window": 48, "max_windows": 1},
]
NAMES = [
    "magnitude-uniform-0.7",
    "wanda-uniform-0.7",
    "magnitude-uniform-0.5",
    "wanda-uniform-0.5",
    "wanda-uniform-pattern-keep-2-of-4-0.5",
    "wanda-owl-0.7",
]


def mapping(model: Path | str, *, shared: dict[str, Any] | None = None, **sweep_keys: Any) -> dict[str, Any]:
    settings = {"grid": GRID, "evals": EVALS, **sweep_keys}
    small = {"calibration": TEXT, "n_samples": 4, "seq_len": 32, **(shared or {})}
    return {"model": str(model), "threads": 1, "prune": small, "sweep": settings}


def recipe(model: Path | str, **changes: Any) -> Recipe:
    return recipe_from_mapping(mapping(model, **changes))


def two_cells(model: Path, **changes: Any) -> Recipe:
    """Two quick cells that need no data, on one text."""
    return recipe(
        model,
        **{"grid": [{"method": "magnitude", "allocation": "uniform", "sparsity": [0.5, 0.6]}], **ONE_TEXT, **changes},
    )


ONE_TEXT: dict[str, Any] = {"evals": EVALS[1:]}


@pytest.fixture(scope="module")
def two_finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `two_cells`, to be copied."""
    out = tmp_path_factory.mktemp("two") / "out"
    run_sweep(two_cells(tiny_model), out=out)
    return out


@pytest.fixture
def again(two_finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, in which files keep their times."""
    return Path(shutil.copytree(two_finished, tmp_path / "again"))


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Call]:
    """The whole grid through the command line, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model)))
    return folder / "out", call("sweep", folder / "r.yaml", "--out", folder / "out", "--json", "--quiet")


def document(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    assert isinstance(found, dict)
    return found


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


# The grid.


def test_uniform_cells_come_first_and_sparsities_in_the_order_of_the_grid() -> None:
    block = {"method": ["ria", "wanda"], "allocation": ["owl", "uniform", "dlp"], "sparsity": [0.7, 0.5]}
    assert [cell.name for cell in sweep_cells(recipe("x", grid=[block]))] == [
        *("ria-uniform-0.7", "wanda-uniform-0.7", "ria-uniform-0.5", "wanda-uniform-0.5"),
        *("ria-owl-0.7", "ria-dlp-0.7", "wanda-owl-0.7", "wanda-dlp-0.7"),
        *("ria-owl-0.5", "ria-dlp-0.5", "wanda-owl-0.5", "wanda-dlp-0.5"),
    ]


def test_a_cell_is_the_shared_settings_with_its_own() -> None:
    cells = {cell.name: cell for cell in sweep_cells(recipe("x", shared={"owl_m": 3}))}
    settings = cells["wanda-owl-0.7"].prune
    assert (settings.method, settings.allocation, settings.sparsity) == ("wanda", "owl", 0.7)
    assert (settings.owl_m, settings.n_samples, settings.calibration) == (3.0, 4, TEXT)
    assert cells["wanda-uniform-pattern-keep-2-of-4-0.5"].varied == {"pattern": "keep 2 of 4"}


def test_a_cell_of_two_blocks_is_made_once() -> None:
    blocks = [{"sparsity": [0.5, 0.6]}, {"sparsity": 0.6, "method": ["wanda", "ria"]}]
    assert [cell.name for cell in sweep_cells(recipe("x", grid=blocks))] == [
        "wanda-owl-0.5",
        "wanda-owl-0.6",
        "ria-owl-0.6",
    ]


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    grid = [{"allocation": [f"file:{tmp_path}/a/same.json", f"file:{tmp_path}/b/same.json"]}]
    with pytest.raises(RecipeError, match=r"2 cells of the sweep would be named wanda-file-same\.json-0\.7"):
        sweep_cells(recipe("x", grid=grid))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grid": []}, "sweep.grid: must not be empty"),
        ({"grid": [{"method": []}]}, "sweep.grid.0.method: must not be empty"),
        ({"grid": [{}, {"methd": ["wanda"]}]}, "sweep.grid.1: unknown key 'methd'; did you mean method?"),
        ({"grid": [{"sparsity": [0.5, 1.5]}]}, "sweep.grid.0 with sparsity 1.5: sparsity: must be in [0, 1), got 1.5"),
        ({"grid": [{"method": "wnda"}]}, "got 'wnda'; did you mean wanda?"),
        ({"grid": [{"n_samples": list(range(1, 20_000))}]}, "sweep.grid has 19999 cells, and at most 10000 are made"),
        ({"evals": [{"windw": 3}]}, "unknown key sweep.evals.0.windw; did you mean window?"),
        ({"keep_checkpoint": True}, "unknown key sweep.keep_checkpoint; did you mean keep_checkpoints?"),
    ],
)
def test_impossible_grid_is_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe("x", **changes)
    assert str(error.value).startswith("recipe: ")
    assert sentence in str(error.value)


def test_recipe_without_a_sweep_is_refused() -> None:
    with pytest.raises(RecipeError, match="the recipe has no key sweep"):
        sweep_cells(Recipe(model="x"))


def test_evaluation_is_that_of_the_recipe_where_the_sweep_names_none() -> None:
    plain = recipe_from_mapping({**mapping("x", evals=[]), "eval": {"text": "wikitext2", "window": 64}})
    local = with_local_texts(plain, ["wikitext2:here.raw"])
    assert local.sweep is not None
    assert local.sweep.evals == (EvalSettings(text="wikitext2:here.raw", window=64),)


def test_local_text_takes_the_place_of_its_kind_only() -> None:
    evals = [{"text": "wikitext2", "window": 64}, {"text": "python-docs"}]
    local = with_local_texts(recipe("x", evals=evals), ["wikitext2:/a/wiki.raw"])
    assert local.sweep is not None
    assert [item.text for item in local.sweep.evals] == ["wikitext2:/a/wiki.raw", "python-docs"]
    assert local.sweep.evals[0].window == 64
    with pytest.raises(RecipeError, match="no evaluation text of the recipe is a c4, so c4:x replaces none; it has w"):
        with_local_texts(recipe("x", evals=evals), ["c4:x"])


# Results.


def test_every_cell_has_a_row_and_its_checkpoint_is_gone(finished: tuple[Path, Call]) -> None:
    out, done = finished
    assert done.code == 0
    assert [row["name"] for row in done.document["rows"]] == NAMES
    assert {row["status"] for row in done.document["rows"]} == {"ok"}
    files = {f"cells/{name}.json" for name in [*NAMES, "dense"]}
    assert tree(out) == {"cells", "results.csv", "results.json", "results.md", "results.svg", *files}


@pytest.mark.parametrize("name", ["wanda-owl-0.7", "wanda-uniform-pattern-keep-2-of-4-0.5"])
def test_numbers_are_those_of_prune_and_evaluate(
    finished: tuple[Path, Call], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    (row,) = [row for row in document(finished[0])["rows"] if row["name"] == name]
    (cell,) = [cell for cell in sweep_cells(recipe(tiny_model)) if cell.name == name]
    report = prune(str(tiny_model), cell.prune, out=tmp_path / "out", threads=1)
    assert row["mask_sha256"] == report.facts["mask_sha256"]
    assert row["realised"] == report.facts["sparsity"]
    assert row["tokens_sha256"] == report.facts["calibration"]["tokens_sha256"]
    for figures, settings in zip(row["evaluations"], EVALS, strict=True):
        kind = EvalSettings.model_validate(settings)
        (direct,) = evaluate([str(tmp_path / "out")], kind, reference=str(tiny_model), threads=1)
        assert figures == {key: direct.to_json()[key] for key in figures}
        assert set(figures) == {"perplexity", "kl_divergence", "top1_agreement"}


def test_dense_model_is_measured_on_every_text(finished: tuple[Path, Call], tiny_model: Path) -> None:
    dense = document(finished[0])["dense"]["evaluations"]
    direct = [evaluate([str(tiny_model)], EvalSettings.model_validate(item), threads=1)[0] for item in EVALS]
    assert [item["perplexity"] for item in dense] == [item.perplexity for item in direct]


def test_no_file_holds_a_path_of_this_machine(finished: tuple[Path, Call], tiny_model: Path) -> None:
    out, _ = finished
    for path in (item for item in out.rglob("*") if item.is_file()):
        for folder in (tiny_model.parent, out.parent, Path(__file__).parent, Path.home()):
            assert f"{folder}/" not in path.read_text(), path
    assert document(out)["model"] == "model"
    assert document(out)["texts"][1]["text"] == "text:command_line.py"
    assert document(out)["calibration"][0]["source"] == "text:command_line.py"


def test_results_hold_the_settings_once(finished: tuple[Path, Call]) -> None:
    found = document(finished[0])
    assert found["prune"]["n_samples"] == 4
    assert [(text["window"], text["n_windows"]) for text in found["texts"]] == [(32, 2), (48, 1)]
    assert len(found["calibration"]) == 1
    assert all("n_samples" not in row for row in found["rows"])


def test_markdown_has_a_table_per_text_with_what_it_depends_on(finished: tuple[Path, Call]) -> None:
    out, _ = finished
    found, lines = document(out), (out / "results.md").read_text().splitlines()
    assert lines[0] == "# Pruned checkpoints of model"
    assert lines[2].endswith("6 of 6 cells measured.")
    assert "- Calibration: text:command_line.py, 4 sequences of 32 tokens, seed 0, tokens " in "\n".join(lines)
    for index, text in enumerate(found["texts"]):
        start = lines.index(f"## {text['text']}")
        sentence = (
            f"{text['n_windows']} windows of {text['window']} tokens, no BOS, tokens {text['tokens_sha256'][:16]}."
        )
        assert lines[start + 2] == sentence
        table = [[value.strip() for value in line.strip("|").split("|")] for line in lines[start + 4 : start + 11]]
        assert table[0] == ["method", "allocation", "settings", "0.5", "0.7"]
        assert table[2][:3] == ["dense", "", ""]
        assert [row[:3] for row in table[3:]] == [
            ["magnitude", "uniform", ""],
            ["wanda", "uniform", ""],
            ["wanda", "uniform", "pattern keep 2 of 4"],
            ["wanda", "owl", ""],
        ]
        for column, sparsity in ((3, 0.5), (4, 0.7)):
            values = [row["evaluations"][index] for row in found["rows"] if row["sparsity"] == sparsity]
            best = min(value["perplexity"] for value in values)
            bold = [row[column] for row in table[3:] if "**" in row[column]]
            (kl,) = [value["kl_divergence"] for value in values if value["perplexity"] == best]
            assert bold == [f"**{best:.2f}** ({kl:.3f})"]
        assert table[5][4] == ""


def test_csv_has_a_line_per_cell_and_text(finished: tuple[Path, Call]) -> None:
    out, _ = finished
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [name for name in ["dense", *NAMES] for _ in range(2)]
    row = document(out)["rows"][0]
    assert float(lines[2]["perplexity"]) == row["evaluations"][0]["perplexity"]
    assert float(lines[3]["kl_divergence"]) == row["evaluations"][1]["kl_divergence"]
    assert (lines[3]["text"], lines[3]["window"]) == ("text:command_line.py", "48")


def test_table_on_stdout_fits_100_columns(finished: tuple[Path, Call]) -> None:
    out, _ = finished
    done = call("sweep", out.parent / "r.yaml", "--out", out, "--quiet")
    assert done.code == 0
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 100
    for row in document(out)["rows"]:
        assert f"{row['evaluations'][0]['perplexity']:.2f}" in done.stdout


# Going on.


def test_second_run_keeps_every_finished_cell(finished: tuple[Path, Call]) -> None:
    out, first = finished
    before = times(out)
    again = call("sweep", out.parent / "r.yaml", "--out", out, "--json", "--quiet")
    assert times(out) == before
    assert again.document["rows"] == first.document["rows"]


def test_only_the_chosen_cells_are_made(tiny_model: Path, tmp_path: Path) -> None:
    found = run_sweep(two_cells(tiny_model), out=tmp_path / "out", only="*-0.6")
    assert [row["status"] for row in found["rows"]] == ["pending", "ok"]
    assert "1 of 2 cells measured, 1 pending" in (tmp_path / "out" / "results.md").read_text()


def test_pattern_that_fits_no_cell_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no cell of the sweep is named ria-\*; the first ones are magnitude-uni"):
        run_sweep(two_cells(tiny_model), out=tmp_path / "out", only="ria-*")
    assert not (tmp_path / "out").exists()


def test_cells_with_other_settings_are_made_anew(tiny_model: Path, again: Path) -> None:
    before = times(again)
    # The method does not use it, but the sweep does not know that.
    run_sweep(two_cells(tiny_model, shared={"dampening": 0.02}), out=again, only="*-0.6")
    assert {name for name, when in times(again).items() if before[name] != when} == {"magnitude-uniform-0.6.json"}


def test_record_of_other_settings_is_no_result(tiny_model: Path, again: Path) -> None:
    found = run_sweep(two_cells(tiny_model, shared={"dampening": 0.02}), out=again, only="*-0.6")
    assert [row["status"] for row in found["rows"]] == ["pending", "ok"]


def test_other_windows_make_everything_anew(tiny_model: Path, again: Path) -> None:
    before = times(again)
    found = run_sweep(two_cells(tiny_model, evals=[{**EVALS[1], "window": 40}]), out=again)
    after = times(again)
    assert all(before[name] != after[name] for name in before)
    assert found["texts"][0]["window"] == 40


def test_cell_of_another_edition_of_the_language_reference_stays_and_is_marked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = [EVALS[1], {"text": "python-docs", "window": 32, "max_windows": 1}]
    settings = two_cells(tiny_model, evals=evals)
    run_sweep(settings, out=tmp_path, only="*-0.5")
    before = times(tmp_path)
    monkeypatch.setattr("owl_deploy.text._python_docs", lambda part: "The next release says it in other words. " * 40)
    found = run_sweep(settings, out=tmp_path)
    assert times(tmp_path)["magnitude-uniform-0.5.json"] == before["magnitude-uniform-0.5.json"]
    assert times(tmp_path)["dense.json"] != before["dense.json"]
    old, new = ([item.get("tokens_sha256") for item in row["evaluations"]] for row in found["rows"])
    assert new == [None, None]
    assert old[0] is None
    assert old[1] != found["texts"][1]["tokens_sha256"]
    first, second = (tmp_path / "results.md").read_text().split("## python-docs")
    assert "†" not in first
    assert f"† with another edition of the text, which comes with Python: tokens {old[1][:16]}." in second
    assert len(re.findall(r"[0-9]†", second)) == 1
    with (tmp_path / "results.csv").open() as file:
        assert [row["tokens_sha256"] for row in csv.DictReader(file) if row["sparsity"] == "0.5"][1] == old[1]


def test_calibration_file_with_other_content_counts_as_another(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    settings = two_cells(tiny_model, grid=[{"method": "wanda"}], shared={"calibration": f"text:{text}"})
    hashes = []
    for letters in ("abcdefgh " * 40, "hgfe dcba" * 40):
        text.write_text(letters)
        hashes.append(run_sweep(settings, out=tmp_path / "out")["rows"][0]["tokens_sha256"])
    assert hashes[0] != hashes[1]


def test_setting_that_is_new_since_does_not_void_a_record(tiny_model: Path, again: Path) -> None:
    for file in (again / "cells").glob("magnitude-*.json"):
        record = json.loads(file.read_text())
        del record["identity"]["prune"]["refine"]
        file.write_text(json.dumps(record))
    before = times(again)
    run_sweep(two_cells(tiny_model), out=again)
    assert times(again) == before


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"identity": 3}'])
def test_damaged_record_is_no_result(tiny_model: Path, again: Path, damage: str) -> None:
    (again / "cells" / "magnitude-uniform-0.5.json").write_text(damage)
    finished = plan(two_cells(tiny_model), out=again)
    assert [is_finished for _, is_finished in finished] == [False, True]


def test_damaged_record_is_made_anew(tiny_model: Path, again: Path) -> None:
    before = document(again)["rows"]
    (again / "cells" / "magnitude-uniform-0.5.json").write_text("")
    after = run_sweep(two_cells(tiny_model), out=again)["rows"]
    assert [row["evaluations"] for row in after] == [row["evaluations"] for row in before]


def test_checkpoints_stay_where_asked(tiny_model: Path, tmp_path: Path) -> None:
    found = run_sweep(two_cells(tiny_model, keep_checkpoints=True), out=tmp_path)
    for row in found["rows"]:
        owl = json.loads((tmp_path / "cells" / row["name"] / "checkpoint" / "owl.json").read_text())
        assert owl["mask_sha256"] == row["mask_sha256"]


class StoppedError(BaseException):
    pass


def test_stopped_sweep_goes_on_with_the_checkpoints_it_had(tiny_model: Path, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if "evaluating" in step.note and "dense" not in step.note:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_sweep(two_cells(tiny_model), out=tmp_path, on_step=stop)
    kept = tmp_path / "cells" / "magnitude-uniform-0.6" / "checkpoint" / "owl.json"
    assert kept.is_file()
    notes: list[str] = []
    found = run_sweep(two_cells(tiny_model), out=tmp_path, on_step=lambda step: notes.append(step.note))
    assert [row["status"] for row in found["rows"]] == ["ok", "ok"]
    assert not [note for note in notes if "pruning" in note]
    assert not kept.exists()


def test_bar_moves_forward_only_and_ends_full(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[Step] = []
    with caplog.at_level("INFO", "owl_deploy.sweep"):
        run_sweep(two_cells(tiny_model), out=tmp_path, on_step=steps.append)
    assert {step.stage for step in steps} == {"sweep"}
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total
    lines = [message for name, _, message in caplog.record_tuples if name == "owl_deploy.sweep"]
    assert [line.rpartition("; ")[2] for line in lines] == ["1 of 2 cells", "2 of 2 cells"]


# Failures.


@pytest.fixture
def half_failed(tiny_model: Path, tmp_path: Path) -> tuple[Path, Call]:
    """A cell that works, beside one whose allocation file is missing."""
    grid = [{"method": "magnitude", "allocation": ["uniform", f"file:{tmp_path}/nosuch.json"], "sparsity": 0.5}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model, grid=grid, **ONE_TEXT)))
    return tmp_path / "out", call("sweep", tmp_path / "r.yaml", "--out", tmp_path / "out", "--quiet")


def test_cell_that_fails_is_a_row_and_the_exit_code(half_failed: tuple[Path, Call]) -> None:
    out, done = half_failed
    assert done.code == 1
    assert done.stderr.splitlines()[-1] == f"owl-deploy: a cell failed; its row says why ({out / 'results.md'})"
    ok, failed = document(out)["rows"]
    assert (failed["status"], ok["status"]) == ("failed", "ok")
    assert "nosuch.json" in failed["reason"]
    assert str(out.parent) not in (out / "results.json").read_text()
    text = (out / "results.md").read_text()
    assert "| magnitude | file:nosuch.json | failed |" in text
    assert f"- {failed['name']}: {failed['reason']}" in text
    assert "failed" in done.stdout
    assert not (out / "cells" / failed["name"]).exists()


def test_cell_that_failed_is_tried_again(half_failed: tuple[Path, Call]) -> None:
    out, _ = half_failed
    before = times(out)["magnitude-uniform-0.5.json"]
    save_allocation(out.parent / "nosuch.json", [0.5, 0.5])
    done = call("sweep", out.parent / "r.yaml", "--out", out, "--quiet")
    assert done.code == 0, done.stderr
    assert times(out)["magnitude-uniform-0.5.json"] == before


def test_cell_that_cannot_be_measured_does_not_take_its_group_with_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(models: list[str], *arguments: Any, **options: Any) -> Any:
        if any("0.5" in Path(model).parts[-2] for model in models):
            raise RuntimeError(f"no memory for {models[0]}")
        return evaluate(models, *arguments, **options)

    monkeypatch.setattr(sweep, "evaluate", evaluated)
    first, second = run_sweep(two_cells(tiny_model), out=tmp_path)["rows"]
    assert (first["status"], second["status"]) == ("failed", "ok")
    assert first["reason"] == "RuntimeError: no memory for checkpoint"


def test_interrupt_that_became_an_error_is_no_failed_cell(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native code turns an interrupt into errors of its own; the next step then raises the interrupt again."""
    interrupted: list[bool] = []

    def broken(*_: Any, **__: Any) -> Any:
        interrupted.append(True)
        raise RuntimeError("kernel stopped")

    def on_step(_: Step) -> None:
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "prune", broken)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(two_cells(tiny_model), out=tmp_path, on_step=on_step)
    assert [path.name for path in (tmp_path / "cells").glob("*.json")] == ["dense.json"]


def test_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OwlDeployError, match="no model at"):
        run_sweep(recipe(tmp_path / "nosuch"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command.


def test_dry_run_lists_the_cells_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model)))
    done = call("sweep", tmp_path / "r.yaml", "--out", tmp_path / "out", "--dry-run", "--only", "wanda-*")
    wanted = [name for name in NAMES if name.startswith("wanda")]
    assert done.code == 0
    assert done.stdout.splitlines() == [*wanted, "4 cells, 0 of them finished"]
    assert tree(tmp_path) == {"r.yaml"}


def test_dry_run_says_what_is_finished(finished: tuple[Path, Call]) -> None:
    out, _ = finished
    done = call("sweep", out.parent / "r.yaml", "--out", out, "--dry-run", "--json")
    assert done.document == {"cells": [{"name": name, "is_finished": True} for name in NAMES]}


def test_recipe_without_a_sweep_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: x\n")
    done = call("sweep", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert (done.code, done.sentence) == (2, "the recipe has no key sweep: give it one, with a grid")


def wait_for(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)


def test_interrupted_sweep_keeps_its_finished_cells_and_nothing_half_written(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(two_cells(tiny_model).model_dump(mode="json", exclude_unset=True)))
    out = tmp_path / "out"
    run_sweep(two_cells(tiny_model), out=out, only="*-0.5")
    finished = {path.name: file_sha256(path) for path in (out / "cells").iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "owl_deploy", "sweep", tmp_path / "r.yaml", "--out", out, "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may have been told to ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(process, lambda: (out / "cells" / "magnitude-uniform-0.6" / "identity.json").exists())
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr.splitlines()[-1]
    assert {path.name: file_sha256(path) for path in (out / "cells").glob("*.json")} == finished
    assert not [path for path in tree(out) if path.endswith((".tmp", ".old"))]
    assert [row["status"] for row in run_sweep(two_cells(tiny_model), out=out)["rows"]] == ["ok", "ok"]
    assert {name: file_sha256(out / "cells" / name) for name in finished} == finished
