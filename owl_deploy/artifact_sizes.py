"""How large the sparse checkpoint and its artifacts will be, predicted from counts of weights and zeros.

In: a checkpoint, the linears of a plan, the artifacts that are to be exported. Out: bytes, as what will lie in their
folders. Graphs are those of the export, without weights; nothing is packed or written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import EngineUnavailableError, UnsupportedModelError
from owl_deploy.export.decoder import Decoder, WeightSource, read_decoder
from owl_deploy.export.initializers import ALIGNMENT, INLINE_LIMIT, external_tensor, smallest_encoding
from owl_deploy.export.nbits_graph import BLOCK_SIZE
from owl_deploy.export.nbits_initializers import nbits_bytes
from owl_deploy.export.onnxruntime_graph import nbits_graph, sparse_operator_graph
from owl_deploy.export.packed_initializers import chosen_encoding
from owl_deploy.export.packing import VALUE_BITS, packed_bytes
from owl_deploy.export.writer import head_precision, machine_class, plain_graph
from owl_deploy.kernels import library_path
from owl_deploy.recipe import ArtifactSettings

__all__ = ["size_facts"]

_GENAI_CONFIG_BYTES = 1500

Tensors = list[tuple[str, tuple[int, ...], int]]
"""Name, shape and bytes of every tensor of a data file, in its order."""


def size_facts(
    checkpoint: Checkpoint, linears: list[dict[str, Any]], artifacts: Sequence[ArtifactSettings]
) -> dict[str, Any]:
    """Predict the bytes of the sparse checkpoint and of every artifact, as `sizes` of plan.json.

    Args:
        checkpoint: of the dense model.
        linears: of the plan, with the number of zeros in each.
        artifacts: what is to be exported; none is predicted, and `reason` says why, where the export has no graph
            for the model.
    """
    stored = sum(checkpoint.dtype(name).itemsize * math.prod(e.shape) for name, e in checkpoint.tensors.items())
    # Headers of the shards and the index name every tensor; owl.json and allocation.json every linear.
    sizes: dict[str, Any] = {
        "checkpoint_bytes": stored + _copied_bytes(checkpoint) + 200 * len(checkpoint.tensors) + 450 * len(linears),
        "artifacts": [],
        "reason": None,
    }
    zeros = {f"{linear['name']}.weight": linear["n_zeros"] for linear in linears}
    try:
        sizes["artifacts"] = [
            _artifact_facts(checkpoint, {} if settings.checkpoint == "dense" else zeros, settings)
            for settings in artifacts
        ]
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


def _artifact_facts(checkpoint: Checkpoint, zeros: Mapping[str, int], settings: ArtifactSettings) -> dict[str, Any]:
    decoder = read_decoder(checkpoint, max_positions=settings.max_positions)
    predicted = _packed if settings.weights == "sparse-operator" else _nbits if settings.is_nbits else _plain
    n_bytes, encodings, reason = predicted(checkpoint, decoder, zeros, settings)
    keys = {"name", "checkpoint", "target", "weights", "precision"}
    return {
        **settings.model_dump(mode="json", include=keys),
        "bytes": n_bytes + _copied_bytes(checkpoint) + _GENAI_CONFIG_BYTES,
        "bytes_dense": 4 * sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()),
        "encodings": encodings,
        **({"reason": reason} if reason else {}),
    }


def _plain(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int], str | None]:
    """Return the bytes of graph and data, how often each encoding is used, and why it cannot be, if so."""
    graph, weights = plain_graph(decoder, settings)
    shapes = {name: _exported_shape(checkpoint, source) for name, source in weights.items()}

    def stored(*, allows_varint: bool) -> dict[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            n_nonzeros = size - sum(zeros.get(tensor, 0) for tensor in weights[name].tensors)
            varint_bytes = _varint_bytes(size, n_nonzeros) if allows_varint else None
            is_sparse = settings.weights == "sparse-initializer"
            value_bytes = 2 if weights[name].is_half else 4
            dense = ("dense", value_bytes * size)
            if settings.is_integer and _is_integer(decoder, weights[name]):
                dense = ("int8", size + 4 * shape[1])
            found[name] = (
                smallest_encoding(shape, n_nonzeros, varint_bytes, value_bytes=value_bytes) if is_sparse else dense
            )
        return found

    chosen = stored(allows_varint=settings.target == "onnxruntime")
    inline = sum(n_bytes for encoding, n_bytes in chosen.values() if encoding not in ("dense", "int8"))
    reason = None
    if is_external := inline > INLINE_LIMIT:
        chosen, inline = stored(allows_varint=False), 0
        if settings.target == "deepsparse":
            reason = f"its sparse initializers do not fit inside model.onnx ({INLINE_LIMIT / 1e9:g} GB)"
    counts = Counter(encoding for name, (encoding, _) in chosen.items() if len(shapes[name]) == 2)
    tensors = [
        (name, shapes[name], n)
        for name, (encoding, n) in chosen.items()
        if encoding in ("dense", "int8") or is_external
    ]
    return _file_bytes(graph, tensors) + inline, dict(counts), reason


def _is_integer(decoder: Decoder, source: WeightSource) -> bool:
    """Whether a weight is one that export stores as integers for DeepSparse: a linear, but not the last of an MLP."""
    names = decoder.names
    return (
        source.is_transposed
        and source.tensors[0].startswith(f"{names.blocks}.")
        and not source.tensors[0].endswith(f"{names.mlp_output}.weight")
    )


def _exported_shape(checkpoint: Checkpoint, source: WeightSource) -> tuple[int, ...]:
    first, *others = (checkpoint.tensors[tensor].shape for tensor in source.tensors)
    shape = (first[0] + sum(other[0] for other in others), *first[1:])
    return shape[::-1] if source.is_transposed else shape


def _varint_bytes(size: int, n_nonzeros: int) -> int:
    """Return what the positions of evenly spread values take: another byte from every power of 128 on."""
    longer = sum(max(0, size - (1 << 7 * k)) for k in range(1, 10))
    return round(n_nonzeros + n_nonzeros * longer / size)


def _packed(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int], str | None]:
    """Return the bytes of graph, data and operator library, and the rest as `_plain`."""
    graph, weights, packed = sparse_operator_graph(
        decoder, precision=settings.precision, head_precision=head_precision(settings)
    )
    machine = machine_class(settings)
    plain = {name: _exported_shape(checkpoint, source) for name, source in weights.items()}
    tensors: Tensors = [(name, shape, 4 * math.prod(shape)) for name, shape in plain.items()]
    counts = Counter("dense" for shape in plain.values() if len(shape) == 2)
    for linear in packed.values():
        shapes = [checkpoint.tensors[f"{part}.weight"].shape for part in linear.parts]
        n_rows, n_columns = sum(rows for rows, _ in shapes), shapes[0][1]
        n_nonzeros = n_rows * n_columns - sum(zeros.get(f"{part}.weight", 0) for part in linear.parts)
        shape = (n_rows, n_columns)
        encoding = chosen_encoding(linear, shape, n_nonzeros, encoding=settings.encoding, machine=machine)
        group = 0 if linear.is_gathered else None
        n_bytes = packed_bytes(shape, n_nonzeros, linear.precision, encoding, group)
        if encoding != "dense":  # rows end at multiples of 8 bytes
            n_bytes += round(n_rows * (8 - VALUE_BITS[linear.precision] / 8) / 2)
        tensors.append((linear.matrix_name, (n_bytes,), n_bytes))
        if linear.has_bias:
            tensors.append((linear.bias_name, (n_rows,), 4 * n_rows))
        counts[f"packed-{encoding}"] += 1
    n_bytes = _file_bytes(graph, tensors)
    try:
        return n_bytes + library_path().stat().st_size, dict(counts), None
    except EngineUnavailableError as error:
        return n_bytes, dict(counts), str(error)


def _nbits(
    checkpoint: Checkpoint, decoder: Decoder, _zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int], str | None]:
    """Return the bytes of graph and data, and the rest as `_plain`; zeros take as much as any weight."""
    graph, weights, quantized = nbits_graph(
        decoder,
        precision=settings.precision,
        head_precision=head_precision(settings),
        is_symmetric=settings.symmetric,
        accuracy_level=settings.accuracy_level,
    )
    plain = {name: _exported_shape(checkpoint, source) for name, source in weights.items()}
    tensors: Tensors = [(name, shape, 4 * math.prod(shape)) for name, shape in plain.items()]
    counts = Counter("dense" for shape in plain.values() if len(shape) == 2)
    for linear in quantized.values():
        shapes = [checkpoint.tensors[f"{part}.weight"].shape for part in linear.parts]
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        scales = (shape[0], -(-shape[1] // BLOCK_SIZE))
        n_scale_bytes = 4 * math.prod(scales)
        n_code_bytes = nbits_bytes(shape, linear.bits, is_symmetric=linear.is_symmetric) - n_scale_bytes
        tensors.append((linear.codes_name, shape, n_code_bytes))
        tensors.append((linear.scales_name, scales, n_scale_bytes))
        if linear.has_bias:
            tensors.append((linear.bias_name, shape[:1], 4 * shape[0]))
        counts[f"nbits{linear.bits}"] += 1
    return _file_bytes(graph, tensors), dict(counts), None


def _file_bytes(graph: onnx.ModelProto, tensors: Tensors) -> int:
    """Return the bytes of a data file with these tensors, and of the graph when it names them."""
    end = 0
    for name, shape, n_bytes in tensors:
        end += -end % ALIGNMENT
        graph.graph.initializer.append(external_tensor(name, onnx.TensorProto.FLOAT, shape, offset=end, length=n_bytes))
        end += n_bytes
    return end + int(graph.ByteSize())
