"""Peers made ready: a model in the form that another engine runs, once, in the cache.

In: `PeerSettings`, the dense model, the artifacts. Out: a `Peer`. What fails here is that engine's row in a report,
never the end of a run. Nothing is timed, and no code of a model is run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.devices import has_bfloat16_instructions
from owl_deploy.engines.llama_cpp import LLAMA_CPP, has_compiler
from owl_deploy.engines.openvino import OPENVINO
from owl_deploy.engines.peer import PEER_FORMAT, Peer, PeerFacts, open_peer
from owl_deploy.engines.process import open_worker
from owl_deploy.engines.status import library_status
from owl_deploy.errors import EngineUnavailableError, UnsupportedModelError
from owl_deploy.files import file_sha256, new_folder, write_json
from owl_deploy.kernels import library_path
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import ExportSettings, PeerSettings

__all__ = ["prepared_peer"]

# Part of every key in the cache: raise it when what is written changes.
_PREPARATION = 1
# A quantiser is silent until it is done, and a large model takes it minutes.
_QUANTIZE_S = 3600.0
_BITS = {"fp32": 32, "bf16": 16}


def prepared_peer(
    settings: PeerSettings,
    *,
    model: str | None,
    artifacts: Sequence[OnnxArtifact],
    threads: int,
    on_step: OnStep = silent,
) -> Peer:
    """Return a peer, making it first where the cache has none of this model and version.

    Args:
        settings: engine and precision.
        model: the dense model, MODEL as on the command line; None where there is none.
        artifacts: what onnxruntime-genai may be asked to run.
        threads: of a quantiser.
        on_step: told of each preparation that takes long.

    Raises:
        EngineUnavailableError: the engine is not here, or failed.
        UnsupportedModelError: the engine has no place for this model or artifact, or there is no model.
    """
    if settings.engine == "onnxruntime-genai":
        return _genai(settings, artifacts)
    if model is None:
        raise UnsupportedModelError(
            f"{settings.engine} runs the dense model, and none is named: give --reference MODEL"
        )
    if settings.engine == "llama.cpp":
        LLAMA_CPP.python()  # before any work
        path = _llama_cpp(open_checkpoint(model), settings.precision, threads, on_step)
        return open_peer(path, settings.name)
    if settings.engine == "openvino":
        OPENVINO.python()
        return open_peer(_openvino(open_checkpoint(model), settings.precision, threads, on_step), settings.name)
    return _torch(settings, open_checkpoint(model))


def _llama_cpp(checkpoint: Checkpoint, precision: str, threads: int, on_step: OnStep) -> Path:
    """Return the folder of a GGUF file of this precision."""
    path = _folder("llama.cpp", precision, LLAMA_CPP.version, checkpoint.fingerprint)
    if path.is_dir():
        return path
    with new_folder(path) as folder:
        file = folder / "model.gguf"
        if precision == "f32":
            from owl_deploy.engines.gguf_model import write_gguf

            on_step(Step("preparing llama.cpp", 0, 1, "f32"))
            write_gguf(checkpoint, file)
        else:
            source = _llama_cpp(checkpoint, "f32", threads, on_step) / "model.gguf"
            on_step(Step("preparing llama.cpp", 0, 1, precision))
            with open_worker("llama.cpp", timeout_s=_QUANTIZE_S) as worker:
                worker.ask("quantize", source=str(source), file=str(file), precision=precision, threads=threads)
        write_json(folder / "owl.json", _gguf_facts(checkpoint, precision, file).model_dump(mode="json"))
    on_step(Step("preparing llama.cpp", 1, 1, precision))
    return path


def _gguf_facts(checkpoint: Checkpoint, precision: str, file: Path) -> PeerFacts:
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    # Of an embedding that is no head as well, a step reads one row.
    step_bytes = sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    return _facts(
        checkpoint,
        target="llama.cpp",
        version=LLAMA_CPP.version,
        precision=precision,
        model=".",
        bytes_dense=sum(sizes.values()),
        step_bytes=step_bytes,
        kv_element_bytes=2,
        notes=("keys and values are float16, llama.cpp's default",),
    )


def _openvino(checkpoint: Checkpoint, precision: str, threads: int, on_step: OnStep) -> Path:
    """Return the folder of an OpenVINO model of this precision, made of a graph of standard operators."""
    path = _folder("openvino", precision, OPENVINO.version, checkpoint.fingerprint)
    if path.is_dir():
        return path
    from owl_deploy.export.writer import export_onnx

    on_step(Step("preparing openvino", 0, 1, precision))
    with new_folder(path) as folder:
        source = folder / "source"
        # OpenVINO knows no GroupQueryAttention of ONNX Runtime; DeepSparse's dialect has standard operators alone.
        export_onnx(
            str(checkpoint.path), ExportSettings(target="deepsparse"), out=source, threads=threads, parity=False
        )
        max_positions = open_artifact(source).facts.max_positions
        with open_worker("openvino", timeout_s=_QUANTIZE_S) as worker:
            worker.ask(
                "quantize",
                source=str(source / "model.onnx"),
                file=str(folder / "model.xml"),
                precision=precision,
                threads=threads,
            )
        shutil.rmtree(source)
        facts = _openvino_facts(checkpoint, precision, (folder / "model.bin").stat().st_size, max_positions)
        write_json(folder / "owl.json", facts.model_dump(mode="json"))
    on_step(Step("preparing openvino", 1, 1, precision))
    return path


def _openvino_facts(checkpoint: Checkpoint, precision: str, n_bytes: int, max_positions: int) -> PeerFacts:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    is_tied = bool(checkpoint.config.get("tie_word_embeddings")) or "lm_head.weight" not in shapes
    element_bytes = 4 if precision == "fp32" else 1  # of an embedding, in int4 models too
    embedding = 0 if is_tied else math.prod(shapes.get("model.embed_tokens.weight", (0,))) * element_bytes
    # What OpenVINO's runtime model says; its cache of 8 bits belongs to a fused attention that this graph does not get.
    products = torch.bfloat16 if has_bfloat16_instructions() else torch.float32
    computed = (
        f"products, keys and values in {str(products).removeprefix('torch.')}, OpenVINO's default for this machine"
    )
    rounded = {
        "fp32": "computed in float32, keys and values too",
        "int8": f"weights rounded by NNCF, int8 with a scale per row; {computed}",
        "int4": f"weights rounded by NNCF, symmetric int4 in groups of 32, head and embedding int8; {computed}",
    }
    facts = _facts(
        checkpoint,
        target="openvino",
        version=OPENVINO.version,
        precision=precision,
        model=".",
        bytes_dense=n_bytes,
        step_bytes=n_bytes - embedding,
        kv_element_bytes=4 if precision == "fp32" else products.itemsize,
        notes=(
            rounded[precision],
            "timed decode steps follow one another, each with one position more in the cache than the one before",
        ),
    )
    return facts.model_copy(update={"max_positions": max_positions})


def _torch(settings: PeerSettings, checkpoint: Checkpoint) -> Peer:
    status = library_status("torch")
    if not status.is_available:
        raise EngineUnavailableError(status.reason)
    if settings.engine == "torch-compiled" and not has_compiler():
        raise EngineUnavailableError("torch compiles for CPUs with a C++ compiler, and none is on PATH: install g++")
    element_bytes = _BITS[settings.precision] // 8
    path = _folder(settings.engine, settings.precision, status.version, checkpoint.fingerprint)
    if not path.is_dir():
        sizes = {name: math.prod(entry.shape) * element_bytes for name, entry in checkpoint.tensors.items()}
        is_tied = bool(checkpoint.config.get("tie_word_embeddings")) or "lm_head.weight" not in sizes
        embedding = 0 if is_tied else sizes.get("model.embed_tokens.weight", 0)
        facts = _facts(
            checkpoint,
            target=settings.engine,
            version=status.version,
            precision=settings.precision,
            model=str(checkpoint.path.resolve()),
            bytes_dense=sum(sizes.values()),
            step_bytes=sum(sizes.values()) - embedding,
            kv_element_bytes=element_bytes,
            notes=(),
        )
        with new_folder(path) as folder:
            write_json(folder / "owl.json", facts.model_dump(mode="json"))
    return open_peer(path, settings.name)


def _genai(settings: PeerSettings, artifacts: Sequence[OnnxArtifact]) -> Peer:
    status = library_status(settings.engine)
    if not status.is_available:
        raise EngineUnavailableError(status.reason)
    artifact = next((one for one in artifacts if one.name == settings.artifact), None)
    if artifact is None:
        raise UnsupportedModelError(f"onnxruntime-genai cannot run {settings.artifact}: no artifact has this name")
    _check_genai_folder(artifact)
    facts = artifact.facts
    step_bytes = facts.bytes_per_decode_step.get("stored", facts.bytes_per_decode_step["dense"])
    own = PeerFacts(
        target="onnxruntime-genai",
        version=status.version,
        weights=facts.weights,
        precision=facts.precision,
        model=str(artifact.path.resolve()),
        vocab_size=facts.vocab_size,
        max_positions=facts.max_positions,
        bytes_dense=facts.bytes_dense,
        bytes_per_decode_step={"dense": step_bytes, "nonzero": step_bytes},
        kv_bytes_per_position=artifact.kv_bytes(1),
        sparsity=facts.sparsity,
        parity=artifact.manifest.get("parity"),
        notes=("prefill computes the logits of all tokens of the prompt, not those of the last one alone",),
    )
    identity = {"path": own.model, "manifest": file_sha256(artifact.path / "owl.json")}
    path = _folder(settings.engine, facts.precision, status.version, identity)
    if not path.is_dir():
        with new_folder(path) as folder:
            write_json(folder / "owl.json", own.model_dump(mode="json"))
    return open_peer(path, settings.name)


def _check_genai_folder(artifact: OnnxArtifact) -> None:
    """Refuse an artifact by which onnxruntime-genai would load code that is not ours.

    It takes the operator library from the model's folder alone, so that file must be the one that is installed here.
    """
    file = artifact.path / "genai_config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        options = config["model"]["decoder"]["session_options"]
        others = {key: value for key, value in options.items() if key not in ("log_id", "custom_ops_library")}
        library = options.get("custom_ops_library")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{file} is not a configuration of onnxruntime-genai: {error}") from error
    if others != {"provider_options": []} or set(config["model"]) & {"vision", "speech", "encoder", "embedding"}:
        raise UnsupportedModelError(f"{file} is not as it was exported: export {artifact.name} again")
    if library is None:
        return
    installed = library_path()
    own = artifact.path / str(library)
    if own.name != str(library) or not own.is_file() or file_sha256(own) != file_sha256(installed):
        raise UnsupportedModelError(
            f"{artifact.name} brings an operator library that is not the one installed here, and is not run in "
            "onnxruntime-genai, which would load it: export it again"
        )


def _facts(
    checkpoint: Checkpoint,
    *,
    target: str,
    version: str,
    precision: str,
    model: str,
    bytes_dense: int,
    step_bytes: int,
    kv_element_bytes: int,
    notes: tuple[str, ...],
) -> PeerFacts:
    """Return the manifest of a peer that runs a checkpoint."""
    config = checkpoint.config
    n_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // n_heads)
    n_kv_heads = int(config.get("num_key_value_heads") or n_heads)
    realised = (checkpoint.manifest or {}).get("sparsity") or {}
    return PeerFacts(
        target=target,
        version=version,
        weights="dense",
        precision=precision,
        model=model,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        bytes_dense=bytes_dense,
        bytes_per_decode_step={"dense": step_bytes, "nonzero": step_bytes},
        kv_bytes_per_position=2 * kv_element_bytes * int(config["num_hidden_layers"]) * n_kv_heads * head_dim,
        sparsity={"linears": float(realised.get("linears", 0.0))},
        notes=notes,
    )


def _folder(engine: str, precision: str, version: str, identity: dict[str, str]) -> Path:
    """Return the folder in the cache, whose name changes with everything that its content depends on."""
    described = json.dumps([_PREPARATION, PEER_FORMAT, engine, precision, version, identity], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    return owl_deploy_cache() / "peers" / f"{engine}-{precision}-{key}"
