"""Which engines are here, and why one is not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

__all__ = ["EngineStatus", "library_status", "onnxruntime_status"]

# Distributions that are engines of this environment: licence, and what to install.
_LIBRARIES = {"onnxruntime-genai": ("MIT", "onnxruntime-genai==0.18.0"), "torch": ("BSD-3-Clause", "owl-deploy[prune]")}


@dataclass(frozen=True)
class EngineStatus:
    """What `owl-deploy engines` and every report say about one engine."""

    name: str
    is_available: bool
    version: str
    """Version that is installed, or the one that would be; empty when unknown."""
    reason: str
    """Why the engine is not available and what to do, one sentence; empty when it is."""
    licence: str
    """What the engine's licence allows, in a few words."""

    @property
    def state(self) -> str:
        """The version, or why there is none, and the licence."""
        return f"{self.version if self.is_available else f'unavailable: {self.reason}'}  ({self.licence})"


def onnxruntime_status() -> EngineStatus:
    """Look ONNX Runtime up in this environment, without importing it."""
    try:
        return EngineStatus("onnxruntime", True, metadata.version("onnxruntime"), "", "MIT")
    except metadata.PackageNotFoundError:
        return EngineStatus("onnxruntime", False, "", "ONNX Runtime is not installed: pip install onnxruntime", "MIT")


def library_status(name: str) -> EngineStatus:
    """Look an optional engine of this environment up, onnxruntime-genai or torch, without importing it."""
    licence, requirement = _LIBRARIES[name]
    try:
        return EngineStatus(name, True, metadata.version(name), "", licence)
    except metadata.PackageNotFoundError:
        return EngineStatus(name, False, "", f"{name} is not installed: pip install '{requirement}'", licence)
