"""The general route to a graph: traced by optimum, cleaned up, and its matrices stored like those of any other.

In: a checkpoint of a family without a lean graph. Out: nodes and small constants, and where each large weight comes
from: a source of tensors as a checkpoint is one, in the names of the trace. The whole model is in memory while it is
traced. Nothing is known here of encodings or files of an artifact.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.artifact_shape import ArtifactShape
from owl_deploy.export.decoder import ROPE_TYPES, WeightSource
from owl_deploy.export.families import FAMILIES
from owl_deploy.export.graph import FIRST_LOGIT
from owl_deploy.export.nbits_graph import BLOCK_SIZE, NBitsLinear
from owl_deploy.export.onnxruntime_graph import ALL_TOKENS
from owl_deploy.export.packed_graph import OPERATOR_DOMAIN, PackedLinear
from owl_deploy.export.unfilled_graph import UnfilledGraph
from owl_deploy.generation import load_torch_model
from owl_deploy.recipe import Precision

__all__ = ["TracedGraph", "TracedWeights", "trace", "traced_graph"]

_LARGE = 1024
"""Elements from which on a constant is a weight, to be stored outside of the graph."""

# What may stand between the product of the head and the logits.
_ELEMENTWISE = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the trace, read when it is asked for."""

    stored: ir.TensorProtocol
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = _sizes(self.stored.shape)
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True)
class TracedWeights:
    """The large weights of a trace by name, linears as (out, in) under the name of their module."""

    tensors: Mapping[str, _Tensor]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, float32."""
        tensor = self.tensors[name]
        array = np.array(tensor.stored.numpy(), dtype=np.float32)
        return torch.from_numpy(array.T if tensor.is_transposed else array)


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph and its sizes, and the weights to fill it with."""

    graph: UnfilledGraph
    shape: ArtifactShape
    source: TracedWeights


@dataclass(frozen=True)
class _Linear:
    """A product with a constant matrix."""

    node: ir.Node
    name: str
    matrix: ir.Value
    is_transposed: bool
    """Whether the matrix lies as (in, out)."""
    bias: ir.Value | None
    is_head: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        assert self.matrix.shape is not None
        rows, columns = _sizes(self.matrix.shape)
        return (columns, rows) if self.is_transposed else (rows, columns)


@contextlib.contextmanager
def traced_graph(
    checkpoint: Checkpoint,
    *,
    weights: str,
    precision: Precision,
    head_precision: Precision,
    is_symmetric: bool,
    accuracy_level: int,
    max_positions: int,
) -> Iterator[TracedGraph]:
    """Trace a model and hand out its graph; the weights can be read until the context ends.

    Inputs and outputs have the names of `onnxruntime_graph`, with `position_ids` (batch, T) int64 where the trace asks
    for them. The cache grows: past and present are buffers of their own.

    Args:
        checkpoint: of any family that optimum knows.
        weights: dense or sparse-initializer keep MatMul and Gemm; sparse-operator has SparseMatMul in their place;
            dense in int8 or int4 has MatMulNBits.
        precision: number format of all matrices but the head.
        head_precision: that of the head. An embedding is stored as float32, also where it is tied to the head.
        is_symmetric: of MatMulNBits.
        accuracy_level: of MatMulNBits.
        max_positions: longest context wanted, in tokens; the model's own limit caps it.

    Raises:
        UnsupportedModelError: optimum cannot export the model, or the trace would hold for one length of text only.
    """
    config = checkpoint.config
    _refuse_variants(config)
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
        path = trace(checkpoint, Path(folder))
        model = ir.load(path)
        _clean_up(model)
        linears = _linears(model, set(checkpoint.tensors))
        _keep_some_logits(model, linears)
        is_nbits = weights == "dense" and precision in ("int8", "int4")
        tensors: dict[str, _Tensor] = {}
        sources: dict[str, WeightSource] = {}
        packed: dict[str, PackedLinear] = {}
        quantized: dict[str, NBitsLinear] = {}
        for linear in linears:
            kind = head_precision if linear.is_head else precision
            assert linear.matrix.const_value is not None
            tensors[f"{linear.name}.weight"] = _Tensor(linear.matrix.const_value, linear.is_transposed)
            if linear.bias is not None:
                assert linear.bias.const_value is not None
                tensors[f"{linear.name}.bias"] = _Tensor(linear.bias.const_value, is_transposed=False)
            has_bias, parts = linear.bias is not None, (linear.name,)
            if weights == "sparse-operator":
                packed[linear.name] = PackedLinear(linear.name, parts, kind, has_bias=has_bias)
                inputs: Sequence[ir.Value | None] = packed[linear.name].inputs(linear.shape[0])
                _replace(model, linear, OPERATOR_DOMAIN, "SparseMatMul", inputs, {})
            elif is_nbits and kind in ("int8", "int4"):
                quantized[linear.name] = NBitsLinear(linear.name, parts, kind, is_symmetric, has_bias=has_bias)
                inputs = quantized[linear.name].inputs(linear.shape[1], linear.shape[0])
                attributes = {
                    "bits": quantized[linear.name].bits,
                    "block_size": BLOCK_SIZE,
                    "accuracy_level": accuracy_level,
                }
                _replace(model, linear, "com.microsoft", "MatMulNBits", inputs, attributes)
            else:
                _rename(model, linear, sources, is_half=precision == "fp16")
        _remove_unused(model)
        gathered = _take_out_the_rest(
            model, tensors, sources, is_half=precision == "fp16" and weights != "sparse-operator"
        )
        if packed:
            model.graph.opset_imports[OPERATOR_DOMAIN] = 1
        if quantized:
            model.graph.opset_imports["com.microsoft"] = 1
        shape = _shape(model, config, max_positions, gathered)
        model.producer_name = "owl-deploy"
        yield TracedGraph(UnfilledGraph(ir.to_proto(model), sources, packed, quantized), shape, TracedWeights(tensors))


def _refuse_variants(config: Mapping[str, Any]) -> None:
    """Refuse what would come out of a trace as if it held for every text."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope scaling {kind!r} depends on the length of the text: no fixed tables express it"
        )


def trace(checkpoint: Checkpoint, folder: Path) -> Path:
    """Let optimum export the model into a folder, and return the file.

    Raises:
        UnsupportedModelError: it cannot.
    """
    model = load_torch_model(checkpoint)
    log = logging.getLogger("optimum")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Tracing warns of every length that becomes a constant; the parity gate finds those that matter.
            warnings.simplefilter("ignore")
            from optimum.exporters.onnx import onnx_export_from_model

            onnx_export_from_model(model, folder, task="text-generation-with-past", do_validation=False)
    except Exception as error:  # of any kind: the exporters of families fail in their own ways
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"no graph for model type {checkpoint.config.get('model_type')!r}: it has no lean one (those are "
            f"{', '.join(FAMILIES)}), and optimum cannot export it: {type(error).__name__}: {reason}"
        ) from error
    finally:
        log.setLevel(level)
    return folder / "model.onnx"


def _clean_up(model: ir.Model) -> None:
    """Fold constants, name shared ones once, and take transposes of weights out of the run."""
    from onnxscript import optimizer

    optimizer.optimize(model, onnx_shape_inference=True)
    for node in list(model.graph):
        matrix = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or matrix is None or matrix.const_value is None:
            continue
        if matrix.shape is None or len(matrix.shape) != 2 or _permutation(node) != [1, 0]:
            continue
        # A tied head: the embedding's (vocab, hidden), turned at every step. The product takes it as it was.
        flipped = ir.Value(
            name=f"{matrix.name}.transposed",
            type=matrix.type,
            shape=ir.Shape(list(matrix.shape)[::-1]),
            const_value=ir.LazyTensor(
                partial(_turned, matrix.const_value),
                dtype=matrix.const_value.dtype,
                shape=ir.Shape(list(matrix.shape)[::-1]),
                name=f"{matrix.name}.transposed",
            ),
        )
        model.graph.register_initializer(flipped)
        ir.convenience.replace_all_uses_with(node.outputs[0], flipped)
        model.graph.remove(node, safe=True)


def _turned(stored: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(stored.numpy().T))


def _sizes(shape: Iterable[Any]) -> tuple[int, ...]:
    """Return the numbers of a shape without symbols."""
    return tuple(int(size) for size in shape)


def _permutation(node: ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    return [1, 0] if attribute is None else list(attribute.as_ints())


def _linears(model: ir.Model, checkpoint_tensors: set[str]) -> list[_Linear]:
    """Return the products with constant matrices, in the order of the graph."""
    head = _head(model)
    found: list[_Linear] = []
    names: Counter[str] = Counter()
    for node in model.graph:
        if not _is_linear(node):
            continue
        matrix = node.inputs[1]
        assert matrix is not None
        is_transposed = node.op_type == "MatMul" or not _int(node, "transB", 0)
        name = str(matrix.name)
        if name in checkpoint_tensors or name.removesuffix(".transposed") in checkpoint_tensors:
            name = name.removesuffix(".transposed").removesuffix(".weight")
        else:  # tracing gives turned weights numbers, and nodes the path of their module
            name = str(node.name).strip("/").rpartition("/")[0].replace("/", ".") or name
        if node is head and f"{name}.weight" in checkpoint_tensors and name not in ("lm_head", "embed_out"):
            name = "lm_head"  # tied: the embedding has this name
        names[name] += 1
        if names[name] > 1:
            name = f"{name}.{names[name]}"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        found.append(_Linear(node, name, matrix, is_transposed, bias, node is head))
    return found


def _is_linear(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant matrix, and adds at most a constant vector."""
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return False
    matrix, bias = node.inputs[1].const_value, node.inputs[2] if len(node.inputs) > 2 else None
    if matrix is None or len(matrix.shape) != 2 or matrix.size < _LARGE:
        return False
    if node.op_type == "MatMul":
        return True
    if bias is not None and (bias.const_value is None or len(bias.const_value.shape) != 1):
        return False
    is_plain = all(name not in node.attributes or node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    return is_plain and not _int(node, "transA", 0)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _head(model: ir.Model) -> ir.Node:
    """Return the product that makes the logits.

    Raises:
        UnsupportedModelError: they are not made by one.
    """
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    node = logits.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        moving = [value for value in node.inputs if value is not None and value.const_value is None]
        node = moving[0].producer() if len(moving) == 1 else None
    if node is None or node.op_type != "MatMul" or not _is_linear(node):
        raise UnsupportedModelError("the traced graph does not make its logits by a product with one matrix")
    return node


def _keep_some_logits(model: ir.Model, linears: list[_Linear]) -> None:
    """Put the slice in front of the head that `FIRST_LOGIT` describes."""
    node = next(linear.node for linear in linears if linear.is_head)
    numbers = {FIRST_LOGIT: ALL_TOKENS, f"{FIRST_LOGIT}.end": np.iinfo(np.int64).max, f"{FIRST_LOGIT}.axis": 1}
    values = []
    for name, number in numbers.items():
        value = ir.Value(name=name, const_value=ir.tensor(np.array([number], np.int64), name=name))
        model.graph.register_initializer(value)
        values.append(value)
    kept = ir.Node("", "Slice", [node.inputs[0], *values], name="kept_tokens")
    model.graph.insert_before(node, kept)
    node.replace_input_with(0, kept.outputs[0])
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    assert logits.shape is not None
    logits.shape = ir.Shape(["batch_size", "kept", logits.shape[2]])


def _replace(
    model: ir.Model,
    linear: _Linear,
    domain: str,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int],
) -> None:
    """Put another operator in the place of a product."""
    old, (n_out, n_in) = linear.node, linear.shape
    numbers = {"N": n_out, "K": n_in, **attributes}
    node = ir.Node(
        domain,
        operator,
        [old.inputs[0], *inputs],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=old.name,
    )
    node.outputs[0].type, node.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [node], old.outputs, node.outputs)


def _rename(model: ir.Model, linear: _Linear, sources: dict[str, WeightSource], *, is_half: bool) -> None:
    """Let a product read its matrix, stored as it multiplies, under the name of its module."""
    node, name = linear.node, f"{linear.name}.weight{'.transposed' if linear.is_transposed else ''}"
    sources[name] = WeightSource((f"{linear.name}.weight",), linear.is_transposed, is_half=is_half)
    value = ir.val(name, dtype=ir.DataType.FLOAT16 if is_half else ir.DataType.FLOAT, shape=linear.matrix.shape)
    if is_half:
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{linear.name}.cast")
        model.graph.insert_before(node, cast)
        value = cast.outputs[0]
    node.replace_input_with(1, value)


def _remove_unused(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _take_out_the_rest(
    model: ir.Model, tensors: dict[str, _Tensor], sources: dict[str, WeightSource], *, is_half: bool
) -> frozenset[str]:
    """Take the other large constants out of the graph; returns the names of matrices that are gathered alone."""
    gathered = set()
    for name, value in list(model.graph.initializers.items()):
        stored = value.const_value
        assert stored is not None
        if stored.size < _LARGE or stored.dtype != ir.DataType.FLOAT:
            continue
        shape = _sizes(stored.shape)
        tensors[name] = _Tensor(stored, is_transposed=False)
        half = is_half and len(shape) == 2
        sources[name] = WeightSource((name,), is_transposed=False, is_half=half)
        if all(use.node.op_type == "Gather" for use in value.uses()):
            gathered.add(name)
        del model.graph.initializers[name]
        replacement = ir.val(name, dtype=ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, shape=shape)
        if half:
            cast = ir.Node("", "Cast", [replacement], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{name}.cast")
            model.graph.insert_before(model.graph[0], cast)
            replacement = cast.outputs[0]
        ir.convenience.replace_all_uses_with(value, replacement)
    return frozenset(gathered)


def _shape(model: ir.Model, config: Mapping[str, Any], max_positions: int, gathered: frozenset[str]) -> ArtifactShape:
    """Read the sizes of cache and logits off the graph, and the rest off the configuration.

    Raises:
        UnsupportedModelError: keys and values are not of one size in all blocks.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    caches = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
    sizes = {tuple(value.shape or ()) for value in caches}
    names = {f"past_key_values.{i}.{part}" for i in range(len(caches) // 2) for part in ("key", "value")}
    shape = [size if isinstance(size, int) else 0 for size in next(iter(sizes), ())]
    if len(sizes) != 1 or len(shape) != 4 or names != {str(value.name) for value in caches}:
        raise UnsupportedModelError(f"the traced graph has caches of {len(sizes)} shapes, and one is needed")
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    assert logits.shape is not None
    longest = [config[key] for key in ("max_position_embeddings", "n_positions", "seq_length") if config.get(key)]
    return ArtifactShape(
        model_type=str(config["model_type"]),
        n_blocks=len(caches) // 2,
        hidden_size=int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0),
        n_heads=int(config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 0),
        n_kv_heads=shape[1],
        head_dim=shape[3],
        vocab_size=_sizes(logits.shape[2:])[0],
        max_positions=min([max_positions, *longest]),
        gathered=gathered,
        is_traced=True,
        has_position_ids="position_ids" in inputs,
    )
