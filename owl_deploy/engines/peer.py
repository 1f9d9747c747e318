"""Peers on disk: a model made ready for an engine that runs no artifacts of ours, or runs them its own way.

A folder with a manifest, and for some engines the model in their own format. `peers` makes them; engines, evaluation
and bench read them, just as they read artifacts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from owl_deploy.artifact import MANIFEST
from owl_deploy.errors import UnsupportedModelError

__all__ = ["PEER_FORMAT", "Peer", "PeerFacts", "is_peer", "open_peer"]

PEER_FORMAT = 1
"""`format_version` of manifests."""


class PeerFacts(BaseModel):
    """What bench and engines need from a manifest; names are those of an artifact's facts where they mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["peer"] = "peer"
    format_version: int = PEER_FORMAT
    target: str
    """The engine."""
    version: str
    """Of the engine."""
    weights: str
    precision: str
    model: str
    """Folder that the engine loads; `.` is the peer's own."""
    vocab_size: int = Field(ge=1, le=100_000_000)
    max_positions: int = Field(ge=1, le=100_000_000)
    bytes_dense: int = Field(ge=0)
    """Of the weights in memory, at most."""
    bytes_per_decode_step: dict[str, int]
    """`dense` and `nonzero`, the same: weight bytes that one decode step must read."""
    kv_bytes_per_position: int = Field(ge=0)
    sparsity: dict[str, float]
    parity: dict[str, Any] | None = None
    """Of the artifact that is run, where it is one; a peer of its own form is judged by its quality."""
    notes: tuple[str, ...] = ()
    """What a reader of its rows must know."""


@dataclass(frozen=True)
class Peer:
    """A folder that holds what one engine runs at one precision."""

    path: Path
    name: str
    """Of its rows in the report."""
    manifest: dict[str, Any]
    """Content of owl.json."""

    @cached_property
    def facts(self) -> PeerFacts:
        """The checked manifest."""
        return PeerFacts.model_validate(self.manifest)

    @property
    def model(self) -> Path:
        """The folder that the engine loads."""
        return self.path / self.facts.model  # an absolute path replaces what stands before it

    def kv_bytes(self, n_positions: int) -> int:
        """Return the bytes of keys and values of `n_positions` tokens, in the engine's own precision."""
        return self.facts.kv_bytes_per_position * n_positions


def is_peer(path: Path) -> bool:
    """Return whether a folder holds a peer."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "peer"


def open_peer(path: Path, name: str | None = None) -> Peer:
    """Open a peer's manifest.

    Args:
        path: its folder.
        name: of its rows; the folder's where not given.

    Raises:
        UnsupportedModelError: the manifest is missing, damaged or of another version.
    """
    try:
        peer = Peer(path, name or path.name, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
        version = peer.facts.format_version
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} holds no peer: {' '.join(str(error).split())}") from error
    if version != PEER_FORMAT:
        raise UnsupportedModelError(f"{path} has format_version {version}, and this owl-deploy reads {PEER_FORMAT}")
    return peer
