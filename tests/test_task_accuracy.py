"""One accuracy per artifact: which metrics it is of, and when an artifact is asked again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from owl_deploy import tasks
from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.errors import RecipeError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings, TaskSettings
from owl_deploy.task_accuracy import mean_accuracy, task_accuracies

FOLDER = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("accuracy") / "artifact"
    export_onnx(str(tiny_model), ExportSettings(), out=out, parity=False)
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> OnnxArtifact:
    return open_artifact(Path(shutil.copytree(exported, tmp_path / "artifact")))


@pytest.fixture
def settings(tmp_path: Path) -> TaskSettings:
    folder = shutil.copytree(FOLDER, tmp_path / "tasks")
    return TaskSettings(names=("colours", "last_word"), path=str(folder), limit=3)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return which models were asked, call by call."""
    found: list[list[str]] = []
    real = tasks.evaluate_tasks

    def counted(models: Any, *arguments: Any, **keywords: Any) -> Any:
        found.append([Path(model).name for model in models])
        return real(models, *arguments, **keywords)

    monkeypatch.setattr(tasks, "evaluate_tasks", counted)
    return found


def test_accuracy_is_the_mean_of_the_tasks_as_the_harness_has_them(
    artifact: OnnxArtifact, settings: TaskSettings, calls: list[list[str]]
) -> None:
    found = task_accuracies([artifact], settings, threads=1)["artifact"]
    assert settings.path is not None
    (expected,) = tasks.evaluate_tasks([str(artifact.path)], settings.names, folder=Path(settings.path), limit=3)
    assert found.tasks == expected.tasks
    figures = expected.tasks
    assert found.accuracy == (figures["colours"]["acc_norm"] + figures["last_word"]["acc"]) / 2


def test_an_artifact_is_asked_once(artifact: OnnxArtifact, settings: TaskSettings, calls: list[list[str]]) -> None:
    first = task_accuracies([artifact], settings, threads=1)
    assert task_accuracies([artifact], settings, threads=1) == first
    assert calls == [["artifact"]]


@pytest.mark.parametrize("change", ["data", "limit", "artifact", "damage"])
def test_what_changed_is_asked_again(
    artifact: OnnxArtifact, settings: TaskSettings, calls: list[list[str]], change: str
) -> None:
    task_accuracies([artifact], settings, threads=1)
    assert settings.path is not None
    data, manifest = Path(settings.path) / "colours.jsonl", artifact.path / "owl.json"
    if change == "data":
        data.write_text(data.read_text() + "\n")
    elif change == "limit":
        settings = settings.model_copy(update={"limit": 2})
    elif change == "artifact":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "created": "another day"}))
    else:
        (artifact.path / "task_answers.json").write_text('{"key": 1}')
    task_accuracies([artifact], settings, threads=1)
    assert calls == [["artifact"], ["artifact"]]


def test_unknown_task_names_the_nearest(artifact: OnnxArtifact, settings: TaskSettings) -> None:
    with pytest.raises(RecipeError, match="colours"):
        task_accuracies([artifact], settings.model_copy(update={"names": ("colour",)}), threads=1)


def test_metrics_that_are_no_accuracy_do_not_count() -> None:
    figures: dict[str, dict[str, Any]] = {
        "a": {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": 0.5, "n_samples": 8},
        "b": {"exact_match,strict-match": 0.3, "n_samples": 4},
        "c": {"word_perplexity": 12.0, "n_samples": 4},
        "d": {"acc": None, "n_samples": 4},
    }
    assert mean_accuracy(figures, ["a", "b", "c", "d"]) == pytest.approx(0.4)
    assert mean_accuracy(figures, ["b"]) == 0.3
    assert mean_accuracy(figures, ["c"]) is None
    assert mean_accuracy(figures, ["a_tag"]) == pytest.approx(0.4)
