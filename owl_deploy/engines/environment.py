"""Engines in virtual environments of their own, made once and kept in the cache.

In: what an engine needs (`EngineEnvironment`) and an interpreter. Out: a folder with the pinned packages. Which engines
there are is not known here, nor what runs inside (see `worker`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import EngineUnavailableError

__all__ = ["EngineEnvironment"]

_log = logging.getLogger(__name__)

# Written last: a folder without it is what a killed installation left, and counts as nothing. A
# rename at the end would not do, because a virtual environment's scripts hold its path.
_MARKER = "owl-deploy.json"
_PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
_QUIET = {"NM_DISABLE_ANALYTICS": "True", "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _no_obstacle() -> str | None:
    return None


@dataclass(frozen=True)
class EngineEnvironment:
    """One engine's environment: what goes into it, and what may stand in the way."""

    name: str
    """Of the engine, as commands and rows have it."""
    title: str
    """Of the engine, as sentences have it."""
    version: str
    pins: tuple[str, ...]
    modules: tuple[str, ...]
    """Imported once behind the installation."""
    oldest: tuple[int, int]
    newest: tuple[int, int]
    """Versions of Python that the pins install on."""
    licence: str
    """What the engine's licence allows, in a few words."""
    notice: str = ""
    """Said before it is installed."""
    machine_obstacle: Callable[[], str | None] = field(default=_no_obstacle)
    """Says why this machine cannot run it; None when it can."""
    build_obstacle: Callable[[], str | None] = field(default=_no_obstacle)
    """Says why it cannot be installed on this machine."""

    @property
    def home(self) -> Path:
        """The folder in the cache. It need not exist."""
        return owl_deploy_cache() / "engines" / f"{self.name}-{self.version}"

    @property
    def _install(self) -> str:
        return f"owl-deploy engines install {self.name}"

    def python(self) -> Path:
        """Return the environment's interpreter.

        Raises:
            EngineUnavailableError: it is not installed, or cannot run on this machine.
        """
        obstacle = self.machine_obstacle() or self._environment_obstacle()
        if obstacle is not None:
            raise EngineUnavailableError(obstacle)
        return self._python

    def status(self) -> EngineStatus:
        """Say whether the engine can run here."""
        try:
            self.python()
        except EngineUnavailableError as error:
            return EngineStatus(self.name, False, self.version, str(error), self.licence)
        return EngineStatus(self.name, True, self.version, "", self.licence)

    def install(self, python: str | None = None, on_line: Callable[[str], None] = _log.info) -> Path:
        """Make the environment, unless it is there already.

        Args:
            python: interpreter to build it with, a path or a command; None searches for one.
            on_line: is told each step, and each line that pip prints.

        Returns:
            The interpreter of the environment.

        Raises:
            EngineUnavailableError: this machine cannot run it, or a step failed. Nothing is left behind.
        """
        obstacle = self.machine_obstacle()
        if obstacle is not None:
            raise EngineUnavailableError(obstacle)
        if self._environment_obstacle() is None:
            on_line(f"{self.title} {self.version} is already installed in {self.home}")
            return self._python
        obstacle = self.build_obstacle()
        if obstacle is not None:
            raise EngineUnavailableError(obstacle)
        interpreter = self.find_interpreter(python)
        if self.notice:
            on_line(self.notice)
        shutil.rmtree(self.home, ignore_errors=True)
        try:
            self._build(interpreter, on_line)
        except BaseException:  # also Ctrl-C: half an environment helps nobody
            shutil.rmtree(self.home, ignore_errors=True)
            raise
        on_line(f"installed in {self.home}")
        return self._python

    def find_interpreter(self, python: str | None = None) -> str:
        """Return an interpreter of a version that the pins install on, tried by starting it.

        Args:
            python: the only one to try; None tries the running one, then those on PATH, newest first.

        Raises:
            EngineUnavailableError: none starts, or its version does not fit.
        """
        tried: list[str] = []
        for candidate in self._candidates() if python is None else [python]:
            version, fault = _probe(candidate)
            if version is not None and self.oldest <= version <= self.newest:
                return candidate
            tried.append(f"{candidate} {fault}" if version is None else f"{candidate} is {version[0]}.{version[1]}")
        raise EngineUnavailableError(
            f"{self.title} {self.version} needs Python {_dotted(self.oldest)} to {_dotted(self.newest)} with venv, and "
            f"none was found (tried: {'; '.join(tried) or 'nothing, no such command on PATH'}): "
            f"install one and run {self._install} --python PATH"
        )

    def _candidates(self) -> Iterator[str]:
        """The running interpreter, then those on PATH, newest first."""
        yield sys.executable
        for minor in range(self.newest[1], self.oldest[1] - 1, -1):
            # All of PATH, not the first hit: version managers put stubs there that fail when started.
            for folder in os.get_exec_path():
                path = shutil.which(f"python3.{minor}", path=folder)
                if path is not None:
                    yield path

    def _build(self, interpreter: str, on_line: Callable[[str], None]) -> None:
        """Create the environment, install the pins, import them once, and mark the folder as finished."""
        self.home.parent.mkdir(parents=True, exist_ok=True)
        python = str(self._python)
        steps: tuple[tuple[str, list[str]], ...] = (
            (f"creating a virtual environment with {interpreter}", [interpreter, "-m", "venv", str(self.home)]),
            # What comes as source only, pip compiles itself.
            (
                f"installing {', '.join(self.pins)}",
                [python, "-m", "pip", "install", "--progress-bar=off", *self.pins],
            ),
            (f"importing {' and '.join(self.modules)}", [python, "-c", f"import {', '.join(self.modules)}"]),
        )
        for index, (step, command) in enumerate(steps, start=1):
            on_line(f"[{index}/{len(steps)}] {step}")
            self._run(step, command, on_line)
        marker = self.home / _MARKER
        part = marker.with_suffix(".part")
        part.write_text(json.dumps({"pins": self.pins, "interpreter": interpreter}) + "\n", encoding="utf-8")
        part.replace(marker)

    def _run(self, step: str, command: list[str], on_line: Callable[[str], None]) -> None:
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
            raise EngineUnavailableError(f"{self.title} was not installed: {step} failed: {error}") from error
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
            raise EngineUnavailableError(f"{self.title} was not installed: {step} failed: {_cause(lines)}")

    def _environment_obstacle(self) -> str | None:
        """Why the folder is no finished environment of these pins; None when it is one."""
        try:
            pins = json.loads((self.home / _MARKER).read_text(encoding="utf-8"))["pins"]
        except (OSError, ValueError, KeyError):
            return f"{self.title} {self.version} is not installed: run {self._install}"
        if tuple(pins) != self.pins:
            return f"{self.title} in {self.home} was installed with other pins than this version's: run {self._install}"
        # Starting it would cost 20 ms at each call; a symlink whose target is gone is what does happen.
        if not self._python.exists():
            return f"{self.title} in {self.home} has lost the Python that it was built with: run {self._install}"
        return None

    @property
    def _python(self) -> Path:
        return self.home / "bin" / "python"


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


def _cause(lines: Iterable[str]) -> str:
    """The line that says most: pip's last error, else the last line of all."""
    spoken = [line.strip() for line in lines if line.strip()]
    errors = [line for line in spoken if line.startswith("ERROR:")]
    return (errors or spoken or ["no message"])[-1]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
