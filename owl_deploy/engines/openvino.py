"""The environment of OpenVINO and of NNCF, which rounds its weights."""

from __future__ import annotations

from owl_deploy.engines.environment import EngineEnvironment

__all__ = ["OPENVINO"]

_VERSION = "2026.4.1"

OPENVINO = EngineEnvironment(
    name="openvino",
    title="OpenVINO",
    version=_VERSION,
    pins=(f"openvino=={_VERSION}", "nncf==3.4.0", "numpy==2.2.6"),
    modules=("openvino", "nncf"),
    oldest=(3, 10),
    newest=(3, 12),
    licence="Apache-2.0",
)
