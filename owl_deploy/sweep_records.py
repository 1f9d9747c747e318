"""What a sweep keeps on disk: one JSON file per cell, and the results made of them.

In: a recipe with a `sweep` key, a folder. Out: which cells are finished, with the same settings, model, texts and
versions; results.json, and the same as a table (results.md), a spreadsheet (results.csv) and a picture (results.svg).
Records hold no path of this machine, so that they can be published. Nothing is pruned or measured here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.evaluation import evaluation_windows
from owl_deploy.files import write_bytes, write_json
from owl_deploy.pruning import prune_versions
from owl_deploy.published import file_hashes, public_settings, public_source, without_folders
from owl_deploy.recipe import EvalSettings, PruneSettings, Recipe
from owl_deploy.sweep_grid import Cell, sweep_cells, sweep_settings
from owl_deploy.sweep_line import has_line, line_identity, write_line_report
from owl_deploy.sweep_plot import sweep_svg
from owl_deploy.sweep_tables import FIGURES, as_csv, as_markdown
from owl_deploy.text import Encoder
from owl_deploy.versions import commit

__all__ = ["SweepRecords", "read_json", "write_results"]

# It comes with Python, whose builds differ in it: a long sweep that goes on elsewhere keeps its cells, and says so.
_TEXT_WITH_EDITIONS = "python-docs"


@dataclass(frozen=True)
class SweepRecords:
    """What all cells have in common, and what is on record of each."""

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
    def open(cls, recipe: Recipe, out: Path, *, offline: bool) -> SweepRecords:
        """Open the model and read the texts of a recipe; write nothing.

        Raises:
            OwlDeployError: the model or a text cannot be read, or the recipe has no sweep.
        """
        cells = sweep_cells(recipe)
        evals = sweep_settings(recipe).evals or (recipe.eval,)
        source = open_checkpoint(recipe.model, offline=offline)
        encoder = Encoder.open(source.path)
        texts = []
        for settings in evals:
            windows = evaluation_windows(encoder, settings)
            n_windows, window = windows.tokens.shape
            text = {"text": public_source(windows.text), "window": window, "n_windows": n_windows}
            texts.append({**text, "tokens_sha256": windows.sha256, "starts_with_bos": windows.starts_with_bos})
        return cls(recipe, out / "cells", source, cells, evals, texts, prune_versions(), offline)

    @property
    def n_windows(self) -> int:
        """Windows of all texts."""
        return sum(text["n_windows"] for text in self.texts)

    @property
    def model(self) -> str:
        """The model's name without the folder it lies in."""
        return Path(self.recipe.model).name if Path(self.recipe.model).exists() else self.recipe.model

    def identity(self, cell: Cell | None) -> dict[str, Any]:
        """Return what a finished cell, or the dense model (None), must agree in to be kept."""
        texts = [{key: text[key] for key in ("window", "n_windows", "tokens_sha256")} for text in self.texts]
        shared = {"model_sha256": self.source.fingerprint, "texts": texts, "versions": self.versions}
        if cell is None:
            return shared
        prune_settings, files = public_settings(cell.prune), file_hashes(cell.prune)
        line = {"line": line_identity(self.recipe)} if has_line(self.recipe) else {}
        return {**shared, "seed": self.recipe.seed, "prune": prune_settings, "files": files, **line}

    def _file(self, cell: Cell | None) -> Path:
        return self.folder / f"{cell.name if cell else 'dense'}.json"

    def load(self, cell: Cell | None) -> dict[str, Any] | None:
        """Return what is on record of this very cell, finished or failed."""
        found = read_json(self._file(cell))
        before = found.get("identity") if found else None
        if not isinstance(before, dict):
            return None
        if cell is not None:
            # A setting that came after the record was written had its default then.
            before = {**before, "prune": {**PruneSettings().model_dump(mode="json"), **before.get("prune", {})}}
            if not has_line(self.recipe):
                before["texts"] = self._in_this_edition(before.get("texts"))
        return found if before == self.identity(cell) else None

    def _in_this_edition(self, texts: Any) -> Any:
        """Return the texts of a record with the tokens of today's edition, where a text has editions."""
        if not isinstance(texts, list) or len(texts) != len(self.texts):
            return texts
        return [
            {**text, "tokens_sha256": now["tokens_sha256"]} if now["text"] == _TEXT_WITH_EDITIONS else text
            for text, now in zip(texts, self.texts, strict=True)
        ]

    def finished(self, cell: Cell | None) -> dict[str, Any] | None:
        """Return what is on record of this very cell, where it was measured."""
        found = self.load(cell)
        return found if found is not None and found["status"] == "ok" else None

    def clear_up(self, cell: Cell) -> None:
        """Delete the checkpoint of a finished cell, unless it is to stay."""
        if not sweep_settings(self.recipe).keep_checkpoints:
            shutil.rmtree(self.folder / cell.name, ignore_errors=True)

    def record(self, cell: Cell | None, document: dict[str, Any]) -> None:
        """Put on record what became of a cell, or of the dense model (None)."""
        name = cell.name if cell else "dense"
        head = {"kind": "sweep-cell", "format_version": 1, "name": name, "commit": commit()}
        write_json(self._file(cell), {**head, **document, "identity": self.identity(cell)})


def read_json(file: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where it is not there or damaged: it is then made anew."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_results(records: SweepRecords, command: str) -> dict[str, Any]:
    """Write the results in all their forms, and return the content of results.json."""
    out = records.folder.parent
    if has_line(records.recipe):
        found = [(cell, records.load(cell)) for cell in records.cells]
        report = write_line_report(records.recipe, found, out, without_folders(command))
        document = {**_head(records, command), **report, "rows": [_line_row(*item) for item in found]}
        write_json(out / "results.json", document)
        return document
    document = _document(records, command)
    write_json(out / "results.json", document)
    write_bytes(out / "results.md", as_markdown(document).encode())
    write_bytes(out / "results.csv", as_csv(document).encode())
    write_bytes(out / "results.svg", sweep_svg(document))
    return document


def _document(records: SweepRecords, command: str) -> dict[str, Any]:
    """Return the content of results.json: what is on record of every cell now."""
    dense = records.finished(None)
    assert dense is not None
    rows = [_row(cell, records.load(cell), records.texts) for cell in records.cells]
    # Every cell that needs data sees the same, unless the grid varies it: said once, and by its hash in the rows.
    calibrations = []
    for row in rows:
        facts = row.pop("calibration", None)
        if row["status"] == "ok":
            row["tokens_sha256"] = facts["tokens_sha256"] if facts else None
        if facts and facts not in calibrations:
            calibrations.append(facts)
    return {
        **_head(records, command),
        "calibration": calibrations,
        "dense": {"evaluations": dense["evaluations"], "seconds": dense["seconds"]},
        "rows": rows,
    }


def _head(records: SweepRecords, command: str) -> dict[str, Any]:
    return {
        "kind": "sweep",
        "format_version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_folders(command),
        "model": records.model,
        "model_sha256": records.source.fingerprint,
        "seed": records.recipe.seed,
        "prune": public_settings(records.recipe.prune),
        "texts": records.texts,
        "versions": records.versions,
        "commit": commit(),
    }


def _line_row(cell: Cell, found: dict[str, Any] | None) -> dict[str, Any]:
    """Return what became of a cell whose figures are in the report."""
    if found is None or found["status"] == "failed":
        return {
            **_cell_head(cell),
            "status": found["status"] if found else "pending",
            "reason": (found or {}).get("reason"),
        }
    failed = [*found["failed"].values(), *(row["reason"] for row in found["report"]["rows"] if row["status"] != "ok")]
    return {
        **_cell_head(cell),
        "status": "ok",
        "realised": found["sparsity"],
        "seconds": found["seconds"],
        "failed": failed,
    }


def _cell_head(cell: Cell) -> dict[str, Any]:
    settings = public_settings(cell.prune)
    head = {"name": cell.name, **{key: settings[key] for key in ("method", "allocation", "sparsity")}}
    return head | ({"settings": cell.varied} if cell.varied else {})


def _row(cell: Cell, found: dict[str, Any] | None, texts: list[dict[str, Any]]) -> dict[str, Any]:
    head = _cell_head(cell)
    if found is None:
        return {**head, "status": "pending"}
    if found["status"] == "failed":
        return {**head, "status": "failed", "reason": found["reason"]}
    return {
        **head,
        "status": "ok",
        "realised": found["sparsity"],
        "evaluations": [
            {key: item[key] for key in FIGURES} | _edition(item, text)
            for item, text in zip(found["evaluations"], texts, strict=True)
        ],
        **{key: found[key] for key in ("mask_sha256", "seconds", "peak_rss_bytes", "threads", "notes")},
        "calibration": found["calibration"],
    }


def _edition(evaluation: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of an evaluation if they are not those that the others of its text have."""
    tokens = evaluation["tokens_sha256"]
    return {} if tokens == text["tokens_sha256"] else {"tokens_sha256": tokens}
