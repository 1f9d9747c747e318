"""What pruning will do, said before anything is pruned: allocation, memory, time and sizes of what comes out.

In: a model, `PruneSettings`, the artifacts that are to be exported. Out: a `Plan`, numbers that can be printed,
plotted and written. Memory is predicted by `footprint`; time and sizes are predicted here, from counts of weights,
not by doing the work. What a data-driven allocation needs to know is found out as prune does it, through the same
caches. A folder with nothing but a config.json can be planned as well, as far as no weight counts.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import init_empty_weights

from owl_deploy import allocation
from owl_deploy.allocation import MAX_SPARSITY, largest_slope
from owl_deploy.allocation_figures import FIGURE_NAMES
from owl_deploy.block_pruning import statistic_kinds
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from owl_deploy.dense_inputs import dense_inputs
from owl_deploy.devices import resolve_devices
from owl_deploy.errors import EngineUnavailableError, UnsupportedModelError
from owl_deploy.files import new_folder, write_bytes, write_json
from owl_deploy.footprint import predict_footprint
from owl_deploy.layer_sparsities import (
    LayerSparsities,
    needs_dense_inputs,
    needs_search,
    needs_traces,
    needs_tuning,
    share_out,
)
from owl_deploy.methods import METHODS
from owl_deploy.methods.method import Goal, n_pruned
from owl_deploy.pattern import parse_pattern
from owl_deploy.progress import OnStep, silent
from owl_deploy.pruning import allocate, are_states_on_disk, refuse_misfits, write_allocation
from owl_deploy.recipe import ArtifactSettings, PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton, open_skeleton
from owl_deploy.statistics import Hessian
from owl_deploy.threads import resolve_threads

if TYPE_CHECKING:
    import onnx

    from owl_deploy.export.decoder import Decoder, WeightSource
    from owl_deploy.export.packing import Encoding

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
    footprint = predict_footprint(skeleton, settings)
    on_disk = are_states_on_disk(footprint, max_memory)
    has_weights = _has_weights(checkpoint)
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
            "phases": footprint.phases,
            "hidden_states_bytes": footprint.hidden_states,
            "are_hidden_states_on_disk": on_disk,
            "max_memory": max_memory,
        },
        "time": _time_facts(skeleton, settings, linears, n_threads, is_known=sparsities is not None),
        "sizes": _size_facts(checkpoint, linears, artifacts),
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


# --- Models ---------------------------------------------------------------------------------------


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


def _has_weights(checkpoint: Checkpoint) -> bool:
    return any(entry.file.name != "config.json" for entry in checkpoint.tensors.values())


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


# --- Allocation -----------------------------------------------------------------------------------


_NEEDS = (needs_dense_inputs, needs_traces, needs_tuning, needs_search)
"""What an allocation may ask of calibration."""


def _looks_at_weights(settings: PruneSettings) -> bool:
    return settings.allocation in FIGURE_NAMES or any(needs(settings) for needs in _NEEDS)


def _uniform(settings: PruneSettings) -> PruneSettings:
    return settings.model_copy(update={"allocation": "uniform", "allocation_per": "block"})


def _allocated(
    skeletons: Sequence[Skeleton], settings: PruneSettings, seed: int, n_threads: int, on_step: OnStep, *, on_disk: bool
) -> LayerSparsities:
    """Share out the target as prune does; what is learned from the model stays in the cache for it."""
    calibration, seen = None, None
    if any(needs(settings) for needs in _NEEDS):
        calibration = calibration_tokens(skeletons[0].checkpoint, settings, seed=seed, on_step=on_step)
    with _scratch(on_disk=on_disk) as folder:
        if calibration is not None and needs_dense_inputs(settings):
            seen = dense_inputs(skeletons, calibration, on_step, n_threads=n_threads, folder=folder)
        return allocate(skeletons, settings, calibration, seen, seed, n_threads, folder, on_step)


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


# --- Time -----------------------------------------------------------------------------------------
#
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
"""As `ramp_tuning` and the traces of `pruning` take them."""
_SAMPLING_OVERHEAD = 4.0
"""A step of sampling multiplies 32 rows at most, which memory bounds."""


def _time_facts(
    skeleton: Skeleton, settings: PruneSettings, linears: list[dict[str, Any]], n_threads: int, *, is_known: bool
) -> dict[str, Any]:
    """Predict seconds per phase; what the plan has found out already lies in the cache, and takes none again."""
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
        once = 2 * settings.evopress_tokens / (settings.n_samples * settings.seq_len) * work.forward_flop / speed
        search = settings.evopress_generations * once
        learning["searching levels"] = work.forward_flop / speed + min(
            search, settings.evopress_budget_seconds or search
        )
    phases = dict(learning)
    if settings.allocation in ("owl", "dlp"):
        phases["figures of the dense model"] = figures + 10 * per_weight * n_prunable
    passes = 0.0
    if statistic_kinds(settings):
        passes = 1 + work.observed_share * (work.n_stages if settings.true_sequential else 1)
    phases["pruning blocks"] = (
        passes * work.forward_flop / speed
        + work.method_flop / speed
        + n_prunable * (_FILL_NS * per_weight + _SCORE_NS * 1e-9)
        + work.overhead_seconds
    )
    in_cache = sorted(learning) if is_known and _has_weights(skeleton.checkpoint) else []
    sampling = None
    if settings.calibration == "generated" and not in_cache and (statistic_kinds(settings) or learning):
        n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
        tokens = settings.n_samples * settings.seq_len
        sampling = _SAMPLING_OVERHEAD * 2 * n_parameters * tokens / speed
    return {
        "seconds": sum(seconds for name, seconds in phases.items() if name not in in_cache),
        "phases": phases,
        "in_cache": in_cache,
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
    """Return the products of a method with one linear, without what its Hessian takes."""
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


# --- Sizes ----------------------------------------------------------------------------------------


def _size_facts(
    checkpoint: Checkpoint, linears: list[dict[str, Any]], artifacts: Sequence[ArtifactSettings]
) -> dict[str, Any]:
    """Predict the bytes of the sparse checkpoint and of every artifact, as what lies in their folders."""
    stored = sum(checkpoint.dtype(name).itemsize * math.prod(e.shape) for name, e in checkpoint.tensors.items())
    # Headers of the shards and the index name every tensor; owl.json and allocation.json every linear.
    sizes: dict[str, Any] = {
        "checkpoint_bytes": stored + _copied_bytes(checkpoint) + 200 * len(checkpoint.tensors) + 450 * len(linears),
        "artifacts": [],
        "reason": None,
    }
    try:
        sizes["artifacts"] = [_artifact_facts(checkpoint, linears, artifact) for artifact in artifacts]
    except UnsupportedModelError as error:
        sizes["reason"] = str(error)
    return sizes


def _copied_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of configuration and tokenizer, which come along."""
    ours = ("owl.json", "allocation.json", "measured.json")
    return sum(
        file.stat().st_size
        for file in checkpoint.path.iterdir()
        if file.is_file()
        and file.suffix in (".json", ".jinja", ".txt", ".model")
        and file.name not in ours
        and not file.name.endswith(".index.json")
    )


def _artifact_facts(
    checkpoint: Checkpoint, linears: list[dict[str, Any]], settings: ArtifactSettings
) -> dict[str, Any]:
    """Predict one artifact: its graph is written without its weights, and those are counted.

    Raises:
        UnsupportedModelError: there is no graph for this model.
    """
    from owl_deploy.export.decoder import read_decoder

    decoder = read_decoder(checkpoint, max_positions=settings.max_positions)
    zeros = {}
    if settings.checkpoint == "pruned":
        zeros = {f"{linear['name']}.weight": linear["n_zeros"] for linear in linears}
    reason = None
    if settings.weights == "sparse-operator":
        n_bytes, encodings = _packed_bytes(checkpoint, decoder, zeros, settings)
        try:
            from owl_deploy.kernels import library_path

            n_bytes += library_path().stat().st_size
        except EngineUnavailableError as error:
            reason = str(error)
    else:
        n_bytes, encodings, reason = _plain_bytes(checkpoint, decoder, zeros, settings)
    keys = {"name", "checkpoint", "target", "weights", "precision"}
    return {
        **settings.model_dump(mode="json", include=keys),
        "bytes": n_bytes + _copied_bytes(checkpoint) + _GENAI_CONFIG_BYTES,
        "bytes_dense": 4 * _n_exported(checkpoint),
        "encodings": encodings,
        **({"reason": reason} if reason else {}),
    }


_GENAI_CONFIG_BYTES = 1500
_PAGE = 4096
"""Every tensor of the data file begins at a multiple."""


def _n_exported(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())


def _plain_bytes(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int], str | None]:
    """Return the bytes of model.onnx and its data, how often each encoding is used, and why it cannot be, if so."""
    from owl_deploy.export.deepsparse_graph import deepsparse_graph
    from owl_deploy.export.initializers import INLINE_LIMIT
    from owl_deploy.export.onnxruntime_graph import onnxruntime_graph

    graph, weights = {"onnxruntime": onnxruntime_graph, "deepsparse": deepsparse_graph}[settings.target](decoder)
    sources = {name: _shape_of(checkpoint, source) for name, source in weights.items()}
    is_sparse = settings.weights == "sparse-initializer"
    chosen = {
        name: _smallest(
            shape,
            zeros.get(weights[name].tensor, 0),
            is_sparse=is_sparse,
            allows_varint=settings.target == "onnxruntime",
        )
        for name, shape in sources.items()
    }
    inline = sum(n for encoding, n in chosen.values() if encoding != "dense")
    reason = None
    if inline > INLINE_LIMIT:
        chosen = {
            name: _smallest(shape, zeros.get(weights[name].tensor, 0), is_sparse=True, allows_varint=False)
            for name, shape in sources.items()
        }
        inline = 0
        if settings.target == "deepsparse":
            reason = f"its sparse initializers do not fit inside model.onnx ({INLINE_LIMIT / 1e9:g} GB)"
    data = _DataFile(graph)
    for name, (encoding, n_bytes) in chosen.items():
        if encoding == "dense" or not inline:
            data.add(name, sources[name], n_bytes)
    counts: dict[str, int] = {}
    for name, (encoding, _) in chosen.items():
        if len(sources[name]) == 2:
            counts[encoding] = counts.get(encoding, 0) + 1
    return data.n_bytes + graph.ByteSize() + inline, counts, reason


def _shape_of(checkpoint: Checkpoint, source: WeightSource) -> tuple[int, ...]:
    shape = checkpoint.tensors[source.tensor].shape
    return shape[::-1] if source.is_transposed else shape


def _smallest(shape: tuple[int, ...], n_zeros: int, *, is_sparse: bool, allows_varint: bool) -> tuple[str, int]:
    """Return the smallest encoding of a weight, and the bytes of it with zeros spread evenly."""
    size = math.prod(shape)
    sizes = {"dense": 4 * size}
    if is_sparse and len(shape) == 2:
        n = size - n_zeros
        if allows_varint:
            # A varint takes another byte from every power of 128 on.
            longer = sum(max(0, size - (1 << 7 * k)) for k in range(1, 10))
            sizes["coo-varint"] = round(4 * n + n + n * longer / size)
        if size < 2**31:
            sizes["coo-int32"] = 8 * n
        else:
            sizes["coo-int64"] = 12 * n
    best = min(sizes, key=lambda encoding: sizes[encoding])
    return best, sizes[best]


def _packed_bytes(
    checkpoint: Checkpoint, decoder: Decoder, zeros: Mapping[str, int], settings: ArtifactSettings
) -> tuple[int, dict[str, int]]:
    """Return the bytes of model.onnx and its data, and how often each encoding is used."""
    from owl_deploy.export.cost_model import choose_encoding
    from owl_deploy.export.machine_class import this_machine_class
    from owl_deploy.export.onnxruntime_graph import sparse_operator_graph
    from owl_deploy.export.packing import packed_bytes

    precision = settings.precision
    head = settings.head_precision
    if head == "auto":
        head = "int8" if precision == "int4" else precision
    machine = this_machine_class() if settings.machine == "auto" else settings.machine
    graph, weights, packed = sparse_operator_graph(decoder, precision=precision, head_precision=head)
    data = _DataFile(graph)
    for name, source in weights.items():
        data.add(name, _shape_of(checkpoint, source), 4 * math.prod(checkpoint.tensors[source.tensor].shape))
    counts: dict[str, int] = {}
    for linear in packed.values():
        shapes = [checkpoint.tensors[f"{part}.weight"].shape for part in linear.parts]
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        n_nonzeros = math.prod(shape) - sum(zeros.get(f"{part}.weight", 0) for part in linear.parts)
        encoding: Encoding = "dense"
        if linear.is_gathered:
            pass  # its rows have to lie one behind the other
        elif settings.encoding == "auto":
            encoding = choose_encoding(shape, n_nonzeros, linear.precision, machine_class=machine)
        else:
            encoding = settings.encoding
        n_bytes = packed_bytes(shape, n_nonzeros, linear.precision, encoding, 0 if linear.is_gathered else None)
        if encoding != "dense":  # rows end at multiples of 8 bytes
            value = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}[linear.precision]
            n_bytes += round(shape[0] * (8 - value) / 2)
        data.add(linear.matrix_name, (n_bytes,), n_bytes)
        if linear.has_bias:
            data.add(linear.bias_name, (shape[0],), 4 * shape[0])
        counts[f"packed-{encoding}"] = counts.get(f"packed-{encoding}", 0) + 1
    return data.n_bytes + graph.ByteSize(), counts


class _DataFile:
    """The layout of model.onnx.data: what is added is named in the graph, so that its size is known too."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.graph = graph
        self.n_bytes = 0

    def add(self, name: str, shape: tuple[int, ...], n_bytes: int) -> None:
        """Place a tensor behind the others."""
        from onnx import TensorProto

        from owl_deploy.export.initializers import external_tensor

        self.n_bytes += -self.n_bytes % _PAGE
        tensor = external_tensor(name, TensorProto.FLOAT, shape, offset=self.n_bytes, length=n_bytes)
        self.graph.graph.initializer.append(tensor)
        self.n_bytes += n_bytes


# --- Notes ----------------------------------------------------------------------------------------


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
    if needs_traces(settings):
        n_weights, n_parameters = facts["model"]["n_prunable"], facts["model"]["n_parameters"]
        notes.append(
            "Traces of the loss Hessian hold the whole model, its gradients, signs and products, about "
            f"{(4 * n_parameters + 12 * n_weights) / 2**30:.0f} GiB, which the peak does not count."
        )
    if settings.calibration == "generated" and facts["time"]["sampling_seconds"] is not None:
        n_parameters = facts["model"]["n_parameters"]
        notes.append(
            "Sampling calibration text, the first time, holds the whole model: about "
            f"{4 * n_parameters / 2**30:.1f} GiB."
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
