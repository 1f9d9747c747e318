"""How large the sparse checkpoint and its artifacts will be, predicted from counts of weights and zeros.

In: a checkpoint, the linears of a plan, the artifacts that are to be exported. Out: bytes, as what will lie in their
folders. Nothing is packed or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import EngineUnavailableError, UnsupportedModelError
from owl_deploy.recipe import ArtifactSettings

if TYPE_CHECKING:
    import onnx

    from owl_deploy.export.decoder import Decoder, WeightSource
    from owl_deploy.export.packing import Encoding

__all__ = ["size_facts"]


def size_facts(
    checkpoint: Checkpoint, linears: list[dict[str, Any]], artifacts: Sequence[ArtifactSettings]
) -> dict[str, Any]:
    """Predict the bytes of the sparse checkpoint and of every artifact, as what lies in their folders."""
    stored = sum(checkpoint.dtype(name).itemsize * math.prod(e.shape) for name, e in checkpoint.tensors.items())
    # Headers of the shards and the index name every tensor; owl.json and allocation.json every linear.
    sizes: dict[str, Any] = {
        "checkpoint_bytes": stored + _copied_bytes(checkpoint) + 200 * len(checkpoint.tensors) + 450 * len(linears),
        "artifacts": [],
        "reason": None,
    }
    try:
        sizes["artifacts"] = [_artifact_facts(checkpoint, linears, artifact) for artifact in artifacts]
    except UnsupportedModelError as error:
        sizes["reason"] = str(error)
    return sizes


def _copied_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of configuration and tokenizer, which come along."""
    ours = ("owl.json", "allocation.json", "measured.json")
    return sum(
        file.stat().st_size
        for file in checkpoint.path.iterdir()
        if file.is_file()
        and file.suffix in (".json", ".jinja", ".txt", ".model")
        and file.name not in ours
        and not file.name.endswith(".index.json")
    )


def _artifact_facts(
    checkpoint: Checkpoint, linears: list[dict[str, Any]], settings: ArtifactSettings
) -> dict[str, Any]:
    """Predict one artifact: its graph is written without its weights, and those are counted.

    Raises:
        UnsupportedModelError: there is no graph for this model.
    """
    from owl_deploy.export.decoder import read_decoder

    decoder = read_decoder(checkpoint, max_positions=settings.max_positions)
    zeros = {}
    if settings.checkpoint == "pruned":
        zeros = {f"{linear['name']}.weight": linear["n_zeros"] for linear in linears}
    reason = None
    if settings.weights == "sparse-operator":
        n_bytes, encodings = _packed_bytes(checkpoint, decoder, zeros, settings)
        try:
            from owl_deploy.kernels import library_path

            n_bytes += library_path().stat().st_size
        except EngineUnavailableError as error:
            reason = str(error)
    else:
        n_bytes, encodings, reason = _plain_bytes(checkpoint, decoder, zeros, settings)
    keys = {"name", "checkpoint", "target", "weights", "precision"}
    return {
        **settings.model_dump(mode="json", include=keys),
        "bytes": n_bytes + _copied_bytes(checkpoint) + _GENAI_CONFIG_BYTES,
        "bytes_dense": 4 * _n_exported(checkpoint),
        "encodings": encodings,
        **({"reason": reason} if reason else {}),
    }


_GENAI_CONFIG_BYTES = 1500
_PAGE = 4096
"""Every tensor of the data file begins at a multiple."""


def _n_exported(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())


def _plain_bytes(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int], str | None]:
    """Return the bytes of model.onnx and its data, how often each encoding is used, and why it cannot be, if so."""
    from owl_deploy.export.deepsparse_graph import deepsparse_graph
    from owl_deploy.export.initializers import INLINE_LIMIT
    from owl_deploy.export.onnxruntime_graph import onnxruntime_graph

    graph, weights = {"onnxruntime": onnxruntime_graph, "deepsparse": deepsparse_graph}[settings.target](decoder)
    sources = {name: _shape_of(checkpoint, source) for name, source in weights.items()}
    is_sparse = settings.weights == "sparse-initializer"
    chosen = {
        name: _smallest(
            shape,
            zeros.get(weights[name].tensor, 0),
            is_sparse=is_sparse,
            allows_varint=settings.target == "onnxruntime",
        )
        for name, shape in sources.items()
    }
    inline = sum(n for encoding, n in chosen.values() if encoding != "dense")
    reason = None
    if inline > INLINE_LIMIT:
        chosen = {
            name: _smallest(shape, zeros.get(weights[name].tensor, 0), is_sparse=True, allows_varint=False)
            for name, shape in sources.items()
        }
        inline = 0
        if settings.target == "deepsparse":
            reason = f"its sparse initializers do not fit inside model.onnx ({INLINE_LIMIT / 1e9:g} GB)"
    data = _DataFile(graph)
    for name, (encoding, n_bytes) in chosen.items():
        if encoding == "dense" or not inline:
            data.add(name, sources[name], n_bytes)
    counts: dict[str, int] = {}
    for name, (encoding, _) in chosen.items():
        if len(sources[name]) == 2:
            counts[encoding] = counts.get(encoding, 0) + 1
    return data.n_bytes + graph.ByteSize() + inline, counts, reason


def _shape_of(checkpoint: Checkpoint, source: WeightSource) -> tuple[int, ...]:
    shape = checkpoint.tensors[source.tensor].shape
    return shape[::-1] if source.is_transposed else shape


def _smallest(shape: tuple[int, ...], n_zeros: int, *, is_sparse: bool, allows_varint: bool) -> tuple[str, int]:
    """Return the smallest encoding of a weight, and the bytes of it with zeros spread evenly."""
    size = math.prod(shape)
    sizes = {"dense": 4 * size}
    if is_sparse and len(shape) == 2:
        n = size - n_zeros
        if allows_varint:
            # A varint takes another byte from every power of 128 on.
            longer = sum(max(0, size - (1 << 7 * k)) for k in range(1, 10))
            sizes["coo-varint"] = round(4 * n + n + n * longer / size)
        if size < 2**31:
            sizes["coo-int32"] = 8 * n
        else:
            sizes["coo-int64"] = 12 * n
    best = min(sizes, key=lambda encoding: sizes[encoding])
    return best, sizes[best]


def _packed_bytes(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int]]:
    """Return the bytes of model.onnx and its data, and how often each encoding is used."""
    from owl_deploy.export.cost_model import choose_encoding
    from owl_deploy.export.machine_class import this_machine_class
    from owl_deploy.export.onnxruntime_graph import sparse_operator_graph
    from owl_deploy.export.packing import packed_bytes

    precision = settings.precision
    head = settings.head_precision
    if head == "auto":
        head = "int8" if precision == "int4" else precision
    machine = this_machine_class() if settings.machine == "auto" else settings.machine
    graph, weights, packed = sparse_operator_graph(decoder, precision=precision, head_precision=head)
    data = _DataFile(graph)
    for name, source in weights.items():
        data.add(name, _shape_of(checkpoint, source), 4 * math.prod(checkpoint.tensors[source.tensor].shape))
    counts: dict[str, int] = {}
    for linear in packed.values():
        shapes = [checkpoint.tensors[f"{part}.weight"].shape for part in linear.parts]
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        n_nonzeros = math.prod(shape) - sum(zeros.get(f"{part}.weight", 0) for part in linear.parts)
        encoding: Encoding = "dense"
        if linear.is_gathered:
            pass  # its rows have to lie one behind the other
        elif settings.encoding == "auto":
            encoding = choose_encoding(shape, n_nonzeros, linear.precision, machine_class=machine)
        else:
            encoding = settings.encoding
        n_bytes = packed_bytes(shape, n_nonzeros, linear.precision, encoding, 0 if linear.is_gathered else None)
        if encoding != "dense":  # rows end at multiples of 8 bytes
            value = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}[linear.precision]
            n_bytes += round(shape[0] * (8 - value) / 2)
        data.add(linear.matrix_name, (n_bytes,), n_bytes)
        if linear.has_bias:
            data.add(linear.bias_name, (shape[0],), 4 * shape[0])
        counts[f"packed-{encoding}"] = counts.get(f"packed-{encoding}", 0) + 1
    return data.n_bytes + graph.ByteSize(), counts


class _DataFile:
    """The layout of model.onnx.data: what is added is named in the graph, so that its size is known too."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.graph = graph
        self.n_bytes = 0

    def add(self, name: str, shape: tuple[int, ...], n_bytes: int) -> None:
        """Place a tensor behind the others."""
        from onnx import TensorProto

        from owl_deploy.export.initializers import external_tensor

        self.n_bytes += -self.n_bytes % _PAGE
        tensor = external_tensor(name, TensorProto.FLOAT, shape, offset=self.n_bytes, length=n_bytes)
        self.graph.graph.initializer.append(tensor)
        self.n_bytes += n_bytes
