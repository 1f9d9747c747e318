"""One decoder block, filled and its inputs known, pruned in place.

What a method computes is not known here, nor where the goals come from, nor what becomes of the block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from owl_deploy.dense_inputs import norm_of
from owl_deploy.methods import METHODS, Goal, Linear, Method, Pruned, magnitude
from owl_deploy.observation import Observed
from owl_deploy.recipe import PruneSettings
from owl_deploy.refinement import InputMoments, dsnot
from owl_deploy.replicas import Replicas
from owl_deploy.skeleton import Prunable, Skeleton
from owl_deploy.statistics import InputStatistic, SquaredNorm

__all__ = [
    "forward_dtype",
    "mask_sha256",
    "prune_block_",
    "prune_linear",
    "statistic_kinds",
    "whole_mask_sha256",
    "zero_facts",
]


def statistic_kinds(settings: PruneSettings) -> tuple[Callable[[int], InputStatistic], ...]:
    """Return what must be known of the inputs of a linear: for the method first, then for the refinement."""
    kinds: list[Callable[[int], InputStatistic]] = []
    new_statistic = METHODS[settings.method].new_statistic
    if new_statistic is not None:
        kinds.append(new_statistic)
    if settings.refine == "dsnot":
        kinds.append(InputMoments)
    return tuple(kinds)


def forward_dtype(settings: PruneSettings) -> torch.dtype:
    """Return the type of matrix products while calibration sequences run."""
    return torch.bfloat16 if settings.forward_dtype == "bfloat16" else torch.float32


def prune_block_(
    skeleton: Skeleton,
    settings: PruneSettings,
    index: int,
    replicas: Replicas | None,
    known: Mapping[str, Observed] | None,
    goals: Mapping[str, Goal],
    dtypes: Mapping[str, torch.dtype],
) -> list[dict[str, Any]]:
    """Prune the linears of a filled block in place and return the facts of each for owl.json.

    Args:
        skeleton: whose block it is.
        settings: method, refinement and their options.
        index: of the block.
        replicas: the skeleton is their first; None where neither method nor refinement looks at them.
        known: the norms of the inputs of its linears, where they are known already.
        goals: by linear.
        dtypes: by parameter; weights are rounded to these, so that later blocks see what the file will hold.

    Raises:
        OwlDeployError: an input is NaN or Inf, or a Hessian cannot be inverted.
    """
    linears = skeleton.linears(index)
    method, kinds = METHODS[settings.method], statistic_kinds(settings)
    is_known = known is not None and kinds == (SquaredNorm,) and not settings.true_sequential
    groups = [tuple(linears)]
    if replicas is not None and not is_known:
        groups = replicas.input_groups(index)
    facts: dict[str, dict[str, Any]] = {}
    # All groups see the dense block, or, true-sequentially, each one the pruned groups before it.
    for stage in [[group] for group in groups] if settings.true_sequential else [groups]:
        observed: Mapping[str, Observed] = {}
        if is_known and known is not None:
            observed = known
        elif replicas is not None:
            observed = replicas.observe(index, stage, kinds)
        neurons = _neurons(linears, observed) if method.needs_neurons else {}
        for name in (name for group in stage for name in group):
            linear, goal = linears[name], goals[name]
            pruned = prune_linear(name, linear, settings, observed.get(name), neurons.get(linear.mlp), goal)
            weight = pruned.weight.to(dtypes[linear.parameter])
            linear.set_(weight)
            facts[name] = _linear_facts(name, linear, weight, goal, pruned.notes)
    return [facts[name] for name in linears]


def _neurons(linears: Mapping[str, Prunable], observed: Mapping[str, Observed]) -> dict[str | None, SquaredNorm]:
    """Return what was seen of the inputs of the down projection of every gated MLP."""
    return {
        linear.mlp: norm_of(observed[name])
        for name, linear in linears.items()
        if linear.role == "down" and name in observed
    }


def prune_linear(
    name: str,
    linear: Prunable,
    settings: PruneSettings,
    observed: Observed | None,
    neurons: SquaredNorm | None,
    goal: Goal,
) -> Pruned:
    """Prune one linear; an expert that saw too few tokens by magnitude, which is noted.

    Args:
        name: of the linear.
        linear: in a filled block, not changed.
        settings: method, refinement and their options.
        observed: of its inputs, as `statistic_kinds` says; None where nothing is needed.
        neurons: of the inputs of the down projection of the same MLP, where the method needs them.
        goal: what is asked of it.

    Raises:
        OwlDeployError: a Hessian cannot be inverted.
    """
    method: Method = METHODS[settings.method]
    weight = linear.weight.float()
    fewest = max(1, settings.min_expert_tokens) if linear.is_expert else 1
    if observed is not None and observed.n_tokens < fewest:
        by_magnitude = magnitude.prune(Linear(name, weight), goal)
        return Pruned(by_magnitude.weight, {"fallback": "magnitude", "n_tokens": observed.n_tokens})
    options = {option: getattr(settings, option) for option in method.options}
    statistic = observed.statistics[0] if observed is not None and method.new_statistic is not None else None
    pruned = method.prune(Linear(name, weight, statistic, linear.role, neurons), goal, **options)
    if settings.refine == "dsnot" and observed is not None:
        moments = observed.statistics[-1]
        assert isinstance(moments, InputMoments)
        mask = dsnot(weight, pruned.weight != 0, moments, goal)
        # Dense values: an update of the kept weights was made for another mask.
        n_swapped = int((mask & (pruned.weight == 0)).sum())
        pruned = Pruned(torch.where(mask, weight, 0.0), {**pruned.notes, "n_swapped": n_swapped})
    return pruned


def _linear_facts(
    name: str, linear: Prunable, weight: torch.Tensor, goal: Goal, notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what owl.json says of a pruned linear; zeros are counted in the type that is stored."""
    return {
        **zero_facts(name, weight),
        "asked": goal.pattern.sparsity if goal.pattern else goal.sparsity,
        **({"role": linear.role} if linear.role != "other" else {}),
        **({"notes": dict(notes)} if notes else {}),
    }


def zero_facts(name: str, weight: torch.Tensor) -> dict[str, Any]:
    """Return what owl.json says of the zeros of a linear, whoever made them; `weight` is (out, in)."""
    kept = (weight != 0).cpu()
    n_zeros = kept.numel() - int(kept.sum())
    return {
        "name": name,
        "shape": list(weight.shape),
        "sparsity": n_zeros / kept.numel(),
        "n_zeros": n_zeros,
        "mask_sha256": mask_sha256({name: kept}),
    }


def whole_mask_sha256(linears: Sequence[Mapping[str, Any]]) -> str:
    """Return one hash of the masks of all linears, from their `zero_facts` in order."""
    return hashlib.sha256("".join(fact["mask_sha256"] for fact in linears).encode()).hexdigest()


def mask_sha256(masks: Mapping[str, torch.Tensor]) -> str:
    """Return one hash of where weights are kept: names, shapes and packed bits, in order.

    Args:
        masks: linear name -> bool (out, in), True = kept.
    """
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(np.packbits(mask.numpy()).tobytes())
    return digest.hexdigest()
