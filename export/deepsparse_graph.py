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

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from owl_deploy.export.activation_quantization import QuantizationPlan
from owl_deploy.export.decoder import Activation, Decoder, RotaryTables, WeightSource
from owl_deploy.export.graph import GraphWriter
from owl_deploy.export.int8_graph import Int8GraphWriter, Int8Linear

__all__ = ["deepsparse_graph", "deepsparse_int8_graph"]

# DeepSparse 1.8.0 reads models with ONNX Runtime 1.15: opset 19 and IR 9 at most. At opset 17
# ReduceMean still has its axes as an attribute, which is the form that SparseML exports.
_OPSETS = {"": 17}
_IR_VERSION = 8


@dataclass(frozen=True)
class _Rotary:
    """Rows of the rotary tables that belong to the tokens of a call, as they are multiplied."""

    cos: ir.Value
    """(1, 1, T, head_dim), 1 where nothing is rotated."""
    signed_sin: ir.Value
    """(1, 1, T, head_dim), each half's sign in it, 0 where nothing is rotated."""
    n_pairs: int


def deepsparse_graph(decoder: Decoder) -> tuple[onnx.ModelProto, dict[str, WeightSource]]:
    """Write a decoder as a graph of standard operators for batch 1, with a KV cache.

    Inputs for T tokens after P positions of cache, S = P + T; all int64 except the cache:
    `input_ids` (1, T), `attention_mask` (1, S), `past_key_values.{i}.key|value`
    (1, n_kv_heads, P, head_dim) float32, `positions` (1, T), `causal_mask` (1, 1, T, S) with
    1 = visible. The cache's last position is the one before the first token; a cache that is
    not full is padded in front, and its padding masked.
    Outputs, float32: `logits` (1, T, vocab_size), or (1, 1, vocab_size) as `FIRST_LOGIT` says,
    `present.{i}.key|value` (1, n_kv_heads, S, head_dim).

    Returns:
        The model without its weights, and initializer name -> where that weight comes from.
    """
    writer = GraphWriter(opsets=_OPSETS, ir_version=_IR_VERSION)
    _write(writer, decoder)
    return writer.model(), writer.weights


def deepsparse_int8_graph(
    decoder: Decoder, plan: QuantizationPlan
) -> tuple[onnx.ModelProto, dict[str, WeightSource], dict[str, Int8Linear]]:
    """Write the same decoder with products of 8-bit integers.

    Returns:
        The model without its weights, initializer name -> source of what stays float32, and name -> what is integers.
    """
    writer = Int8GraphWriter(plan, opsets=_OPSETS, ir_version=_IR_VERSION)
    _write(writer, decoder)
    return writer.model(), writer.weights, writer.integers


def _write(writer: GraphWriter, decoder: Decoder) -> None:
    """Write the whole graph."""
    op, names = writer.op, decoder.names
    input_ids = writer.int64_input("input_ids", ["batch", "input_ids_len"])
    # No node reads it, causal_mask says all of it; but the pipeline takes the second input for it.
    writer.int64_input("attention_mask", ["batch", "sequence_len"])
    cache_shape: list[str | int] = ["batch", decoder.n_kv_heads, "past_sequence_len", decoder.head_dim]
    past = [writer.float_input(f"past_key_values.{name}", cache_shape) for name in decoder.kv_names]
    positions = writer.int64_input("positions", ["batch", "input_ids_len"])
    visible = writer.int64_input("causal_mask", ["batch", 1, "input_ids_len", "sequence_len"])
    windows = dict.fromkeys(block.sliding_window for block in decoder.blocks)
    masks = {window: _additive_mask(writer, window, visible) for window in windows}
    rotary: dict[str | None, _Rotary | None] = {None: None}
    for name, tables in decoder.rotary.items():
        rotary[name] = _rotary_rows(writer, name, tables, decoder.head_dim, positions)

    hidden = _embedding(writer, decoder, input_ids, positions)
    present: list[ir.Value] = []
    for i, block in enumerate(decoder.blocks):
        name = f"{names.blocks}.{i}"
        normed = _norm(writer, decoder, hidden, f"{name}.{names.attention_norm}")
        update, cache = _attention(
            writer,
            decoder,
            normed,
            f"{name}.{names.attention}",
            past[2 * i : 2 * i + 2],
            masks[block.sliding_window],
            rotary[block.rotary],
        )
        present += cache
        if names.attention_update_norm is not None:
            update = _norm(writer, decoder, update, f"{name}.{names.attention_update_norm}")
        hidden = op.Add(hidden, update)
        normed = _norm(writer, decoder, hidden, f"{name}.{names.mlp_norm}")
        update = _mlp(writer, decoder, normed, f"{name}.{names.mlp}".removesuffix("."))
        if names.mlp_update_norm is not None:
            update = _norm(writer, decoder, update, f"{name}.{names.mlp_update_norm}")
        hidden = op.Add(hidden, update)
    hidden = _norm(writer, decoder, hidden, names.final_norm)
    # A tied head is stored a second time, as (hidden, vocab): a Transpose in the graph would run at every step.
    # From 0 on: DeepSparse 1.8.0 compiles no slice that begins at -2^31.
    logits = writer.linear(writer.kept_tokens(hidden, first=0), decoder.head, decoder.hidden_size, decoder.vocab_size)
    logits = _capped(writer, logits, decoder.logit_softcap)

    writer.output(logits, "logits", ["batch", "input_ids_len", decoder.vocab_size])
    for name, value in zip(decoder.kv_names, present, strict=True):
        writer.output(value, f"present.{name}", ["batch", decoder.n_kv_heads, "sequence_len", decoder.head_dim])


def _embedding(writer: GraphWriter, decoder: Decoder, input_ids: ir.Value, positions: ir.Value) -> ir.Value:
    """What the first block reads of each token and its position, (1, T, hidden_size)."""
    op, names, size = writer.op, decoder.names, decoder.hidden_size
    rows = op.Gather(writer.weight(f"{names.embedding}.weight", (decoder.vocab_size, size)), input_ids)
    if decoder.embedding_scale != 1:
        rows = op.Mul(rows, decoder.embedding_scale)
    if names.positions is None:
        return rows
    table = writer.weight(f"{names.positions}.weight", (decoder.n_position_rows, size))
    return op.Add(rows, op.Gather(table, op.Add(positions, decoder.position_offset)))


def _attention(
    writer: GraphWriter,
    decoder: Decoder,
    hidden: ir.Value,
    name: str,
    past: list[ir.Value],
    mask: ir.Value,
    rotary: _Rotary | None,
) -> tuple[ir.Value, list[ir.Value]]:
    """Attend, with the query heads that share a key head stacked as rows of one matrix.

    So no key is repeated: (1, n_heads, T, D) and (1, n_kv_heads, repeats * T, D) are the same bytes.
    The scores go back to (1, n_heads, T, S) to be masked, because DeepSparse 1.8.0 aborts
    (graph.cpp:925) where the mask is repeated for the stacked rows instead.

    Returns:
        The block's contribution (1, T, hidden_size), and its present key and value.
    """
    op, names, head_dim = writer.op, decoder.names, decoder.head_dim
    n_heads, n_kv_heads, sizes = decoder.n_heads, decoder.n_kv_heads, decoder.qkv_sizes
    projected = _linears(writer, decoder, hidden, name, names.query_key_value, sizes, has_bias=decoder.has_qkv_bias)
    query, key, value = (
        op.Transpose(op.Reshape(flat, [1, -1, size // head_dim, head_dim]), perm=[0, 2, 1, 3])
        for flat, size in zip(projected, sizes, strict=True)
    )
    if names.head_norms is not None:
        query, key = (
            _norm(writer, decoder, heads, f"{name}.{norm}", head_dim)
            for heads, norm in zip((query, key), names.head_norms, strict=True)
        )
    if rotary is not None:
        query, key = _rotate(writer, query, rotary, head_dim), _rotate(writer, key, rotary, head_dim)
    key = op.Concat(past[0], key, axis=2)
    value = op.Concat(past[1], value, axis=2)

    rows = op.Reshape(query, [1, n_kv_heads, -1, head_dim])
    scores = op.Mul(op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2])), decoder.query_scale)
    scores = _capped(writer, scores, decoder.attention_softcap)
    # In a Reshape, 0 copies a length from the input: here S, while -1 finds T.
    weights = op.Softmax(op.Add(op.Reshape(scores, [1, n_heads, -1, 0]), mask), axis=-1)
    mixed = op.MatMul(op.Reshape(weights, [1, n_kv_heads, -1, 0]), value)
    merged = op.Transpose(op.Reshape(mixed, [1, n_heads, -1, head_dim]), perm=[0, 2, 1, 3])
    merged = op.Reshape(merged, [1, -1, n_heads * head_dim])
    output = f"{name}.{names.attention_output}"
    attended = writer.linear(merged, output, sizes[0], decoder.hidden_size, has_bias=decoder.has_output_bias)
    return attended, [key, value]


def _linears(
    writer: GraphWriter,
    decoder: Decoder,
    hidden: ir.Value,
    block: str,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    *,
    has_bias: bool,
) -> list[ir.Value]:
    """Outputs of several linears of a block, or the parts of one that is all of them stacked."""
    if len(names) == len(sizes):
        return [
            writer.linear(hidden, f"{block}.{name}", decoder.hidden_size, n_out, has_bias=has_bias)
            for name, n_out in zip(names, sizes, strict=True)
        ]
    stacked = writer.linear(hidden, f"{block}.{names[0]}", decoder.hidden_size, sum(sizes), has_bias=has_bias)
    return list(writer.op.Split(stacked, list(sizes), axis=-1, _outputs=len(sizes)))


def _rotate(writer: GraphWriter, heads: ir.Value, rotary: _Rotary, head_dim: int) -> ir.Value:
    """Turn pairs (j, j + n_pairs) of (1, heads, T, head_dim) by their position's angle; the rest stays."""
    op, half = writer.op, rotary.n_pairs
    swapped = [op.Slice(heads, [half], [2 * half], [3]), op.Slice(heads, [0], [half], [3])]
    if 2 * half < head_dim:
        swapped.append(op.Slice(heads, [2 * half], [head_dim], [3]))
    return op.Add(op.Mul(heads, rotary.cos), op.Mul(op.Concat(*swapped, axis=-1), rotary.signed_sin))


def _mlp(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str) -> ir.Value:
    """MLP of one block: down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
    outer, inner, has_bias = decoder.hidden_size, decoder.intermediate_size, decoder.has_mlp_bias
    sizes = (inner, inner) if decoder.is_gated else (inner,)
    first, *others = _linears(writer, decoder, hidden, name, decoder.names.mlp_inputs, sizes, has_bias=has_bias)
    product = _activation(writer, decoder.activation, first)
    for up in others:
        product = writer.op.Mul(product, up)
    return writer.linear(product, f"{name}.{decoder.names.mlp_output}", inner, outer, has_bias=has_bias)


def _activation(writer: GraphWriter, activation: Activation, value: ir.Value) -> ir.Value:
    op = writer.op
    if activation == "relu":
        return op.Relu(value)
    if activation == "silu":
        return op.Mul(value, op.Sigmoid(value))
    if activation == "gelu":
        share = op.Erf(op.Mul(value, 0.5**0.5))
    else:
        cubed = op.Mul(op.Mul(value, value), value)
        share = op.Tanh(op.Mul(op.Add(value, op.Mul(cubed, 0.044715)), (2 / math.pi) ** 0.5))
    return op.Mul(op.Mul(value, 0.5), op.Add(share, 1.0))


def _capped(writer: GraphWriter, value: ir.Value, cap: float | None) -> ir.Value:
    op = writer.op
    return value if cap is None else op.Mul(op.Tanh(op.Div(value, cap)), cap)


def _norm(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str, size: int | None = None) -> ir.Value:
    """Normalise the last axis, of `size` or of the hidden size."""
    op = writer.op
    gain, *bias = writer.norm_weights(name, size or decoder.hidden_size, kind=decoder.norm, offset=decoder.norm_offset)
    if decoder.norm == "layer":
        hidden = op.Sub(hidden, op.ReduceMean(hidden, axes=[-1], keepdims=1))
    mean_square = op.ReduceMean(op.Mul(hidden, hidden), axes=[-1], keepdims=1)
    scale = op.Sqrt(op.Add(mean_square, decoder.norm_epsilon))
    normed = op.Mul(op.Div(hidden, scale), gain)
    return op.Add(normed, *bias) if bias else normed


def _rotary_rows(writer: GraphWriter, name: str, tables: RotaryTables, head_dim: int, positions: ir.Value) -> _Rotary:
    """Gather the rows of a rotary embedding.

    Tables, because DeepSparse 1.8.0 aborts on a graph that computes Cos and Sin.
    """
    op, cos, sin = writer.op, tables.cos, tables.sin
    n_pairs = cos.shape[1]
    rest = np.zeros((len(cos), head_dim - 2 * n_pairs), np.float32)
    cos_table = writer.constant(np.hstack([cos, cos, rest + 1]), f"{name}.cos")
    sin_table = writer.constant(np.hstack([-sin, sin, rest]), f"{name}.signed_sin")
    cos_rows, sin_rows = (op.Unsqueeze(op.Gather(table, positions), [1]) for table in (cos_table, sin_table))
    return _Rotary(cos_rows, sin_rows, n_pairs)


def _additive_mask(writer: GraphWriter, sliding_window: int | None, visible: ir.Value) -> ir.Value:
    """(1, 1, T, S) of 1 = visible and 0 -> 0 and the lowest float, to be added to scores."""
    op = writer.op
    is_visible = op.Cast(visible, to=ir.DataType.FLOAT)
    if sliding_window is not None:
        is_visible = op.Mul(is_visible, _within_window(writer, sliding_window, visible))
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
