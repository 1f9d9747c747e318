"""The bench stage: artifacts go in, raw nanoseconds and the rows of a report come out.

In: artifacts, a baseline among them, `BenchSettings`, which may name peers: other engines. Out: the
result document that `owl_deploy.bench.report` writes. Every artifact and every peer runs in a fresh
child process per workload, all of a workload in turn (A-B-A-B), so that drift of the machine meets
all alike. Nothing is pruned or exported here.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.bench.bandwidth import memory_bandwidth
from owl_deploy.bench.comparison import row_sentence
from owl_deploy.bench.machine import MachineWatch, machine_facts
from owl_deploy.bench.statistics import generation_summary, speedup_interval, summary_ms
from owl_deploy.engines.bridge import LICENCE_NOTICE
from owl_deploy.engines.peer import Peer
from owl_deploy.engines.process import EngineProcess, open_engine
from owl_deploy.errors import (
    EngineFailedError,
    EngineUnavailableError,
    OwlDeployError,
    RecipeError,
    UnsupportedModelError,
)
from owl_deploy.evaluation import Evaluation, evaluate
from owl_deploy.files import file_sha256
from owl_deploy.memory import available_bytes
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import BenchSettings, EvalSettings, PeerSettings, TaskSettings, generation_lengths
from owl_deploy.task_accuracy import TaskAccuracy, task_accuracies
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import commit, versions

__all__ = ["Workload", "measure_artifacts", "workloads"]

log = logging.getLogger(__name__)

_OUTSIDE_CLOCK = (
    "tokenisation, sampling, filling of the cache and, for ONNX Runtime, binding of its buffers; "
    "inside: one call of the engine, with the logits of its last token alone, as in generation, and the update of the "
    "KV cache. Generation has sampling inside too: ONNX Runtime runs it by the loop that serves, which reads long "
    "prompts in chunks and makes text of each token, other engines by one call per token; time to first token is that "
    "of the engine, with no queue and no network"
)
_BYTES_PER_STEP = (
    "weights that one decode step multiplies plus the keys and values it reads; ONNX Runtime holds sparse "
    "initializers densely, "
    "so all elements count; packed matrices count as they lie in the file; DeepSparse's format is not public, so its "
    "non-zero values alone count, a lower bound"
)
_STABLE = 0.05
# Of a round's calls, not counted: after the other engines' turns the first ones find cold caches and sleeping threads
# (SmolLM2 decode in int8: 20, 13 and 15 ms, then 5.4 ms from the fourth call on).
_COLD_SHARE = 0.25
_MAX_WARMUPS = 8
_FEWEST_ROUNDS = 2  # of a workload that was interrupted: one round says nothing of drift
# Whose limits of parity hold for a peer's precision.
_PARITY_CLASS = {"bf16": "int8", "q8_0": "int8", "q4_0": "int4", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Workload:
    """One thing that every artifact and peer is timed at."""

    phase: Literal["decode", "prefill", "generate"]
    n_tokens: int
    """Tokens per sequence and call: 1 for decode, else the prompt's length."""
    past_len: int
    """Tokens in the cache before the call."""
    n_samples: int
    """Timed calls per round; in generate, whole answers."""
    n_new: int = 0
    """Tokens that generate adds to the prompt."""
    batch: int = 1
    """Equal sequences per call."""

    @property
    def title(self) -> str:
        """Words for progress lines."""
        several = f", batch {self.batch}" if self.batch > 1 else ""
        if self.phase == "generate":
            return f"generate {self.n_new} tokens after {self.n_tokens}"
        if self.phase == "decode":
            return f"decode at {self.past_len} tokens{several}"
        return f"prefill of {self.n_tokens} tokens{several}"

    @property
    def n_positions(self) -> int:
        """Tokens in the cache at most."""
        return self.past_len + self.n_tokens + self.n_new


def workloads(settings: BenchSettings) -> list[Workload]:
    """Expand settings into workloads."""
    decode = [
        Workload("decode", 1, past_len, settings.decode_samples, batch=batch)
        for batch in settings.batch
        for past_len in settings.past_len
    ]
    prefill = [
        Workload("prefill", length, 0, settings.prefill_samples, batch=batch)
        for batch in settings.batch
        for length in settings.prompt_len
    ]
    lengths = map(generation_lengths, settings.generate)
    generate = [Workload("generate", n_prompt, 0, 1, n_new) for n_prompt, n_new in lengths]
    return [*decode, *prefill, *generate]


@dataclass
class _Case:
    """One artifact or peer at one workload, while it is measured."""

    artifact: OnnxArtifact | Peer
    engine: EngineProcess | None = None
    rounds: list[list[int]] = field(default_factory=list)
    generations: list[list[list[int]]] = field(default_factory=list)
    """Of every round its answers: nanoseconds to the first token, and from each token to the next."""
    load_ms: float | None = None
    peak_rss_bytes: int | None = None
    reason: str | None = None
    """Why the engine failed, if it did."""

    def fail(self, error: OwlDeployError) -> None:
        """Remember a failure; the others go on."""
        self.reason, self.engine = str(error), None


def measure_artifacts(
    artifacts: Sequence[Path],
    settings: BenchSettings = BenchSettings(),
    *,
    baseline: str,
    evaluation: EvalSettings = EvalSettings(),
    tasks: TaskSettings | None = None,
    reference: str | None = None,
    threads: int | Literal["auto"] = "auto",
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
    load_before: float | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Measure quality and latency of artifacts, each in its own engine.

    Args:
        artifacts: folders; their names must differ.
        settings: context depths, prompt lengths, rounds, peers.
        baseline: name or path of the artifact that the others are compared with.
        evaluation: text on which the perplexity of every artifact is taken.
        tasks: what every artifact is asked besides.
        reference: model that KL divergence is taken against, and that peers run; none when not given.
        threads: of every engine.
        seed: of the tokens that are run and of the bootstrap.
        recipe: kept in the result, where a recipe asked for this.
        load_before: load average before earlier stages of this run; read now when not given.
        on_step: told of every evaluation window and every round.

    Returns:
        The result document (`report.json`). Where an interrupt came, it holds the rounds that were whole until then,
        and `stopped` says where that was.

    Raises:
        KeyboardInterrupt: there was nothing yet to be kept.
        RecipeError: the baseline is not among the artifacts, or two artifacts or peers share a name.
        UnsupportedModelError: a folder is not an artifact, or too short for a workload.
    """
    opened = [open_artifact(path) for path in artifacts]
    baseline_name = _baseline_name(opened, baseline, settings.peer)
    plan = workloads(settings)
    _check_lengths(opened, plan)
    count = resolve_threads(threads)
    watch = MachineWatch.start(load_before)
    peers, missing = _peers(settings.peer, opened, reference, count.n, on_step)
    _check_lengths(peers, plan)
    measured: list[OnnxArtifact | Peer] = [*opened, *peers]
    qualities = _qualities(measured, evaluation, reference, count.n, on_step)
    answers = {} if tasks is None else task_accuracies(opened, tasks, threads=count.n, on_step=on_step)
    bandwidth = memory_bandwidth(count.n)
    rows: list[dict[str, Any]] = []
    stopped = None
    for workload in plan:
        cases = [_Case(artifact) for artifact in measured]
        try:
            _measure_workload(cases, workload, settings, count.n, seed, on_step)
        except KeyboardInterrupt:
            n_rounds = _keep_whole_rounds_(cases)
            if not rows and n_rounds < _FEWEST_ROUNDS:
                raise
            stopped = f"{workload.title}, after {n_rounds} of {settings.rounds} rounds"
            if n_rounds < _FEWEST_ROUNDS:
                break
        found = _rows(cases, workload, baseline_name, qualities, answers, count.n, bandwidth, seed)
        reference_row = next(row for row in found if row["is_baseline"])
        for row in found:
            log.info("%s: %s", workload.title, row_sentence(row, reference_row))
        rows += found
        rows += [_missing_row(peer, reason, workload, count.n) for peer, reason in missing]
        if stopped:
            break
    return {
        "format_version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions("onnxruntime", "onnx", "torch", "transformers", "numpy"),
        "commit": commit(),
        "recipe": recipe,
        "stopped": stopped,
        "machine": {**machine_facts(count), "memory_bandwidth_bytes_per_s": bandwidth, **watch.facts()},
        "protocol": {
            "n_rounds": settings.rounds,
            "samples_per_round": {
                "decode": settings.decode_samples,
                "prefill": settings.prefill_samples,
                **({"generate": 1} if settings.generate else {}),
            },
            "cold_calls_per_round": {
                "decode": _n_cold(settings.decode_samples),
                "prefill": _n_cold(settings.prefill_samples),
                **({"generate": 0} if settings.generate else {}),
            },
            "warmup": f"until the median changes by less than {_STABLE:.0%} between batches, at most "
            f"{_MAX_WARMUPS} batches",
            "interleaved": True,
            "outside_clock": _OUTSIDE_CLOCK,
            "bytes_per_step": _BYTES_PER_STEP,
        },
        "baseline": baseline_name,
        "artifacts": {artifact.name: file_sha256(artifact.path / "owl.json") for artifact in opened},
        "peers": {peer.name: peer.facts.model_dump(mode="json") for peer in peers},
        "rows": rows,
        "profiles": [profile for artifact in opened if (profile := _profile(artifact)) is not None],
    }


def _baseline_name(artifacts: list[OnnxArtifact], baseline: str, peers: Sequence[PeerSettings]) -> str:
    """Return the name of the baseline artifact, which the user gave by name or by path."""
    names = [artifact.name for artifact in artifacts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"two artifacts are named {twice[0]}: rows are told apart by name, so rename a folder")
    taken = list(names)
    for peer in peers:
        if peer.name in taken:
            raise RecipeError(f"a peer is named {peer.name} as another row is: rows are told apart by name")
        taken.append(peer.name)
    for artifact in artifacts:
        if baseline == artifact.name or Path(baseline).resolve() == artifact.path.resolve():
            return artifact.name
    raise RecipeError(f"baseline {baseline} is not among the artifacts: {', '.join(names)}")


def _peers(
    wanted: Sequence[PeerSettings], artifacts: list[OnnxArtifact], model: str | None, threads: int, on_step: OnStep
) -> tuple[list[Peer], list[tuple[PeerSettings, str]]]:
    """Return the peers that are here, and those that are not with the reason why."""
    peers: list[Peer] = []
    missing: list[tuple[PeerSettings, str]] = []
    if not wanted:
        return peers, missing
    from owl_deploy.engines.peers import prepared_peer  # reads checkpoints, which an image without torch cannot

    for settings in wanted:
        try:
            peers.append(prepared_peer(settings, model=model, artifacts=artifacts, threads=threads, on_step=on_step))
        except (EngineUnavailableError, UnsupportedModelError) as error:
            missing.append((settings, str(error)))
    return peers, missing


def _check_lengths(artifacts: Sequence[OnnxArtifact | Peer], plan: list[Workload]) -> None:
    longest = max(workload.n_positions for workload in plan)
    for artifact in artifacts:
        if longest > artifact.facts.max_positions:
            raise RecipeError(
                f"{artifact.name} holds {artifact.facts.max_positions} positions and the longest workload "
                f"needs {longest}: "
                "lower past_len, prompt_len or generate, or export with a larger max_positions"
            )


def _qualities(
    artifacts: Sequence[OnnxArtifact | Peer],
    settings: EvalSettings,
    reference: str | None,
    threads: int,
    on_step: OnStep,
) -> dict[str, Evaluation | None]:
    """Return the evaluation of each artifact by name; None where its engine cannot run it (its rows then say why)."""

    def together(chosen: Sequence[OnnxArtifact | Peer]) -> dict[str, Evaluation | None]:
        paths = [str(artifact.path) for artifact in chosen]
        found = evaluate(paths, settings, reference=reference, threads=threads, on_step=on_step)
        return {artifact.name: evaluation for artifact, evaluation in zip(chosen, found, strict=True)}

    try:
        return together(artifacts)  # side by side the reference runs once for all
    except EngineUnavailableError:
        qualities: dict[str, Evaluation | None] = {}
        for artifact in artifacts:
            try:
                qualities |= together([artifact])
            except EngineUnavailableError:
                qualities[artifact.name] = None
        return qualities


def _measure_workload(
    cases: list[_Case], workload: Workload, settings: BenchSettings, threads: int, seed: int, on_step: OnStep
) -> None:
    """Fill the cases with raw nanoseconds: open all engines, warm up, then time them in turn."""
    caches = sum(case.artifact.kv_bytes(workload.batch * workload.n_positions) for case in cases)
    needed = caches + sum(2 * case.artifact.facts.bytes_dense for case in cases)
    if needed > available_bytes():
        raise OwlDeployError(
            f"{len(cases)} artifacts side by side may need {needed / 2**30:.1f} GiB and "
            f"{available_bytes() / 2**30:.1f} are free: "
            "bench fewer of them at once"
        )
    total = len(cases) * (settings.rounds + 1)
    with ExitStack() as stack:
        for done, case in enumerate(cases, start=1):
            try:
                case.engine = stack.enter_context(
                    open_engine(
                        case.artifact,
                        threads=threads,
                        # What is compiled for one length is compiled for the steps of a generation.
                        n_tokens=1 if workload.phase == "generate" else workload.n_tokens,
                        capacity=_capacity(case.artifact, workload),
                        last_logits_only=True,
                        batch=workload.batch,
                        is_serving=workload.phase == "generate",
                        timeout_s=settings.timeout_s,
                    )
                )
                case.load_ms = case.engine.load_ms
                _warm_up(case.engine, _tokens(case.artifact, workload, seed), workload)
            except EngineUnavailableError as error:
                case.fail(error)
            on_step(Step(workload.title, done, total, f"{case.artifact.name} warm"))
        for number in range(settings.rounds):
            for position, case in enumerate(cases, start=1):
                if case.engine is not None:
                    _measure_round(case, case.engine, workload, seed)
                on_step(Step(workload.title, len(cases) * (number + 1) + position, total, case.artifact.name))


def _keep_whole_rounds_(cases: list[_Case]) -> int:
    """Drop what was measured of a round that not all could finish; return how many rounds are left."""
    n_rounds = min((len(case.rounds) for case in cases if case.reason is None), default=0)
    for case in cases:
        del case.rounds[n_rounds:], case.generations[n_rounds:]
    return n_rounds


def _tokens(artifact: OnnxArtifact | Peer, workload: Workload, seed: int) -> NDArray[np.int64]:
    """Return random tokens; which ones does not change the work."""
    return np.random.default_rng(seed).integers(artifact.facts.vocab_size, size=workload.n_tokens, dtype=np.int64)


def _warm_up(engine: EngineProcess, tokens: NDArray[np.int64], workload: Workload) -> None:
    """Run batches until two in a row have nearly the same median."""
    before = float("inf")
    for _ in range(_MAX_WARMUPS):
        if workload.phase == "generate":
            samples = [sum(answer) for answer in _answers(engine, tokens, workload)]
        else:
            samples = engine.measure(tokens, workload.past_len, workload.n_samples)
        median = float(np.median(samples))
        if abs(median - before) < _STABLE * median:
            return
        before = median


def _answers(engine: EngineProcess, tokens: NDArray[np.int64], workload: Workload) -> list[list[int]]:
    """Return the nanoseconds of one round's answers, each of `n_new` tokens."""
    answers = engine.generate(tokens, workload.n_new, workload.n_samples)
    if any(len(answer) != workload.n_new or min(answer) <= 0 for answer in answers):
        raise EngineFailedError(f"{engine.engine} did not generate {workload.n_new} tokens as it was asked to")
    return answers


def _capacity(artifact: OnnxArtifact | Peer, workload: Workload) -> int:
    """Return the positions of the cache. OpenVINO's timed steps follow one another: see its session."""
    steps_on = artifact.facts.target == "openvino" and workload.phase == "decode"
    return workload.n_positions + (2 * workload.n_samples if steps_on else 0)


def _n_cold(n_samples: int) -> int:
    """Return how many calls run, uncounted, before the samples of a round."""
    return int(_COLD_SHARE * n_samples)


def _measure_round(case: _Case, engine: EngineProcess, workload: Workload, seed: int) -> None:
    """Time one round of a case; a failure ends the case, not the run."""
    try:
        tokens = _tokens(case.artifact, workload, seed)
        n_cold = _n_cold(workload.n_samples)
        if workload.phase == "generate":
            answers = _answers(engine, tokens, workload)
            case.generations.append(answers)
            case.rounds.append([sum(answer) for answer in answers])
            case.peak_rss_bytes = engine.peak_rss_bytes()
            return
        case.rounds.append(engine.measure(tokens, workload.past_len, n_cold + workload.n_samples)[n_cold:])
        case.peak_rss_bytes = engine.peak_rss_bytes()
    except EngineUnavailableError as error:
        case.fail(error)


def _rows(
    cases: list[_Case],
    workload: Workload,
    baseline: str,
    qualities: dict[str, Evaluation | None],
    answers: dict[str, TaskAccuracy],
    threads: int,
    bandwidth: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the report's rows of one workload."""
    reference = next(case for case in cases if case.artifact.name == baseline)
    rows = []
    for case in cases:
        artifact, facts = case.artifact, case.artifact.facts
        is_ok = case.reason is None
        ms = summary_ms(case.rounds) if is_ok else None
        speedup = None
        if is_ok and reference.reason is None:
            interval = speedup_interval(reference.rounds, case.rounds, seed=seed)
            speedup = asdict(interval)
        generation = None
        if is_ok and case.generations:
            measured = reference.generations if reference.reason is None else None
            generation = generation_summary(case.generations, measured, seed=seed)
        step_bytes = _bytes_per_step(artifact, workload)
        quality, answered = qualities[artifact.name], answers.get(artifact.name)
        rows.append(
            {
                "engine": facts.target,
                "artifact": artifact.name,
                "weights": facts.weights,
                "precision": facts.precision,
                "sparsity": facts.sparsity["linears"],
                "phase": workload.phase,
                "batch": workload.batch,
                "threads": threads,
                "prompt_len": 0 if workload.phase == "decode" else workload.n_tokens,
                "past_len": workload.past_len,
                "n_new": workload.n_new,
                "status": "ok" if is_ok else "failed",
                "reason": case.reason,
                "ms": ms,
                "tokens_per_s": workload.batch * (workload.n_new or workload.n_tokens) * 1e3 / ms["p50"]
                if ms
                else None,
                "speedup": speedup,
                "generation": generation,
                "generations_ns": case.generations,
                "is_baseline": artifact.name == baseline,
                "bytes_per_step": step_bytes,
                "ceiling_fraction": step_bytes / bandwidth * 1e3 / ms["p50"] if ms and step_bytes else None,
                "peak_rss_bytes": case.peak_rss_bytes,
                "load_ms": case.load_ms,
                "perplexity": quality.perplexity if quality else None,
                "kl_divergence": quality.kl_divergence if quality else None,
                "top1_agreement": quality.top1_agreement if quality else None,
                "evaluation": quality.to_json() if quality else None,
                "accuracy": answered.accuracy if answered else None,
                "tasks": answered.tasks if answered else None,
                "parity": _peer_parity(artifact, quality)
                if isinstance(artifact, Peer)
                else artifact.manifest.get("parity"),
                "samples_ns": case.rounds,
                "notes": _notes(artifact),
            }
        )
    return rows


def _missing_row(peer: PeerSettings, reason: str, workload: Workload, threads: int) -> dict[str, Any]:
    """Return the row of a peer that cannot be measured."""
    unknown = (
        "ms",
        "tokens_per_s",
        "speedup",
        "generation",
        "bytes_per_step",
        "ceiling_fraction",
        "peak_rss_bytes",
        "load_ms",
    )
    unmeasured = ("perplexity", "kl_divergence", "top1_agreement", "evaluation", "accuracy", "tasks", "parity")
    return {
        "engine": peer.engine,
        "artifact": peer.name,
        "weights": "dense",
        "precision": peer.precision or "as exported",
        "sparsity": 0.0,
        "phase": workload.phase,
        "batch": workload.batch,
        "threads": threads,
        "prompt_len": 0 if workload.phase == "decode" else workload.n_tokens,
        "past_len": workload.past_len,
        "n_new": workload.n_new,
        "status": "failed",
        "reason": reason,
        "is_baseline": False,
        "samples_ns": [],
        "generations_ns": [],
        "notes": [],
        **dict.fromkeys((*unknown, *unmeasured)),
    }


def _peer_parity(peer: Peer, quality: Evaluation | None) -> dict[str, Any] | None:
    """Return whether a peer computes what its model does, judged on the evaluated text; None where that is unknown.

    What runs an artifact has the artifact's, whose reference is its own checkpoint. Even of float32 weights no more is
    asked than of float16 ones: llama.cpp keeps keys and values in float16.
    """
    if peer.facts.parity is not None:
        return peer.facts.parity
    if quality is None or quality.kl_divergence is None or quality.top1_agreement is None:
        return None
    from owl_deploy.export.parity import DIVERGENCE_LIMITS

    limit = DIVERGENCE_LIMITS[_PARITY_CLASS.get(peer.facts.precision, "fp16")]
    return {
        "passed": quality.kl_divergence <= limit.kl_divergence and quality.top1_agreement >= limit.top1_agreement,
        "kl_divergence": quality.kl_divergence,
        "top1_agreement": quality.top1_agreement,
    }


def _notes(artifact: OnnxArtifact | Peer) -> list[str]:
    if isinstance(artifact, Peer):
        return list(artifact.facts.notes)
    return [LICENCE_NOTICE] if artifact.facts.target == "deepsparse" else []


def _bytes_per_step(artifact: OnnxArtifact | Peer, workload: Workload) -> int | None:
    """Return the bytes that a decode step must read; None for prefill, which computation bounds."""
    if workload.phase != "decode":
        return None
    step_bytes = artifact.facts.bytes_per_decode_step
    held = "nonzero" if artifact.facts.target == "deepsparse" else "dense"
    return step_bytes.get("stored", step_bytes[held]) + workload.batch * artifact.kv_bytes(workload.past_len)


def _profile(artifact: OnnxArtifact) -> dict[str, Any] | None:
    """Return the sparsity of every block, where the artifact comes from a pruned checkpoint."""
    lineage = artifact.manifest.get("checkpoint") or {}
    if "blocks" not in lineage:
        return None
    settings = lineage["recipe"]["prune"]
    return {
        "artifact": artifact.name,
        "method": settings["method"],
        "allocation": settings["allocation"],
        "target": lineage["sparsity"]["target"],
        "blocks": lineage["blocks"],
    }
