"""The command line called within the test process: the same `main` and exit codes, without seconds of imports."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from owl_deploy.cli import main

# This very file is text enough, and tokenised at once.
TEXT = f"text:{Path(__file__).resolve()}"
SMALL_PRUNE = ("--calibration", TEXT, "--n-samples", "4", "--seq-len", "32", "--threads", "1")
SMALL_BENCH = (
    *("--past-len", "8", "--prompt-len", "8", "--rounds", "2", "--decode-samples", "2", "--prefill-samples", "1"),
    *("--window", "64", "--max-windows", "1", "--threads", "1"),
)


@dataclass(frozen=True)
class Call:
    """What a call of the command line left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout; fails unless there is exactly one."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value

    @property
    def sentence(self) -> str:
        """The one line on stderr that starts with the program's name; fails unless it is the only line."""
        lines = self.stderr.strip().splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("owl-deploy: ")
        return lines[0].removeprefix("owl-deploy: ")


def call(*arguments: str | Path) -> Call:
    """Run `owl-deploy ARGUMENTS` and put back what it changes of this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    package = logging.getLogger("owl_deploy")
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers, level = package.handlers, package.level
    code: Any = 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", ["owl-deploy", *map(str, arguments)]),
        mock.patch.dict(os.environ),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
            package.handlers, package.level = handlers, level
    return Call(code or 0, stdout.getvalue(), stderr.getvalue())


def tree(folder: Path) -> set[str]:
    """Return every path below a folder, hidden ones too, except the folders that prune keeps for --resume."""
    paths = {path.relative_to(folder) for path in folder.rglob("*")}
    return {str(path) for path in paths if not any(part.endswith(".partial") for part in path.parts)}
