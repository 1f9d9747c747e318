"""The prune stage: a checkpoint goes in, a sparse checkpoint comes out, one decoder block at a time.

In: a model name and `PruneSettings`. Out: a Hugging Face folder with zeros in place, `owl.json`
(settings, data, sparsity asked and realised; the same bytes for the same work), `allocation.json`
(the sparsities of the blocks, to be edited and used again) and `measured.json`
(time and memory of this very run). What a method or an allocation computes is not known here.

A finished block is a shard of the final checkpoint, written whole into a hidden sibling of the
output folder; a run that was stopped continues behind its last shard.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from owl_deploy import allocation
from owl_deploy.allocation_file import load_allocation, save_allocation
from owl_deploy.block_figures import FIGURE_NAMES, NEEDS_INPUTS, block_figures, dense_norms
from owl_deploy.calibration import Calibration, calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.files import file_sha256, new_folder, write_bytes, write_json
from owl_deploy.memory import peak_rss_bytes, release_free_memory, reset_peak_rss, rss_bytes
from owl_deploy.methods import METHODS, Goal, Linear, Method, Pruned, magnitude
from owl_deploy.observation import Observed, advance_, input_groups, observe
from owl_deploy.pattern import parse_pattern
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import PruneSettings
from owl_deploy.refinement import InputMoments, dsnot
from owl_deploy.skeleton import BlockInputs, Prunable, Skeleton, open_skeleton
from owl_deploy.statistics import Hessian, InputStatistic, SquaredNorm
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
    _refuse_misfits(skeleton, settings, method)
    needs_data = bool(_statistic_kinds(settings, method)) or settings.allocation in NEEDS_INPUTS
    calibration = calibration_tokens(checkpoint, settings, seed=seed, on_step=on_step) if needs_data else None
    gc.collect()  # sampling held the whole model
    release_free_memory()
    reset_peak_rss()
    log.info("predicted peak memory: %.2f GiB", predicted_peak_bytes(skeleton, settings) / 2**30)

    fingerprint = _fingerprint(checkpoint, settings, calibration, seed, n_threads)
    work = _Work.open(out, fingerprint, resume=True) if resume else None
    norms = None
    if settings.allocation in NEEDS_INPUTS and calibration is not None:
        norms = dense_norms(skeleton, calibration, on_step, n_threads=n_threads)
    figures = block_figures(skeleton, settings, norms, on_step) if settings.allocation in FIGURE_NAMES else None
    sparsities = _allocate(settings, skeleton.n_weights(), figures)
    if work is None:  # only now: an allocation that refuses the model leaves nothing behind
        work = _Work.open(out, fingerprint, resume=False)
    _prune_blocks(skeleton, settings, method, calibration, sparsities, norms, work, on_step)
    facts = _facts(skeleton, settings, calibration, seed, figures, sparsities, work)
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
    method = METHODS[settings.method]
    # A Hessian per group of linears with the same inputs, and for the largest its inverse, damped copy and factor.
    hessians = 0
    if method.new_statistic is Hessian:
        sides = {(linear.mlp, linear.in_features, linear.role == "down") for linear in skeleton.linears(0).values()}
        hessians = sum(side**2 for _, side, _ in sides) + 5 * max(side for _, side, _ in sides) ** 2
    while_pruning: int = 4 * (2 * outside + 3 * max(blocks) + activations + hessians) + 17 * largest_linear
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


def _refuse_misfits(skeleton: Skeleton, settings: PruneSettings, method: Method) -> None:
    """Refuse settings that this model cannot have, before any work."""
    linears = {name: linear for i in range(len(skeleton.blocks)) for name, linear in skeleton.linears(i).items()}
    pattern = parse_pattern(settings.pattern)
    for name, linear in linears.items():
        if pattern is not None and linear.in_features % pattern.of:
            raise RecipeError(f"pattern {pattern} does not fit {name}, which has {linear.in_features} inputs")
    if method.needs_neurons and not any(linear.role in ("gate", "gate_up") for linear in linears.values()):
        raise UnsupportedModelError(
            f"{skeleton.checkpoint.path} has no gated MLP, which method {method.name} needs: use wanda"
        )


def _statistic_kinds(settings: PruneSettings, method: Method) -> tuple[Callable[[int], InputStatistic], ...]:
    """Return what must be known of the inputs of a linear: for the method first, then for the refinement."""
    kinds: list[Callable[[int], InputStatistic]] = []
    if method.new_statistic is not None:
        kinds.append(method.new_statistic)
    if settings.refine == "dsnot":
        kinds.append(InputMoments)
    return tuple(kinds)


def _allocate(settings: PruneSettings, n_weights: list[int], figures: list[float] | None) -> list[float]:
    """Return one sparsity per block."""
    target = settings.sparsity
    if settings.allocation.startswith("file:"):
        return load_allocation(Path(settings.allocation.removeprefix("file:")), n_weights, target)
    if settings.allocation == "ramp":
        slope = settings.ramp_slope
        if slope is None:
            slope = allocation.largest_slope(len(n_weights), target) / 2
        return allocation.ramp(n_weights, target, slope=slope)
    if figures is None:
        return allocation.uniform(n_weights, target)
    if settings.allocation == "owl":
        return allocation.owl(figures, n_weights, target, owl_lambda=settings.owl_lambda)
    if settings.allocation == "dlp":
        return allocation.dlp(figures, n_weights, target, alpha=settings.dlp_alpha)
    if settings.allocation == "isc":
        return allocation.isc(figures, n_weights, target, half_width=settings.isc_half_width)
    return allocation.alphapruning(figures, n_weights, target, epsilon=settings.alpha_epsilon)


def _prune_blocks(
    skeleton: Skeleton,
    settings: PruneSettings,
    method: Method,
    calibration: Calibration | None,
    sparsities: list[float],
    norms: list[dict[str, SquaredNorm]] | None,
    work: _Work,
    on_step: OnStep,
) -> None:
    """Prune block after block; the statistics of each see the pruned blocks before it."""
    inputs = None
    if _statistic_kinds(settings, method) and calibration is not None:
        inputs = skeleton.capture(torch.from_numpy(calibration.tokens))
    for index, sparsity in enumerate(sparsities):
        started = time.perf_counter()
        shard = work.shard(index)
        is_done = work.is_finished(index)
        with skeleton.filled(index) as block:
            if not is_done:
                # The inputs of block 0 are those of the dense model: what the allocation saw of them will do.
                known = norms[0] if norms is not None and index == 0 else {}
                goal = Goal(sparsity, parse_pattern(settings.pattern))
                linears = _prune_block_(skeleton, settings, method, block, index, inputs, known, goal, shard)
            elif inputs is not None:
                _fill_from_shard_(skeleton, index, shard)
            if inputs is not None and index + 1 < len(sparsities):
                advance_(block, inputs, index)
        if not is_done:
            timing = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            record = {"linears": linears, "measured": timing, "shard_sha256": file_sha256(shard)}
            write_json(work.folder / f"block-{index:05d}.json", record)
        on_step(
            Step("pruning blocks", index + 1, len(sparsities), f"{'kept' if is_done else 'sparsity'} {sparsity:.3f}")
        )


def _prune_block_(
    skeleton: Skeleton,
    settings: PruneSettings,
    method: Method,
    block: nn.Module,
    index: int,
    inputs: BlockInputs | None,
    known: dict[str, SquaredNorm],
    goal: Goal,
    shard: Path,
) -> list[dict[str, Any]]:
    """Prune the linears of a filled block in place, write its shard, and return the facts of each linear."""
    linears = skeleton.linears(index)
    kinds = _statistic_kinds(settings, method)
    groups = [tuple(linears)]
    if inputs is not None:
        groups = input_groups(block, inputs, index, linears)
    names = skeleton.block_tensors(index)
    dtypes = {parameter: skeleton.checkpoint.read(tensor).dtype for parameter, tensor in names.items()}
    facts: dict[str, dict[str, Any]] = {}
    # All groups see the dense block, or, true-sequentially, each one the pruned groups before it.
    for stage in [[group] for group in groups] if settings.true_sequential else [groups]:
        observed: dict[str, Observed] = {}
        if inputs is not None:
            if kinds == (SquaredNorm,) and known and not settings.true_sequential:
                observed = {name: Observed((norm,), n_tokens=-1) for name, norm in known.items()}
            else:
                observed = observe(block, inputs, index, linears, stage, kinds)
        neurons = _neurons(linears, observed) if method.needs_neurons else {}
        for name in (name for group in stage for name in group):
            linear = linears[name]
            pruned = _prune_linear(name, linear, settings, method, observed.get(name), neurons.get(linear.mlp), goal)
            weight = pruned.weight.to(dtypes[linear.parameter])
            linear.set_(weight)  # later blocks see what the file holds, rounding included
            facts[name] = _linear_facts(name, linear, weight, goal, pruned.notes)
    prefix = f"{skeleton.prefix}.{index}."
    tensors = {
        tensor: block.get_parameter(parameter.removeprefix(prefix)).detach().to(dtypes[parameter]).contiguous()
        for parameter, tensor in names.items()
    }
    write_bytes(shard, save(tensors, metadata={"format": "pt"}))
    return [facts[name] for name in linears]


def _neurons(linears: dict[str, Prunable], observed: dict[str, Observed]) -> dict[str | None, SquaredNorm]:
    """Return what was seen of the inputs of the down projection of every gated MLP."""
    found: dict[str | None, SquaredNorm] = {}
    for name, linear in linears.items():
        if linear.role == "down" and name in observed:
            norm = observed[name].statistics[0]
            assert isinstance(norm, SquaredNorm)
            found[linear.mlp] = norm
    return found


def _prune_linear(
    name: str,
    linear: Prunable,
    settings: PruneSettings,
    method: Method,
    observed: Observed | None,
    neurons: SquaredNorm | None,
    goal: Goal,
) -> Pruned:
    """Prune one linear; an expert that saw too few tokens by magnitude, which is noted."""
    weight = linear.weight.float()
    if observed is not None and 0 <= observed.n_tokens < max(1, settings.min_expert_tokens if linear.is_expert else 1):
        by_magnitude = magnitude.prune(Linear(name, weight), goal)
        return Pruned(by_magnitude.weight, {"fallback": "magnitude", "n_tokens": observed.n_tokens})
    options = {option: getattr(settings, option) for option in method.options}
    statistic = observed.statistics[0] if observed is not None and method.new_statistic is not None else None
    role = linear.role if neurons is not None or linear.role == "other" else "other"
    pruned = method.prune(Linear(name, weight, statistic, role, neurons), goal, **options)
    if settings.refine == "dsnot" and observed is not None:
        moments = observed.statistics[-1]
        assert isinstance(moments, InputMoments)
        mask = dsnot(weight, pruned.weight != 0, moments, goal)
        # Dense values: an update of the kept weights was made for another mask.
        n_swapped = int((mask & (pruned.weight == 0)).sum())
        pruned = Pruned(torch.where(mask, weight, 0.0), {**pruned.notes, "n_swapped": n_swapped})
    return pruned


def _linear_facts(
    name: str, linear: Prunable, weight: torch.Tensor, goal: Goal, notes: dict[str, Any]
) -> dict[str, Any]:
    """Return what owl.json says of a pruned linear; zeros are counted in the type that is stored."""
    kept = weight != 0
    n_zeros = kept.numel() - int(kept.sum())
    return {
        "name": name,
        "shape": list(weight.shape),
        "asked": goal.pattern.sparsity if goal.pattern else goal.sparsity,
        "sparsity": n_zeros / kept.numel(),
        "n_zeros": n_zeros,
        "mask_sha256": mask_sha256({name: kept}),
        **({"role": linear.role} if linear.role != "other" else {}),
        **({"notes": notes} if notes else {}),
    }


def _fill_from_shard_(skeleton: Skeleton, index: int, shard: Path) -> None:
    """Put the pruned weights of a finished block back into it."""
    stored = load_file(shard)
    prefix = f"{skeleton.prefix}.{index}."
    for parameter, tensor in skeleton.block_tensors(index).items():
        skeleton.fill_(skeleton.blocks[index], parameter.removeprefix(prefix), stored[tensor])


def _facts(
    skeleton: Skeleton,
    settings: PruneSettings,
    calibration: Calibration | None,
    seed: int,
    figures: list[float] | None,
    sparsities: list[float],
    work: _Work,
) -> dict[str, Any]:
    """Return the content of owl.json: the same for the same work, whenever and however often it was stopped."""
    checkpoint = skeleton.checkpoint
    per_block = [work.load(f"block-{index:05d}.json")["linears"] for index in range(len(sparsities))]
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
            **({FIGURE_NAMES[settings.allocation]: figures[index]} if figures is not None else {}),
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
            **({"mlp": mlp_zeros / mlp_size} if mlp_size else {}),
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
        save_allocation(folder / "allocation.json", [block["sparsity"] for block in facts["blocks"]])
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
