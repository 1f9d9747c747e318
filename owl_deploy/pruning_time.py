"""How long pruning will take, predicted from counts of weights and the speed of this machine's matrix products.

In: a skeleton, settings, the linears of a plan. Out: seconds by phase, within about a factor of two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from owl_deploy.block_pruning import statistic_kinds
from owl_deploy.layer_sparsities import needs_dense_inputs, needs_search, needs_traces, needs_tuning
from owl_deploy.methods import METHODS
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton
from owl_deploy.statistics import Hessian

__all__ = ["time_facts"]

# Constants were fitted to SmolLM2-135M, 8 x 256 tokens, one thread of an AVX-512 server, CPU seconds of the phases
# against the speed of its own matrix products.

_MEASURE_SECONDS = 0.3
_OVERHEAD = 1.3
"""Of a forward pass, beside its products: norms, rotation, softmax, activation."""
_FILL_NS = 6.0
"""Per weight of a block that is read, checked and converted."""
_SCORE_NS = 30.0
"""Per weight that is scored, selected, zeroed, hashed and written; selection runs on one thread."""
_INVERSE_FLOP = 3.0
"""Times n^3: two Cholesky factorisations and an inverse, which are slower than products."""
_COLUMN_NS = 90_000.0
"""Per column of a sweep: a dozen calls of torch."""
_SWEEP_NS = 40.0
"""Per weight of a sweep: a rank-one update of its slab, half a block wide on average."""
_EIGENVALUES_FLOP, _EIGENVECTORS_FLOP = 8.0, 25.0
"""Times n^3, in float64."""
_ALPS_ITERATIONS = 60
_DSNOT_NS = 120.0
_TRACE_PASSES = 8
"""Forward passes that a double backward pass of one probe costs."""
_N_SLOPES, _FEW_SEQUENCES = 9, 16
"""As `ramp_tuning` and `hessian_trace` take them."""
_SAMPLING_OVERHEAD = 4.0
"""A step of sampling multiplies 32 rows at most, which memory bounds."""


def time_facts(
    skeleton: Skeleton,
    settings: PruneSettings,
    linears: list[dict[str, Any]],
    n_threads: int,
    *,
    in_cache: bool,
    samples_text: bool,
) -> dict[str, Any]:
    """Predict seconds per phase; what the plan has found out already lies in the cache, and takes none again.

    Args:
        skeleton: of the model.
        settings: of the prune stage.
        linears: of the plan.
        n_threads: of torch.
        in_cache: whether what the allocation had to learn was learned, for this plan.
        samples_text: whether the model is to generate its calibration text first.
    """
    speed = _flop_per_second(skeleton, settings)
    work = _Work.of(skeleton, settings)
    per_weight = 1e-9 / n_threads
    n_prunable = sum(skeleton.n_weights())
    figures = _FILL_NS * per_weight * n_prunable
    learning: dict[str, float] = {}
    if needs_dense_inputs(settings):
        learning["inputs of the dense model"] = work.forward_flop / speed + figures
    share = min(1.0, _FEW_SEQUENCES / settings.n_samples)
    if needs_traces(settings):
        n_passes = 3 + _TRACE_PASSES * settings.isc_probes
        learning["traces of the loss Hessian"] = n_passes * share * work.forward_flop / speed
    if needs_tuning(settings):
        once = (1 + work.observed_share) * share * work.forward_flop / speed + _SCORE_NS * 1e-9 * n_prunable
        learning["tuning the slope"] = _N_SLOPES * once
    if settings.allocation == "alphapruning":
        learning["spectra"] = _spectra_flop(linears) / speed
    if needs_search(settings):
        # Offspring on few tokens, the best of them and their parent on all.
        once = 3 * settings.evopress_tokens / (settings.n_samples * settings.seq_len) * work.forward_flop / speed
        search = settings.evopress_generations * once
        learning["searching levels"] = work.forward_flop / speed + min(
            search, settings.evopress_budget_seconds or search
        )
    phases = dict(learning)
    if settings.allocation in ("owl", "dlp"):
        phases["figures of the dense model"] = figures + 10 * per_weight * n_prunable
    observed = work.observed_share * (work.n_stages if settings.true_sequential else 1)
    passes = 1 + observed if statistic_kinds(settings) else 0.0
    phases["pruning blocks"] = (
        passes * work.forward_flop / speed
        + work.method_flop / speed
        + n_prunable * (_FILL_NS * per_weight + _SCORE_NS * 1e-9)
        + work.overhead_seconds
    )
    learned = sorted(learning) if in_cache else []
    sampling = None
    if samples_text:
        n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
        tokens = settings.n_samples * settings.seq_len
        sampling = _SAMPLING_OVERHEAD * 2 * n_parameters * tokens / speed
    return {
        "seconds": sum(seconds for name, seconds in phases.items() if name not in learned),
        "phases": phases,
        "in_cache": learned,
        "sampling_seconds": sampling,
        "threads": n_threads,
        "device": skeleton.device.type,
        "flop_per_second": speed,
    }


def _flop_per_second(skeleton: Skeleton, settings: PruneSettings) -> float:
    """Measure float32 matrix products of about the shapes of this model."""
    shapes = [(linear.out_features, linear.in_features) for linear in skeleton.linears(0).values()]
    n_out, n_in = (min(2048, size) for size in max(shapes, key=math.prod))
    on = skeleton.device
    inputs = torch.ones(min(512, settings.seq_len), n_in, device=on)
    weight = torch.ones(n_out, n_in, device=on)
    torch.nn.functional.linear(inputs, weight)  # starts the threads
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _MEASURE_SECONDS or not count:
        float(torch.nn.functional.linear(inputs, weight)[0, 0])  # waits for an accelerator
        count += 1
    return 2 * inputs.numel() * n_out * count / elapsed


@dataclass(frozen=True)
class _Work:
    """What the pruning of all blocks consists of."""

    forward_flop: float
    """All calibration sequences through all blocks, overhead included."""
    observed_share: float
    """Of a forward pass: observing stops before the last linear."""
    n_stages: int
    """Groups of linears with the same inputs in a block."""
    method_flop: float
    """Hessians, their inverses, products of the method."""
    overhead_seconds: float
    """Of many small calls, whatever the speed of products."""

    @classmethod
    def of(cls, skeleton: Skeleton, settings: PruneSettings) -> _Work:
        n_tokens = settings.n_samples * settings.seq_len
        active = _active_share(skeleton.model.config)
        method = METHODS[settings.method]
        forward = flop = overhead = n_last = n_all = 0.0
        n_stages = 1
        for index in range(len(skeleton.blocks)):
            linears = skeleton.linears(index)
            shares = {name: active if linear.is_expert else 1.0 for name, linear in linears.items()}
            n_active = sum(shares[name] * linear.weight.numel() for name, linear in linears.items())
            attention = 2 * settings.seq_len * int(skeleton.model.config.hidden_size)
            forward += _OVERHEAD * 2 * n_tokens * (n_active + attention)
            n_all += n_active
            if not any(linear.is_expert for linear in linears.values()):
                n_last += list(linears.values())[-1].weight.numel()
            groups = _input_groups(linears)
            n_stages = max(n_stages, len(groups))
            if method.new_statistic is Hessian:
                for names in groups:
                    side = linears[names[0]].in_features
                    flop += 2 * n_tokens * shares[names[0]] * side**2
                    if method.name != "alps":
                        flop += _INVERSE_FLOP * side**3
            for linear in linears.values():
                flop += _method_flop(settings, linear)
                overhead += _method_overhead(settings, linear)
        return cls(forward, 1 - n_last / n_all, n_stages, flop, overhead)


def _active_share(config: Any) -> float:
    """Return the share of the experts that a token is routed to."""
    sizes = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    n_experts = next((size for size in sizes if isinstance(size, int) and size > 0), 1)
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / n_experts) if isinstance(chosen, int) else 1.0


def _input_groups(linears: Mapping[str, Prunable]) -> list[list[str]]:
    """Return the linears that are called with the same tensor, going by roles and usual names: no block is run."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, linear in linears.items():
        parent, _, own = name.rpartition(".")
        if linear.role in ("gate", "up"):
            key = (str(linear.mlp), "gate and up")
        elif own in ("q_proj", "k_proj", "v_proj", "query", "key", "value"):
            key = (parent, "attention")
        else:
            key = (name, "")
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _method_flop(settings: PruneSettings, linear: Prunable) -> float:
    """Return the products of a method with one linear, beside those of its Hessian."""
    rows, columns = linear.out_features, linear.in_features
    if settings.method in ("sparsegpt", "isc"):
        return rows * columns**2
    if settings.method == "alps":
        # Every third iteration a new rho asks for a new inverse.
        iteration = 2 * rows * columns**2 + 2 * columns**3 / 3
        return _ALPS_ITERATIONS * iteration + _EIGENVECTORS_FLOP * columns**3
    if settings.method == "foundation":
        # A system for every row, the smaller of the two; gathered and factorised, in small batches.
        side = min(settings.sparsity, 1 - settings.sparsity) * columns
        return rows * columns**2 + rows * (3 * side**3 + 1400 * side**2)
    return 0.0


def _method_overhead(settings: PruneSettings, linear: Prunable) -> float:
    """Return the seconds of a method with one linear that no product accounts for."""
    rows, columns = linear.out_features, linear.in_features
    seconds = _DSNOT_NS * 1e-9 * rows * columns if settings.refine == "dsnot" else 0.0
    if settings.method in ("sparsegpt", "isc"):
        seconds += 1e-9 * (_COLUMN_NS * columns + _SWEEP_NS * rows * columns)
    if settings.method == "alps":
        seconds += _ALPS_ITERATIONS * 1e-9 * _SCORE_NS * rows * columns
    return seconds


def _spectra_flop(linears: list[dict[str, Any]]) -> float:
    """Return the work of the eigenvalues of every linear's smaller Gram matrix, in float64."""
    total = 0.0
    for linear in linears:
        small, large = sorted(linear["shape"])
        total += 2 * 2 * large * small**2 + _EIGENVALUES_FLOP * small**3
    return total
