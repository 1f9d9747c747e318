"""A cell of a sweep taken along the whole line: pruned, exported, and benched beside the dense artifacts.

In: a recipe with `sweep`, `export` and `bench`, and one of its cells. Out: the record of that cell, which holds its
bench result with all raw samples; and from the records of all cells the report of the frontier. Which cells there are,
and which of them are finished, is not known here.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl_deploy.artifact import open_artifact
from owl_deploy.bench.frontier import frontier, merged, points, row_of, sentences
from owl_deploy.bench.frontier_report import write_frontier_report
from owl_deploy.files import new_folder
from owl_deploy.pipeline import run
from owl_deploy.progress import OnStep, silent
from owl_deploy.published import without_folders
from owl_deploy.recipe import Recipe
from owl_deploy.sweep_grid import Cell
from owl_deploy.versions import versions

__all__ = ["has_line", "line_identity", "take_cell", "write_line_report"]


def has_line(recipe: Recipe) -> bool:
    """Return whether the cells of a sweep are exported and benched, and not only measured for quality."""
    return bool(recipe.export) and recipe.bench is not None


def line_identity(recipe: Recipe) -> dict[str, Any]:
    """Return what a finished cell must agree in, beside how it was pruned."""
    stages = recipe.model_dump(mode="json", include={"recover", "export", "eval", "tasks", "bench", "threads"})
    stages["bench"].pop("fail_if")
    return {**stages, "versions": versions("onnxruntime", "onnx")}


def take_cell(
    recipe: Recipe,
    cell: Cell,
    *,
    folder: Path,
    dense: Path,
    with_peers: bool,
    load_before: float | None = None,
    offline: bool = False,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Prune, export and bench a cell, or go on where that was stopped; return its record.

    Args:
        recipe: with a sweep, artifacts and a bench.
        cell: one of its cells.
        folder: of the cell's checkpoint, artifacts and report; what is there already is used.
        dense: folder of the dense artifacts that all cells share; those that are missing are put there.
        with_peers: whether other engines are measured beside this cell.
        load_before: load average of the machine before the sweep began.
        offline: never ask a hub.
        on_step: told of every step of every stage.

    Raises:
        OwlDeployError: as `pipeline.run`.
    """
    assert recipe.bench is not None
    started = time.perf_counter()
    shared = [settings.name for settings in recipe.export if settings.checkpoint == "dense"]
    artifacts = folder / "artifacts"
    for name in shared:
        if (dense / name).is_dir() and not (artifacts / name).exists():
            _link(dense / name, artifacts / name)
    bench = recipe.bench if with_peers else recipe.bench.model_copy(update={"peer": ()})
    own = recipe.model_copy(update={"prune": cell.prune, "bench": bench, "sweep": None})
    result = run(
        own, out=folder, resume=True, offline=offline, load_before=load_before, keep_going=True, on_step=on_step
    )
    for name in shared:
        if not (dense / name).is_dir() and name not in result.failed:
            _link(artifacts / name, dense / name)
    return {
        "status": "ok",
        "sparsity": json.loads((result.checkpoint / "owl.json").read_text(encoding="utf-8"))["sparsity"],
        "bytes_on_disk": {path.name: open_artifact(path).manifest["bytes_on_disk"] for path in result.artifacts},
        "report": result.measured,
        "failed": dict(result.failed),
        "seconds": {"all": round(time.perf_counter() - started, 3)},
    }


def _link(source: Path, target: Path) -> None:
    """Give a folder a second place without a second copy of its files."""
    with new_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=os.link, dirs_exist_ok=True)


def write_line_report(
    recipe: Recipe, records: Sequence[tuple[Cell, Mapping[str, Any] | None]], out: Path, command: str
) -> dict[str, Any]:
    """Write the report over all finished cells to `out`/report; return what results.json says of it.

    Args:
        recipe: with a sweep, artifacts and a bench.
        records: what is on record of every cell, None where nothing is.
        out: folder of the results.
        command: what was called.
    """
    finished = {cell.name: found for cell, found in records if found and found["status"] == "ok"}
    if not finished:
        return {"sentences": [], "frontier": []}
    failed = {cell: found["failed"] for cell, found in finished.items()}
    for cell, record in records:
        if record and record["status"] == "failed":
            of_cell = (item.name for item in recipe.export if item.checkpoint != "dense")
            failed[cell.name] = dict.fromkeys(of_cell, str(record["reason"]))
    result = merged(
        {name: found["report"] for name, found in finished.items()},
        failed,
        sizes={name: found["bytes_on_disk"] for name, found in finished.items()},
        series={cell.name: _series(cell) for cell, _ in records},
        exported={item.name: item for item in recipe.export},
        recipe=recipe.model_dump(mode="json"),
        command=command,
        seed=recipe.seed,
    )
    result = _published(result)
    write_frontier_report(result, out / "report")
    found = points(result)
    best = frontier(found)
    return {"sentences": sentences(found), "frontier": [row_of(point, point in best) for point in found]}


def _published(value: Any) -> Any:
    """Return JSON values whose texts name no folder of this machine."""
    if isinstance(value, dict):
        return {key: _published(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_published(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _series(cell: Cell) -> str:
    others = "".join(f", {name} {value}" for name, value in cell.varied.items())
    return f"{cell.prune.method} {cell.prune.allocation}{others}"
