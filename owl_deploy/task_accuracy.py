"""What artifacts answer to the tasks of a recipe: one accuracy beside perplexity, asked once per artifact.

In: artifacts and `TaskSettings`. Out: one `TaskAccuracy` each, kept in the artifact's folder (`task_answers.json`) so
that a later bench with the same tasks, data and harness does not ask again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.errors import OwlDeployError
from owl_deploy.files import file_sha256, write_json
from owl_deploy.progress import OnStep, silent
from owl_deploy.recipe import TaskSettings
from owl_deploy.versions import versions

__all__ = ["TaskAccuracy", "mean_accuracy", "task_accuracies"]

log = logging.getLogger(__name__)

_FILE = "task_answers.json"
_METRICS = ("acc_norm", "acc", "exact_match")
"""What counts as accuracy, the first that a task has: normalised by length, as the field's leaderboards do."""


@dataclass(frozen=True)
class TaskAccuracy:
    """The answers of one artifact."""

    accuracy: float | None
    """Mean over the tasks, 0 to 1; None where none of them has an accuracy."""
    tasks: dict[str, dict[str, Any]]
    """As in `TaskEvaluation`."""


def task_accuracies(
    artifacts: Sequence[OnnxArtifact],
    settings: TaskSettings,
    *,
    threads: int,
    on_step: OnStep = silent,
) -> dict[str, TaskAccuracy]:
    """Return what each artifact answers, by name; asks those that have not answered yet.

    Args:
        artifacts: all see the same context, the shortest of theirs.
        settings: names of tasks, where their files are, how many samples.
        threads: of the engines.
        on_step: told of every request.

    Raises:
        RecipeError: a task is unknown, or its file asks for code.
        OwlDeployError: the harness is not installed, or a task cannot be loaded or answered.
    """
    from owl_deploy.tasks import evaluate_tasks  # an extra

    context_length = min(artifact.facts.max_positions for artifact in artifacts)
    folder = None if settings.path is None else Path(settings.path)
    shared = {
        "settings": settings.model_dump(mode="json", exclude={"path"}),
        "files": {} if folder is None else _hashes(folder),
        "context_length": context_length,
        "versions": versions("lm_eval", "onnxruntime"),
    }
    keys = {item.name: _key({**shared, "artifact": file_sha256(item.path / "owl.json")}) for item in artifacts}
    known = {item.name: _read(item.path / _FILE, keys[item.name]) for item in artifacts}
    asked = [item for item in artifacts if known[item.name] is None]
    answers = (
        evaluate_tasks(
            [str(item.path) for item in asked],
            settings.names,
            folder=folder,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            window=context_length,
            threads=threads,
            on_step=on_step,
        )
        if asked
        else []
    )
    for item, answer in zip(asked, answers, strict=True):
        found = TaskAccuracy(mean_accuracy(answer.tasks, settings.names), answer.tasks)
        known[item.name] = found
        try:
            write_json(item.path / _FILE, {"key": keys[item.name], **asdict(found)})
        except OwlDeployError as error:  # a read-only volume, say
            log.warning("the answers are not kept for next time: %s", error)
    return {name: found for name, found in known.items() if found is not None}


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """Return the mean accuracy of the named tasks and groups; of all, where the names are tags, which are no tasks."""
    asked = [name for name in names if name in tasks] or list(tasks)
    found = [value for name in asked if (value := _accuracy(tasks[name])) is not None]
    return fmean(found) if found else None


def _accuracy(figures: Mapping[str, Any]) -> float | None:
    """Return a task's accuracy; metrics may carry the name of a filter behind a comma."""
    for metric in _METRICS:
        for key, value in figures.items():
            if key.partition(",")[0] == metric and isinstance(value, float):
                return value
    return None


def _hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, key: str) -> TaskAccuracy | None:
    """Return what was answered before, or None where it is not there, of something else, or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        accuracy = found["accuracy"]
        return TaskAccuracy(None if accuracy is None else float(accuracy), dict(found["tasks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
