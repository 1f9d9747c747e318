"""What a model type means to its decoder: the names of its tensors, and where its blocks differ from Llama's.

In: nothing. Out: one frozen value per `model_type` of a Hugging Face configuration, to be read beside that
configuration. Numbers are not known here, only under which key a family states them; nor is ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "NormKind", "TensorNames"]

NormKind = Literal["rms", "layer"]
"""Root mean square (one weight per channel), or mean and variance (weight and bias)."""


@dataclass(frozen=True)
class TensorNames:
    """Where a family keeps its weights: names of modules, to which `.weight` and `.bias` are added."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    """Learned embedding of positions, where there is one."""
    final_norm: str = "model.norm"
    blocks: str = "model.layers"
    """What the names of all that follows begin with, the number of the block between."""

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    """What the names of the next three begin with."""
    query_key_value: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three linears, or one that is all of them stacked by rows."""
    head_norms: tuple[str, str] | None = None
    """Norms of each head of the queries and of the keys, before it is rotated, where there are any."""
    attention_output: str = "o_proj"
    attention_update_norm: str | None = None
    """Norm of what attention adds to the residual stream, where there is one."""

    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    """What the names of the next two begin with; empty where they belong to the block itself."""
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Gate and up, or both stacked by rows; where the MLP is not gated, its first linear."""
    mlp_output: str = "down_proj"
    mlp_update_norm: str | None = None
    """Norm of what the MLP adds to the residual stream, where there is one."""


@dataclass(frozen=True)
class Family:
    """What the configurations of one model type have in common; the defaults are Llama's."""

    names: TensorNames = TensorNames()
    norm: NormKind = "rms"
    norm_offset: float = 0.0
    """Added to the weights of all norms."""
    is_gated: bool = True
    """Whether the MLP is down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
    scales_embedding: bool = False
    """Whether rows of the embedding are multiplied by the root of the hidden size."""
    has_rotary: bool = True
    position_offset: int = 0
    """Row of the learned embedding of positions that belongs to the first token."""

    activation: str = "hidden_act"
    """Key under which the configuration names the activation; those below are keys too, None where it states none."""
    intermediate_size: str = "intermediate_size"
    kv_heads: str | None = "num_key_value_heads"
    """None: as many as of queries."""
    head_size: str | None = "head_dim"
    """None, or stated as None: the hidden size shared among the heads."""
    windows: Literal["none", "every block", "by layer type"] = "none"
    """Which blocks attend to the last `sliding_window` positions only: those that `layer_types` says, or all."""
    rotary_blocks: str | None = None
    """One truth value per block: whether it rotates queries and keys."""
    window_rope_theta: str | None = None
    """Base of the rotary frequencies, unscaled, in blocks with a window."""
    query_scalar: str | None = None
    """What scores are divided by the root of; None is the size of a head."""
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that would change the graph -> the only value for which there is one."""
    equal: Mapping[str, str] = field(default_factory=dict)
    """The same for attributes that must have the value of another."""


_GEMMA = Family(norm_offset=1.0, scales_embedding=True)
_SANDWICH = TensorNames(
    attention_update_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_update_norm="post_feedforward_layernorm",
)
_GEMMA_2 = replace(
    _GEMMA,
    names=_SANDWICH,
    activation="hidden_activation",
    windows="by layer type",
    query_scalar="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
)
_OPT = Family(
    names=TensorNames(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        blocks="model.decoder.layers",
        attention_norm="self_attn_layer_norm",
        attention_output="out_proj",
        mlp_norm="final_layer_norm",
        mlp="",
        mlp_inputs=("fc1",),
        mlp_output="fc2",
    ),
    norm="layer",
    is_gated=False,
    has_rotary=False,
    position_offset=2,
    activation="activation_function",
    intermediate_size="ffn_dim",
    kv_heads=None,
    head_size=None,
    fixed={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    equal={"word_embed_proj_dim": "hidden_size"},
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windows="every block"),
    "smollm3": Family(windows="by layer type", rotary_blocks="no_rope_layers"),
    "qwen2": Family(windows="by layer type"),
    "qwen3": Family(names=TensorNames(head_norms=("q_norm", "k_norm")), windows="by layer type"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": replace(
        _GEMMA_2,
        names=replace(_SANDWICH, head_norms=("q_norm", "k_norm")),
        window_rope_theta="rope_local_base_freq",
        # In its attention transformers passes over the cap, which no published model has.
        attention_softcap=None,
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "phi3": Family(
        names=TensorNames(query_key_value=("qkv_proj",), mlp_inputs=("gate_up_proj",)), windows="every block"
    ),
    "opt": _OPT,
}
"""`model_type` of a configuration -> what it means."""
