"""The prune stage: a checkpoint goes in, a sparse checkpoint comes out, one decoder block at a time.

In: a model name and `PruneSettings`. Out: a Hugging Face folder with zeros in place, `owl.json`
(settings, data, sparsity asked and realised; the same bytes for the same work) and `measured.json`
(time and memory of this very run). What a method or an allocation computes is not known here.

A finished block is a shard of the final checkpoint, written whole into a hidden sibling of the
output folder; a run that was stopped continues behind its last shard.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from owl_deploy import allocation
from owl_deploy.calibration import Calibration, calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.files import file_sha256, new_folder, write_bytes, write_json
from owl_deploy.memory import peak_rss_bytes, release_free_memory, reset_peak_rss, rss_bytes
from owl_deploy.methods import METHODS, Method
from owl_deploy.methods.wanda import score as wanda_score
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import BlockInputs, Skeleton, open_skeleton
from owl_deploy.statistics import InputStatistic, SquaredNorm, outlier_ratio
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions

__all__ = ["SparsityReport", "mask_sha256", "predicted_peak_bytes", "prune", "prune_versions"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparsityReport:
    """What pruning did; `facts` are the JSON keys that other tools rely on."""

    checkpoint: Path
    facts: dict[str, Any]
    """Content of owl.json."""
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy prune --json` prints."""
        settings = self.facts["recipe"]["prune"]
        return {
            "checkpoint": str(self.checkpoint),
            **{key: settings[key] for key in ("method", "allocation", "pattern")},
            **{key: self.facts[key] for key in ("sparsity", "blocks", "linears", "mask_sha256")},
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "tokens_sha256": (self.facts["calibration"] or {}).get("tokens_sha256"),
        }


def prune(
    model: str,
    settings: PruneSettings = PruneSettings(),
    *,
    out: Path,
    seed: int = 0,
    threads: int | Literal["auto"] = "auto",
    resume: bool = False,
    force: bool = False,
    offline: bool = False,
    on_step: OnStep = silent,
) -> SparsityReport:
    """Prune a model and write the sparse checkpoint.

    Peak memory is about `predicted_peak_bytes`: embeddings, two blocks in float32, and the hidden
    states of the calibration sequences (sampling `generated` text the first time holds the whole
    model once).

    Args:
        model: local folder, `.gguf` file, hub id or `demo:` name.
        settings: method, allocation, sparsity, calibration.
        out: folder of the sparse checkpoint.
        seed: of the calibration samples.
        threads: torch threads; a resumed run must use as many, or sums could round differently.
        resume: continue a stopped run of the same model, data and settings.
        force: replace `out` if it exists.
        offline: never ask a hub.
        on_step: told of every finished block.

    Raises:
        OwlDeployError: and its subclasses; nothing half-written is left under `out`.
    """
    started = time.perf_counter()
    if out.exists() and not force:
        raise OwlDeployError(f"{out} exists already: give another --out, or --force to replace it")
    n_threads = resolve_threads(threads).n
    torch.set_num_threads(n_threads)
    checkpoint = open_checkpoint(model, offline=offline)
    skeleton = open_skeleton(checkpoint)
    method = METHODS[settings.method]
    needs_data = method.new_statistic is not None or settings.allocation == "owl"
    calibration = calibration_tokens(checkpoint, settings, seed=seed, on_step=on_step) if needs_data else None
    gc.collect()  # sampling held the whole model
    release_free_memory()
    reset_peak_rss()
    log.info("predicted peak memory: %.2f GiB", predicted_peak_bytes(skeleton, settings) / 2**30)

    fingerprint = _fingerprint(checkpoint, settings, calibration, seed, n_threads)
    work = _Work.open(out, fingerprint, resume=resume)
    ratios = _outlier_ratios(skeleton, settings, calibration, work, on_step)
    sparsities = _allocate(settings, skeleton.n_weights(), ratios)
    _prune_blocks(skeleton, method, calibration, sparsities, work, on_step)
    facts = _facts(skeleton, settings, calibration, seed, ratios, sparsities, work)
    skeleton.model.to("meta")  # what is left of it, the embedding, is read anew for the final file
    release_free_memory()
    totals = _finish(skeleton, work, out, facts, started)
    return SparsityReport(out, facts, totals["seconds"], totals["peak_rss_bytes"])


def predicted_peak_bytes(skeleton: Skeleton, settings: PruneSettings) -> int:
    """Predict peak resident memory in bytes: what is held now, and the larger of pruning and finishing."""
    outside = sum(
        p.numel() for name, p in skeleton.model.named_parameters() if not name.startswith(f"{skeleton.prefix}.")
    )
    blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    largest_linear = max(
        linear.weight.numel() for i in range(len(skeleton.blocks)) for linear in skeleton.linears(i).values()
    )
    hidden: int = skeleton.model.config.hidden_size
    widest: int = max(linear.out_features for linear in skeleton.linears(0).values())
    activations = settings.n_samples * settings.seq_len * hidden + 8 * settings.seq_len * widest
    # A block is held by the model, as read and as serialised; what lies outside the blocks as read and
    # by the model, and at the end as read and two to three times by the serialiser. Selection holds the
    # score (4 bytes), its sorted copy (4), the order (8) and the mask (1) of one matrix.
    while_pruning: int = 4 * (2 * outside + 3 * max(blocks) + activations) + 17 * largest_linear
    while_finishing: int = 4 * 4 * outside
    return rss_bytes() + max(while_pruning, while_finishing)


def prune_versions() -> dict[str, str]:
    """Return the versions that a sparse checkpoint depends on."""
    return versions("torch", "transformers", "safetensors")


def mask_sha256(masks: dict[str, torch.Tensor]) -> str:
    """Return one hash of where weights are kept: names, shapes and packed bits, in order.

    Args:
        masks: linear name -> bool (out, in), True = kept.
    """
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(np.packbits(mask.numpy()).tobytes())
    return digest.hexdigest()


def _fingerprint(
    checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration | None, seed: int, n_threads: int
) -> dict[str, Any]:
    """Return all that the bytes of the result depend on, by a name a user knows."""
    return {
        **settings.model_dump(mode="json"),
        "seed": seed,
        "threads": n_threads,
        "tokens_sha256": calibration.sha256 if calibration else None,
        **{f"model file {name}": digest for name, digest in checkpoint.fingerprint.items()},
        **{f"{name} version": text for name, text in prune_versions().items()},
    }


@dataclass(frozen=True)
class _Work:
    """The hidden folder in which the checkpoint grows, block by block."""

    folder: Path

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], *, resume: bool) -> _Work:
        """Start afresh, or continue a folder of the same fingerprint.

        Raises:
            RecipeError: the folder was begun with other settings, data or model; the first difference is named.
        """
        folder = out.with_name(f".{out.name}.partial")
        work = cls(folder)
        before = work.load("fingerprint.json") if resume else None
        if isinstance(before, dict):
            for key in (*fingerprint, *before):
                if fingerprint.get(key) != before.get(key):
                    raise RecipeError(
                        f"cannot resume {out}: {key} was {before.get(key)!r} and is now {fingerprint.get(key)!r}; "
                        "set it back, or start anew without --resume"
                    )
            return work
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "fingerprint.json", fingerprint)
        return work

    def load(self, name: str) -> Any:
        """Return a JSON file of the folder, or None where it is not there or damaged: it is then made anew."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is damaged and made anew: %s", self.folder / name, error)
            return None

    def is_finished(self, index: int) -> bool:
        """Return whether a block's record and its shard are there and undamaged."""
        record = self.load(f"block-{index:05d}.json")
        if not isinstance(record, dict) or not {"linears", "measured", "shard_sha256"} <= record.keys():
            return False
        shard = self.shard(index)
        if not shard.is_file() or file_sha256(shard) != record["shard_sha256"]:
            log.warning("%s is missing or damaged and made anew", shard)
            return False
        return True

    def shard(self, index: int) -> Path:
        """Return the file of a block's weights."""
        return self.folder / f"block-{index:05d}.safetensors"


def _outlier_ratios(
    skeleton: Skeleton, settings: PruneSettings, calibration: Calibration | None, work: _Work, on_step: OnStep
) -> list[float] | None:
    """Return the outlier ratio of every block of the dense model, where the allocation needs it."""
    if settings.allocation != "owl" or calibration is None:
        return None
    known = work.load("outlier_ratios.json")
    if isinstance(known, list) and len(known) == len(skeleton.blocks):
        return known
    inputs = skeleton.capture(torch.from_numpy(calibration.tokens))
    ratios: list[float] = []
    for index in range(len(skeleton.blocks)):
        linears = skeleton.linears(index)
        with skeleton.filled(index) as block:
            statistics = {name: SquaredNorm(linear.in_features) for name, linear in linears.items()}
            _run_block_(block, inputs, index, linears, statistics)
            scores = [wanda_score(linear.weight, statistics[name]) for name, linear in linears.items()]
        ratios.append(outlier_ratio(scores, owl_m=settings.owl_m))
        on_step(Step("outliers of the dense model", index + 1, len(skeleton.blocks), f"{ratios[-1]:.2%}"))
    write_json(work.folder / "outlier_ratios.json", ratios)
    return ratios


def _allocate(settings: PruneSettings, n_weights: list[int], ratios: list[float] | None) -> list[float]:
    """Return one sparsity per block."""
    if ratios is None:
        return allocation.uniform(n_weights, settings.sparsity)
    return allocation.owl(ratios, n_weights, settings.sparsity, owl_lambda=settings.owl_lambda)


def _prune_blocks(
    skeleton: Skeleton,
    method: Method,
    calibration: Calibration | None,
    sparsities: list[float],
    work: _Work,
    on_step: OnStep,
) -> None:
    """Prune block after block; the statistics of each see the pruned blocks before it."""
    inputs = skeleton.capture(torch.from_numpy(calibration.tokens)) if method.new_statistic and calibration else None
    for index, sparsity in enumerate(sparsities):
        started = time.perf_counter()
        shard = work.shard(index)
        is_done = work.is_finished(index)
        with skeleton.filled(index) as block:
            if not is_done:
                linears = _prune_block_(skeleton, block, index, method, inputs, sparsity, shard)
            elif inputs is not None:
                _fill_from_shard_(skeleton, index, shard)
            if inputs is not None:
                _run_block_(block, inputs, index, {}, {})
        if not is_done:
            timing = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            record = {"linears": linears, "measured": timing, "shard_sha256": file_sha256(shard)}
            write_json(work.folder / f"block-{index:05d}.json", record)
        on_step(
            Step("pruning blocks", index + 1, len(sparsities), f"{'kept' if is_done else 'sparsity'} {sparsity:.3f}")
        )


def _prune_block_(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    method: Method,
    inputs: BlockInputs | None,
    sparsity: float,
    shard: Path,
) -> list[dict[str, Any]]:
    """Prune the linears of a filled block in place, write its shard, and return the facts of each linear."""
    linears = skeleton.linears(index)
    statistics: dict[str, InputStatistic] = {}
    if method.new_statistic is not None and inputs is not None:
        statistics = {name: method.new_statistic(linear.in_features) for name, linear in linears.items()}
        _run_block_(block, inputs, index, linears, statistics, keep_inputs=True)
    names = skeleton.block_tensors(index)
    tensors: dict[str, torch.Tensor] = {}
    facts = []
    for parameter, tensor in names.items():
        stored = skeleton.checkpoint.read(tensor)
        name = parameter.removesuffix(".weight")
        if name in linears:
            weight = linears[name].weight
            pruned = method.prune(weight, statistics.get(name), sparsity).to(stored.dtype)
            weight.copy_(pruned)  # later blocks see what the file holds, rounding included
            kept = pruned != 0
            facts.append(
                {
                    "name": name,
                    "shape": list(pruned.shape),
                    "asked": sparsity,
                    "sparsity": 1 - int(kept.sum()) / kept.numel(),
                    "n_zeros": kept.numel() - int(kept.sum()),
                    "mask_sha256": mask_sha256({name: kept}),
                }
            )
            stored = pruned
        tensors[tensor] = stored.contiguous()
    write_bytes(shard, save(tensors, metadata={"format": "pt"}))
    return facts


def _fill_from_shard_(skeleton: Skeleton, index: int, shard: Path) -> None:
    """Put the pruned weights of a finished block back into it."""
    stored = load_file(shard)
    prefix = f"{skeleton.prefix}.{index}."
    for parameter, tensor in skeleton.block_tensors(index).items():
        skeleton.fill_(skeleton.blocks[index], parameter.removeprefix(prefix), stored[tensor])


@torch.inference_mode()
def _run_block_(
    block: nn.Module,
    inputs: BlockInputs,
    index: int,
    linears: dict[str, nn.Linear],
    statistics: dict[str, InputStatistic] | dict[str, SquaredNorm],
    *,
    keep_inputs: bool = False,
) -> None:
    """Run every calibration sequence through a block, one at a time, feeding the statistics.

    The hidden states are replaced in place by the block's outputs, unless `keep_inputs`.

    Raises:
        OwlDeployError: an activation is NaN or Inf.
    """
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: statistics[name].update(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, linear in linears.items()
    ]
    args, kwargs = inputs.arguments[index]
    try:
        for i, hidden_state in enumerate(inputs.hidden_states):
            output = block(hidden_state, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            if not keep_inputs:
                inputs.hidden_states[i] = output
            if not torch.isfinite(output).all():
                raise OwlDeployError(
                    f"the output of block {index} holds NaN or Inf on calibration sequence {i}: nothing was "
                    "pruned after it"
                )
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistic in statistics.items():
        if not statistic.is_finite():
            raise OwlDeployError(f"the input of {name} holds NaN or Inf, or its squares overflow float32")


def _facts(
    skeleton: Skeleton,
    settings: PruneSettings,
    calibration: Calibration | None,
    seed: int,
    ratios: list[float] | None,
    sparsities: list[float],
    work: _Work,
) -> dict[str, Any]:
    """Return the content of owl.json: the same for the same work, whenever and however often it was stopped."""
    checkpoint = skeleton.checkpoint
    per_block = [work.load(f"block-{index:05d}.json")["linears"] for index in range(len(sparsities))]
    linears = [fact for facts in per_block for fact in facts]
    n_zeros = sum(fact["n_zeros"] for fact in linears)
    n_pruned_weights = sum(skeleton.n_weights())
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    blocks = [
        {
            "index": index,
            "sparsity": sparsity,
            "realised": sum(fact["n_zeros"] for fact in facts)
            / sum(fact["shape"][0] * fact["shape"][1] for fact in facts),
            **({"outlier_ratio": ratios[index]} if ratios is not None else {}),
        }
        for index, (sparsity, facts) in enumerate(zip(sparsities, per_block, strict=True))
    ]
    return {
        "kind": "checkpoint",
        "format_version": 1,
        "recipe": {"model": checkpoint.source, "seed": seed, "prune": settings.model_dump(mode="json")},
        "versions": prune_versions(),
        "source": {"model": checkpoint.source, "sha256": checkpoint.fingerprint},
        "calibration": calibration.facts() if calibration else None,
        "sparsity": {
            "target": settings.sparsity,
            "linears": n_zeros / n_pruned_weights,
            "model": n_zeros / n_parameters,
        },
        "blocks": blocks,
        "linears": linears,
        "mask_sha256": hashlib.sha256("".join(fact["mask_sha256"] for fact in linears).encode()).hexdigest(),
    }


def _finish(skeleton: Skeleton, work: _Work, out: Path, facts: dict[str, Any], started: float) -> dict[str, Any]:
    """Gather shards, the tensors outside the blocks, configuration and tokenizer; return time and memory."""
    checkpoint = skeleton.checkpoint
    n_blocks = len(skeleton.blocks)
    in_blocks = {tensor for index in range(n_blocks) for tensor in skeleton.block_tensors(index).values()}
    with new_folder(out, replace=True) as folder:
        weight_map: dict[str, str] = {}
        outside = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors if name not in in_blocks}
        first = f"model-{1:05d}-of-{n_blocks + 1:05d}.safetensors"
        write_bytes(folder / first, save(outside, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(outside, first)
        for index in range(n_blocks):
            name = f"model-{index + 2:05d}-of-{n_blocks + 1:05d}.safetensors"
            _link(work.shard(index), folder / name)
            weight_map |= dict.fromkeys(skeleton.block_tensors(index).values(), name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
        for file in sorted(checkpoint.path.iterdir()):
            if (
                file.is_file()
                and file.suffix in (".json", ".jinja", ".txt", ".model")
                and not file.name.endswith(".index.json")
            ):
                shutil.copyfile(file, folder / file.name)
        write_json(folder / "owl.json", facts)
        measured = [work.load(f"block-{index:05d}.json")["measured"] for index in range(n_blocks)]
        totals = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
        write_json(folder / "measured.json", {**totals, "blocks": measured})
    shutil.rmtree(work.folder, ignore_errors=True)
    return totals


def _link(source: Path, target: Path) -> None:
    """Give a finished shard its final name without copying it, where the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
