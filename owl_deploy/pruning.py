"""The prune stage: a checkpoint goes in, a sparse checkpoint comes out, one decoder block at a time.

In: a model name and `PruneSettings`. Out: a Hugging Face folder with zeros in place, `owl.json`
(settings, data, sparsity asked and realised; the same bytes for the same work), `allocation.json`
(the sparsities of the blocks or linears, to be edited and used again) and `measured.json`
(time and memory of this very run). What a method or an allocation computes is not known here.

A finished block is a shard of the final checkpoint, written whole into a hidden sibling of the
output folder; a run that was stopped continues behind its last shard.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from owl_deploy.allocation_file import save_allocation
from owl_deploy.allocation_stage import allocate, needs_calibration
from owl_deploy.block_pruning import forward_dtype, prune_block_, statistic_kinds, whole_mask_sha256
from owl_deploy.calibration import Calibration, calibration_tokens, must_be_sampled
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.devices import resolve_devices
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.files import new_folder, write_json
from owl_deploy.footprint import Footprint, predict_footprint
from owl_deploy.layer_sparsities import LayerSparsities
from owl_deploy.memory import available_bytes, peak_rss_bytes, release_free_memory, reset_peak_rss, rss_bytes
from owl_deploy.methods import METHODS
from owl_deploy.observation import Observed
from owl_deploy.pattern import parse_pattern
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import PruneSettings
from owl_deploy.replicas import Replicas
from owl_deploy.sharded_checkpoint import block_dtypes, fill_from_shard_, write_shard, write_sharded_checkpoint
from owl_deploy.skeleton import Skeleton, open_skeleton
from owl_deploy.statistics import Hessian
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions
from owl_deploy.work_folder import WorkFolder

__all__ = [
    "SparsityReport",
    "are_states_on_disk",
    "prune",
    "prune_versions",
    "refuse_misfits",
    "write_allocation",
]

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
    device: str = "auto",
    max_memory: int | None = None,
    resume: bool = False,
    force: bool = False,
    offline: bool = False,
    on_step: OnStep = silent,
) -> SparsityReport:
    """Prune a model and write the sparse checkpoint.

    Peak memory is about what `footprint.predict_footprint` says: a few copies of one block, and the hidden states of
    the calibration sequences, or those on disk where they do not fit (sampling `generated` text the first time, and
    Hutchinson traces, hold the whole model).

    Args:
        model: local folder, `.gguf` file, hub id or `demo:` name.
        settings: method, allocation, sparsity, calibration.
        out: folder of the sparse checkpoint.
        seed: of the calibration samples.
        threads: torch threads; a resumed run must use as many, or sums could round differently.
        device: where blocks are run, see `devices.resolve_devices`; masks are the same up to ties.
        max_memory: bytes that resident memory is to stay below; None is what the machine has free.
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
    devices = resolve_devices(device)
    skeletons = [open_skeleton(checkpoint, device) for device in devices]
    skeleton = skeletons[0]
    refuse_misfits(skeleton, settings)
    samples_text = needs_calibration(settings) and must_be_sampled(checkpoint, settings, seed=seed)
    footprint = predict_footprint(skeleton, settings, samples_text=samples_text)
    on_disk = are_states_on_disk(footprint, max_memory)
    reset_peak_rss()
    log.info("predicted peak memory: %s", footprint.describe(states_on_disk=on_disk))
    calibration = None
    if needs_calibration(settings):
        calibration = calibration_tokens(checkpoint, settings, seed=seed, on_step=on_step)
    gc.collect()  # sampling held the whole model
    release_free_memory()

    fingerprint = {
        **_fingerprint(checkpoint, settings, calibration, seed, n_threads),
        "device": ",".join(device.type for device in devices),
    }
    work = WorkFolder.open(out, fingerprint, resume=True) if resume else None
    folder = None
    if on_disk:
        folder = out.parent
        folder.mkdir(parents=True, exist_ok=True)
    sparsities, seen = allocate(
        skeletons, settings, calibration, seed=seed, n_threads=n_threads, folder=folder, on_step=on_step
    )
    if work is None:  # only now: an allocation that refuses the model leaves nothing behind
        work = WorkFolder.open(out, fingerprint, resume=False)
    asked = {name: goal.sparsity for block in sparsities.goals for name, goal in block.items()}
    work.keep("asked.json", asked, what="the allocation that was found")
    _prune_blocks(skeletons, settings, calibration, sparsities, seen, folder, work, on_step)
    facts = _facts(skeleton, settings, calibration, seed, sparsities, work)
    skeleton.model.to("meta")
    release_free_memory()
    totals = _finish(skeleton, sparsities, work, out, facts, started)
    log.info("measured peak memory: %.2f GiB", totals["peak_rss_bytes"] / 2**30)
    if max_memory is not None and totals["peak_rss_bytes"] > max_memory:
        log.warning(
            "peak memory was %.2f GiB, above the %.2f GiB promised: the prediction is at fault, please report it",
            totals["peak_rss_bytes"] / 2**30,
            max_memory / 2**30,
        )
    return SparsityReport(out, facts, totals["seconds"], totals["peak_rss_bytes"])


def are_states_on_disk(footprint: Footprint, max_memory: int | None) -> bool:
    """Decide where hidden states are, before any work.

    Raises:
        RecipeError: not even with hidden states on disk is `max_memory` enough.
    """
    limit = available_bytes() + rss_bytes() if max_memory is None else max_memory
    if footprint.peak(states_on_disk=False) <= limit:
        return False
    if max_memory is not None and footprint.peak(states_on_disk=True) > limit:
        raise RecipeError(
            f"max_memory {max_memory / 2**30:.2f} GiB is not enough: even with hidden states on disk this needs "
            f"{footprint.describe(states_on_disk=True)}"
        )
    return True


def prune_versions() -> dict[str, str]:
    """Return the versions that a sparse checkpoint depends on."""
    return versions("torch", "transformers", "safetensors")


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


def refuse_misfits(skeleton: Skeleton, settings: PruneSettings) -> None:
    """Refuse settings that this model cannot have, before any work.

    Raises:
        RecipeError: a pattern does not divide the inputs of a linear.
        UnsupportedModelError: the method needs a part that the model does not have.
    """
    method = METHODS[settings.method]
    linears = {name: linear for i in range(len(skeleton.blocks)) for name, linear in skeleton.linears(i).items()}
    pattern = parse_pattern(settings.pattern)
    for name, linear in linears.items():
        if pattern is not None and linear.in_features % pattern.of:
            raise RecipeError(f"pattern {pattern} does not fit {name}, which has {linear.in_features} inputs")
    if method.needs_neurons and not any(linear.role in ("gate", "gate_up") for linear in linears.values()):
        raise UnsupportedModelError(
            f"{skeleton.checkpoint.path} has no gated MLP, which method {method.name} needs: use wanda"
        )


def _prune_blocks(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    calibration: Calibration | None,
    sparsities: LayerSparsities,
    seen: list[dict[str, Observed]] | None,
    folder: Path | None,
    work: WorkFolder,
    on_step: OnStep,
) -> None:
    """Prune block after block; the statistics of each see the pruned blocks before it."""
    skeleton, replicas = skeletons[0], None
    if statistic_kinds(settings) and calibration is not None:
        replicas = Replicas.capture(
            skeletons,
            torch.from_numpy(calibration.tokens),
            threads_apart=Hessian not in statistic_kinds(settings),
            dtype=forward_dtype(settings),
            folder=folder,
        )
    n_blocks = len(skeleton.blocks)
    for index, sparsity in enumerate(sparsities.blocks):
        started = time.perf_counter()
        is_done = work.is_finished(index)
        with replicas.filled(index) if replicas is not None else skeleton.filled(index):
            if is_done and replicas is not None:
                fill_from_shard_(skeleton, index, work.shard(index))
            elif not is_done:
                # The inputs of block 0 are those of the dense model: what the allocation saw of them will do.
                known = seen[0] if seen is not None and index == 0 else None
                goals = sparsities.goals[index]
                dtypes = block_dtypes(skeleton, index)
                linears = prune_block_(skeleton, settings, index, replicas, known, goals, dtypes)
                write_shard(skeleton, index, work.shard(index))
            if replicas is not None and index + 1 < n_blocks:
                replicas.advance_(index)
        if not is_done:
            seconds = round(time.perf_counter() - started, 3)
            work.finish(index, linears=linears, measured={"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()})
        on_step(Step("pruning blocks", index + 1, n_blocks, f"{'kept' if is_done else 'sparsity'} {sparsity:.3f}"))


def _facts(
    skeleton: Skeleton,
    settings: PruneSettings,
    calibration: Calibration | None,
    seed: int,
    sparsities: LayerSparsities,
    work: WorkFolder,
) -> dict[str, Any]:
    """Return the content of owl.json: the same for the same work, whenever and however often it was stopped."""
    checkpoint = skeleton.checkpoint
    per_block = [work.record(index)["linears"] for index in range(len(sparsities.blocks))]
    linears = [fact for facts in per_block for fact in facts]
    n_zeros = sum(fact["n_zeros"] for fact in linears)
    n_pruned_weights = sum(skeleton.n_weights())
    # Papers that prune gated MLPs only count these.
    mlp = [fact for fact in linears if "role" in fact]
    mlp_zeros, mlp_size = sum(fact["n_zeros"] for fact in mlp), sum(math.prod(fact["shape"]) for fact in mlp)
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    blocks = [
        {
            "index": index,
            "sparsity": sparsity,
            "realised": sum(fact["n_zeros"] for fact in facts)
            / sum(fact["shape"][0] * fact["shape"][1] for fact in facts),
            **sparsities.figures_of_block(index),
        }
        for index, (sparsity, facts) in enumerate(zip(sparsities.blocks, per_block, strict=True))
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
            **({"mlp": mlp_zeros / mlp_size} if mlp_size else {}),
        },
        **({settings.allocation: sparsities.tuning} if sparsities.tuning else {}),
        "blocks": blocks,
        "linears": linears,
        "mask_sha256": whole_mask_sha256(linears),
    }


def _finish(
    skeleton: Skeleton, sparsities: LayerSparsities, work: WorkFolder, out: Path, facts: dict[str, Any], started: float
) -> dict[str, Any]:
    """Gather shards, the tensors outside the blocks, configuration and tokenizer; return time and memory."""
    n_blocks = len(skeleton.blocks)
    with new_folder(out, replace=True) as folder:
        write_sharded_checkpoint(skeleton, work.shard, folder)
        write_json(folder / "owl.json", facts)
        write_allocation(folder / "allocation.json", sparsities)
        measured = [work.record(index)["measured"] for index in range(n_blocks)]
        totals = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
        write_json(folder / "measured.json", {**totals, "blocks": measured})
    work.remove()
    return totals


def write_allocation(path: Path, sparsities: LayerSparsities) -> None:
    """Write what was asked, by block or by linear, as `--allocation file:PATH` takes it."""
    if sparsities.is_by_linear:
        of_linear = {name: goal.sparsity for block in sparsities.goals for name, goal in block.items()}
        save_allocation(path, list(of_linear.values()), names=list(of_linear))
    else:
        save_allocation(path, sparsities.blocks)
