"""The sizes of an artifact: what engines, manifest and genai's configuration need to know of a graph."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ArtifactShape"]


@dataclass(frozen=True)
class ArtifactShape:
    """Sizes of cache and logits, and how the graph takes its inputs."""

    model_type: str
    """`model_type` of the Hugging Face configuration."""
    n_blocks: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    """The longest context that the artifact supports, in tokens."""
    gathered: frozenset[str] = frozenset()
    """Names of stored matrices of which a step reads single rows."""
    is_traced: bool = False
    """Whether the graph is a trace. Its cache then grows: past and present never share a buffer."""
    has_position_ids: bool = False
    """Whether the graph has them as an input."""
