"""The decoder graph as ONNX Runtime runs it best: eight to twelve nodes a block, with its contrib operators.

In: the shape of a decoder. Out: a graph of nodes and small constants, and for every weight the
checkpoint tensor that fills it. Inputs and outputs carry the names of onnxruntime-genai's model
builder, so that the same folder runs there.

The linears are plain MatMuls, SparseMatMuls of the operator library or MatMulNBits: query, key and value are then one
product, gate and up another, and a block has ten nodes. Norms of what a block adds, or of its heads, are nodes more.
With the operator library attention and the gated unit are its operators too, and a block has eight nodes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.decoder import Activation, Block, Decoder, WeightSource
from owl_deploy.export.graph import GraphWriter
from owl_deploy.export.nbits_graph import NBitsGraphWriter, NBitsLinear
from owl_deploy.export.packed_graph import OPERATOR_DOMAIN, OPERATORS, PackedGraphWriter, PackedLinear
from owl_deploy.recipe import Precision

__all__ = ["ALL_TOKENS", "nbits_graph", "onnxruntime_graph", "sparse_operator_graph"]

_OPSETS = {"": 21, "com.microsoft": 1}
_IR_VERSION = 10
ALL_TOKENS = -(2**31)
"""What `FIRST_LOGIT` holds. Not 0: the engine removes a slice that begins there before it looks for a number put in its
place."""
_MICROSOFT: dict[str, Any] = {"_domain": "com.microsoft", "_version": 1}
_GATED_UNITS: dict[Activation, str] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What the operator library's GatedLinearUnit calls the activations that it has."""


def onnxruntime_graph(
    decoder: Decoder, *, matrix_type: Literal["fp32", "fp16"] = "fp32"
) -> tuple[onnx.ModelProto, dict[str, WeightSource]]:
    """Write a decoder with grouped-query attention as one operator, rotary embedding inside.

    Inputs for T tokens after P positions of cache: `input_ids` (batch, T) int64, `attention_mask`
    (batch, P + T) int64, `past_key_values.{i}.key|value` (batch, n_kv_heads, P, head_dim) float32.
    Outputs, float32: `logits` (batch, T, vocab_size), or (batch, 1, vocab_size) as `FIRST_LOGIT` says,
    `present.{i}.key|value` (batch, n_kv_heads, P + T, head_dim). Where past and present are bound to one buffer, the
    cache is updated in place.

    A tied head is stored once, as (hidden, vocab): the head multiplies it as it lies, and the
    embedding gathers columns (one per token, which costs nothing beside the head).

    Returns:
        The model without its weights, and initializer name -> where that weight comes from.

    Raises:
        UnsupportedModelError: the heads are of a size that the operator does not take.
    """
    writer = GraphWriter(opsets=_OPSETS, ir_version=_IR_VERSION, matrix_type=matrix_type)
    _write(writer, decoder)
    return writer.model(), writer.weights


def sparse_operator_graph(
    decoder: Decoder, *, precision: Precision, head_precision: Precision
) -> tuple[onnx.ModelProto, dict[str, WeightSource], dict[str, PackedLinear]]:
    """Write the same decoder with SparseMatMul in place of every MatMul, and attention of the same library.

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


def nbits_graph(
    decoder: Decoder, *, precision: Precision, head_precision: Precision, is_symmetric: bool, accuracy_level: int
) -> tuple[onnx.ModelProto, dict[str, WeightSource], dict[str, NBitsLinear]]:
    """Write the same decoder with ONNX Runtime's MatMulNBits in place of every MatMul.

    Args:
        decoder: its shape.
        precision: int8 or int4, of the matrices in the blocks.
        head_precision: that of head and embedding, or fp32.
        is_symmetric: whether blocks have scales alone, and no zero points.
        accuracy_level: of the operator: 1 multiplies in float32, 4 in int8.

    Returns:
        The model without its weights, initializer name -> source of what is not quantised, and name -> what is.

    Raises:
        UnsupportedModelError: the heads are of a size that attention does not take, or rows of the embedding of a
            length that cannot be gathered.
    """
    writer = NBitsGraphWriter(
        precision,
        head_precision,
        is_symmetric=is_symmetric,
        accuracy_level=accuracy_level,
        opsets=_OPSETS,
        ir_version=_IR_VERSION,
    )
    _write(writer, decoder)
    return writer.model(), writer.weights, writer.quantized


def _write(writer: GraphWriter, decoder: Decoder) -> None:
    """Write the whole graph."""
    if not writer.has_operators:
        _refuse_heads(decoder)
    op, names = writer.op, decoder.names
    input_ids = writer.int64_input("input_ids", ["batch", "tokens"])
    mask = writer.int64_input("attention_mask", ["batch", "positions"])
    cache_shape: list[str | int] = ["batch", decoder.n_kv_heads, "past", decoder.head_dim]
    past = [writer.float_input(f"past_key_values.{name}", cache_shape) for name in decoder.kv_names]

    lengths = op.Cast(op.Sub(op.ReduceSum(mask, [1], keepdims=0), [1]), to=ir.DataType.INT32)
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2), [0]), to=ir.DataType.INT32)
    # Inputs of attention behind the cache, by the rotary tables of a block.
    positions: dict[str | None, list[ir.Value]] = {None: [lengths, total]}
    for name, table in decoder.rotary.items():
        tables = [writer.constant(table.cos, f"{name}.cos"), writer.constant(table.sin, f"{name}.sin")]
        positions[name] = [lengths, total, *tables]

    residual = _embedding(writer, decoder, input_ids, mask)
    hidden = _norm(writer, decoder, residual, f"{names.blocks}.0.{names.attention_norm}")
    present: list[ir.Value] = []
    for i, block in enumerate(decoder.blocks):
        name = f"{names.blocks}.{i}"
        is_last = i + 1 == decoder.n_blocks
        next_norm = names.final_norm if is_last else f"{names.blocks}.{i + 1}.{names.attention_norm}"
        attended, cache = _attention(
            writer,
            decoder,
            block,
            hidden,
            f"{name}.{names.attention}",
            past[2 * i : 2 * i + 2],
            positions[block.rotary],
        )
        present += cache
        if names.attention_update_norm is not None:
            attended = _norm(writer, decoder, attended, f"{name}.{names.attention_update_norm}")
        hidden, residual = _add_and_norm(writer, decoder, attended, residual, f"{name}.{names.mlp_norm}")
        update = _mlp(writer, decoder, hidden, f"{name}.{names.mlp}".removesuffix("."))
        if names.mlp_update_norm is not None:
            update = _norm(writer, decoder, update, f"{name}.{names.mlp_update_norm}")
        hidden, residual = _add_and_norm(writer, decoder, update, residual, next_norm)
    logits = writer.linear(
        writer.kept_tokens(hidden, first=ALL_TOKENS), decoder.head, decoder.hidden_size, decoder.vocab_size
    )
    if (cap := decoder.logit_softcap) is not None:
        logits = op.Mul(op.Tanh(op.Div(logits, cap)), cap)

    writer.output(logits, "logits", ["batch", "kept", decoder.vocab_size])
    for name, value in zip(decoder.kv_names, present, strict=True):
        writer.output(value, f"present.{name}", ["batch", decoder.n_kv_heads, "positions", decoder.head_dim])


def _refuse_heads(decoder: Decoder) -> None:
    """Refuse heads of a size that ONNX Runtime's GroupQueryAttention does not take."""
    n_rotated = {2 * table.cos.shape[1] for table in decoder.rotary.values()}
    if decoder.head_dim % (16 if n_rotated else 8):
        raise UnsupportedModelError(
            f"head size {decoder.head_dim}: ONNX Runtime's GroupQueryAttention takes heads of a multiple of 8, and "
            "rotates those of a multiple of 16 only"
        )
    for n in n_rotated:
        if n % 16:
            raise UnsupportedModelError(
                f"{n} rotary values of a head of {decoder.head_dim} (partial_rotary_factor): ONNX Runtime's "
                "GroupQueryAttention rotates a multiple of 16 only"
            )


def _embedding(writer: GraphWriter, decoder: Decoder, input_ids: ir.Value, mask: ir.Value) -> ir.Value:
    """What the first block reads of each token and its position, (batch, T, hidden_size)."""
    op, names, size = writer.op, decoder.names, decoder.hidden_size
    rows = writer.rows(input_ids, names.embedding, (decoder.vocab_size, size), is_multiplied=decoder.has_tied_head)
    if decoder.embedding_scale != 1:
        rows = op.Mul(rows, decoder.embedding_scale)
    if names.positions is None:
        return rows
    # The last T of the tokens counted so far; the first is number 1.
    first = op.Neg(op.Shape(input_ids, start=1, end=2))
    count = op.Slice(op.CumSum(mask, 1), first, [np.iinfo(np.int64).max], [1])
    table = writer.weight(f"{names.positions}.weight", (decoder.n_position_rows, size))
    return op.Add(rows, op.Gather(table, op.Add(count, [decoder.position_offset - 1])))


def _attention(
    writer: GraphWriter,
    decoder: Decoder,
    block: Block,
    hidden: ir.Value,
    name: str,
    past: list[ir.Value],
    positions: list[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    """Attention of one block; also returns its present key and value."""
    op, names, sizes = writer.op, decoder.names, decoder.qkv_sizes
    is_stacked = len(names.query_key_value) == 1
    parts = dict(zip(names.query_key_value, [sum(sizes)] if is_stacked else sizes, strict=True))
    query_key_value = writer.linears(hidden, name, parts, decoder.hidden_size, has_bias=decoder.has_qkv_bias)
    settings: dict[str, Any] = {
        "num_heads": decoder.n_heads,
        "kv_num_heads": decoder.n_kv_heads,
        "scale": decoder.query_scale,
        "softcap": decoder.attention_softcap or 0.0,
        "local_window_size": block.sliding_window or -1,
        "_outputs": 3,
    }
    if writer.has_operators:
        norms = [
            writer.weight(f"{name}.{norm}.weight", (decoder.head_dim,), offset=decoder.norm_offset)
            for norm in names.head_norms or ()
        ]
        tables: list[ir.Value | None] = [*positions[2:]] or [None, None]
        outputs = op.GroupQueryAttention(
            *query_key_value,
            *past,
            *positions[:2],
            *tables,
            *norms,
            epsilon=decoder.norm_epsilon,
            **settings,
            **OPERATORS,
        )
        return _attention_output(writer, decoder, outputs, name)
    if names.head_norms is not None:
        # GroupQueryAttention has inputs for these norms, which its CPU kernel refuses (1.31). So six nodes more, four
        # of them reshapes that move nothing: with 28 blocks, as in Qwen3-0.6B, 0.3 ms a token on two cores.
        query, key, value = _parts(writer, query_key_value, sizes)
        query = _norm_of_heads(writer, decoder, query, f"{name}.{names.head_norms[0]}", decoder.n_heads)
        key = _norm_of_heads(writer, decoder, key, f"{name}.{names.head_norms[1]}", decoder.n_kv_heads)
        query_key_value = [query, key, value]
    # Stacked, all three are the operator's first input.
    is_one = len(query_key_value) == 1
    outputs = op.GroupQueryAttention(
        *query_key_value,
        *([None, None] if is_one else []),
        *past,
        *positions,
        do_rotary=int(block.rotary is not None),
        rotary_interleaved=0,
        **settings,
        **_MICROSOFT,
    )
    return _attention_output(writer, decoder, outputs, name)


def _attention_output(
    writer: GraphWriter, decoder: Decoder, outputs: tuple[ir.Value, ...], name: str
) -> tuple[ir.Value, list[ir.Value]]:
    """Multiply what attention mixed by its output matrix; also returns the present key and value."""
    mixed, present_key, present_value = outputs
    attended = writer.linear(
        mixed,
        f"{name}.{decoder.names.attention_output}",
        decoder.qkv_sizes[0],
        decoder.hidden_size,
        has_bias=decoder.has_output_bias,
    )
    return attended, [present_key, present_value]


def _mlp(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str) -> ir.Value:
    """MLP of one block: down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""
    op, outer, inner = writer.op, decoder.hidden_size, decoder.intermediate_size
    inputs, has_bias = decoder.names.mlp_inputs, decoder.has_mlp_bias
    if decoder.is_gated:
        sizes = dict.fromkeys(inputs, 2 * inner // len(inputs))
        gate_up = writer.linears(hidden, name, sizes, outer, has_bias=has_bias)
        if writer.has_operators and (kind := _GATED_UNITS.get(decoder.activation)) is not None:
            product = op.GatedLinearUnit(*gate_up, activation=kind, **OPERATORS)
        else:
            gate, up = _parts(writer, gate_up, (inner, inner))
            product = op.Mul(_activation(writer, decoder, gate), up)
    else:
        product = _activation(
            writer, decoder, writer.linear(hidden, f"{name}.{inputs[0]}", outer, inner, has_bias=has_bias)
        )
    return writer.linear(product, f"{name}.{decoder.names.mlp_output}", inner, outer, has_bias=has_bias)


def _parts(writer: GraphWriter, values: list[ir.Value], sizes: tuple[int, ...]) -> list[ir.Value]:
    """Return the outputs of linears apart, (..., size) each, that may have been multiplied stacked."""
    if len(values) == len(sizes):
        return values
    return list(writer.op.Split(*values, list(sizes), axis=-1, _outputs=len(sizes)))


def _activation(writer: GraphWriter, decoder: Decoder, value: ir.Value) -> ir.Value:
    op = writer.op
    if decoder.activation == "relu":
        return op.Relu(value)
    if decoder.activation == "silu":
        # QuickGelu(x) = x * sigmoid(alpha x): with alpha 1 it is SiLU in one node.
        return op.QuickGelu(value, alpha=1.0, **_MICROSOFT)
    return op.Gelu(value, approximate="tanh" if decoder.activation == "gelu_pytorch_tanh" else "none")


def _norm(writer: GraphWriter, decoder: Decoder, hidden: ir.Value, name: str, size: int | None = None) -> ir.Value:
    """Normalise the last axis, of `size` or of the hidden size."""
    op, epsilon = writer.op, decoder.norm_epsilon
    weights = writer.norm_weights(name, size or decoder.hidden_size, kind=decoder.norm, offset=decoder.norm_offset)
    if decoder.norm == "layer":
        return op.LayerNormalization(hidden, *weights, axis=-1, epsilon=epsilon)
    return op.SimplifiedLayerNormalization(hidden, *weights, axis=-1, epsilon=epsilon, stash_type=1)


def _norm_of_heads(writer: GraphWriter, decoder: Decoder, flat: ir.Value, name: str, n_heads: int) -> ir.Value:
    """Normalise each head of (batch, T, n_heads * head_dim)."""
    op, head_dim = writer.op, decoder.head_dim
    # In a Reshape, 0 copies a length from the input.
    heads = _norm(writer, decoder, op.Reshape(flat, [0, 0, n_heads, head_dim]), name, head_dim)
    return op.Reshape(heads, [0, 0, n_heads * head_dim])


def _add_and_norm(
    writer: GraphWriter, decoder: Decoder, update: ir.Value, residual: ir.Value, norm: str
) -> tuple[ir.Value, ir.Value]:
    """Add an update to the residual stream; returns the normalised sum and the sum."""
    op = writer.op
    add_and_norm = op.SkipLayerNormalization if decoder.norm == "layer" else op.SkipSimplifiedLayerNormalization
    normed, _, _, total = add_and_norm(
        residual,
        update,
        *writer.norm_weights(norm, decoder.hidden_size, kind=decoder.norm, offset=decoder.norm_offset),
        epsilon=decoder.norm_epsilon,
        _outputs=4,
        **_MICROSOFT,
    )
    return normed, total
