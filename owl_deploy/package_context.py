"""A build context: a folder from which any OCI tool builds the image that serves one artifact.

In: an artifact. Out: a folder with a Dockerfile, a wheel of the running owl-deploy, the artifact, and what starts the
image in Compose, Kubernetes and KServe, all filled in with one name. It does not build: it knows no container tool, and
needs neither network nor compiler.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.errors import GateError, RecipeError, UnsupportedModelError
from owl_deploy.files import file_sha256, new_folder
from owl_deploy.package_wheel import library_glibc, write_wheel
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.serve.settings import ServeSettings
from owl_deploy.versions import versions

__all__ = ["PackagedContext", "write_context"]

_BASE_GLIBC = (2, 36)
"""C library of Debian 12, which the Dockerfile's BASE is made of."""
_MANIFESTS = ("docker-compose.yaml", "kubernetes.yaml", "prometheus-adapter.yaml", "kserve.yaml")
_EXAMPLE = "quickstart"
"""The name that the manifests in the source tree carry."""
_DOCKERIGNORE = "*\n!artifact\n!artifact/**\n!owl_deploy-*.whl\n"
_RUN_BYTES = 512 * 2**20

_README = """# owl-deploy-{name}

The image of one server: {weights} {precision} weights, {megabytes:.0f} MB. Made by owl-deploy {version}.

```
docker build -t {image} .
docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 {image}
```

Then `curl http://127.0.0.1:8000/v1/models`; a page to chat with is at `http://127.0.0.1:8000/`.

- `docker compose up --build --wait` does both, with the settings of `docker-compose.yaml`.
- `kubectl apply -f kubernetes.yaml` runs the image, pushed to where your cluster finds it, as many times as the load
  asks for; `prometheus-adapter.yaml` hands the load to the autoscaler. `kserve.yaml`: the same as an inference service.
- Every setting is an environment variable: `docker run --rm {image} serve --help`. The image listens on all addresses
  of its container; set `OWL_DEPLOY_API_KEY` before others can reach it.
- Where packages come from a private index: `docker build --secret id=pip_conf,src=pip.conf -t {image} .`
- `/usr/share/owl-deploy/sbom.cdx.json` in the image lists what is inside (CycloneDX).
{note}"""


@dataclass(frozen=True)
class PackagedContext:
    """What was written."""

    context: str
    """The folder."""
    name: str
    image: str
    """Name and tag that the manifests call the image by."""
    wheel: str
    artifact_bytes: int
    model_sha256: str
    is_checked: bool
    """Whether the artifact passed its parity gate."""
    files: tuple[str, ...]


def write_context(
    artifact: Path,
    *,
    out: Path,
    name: str | None = None,
    unchecked: bool = False,
    force: bool = False,
    on_step: OnStep = silent,
) -> PackagedContext:
    """Write the build context of an artifact's image.

    Args:
        artifact: the artifact's folder.
        out: folder to write; it appears whole or not at all.
        name: what the model, the image and the deployment are called; the artifact's folder when None.
        unchecked: whether an artifact is taken that has not passed a parity gate.
        force: whether a folder at `out` is replaced.
        on_step: told about each part.

    Raises:
        UnsupportedModelError: there is no artifact, or none that serve could run.
        GateError: it has not passed its parity gate.
        RecipeError: the name cannot be one in a cluster.
        OwlDeployError: `out` exists, the disk is full, or the installation gives no wheel.
    """
    opened = open_artifact(artifact)
    is_checked = _check(opened, unchecked)
    chosen = _checked_name(name, opened)
    version = versions()["owl-deploy"]
    image = f"owl-deploy-{chosen}:{version}"
    with new_folder(out, replace=force) as folder:
        on_step(Step("packaging", 0, 3, "wheel"))
        wheel = write_wheel(folder)
        on_step(Step("packaging", 1, 3, "artifact"))
        shutil.copytree(opened.path, folder / "artifact", copy_function=shutil.copyfile)
        on_step(Step("packaging", 2, 3, "manifests"))
        (folder / ".dockerignore").write_text(_DOCKERIGNORE)
        (folder / "Dockerfile").write_text(_dockerfile(version))
        for manifest in _MANIFESTS:
            (folder / manifest).write_text(_filled(_template(manifest), chosen, opened), encoding="utf-8")
        copied = sorted(path for path in (folder / "artifact").rglob("*") if path.is_file())
        n_bytes = sum(path.stat().st_size for path in copied)
        (folder / "README.md").write_text(
            _README.format(
                name=chosen,
                image=image,
                version=version,
                weights=opened.facts.weights,
                precision=opened.facts.precision,
                megabytes=n_bytes / 1e6,
                note=_note(is_checked),
            ),
            encoding="utf-8",
        )
        result = PackagedContext(
            context=str(out),
            name=chosen,
            image=image,
            wheel=wheel.name,
            artifact_bytes=n_bytes,
            model_sha256=file_sha256(folder / "artifact" / "model.onnx"),
            is_checked=is_checked,
            files=tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())),
        )
        on_step(Step("packaging", 3, 3, "done"))
    return result


def _check(artifact: OnnxArtifact, unchecked: bool) -> bool:
    """Refuse what serve cannot run or nobody has checked; returns whether it passed its parity gate."""
    if artifact.facts.target != "onnxruntime":
        raise UnsupportedModelError(
            f"{artifact.path} was exported for {artifact.facts.target}, whose licence allows evaluation only and which "
            "no image holds: export it with --target onnxruntime"
        )
    if artifact.manifest.get("graph") == "traced":
        raise UnsupportedModelError(
            f"{artifact.path} has a traced graph, which serve does not run: package takes the families that export "
            "writes a lean graph for"
        )
    parity = artifact.manifest.get("parity")
    is_checked = isinstance(parity, dict) and parity.get("passed") is True
    if not is_checked and not unchecked:
        raise GateError(
            f"{artifact.path} has not passed the parity gate of export: export it again without --no-parity, or give "
            "--unchecked to package it all the same"
        )
    return is_checked


def _checked_name(name: str | None, artifact: OnnxArtifact) -> str:
    """Return a name that clusters take: a label of DNS, and short enough for what is put before it."""
    chosen = re.sub(r"[^a-z0-9]+", "-", artifact.name.lower()).strip("-")[:40].strip("-") if name is None else name
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", chosen):
        raise RecipeError(
            f"name must be 1 to 40 small letters, digits and inner hyphens, got {chosen!r}: give another --name"
        )
    return chosen


def _template(file: str) -> str:
    return (importlib.resources.files("owl_deploy") / "image" / file).read_text(encoding="utf-8")


def _dockerfile(version: str) -> str:
    """Return the Dockerfile that takes the artifact beside it; the wheel there it takes as it is."""
    text = _template("Dockerfile")
    defaults = {'ARG ARTIFACT=""': "ARG ARTIFACT=artifact", "ARG VERSION=unknown": f"ARG VERSION={version}"}
    for line, replacement in defaults.items():
        assert text.count(f"{line}\n") == 1, line
        text = text.replace(f"{line}\n", f"{replacement}\n")
    return text


def _filled(text: str, name: str, artifact: OnnxArtifact) -> str:
    """Put a name, and the memory that an artifact takes, where the example's are."""
    settings = ServeSettings()
    context = min(settings.context_length, artifact.facts.max_positions)
    weights = sum(path.stat().st_size for path in artifact.path.iterdir() if path.is_file())
    needed = artifact.kv_bytes(settings.batch_size * context) + _RUN_BYTES + weights
    text = text.replace("memory: 2Gi", f"memory: {_mebibytes(needed)}Mi")
    text = text.replace("memory: 4Gi", f"memory: {_mebibytes(needed + weights)}Mi")
    # The image inside has the artifact as this Dockerfile's default.
    text = text.replace("docker build --build-arg ARTIFACT=artifact ", "docker build ")
    return text.replace(_EXAMPLE, name)


def _mebibytes(n_bytes: int) -> int:
    """Round up to 64 MiB."""
    return -(-n_bytes // 2**26) * 64


def _note(is_checked: bool) -> str:
    """Return what a user must know about this very context."""
    lines = []
    if not is_checked:
        lines.append("- **Unchecked**: this artifact has not passed a parity gate against its checkpoint.\n")
    needed = library_glibc()
    if needed > _BASE_GLIBC:
        shown = ".".join(map(str, needed))
        lines.append(
            f"- The operator library in the wheel was built here and needs glibc {shown}, which the default base image "
            "is too old for: build with `--build-arg BASE=` a newer one, Debian 13 for instance.\n"
        )
    return "".join(lines)
