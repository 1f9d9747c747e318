"""The export stage: a checkpoint goes in, an ONNX artifact that passed its parity gate comes out.

In: a checkpoint and `ExportSettings`. Out: a folder in the layout of onnxruntime-genai's model
builder, which holds all that an engine needs. Nothing is timed or served here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx

from owl_deploy.artifact import ARTIFACT_FORMAT, MANIFEST, OnnxArtifact, open_artifact
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.activation_quantization import plan_quantization
from owl_deploy.export.artifact_shape import ArtifactShape
from owl_deploy.export.compensated_rounding import rounded_blocks
from owl_deploy.export.cost_model import MachineClass
from owl_deploy.export.decoder import Decoder, WeightSource, has_lean_graph, read_decoder
from owl_deploy.export.deepsparse_graph import deepsparse_graph, deepsparse_int8_graph
from owl_deploy.export.families import FAMILIES
from owl_deploy.export.genai import genai_config
from owl_deploy.export.initializers import INLINE_LIMIT, StoredMatrix, TensorSource, write_initializers
from owl_deploy.export.int8_initializers import write_int8_initializers
from owl_deploy.export.machine_class import this_machine_class
from owl_deploy.export.nbits_initializers import write_nbits_initializers
from owl_deploy.export.onnxruntime_graph import nbits_graph, onnxruntime_graph, sparse_operator_graph
from owl_deploy.export.packed_initializers import chosen_encoding, write_packed_initializers
from owl_deploy.export.parity import check_parity
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix
from owl_deploy.export.traced_graph import traced_graph
from owl_deploy.export.unfilled_graph import UnfilledGraph
from owl_deploy.files import file_sha256, folder_bytes, new_folder, write_json
from owl_deploy.kernels import library_path
from owl_deploy.lineage import check_zeros
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import ExportSettings, Precision
from owl_deploy.skeleton import open_skeleton
from owl_deploy.text import Encoder
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions

__all__ = [
    "artifact_identity",
    "export_onnx",
    "export_summary",
    "export_versions",
    "head_precision",
    "machine_class",
    "plain_graph",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
_PRUNED = 0.3
"""Zeros over elements from which a matrix counts as pruned where no manifest says what was."""


def export_onnx(
    model: str,
    settings: ExportSettings = ExportSettings(),
    *,
    out: Path,
    threads: int | Literal["auto"] = "auto",
    force: bool = False,
    offline: bool = False,
    parity: bool = True,
    inline_limit: int = INLINE_LIMIT,
    on_step: OnStep = silent,
) -> OnnxArtifact:
    """Write the artifact of a checkpoint for one engine.

    Families with a lean graph have their tensors read one at a time, and the parity gate runs them block by block. Any
    other is loaded and traced by optimum.

    Args:
        model: checkpoint folder, or any MODEL (its dense weights are then exported).
        settings: target engine, weight encoding, precision.
        out: folder of the artifact; it appears when the gate is passed.
        threads: of torch and of the engine in the parity gate.
        force: replace `out` if it exists.
        offline: never ask a hub.
        parity: whether to run the gate; without it the manifest says so and bench shows no speed-up.
        inline_limit: bytes of sparse initializers that model.onnx may hold.

    Raises:
        EngineUnavailableError: weights sparse-operator, and there is no operator library for this machine.
        ParityError: the artifact does not compute what the checkpoint computes; nothing is left.
        OwlDeployError: and its subclasses.
    """
    library = library_path() if settings.weights == "sparse-operator" else None  # refuses before any work
    checkpoint = open_checkpoint(model, offline=offline)
    check_zeros(open_skeleton(checkpoint), on_step)  # opening refuses tensors that are missing or of another shape
    with new_folder(out, replace=force) as folder:
        shape, matrices = _write_model(checkpoint, settings, folder, inline_limit, on_step)
        if library is not None:
            # For onnxruntime-genai, which takes it from the model's folder alone. Our own engines never load this copy.
            shutil.copyfile(library, folder / library.name)
        _copy_tokenizer(checkpoint, folder)
        if settings.target == "deepsparse":
            _write_merges_as_text(folder / "tokenizer.json")
        config = genai_config(
            shape,
            Encoder.open(checkpoint.path),
            _end_tokens(checkpoint),
            operator_library=library.name if library is not None else None,
        )
        write_json(folder / "genai_config.json", config)
        manifest = _manifest(checkpoint, shape, settings, matrices, folder)
        write_json(folder / MANIFEST, manifest)
        if parity:
            n_threads = resolve_threads(threads).n
            result = check_parity(open_artifact(folder), checkpoint, threads=n_threads, on_step=on_step, name=out.name)
            write_json(folder / MANIFEST, {**manifest, "parity": result.to_json()})
    return open_artifact(out)


def export_summary(artifact: OnnxArtifact) -> dict[str, Any]:
    """Return the document that `owl-deploy export --json` prints."""
    keys = ("target", "graph", "weights", "precision", "bytes_on_disk", "bytes_dense", "sparsity", "parity", "matrices")
    return {"artifact": str(artifact.path), **{key: artifact.manifest.get(key) for key in keys}}


def export_versions() -> dict[str, str]:
    """Return the versions that an artifact depends on."""
    return versions("onnx", "onnxscript", "onnxruntime", "torch", "transformers")


def artifact_identity(checkpoint: Checkpoint, settings: ExportSettings) -> dict[str, Any]:
    """Return the part of a manifest that two artifacts share if one can stand for the other.

    Raises:
        EngineUnavailableError: the operator library is wanted and not here.
    """
    is_packed = settings.weights == "sparse-operator"
    return {
        "format_version": ARTIFACT_FORMAT,
        "settings": {
            **settings.model_dump(mode="json", include=set(ExportSettings.model_fields)),
            "head_precision": head_precision(settings),
            "machine": machine_class(settings) if is_packed else None,
        },
        "operator_sha256": file_sha256(library_path()) if is_packed else None,
        "checkpoint_sha256": checkpoint.fingerprint,
        "versions": export_versions(),
    }


def _write_model(
    checkpoint: Checkpoint, settings: ExportSettings, folder: Path, inline_limit: int, on_step: OnStep
) -> tuple[ArtifactShape, list[StoredMatrix]]:
    """Write graph and weights, by the lean route where there is one, else through a trace."""
    if has_lean_graph(checkpoint):
        decoder = read_decoder(checkpoint, max_positions=settings.max_positions)
        if settings.is_integer:
            graph = _integer_graph(checkpoint, decoder, settings, on_step)
        else:
            graph = _lean_graph(decoder, settings)
        _refuse_unused_tensors(checkpoint, graph.used_tensors())
        rounded = _rounded(checkpoint, graph, settings, on_step) if settings.rounding == "gptq" else iter(())
        return decoder.shape, _write_weights(graph, checkpoint, settings, folder, inline_limit, on_step, rounded)
    if settings.target != "onnxruntime":
        raise UnsupportedModelError(
            f"no graph for model type {checkpoint.config.get('model_type')!r} in target {settings.target}: "
            f"export takes {', '.join(FAMILIES)}"
        )
    if settings.rounding == "gptq":
        raise UnsupportedModelError(
            f"rounding gptq is for {', '.join(FAMILIES)}, got model type {checkpoint.config.get('model_type')!r}: "
            "use rounding nearest"
        )
    on_step(Step("tracing the model", 0, 1, "by optimum"))
    with traced_graph(
        checkpoint,
        weights=settings.weights,
        precision=settings.precision,
        head_precision=head_precision(settings),
        is_symmetric=settings.symmetric,
        accuracy_level=settings.accuracy_level,
        max_positions=settings.max_positions,
    ) as traced:
        on_step(Step("tracing the model", 1, 1, "by optimum"))
        matrices = _write_weights(traced.graph, traced.source, settings, folder, inline_limit, on_step)
        return traced.shape, matrices


def _lean_graph(decoder: Decoder, settings: ExportSettings) -> UnfilledGraph:
    if settings.weights == "sparse-operator":
        model, weights, packed = sparse_operator_graph(
            decoder, precision=settings.precision, head_precision=head_precision(settings)
        )
        return UnfilledGraph(model, weights, packed=packed)
    if settings.is_nbits:
        model, weights, quantized = nbits_graph(
            decoder,
            precision=settings.precision,
            head_precision=head_precision(settings),
            is_symmetric=settings.symmetric,
            accuracy_level=settings.accuracy_level,
        )
        return UnfilledGraph(model, weights, quantized=quantized)
    return UnfilledGraph(*plain_graph(decoder, settings))


def _integer_graph(
    checkpoint: Checkpoint, decoder: Decoder, settings: ExportSettings, on_step: OnStep
) -> UnfilledGraph:
    """Run calibration text to learn the ranges of inputs, and write the graph of integer products."""
    calibration = calibration_tokens(checkpoint, settings, seed=0, on_step=on_step)
    plan = plan_quantization(open_skeleton(checkpoint), decoder, calibration.tokens, on_step)
    model, weights, integers = deepsparse_int8_graph(decoder, plan)
    parts = ("weight", "bias")[: 2 if decoder.norm == "layer" else 1]
    norms = frozenset(f"{name}.{part}" for name in plan.norms for part in parts)
    return UnfilledGraph(model, weights, integers=integers, in_constants=norms)


def _rounded(
    checkpoint: Checkpoint, graph: UnfilledGraph, settings: ExportSettings, on_step: OnStep
) -> Iterator[tuple[str, Int8Matrix | Int4Matrix]]:
    """Run calibration text block by block, and round what is packed so that products keep their values."""
    calibration = calibration_tokens(checkpoint, settings, seed=0, on_step=on_step)
    choose = partial(chosen_encoding, encoding=settings.encoding, machine=machine_class(settings))
    return rounded_blocks(open_skeleton(checkpoint), graph.packed, calibration.tokens, choose)


def _write_weights(
    graph: UnfilledGraph,
    source: TensorSource,
    settings: ExportSettings,
    folder: Path,
    inline_limit: int,
    on_step: OnStep,
    rounded: Iterator[tuple[str, Int8Matrix | Int4Matrix]] = iter(()),
) -> list[StoredMatrix]:
    """Fill a graph and write it."""
    if settings.weights == "sparse-operator":
        return write_packed_initializers(
            graph.model,
            graph.weights,
            graph.packed,
            source,
            folder,
            encoding=settings.encoding,
            machine=machine_class(settings),
            rounded=rounded,
            on_step=on_step,
        )
    if settings.is_integer:
        return write_int8_initializers(graph.model, graph.weights, graph.integers, source, folder, on_step=on_step)
    if settings.is_nbits:
        return write_nbits_initializers(graph.model, graph.weights, graph.quantized, source, folder, on_step=on_step)
    return write_initializers(
        graph.model,
        graph.weights,
        source,
        folder,
        is_sparse=settings.weights == "sparse-initializer",
        target=settings.target,
        inline_limit=inline_limit,
        on_step=on_step,
    )


def plain_graph(decoder: Decoder, settings: ExportSettings) -> tuple[onnx.ModelProto, dict[str, WeightSource]]:
    """Return the graph for weights that any build of the engine reads, and where they come from.

    Raises:
        UnsupportedModelError: the engine has no operator for this decoder.
    """
    if settings.target == "deepsparse":
        return deepsparse_graph(decoder)
    return onnxruntime_graph(decoder, matrix_type="fp16" if settings.precision == "fp16" else "fp32")


def head_precision(settings: ExportSettings) -> Precision:
    """Return the number format of head and embedding."""
    if settings.head_precision != "auto":
        return settings.head_precision
    if settings.is_integer:
        return "fp32"
    # int4 rows are no tensor that Gather could read.
    return "int8" if settings.precision == "int4" else settings.precision


def machine_class(settings: ExportSettings) -> MachineClass:
    """Return the class of machines that matrices are packed for."""
    return this_machine_class() if settings.machine == "auto" else settings.machine


def _refuse_unused_tensors(checkpoint: Checkpoint, used: set[str]) -> None:
    """Refuse a checkpoint with a weight that the graph has no place for: it would compute something else."""
    used = used | {"lm_head.weight"}
    unused = [name for name in checkpoint.tensors if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        raise UnsupportedModelError(
            f"{checkpoint.path}: no place in the graph for tensor {unused[0]} ({len(unused)} in all)"
        )


def _end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Return the tokens that end a text by the model's own generation settings; instruct models have several."""
    named = checkpoint.generation_config
    found = (checkpoint.config if named is None else named).get("eos_token_id")
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)


def _write_merges_as_text(file: Path) -> None:
    """Write each merge of a BPE tokenizer as "a b", not ["a", "b"].

    DeepSparse's pipelines want transformers below 4.40, whose tokenizers knows this form alone. Both mean the same
    unless a token holds a space; then the file stays as it is.
    """
    if not file.is_file():
        return
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    merges = tokenizer["model"].get("merges") or []
    if any(isinstance(merge, list) for merge in merges) and not any(" " in part for merge in merges for part in merge):
        tokenizer["model"]["merges"] = [" ".join(merge) for merge in merges]
        write_json(file, tokenizer)


def _manifest(
    checkpoint: Checkpoint, shape: ArtifactShape, settings: ExportSettings, matrices: list[StoredMatrix], folder: Path
) -> dict[str, Any]:
    n_elements = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    lineage = checkpoint.manifest or {"source": {"model": checkpoint.source, "sha256": checkpoint.fingerprint}}
    # Of an embedding a step reads one row a token; all other matrices are multiplied.
    multiplied = [m for m in matrices if m.name not in shape.gathered]
    step_bytes = {
        "dense": sum(m.shape[0] * m.shape[1] for m in multiplied) * 4,
        "nonzero": sum((1 if m.encoding == "int8" else 4) * m.n_nonzeros for m in multiplied),
    }
    if settings.weights == "sparse-operator" or settings.is_nbits or settings.is_integer:
        step_bytes["stored"] = sum(m.bytes for m in multiplied)  # the operator reads what lies in the file
    return {
        "kind": "artifact",
        **settings.model_dump(mode="json", include={"target", "weights", "precision"}),
        **artifact_identity(checkpoint, settings),
        "graph": "traced" if shape.is_traced else "lean",
        "model_type": shape.model_type,
        "n_blocks": shape.n_blocks,
        "n_kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_positions": shape.max_positions,
        "bytes_on_disk": folder_bytes(folder),
        "bytes_dense": 4 * n_elements,
        "bytes_per_decode_step": step_bytes,
        "sparsity": lineage.get("sparsity") or _sparsity(multiplied, n_elements),
        "matrices": [
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                "sparsity": matrix.sparsity,
                "encoding": matrix.encoding,
                "precision": matrix.precision,
                "is_external": matrix.is_external,
                "predicted_bytes": matrix.predicted_bytes,
                "bytes": matrix.bytes,
            }
            for matrix in matrices
        ],
        "checkpoint": lineage,
        "parity": None,
    }


def _sparsity(multiplied: list[StoredMatrix], n_elements: int) -> dict[str, float]:
    """Return what another tool's pruning left, where no manifest says it.

    A dense model's own zeros are not counted: rounded to 4 bits, an eighth of its weights may be zero.
    """
    pruned = [matrix for matrix in multiplied if matrix.sparsity >= _PRUNED]
    n_zeros = sum(matrix.shape[0] * matrix.shape[1] - matrix.n_nonzeros for matrix in pruned)
    share = n_zeros / sum(matrix.shape[0] * matrix.shape[1] for matrix in pruned) if pruned else 0.0
    return {"target": share, "linears": share, "model": n_zeros / n_elements}
