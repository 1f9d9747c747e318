"""The decoder graph as DeepSparse 1.8.0 wants it: standard ONNX operators only, opset 17, IR 8.

In: the shape of a decoder. Out: a graph of nodes and small constants, and for every weight the
checkpoint tensor that fills it. No weight is read here, and nothing is known of files, sparsity
or sessions.

Inputs and outputs carry the names and the layout of SparseML's exports with a KV cache, so that
DeepSparse's `TextGeneration` pipeline and `deepsparse.benchmark` take the same file. All lengths
are symbolic in the file because that pipeline compiles one file twice, for one token and for a
chunk of the prompt, by writing numbers over them; the compiler itself wants numbers.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from owl_deploy.export.decoder import Decoder, WeightSource
from owl_deploy.export.graph import GraphWriter

__all__ = ["deepsparse_graph"]

# DeepSparse 1.8.0 reads models with ONNX Runtime 1.15: opset 19 and IR 9 at most. At opset 17
# ReduceMean still has its axes as an attribute, which is the form that SparseML exports.
_OPSETS = {"": 17}
_IR_VERSION = 8


def deepsparse_graph(decoder: Decoder) -> tuple[onnx.ModelProto, dict[str, WeightSource]]:
    """Write a decoder as a graph of standard operators for batch 1, with a KV cache.

    Inputs for T tokens after P positions of cache, S = P + T; all int64 except the cache:
    `input_ids` (1, T), `attention_mask` (1, S), `past_key_values.{i}.key|value`
    (1, n_kv_heads, P, head_dim) float32, `positions` (1, T), `causal_mask` (1, 1, T, S) with
    1 = visible. The cache's last position is the one before the first token; a cache that is
    not full is padded in front, and its padding masked.
    Outputs, float32: `logits` (1, T, vocab_size), `present.{i}.key|value`
    (1, n_kv_heads, S, head_dim).

    Returns:
        The model without its weights, and initializer name -> where that weight comes from.
    """
    writer = GraphWriter(opsets=_OPSETS, ir_version=_IR_VERSION)
    op = writer.op
    input_ids = writer.int64_input("input_ids", ["batch", "input_ids_len"])
    # No node reads it, causal_mask says all of it; but the pipeline takes the second input for it.
    writer.int64_input("attention_mask", ["batch", "sequence_len"])
    cache_shape: list[str | int] = ["batch", decoder.n_kv_heads, "past_sequence_len", decoder.head_dim]
    past = [writer.float_input(f"past_key_values.{name}", cache_shape) for name in decoder.kv_names]
    positions = writer.int64_input("positions", ["batch", "input_ids_len"])
    visible = writer.int64_input("causal_mask", ["batch", 1, "input_ids_len", "sequence_len"])
    mask = _additive_mask(writer, decoder, visible)
    rotary = _rotary_rows(writer, decoder, positions)

    hidden = op.Gather(writer.weight("model.embed_tokens.weight", (decoder.vocab_size, decoder.hidden_size)), input_ids)
    present: list[ir.Value] = []
    for i in range(decoder.n_blocks):
        name = f"model.layers.{i}"
        normed = _rms_norm(writer, decoder, hidden, f"{name}.input_layernorm.weight")
        attended, cache = _attention(
            writer, decoder, normed, f"{name}.self_attn", past[2 * i : 2 * i + 2], mask, rotary
        )
        present += cache
        hidden = op.Add(hidden, attended)
        normed = _rms_norm(writer, decoder, hidden, f"{name}.post_attention_layernorm.weight")
        hidden = op.Add(hidden, _mlp(writer, decoder, normed, f"{name}.mlp"))
    hidden = _rms_norm(writer, decoder, hidden, "model.norm.weight")
    # A tied head is stored a second time, as (hidden, vocab): a Transpose in the graph would run at every step.
    head = "model.embed_tokens" if decoder.has_tied_head else "lm_head"
    logits = writer.linear(hidden, head, decoder.hidden_size, decoder.vocab_size)

    writer.output(logits, "logits", ["batch", "input_ids_len", decoder.vocab_size])
    for name, value in zip(decoder.kv_names, present, strict=True):
        writer.output(value, f"present.{name}", ["batch", decoder.n_kv_heads, "sequence_len", decoder.head_dim])
    return writer.model(), writer.weights


def _attention(
    writer: GraphWriter,
    decoder: Decoder,
    hidden: ir.Value,
    name: str,
    past: list[ir.Value],
    mask: ir.Value,
    rotary: tuple[ir.Value, ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    """Attend, with the query heads that share a key head stacked as rows of one matrix.

    So no key is repeated: (1, n_heads, T, D) and (1, n_kv_heads, repeats * T, D) are the same bytes.
    The scores go back to (1, n_heads, T, S) to be masked, because DeepSparse 1.8.0 aborts
    (graph.cpp:925) where the mask is repeated for the stacked rows instead.

    Returns:
        The block's contribution (1, T, hidden_size), and its present key and value.
    """
    op, head_dim = writer.op, decoder.head_dim
    n_heads, n_kv_heads = decoder.n_heads, decoder.n_kv_heads
    query, key, value = (
        _heads(writer, decoder, hidden, f"{name}.{part}_proj", n)
        for part, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
    )
    key = op.Concat(past[0], _rotate(writer, decoder, key, rotary), axis=2)
    value = op.Concat(past[1], value, axis=2)

    rows = op.Reshape(_rotate(writer, decoder, query, rotary), [1, n_kv_heads, -1, head_dim])
    scores = op.Mul(op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2])), head_dim**-0.5)
    # In a Reshape, 0 copies a length from the input: here S, while -1 finds T.
    weights = op.Softmax(op.Add(op.Reshape(scores, [1, n_heads, -1, 0]), mask), axis=-1)
    mixed = op.MatMul(op.Reshape(weights, [1, n_kv_heads, -1, 0]), value)
    merged = op.Transpose(op.Reshape(mixed, [1, n_heads, -1, head_dim]), perm=[0, 2, 1, 3])
    merged = op.Reshape(merged, [1, -1, n_heads * head_dim])
    attended = writer.linear(
        merged, f"{name}.o_proj", n_heads * head_dim, decoder.hidden_size, has_bias=decoder.has_o_bias
    )
    return attended, [key, value]


def _heads(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str, n_heads: int) -> ir.Value:
    """Project (1, T, hidden_size) to (1, n_heads, T, head_dim)."""
    op, size = writer.op, n_heads * decoder.head_dim
    flat = writer.linear(hidden, name, decoder.hidden_size, size, has_bias=decoder.has_qkv_bias)
    return op.Transpose(op.Reshape(flat, [1, -1, n_heads, decoder.head_dim]), perm=[0, 2, 1, 3])


def _rotate(writer: GraphWriter, decoder: Decoder, heads: ir.Value, rotary: tuple[ir.Value, ir.Value]) -> ir.Value:
    """Turn each pair (j, j + head_dim / 2) of (1, heads, T, head_dim) by its position's angle."""
    op, half = writer.op, decoder.head_dim // 2
    first = op.Slice(heads, [0], [half], [3])
    second = op.Slice(heads, [half], [2 * half], [3])
    cos, signed_sin = rotary
    return op.Add(op.Mul(heads, cos), op.Mul(op.Concat(second, first, axis=-1), signed_sin))


def _mlp(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str) -> ir.Value:
    op, outer, inner = writer.op, decoder.hidden_size, decoder.intermediate_size
    gate = writer.linear(hidden, f"{name}.gate_proj", outer, inner, has_bias=decoder.has_mlp_bias)
    up = writer.linear(hidden, f"{name}.up_proj", outer, inner, has_bias=decoder.has_mlp_bias)
    product = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
    return writer.linear(product, f"{name}.down_proj", inner, outer, has_bias=decoder.has_mlp_bias)


def _rms_norm(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, weight: str) -> ir.Value:
    op = writer.op
    mean_square = op.ReduceMean(op.Mul(hidden, hidden), axes=[-1], keepdims=1)
    scale = op.Sqrt(op.Add(mean_square, decoder.rms_norm_eps))
    return op.Mul(op.Div(hidden, scale), writer.weight(weight, (decoder.hidden_size,)))


def _rotary_rows(writer: GraphWriter, decoder: Decoder, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows (1, 1, T, head_dim) of the cosine table, and of the sine table with each half's sign in it.

    Tables, because DeepSparse 1.8.0 aborts on a graph that computes Cos and Sin.
    """
    op, cos, sin = writer.op, decoder.cos, decoder.sin
    cos_table = writer.constant(np.hstack([cos, cos]), "rotary.cos")
    sin_table = writer.constant(np.hstack([-sin, sin]), "rotary.signed_sin")
    return op.Unsqueeze(op.Gather(cos_table, positions), [1]), op.Unsqueeze(op.Gather(sin_table, positions), [1])


def _additive_mask(writer: GraphWriter, decoder: Decoder, visible: ir.Value) -> ir.Value:
    """(1, 1, T, S) of 1 = visible and 0 -> 0 and the lowest float, to be added to scores."""
    op = writer.op
    is_visible = op.Cast(visible, to=ir.DataType.FLOAT)
    if decoder.sliding_window is not None and decoder.sliding_window < decoder.max_positions:
        is_visible = op.Mul(is_visible, _within_window(writer, decoder.sliding_window, visible))
    return op.Mul(op.Sub(is_visible, 1.0), -float(np.finfo(np.float32).min))


def _within_window(writer: GraphWriter, sliding_window: int, visible: ir.Value) -> ir.Value:
    """(T, S) of 1 where a position lies less than `sliding_window` positions back, and 0.

    Made of shapes alone, so that it is folded to a constant as soon as the lengths are numbers.
    Counting visible positions with CumSum is shorter, and made DeepSparse 1.8.0 hand the whole
    graph back to ONNX Runtime (fraction of supported operators 0).
    """
    op = writer.op
    n_new = op.Squeeze(op.Shape(visible, start=2, end=3), [0])
    n_all = op.Squeeze(op.Shape(visible, start=3, end=4), [0])
    query = op.Range(op.Sub(n_all, n_new), n_all, 1)
    key = op.Range(0, n_all, 1)
    distance = op.Sub(op.Unsqueeze(query, [1]), op.Unsqueeze(key, [0]))
    return op.Cast(op.Less(distance, sliding_window), to=ir.DataType.FLOAT)
