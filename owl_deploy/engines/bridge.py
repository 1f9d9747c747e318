"""The bridge environment: DeepSparse and SparseML in a virtual environment of their own.

Both ended at releases that need Python 3.8-3.11, numpy below 2 and an onnx of 2023, which nothing
else here could live with. How an environment is made, `environment` knows.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from pathlib import Path

from owl_deploy.engines.environment import EngineEnvironment
from owl_deploy.engines.status import EngineStatus

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


def bridge_home() -> Path:
    """Return the folder of the bridge environment. It need not exist."""
    return _BRIDGE.home


def bridge_python() -> Path:
    """Return the bridge environment's interpreter.

    Raises:
        EngineUnavailableError: it is not installed, or cannot run on this machine.
    """
    return _BRIDGE.python()


def bridge_status() -> EngineStatus:
    """Say whether DeepSparse can run here."""
    return _BRIDGE.status()


def install_bridge(python: str | None = None, on_line: Callable[[str], None] = _log.info) -> Path:
    """Make the bridge environment, unless it is there already: see `EngineEnvironment.install`."""
    return _BRIDGE.install(python, on_line)


def find_interpreter(python: str | None = None) -> str:
    """Return an interpreter that DeepSparse has wheels for: see `EngineEnvironment.find_interpreter`."""
    return _BRIDGE.find_interpreter(python)


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


_BRIDGE = EngineEnvironment(
    name="deepsparse",
    title="DeepSparse",
    version=_VERSION,
    pins=PINS,
    modules=("deepsparse", "sparseml"),
    oldest=(3, 8),
    newest=(3, 11),
    licence="evaluation only (Neural Magic DeepSparse Community License)",
    notice=LICENCE_NOTICE,
    machine_obstacle=_machine_obstacle,
)
