"""What the graph of an artifact says by itself: its nodes, what they multiply, gather and add.

In: an artifact's folder. Out: counts and bytes. No weight is read and no engine is started; what an engine makes of
the graph is the business of `explain_nodes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from owl_deploy.errors import UnsupportedModelError, shown

__all__ = ["GraphFacts", "read_graph"]

# Where the names of weights, and of cache inputs and outputs, hold the number of a block.
_BLOCK = re.compile(r"(?:\.layers|^past_key_values|^present)\.(\d+)\.")
_GATHERS = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class GraphFacts:
    """Nodes of model.onnx, and how they read their weights."""

    n_nodes: dict[tuple[str, str], int]
    """Nodes by domain and operator; the standard domain is empty."""
    nodes_of_blocks: tuple[int, ...]
    """Nodes of every decoder block, by the weights and caches that they name."""
    read_whole: frozenset[str]
    """Initializers that a step reads as a whole."""
    gathered: frozenset[str]
    """Initializers of which it reads a row or column per token; of some it does both."""
    row_bytes: int
    """Bytes of the rows that one token gathers: of the embedding, of its scales, of positions."""
    vector_bytes: int
    """Bytes of norms, biases and other vectors of numbers."""


def read_graph(folder: Path, *, n_blocks: int) -> GraphFacts:
    """Read model.onnx without its external data.

    Raises:
        UnsupportedModelError: it is damaged, or its data file is missing or cut short.
    """
    path = folder / "model.onnx"
    try:
        return _facts(folder, onnx.load_model(path, load_external_data=False).graph, n_blocks)
    except (DecodeError, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        # Flipped bytes pass the parser as names that are no text, numbers that are none, types that do not exist.
        raise UnsupportedModelError(f"{path} is damaged ({shown(str(error))}): export the model again") from error


def _facts(folder: Path, graph: onnx.GraphProto, n_blocks: int) -> GraphFacts:
    if not graph.node:
        raise ValueError("it holds no nodes")
    _refuse_missing_data(folder, graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {
        sparse.values.name: onnx.TensorProto(data_type=sparse.values.data_type, dims=sparse.dims)
        for sparse in graph.sparse_initializer
    }
    # fp16 weights are cast; an engine does that once, when it loads the model, and then reads float32.
    casts = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in tensors
    }
    is_cast = set(casts.values())
    reads = {
        (casts.get(name, name), node.op_type in _GATHERS and position != 1)
        for node in graph.node
        for position, name in enumerate(node.input)
        if casts.get(name, name) in tensors and name not in is_cast
    }
    return GraphFacts(
        n_nodes=dict(Counter((node.domain, node.op_type) for node in graph.node)),
        nodes_of_blocks=_nodes_of_blocks(graph.node, n_blocks),
        read_whole=frozenset(name for name, is_gathered in reads if not is_gathered),
        gathered=frozenset(name for name, is_gathered in reads if is_gathered),
        row_bytes=sum(_row_bytes(node, tensors, casts) for node in graph.node if node.op_type in _GATHERS),
        vector_bytes=sum(
            _item_bytes(tensor) * tensor.dims[0]
            for tensor in tensors.values()
            if len(tensor.dims) == 1 and tensor.dims[0] > 1 and _is_float(tensor)
        ),
    )


def _refuse_missing_data(folder: Path, graph: onnx.GraphProto) -> None:
    """Refuse a graph whose weights are not all there."""
    ends: dict[str, int] = {}
    sparse = (part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices))
    for tensor in (*graph.initializer, *sparse):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        ends[place["location"]] = max(end, ends.get(place["location"], 0))
    for name, end in ends.items():
        file = folder / name
        n_bytes = file.stat().st_size if file.is_file() else None
        if n_bytes is None:
            raise UnsupportedModelError(f"{file} is missing, which holds the weights of model.onnx: export it again")
        if n_bytes < end:
            raise UnsupportedModelError(
                f"{file} is cut short: model.onnx names {end} bytes, found {n_bytes}: export the model again"
            )


def _nodes_of_blocks(nodes: Iterable[onnx.NodeProto], n_blocks: int) -> tuple[int, ...]:
    """Count nodes by block: a node that names no weight belongs to the block of the one before it."""
    counts = [0] * n_blocks
    block: int | None = None
    for node in nodes:
        names = [*node.input, *node.output]
        found = [int(match[1]) for name in names if (match := _BLOCK.search(name))]
        if found:
            block = found[0]
        elif any(".weight" in name for name in node.input):  # embedding, last norm, head
            block = None
        if block is not None and block < n_blocks:
            counts[block] += 1
    return tuple(counts)


def _row_bytes(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], casts: dict[str, str]) -> int:
    """Return what a node reads of its matrices for one index."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    total = 0
    for position, name in enumerate(node.input):
        tensor = tensors.get(casts.get(name, name))
        if position == 1 or tensor is None or len(tensor.dims) != 2:
            continue
        item = 4 if name in casts else _item_bytes(tensor)
        total += math.prod(tensor.dims) // tensor.dims[axis] * item
    return total


def _is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def _item_bytes(tensor: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
