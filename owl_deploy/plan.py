"""What pruning will do, said before anything is pruned: allocation, memory, time and sizes of what comes out.

In: a model, `PruneSettings`, the artifacts that are to be exported. Out: a `Plan`, numbers that can be printed,
plotted and written. `footprint` predicts memory, `pruning_time` time and `artifact_sizes` sizes, from counts of
weights, not by doing the work. What a data-driven allocation needs to know is found out as prune does it, through the
same caches. A folder with nothing but a config.json can be planned as well, as far as no weight counts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from owl_deploy.allocation_figures import FIGURE_NAMES
from owl_deploy.allocation_range import allocation_range
from owl_deploy.allocation_stage import allocate, asks_calibration, needs_calibration
from owl_deploy.artifact_sizes import size_facts
from owl_deploy.calibration import calibration_tokens, must_be_sampled
from owl_deploy.checkpoint import has_configuration_only, open_checkpoint
from owl_deploy.devices import resolve_devices
from owl_deploy.files import new_folder, write_bytes, write_json
from owl_deploy.footprint import predict_footprint
from owl_deploy.layer_sparsities import LayerSparsities, share_out
from owl_deploy.methods.method import Goal, n_pruned
from owl_deploy.plan_notes import plan_notes
from owl_deploy.progress import OnStep, silent
from owl_deploy.pruning import are_states_on_disk, refuse_misfits, write_allocation
from owl_deploy.pruning_time import time_facts
from owl_deploy.recipe import ArtifactSettings, PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton, open_configuration, open_skeleton
from owl_deploy.threads import resolve_threads

__all__ = ["ALL_ARTIFACTS", "Plan", "plan_pruning", "write_plan"]

ALL_ARTIFACTS = tuple(
    ArtifactSettings.model_validate(values)
    for values in (
        {"name": "dense", "checkpoint": "dense"},
        {"name": "dense-int8", "checkpoint": "dense", "precision": "int8"},
        {"name": "dense-int4", "checkpoint": "dense", "precision": "int4"},
        {"name": "sparse-initializer", "weights": "sparse-initializer"},
        *(
            {"name": f"sparse-operator-{precision}", "weights": "sparse-operator", "precision": precision}
            for precision in ("fp32", "fp16", "int8", "int4")
        ),
    )
)
"""What is shown where nobody says what will be exported."""


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
    path = Path(model).expanduser()
    is_empty = has_configuration_only(path)
    checkpoint = open_configuration(path) if is_empty else open_checkpoint(model, offline=offline)
    skeletons = [open_skeleton(checkpoint, one) for one in resolve_devices(device)]
    skeleton = skeletons[0]
    refuse_misfits(skeleton, settings)
    samples_text = needs_calibration(settings) and settings.calibration == "generated"
    if samples_text and not is_empty:
        samples_text = must_be_sampled(checkpoint, settings, seed=seed)
    footprint = predict_footprint(skeleton, settings, samples_text=samples_text)
    on_disk = are_states_on_disk(footprint, max_memory)
    sparsities = None
    if not is_empty or not (settings.allocation in FIGURE_NAMES or asks_calibration(settings)):
        sparsities = _allocated(skeletons, settings, seed, n_threads, on_step, on_disk=on_disk)
    uniform = settings.model_copy(update={"allocation": "uniform", "allocation_per": "block"})
    shown = sparsities or share_out(skeleton, uniform, None, None, silent)
    linears = _linear_facts(skeleton, settings, shown)
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    facts = {
        "kind": "plan",
        "format_version": 1,
        "recipe": {"model": model, "seed": seed, "prune": settings.model_dump(mode="json")},
        "model": {
            "architecture": type(skeleton.model).__name__,
            "has_weights": not is_empty,
            "n_blocks": len(skeleton.blocks),
            "n_linears": len(linears),
            "n_parameters": n_parameters,
            "n_prunable": _n_weights(linears),
            "prunable_share": _n_weights(linears) / n_parameters,
            "dtypes": sorted({entry.dtype for entry in checkpoint.tensors.values()}),
        },
        "sparsity": _sparsity_facts(settings, linears, n_parameters),
        "range": None,
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
        "time": time_facts(skeleton, settings, linears, n_threads, in_cache=not is_empty, samples_text=samples_text),
        "sizes": size_facts(checkpoint, linears, artifacts),
    }
    if sparsities is None:
        facts["range"] = dict(zip(("lowest", "highest"), allocation_range(skeleton, settings), strict=True))
    return Plan({**facts, "notes": plan_notes(facts)}, sparsities)


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


def _allocated(
    skeletons: Sequence[Skeleton], settings: PruneSettings, seed: int, n_threads: int, on_step: OnStep, *, on_disk: bool
) -> LayerSparsities:
    """Share out the target as prune does; what is learned from the model stays in the cache for it."""
    calibration = None
    if asks_calibration(settings):
        calibration = calibration_tokens(skeletons[0].checkpoint, settings, seed=seed, on_step=on_step)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if on_disk else None
        sparsities, _ = allocate(
            skeletons, settings, calibration, seed=seed, n_threads=n_threads, folder=folder, on_step=on_step
        )
    return sparsities


def _linear_facts(skeleton: Skeleton, settings: PruneSettings, shown: LayerSparsities) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "block": index,
            "shape": [linear.out_features, linear.in_features],
            "sparsity": goal.pattern.sparsity if goal.pattern else goal.sparsity,
            "n_zeros": _predicted_zeros(settings, linear, goal),
            **({"role": linear.role} if linear.role != "other" else {}),
        }
        for index, goals in enumerate(shown.goals)
        for name, goal in goals.items()
        for linear in [skeleton.linears(index)[name]]
    ]


def _predicted_zeros(settings: PruneSettings, linear: Prunable, goal: Goal) -> int:
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


def _n_weights(linears: list[dict[str, Any]]) -> int:
    return sum(math.prod(linear["shape"]) for linear in linears)


def _n_zeros(linears: list[dict[str, Any]]) -> int:
    return sum(linear["n_zeros"] for linear in linears)


def _block_facts(shown: LayerSparsities, linears: list[dict[str, Any]], *, is_known: bool) -> list[dict[str, Any]]:
    blocks = []
    for index, sparsity in enumerate(shown.blocks):
        mine = [linear for linear in linears if linear["block"] == index]
        asked = [linear["sparsity"] for linear in mine]
        blocks.append(
            {
                "index": index,
                "sparsity": sparsity if is_known else None,
                "n_weights": _n_weights(mine),
                "predicted": _n_zeros(mine) / _n_weights(mine),
                **({"lowest": min(asked), "highest": max(asked)} if min(asked) != max(asked) else {}),
                **(shown.figures_of_block(index) if is_known else {}),
            }
        )
    return blocks


def _sparsity_facts(settings: PruneSettings, linears: list[dict[str, Any]], n_parameters: int) -> dict[str, float]:
    asked = math.fsum(linear["sparsity"] * math.prod(linear["shape"]) for linear in linears)
    mlp = [linear for linear in linears if "role" in linear]
    return {
        "target": settings.sparsity,
        "asked": asked / _n_weights(linears),
        "linears": _n_zeros(linears) / _n_weights(linears),
        "model": _n_zeros(linears) / n_parameters,
        **({"mlp": _n_zeros(mlp) / _n_weights(mlp)} if mlp else {}),
    }
