"""The target shared out among the linears of a model, with all that the allocation has to find out first.

In: skeletons, settings, calibration. Out: a goal per linear. What is found out stays in the cache, so that whoever
asks again, with another target or method, does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from owl_deploy.block_pruning import forward_dtype, statistic_kinds
from owl_deploy.calibration import Calibration
from owl_deploy.dense_inputs import dense_inputs
from owl_deploy.hessian_trace import TRACED_SEQUENCES, TRACED_TOKENS, hessian_traces
from owl_deploy.layer_sparsities import (
    LayerSparsities,
    needs_dense_inputs,
    needs_search,
    needs_traces,
    needs_tuning,
    of_linears,
    share_out,
)
from owl_deploy.level_search import search_levels
from owl_deploy.observation import Observed
from owl_deploy.progress import OnStep
from owl_deploy.ramp_tuning import tune_slope
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Skeleton

__all__ = ["allocate", "asks_calibration", "needs_calibration"]


def needs_calibration(settings: PruneSettings) -> bool:
    """Return whether method, refinement or allocation look at calibration text."""
    return bool(statistic_kinds(settings)) or asks_calibration(settings)


def asks_calibration(settings: PruneSettings) -> bool:
    """Return whether the allocation looks at calibration text."""
    return any(needs(settings) for needs in (needs_dense_inputs, needs_traces, needs_tuning, needs_search))


def allocate(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    calibration: Calibration | None,
    *,
    seed: int,
    n_threads: int,
    folder: Path | None,
    on_step: OnStep,
) -> tuple[LayerSparsities, list[dict[str, Observed]] | None]:
    """Find out what the allocation needs to know, and share out the target.

    Args:
        skeletons: of the dense model, one per device.
        settings: of the prune stage.
        calibration: where `asks_calibration`.
        seed: of random probes and searches.
        n_threads: of torch.
        folder: for hidden states, where they are to be on disk.
        on_step: told of every block.

    Returns:
        The goals, and what `dense_inputs` saw per block where the allocation needed that.

    Raises:
        OwlDeployError: and its subclasses.
    """
    skeleton = skeletons[0]
    seen, traces, tuned = None, None, None
    if calibration is not None and needs_dense_inputs(settings):
        seen = dense_inputs(
            skeletons, calibration, on_step, n_threads=n_threads, dtype=forward_dtype(settings), folder=folder
        )
    if calibration is not None and needs_traces(settings):
        tokens = torch.from_numpy(calibration.tokens[:TRACED_SEQUENCES, :TRACED_TOKENS])
        found = hessian_traces(
            skeleton.checkpoint,
            skeleton,
            tokens,
            n_probes=settings.isc_probes,
            seed=seed,
            threads=n_threads,
            on_step=on_step,
        )
        traces = {name: trace.mean for name, trace in found.items()}
    if calibration is not None and needs_tuning(settings):
        tuned = tune_slope(skeletons, settings, calibration, on_step, n_threads=n_threads, folder=folder)
        settings = settings.model_copy(update={"ramp_slope": tuned.slope})
    if calibration is not None and needs_search(settings):
        at_start = settings.model_copy(update={"allocation": settings.evopress_start})
        start = share_out(skeleton, at_start, seen, None, on_step).goals
        searched = search_levels(
            skeletons, settings, start, calibration, seen, on_step, seed=seed, n_threads=n_threads, folder=folder
        )
        return replace(of_linears(skeleton, settings, searched.sparsities), tuning=searched.facts), seen
    shared = share_out(skeleton, settings, seen, traces, on_step)
    return (shared if tuned is None else replace(shared, tuning=asdict(tuned))), seen
