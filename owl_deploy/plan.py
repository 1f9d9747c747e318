"""What pruning will do, said before anything is pruned: allocation, memory, time and sizes of what comes out.

In: a model, `PruneSettings`, the artifacts that are to be exported. Out: a `Plan`, numbers that can be printed,
plotted and written. `footprint` predicts memory, `pruning_time` time and `artifact_sizes` sizes, from counts of
weights, not by doing the work. What a data-driven allocation needs to know is found out as prune does it, through the
same caches. A folder with nothing but a config.json can be planned as well, as far as no weight counts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights

from owl_deploy import allocation
from owl_deploy.allocation import MAX_SPARSITY, largest_slope
from owl_deploy.allocation_figures import FIGURE_NAMES
from owl_deploy.allocation_stage import allocate, asks_calibration, needs_calibration
from owl_deploy.artifact_sizes import size_facts
from owl_deploy.calibration import calibration_tokens, must_be_sampled
from owl_deploy.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from owl_deploy.devices import resolve_devices
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.files import new_folder, write_bytes, write_json
from owl_deploy.footprint import predict_footprint
from owl_deploy.layer_sparsities import (
    LayerSparsities,
    share_out,
)
from owl_deploy.methods.method import Goal, n_pruned
from owl_deploy.pattern import parse_pattern
from owl_deploy.progress import OnStep, silent
from owl_deploy.pruning import are_states_on_disk, refuse_misfits, write_allocation
from owl_deploy.pruning_time import time_facts
from owl_deploy.recipe import ArtifactSettings, PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton, open_skeleton
from owl_deploy.threads import resolve_threads

__all__ = ["ALL_ARTIFACTS", "Plan", "open_configuration", "plan_pruning", "write_plan"]

ALL_ARTIFACTS = tuple(
    ArtifactSettings.model_validate(values)
    for values in (
        {"name": "dense", "checkpoint": "dense"},
        {"name": "sparse-initializer", "weights": "sparse-initializer"},
        *(
            {"name": f"sparse-operator-{precision}", "weights": "sparse-operator", "precision": precision}
            for precision in ("fp32", "fp16", "int8", "int4")
        ),
    )
)
"""What is shown where nobody says what will be exported."""

_NO_SPEEDUP = 0.4
"""Published decode times (OWL, LSA) and our own kernels gain little or nothing below this sparsity."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Plan:
    """What pruning will do."""

    facts: dict[str, Any]
    """Content of plan.json."""
    sparsities: LayerSparsities | None
    """The allocation; None where it takes weights that are not there."""


def plan_pruning(
    model: str,
    settings: PruneSettings = PruneSettings(),
    *,
    artifacts: Sequence[ArtifactSettings] = ALL_ARTIFACTS,
    seed: int = 0,
    threads: int | Literal["auto"] = "auto",
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    on_step: OnStep = silent,
) -> Plan:
    """Say what `prune` would do with the same arguments, and how large the artifacts would be.

    Args:
        model: as of `prune`, or a folder with a config.json and no weights.
        settings: method, allocation, sparsity, calibration.
        artifacts: what would be exported.
        seed: of the calibration samples.
        threads: of torch.
        device: where blocks are run.
        max_memory: bytes that resident memory is to stay below; None is what the machine has free.
        offline: never ask a hub.
        on_step: told of every block that an allocation looks at.

    Raises:
        RecipeError: the settings do not fit the model, or `max_memory` is not enough.
        OwlDeployError: and its subclasses, as of `prune`.
    """
    n_threads = resolve_threads(threads).n
    torch.set_num_threads(n_threads)
    checkpoint = _opened(model, offline=offline)
    skeletons = [open_skeleton(checkpoint, one) for one in resolve_devices(device)]
    skeleton = skeletons[0]
    refuse_misfits(skeleton, settings)
    has_weights = checkpoint.has_weights
    samples_text = needs_calibration(settings) and settings.calibration == "generated"
    if samples_text and has_weights:
        samples_text = must_be_sampled(checkpoint, settings, seed=seed)
    footprint = predict_footprint(skeleton, settings, samples_text=samples_text)
    on_disk = are_states_on_disk(footprint, max_memory)
    sparsities = None
    if has_weights or not _looks_at_weights(settings):
        sparsities = _allocated(skeletons, settings, seed, n_threads, on_step, on_disk=on_disk)
    shown = sparsities or share_out(skeleton, _uniform(settings), None, None, silent)
    linears = _linear_facts(skeleton, settings, shown)
    facts = {
        "kind": "plan",
        "format_version": 1,
        "recipe": {"model": model, "seed": seed, "prune": settings.model_dump(mode="json")},
        "model": _model_facts(skeleton, has_weights=has_weights),
        "sparsity": _sparsity_facts(skeleton, settings, linears),
        "range": None if sparsities else dict(zip(("lowest", "highest"), _range(skeleton, settings), strict=True)),
        "blocks": _block_facts(shown, linears, is_known=sparsities is not None),
        "linears": linears,
        **({settings.allocation: sparsities.tuning} if sparsities and sparsities.tuning else {}),
        "memory": {
            "peak_bytes": footprint.peak(states_on_disk=on_disk),
            "held_bytes": footprint.held,
            "phases": {**footprint.phases, **footprint.whole_model},
            "hidden_states_bytes": footprint.hidden_states,
            "are_hidden_states_on_disk": on_disk,
            "max_memory": max_memory,
        },
        "time": time_facts(
            skeleton, settings, linears, n_threads, is_known=sparsities is not None, samples_text=samples_text
        ),
        "sizes": size_facts(checkpoint, linears, artifacts),
    }
    return Plan({**facts, "notes": _notes(settings, facts)}, sparsities)


def write_plan(plan: Plan, out: Path, *, force: bool = False) -> None:
    """Write plan.json, plan.svg and, where the allocation is known, allocation.json for `--allocation file:PATH`.

    Raises:
        OwlDeployError: `out` exists, or the disk is full; nothing is left then.
    """
    from owl_deploy.plan_plot import plan_svg

    with new_folder(out, replace=force) as folder:
        write_json(folder / "plan.json", plan.facts)
        if plan.sparsities is not None:
            write_allocation(folder / "allocation.json", plan.sparsities)
        write_bytes(folder / "plan.svg", plan_svg(plan.facts))


def open_configuration(folder: Path) -> Checkpoint:
    """Open a folder that has a config.json and no weights: what a checkpoint of that model would look like.

    Tensors are those of the model that transformers builds, in the type that config.json names (float32 where it
    names none). Reading one fails.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an impossible config.json makes transformers or torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{folder} is not a causal language model that transformers knows: {reason}"
        ) from error
    model.tie_weights()
    kind = _DTYPES.get(config.dtype, "F32")
    tensors = {name: TensorEntry(file, tuple(p.shape), kind) for name, p in model.named_parameters()}
    return Checkpoint(folder, str(folder), tensors)


def _opened(model: str, *, offline: bool) -> Checkpoint:
    path = Path(model).expanduser()
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    if (path / "config.json").is_file() and not any(any(path.glob(pattern)) for pattern in weights):
        return open_configuration(path)
    return open_checkpoint(model, offline=offline)


def _model_facts(skeleton: Skeleton, *, has_weights: bool) -> dict[str, Any]:
    checkpoint = skeleton.checkpoint
    n_weights = skeleton.n_weights()
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return {
        "architecture": type(skeleton.model).__name__,
        "has_weights": has_weights,
        "n_blocks": len(n_weights),
        "n_linears": sum(len(skeleton.linears(index)) for index in range(len(n_weights))),
        "n_parameters": n_parameters,
        "n_prunable": sum(n_weights),
        "prunable_share": sum(n_weights) / n_parameters,
        "dtypes": sorted({entry.dtype for entry in checkpoint.tensors.values()}),
    }


def _looks_at_weights(settings: PruneSettings) -> bool:
    return settings.allocation in FIGURE_NAMES or asks_calibration(settings)


def _uniform(settings: PruneSettings) -> PruneSettings:
    return settings.model_copy(update={"allocation": "uniform", "allocation_per": "block"})


def _allocated(
    skeletons: Sequence[Skeleton], settings: PruneSettings, seed: int, n_threads: int, on_step: OnStep, *, on_disk: bool
) -> LayerSparsities:
    """Share out the target as prune does; what is learned from the model stays in the cache for it."""
    calibration = None
    if asks_calibration(settings):
        calibration = calibration_tokens(skeletons[0].checkpoint, settings, seed=seed, on_step=on_step)
    with _scratch(on_disk=on_disk) as folder:
        sparsities, _ = allocate(
            skeletons, settings, calibration, seed=seed, n_threads=n_threads, folder=folder, on_step=on_step
        )
        return sparsities


@contextmanager
def _scratch(*, on_disk: bool) -> Iterator[Path | None]:
    """Yield a folder for hidden states, which is gone afterwards, or None where they stay in memory."""
    if not on_disk:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _range(skeleton: Skeleton, settings: PruneSettings) -> tuple[float, float]:
    """Return the lowest and the highest sparsity that the rule can give a block or linear, whatever the model."""
    target, n_blocks = settings.sparsity, len(skeleton.blocks)
    sizes = skeleton.n_weights()
    if settings.allocation_per == "linear":
        sizes = [linear.weight.numel() for i in range(n_blocks) for linear in skeleton.linears(i).values()]
    smallest = sizes.index(min(sizes))
    # The mean is farthest from the end at which one unit is, the smallest, while all others are at the other end.
    figures = [[float((i == smallest) != is_flipped) for i in range(len(sizes))] for is_flipped in (False, True)]
    if settings.allocation == "evopress":
        return 0.0, max(MAX_SPARSITY, target)
    if settings.allocation == "isc":
        # Ranks cannot all be at one end, and with units of unequal size the whole ladder of them moves.
        others = 1 - min(sizes) / sum(sizes)
        reach = settings.isc_half_width * (1 if len(set(sizes)) == 1 else 2 * others)
        return max(0.0, target - reach), min(max(MAX_SPARSITY, target), target + reach)
    pattern = parse_pattern(settings.pattern)
    values: list[float] = []
    for found in figures:
        if pattern is not None:
            spread, n_of = settings.owl_pattern_spread, pattern.of - pattern.keep
            kept = allocation.owl_mixed_pattern(found, sizes, n_of, spread=spread)
            values += [1 - n / pattern.of for n in kept]
        elif settings.allocation == "owl":
            values += allocation.owl(found, sizes, target, owl_lambda=settings.owl_lambda)
        elif settings.allocation == "dlp":
            values += allocation.dlp(found, sizes, target, alpha=settings.dlp_alpha)
        elif settings.allocation == "alphapruning":
            values += allocation.alphapruning(found, sizes, target, epsilon=settings.alpha_epsilon)
        else:
            values += allocation.ramp(sizes, target, slope=largest_slope(n_blocks, target))
    return min(values), max(values)


def _linear_facts(skeleton: Skeleton, settings: PruneSettings, shown: LayerSparsities) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "block": index,
            "shape": [linear.out_features, linear.in_features],
            "sparsity": goal.pattern.sparsity if goal.pattern else goal.sparsity,
            "n_zeros": _n_zeros(settings, linear, goal),
            **({"role": linear.role} if linear.role != "other" else {}),
        }
        for index, goals in enumerate(shown.goals)
        for name, goal in goals.items()
        for linear in [skeleton.linears(index)[name]]
    ]


def _n_zeros(settings: PruneSettings, linear: Prunable, goal: Goal) -> int:
    """Return how many weights the method prunes: it rounds in every row, column or matrix."""
    rows, columns = linear.out_features, linear.in_features
    if goal.pattern is not None:
        return rows * columns // goal.pattern.of * (goal.pattern.of - goal.pattern.keep)
    if settings.method in ("magnitude", "sparsegpt", "isc", "alps"):
        return n_pruned(rows * columns, goal.sparsity)
    if settings.method == "dass" and linear.role in ("gate", "up", "gate_up"):
        n_parts = 2 if linear.role == "gate_up" else 1
        return columns * n_parts * n_pruned(rows // n_parts, goal.sparsity)
    return rows * n_pruned(columns, goal.sparsity)


def _block_facts(shown: LayerSparsities, linears: list[dict[str, Any]], *, is_known: bool) -> list[dict[str, Any]]:
    blocks = []
    for index, sparsity in enumerate(shown.blocks):
        mine = [linear for linear in linears if linear["block"] == index]
        asked = [linear["sparsity"] for linear in mine]
        n_weights = sum(math.prod(linear["shape"]) for linear in mine)
        blocks.append(
            {
                "index": index,
                "sparsity": sparsity if is_known else None,
                "n_weights": n_weights,
                "predicted": sum(linear["n_zeros"] for linear in mine) / n_weights,
                **({"lowest": min(asked), "highest": max(asked)} if min(asked) != max(asked) else {}),
                **(shown.figures_of_block(index) if is_known else {}),
            }
        )
    return blocks


def _sparsity_facts(skeleton: Skeleton, settings: PruneSettings, linears: list[dict[str, Any]]) -> dict[str, float]:
    sizes = [math.prod(linear["shape"]) for linear in linears]
    n_zeros = sum(linear["n_zeros"] for linear in linears)
    mlp = [linear for linear in linears if "role" in linear]
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return {
        "target": settings.sparsity,
        "asked": math.fsum(linear["sparsity"] * n for linear, n in zip(linears, sizes, strict=True)) / sum(sizes),
        "linears": n_zeros / sum(sizes),
        "model": n_zeros / n_parameters,
        **(
            {"mlp": sum(linear["n_zeros"] for linear in mlp) / sum(math.prod(linear["shape"]) for linear in mlp)}
            if mlp
            else {}
        ),
    }


def _notes(settings: PruneSettings, facts: Mapping[str, Any]) -> list[str]:
    """Return what a reader should not find out afterwards, a sentence each."""
    notes = []
    if facts["range"] is not None:
        notes.append(
            f"The allocation {settings.allocation} needs weights, and this folder has none: only the range that the "
            "rule allows is known; sizes and sparsities are those of uniform sparsity."
        )
    asked = [block["sparsity"] for block in facts["blocks"] if block["sparsity"] is not None]
    low = [sparsity for sparsity in asked if sparsity < _NO_SPEEDUP]
    if low:
        notes.append(
            f"{len(low)} of {len(asked)} blocks are asked for less than {_NO_SPEEDUP:.0%} (the lowest {min(low):.1%}): "
            "they will hardly be faster than dense ones."
        )
    if facts["time"]["device"] != "cpu":
        notes.append(f"The time was never compared with runs on {facts['time']['device']}: it may be far off.")
    dense = {
        artifact["target"]: artifact["bytes"]
        for artifact in facts["sizes"]["artifacts"]
        if artifact["weights"] == "dense" and artifact["precision"] == "fp32"
    }
    for artifact in facts["sizes"]["artifacts"]:
        if artifact["weights"] != "dense" and artifact["bytes"] >= 0.99 * dense.get(
            artifact["target"], artifact["bytes_dense"]
        ):
            notes.append(f"The artifact {artifact['name']} is not predicted to shrink.")
        if "reason" in artifact:
            notes.append(f"The artifact {artifact['name']}: {artifact['reason']}.")
    if facts["sizes"]["reason"] is not None:
        notes.append(f"No artifact is predicted: {facts['sizes']['reason']}.")
    return notes
