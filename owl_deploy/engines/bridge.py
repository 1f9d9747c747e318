"""The bridge environment: DeepSparse and SparseML in a virtual environment of their own.

Both ended at releases that need Python 3.8-3.11, numpy below 2 and an onnx of 2023, which nothing
else here could live with. In: an interpreter. Out: a folder in the cache that holds one, with the
pinned packages. What runs inside is not known here (see `worker`).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import EngineUnavailableError

__all__ = [
    "LICENCE_NOTICE",
    "PINS",
    "bridge_home",
    "bridge_python",
    "bridge_status",
    "find_interpreter",
    "install_bridge",
]

_log = logging.getLogger(__name__)

_VERSION = "1.8.0"
# Installed together on Python 3.11. Unpinned, deepsparse is an empty 1.9.0; protobuf above 3.20
# fails at the import of onnx 1.14.1, and numpy 2 at that of deepsparse.
PINS: tuple[str, ...] = (
    f"deepsparse=={_VERSION}",
    f"sparseml=={_VERSION}",
    "numpy<2",
    "onnx==1.14.1",
    "protobuf==3.20.3",
)
LICENCE_NOTICE = (
    "DeepSparse is proprietary: the Neural Magic DeepSparse Community License allows evaluation only, not production. "
    "It ended in June 2025 and gets no fixes. Never put it into an image."
)
_LICENCE = "evaluation only (Neural Magic DeepSparse Community License)"
_INSTALL = "owl-deploy engines install deepsparse"
_OLDEST, _NEWEST = (3, 8), (3, 11)
# Written last: a folder without it is what a killed installation left, and counts as nothing. A
# rename at the end would not do, because a virtual environment's scripts hold its path.
_MARKER = "owl-deploy.json"
_PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
_CHECK = "import deepsparse, sparseml; print(deepsparse.__version__, sparseml.__version__)"
_QUIET = {"NM_DISABLE_ANALYTICS": "True", "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def bridge_home() -> Path:
    """Return the folder of the bridge environment. It need not exist."""
    return owl_deploy_cache() / "engines" / f"deepsparse-{_VERSION}"


def bridge_python() -> Path:
    """Return the bridge environment's interpreter.

    Raises:
        EngineUnavailableError: it is not installed, or cannot run on this machine.
    """
    obstacle = _machine_obstacle() or _environment_obstacle(bridge_home())
    if obstacle is not None:
        raise EngineUnavailableError(obstacle)
    return _python_of(bridge_home())


def bridge_status() -> EngineStatus:
    """Say whether DeepSparse can run here."""
    try:
        bridge_python()
    except EngineUnavailableError as error:
        return EngineStatus("deepsparse", False, _VERSION, str(error), _LICENCE)
    return EngineStatus("deepsparse", True, _VERSION, "", _LICENCE)


def install_bridge(python: str | None = None, on_line: Callable[[str], None] = _log.info) -> Path:
    """Make the bridge environment, unless it is there already.

    Args:
        python: interpreter to build it with, a path or a command; None searches for one.
        on_line: is told each step, and each line that pip prints.

    Returns:
        The interpreter of the environment.

    Raises:
        EngineUnavailableError: this machine cannot run it, or a step failed. Nothing is left behind.
    """
    obstacle = _machine_obstacle()
    if obstacle is not None:
        raise EngineUnavailableError(obstacle)
    home = bridge_home()
    if _environment_obstacle(home) is None:
        on_line(f"DeepSparse {_VERSION} is already installed in {home}")
        return _python_of(home)
    interpreter = find_interpreter(python)
    on_line(LICENCE_NOTICE)
    shutil.rmtree(home, ignore_errors=True)
    try:
        _build(home, interpreter, on_line)
    except BaseException:  # also Ctrl-C: half an environment helps nobody
        shutil.rmtree(home, ignore_errors=True)
        raise
    on_line(f"installed in {home}")
    return _python_of(home)


def find_interpreter(python: str | None = None) -> str:
    """Return an interpreter of a version that DeepSparse has wheels for, tried by starting it.

    Args:
        python: the only one to try; None tries the running one, then python3.11 to python3.8.

    Raises:
        EngineUnavailableError: none starts, or its version does not fit.
    """
    tried: list[str] = []
    for candidate in _candidates() if python is None else [python]:
        version, fault = _probe(candidate)
        if version is not None and _OLDEST <= version <= _NEWEST:
            return candidate
        tried.append(f"{candidate} {fault}" if version is None else f"{candidate} is {version[0]}.{version[1]}")
    raise EngineUnavailableError(
        f"DeepSparse {_VERSION} needs Python 3.8 to 3.11 with venv, and none was found "
        f"(tried: {'; '.join(tried) or 'nothing, no such command on PATH'}): "
        f"install one and run {_INSTALL} --python PATH"
    )


def _candidates() -> Iterator[str]:
    """The running interpreter, then those on PATH, newest first."""
    yield sys.executable
    for minor in range(_NEWEST[1], _OLDEST[1] - 1, -1):
        # All of PATH, not the first hit: version managers put stubs there that fail when started.
        for folder in os.get_exec_path():
            path = shutil.which(f"python3.{minor}", path=folder)
            if path is not None:
                yield path


def _probe(candidate: str) -> tuple[tuple[int, int] | None, str]:
    """Start an interpreter; returns its version, or None and what went wrong."""
    try:
        done = subprocess.run([candidate, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, "does not start"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, f"fails ({lines[-1]})" if lines else "fails"
    major, minor = done.stdout.strip().split(".")
    return (int(major), int(minor)), ""


def _build(home: Path, interpreter: str, on_line: Callable[[str], None]) -> None:
    """Create the environment, install the pins, import them once, and mark the folder as finished."""
    home.parent.mkdir(parents=True, exist_ok=True)
    python = str(_python_of(home))
    steps: tuple[tuple[str, list[str]], ...] = (
        (f"creating a virtual environment with {interpreter}", [interpreter, "-m", "venv", str(home)]),
        # Some of sparseml's dependencies come as source only: pip builds their wheels itself.
        (f"installing {', '.join(PINS)}", [python, "-m", "pip", "install", "--progress-bar=off", *PINS]),
        ("importing deepsparse and sparseml", [python, "-c", _CHECK]),
    )
    for index, (step, command) in enumerate(steps, start=1):
        on_line(f"[{index}/{len(steps)}] {step}")
        _run(step, command, on_line)
    marker = home / _MARKER
    part = marker.with_suffix(".part")
    part.write_text(json.dumps({"pins": PINS, "interpreter": interpreter}) + "\n", encoding="utf-8")
    part.replace(marker)


def _run(step: str, command: list[str], on_line: Callable[[str], None]) -> None:
    """Run one step, passing on what it prints; raises EngineUnavailableError when it fails."""
    # A PYTHONPATH or PYTHONHOME of the caller would mix two environments.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**env, **_QUIET},
        )
    except OSError as error:
        raise EngineUnavailableError(f"DeepSparse was not installed: {step} failed: {error}") from error
    lines: list[str] = []
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                on_line(lines[-1])
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise EngineUnavailableError(f"DeepSparse was not installed: {step} failed: {_cause(lines)}")


def _cause(lines: Iterable[str]) -> str:
    """The line that says most: pip's last error, else the last line of all."""
    spoken = [line.strip() for line in lines if line.strip()]
    errors = [line for line in spoken if line.startswith("ERROR:")]
    return (errors or spoken or ["no message"])[-1]


def _machine_obstacle() -> str | None:
    """Why this machine cannot run DeepSparse 1.8.0; None when it can."""
    if platform.system() != "Linux":
        return f"DeepSparse {_VERSION} has wheels for Linux only, this is {platform.system()}: use another engine"
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        return f"DeepSparse {_VERSION} needs an x86-64 or aarch64 processor, this one is {machine}: use another engine"
    if machine == "x86_64" and "avx2" not in _cpu_flags():
        return f"DeepSparse {_VERSION} needs a processor with AVX2, and this one has none: use another engine"
    return None


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Features of the first processor, as Linux names them."""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _environment_obstacle(home: Path) -> str | None:
    """Why the folder is no finished environment of these pins; None when it is one."""
    try:
        pins = json.loads((home / _MARKER).read_text(encoding="utf-8"))["pins"]
    except (OSError, ValueError, KeyError):
        return f"DeepSparse {_VERSION} is not installed: run {_INSTALL}"
    if tuple(pins) != PINS:
        return f"DeepSparse in {home} was installed with other pins than this version's: run {_INSTALL}"
    # Starting it would cost 20 ms at each call; a symlink whose target is gone is what does happen.
    if not _python_of(home).exists():
        return f"DeepSparse in {home} has lost the Python that it was built with: run {_INSTALL}"
    return None


def _python_of(home: Path) -> Path:
    return home / "bin" / "python"
