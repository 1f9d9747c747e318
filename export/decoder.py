"""What a decoder graph needs to know about a model, and where each of its weights lies.

In: a checkpoint's configuration. Out: plain frozen values from which every graph dialect is
written. It knows nothing of ONNX and reads no large weight.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.artifact_shape import ArtifactShape
from owl_deploy.export.families import FAMILIES, Family, NormKind, TensorNames

__all__ = [
    "ROPE_TYPES",
    "Activation",
    "Block",
    "Decoder",
    "RotaryTables",
    "WeightSource",
    "has_lean_graph",
    "read_decoder",
]

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
"""transformers' names; `gelu` is the exact one, with the error function."""


@dataclass(frozen=True)
class WeightSource:
    """An ONNX initializer that is filled from tensors of the checkpoint when the file is written."""

    tensors: tuple[str, ...]
    """Names of tensors in the checkpoint, stacked by rows."""
    is_transposed: bool
    """True where the initializer is the transpose of that: a linear's (out, in) becomes (in, out)."""
    offset: float = 0.0
    """Added to every value: the norms of Gemma multiply by 1 + weight."""
    is_half: bool = False
    """True where it lies in the file as float16."""


@dataclass(frozen=True)
class RotaryTables:
    """Angles of the rotary embedding for every position; a head's first 2 * n_pairs values are rotated."""

    cos: NDArray[np.float32]
    """(max_positions, n_pairs), attention scaling included."""
    sin: NDArray[np.float32]
    """(max_positions, n_pairs), attention scaling included."""


@dataclass(frozen=True)
class Block:
    """How one block attends; all else is the same in every block."""

    rotary: str | None
    """Which of the decoder's rotary tables turns queries and keys; None leaves them as they are."""
    sliding_window: int | None
    """Positions that a token may look back upon, itself included; None for all."""


@dataclass(frozen=True)
class Decoder:
    """Shape of a pre-norm decoder: blocks of grouped-query attention and an MLP on one residual stream."""

    model_type: str
    """`model_type` of the Hugging Face configuration."""
    names: TensorNames
    blocks: tuple[Block, ...]
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm: NormKind
    norm_epsilon: float
    norm_offset: float
    """Added to the weights of all norms."""
    activation: Activation
    is_gated: bool
    """Whether the MLP is down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
    has_qkv_bias: bool
    """True where q, k and v projections carry a bias."""
    has_output_bias: bool
    """True where the output projection of attention does."""
    has_mlp_bias: bool
    has_tied_head: bool
    """True where `lm_head` shares its weight with the embedding."""
    embedding_scale: float
    """What rows of the embedding are multiplied by."""
    query_scale: float
    """What scores are multiplied by."""
    attention_softcap: float | None
    """c of c * tanh(score / c); None for none."""
    logit_softcap: float | None
    """c of c * tanh(logit / c); None for none."""
    max_positions: int
    """The longest context that the artifact supports, in tokens."""
    position_offset: int
    """Row of the learned embedding of positions, where there is one, that belongs to the first token."""
    n_position_rows: int
    """Rows of that embedding, 0 where there is none."""
    rotary: dict[str, RotaryTables]
    """Tables by the name that blocks give."""

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def head(self) -> str:
        """Module whose weight, (vocab, hidden), makes logits."""
        return self.names.embedding if self.has_tied_head else "lm_head"

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Outputs of the projections to queries, keys and values."""
        return self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.head_dim

    @property
    def shape(self) -> ArtifactShape:
        """What engines and readers of an artifact need of all this."""
        names = (self.names.embedding, self.names.positions)
        return ArtifactShape(
            model_type=self.model_type,
            n_blocks=self.n_blocks,
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            # As in the checkpoint, or in few bits.
            gathered=frozenset(f"{name}.weight{suffix}" for name in names for suffix in ("", ".rows")),
        )

    @property
    def kv_names(self) -> list[str]:
        """Names of the cache inputs without prefix: `0.key`, `0.value`, `1.key`, ..."""
        return [f"{i}.{part}" for i in range(self.n_blocks) for part in ("key", "value")]


ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings whose tables are the same for every sequence length."""


def has_lean_graph(checkpoint: Checkpoint) -> bool:
    """Return whether the family of a checkpoint is one that `read_decoder` knows."""
    return checkpoint.config.get("model_type") in FAMILIES


def read_decoder(checkpoint: Checkpoint, *, max_positions: int) -> Decoder:
    """Read the shape of a checkpoint's decoder.

    Args:
        checkpoint: of one of `FAMILIES`.
        max_positions: longest context wanted, in tokens; the model's own limit caps it.

    Raises:
        UnsupportedModelError: another family, or an attention or rotary variant that the graphs cannot express exactly.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    family = _family(config)
    names = family.names
    n_positions = min(max_positions, config.max_position_embeddings)
    blocks = _blocks(config, family, n_positions)

    def stated(key: str | None) -> Any:
        return getattr(config, key, None) if key is not None else None

    head_dim = stated(family.head_size) or config.hidden_size // config.num_attention_heads
    attention, mlp = f"{names.blocks}.0.{names.attention}", f"{names.blocks}.0.{names.mlp}".removesuffix(".")
    return Decoder(
        model_type=config.model_type,
        names=names,
        blocks=blocks,
        hidden_size=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=stated(family.kv_heads) or config.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=getattr(config, family.intermediate_size),
        vocab_size=config.vocab_size,
        norm=family.norm,
        norm_epsilon=config.rms_norm_eps if family.norm == "rms" else 1e-5,  # torch's, which no configuration states
        norm_offset=family.norm_offset,
        activation=getattr(config, family.activation),
        is_gated=family.is_gated,
        has_qkv_bias=f"{attention}.{names.query_key_value[0]}.bias" in checkpoint.tensors,
        has_output_bias=f"{attention}.{names.attention_output}.bias" in checkpoint.tensors,
        has_mlp_bias=f"{mlp}.{names.mlp_inputs[0]}.bias" in checkpoint.tensors,
        has_tied_head=bool(config.tie_word_embeddings),
        embedding_scale=config.hidden_size**0.5 if family.scales_embedding else 1.0,
        query_scale=(stated(family.query_scalar) or head_dim) ** -0.5,
        attention_softcap=stated(family.attention_softcap),
        logit_softcap=stated(family.logit_softcap),
        max_positions=n_positions,
        position_offset=family.position_offset,
        n_position_rows=config.max_position_embeddings + family.position_offset if names.positions else 0,
        rotary=_rotary_tables(config, family, {block.rotary for block in blocks}, n_positions),
    )


def _family(config: Any) -> Family:
    """Return what a configuration's model type means, if there is a graph for all that it says."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"no graph for model type {config.model_type!r} yet: export takes {', '.join(FAMILIES)}"
        )
    activation = getattr(config, family.activation)
    if activation not in get_args(Activation):
        raise UnsupportedModelError(
            f"no graph for activation {activation!r}: export takes {', '.join(get_args(Activation))}"
        )
    equal = {attribute: getattr(config, other) for attribute, other in family.equal.items()}
    for attribute, value in {**family.fixed, **equal}.items():
        if (found := getattr(config, attribute)) != value:
            raise UnsupportedModelError(
                f"no graph for {config.model_type} with {attribute} {found!r}: export takes {value!r}"
            )
    return family


def _blocks(config: Any, family: Family, n_positions: int) -> tuple[Block, ...]:
    n_blocks = config.num_hidden_layers
    window: int | None = config.sliding_window if family.windows != "none" else None
    # The masks of transformers go by layer_types alone, whatever use_sliding_window says.
    kinds = config.layer_types if family.windows == "by layer type" else ["sliding_attention"] * n_blocks
    rotates = getattr(config, family.rotary_blocks) if family.rotary_blocks else [family.has_rotary] * n_blocks
    blocks = []
    for kind, is_rotated in zip(kinds, rotates, strict=True):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"no graph for layer_types {kind!r}: export takes full and sliding attention")
        own = window if kind == "sliding_attention" else None
        table = "rotary_of_windows" if own is not None and family.window_rope_theta else "rotary"
        # A window as long as the artifact's context hides nothing.
        hides = own is not None and own < n_positions
        blocks.append(Block(rotary=table if is_rotated else None, sliding_window=own if hides else None))
    return tuple(blocks)


def _rotary_tables(config: Any, family: Family, wanted: set[str | None], n_positions: int) -> dict[str, RotaryTables]:
    """Return the tables that blocks name."""
    tables = {}
    if "rotary" in wanted:
        tables["rotary"] = _rotary_table(config, n_positions)
    if "rotary_of_windows" in wanted and family.window_rope_theta is not None:
        unscaled = copy(config)
        unscaled.rope_theta, unscaled.rope_scaling = getattr(config, family.window_rope_theta), None
        tables["rotary_of_windows"] = _rotary_table(unscaled, n_positions)
    return tables


def _rotary_table(config: Any, n_positions: int) -> RotaryTables:
    """Return cosines and sines from transformers' own frequencies."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    short = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    if kind == "longrope" and n_positions > short:
        raise UnsupportedModelError(
            f"rope scaling 'longrope' depends on the length of the text: fixed tables express it up to {short} "
            f"positions: export with max_positions {short}"
        )
    if kind not in (*ROPE_TYPES, "longrope"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} depends on the length of the text: no fixed tables express it"
        )
    frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies.float())
    return RotaryTables((angles.cos() * attention_scaling).numpy(), (angles.sin() * attention_scaling).numpy())
