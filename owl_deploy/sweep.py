"""A grid of pruned checkpoints, each measured for quality; one table at the end.

In: a recipe with a `sweep` key, and a folder. Out: in that folder `results.json`, `results.md` and
`results.csv`, and one JSON file per cell, from which a sweep that was stopped goes on. Results hold
no path of this machine, so that they can be published. What a method or a text is, is not known here.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.evaluation import evaluate, evaluation_windows
from owl_deploy.files import file_sha256, write_bytes, write_json
from owl_deploy.memory import available_bytes, release_free_memory
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.pruning import prune, prune_versions
from owl_deploy.recipe import EvalSettings, PruneSettings, Recipe, SweepSettings, expanded_grid
from owl_deploy.sweep_tables import FIGURES, as_csv, as_markdown
from owl_deploy.text import Encoder
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import commit

__all__ = ["Cell", "plan", "run_sweep", "sweep_cells", "with_local_texts"]

log = logging.getLogger(__name__)

# The dense model runs once per window for a whole group. Of 17 s per window of SmolLM2-135M (2048 tokens,
# 2 cores) it takes 6.7 s: groups of four save 29 %, and no group could save more than 39 %.
_GROUP = 4


_KINDS_WITH_PATH = ("text", "jsonl", "wikitext2", "c4", "file")


@dataclass(frozen=True)
class Cell:
    """One checkpoint of the grid."""

    name: str
    prune: PruneSettings
    varied: dict[str, Any]
    """What else the grid varies, beside method, allocation and sparsity."""


def sweep_cells(recipe: Recipe) -> list[Cell]:
    """Return the cells of a recipe's grid in the order in which they are made.

    Uniform allocation comes first, then one sparsity after the other in the order in which the grid names
    them: whatever there is after a part of the time can be compared.

    Raises:
        RecipeError: the recipe has no sweep, or two cells would have one name.
    """
    settings = _sweep_settings(recipe)
    grid = expanded_grid(recipe.prune, settings)
    keys = [key for block in settings.grid for key in block if key not in ("method", "allocation", "sparsity")]
    cells = []
    for prune_settings in grid:
        values = _public(prune_settings)
        # What no block but another one varies has its shared value, which says nothing.
        shared = recipe.prune.model_dump(mode="json")
        varied = {key: values[key] for key in dict.fromkeys(keys) if getattr(prune_settings, key) != shared[key]}
        parts = [values["method"], values["allocation"], *(f"{k}-{v}" for k, v in varied.items()), values["sparsity"]]
        cells.append(
            Cell("-".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(part)) for part in parts), prune_settings, varied)
        )
    name, count = Counter(cell.name for cell in cells).most_common(1)[0]
    if count > 1:
        raise RecipeError(f"{count} cells of the sweep would be named {name}: rename the files that they differ in")
    sparsities = list(dict.fromkeys(cell.prune.sparsity for cell in cells))
    return sorted(cells, key=lambda cell: (cell.prune.allocation != "uniform", sparsities.index(cell.prune.sparsity)))


def with_local_texts(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    """Return a recipe that reads some of its evaluation texts from other places.

    Args:
        recipe: with a sweep.
        texts: sources, such as `wikitext2:PATH`; each takes the place of those of its kind.

    Raises:
        RecipeError: the recipe has no text of that kind.
    """
    settings = _sweep_settings(recipe)
    evals = settings.evals or (recipe.eval,)
    for text in texts:
        kind = text.partition(":")[0]
        if kind not in {item.text.partition(":")[0] for item in evals}:
            known = ", ".join(item.text for item in evals)
            raise RecipeError(f"no evaluation text of the recipe is a {kind}, so {text} replaces none; it has {known}")
        evals = tuple(
            item.model_copy(update={"text": text}) if item.text.partition(":")[0] == kind else item for item in evals
        )
    return recipe.model_copy(update={"sweep": settings.model_copy(update={"evals": evals})})


def plan(recipe: Recipe, *, out: Path, only: str = "*", offline: bool = False) -> list[tuple[Cell, bool]]:
    """Return the chosen cells in order, and whether each one is finished; write nothing."""
    job = _Job.open(recipe, out, offline=offline)
    return [(cell, job.finished(cell) is not None) for cell in _chosen(job.cells, only)]


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
    job = _Job.open(recipe, out, offline=offline)
    to_do = []
    for cell in _chosen(job.cells, only):
        if job.finished(cell) is None:
            to_do.append(cell)
        else:
            job.clear_up(cell)  # where a stop came between the record and this
    job.folder.mkdir(parents=True, exist_ok=True)
    meter = _Meter(on_step, job.n_windows, len(to_do), has_dense=job.finished(None) is None)
    if job.finished(None) is None:
        _measure_dense(job, meter)
    size = _group_size(job.source)
    for start in range(0, len(to_do), size):
        _run_group(job, to_do[start : start + size], meter)
        _write_results(job, command)
    return _write_results(job, command)


@dataclass(frozen=True)
class _Job:
    """What all cells have in common."""

    recipe: Recipe
    folder: Path
    """Of the cells."""
    source: Checkpoint
    cells: list[Cell]
    evals: tuple[EvalSettings, ...]
    texts: list[dict[str, Any]]
    """One per evaluation: text, window, n_windows, tokens_sha256."""
    versions: dict[str, str]
    offline: bool

    @classmethod
    def open(cls, recipe: Recipe, out: Path, *, offline: bool) -> _Job:
        cells = sweep_cells(recipe)
        evals = _sweep_settings(recipe).evals or (recipe.eval,)
        source = open_checkpoint(recipe.model, offline=offline)
        encoder = Encoder.open(source.path)
        texts = []
        for settings in evals:
            windows = evaluation_windows(encoder, settings)
            n_windows, window = windows.tokens.shape
            text = {"text": _public_source(windows.text), "window": window, "n_windows": n_windows}
            texts.append({**text, "tokens_sha256": windows.sha256, "starts_with_bos": windows.starts_with_bos})
        return cls(recipe, out / "cells", source, cells, evals, texts, prune_versions(), offline)

    @property
    def n_windows(self) -> int:
        return sum(text["n_windows"] for text in self.texts)

    @property
    def model(self) -> str:
        """The model's name without the folder it lies in."""
        return Path(self.recipe.model).name if Path(self.recipe.model).exists() else self.recipe.model

    def identity(self, cell: Cell | None) -> dict[str, Any]:
        """Return what a finished cell, or the dense model (None), must agree in to be kept."""
        return {
            "model_sha256": self.source.fingerprint,
            "texts": [{key: text[key] for key in ("window", "n_windows", "tokens_sha256")} for text in self.texts],
            "versions": self.versions,
            **({"seed": self.recipe.seed, "prune": _public(cell.prune), "files": _files(cell.prune)} if cell else {}),
        }

    def file(self, cell: Cell | None) -> Path:
        return self.folder / f"{cell.name if cell else 'dense'}.json"

    def load(self, cell: Cell | None) -> dict[str, Any] | None:
        """Return what is on record of this very cell, finished or failed."""
        found = _read_json(self.file(cell))
        before = found.get("identity") if found else None
        if not isinstance(before, dict):
            return None
        if cell is not None:
            # A setting that came after the record was written had its default then.
            before = {**before, "prune": {**PruneSettings().model_dump(mode="json"), **before.get("prune", {})}}
        return found if before == self.identity(cell) else None

    def finished(self, cell: Cell | None) -> dict[str, Any] | None:
        found = self.load(cell)
        return found if found is not None and found["status"] == "ok" else None

    def clear_up(self, cell: Cell) -> None:
        """Delete the checkpoint of a finished cell, unless it is to stay."""
        if not _sweep_settings(self.recipe).keep_checkpoints:
            shutil.rmtree(self.folder / cell.name, ignore_errors=True)


class _Meter:
    """One bar for the whole sweep: the two halves of a cell are its pruning and its evaluation."""

    def __init__(self, on_step: OnStep, n_windows: int, n_cells: int, *, has_dense: bool) -> None:
        self.on_step = on_step
        self.half = n_windows
        self.total = n_windows * (2 * n_cells + has_dense)
        self.n_cells = n_cells
        self.n_finished = 0
        self.done = 0

    def tell(self, done: int, note: str) -> None:
        note = f"{self.n_finished} of {self.n_cells} cells, {note}"
        self.on_step(Step("sweep", min(done, self.total), self.total, note))

    def within(self, label: str, stage: str, share: int) -> OnStep:
        """Return what to tell of the steps inside `share` of the bar; only those of `stage` move it."""

        def tell(step: Step) -> None:
            moved = share * step.done // step.total if step.stage == stage else 0
            self.tell(self.done + moved, f"{label}: {step.stage} {step.done}/{step.total} {step.note}")

        return tell

    def advance(self, share: int) -> None:
        self.done += share


def _measure_dense(job: _Job, meter: _Meter) -> None:
    started = time.perf_counter()
    measured = _evaluated(job, [job.recipe.model], None, meter, "dense", 1)[0]
    seconds = {"evaluate": round(time.perf_counter() - started, 3)}
    _record(job, None, {"status": "ok", "evaluations": measured, "seconds": seconds})


def _run_group(job: _Job, cells: Sequence[Cell], meter: _Meter) -> None:
    """Prune some cells one after the other, measure them side by side, and put each on record."""
    behind = meter.done + 2 * meter.half * len(cells)
    pruned: list[Cell] = []
    for cell in cells:
        try:
            _prune_cell(job, cell, meter.within(cell.name, "pruning blocks", meter.half))
        except Exception as error:  # noqa: BLE001  (hours of other cells are to come)
            _fail(job, cell, error, meter)
        else:
            pruned.append(cell)
        meter.advance(meter.half)
    if pruned:
        _measure_group(job, pruned, meter)
    meter.done = behind


def _measure_group(job: _Job, cells: Sequence[Cell], meter: _Meter) -> None:
    """Measure cells side by side; where that fails, each by itself, to learn which one it is."""
    try:
        _measure(job, cells, meter)
    except Exception as error:  # noqa: BLE001
        if len(cells) == 1:
            _fail(job, cells[0], error, meter)
            return
        for cell in cells:
            _measure_group(job, [cell], meter)


def _prune_cell(job: _Job, cell: Cell, on_step: OnStep) -> None:
    """Prune a cell, or go on where a sweep of the same settings was stopped."""
    folder = job.folder / cell.name
    threads = resolve_threads(job.recipe.threads).n
    # Sums round differently with other threads, so that prune would not go on.
    identity = {**job.identity(cell), "threads": threads}
    if _read_json(folder / "identity.json") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "identity.json", identity)
    if (folder / "checkpoint").exists():
        return
    prune(
        job.recipe.model,
        cell.prune,
        out=folder / "checkpoint",
        seed=job.recipe.seed,
        threads=threads,
        resume=True,
        offline=job.offline,
        on_step=on_step,
    )


def _measure(job: _Job, cells: Sequence[Cell], meter: _Meter) -> None:
    """Evaluate pruned cells side by side, put them on record, and delete their checkpoints."""
    folders = [job.folder / cell.name / "checkpoint" for cell in cells]
    known = [_facts(folder) for folder in folders]
    started = time.perf_counter()
    label = f"{cells[0].name} to {cells[-1].name}" if len(cells) > 1 else cells[0].name
    measured = _evaluated(job, [str(folder) for folder in folders], job.recipe.model, meter, label, len(cells))
    seconds = (time.perf_counter() - started) / len(cells)
    for cell, (facts, timing), evaluations in zip(cells, known, measured, strict=True):
        calibration = facts["calibration"]
        if calibration is not None:
            calibration = {**calibration, "source": _public_source(calibration["source"])}
        document = {
            "status": "ok",
            "sparsity": facts["sparsity"],
            "mask_sha256": facts["mask_sha256"],
            "calibration": calibration,
            "evaluations": evaluations,
            "seconds": {"prune": timing["seconds"], "evaluate": round(seconds, 3)},
            "peak_rss_bytes": timing["peak_rss_bytes"],
            "threads": resolve_threads(job.recipe.threads).n,
            "notes": _notes(facts["linears"], cell.prune),
        }
        _record(job, cell, document)
        meter.n_finished += 1
        meter.tell(meter.done, f"{cell.name}: perplexity {evaluations[0]['perplexity']:.2f}")
        job.clear_up(cell)


def _facts(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a checkpoint says of itself, and the time and memory that it took."""
    facts, timing = _read_json(checkpoint / "owl.json"), _read_json(checkpoint / "measured.json")
    if facts is None or timing is None:
        raise OwlDeployError(f"{checkpoint} is damaged: run again")
    return facts, timing


def _evaluated(
    job: _Job, models: list[str], reference: str | None, meter: _Meter, label: str, n_cells: int
) -> list[list[dict[str, Any]]]:
    """Evaluate models on every text; return one list of evaluations per model."""
    by_text = []
    for settings, text in zip(job.evals, job.texts, strict=True):
        share = text["n_windows"] * n_cells
        found = evaluate(
            models,
            settings,
            reference=reference,
            threads=job.recipe.threads,
            offline=job.offline,
            on_step=meter.within(label, "evaluating", share),
        )
        meter.advance(share)
        by_text.append([{**item.to_json(), "text": text["text"]} for item in found])
        gc.collect()  # what is left of the models, before the next text opens them again
        release_free_memory()
    rows = [list(row) for row in zip(*by_text, strict=True)]
    return [[{**item, **({"reference": job.model} if "reference" in item else {})} for item in row] for row in rows]


def _fail(job: _Job, cell: Cell, error: Exception, meter: _Meter) -> None:
    """Put on record why a cell failed."""
    meter.tell(meter.done, cell.name)  # raises where this is an interrupt that native code made an error of its own
    reason = " ".join(f"{'' if isinstance(error, OwlDeployError) else f'{type(error).__name__}: '}{error}".split())
    log.warning("%s failed: %s", cell.name, reason, exc_info=None if isinstance(error, OwlDeployError) else error)
    _record(job, cell, {"status": "failed", "reason": _without_folders(reason)})
    meter.n_finished += 1
    shutil.rmtree(job.folder / cell.name, ignore_errors=True)


def _record(job: _Job, cell: Cell | None, document: dict[str, Any]) -> None:
    name = cell.name if cell else "dense"
    head = {"kind": "sweep-cell", "format_version": 1, "name": name, "commit": commit()}
    write_json(job.file(cell), {**head, **document, "identity": job.identity(cell)})


def _notes(linears: list[dict[str, Any]], settings: PruneSettings) -> list[str]:
    """Return what a reader of the table must know: where something else was done than asked."""
    notes = []
    found = [linear.get("notes", {}) for linear in linears]
    raised = [note["dampening"] for note in found if "dampening" in note]
    if raised:
        notes.append(
            f"dampening raised from {settings.dampening:g} to {max(raised):g} at most, in {len(raised)} linears"
        )
    fallbacks = [note["fallback"] for note in found if "fallback" in note]
    for fallback in dict.fromkeys(fallbacks):
        notes.append(f"{fallbacks.count(fallback)} linears pruned by {fallback} for want of calibration tokens")
    return notes


def _group_size(source: Checkpoint) -> int:
    """Return how many cells are evaluated at once: as many models, beside the dense one, as half the memory holds."""
    model_bytes = 4 * sum(math.prod(entry.shape) for entry in source.tensors.values())
    return max(1, min(_GROUP, available_bytes() // (2 * model_bytes) - 1))


def _chosen(cells: list[Cell], only: str) -> list[Cell]:
    chosen = [cell for cell in cells if fnmatchcase(cell.name, only)]
    if not chosen:
        raise RecipeError(f"no cell of the sweep is named {only}; the first ones are {', '.join(_names(cells[:3]))}")
    return chosen


def _names(cells: Sequence[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def _sweep_settings(recipe: Recipe) -> SweepSettings:
    if recipe.sweep is None:
        raise RecipeError("the recipe has no key sweep: give it one, with a grid")
    return recipe.sweep


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where it is not there or damaged: it is then made anew."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# What may be published.


def _public(settings: PruneSettings) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return {**values, **{key: _public_source(values[key]) for key in ("calibration", "allocation")}}


def _files(settings: PruneSettings) -> dict[str, str]:
    """Return the hashes of the files that settings name, by key: their content counts, not where they lie."""
    found: dict[str, str] = {}
    for key in ("calibration", "allocation"):
        kind, _, rest = str(getattr(settings, key)).partition(":")
        paths = [Path(rest), Path(rest.rpartition(":")[0])] if kind in _KINDS_WITH_PATH and rest else []
        for path in filter(Path.is_file, paths):
            found[key] = _hash(path, path.stat().st_mtime_ns)
    return found


@functools.cache
def _hash(path: Path, _: int) -> str:
    """Return the hash of a file, read once per change: every cell asks, and a shard of C4 has 300 MB."""
    return file_sha256(path)


def _public_source(source: str) -> str:
    """Return a text source or an allocation without the folder that its file lies in."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{Path(rest).name}" if rest and kind in _KINDS_WITH_PATH else source


def _without_folders(sentence: str) -> str:
    """Return a sentence in which absolute paths are cut to their last part."""
    return re.sub(r"(?<![\w/.])/(?:[^\s/:'\"]+/)+", "", sentence)


# Results.


def _write_results(job: _Job, command: str) -> dict[str, Any]:
    document = _document(job, command)
    out = job.folder.parent
    write_json(out / "results.json", document)
    write_bytes(out / "results.md", as_markdown(document).encode())
    write_bytes(out / "results.csv", as_csv(document).encode())
    return document


def _document(job: _Job, command: str) -> dict[str, Any]:
    """Return the content of results.json: what is on record of every cell now."""
    dense = job.finished(None)
    assert dense is not None
    rows = [_row(cell, job.load(cell)) for cell in job.cells]
    # Every cell that needs data sees the same, unless the grid varies it: said once, and by its hash in the rows.
    calibrations = []
    for row in rows:
        facts = row.pop("calibration", None)
        if row["status"] == "ok":
            row["tokens_sha256"] = facts["tokens_sha256"] if facts else None
        if facts and facts not in calibrations:
            calibrations.append(facts)
    return {
        "kind": "sweep",
        "format_version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _without_folders(command),
        "model": job.model,
        "model_sha256": job.source.fingerprint,
        "seed": job.recipe.seed,
        "prune": _public(job.recipe.prune),
        "texts": job.texts,
        "calibration": calibrations,
        "versions": job.versions,
        "commit": commit(),
        "dense": {"evaluations": dense["evaluations"], "seconds": dense["seconds"]},
        "rows": rows,
    }


def _row(cell: Cell, found: dict[str, Any] | None) -> dict[str, Any]:
    settings = _public(cell.prune)
    head = {"name": cell.name, **{key: settings[key] for key in ("method", "allocation", "sparsity")}}
    head |= {"settings": cell.varied} if cell.varied else {}
    if found is None:
        return {**head, "status": "pending"}
    if found["status"] == "failed":
        return {**head, "status": "failed", "reason": found["reason"]}
    return {
        **head,
        "status": "ok",
        "realised": found["sparsity"],
        "evaluations": [{key: item[key] for key in FIGURES} for item in found["evaluations"]],
        **{key: found[key] for key in ("mask_sha256", "seconds", "peak_rss_bytes", "threads", "notes")},
        "calibration": found["calibration"],
    }
