"""`owl-deploy package`: a folder with everything that an image is built from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call, tree
from conftest import save_tiny_model

from owl_deploy import package_wheel
from owl_deploy.errors import GateError, OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.export.writer import export_onnx
from owl_deploy.package_context import PackagedContext, write_context
from owl_deploy.package_wheel import write_wheel
from owl_deploy.recipe import ExportSettings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    model = save_tiny_model(folder / "model")
    settings = ExportSettings(target="onnxruntime", weights="dense")
    return export_onnx(str(model), settings, out=folder / "Tiny_Owl", threads=1).path


@pytest.fixture(scope="module")
def context(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackagedContext]:
    out = tmp_path_factory.mktemp("context") / "image"
    return out, write_context(artifact, out=out)


def changed(artifact: Path, folder: Path, **changes: Any) -> Path:
    """Copy an artifact with other entries in its manifest."""
    copy = folder / "changed"
    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "owl.json").read_text())
    (copy / "owl.json").write_text(json.dumps({**manifest, **changes}))
    return copy


# What is written.


def test_context_holds_the_artifact_to_the_byte(artifact: Path, context: tuple[Path, PackagedContext]) -> None:
    out, _ = context
    assert tree(out / "artifact") == tree(artifact)
    for path in artifact.iterdir():
        assert (out / "artifact" / path.name).read_bytes() == path.read_bytes()


def test_context_has_every_file_that_it_lists_and_no_other(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    assert set(facts.files) == {name for name in tree(out) if (out / name).is_file()}
    needed = {"Dockerfile", ".dockerignore", "README.md", "docker-compose.yaml", "kubernetes.yaml", "kserve.yaml"}
    assert needed | {facts.wheel, "prometheus-adapter.yaml"} <= set(facts.files)


def test_dockerfile_differs_from_the_projects_in_two_defaults_alone(context: tuple[Path, PackagedContext]) -> None:
    out, _ = context
    ours = (ROOT / "Dockerfile").read_text().splitlines()
    theirs = (out / "Dockerfile").read_text().splitlines()
    assert len(ours) == len(theirs)
    version = context[1].image.partition(":")[2]
    assert [new for old, new in zip(ours, theirs, strict=True) if old != new] == [
        "ARG ARTIFACT=artifact",
        f"ARG VERSION={version}",
    ]


def test_everything_that_the_dockerfile_copies_is_let_into_the_build(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    allowed = [line.removeprefix("!") for line in (out / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    assert any(Path(facts.wheel).match(pattern) for pattern in allowed)
    assert {"artifact", "artifact/**"} <= set(allowed)


def test_name_is_in_every_manifest_and_the_examples_in_none(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    assert facts.name == "tiny-owl"
    for name in ("docker-compose.yaml", "kubernetes.yaml", "kserve.yaml", "README.md"):
        text = (out / name).read_text()
        assert facts.image in text
        assert "quickstart" not in text
        assert "--build-arg ARTIFACT" not in text


def test_memory_that_is_asked_for_holds_the_artifact_and_its_cache(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    documents = list(yaml.safe_load_all((out / "kubernetes.yaml").read_text()))
    resources = documents[0]["spec"]["template"]["spec"]["containers"][0]["resources"]
    # 2 blocks, 2 heads of 16 for keys and for values, float32, 8 sequences of 512 tokens.
    cache = 2 * 2 * 2 * 16 * 4 * 8 * 512
    needed = facts.artifact_bytes + cache + 512 * 2**20
    asked = int(resources["requests"]["memory"].removesuffix("Mi")) * 2**20
    assert needed <= asked < needed + 2**26
    assert int(resources["limits"]["memory"].removesuffix("Mi")) * 2**20 >= asked


def test_readme_names_the_two_commands(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    lines = (out / "README.md").read_text().splitlines()
    assert f"docker build -t {facts.image} ." in lines
    assert any(line.startswith("docker run ") and line.endswith(f" {facts.image}") for line in lines)


# The wheel.


def test_wheel_installs_and_runs_from_another_folder(context: tuple[Path, PackagedContext], tmp_path: Path) -> None:
    out, facts = context
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(out / facts.wheel)], check=True, capture_output=True)
    # An editable installation finds its own files before any path.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; "
        "import owl_deploy, owl_deploy.bench, owl_deploy.export; from owl_deploy.kernels import library_path; "
        "print(owl_deploy.__file__, library_path()); from owl_deploy.package_context import write_context"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(site / "owl_deploy" / "__init__.py"),
        str(site / "owl_deploy" / "kernels" / "libowl_deploy_kernels.so"),
    ]


def test_wheel_holds_every_module_and_no_source_of_the_kernels(context: tuple[Path, PackagedContext]) -> None:
    out, facts = context
    with zipfile.ZipFile(out / facts.wheel) as wheel:
        names = set(wheel.namelist())
        assert wheel.testzip() is None
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {"bench": "owl_deploy/bench", "export": "owl_deploy/export", "owl_deploy": "owl_deploy"}
    for name in listed.splitlines():
        folder, _, rest = name.partition("/")
        if folder in top and (ROOT / name).exists():
            assert f"{top[folder]}/{rest}" in names
    assert {"owl_deploy/recipes/quickstart.yaml", "owl_deploy/image/Dockerfile"} <= names
    assert not [name for name in names if name.endswith((".cc", ".pyc")) or "__pycache__" in name]
    assert [name for name in names if name.endswith(".so")] == ["owl_deploy/kernels/libowl_deploy_kernels.so"]


def test_same_files_give_the_same_wheel(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert write_wheel(tmp_path / "a").read_bytes() == write_wheel(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("line", ['dependencies = ["new==1"]', 'serve = [\n  "new[extra]==1",\n]'])
def test_installation_that_does_not_know_a_dependency_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an image would get the dependencies of some time ago."""
    metadata = tmp_path / "site" / "owl_deploy-1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.4\nName: owl-deploy\nVersion: 1\nRequires-Dist: old==1\n")
    (tmp_path / "pyproject.toml").write_text(f"{line}\n")
    origin = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    (metadata.parent / "direct_url.json").write_text(json.dumps(origin))
    installed = Distribution.at(metadata.parent)
    monkeypatch.setattr(package_wheel, "distribution", lambda name: installed)
    with pytest.raises(OwlDeployError, match=r"asked for new(\[extra\])?==1: run pip install"):
        write_wheel(tmp_path)
    assert not list(tmp_path.glob("*.whl"))


# What is refused.


def test_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no model\.onnx"):
        write_context(tmp_path, out=tmp_path / "out")
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    ("changes", "words"), [({"target": "deepsparse"}, "licence"), ({"graph": "traced"}, "traced graph")]
)
def test_artifact_that_serve_cannot_run_is_refused(
    artifact: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        write_context(changed(artifact, tmp_path, **changes), out=tmp_path / "out", unchecked=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parity", [None, {"passed": False}])
def test_unchecked_artifact_is_refused_unless_told(artifact: Path, tmp_path: Path, parity: Any) -> None:
    unchecked = changed(artifact, tmp_path, parity=parity)
    with pytest.raises(GateError, match="--unchecked"):
        write_context(unchecked, out=tmp_path / "out")
    assert not write_context(unchecked, out=tmp_path / "out", unchecked=True).is_checked
    assert "**Unchecked**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["", "Upper", "a b", "-a", "a-", "a" * 41, "a\nimage: evil", "../a"])
def test_name_that_no_cluster_takes_is_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="--name"):
        write_context(artifact, out=tmp_path / "out", name=name)


def test_folder_that_exists_is_replaced_only_when_told(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    done = call("package", artifact, "--out", out, "--quiet")
    assert (done.code, "--force" in done.sentence) == (1, True)
    assert tree(out) == {"old"}
    done = call("package", artifact, "--out", out, "--quiet", "--force", "--name", "owl", "--json")
    assert done.document["image"].startswith("owl-deploy-owl:")
    assert "old" not in tree(out)
    assert tree(tmp_path) == {"out", *(f"out/{name}" for name in tree(out))}


def test_failure_in_the_middle_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("owl_deploy.package_context.shutil.copytree", fail)
    with pytest.raises(KeyboardInterrupt):
        write_context(artifact, out=tmp_path / "out")
    assert tree(tmp_path) == set()
