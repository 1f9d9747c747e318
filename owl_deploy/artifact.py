"""ONNX artifacts on disk: a folder with a model, its tokenizer and a manifest.

The exporter writes them; engines, evaluation and bench read them. Opening one checks that it is
complete and stays inside its own folder; no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from owl_deploy.errors import UnsupportedModelError

__all__ = ["ARTIFACT_FORMAT", "MANIFEST", "ArtifactFacts", "OnnxArtifact", "is_artifact", "open_artifact"]

MANIFEST = "owl.json"

ARTIFACT_FORMAT = 2
"""`format_version` of manifests. 2: logits of the last token alone can be asked for."""


def _has(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a check that a mapping has these keys."""

    def check(mapping: dict[str, Any]) -> dict[str, Any]:
        missing = [key for key in keys if key not in mapping]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return mapping

    return check


class ArtifactFacts(BaseModel):
    """What engines need from a manifest; it may hold more."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    kind: str
    format_version: int
    target: Literal["onnxruntime", "deepsparse"]
    weights: str
    precision: str
    n_blocks: int = Field(ge=1, le=10_000)
    n_kv_heads: int = Field(ge=1, le=100_000)
    head_dim: int = Field(ge=1, le=100_000)
    vocab_size: int = Field(ge=1, le=100_000_000)
    max_positions: int = Field(ge=1, le=100_000_000)
    bytes_dense: int = Field(ge=0)
    bytes_per_decode_step: Annotated[dict[str, int], AfterValidator(_has("dense", "nonzero"))]
    """Weight bytes that one decode step must read: `dense` as dense float32, `nonzero` counting non-zeros only; for
    packed matrices also `stored`, their real bytes."""
    sparsity: Annotated[dict[str, float], AfterValidator(_has("target", "linears", "model"))]


@dataclass(frozen=True)
class OnnxArtifact:
    """A self-contained folder: model.onnx, model.onnx.data, genai_config.json, tokenizer, owl.json."""

    path: Path
    manifest: dict[str, Any]
    """Content of owl.json."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @cached_property
    def facts(self) -> ArtifactFacts:
        """The checked part of the manifest."""
        return ArtifactFacts.model_validate(self.manifest)

    def kv_bytes(self, n_positions: int) -> int:
        """Return the bytes of keys and values of `n_positions` tokens, float32."""
        return 2 * 4 * self.facts.n_blocks * self.facts.n_kv_heads * self.facts.head_dim * n_positions


def is_artifact(path: Path) -> bool:
    """Return whether a folder looks like an ONNX artifact rather than a checkpoint."""
    return (path / "model.onnx").is_file()


def open_artifact(path: Path) -> OnnxArtifact:
    """Open an artifact's manifest.

    Raises:
        UnsupportedModelError: the folder, its model or its manifest is missing or not of this tool.
    """
    if not path.is_dir():
        raise UnsupportedModelError(f"no artifact at {path}: there is no such folder")
    if not is_artifact(path):
        raise UnsupportedModelError(f"{path} is not an artifact: it has no model.onnx")
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UnsupportedModelError(f"{path} has no manifest ({MANIFEST}): export it with owl-deploy export")
    try:
        artifact = OnnxArtifact(path, json.loads(manifest.read_text(encoding="utf-8")))
        facts = artifact.facts
    except (OSError, ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        raise UnsupportedModelError(
            f"{manifest} is not a manifest of an artifact: {' '.join(str(error).split())}"
        ) from error
    if facts.kind != "artifact":
        raise UnsupportedModelError(f"{manifest} describes a {facts.kind}, not an artifact")
    if facts.format_version != ARTIFACT_FORMAT:
        raise UnsupportedModelError(
            f"{manifest} has format_version {facts.format_version}, and this owl-deploy reads {ARTIFACT_FORMAT}: "
            "export it again"
        )
    return artifact
