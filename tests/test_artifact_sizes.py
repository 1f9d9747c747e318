"""Sizes that a plan predicts, against what pruning and exporting then write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_model
from planning import settings
from random_models import random_model, save
from transformers import GPT2Config

from owl_deploy.export.writer import export_onnx
from owl_deploy.files import folder_bytes
from owl_deploy.kernels import library_path
from owl_deploy.plan import plan_pruning
from owl_deploy.pruning import prune
from owl_deploy.recipe import ArtifactSettings, ExportSettings, PruneSettings

pytestmark = pytest.mark.usefixtures("known_speed")


def of_artifacts(artifacts: Sequence[dict[str, Any]]) -> tuple[ArtifactSettings, ...]:
    return tuple(ArtifactSettings.model_validate({"name": f"a{i}", **one}) for i, one in enumerate(artifacts))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model large enough that its weights are most of what is on the disk, and what became of it."""
    folder = tmp_path_factory.mktemp("sizes")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "tie_word_embeddings": False}
    model = save_tiny_model(folder / "model", **sizes)
    prune(str(model), settings(sparsity=0.7), out=folder / "sparse", threads=1)
    return model, folder / "sparse"


def test_size_of_the_sparse_checkpoint_is_predicted_within_3_percent(pruned: tuple[Path, Path]) -> None:
    model, sparse = pruned
    sizes = plan_pruning(str(model), settings(sparsity=0.7), threads=1).facts["sizes"]
    assert sizes["checkpoint_bytes"] == pytest.approx(folder_bytes(sparse), rel=0.03)


@pytest.mark.parametrize(
    "artifact",
    [
        {"checkpoint": "dense"},
        {"checkpoint": "dense", "precision": "int8"},
        {"precision": "int4", "head_precision": "int4"},
        {"checkpoint": "dense", "precision": "fp16"},
        {"weights": "sparse-initializer"},
        {"weights": "sparse-initializer", "precision": "fp16"},
        {"weights": "sparse-initializer", "target": "deepsparse"},
        {"target": "deepsparse", "precision": "int8", "seq_len": 16},
        {"weights": "sparse-operator"},
        {"weights": "sparse-operator", "precision": "fp16"},
        {"weights": "sparse-operator", "precision": "int8"},
        {"weights": "sparse-operator", "precision": "int4"},
        {"weights": "sparse-operator", "precision": "int8", "encoding": "bitmask", "checkpoint": "dense"},
    ],
    ids=lambda artifact: "-".join(map(str, artifact.values())),
)
def test_size_of_an_artifact_is_predicted_within_3_percent(
    pruned: tuple[Path, Path], tmp_path: Path, artifact: dict[str, Any]
) -> None:
    model, sparse = pruned
    (planned,) = plan_pruning(str(model), settings(sparsity=0.7), artifacts=of_artifacts([artifact]), threads=1).facts[
        "sizes"
    ]["artifacts"]
    source = model if artifact.get("checkpoint") == "dense" else sparse
    chosen = ExportSettings.model_validate({key: value for key, value in artifact.items() if key != "checkpoint"})
    exported = export_onnx(str(source), chosen, out=tmp_path / "artifact", threads=1, parity=False)
    # The operator library is larger than this model, and would hide errors.
    library = library_path().stat().st_size if chosen.weights == "sparse-operator" else 0
    assert planned["bytes"] - library == pytest.approx(exported.manifest["bytes_on_disk"] - library, rel=0.03)
    counts: dict[str, int] = {}
    for matrix in exported.manifest["matrices"]:
        counts[matrix["encoding"]] = counts.get(matrix["encoding"], 0) + 1
    assert planned["encodings"] == counts
    assert planned["bytes_dense"] == pytest.approx(exported.manifest["bytes_dense"], rel=0.01)  # norms beside


@pytest.mark.parametrize("family", ["opt", "phi3"])
@pytest.mark.parametrize("weights", ["dense", "sparse-operator"])
def test_learned_positions_biases_and_stacked_linears_count(family: str, weights: str, tmp_path: Path) -> None:
    changes = {"ffn_dim": 512, "word_embed_proj_dim": 256} if family == "opt" else {}
    model = save(random_model(family, hidden_size=256, intermediate_size=512, **changes), tmp_path / "model")
    artifacts = of_artifacts([{"checkpoint": "dense", "weights": weights}])
    (planned,) = plan_pruning(str(model), settings(), artifacts=artifacts, threads=1).facts["sizes"]["artifacts"]
    chosen = ExportSettings.model_validate({"weights": weights})
    exported = export_onnx(str(model), chosen, out=tmp_path / "artifact", threads=1, parity=False)
    library = library_path().stat().st_size if weights == "sparse-operator" else 0
    assert planned["bytes"] - library == pytest.approx(exported.manifest["bytes_on_disk"] - library, rel=0.03)
    assert planned["encodings"] == Counter(matrix["encoding"] for matrix in exported.manifest["matrices"])


def test_artifact_that_does_not_shrink_is_noted(tiny_model: Path) -> None:
    artifacts = of_artifacts([{"checkpoint": "dense"}, {"weights": "sparse-initializer"}])
    low = plan_pruning(str(tiny_model), settings(sparsity=0.1), artifacts=artifacts, threads=1).facts
    high = plan_pruning(str(tiny_model), settings(sparsity=0.7), artifacts=artifacts, threads=1).facts
    sentence = "The artifact a1 is not predicted to shrink."
    assert sentence in low["notes"]
    assert sentence not in high["notes"]
    assert high["sizes"]["artifacts"][1]["bytes"] < low["sizes"]["artifacts"][1]["bytes"]


def test_artifact_is_compared_with_the_dense_one_of_its_precision(tiny_model: Path) -> None:
    """Dense int4 is smaller than sparse float32, and says nothing about it."""
    artifacts = of_artifacts(
        [{"checkpoint": "dense"}, {"checkpoint": "dense", "precision": "int4"}, {"weights": "sparse-initializer"}]
    )
    facts = plan_pruning(str(tiny_model), settings(sparsity=0.7), artifacts=artifacts, threads=1).facts
    assert facts["sizes"]["artifacts"][1]["bytes"] < facts["sizes"]["artifacts"][2]["bytes"]
    assert not [note for note in facts["notes"] if "shrink" in note]


def test_family_without_a_graph_has_no_artifacts_and_says_why(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "model")
    facts = plan_pruning(str(tmp_path / "model"), PruneSettings(allocation="uniform"), threads=1).facts
    assert facts["sizes"]["artifacts"] == []
    assert "no graph for model type 'gpt2'" in facts["sizes"]["reason"]
    assert facts["sizes"]["checkpoint_bytes"] > 4 * 12 * 12 * 768**2
    assert any("no graph for model type" in note for note in facts["notes"])
