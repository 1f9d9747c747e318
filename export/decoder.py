"""What a decoder graph needs to know about a model, and where each of its weights lies.

In: a checkpoint's configuration. Out: plain frozen values from which every graph dialect is
written. It knows nothing of ONNX and reads no large weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import UnsupportedModelError

__all__ = ["Decoder", "WeightSource", "read_decoder"]


@dataclass(frozen=True)
class WeightSource:
    """An ONNX initializer that is filled from one tensor of the checkpoint when the file is written."""

    tensor: str
    """Name of the tensor in the checkpoint."""
    is_transposed: bool
    """True where the initializer is the tensor's transpose: a linear's (out, in) becomes (in, out)."""


@dataclass(frozen=True)
class Decoder:
    """Shape of a Llama-like decoder: pre-norm blocks of grouped-query attention and a gated MLP."""

    model_type: str
    """`model_type` of the Hugging Face configuration."""
    n_blocks: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    has_qkv_bias: bool
    """True where q, k and v projections carry a bias (Qwen2)."""
    has_o_bias: bool
    has_mlp_bias: bool
    has_tied_head: bool
    """True where `lm_head` shares its weight with the embedding."""
    sliding_window: int | None
    """Positions that a token may look back upon, in every block; None for all."""
    max_positions: int
    """Rows of the rotary tables: the longest context that the artifact supports, in tokens."""
    cos: NDArray[np.float32]
    """Rotary cosines, (max_positions, head_dim / 2), attention scaling included."""
    sin: NDArray[np.float32]
    """Rotary sines, (max_positions, head_dim / 2), attention scaling included."""

    @property
    def kv_names(self) -> list[str]:
        """Names of the cache inputs without prefix: `0.key`, `0.value`, `1.key`, ..."""
        return [f"{i}.{part}" for i in range(self.n_blocks) for part in ("key", "value")]


_FAMILIES = ("llama", "mistral", "qwen2")
# Scalings whose tables are the same for every sequence length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_decoder(checkpoint: Checkpoint, *, max_positions: int) -> Decoder:
    """Read the shape of a checkpoint's decoder.

    Args:
        checkpoint: of the Llama, Mistral or Qwen2 family.
        max_positions: longest context wanted, in tokens; the model's own limit caps it.

    Raises:
        UnsupportedModelError: another family, or an attention or rotary variant that the graphs cannot express exactly.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    family = config.model_type
    if family not in _FAMILIES:
        raise UnsupportedModelError(f"no graph for model type {family!r} yet: export takes {', '.join(_FAMILIES)}")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"no graph for activation {config.hidden_act!r}: export takes silu")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_positions = min(max_positions, config.max_position_embeddings)
    cos, sin = _rotary_tables(config, n_positions)
    return Decoder(
        model_type=family,
        n_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        has_qkv_bias="model.layers.0.self_attn.q_proj.bias" in checkpoint.tensors,
        has_o_bias="model.layers.0.self_attn.o_proj.bias" in checkpoint.tensors,
        has_mlp_bias="model.layers.0.mlp.gate_proj.bias" in checkpoint.tensors,
        has_tied_head=bool(config.tie_word_embeddings),
        sliding_window=_sliding_window(config, n_positions),
        max_positions=n_positions,
        cos=cos,
        sin=sin,
    )


def _rotary_tables(config: Any, n_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines (n_positions, head_dim / 2), from transformers' own frequencies."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope scaling {kind!r} depends on the length of the text: no fixed tables express it"
        )
    frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies.float())
    return (angles.cos() * attention_scaling).numpy(), (angles.sin() * attention_scaling).numpy()


def _sliding_window(config: Any, n_positions: int) -> int | None:
    """Return the window that all blocks share, None for full attention."""
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention"} or window is None or window >= n_positions:
        return None
    if len(kinds) > 1:
        raise UnsupportedModelError(f"blocks of different attention ({', '.join(sorted(kinds))}) have no graph yet")
    return int(window)
