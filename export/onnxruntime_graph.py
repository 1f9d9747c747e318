"""The decoder graph as ONNX Runtime runs it best: twelve nodes a block, with its contrib operators.

In: the shape of a decoder. Out: a graph of nodes and small constants, and for every weight the
checkpoint tensor that fills it. Inputs and outputs carry the names of onnxruntime-genai's model
builder, so that the same folder runs there.

The linears are plain MatMuls, or SparseMatMuls of the operator library: query, key and value are
then one product, gate and up another, and a block has ten nodes.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.decoder import Decoder, WeightSource
from owl_deploy.export.graph import GraphWriter
from owl_deploy.export.packed_graph import OPERATOR_DOMAIN, PackedGraphWriter, PackedLinear
from owl_deploy.recipe import Precision

__all__ = ["onnxruntime_graph", "sparse_operator_graph"]

_OPSETS = {"": 21, "com.microsoft": 1}
_IR_VERSION = 10
_MICROSOFT: dict[str, Any] = {"_domain": "com.microsoft", "_version": 1}


def onnxruntime_graph(decoder: Decoder) -> tuple[onnx.ModelProto, dict[str, WeightSource]]:
    """Write a decoder with grouped-query attention as one operator, rotary embedding inside.

    Inputs for T tokens after P positions of cache: `input_ids` (batch, T) int64, `attention_mask`
    (batch, P + T) int64, `past_key_values.{i}.key|value` (batch, n_kv_heads, P, head_dim) float32.
    Outputs, float32: `logits` (batch, T, vocab_size), `present.{i}.key|value`
    (batch, n_kv_heads, P + T, head_dim). Where past and present are bound to one buffer, the
    cache is updated in place.

    A tied head is stored once, as (hidden, vocab): the head multiplies it as it lies, and the
    embedding gathers columns (one per token, which costs nothing beside the head).

    Returns:
        The model without its weights, and initializer name -> where that weight comes from.

    Raises:
        UnsupportedModelError: the heads are of a size that the operator does not take.
    """
    writer = GraphWriter(opsets=_OPSETS, ir_version=_IR_VERSION)
    _write(writer, decoder)
    return writer.model(), writer.weights


def sparse_operator_graph(
    decoder: Decoder, *, precision: Precision, head_precision: Precision
) -> tuple[onnx.ModelProto, dict[str, WeightSource], dict[str, PackedLinear]]:
    """Write the same decoder with SparseMatMul in place of every MatMul.

    A tied head is stored once here too: the embedding gathers rows out of the packed matrix.

    Args:
        decoder: its shape.
        precision: number format of the matrices in the blocks.
        head_precision: that of head and embedding.

    Returns:
        The model without its weights, initializer name -> source of its norms, and name -> what is packed.

    Raises:
        UnsupportedModelError: the heads are of a size that attention does not take, or rows of the embedding of a
            length that cannot be gathered.
    """
    opsets = {**_OPSETS, OPERATOR_DOMAIN: 1}
    writer = PackedGraphWriter(precision, head_precision, opsets=opsets, ir_version=_IR_VERSION)
    _write(writer, decoder)
    return writer.model(), writer.weights, writer.packed


def _write(writer: GraphWriter, decoder: Decoder) -> None:
    """Write the whole graph."""
    if decoder.head_dim % 16:
        raise UnsupportedModelError(
            f"head size {decoder.head_dim}: ONNX Runtime's GroupQueryAttention rotates heads of a multiple of 16 only"
        )
    op = writer.op
    input_ids = writer.int64_input("input_ids", ["batch", "tokens"])
    mask = writer.int64_input("attention_mask", ["batch", "positions"])
    cache_shape: list[str | int] = ["batch", decoder.n_kv_heads, "past", decoder.head_dim]
    past = [writer.float_input(f"past_key_values.{name}", cache_shape) for name in decoder.kv_names]

    lengths = op.Cast(op.Sub(op.ReduceSum(mask, [1], keepdims=0), [1]), to=ir.DataType.INT32)
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2), [0]), to=ir.DataType.INT32)
    rotary = [writer.constant(decoder.cos, "rotary.cos"), writer.constant(decoder.sin, "rotary.sin")]
    positions = [lengths, total, *rotary]

    residual = _embedding(writer, decoder, input_ids)
    norm = writer.weight("model.layers.0.input_layernorm.weight", (decoder.hidden_size,))
    hidden = op.SimplifiedLayerNormalization(residual, norm, axis=-1, epsilon=decoder.rms_norm_eps, stash_type=1)
    present: list[ir.Value] = []
    for i in range(decoder.n_blocks):
        name = f"model.layers.{i}"
        attended, cache = _attention(writer, decoder, hidden, f"{name}.self_attn", past[2 * i : 2 * i + 2], positions)
        present += cache
        hidden, residual = _add_and_norm(writer, decoder, attended, residual, f"{name}.post_attention_layernorm.weight")
        next_norm = f"model.layers.{i + 1}.input_layernorm.weight" if i + 1 < decoder.n_blocks else "model.norm.weight"
        hidden, residual = _add_and_norm(
            writer, decoder, _mlp(writer, decoder, hidden, f"{name}.mlp"), residual, next_norm
        )
    head = "model.embed_tokens" if decoder.has_tied_head else "lm_head"
    logits = writer.linear(hidden, head, decoder.hidden_size, decoder.vocab_size)

    writer.output(logits, "logits", ["batch", "tokens", decoder.vocab_size])
    for name, value in zip(decoder.kv_names, present, strict=True):
        writer.output(value, f"present.{name}", ["batch", decoder.n_kv_heads, "positions", decoder.head_dim])


def _embedding(writer: GraphWriter, decoder: Decoder, input_ids: ir.Value) -> ir.Value:
    """Rows of the embedding, (batch, T, hidden_size)."""
    if isinstance(writer, PackedGraphWriter):
        return writer.rows(input_ids, "model.embed_tokens", (decoder.vocab_size, decoder.hidden_size))
    op, tensor = writer.op, "model.embed_tokens.weight"
    if not decoder.has_tied_head:
        return op.Gather(writer.weight(tensor, (decoder.vocab_size, decoder.hidden_size)), input_ids)
    columns = op.Gather(
        writer.weight(tensor, (decoder.hidden_size, decoder.vocab_size), is_transposed=True), input_ids, axis=1
    )
    return op.Transpose(columns, perm=[1, 2, 0])


def _attention(
    writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str, past: list[ir.Value], positions: list[ir.Value]
) -> tuple[ir.Value, list[ir.Value]]:
    """Attention of one block; also returns its present key and value."""
    size, head_dim = decoder.hidden_size, decoder.head_dim
    n_query, n_key = decoder.n_heads * head_dim, decoder.n_kv_heads * head_dim
    parts = {"q_proj": n_query, "k_proj": n_key, "v_proj": n_key}
    query_key_value = writer.linears(hidden, name, parts, size, has_bias=decoder.has_qkv_bias)
    # Stacked, all three are the operator's first input.
    query, key, value = query_key_value if len(query_key_value) == 3 else (*query_key_value, None, None)
    mixed, present_key, present_value = writer.op.GroupQueryAttention(
        query,
        key,
        value,
        *past,
        *positions,
        num_heads=decoder.n_heads,
        kv_num_heads=decoder.n_kv_heads,
        scale=head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=decoder.sliding_window or -1,
        _outputs=3,
        **_MICROSOFT,
    )
    attended = writer.linear(mixed, f"{name}.o_proj", n_query, size, has_bias=decoder.has_o_bias)
    return attended, [present_key, present_value]


def _mlp(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str) -> ir.Value:
    """Gated MLP of one block: down(silu(gate(x)) * up(x))."""
    op, outer, inner = writer.op, decoder.hidden_size, decoder.intermediate_size
    gate_up = writer.linears(hidden, name, {"gate_proj": inner, "up_proj": inner}, outer, has_bias=decoder.has_mlp_bias)
    gate, up = gate_up if len(gate_up) == 2 else op.Split(*gate_up, axis=-1, num_outputs=2, _outputs=2)
    # QuickGelu(x) = x * sigmoid(alpha x): with alpha 1 it is SiLU in one node.
    silu = op.QuickGelu(gate, alpha=1.0, **_MICROSOFT)
    return writer.linear(op.Mul(silu, up), f"{name}.down_proj", inner, outer, has_bias=decoder.has_mlp_bias)


def _add_and_norm(
    writer: GraphWriter, decoder: Decoder, update: ir.Value, residual: ir.Value, norm: str
) -> tuple[ir.Value, ir.Value]:
    """Add an update to the residual stream; returns the normalised sum and the sum."""
    normed, _, _, total = writer.op.SkipSimplifiedLayerNormalization(
        residual,
        update,
        writer.weight(norm, (decoder.hidden_size,)),
        epsilon=decoder.rms_norm_eps,
        _outputs=4,
        **_MICROSOFT,
    )
    return normed, total
