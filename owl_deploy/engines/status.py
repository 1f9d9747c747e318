"""Which engines are here, and why one is not."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

__all__ = ["EngineStatus", "onnxruntime_status"]


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


def onnxruntime_status() -> EngineStatus:
    """Look ONNX Runtime up in this environment, without importing it."""
    try:
        return EngineStatus("onnxruntime", True, metadata.version("onnxruntime"), "", "MIT")
    except metadata.PackageNotFoundError:
        return EngineStatus("onnxruntime", False, "", "ONNX Runtime is not installed: pip install onnxruntime", "MIT")
