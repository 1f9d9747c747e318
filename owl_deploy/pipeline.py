"""The straight line: a recipe goes in, a sparse checkpoint, its artifacts and a latency report come out.

Each stage is skipped where its result lies in the output folder already, made from the same recipe,
model and versions; the log says so.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl_deploy.artifact import OnnxArtifact, is_artifact, open_artifact
from owl_deploy.bench.run import run_bench
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.devices import resolve_devices
from owl_deploy.errors import OwlDeployError
from owl_deploy.evaluation import Evaluation, evaluate
from owl_deploy.export.writer import artifact_identity, export_onnx
from owl_deploy.files import file_sha256
from owl_deploy.machine_lock import busy_machine, quiet_machine
from owl_deploy.progress import OnStep, silent
from owl_deploy.pruning import prune, prune_versions
from owl_deploy.recipe import ArtifactSettings, ExportSettings, Recipe
from owl_deploy.recovery import recover, recovery_identity

__all__ = ["RunResult", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Where the results of a run are."""

    checkpoint: Path
    artifacts: list[Path]
    report: Path | None
    """Folder of the report; None for a recipe without a bench stage."""
    measured: dict[str, Any] | None
    """Content of report.json."""
    evaluations: tuple[tuple[str, Evaluation], ...] = ()
    """Quality of the checkpoint and the artifacts, by path, of a recipe that has `eval` but no bench stage."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why artifacts could not be exported, by name, where the others were to go on."""

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy run --json` prints."""
        return {
            "checkpoint": str(self.checkpoint),
            "artifacts": [str(path) for path in self.artifacts],
            "report": str(self.report) if self.report else None,
            "rows": self.measured["rows"] if self.measured else [],
            "evaluations": [{"model": model, **found.to_json()} for model, found in self.evaluations],
        }


def run(
    recipe: Recipe,
    *,
    out: Path,
    force: bool = False,
    resume: bool = False,
    offline: bool = False,
    load_before: float | None = None,
    keep_going: bool = False,
    on_step: OnStep = silent,
) -> RunResult:
    """Run all stages of a recipe.

    Times are taken while no other job of owl-deploy that asks for the machine has it.

    Args:
        recipe: what to do.
        out: folder of the results: `checkpoint/`, `recovered/`, `artifacts/NAME/`, `report/`.
        force: make everything anew, also what could be reused.
        resume: continue a pruning or a recovery that was stopped.
        offline: never ask a hub.
        load_before: load average of the machine before its user's work began; read now when None.
        keep_going: leave out an artifact that fails, such as in its parity gate, unless it is the baseline.
        on_step: told of every step of every stage.

    Raises:
        OwlDeployError: and its subclasses; stages that had finished keep their results.
    """
    load_before = os.getloadavg()[0] if load_before is None else load_before
    source = open_checkpoint(recipe.model, offline=offline)
    out.mkdir(parents=True, exist_ok=True)
    with busy_machine():
        checkpoint = _pruned(
            recipe, source, out / "checkpoint", force=force, resume=resume, offline=offline, on_step=on_step
        )
        models = {"dense": recipe.model, "pruned": str(checkpoint)}
        if recipe.recover is not None:
            checkpoint = _recovered(
                recipe,
                source,
                checkpoint,
                out / "recovered",
                force=force,
                resume=resume,
                offline=offline,
                on_step=on_step,
            )
            models["recovered"] = str(checkpoint)
        artifacts, failed = [], {}
        for settings in recipe.export:
            try:
                path = _artifact(
                    recipe,
                    settings,
                    models[settings.checkpoint],
                    out / "artifacts",
                    force=force,
                    offline=offline,
                    on_step=on_step,
                )
            except OwlDeployError as error:
                if not keep_going or (recipe.bench is not None and settings.name == recipe.bench.baseline):
                    raise
                log.warning("%s is left out: %s", settings.name, error)
                failed[settings.name] = str(error)
            else:
                artifacts.append(path)
    if recipe.bench is None:
        judged = []
        if "eval" in recipe.model_fields_set:
            judged = [*(path for kind, path in models.items() if kind != "dense"), *map(str, artifacts)]
        found = []
        if judged:
            found = evaluate(
                judged,
                recipe.eval,
                reference=recipe.model,
                threads=recipe.threads,
                offline=offline,
                on_step=on_step,
            )
        return RunResult(checkpoint, artifacts, None, None, tuple(zip(judged, found, strict=True)), failed)
    with quiet_machine():
        measured = _report(recipe, artifacts, out / "report", load_before=load_before, force=force, on_step=on_step)
    return RunResult(checkpoint, artifacts, out / "report", measured, failed=failed)


def _pruned(
    recipe: Recipe, source: Checkpoint, path: Path, *, force: bool, resume: bool, offline: bool, on_step: OnStep
) -> Path:
    """Return the sparse checkpoint, pruning first where it is not there."""
    wanted = {
        "recipe": {"model": recipe.model, "seed": recipe.seed, "prune": recipe.prune.model_dump(mode="json")},
        "source": {"model": recipe.model, "sha256": source.fingerprint},
        "versions": prune_versions(),
    }
    if not force and _agrees(path / "owl.json", wanted):
        log.info("reusing the sparse checkpoint %s", path)
        return path
    report = prune(
        recipe.model,
        recipe.prune,
        out=path,
        seed=recipe.seed,
        threads=recipe.threads,
        device=recipe.device,
        max_memory=recipe.max_memory,
        resume=resume,
        force=True,
        offline=offline,
        on_step=on_step,
    )
    sparsity = report.facts["sparsity"]
    log.info(
        "pruned to %.4f of the linears (%.4f of the model) in %.0f s, peak memory %.2f GiB: %s",
        sparsity["linears"],
        sparsity["model"],
        report.seconds,
        report.peak_rss_bytes / 2**30,
        path,
    )
    return path


def _recovered(
    recipe: Recipe,
    source: Checkpoint,
    pruned: Path,
    path: Path,
    *,
    force: bool,
    resume: bool,
    offline: bool,
    on_step: OnStep,
) -> Path:
    """Return the recovered checkpoint, training first where it is not there."""
    assert recipe.recover is not None
    devices = resolve_devices(recipe.device)
    wanted = recovery_identity(open_checkpoint(str(pruned)), source, recipe.recover, devices, seed=recipe.seed)
    try:
        found = json.loads((path / "owl.json").read_text(encoding="utf-8"))["recovery"]
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    if not force and all(found.get(key) == value for key, value in wanted.items()):
        log.info("reusing the recovered checkpoint %s", path)
        return path
    report = recover(
        str(pruned),
        recipe.model,
        recipe.recover,
        out=path,
        seed=recipe.seed,
        threads=recipe.threads,
        device=recipe.device,
        resume=resume,
        force=True,
        offline=offline,
        on_step=on_step,
    )
    log.info("recovered by %s in %.0f s: %s", recipe.recover.method, report.seconds, path)
    return path


def _artifact(
    recipe: Recipe, settings: ArtifactSettings, model: str, folder: Path, *, force: bool, offline: bool, on_step: OnStep
) -> Path:
    """Return an artifact, exporting first where it is not there."""
    path = folder / settings.name
    checkpoint = open_checkpoint(model, offline=offline)
    export_settings = ExportSettings(**settings.model_dump(exclude={"name", "checkpoint"}))
    wanted = artifact_identity(checkpoint, export_settings)
    if (
        not force
        and is_artifact(path)
        and _agrees(path / "owl.json", wanted)
        and open_artifact(path).manifest["parity"]
    ):
        log.info("reusing the artifact %s", path)
        return path
    artifact = export_onnx(
        model, export_settings, out=path, threads=recipe.threads, force=True, offline=offline, on_step=on_step
    )
    _log_artifact(artifact)
    return path


def _log_artifact(artifact: OnnxArtifact) -> None:
    manifest = artifact.manifest
    log.info(
        "exported %s: %.0f MB on disk (%.0f MB dense), logits within %.1e of the checkpoint's",
        artifact.path,
        manifest["bytes_on_disk"] / 1e6,
        manifest["bytes_dense"] / 1e6,
        manifest["parity"]["relative_logit_difference"],
    )


def _report(
    recipe: Recipe, artifacts: list[Path], path: Path, *, load_before: float, force: bool, on_step: OnStep
) -> dict[str, Any]:
    """Return the measured result, measuring first where it is not there."""
    assert recipe.bench is not None
    # Conditions judge what was measured: other ones are no reason to measure again.
    described = recipe.model_dump(mode="json", exclude={"bench": {"fail_if"}})
    wanted = {"recipe": described, "artifacts": {item.name: file_sha256(item / "owl.json") for item in artifacts}}
    if not force and _agrees(path / "report.json", wanted):
        measured: dict[str, Any] = json.loads((path / "report.json").read_text(encoding="utf-8"))
        if not measured.get("stopped") and all(row["status"] == "ok" for row in measured["rows"]):
            log.info("reusing the report of %s: --force measures again", measured["created"])
            return measured
    return run_bench(
        artifacts,
        out=path,
        force=True,
        settings=recipe.bench,
        baseline=recipe.bench.baseline,
        evaluation=recipe.eval,
        tasks=recipe.tasks,
        reference=recipe.model,
        threads=recipe.threads,
        seed=recipe.seed,
        recipe=described,
        load_before=load_before,
        on_step=on_step,
    )


def _agrees(file: Path, wanted: dict[str, Any]) -> bool:
    """Return whether a JSON document is there and has all the wanted values."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == value for key, value in wanted.items())
