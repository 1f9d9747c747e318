"""A grid of pruned checkpoints, each measured for quality; one table at the end.

In: a recipe with a `sweep` key, and a folder. Out: in that folder `results.json`, `results.md` and
`results.csv`, and one JSON file per cell, from which a sweep that was stopped goes on. What a method or a text is, and
what a record looks like (`sweep_records`), is not known here.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.evaluation import evaluate
from owl_deploy.files import write_json
from owl_deploy.memory import available_bytes, release_free_memory
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.pruning import prune
from owl_deploy.published import public_source, without_folders
from owl_deploy.recipe import PruneSettings, Recipe
from owl_deploy.sweep_grid import Cell, chosen_cells
from owl_deploy.sweep_line import has_line, take_cell
from owl_deploy.sweep_records import SweepRecords, read_json, write_results
from owl_deploy.threads import resolve_threads

__all__ = ["measure_dense", "plan", "run_sweep"]

log = logging.getLogger(__name__)

# The dense model runs once per window for a whole group. Of 17 s per window of SmolLM2-135M (2048 tokens,
# 2 cores) it takes 6.7 s: groups of four save 29 %, and no group could save more than 39 %.
_GROUP = 4

_WRITTEN_BY_PRUNE = ("owl.json", "measured.json")


def plan(recipe: Recipe, *, out: Path, only: str = "*", offline: bool = False) -> list[tuple[Cell, bool]]:
    """Return the chosen cells in order, and whether each one is finished; write nothing."""
    records = SweepRecords.open(recipe, out, offline=offline)
    return [(cell, records.finished(cell) is not None) for cell in chosen_cells(records.cells, only)]


def run_sweep(
    recipe: Recipe,
    *,
    out: Path,
    only: str = "*",
    command: str = "owl-deploy sweep",
    offline: bool = False,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Prune and measure every cell of a recipe's grid.

    A cell that is finished, with the same settings, model, texts and versions, is kept: to go on after a
    stop, run again. A cell that fails is a row that says why, and is tried again the next time.

    Args:
        recipe: with a sweep.
        out: folder of the results; what else is in it stays.
        only: pattern (`*`, `?`, `[...]`) of the names of the cells to make.
        command: what was called, for the head of the tables.
        offline: never ask a hub.
        on_step: told of every step.

    Returns:
        The content of results.json.

    Raises:
        OwlDeployError: the model or a text cannot be read, or the dense model cannot be measured.
        RecipeError: the recipe has no sweep, or `only` fits no cell.
    """
    records = SweepRecords.open(recipe, out, offline=offline)
    to_do = []
    for cell in chosen_cells(records.cells, only):
        if records.finished(cell) is None:
            to_do.append(cell)
        else:
            records.clear_up(cell)  # where a stop came between the record and this
    records.folder.mkdir(parents=True, exist_ok=True)
    if has_line(recipe):
        _take_along_the_line(records, to_do, command, on_step)
        return write_results(records, command)
    has_dense = records.finished(None) is not None
    meter = _Meter(on_step, records.n_windows * (2 * len(to_do) + (not has_dense)), len(to_do))
    if not has_dense:
        _measure_dense(records, meter)
    size = _group_size(records.source)
    for start in range(0, len(to_do), size):
        _run_group(records, to_do[start : start + size], meter)
        write_results(records, command)
    return write_results(records, command)


def _take_along_the_line(records: SweepRecords, cells: Sequence[Cell], command: str, on_step: OnStep) -> None:
    """Take cells along the whole line, one after the other, and put each on record."""
    load_before = os.getloadavg()[0]
    meter = _Meter(on_step, len(cells), len(cells))
    for cell in cells:
        meter.tell(meter.n_finished, cell.name)
        folder = records.folder / cell.name
        try:
            document = take_cell(
                records.recipe,
                cell,
                folder=folder,
                dense=records.folder.parent / "dense",
                with_peers=cell == records.cells[0],
                load_before=load_before,
                offline=records.offline,
                on_step=meter.within(cell.name, "", 0),
            )
        except Exception as error:  # noqa: BLE001  (other cells are to come)
            _fail(records, cell, error, meter)
        else:
            records.record(cell, document)
            records.clear_up(cell)
            meter.n_finished += 1
            log.info("%s: done, %d of %d cells", cell.name, meter.n_finished, len(cells))
        meter.done = meter.n_finished
        write_results(records, command)


def measure_dense(recipe: Recipe, *, out: Path, offline: bool = False, on_step: OnStep = silent) -> None:
    """Measure the dense model, which every cell is compared with, and put it on record.

    Args:
        recipe: with a sweep.
        out: folder of the results.
        offline: never ask a hub.
        on_step: told of every step.

    Raises:
        OwlDeployError: the model or a text cannot be read, or the dense model cannot be measured.
    """
    records = SweepRecords.open(recipe, out, offline=offline)
    _measure_dense(records, _Meter(on_step, records.n_windows, 0))


@dataclass
class _Meter:
    """One bar for the whole sweep, in windows; the two halves of a cell are its pruning and its evaluation."""

    on_step: OnStep
    total: int
    n_cells: int
    n_finished: int = 0
    done: int = 0

    def tell(self, done: int, note: str) -> None:
        note = f"{self.n_finished} of {self.n_cells} cells, {note}"
        self.on_step(Step("sweep", min(done, self.total), self.total, note))

    def within(self, label: str, stage: str, share: int) -> OnStep:
        """Return what to tell of the steps inside `share` of the bar; only those of `stage` move it."""

        def tell(step: Step) -> None:
            moved = share * step.done // step.total if step.stage == stage else 0
            self.tell(self.done + moved, f"{label}: {step.stage} {step.done}/{step.total} {step.note}")

        return tell


def _measure_dense(records: SweepRecords, meter: _Meter) -> None:
    started = time.perf_counter()
    measured = _evaluated(records, [records.recipe.model], None, meter, "dense", 1)[0]
    seconds = {"evaluate": round(time.perf_counter() - started, 3)}
    records.record(None, {"status": "ok", "evaluations": measured, "seconds": seconds})


def _run_group(records: SweepRecords, cells: Sequence[Cell], meter: _Meter) -> None:
    """Prune some cells one after the other, measure them side by side, and put each on record."""
    behind = meter.done + 2 * records.n_windows * len(cells)
    pruned: list[Cell] = []
    for cell in cells:
        try:
            _prune_cell(records, cell, meter.within(cell.name, "pruning blocks", records.n_windows))
        except Exception as error:  # noqa: BLE001  (hours of other cells are to come)
            _fail(records, cell, error, meter)
        else:
            pruned.append(cell)
        meter.done += records.n_windows
    if pruned:
        _measure_group(records, pruned, meter)
    meter.done = behind


def _measure_group(records: SweepRecords, cells: Sequence[Cell], meter: _Meter) -> None:
    """Measure cells side by side; where that fails, each by itself, to learn which one it is."""
    try:
        _measure(records, cells, meter)
    except Exception as error:  # noqa: BLE001
        if len(cells) == 1:
            _fail(records, cells[0], error, meter)
            return
        for cell in cells:
            _measure_group(records, [cell], meter)


def _prune_cell(records: SweepRecords, cell: Cell, on_step: OnStep) -> None:
    """Prune a cell, or go on where a sweep of the same settings was stopped."""
    folder = records.folder / cell.name
    threads = resolve_threads(records.recipe.threads).n
    # Sums round differently with other threads, so that prune would not go on.
    identity = {**records.identity(cell), "threads": threads}
    if read_json(folder / "identity.json") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "identity.json", identity)
    if (folder / "checkpoint").exists():
        return
    prune(
        records.recipe.model,
        cell.prune,
        out=folder / "checkpoint",
        seed=records.recipe.seed,
        threads=threads,
        resume=True,
        offline=records.offline,
        on_step=on_step,
    )


def _measure(records: SweepRecords, cells: Sequence[Cell], meter: _Meter) -> None:
    """Evaluate pruned cells side by side, put them on record, and delete their checkpoints."""
    folders = [records.folder / cell.name / "checkpoint" for cell in cells]
    known = [[json.loads((folder / name).read_text("utf-8")) for name in _WRITTEN_BY_PRUNE] for folder in folders]
    started = time.perf_counter()
    label = f"{cells[0].name} to {cells[-1].name}" if len(cells) > 1 else cells[0].name
    measured = _evaluated(records, [str(folder) for folder in folders], records.recipe.model, meter, label, len(cells))
    seconds = (time.perf_counter() - started) / len(cells)
    for cell, (facts, timing), evaluations in zip(cells, known, measured, strict=True):
        calibration = facts["calibration"]
        if calibration is not None:
            calibration = {**calibration, "source": public_source(calibration["source"])}
        document = {
            "status": "ok",
            "sparsity": facts["sparsity"],
            "mask_sha256": facts["mask_sha256"],
            "calibration": calibration,
            "evaluations": evaluations,
            "seconds": {"prune": timing["seconds"], "evaluate": round(seconds, 3)},
            "peak_rss_bytes": timing["peak_rss_bytes"],
            "threads": resolve_threads(records.recipe.threads).n,
            "notes": _notes(facts["linears"], cell.prune),
        }
        records.record(cell, document)
        meter.n_finished += 1
        figures = ", ".join(f"{found['perplexity']:.4g} on {found['text']}" for found in evaluations)
        log.info("%s: perplexity %s; %d of %d cells", cell.name, figures, meter.n_finished, meter.n_cells)
        records.clear_up(cell)


def _evaluated(
    records: SweepRecords, models: list[str], reference: str | None, meter: _Meter, label: str, n_cells: int
) -> list[list[dict[str, Any]]]:
    """Evaluate models on every text; return one list of evaluations per model."""
    by_text = []
    for settings, text in zip(records.evals, records.texts, strict=True):
        share = text["n_windows"] * n_cells
        found = evaluate(
            models,
            settings,
            reference=reference,
            threads=records.recipe.threads,
            offline=records.offline,
            on_step=meter.within(label, "evaluating", share),
        )
        meter.done += share
        names = {"text": text["text"], **({"reference": records.model} if reference else {})}
        by_text.append([{**item.to_json(), **names} for item in found])
        gc.collect()  # what is left of the models, before the next text opens them again
        release_free_memory()
    return [list(row) for row in zip(*by_text, strict=True)]


def _fail(records: SweepRecords, cell: Cell, error: Exception, meter: _Meter) -> None:
    """Put on record why a cell failed."""
    meter.tell(meter.done, cell.name)  # raises where this is an interrupt that native code made an error of its own
    is_ours = isinstance(error, OwlDeployError)
    reason = " ".join(f"{'' if is_ours else f'{type(error).__name__}: '}{error}".split())
    log.warning("%s failed: %s", cell.name, reason, exc_info=None if is_ours else error)
    records.record(cell, {"status": "failed", "reason": without_folders(reason)})
    meter.n_finished += 1
    shutil.rmtree(records.folder / cell.name, ignore_errors=True)


def _notes(linears: list[dict[str, Any]], settings: PruneSettings) -> list[str]:
    """Return what a reader of the table must know: where something else was done than asked."""
    found = [linear.get("notes", {}) for linear in linears]
    raised = [note["dampening"] for note in found if "dampening" in note]
    fallbacks = Counter(note["fallback"] for note in found if "fallback" in note)
    notes = [f"{n} linears pruned by {name} for want of calibration tokens" for name, n in fallbacks.items()]
    if raised:
        before, most = settings.dampening, max(raised)
        notes.insert(0, f"dampening raised from {before:g} to {most:g} at most, in {len(raised)} linears")
    return notes


def _group_size(source: Checkpoint) -> int:
    """Return how many cells are evaluated at once: as many models, beside the dense one, as half the memory holds."""
    model_bytes = 4 * sum(math.prod(entry.shape) for entry in source.tensors.values())
    return max(1, min(_GROUP, available_bytes() // (2 * model_bytes) - 1))
