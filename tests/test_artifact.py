from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from owl_deploy.artifact import ARTIFACT_FORMAT, OnnxArtifact, is_artifact, open_artifact
from owl_deploy.errors import UnsupportedModelError

MANIFEST: dict[str, Any] = {
    "kind": "artifact",
    "format_version": ARTIFACT_FORMAT,
    "target": "onnxruntime",
    "weights": "dense",
    "precision": "fp32",
    "n_blocks": 2,
    "n_kv_heads": 3,
    "head_dim": 16,
    "vocab_size": 260,
    "max_positions": 64,
    "bytes_dense": 1000,
    "bytes_per_decode_step": {"dense": 1000, "nonzero": 300},
    "sparsity": {"target": 0.7, "linears": 0.7, "model": 0.5},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    (folder / "owl.json").write_text(json.dumps(MANIFEST))
    return folder


def test_manifest_is_read_and_checked(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.name == "artifact"
    assert opened.manifest == MANIFEST
    assert (opened.facts.n_blocks, opened.facts.sparsity["linears"]) == (2, 0.7)


def test_key_value_bytes_follow_from_the_shape(artifact: Path) -> None:
    # keys and values, 2 blocks, 3 heads of 16, 5 positions, 4 bytes each
    assert open_artifact(artifact).kv_bytes(5) == 2 * 2 * 3 * 16 * 5 * 4


def test_manifest_may_hold_more(artifact: Path) -> None:
    (artifact / "owl.json").write_text(json.dumps({**MANIFEST, "later": [1]}))
    assert open_artifact(artifact).manifest["later"] == [1]


@pytest.mark.parametrize("version", [1, ARTIFACT_FORMAT + 1])
def test_manifest_of_another_format_is_refused(artifact: Path, version: int) -> None:
    (artifact / "owl.json").write_text(json.dumps({**MANIFEST, "format_version": version}))
    with pytest.raises(UnsupportedModelError, match=r"has format_version .*: export it again"):
        open_artifact(artifact)


def test_name_is_that_of_the_folder_itself(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact)
    assert open_artifact(Path()).name == "artifact"


def test_folder_with_a_model_is_an_artifact(artifact: Path, tmp_path: Path) -> None:
    assert is_artifact(artifact)
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "nosuch")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no artifact at .*nosuch: there is no such folder"):
        open_artifact(tmp_path / "nosuch")


def test_folder_without_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not an artifact: it has no model\.onnx"):
        open_artifact(tmp_path)


def test_missing_manifest_says_how_to_get_one(artifact: Path) -> None:
    (artifact / "owl.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"has no manifest \(owl\.json\): export it with owl-deploy export"):
        open_artifact(artifact)


def test_manifest_of_a_checkpoint_is_refused(artifact: Path) -> None:
    (artifact / "owl.json").write_text(json.dumps({**MANIFEST, "kind": "checkpoint"}))
    with pytest.raises(UnsupportedModelError, match="describes a checkpoint, not an artifact"):
        open_artifact(artifact)


@pytest.mark.parametrize("key", MANIFEST)
def test_every_missing_key_is_named(artifact: Path, key: str) -> None:
    (artifact / "owl.json").write_text(json.dumps({name: value for name, value in MANIFEST.items() if name != key}))
    with pytest.raises(UnsupportedModelError, match=rf"is not a manifest of an artifact: .*\b{key}\b") as caught:
        open_artifact(artifact)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_blocks", 0),
        ("n_blocks", 10**9),
        ("n_kv_heads", -1),
        ("head_dim", 1.5),
        ("vocab_size", "many"),
        ("max_positions", None),
        ("target", "../engine"),
        ("bytes_dense", -1),
        ("bytes_per_decode_step", {"dense": 1}),
        ("sparsity", {"target": 0.5}),
        ("sparsity", 0.5),
    ],
)
def test_impossible_value_is_refused(artifact: Path, key: str, value: Any) -> None:
    (artifact / "owl.json").write_text(json.dumps({**MANIFEST, key: value}))
    with pytest.raises(UnsupportedModelError, match=key):
        open_artifact(artifact)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '"x"', "[" * 100_000, "\ud800", "1" * 5000, '{"a": 1}{"b": 2}']
)
def test_file_that_is_no_manifest_is_refused(artifact: Path, text: str) -> None:
    (artifact / "owl.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UnsupportedModelError, match="is not a manifest of an artifact"):
        open_artifact(artifact)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def opened_or_refused(folder: Path) -> OnnxArtifact | None:
    try:
        return open_artifact(folder)
    except UnsupportedModelError:
        return None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(list(MANIFEST)), JSON, max_size=3))
def test_any_change_gives_an_artifact_that_bench_can_read_or_one_refusal(artifact: Path, changes: Any) -> None:
    (artifact / "owl.json").write_text(json.dumps({**MANIFEST, **changes}))
    opened = opened_or_refused(artifact)
    if opened is not None:
        assert opened.kv_bytes(1) > 0
        assert opened.facts.bytes_per_decode_step["nonzero"] + opened.facts.bytes_dense >= 0
        assert isinstance(opened.facts.sparsity["linears"], float)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40))
@example(data=b"\xff")
def test_any_bytes_are_refused(artifact: Path, data: bytes) -> None:
    (artifact / "owl.json").write_bytes(data)
    assert opened_or_refused(artifact) is None
