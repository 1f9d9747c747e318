"""The container image, really built from the Dockerfile and really run.

Images cannot be pulled everywhere, so the base is made from Debian packages (mmdebstrap) and the Dockerfile gets it as
its build argument BASE, and the same with a compiler as BUILD_BASE; buildah builds and runs without a daemon.
Everything the build installs is downloaded first, on the host, with whatever pip settings hold there; the build itself
sees one folder of wheels and a pip.conf that names it, handed in as a secret. So no setting of the host enters the
build, and a mark in that secret shows whether anything of it stays in the image. Base and wheels are kept in the
user's cache: the first run downloads Debian's packages and 138 MB of wheels, later ones nothing.

The server runs as a container would have it, the first process of its own process space, on a root file system that is
read-only; chroot isolation alone has neither, so these come from `unshare` and `mount`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import save_tiny_model
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from serving import eventually

from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

tomllib: Any = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

pytestmark = [pytest.mark.packaging, pytest.mark.slow, pytest.mark.timeout(1800)]

REPO = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owl-deploy" / "ci"

# Debian 12 is what python:3.11-slim-bookworm is made of; its python3 is 3.11. usr-is-merged stands in for usrmerge,
# which would bring 47 MB of perl.
BASE_RELEASE = "bookworm"
BASE_PYTHON = "3.11"
BASE_PACKAGES = "python3,python3-venv,usr-is-merged"
BUILD_BASE_PACKAGES = f"{BASE_PACKAGES},g++"
BASE_OPTIONS = (
    "--variant=minbase",
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)

# Layers uncompressed, without a model. Measured 408 MB: base 128, installed packages 280.
MAX_IMAGE_BYTES = 450_000_000

# Mounts a root file system read-only, with what every container gets, and becomes the command behind it.
READ_ONLY = """
set -e
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
exec "$@"
"""

# What a report and an engine need beyond starting up: every base dependency imports and ONNX Runtime runs a graph.
ENGINE_PROBE = """
import click, jinja2, numpy, onnx, onnx.helper, onnxruntime, plotly.graph_objects, psutil, pydantic, rich
import numpy.testing, tokenizers, yaml
value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2])
graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "twice", [value("x")], [value("y")])
model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(session.run(None, {"x": numpy.array([1, 2], numpy.float32)})[0].tolist())
"""


def run_command(command: list[str], timeout_s: float, cwd: Path | None = None) -> str:
    """Run a command to its end and return its standard output; fail with what it printed if it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    if result.returncode != 0:
        output = (result.stdout + result.stderr)[-6000:]
        raise AssertionError(f"{' '.join(command)}\nexited with {result.returncode}:\n{output}")
    return result.stdout


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that a running one has started itself."""
    if process.poll() is not None:
        return []
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def cache_key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where buildah keeps images and containers: a folder of this test run, not the machine's own storage."""

    folder: Path

    def buildah(self, *arguments: str, timeout_s: float = 120, cwd: Path | None = None) -> str:
        places = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "runroot")]
        return run_command(["buildah", *places, "--storage-driver", "vfs", *arguments], timeout_s, cwd).strip()


@dataclasses.dataclass(frozen=True)
class Image:
    """The built image, with the tiny artifact in it, and one container of it to run commands in and to look into."""

    storage: Storage
    container: str
    filesystem: Path
    description: dict[str, Any]
    secret: str

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.description["Docker"]["config"]
        return config

    def run(self, *command: str) -> str:
        """Run a command as the image's own user, in its own environment and working directory."""
        return self.storage.buildah("run", "--isolation", "chroot", self.container, "--", *command)

    @contextmanager
    def serving(self) -> Iterator[Server]:
        """Run the default command as a container does: first process, own user, nothing writable but /tmp."""
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        environment = [*self.config["Env"], f"OWL_DEPLOY_PORT={port}", "OWL_DEPLOY_THREADS=1"]
        words = [*self.config["Entrypoint"], *self.config["Cmd"]]
        start = ["chroot", f"--userspec={self.config['User']}", self.filesystem, "/usr/bin/env", "--ignore-environment"]
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", READ_ONLY, "sh"]
            + [
                str(word)
                for word in [self.filesystem, *start, f"--chdir={self.config['WorkingDir']}", *environment, *words]
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield Server(process, f"http://127.0.0.1:{port}", process.stdout.readline())
        finally:
            # Not the one that started it: the kernel forgets to end a child that has taken another user.
            for pid in children(process):
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=30)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server in a container of the image."""

    process: subprocess.Popen[str]
    """The one that started the container; its child is the container's first process."""
    url: str
    first_line: str

    @property
    def pid(self) -> int:
        """The server's process as the host sees it."""
        (pid,) = children(self.process)
        return pid

    def status(self) -> dict[str, str]:
        """Return what the kernel says of the server's process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())
    return settings


@pytest.fixture(scope="module")
def cache() -> Path:
    """Skip where an image cannot be built at all; else give the folder that is kept between runs."""
    for tool in ("buildah", "mmdebstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if os.geteuid() != 0:
        pytest.skip("building and entering an image this way needs root")
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def make_base(cache: Path, packages: str) -> Path:
    """Make the file system of a base image, once: about 25 s on two idle cores."""
    options = [*BASE_OPTIONS, f"--include={packages}"]
    archive = cache / f"base-{cache_key(BASE_RELEASE, *options)}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder) / "base.tar"
            run_command(["mmdebstrap", *options, BASE_RELEASE, str(unfinished)], timeout_s=600)
            unfinished.rename(archive)
    return archive


@pytest.fixture(scope="module")
def base_archives(cache: Path) -> dict[str, Path]:
    return {"base": make_base(cache, BASE_PACKAGES), "build-base": make_base(cache, BUILD_BASE_PACKAGES)}


@pytest.fixture(scope="module")
def wheelhouse(cache: Path, project: dict[str, Any]) -> Path:
    """Download what the build installs, once, with the host's own pip settings: 138 MB, about 10 s."""
    # The build back end asks for cmake and ninja where the machine has none.
    extras = project["project"]["optional-dependencies"]
    tools = [name for name in extras["dev"] if re.match("(cmake|ninja|cyclonedx-python-lib)", name)]
    dependencies = [*project["project"]["dependencies"], *extras["serve"]]
    requirements = sorted([*project["build-system"]["requires"], *tools, *dependencies])
    wheels = cache / f"wheels-{cache_key(BASE_PYTHON, *requirements)}"
    if not wheels.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder) / "wheels"
            options = ["--quiet", "--only-binary", ":all:", "--python-version", BASE_PYTHON, "--dest", str(unfinished)]
            run_command([sys.executable, "-m", "pip", "download", *options, *requirements], timeout_s=600)
            unfinished.rename(wheels)
    return wheels


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as git has it, with the tiny artifact where a build takes one from."""
    folder = tmp_path_factory.mktemp("source")
    listed = run_command(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], 60, REPO)
    for name in filter(None, listed.split("\0")):
        if (REPO / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name, follow_symlinks=False)
    model = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    settings = ExportSettings(target="onnxruntime", weights="sparse-operator", precision="fp32")
    export_onnx(str(model), settings, out=folder / "artifact", threads=1, parity=False)
    return folder


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds images from the bases and the wheels, with pip's settings as a secret."""

    storage: Storage
    wheelhouse: Path
    pip_conf: Path
    secret: str

    def build(self, context: Path, name: str, *arguments: str) -> Image:
        """Build a folder's Dockerfile, and make a container of the image."""
        tag = f"localhost/{name}"
        values = ("BASE=localhost/base", "BUILD_BASE=localhost/build-base", *arguments)
        self.storage.buildah(
            *("build", "--format", "docker", "--isolation", "chroot", "--network", "host", "--tag", tag),
            *(word for value in values for word in ("--build-arg", value)),
            *("--secret", f"id=pip_conf,src={self.pip_conf}", "--volume", f"{self.wheelhouse}:/mnt:ro"),
            ".",
            timeout_s=900,
            cwd=context,
        )
        container = self.storage.buildah("from", tag)
        return Image(
            storage=self.storage,
            container=container,
            filesystem=Path(self.storage.buildah("mount", container)),
            description=json.loads(self.storage.buildah("inspect", "--type", "image", tag)),
            secret=self.secret,
        )


@pytest.fixture(scope="module")
def builder(base_archives: dict[str, Path], wheelhouse: Path) -> Iterator[Builder]:
    with tempfile.TemporaryDirectory(prefix="owl-deploy-image-") as folder:
        storage = Storage(Path(folder))
        for name, archive in base_archives.items():
            base = storage.buildah("from", "scratch")
            run_command(["tar", "-xf", str(archive), "-C", storage.buildah("mount", base)], timeout_s=120)
            storage.buildah("commit", "--quiet", "--rm", base, f"localhost/{name}")

        secret = f"secret-{uuid.uuid4().hex}"
        pip_conf = Path(folder) / "pip.conf"
        # The wheels appear under /mnt because every base has that folder: a folder made for them would stay behind.
        pip_conf.write_text(f"[global]\n# {secret}\nno-index = true\nfind-links = /mnt\n")
        yield Builder(storage, wheelhouse, pip_conf, secret)
        storage.buildah("rm", "--all")
        storage.buildah("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def image(builder: Builder, source: Path, project: dict[str, Any]) -> Image:
    version = project["project"]["version"]
    return builder.build(source, "owl-deploy", "ARTIFACT=artifact", f"VERSION={version}")


def test_default_command_serves_on_every_address_of_the_container(image: Image) -> None:
    assert (image.config["Entrypoint"], image.config["Cmd"]) == (["owl-deploy"], ["serve"])
    assert list(image.config["ExposedPorts"]) == ["8000/tcp"]
    assert image.config["StopSignal"] == "SIGTERM"
    assert {"OWL_DEPLOY_ARTIFACT=/models", "OWL_DEPLOY_HOST=0.0.0.0", "OWL_DEPLOY_PORT=8000"} <= set(
        image.config["Env"]
    )


def test_server_answers_with_a_read_only_root_as_first_process_and_drains(image: Image) -> None:
    with image.serving() as server:
        assert "http://0.0.0.0:" in server.first_line, server.first_line
        status = server.status()
        assert status["NSpid"].split()[-1] == "1"
        assert set(status["Uid"].split()) == {"10001"}
        assert status["CapEff"] == "0000000000000000"
        for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
            assert httpx.get(server.url + path).status_code == 200
        body = {"model": "models", "prompt": "An owl", "max_tokens": 4, "temperature": 0, "logit_bias": {"1": -100}}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert "owl_deploy_completion_tokens_total 4.0" in httpx.get(f"{server.url}/metrics").text

        events: list[str] = []
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "max_tokens": 400, "stream": True}, timeout=60
        ) as stream:
            for line in stream.iter_lines():
                if not events:
                    os.kill(server.pid, signal.SIGTERM)
                events += [line] if line else []
        assert events[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0


def test_health_check_tells_a_server_that_listens_from_none(image: Image) -> None:
    kind, *command = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    with image.serving() as server:
        environment = f"OWL_DEPLOY_PORT={server.url.rpartition(':')[2]}"
        ask = ["run", "--isolation", "chroot", "--env", environment, image.container, "--", *command]
        assert eventually(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        image.storage.buildah(*ask)
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(30)
        with pytest.raises(AssertionError, match="Connection refused"):
            image.storage.buildah(*ask)


@pytest.fixture(scope="module")
def context(image: Image) -> Path:
    """What `package` writes in the image: from an installed wheel, without a source tree."""
    command = ["owl-deploy", "package", "/models", "--out", "/work/context", "--unchecked", "--quiet", "--json"]
    facts = json.loads(image.run(*command))
    assert {"Dockerfile", "kubernetes.yaml", "artifact/model.onnx", facts["wheel"]} <= set(facts["files"])
    return image.filesystem / "work" / "context"


def test_image_packages_its_own_artifact_again(context: Path) -> None:
    (wheel,) = context.glob("*.whl")
    with zipfile.ZipFile(wheel) as names:
        assert "owl_deploy/image/Dockerfile" in names.namelist()
        assert [name for name in names.namelist() if name.endswith(".so")]


def test_packaged_context_builds_an_image_that_answers(builder: Builder, context: Path) -> None:
    """Nothing is given but the bases: artifact and version are defaults of its Dockerfile."""
    with builder.build(context, "packaged").serving() as server:
        assert eventually(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
        body = {"model": "models", "prompt": "An owl", "max_tokens": 4, "temperature": 0, "logit_bias": {"1": -100}}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4


def test_image_without_a_model_says_so(image: Image) -> None:
    with pytest.raises(AssertionError, match="no artifact at /nothing"):
        image.run("owl-deploy", "serve", "/nothing")


def test_bill_of_materials_is_valid_and_names_what_is_installed(image: Image, project: dict[str, Any]) -> None:
    text = (image.filesystem / "usr/share/owl-deploy/sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == project["project"]["version"]
    purls = {component["purl"].partition("?")[0] for component in bill["components"]}
    probe = "import importlib.metadata as m; print(*{f'{d.name}@{d.version}' for d in m.distributions()})"
    python = {re.sub("_", "-", name.lower()) for name in image.run("python", "-c", probe).split()}
    assert {purl.removeprefix("pkg:pypi/") for purl in purls if purl.startswith("pkg:pypi/")} == python - {
        f"owl-deploy@{project['project']['version']}"
    }
    debian = image.run("dpkg-query", "--show", "--showformat", "${Package} ")
    names = {purl.removeprefix("pkg:deb/debian/").partition("@")[0] for purl in purls if purl.startswith("pkg:deb/")}
    assert {name.replace("%2B", "+") for name in names} == set(debian.split())
    assert not {"g++", "gcc"} & names


def test_version_is_that_of_the_project(image: Image, project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert image.run("owl-deploy", "--version") == f"owl-deploy {version}"
    assert image.config["Labels"]["org.opencontainers.image.version"] == version
    assert image.config["Labels"]["org.opencontainers.image.licenses"] == project["project"]["license"]


def test_user_is_not_root(image: Image) -> None:
    assert image.config["User"] == "10001:10001"
    assert image.run("id", "-u") == "10001"
    assert image.run("id", "-g") == "10001"


def test_user_can_write_to_its_folders_only(image: Image) -> None:
    assert image.config["WorkingDir"] == "/work"
    probe = "import os; print([p for p in ['.', '/models', '/opt/owl-deploy', '/etc'] if os.access(p, os.W_OK)])"
    assert image.run("python", "-c", probe) == "['.']"


def test_all_four_folders_are_installed(image: Image) -> None:
    probe = (
        "import importlib.resources as r; import owl_deploy.bench, owl_deploy.export; "
        "print(*sorted(p.name for p in (r.files('owl_deploy') / 'recipes').iterdir() if p.suffix == '.yaml'))"
    )
    assert image.run("python", "-c", probe).split() == sorted(path.name for path in (REPO / "recipes").glob("*.yaml"))


def test_onnxruntime_runs_a_graph(image: Image) -> None:
    assert image.run("python", "-c", ENGINE_PROBE) == "[2.0, 4.0]"


def test_onnxruntime_loads_the_operator_library(image: Image) -> None:
    probe = (
        "import onnxruntime; from owl_deploy.kernels import library_path; "
        "onnxruntime.SessionOptions().register_custom_ops_library(str(library_path())); print(library_path().name)"
    )
    assert image.run("python", "-c", probe) == "libowl_deploy_kernels.so"


@pytest.mark.parametrize("module", ["torch", "transformers", "deepsparse", "sparseml"])
def test_module_is_absent(image: Image, module: str) -> None:
    assert image.run("python", "-c", f"import importlib.util; print(importlib.util.find_spec('{module}'))") == "None"


def test_compilers_and_pip_are_absent(image: Image) -> None:
    tools = ["gcc", "g++", "cc", "c++", "cpp", "clang", "as", "ld", "make", "cmake", "ninja", "pip", "pip3"]
    probe = f"import shutil; print([tool for tool in {tools} if shutil.which(tool)])"
    assert image.run("python", "-c", probe) == "[]"


def test_pip_settings_of_the_build_are_absent(image: Image) -> None:
    described = json.dumps(image.description)
    assert image.secret not in described
    assert "find-links" not in described
    assert not [name for name in image.config["Env"] if name.startswith("PIP_")]
    assert not list(image.filesystem.rglob("pip.conf"))
    assert not list((image.filesystem / "mnt").iterdir())
    assert not list((image.filesystem / "media").glob("*"))
    found = subprocess.run(
        ["grep", "--recursive", "--files-with-matches", "--fixed-strings", image.secret, str(image.filesystem)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, "")


def test_image_is_small(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    layers = json.loads(image.description["Manifest"])["layers"]
    assert {layer["mediaType"] for layer in layers} == {"application/vnd.docker.image.rootfs.diff.tar"}
    layer_bytes = [layer["size"] for layer in layers]
    with capsys.disabled():
        megabytes = " + ".join(f"{size / 1e6:.0f}" for size in layer_bytes)
        print(
            f"\nimage: {sum(layer_bytes) / 1e6:.0f} MB uncompressed, by layer {megabytes} MB, the tiny model included"
        )
    assert sum(layer_bytes) < MAX_IMAGE_BYTES
