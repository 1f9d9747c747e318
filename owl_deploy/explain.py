"""Why an artifact decodes as fast as it does, by what its files say: nodes, bytes, matrices, limits.

In: an artifact and a length of context. Out: an `Explanation`, which `explain_tables` prints. The one thing measured is
the read bandwidth of this machine; all else is counted, or predicted by the cost model that chooses encodings. Time is
measured by `owl_deploy.bench` alone.

A floor is what memory allows: the bytes that a step has to read, over the bandwidth. Activations, logits and rotary
tables are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.bench.bandwidth import memory_bandwidth
from owl_deploy.bench.machine import machine_facts
from owl_deploy.engines.bridge import bridge_status
from owl_deploy.engines.status import onnxruntime_status
from owl_deploy.errors import EngineUnavailableError, RecipeError
from owl_deploy.explain_graph import GraphFacts, read_graph
from owl_deploy.explain_matrices import MatrixFacts, dense_bytes, matrix_facts
from owl_deploy.explain_nodes import RunNodes, run_nodes
from owl_deploy.explain_notes import explain_notes
from owl_deploy.export.machine_class import this_machine_class
from owl_deploy.export.packing import Precision
from owl_deploy.kernels import library_path
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.threads import resolve_threads

__all__ = ["DenseStep", "Explanation", "NodeRow", "Nodes", "Part", "explain_artifact"]

# What dense artifacts store their head in: int4 ones by default in int8.
_DENSE: tuple[tuple[Precision, Precision], ...] = (("fp32", "fp32"), ("int8", "int8"), ("int4", "int8"))
_UNTOLD = (
    "where nodes run: DeepSparse does not tell; bench refuses an artifact that it compiles in part only, and leaves to "
    "the ONNX Runtime inside it"
)


@dataclass(frozen=True)
class NodeRow:
    """One operator at one place."""

    operator: str
    domain: str | None
    """Empty for that of the ONNX standard; None for what fusions made, of which a profile tells the name alone."""
    n_in_file: int
    provider: str | None
    """Execution provider of ONNX Runtime."""
    n_assigned: int | None
    """Nodes that it was given, after the first optimisations."""
    n_run: int | None
    """Nodes that run in one decode step, after all of them."""


@dataclass(frozen=True)
class Nodes:
    """What the graph consists of, and what the engine makes of it."""

    rows: tuple[NodeRow, ...]
    per_block: tuple[int, ...]
    """Nodes in the file for each decoder block; empty where they cannot be told apart."""
    engine: str | None
    """Name and version of the engine that was asked."""
    missing: str | None
    """What is not known because the engine was not asked, and why."""

    @property
    def n_in_file(self) -> int:
        """Nodes of model.onnx."""
        return sum(row.n_in_file for row in self.rows)


@dataclass(frozen=True)
class Part:
    """Something that every decode step reads."""

    name: str
    """qkv, o, gate_up, down and other are linears of the blocks; head, embedding rows, vectors, KV cache."""
    is_pruned: bool
    """Whether pruning makes it smaller."""
    read_bytes: int
    read_bytes_dense: int
    """The same, were every matrix dense in its own precision."""
    read_bytes_fp32: int
    """The same in dense float32."""
    ms: float
    """What it adds to the floor."""
    share: float
    """Of the floor."""


@dataclass(frozen=True)
class DenseStep:
    """A dense artifact of the same model, at the same bandwidth."""

    precision: str
    read_bytes: int
    ms: float
    speedup: float
    """What the floor of the artifact allows against it."""


@dataclass(frozen=True)
class Explanation:
    """Why an artifact decodes as fast as it does."""

    artifact: OnnxArtifact
    past_len: int
    threads: int
    machine: dict[str, Any]
    """Facts of this machine, its class for the cost model and its read bandwidth."""
    nodes: Nodes
    parts: tuple[Part, ...]
    matrices: tuple[MatrixFacts, ...]
    against: tuple[DenseStep, ...]
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes that one decode step reads."""
        return sum(part.read_bytes for part in self.parts)

    @property
    def floor_ms(self) -> float:
        """Least time of a decode step that the bandwidth allows."""
        return sum(part.ms for part in self.parts)

    @property
    def read_bytes_dense(self) -> int:
        """Bytes that a step would read, were every matrix dense in its own precision."""
        return sum(part.read_bytes_dense for part in self.parts)

    @property
    def unpruned_bytes(self) -> int:
        """Bytes of that which no pruning makes smaller."""
        return sum(part.read_bytes_dense for part in self.parts if not part.is_pruned)

    @property
    def largest_speedup(self) -> float:
        """Amdahl's limit: over the dense form in the same precision, were all weights of the blocks zero and free."""
        return self.read_bytes_dense / self.unpruned_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy explain --json` prints."""
        facts = self.artifact.facts
        return {
            "kind": "explanation",
            "format_version": 1,
            "artifact": str(self.artifact.path),
            "model": {
                "model_type": self.artifact.manifest.get("model_type"),
                "n_blocks": facts.n_blocks,
                "target": facts.target,
                "weights": facts.weights,
                "precision": facts.precision,
                "sparsity": facts.sparsity,
            },
            "machine": self.machine,
            "threads": self.threads,
            "past_len": self.past_len,
            "nodes": {**asdict(self.nodes), "n_in_file": self.nodes.n_in_file},
            "step": {
                "parts": [asdict(part) for part in self.parts],
                "read_bytes": self.read_bytes,
                "floor_ms": self.floor_ms,
                "tokens_per_s": 1e3 / self.floor_ms,
            },
            "limits": {
                "read_bytes_dense": self.read_bytes_dense,
                "unpruned_bytes": self.unpruned_bytes,
                "unpruned_share": self.unpruned_bytes / self.read_bytes_dense,
                "largest_speedup": self.largest_speedup,
                "floor_speedup": self.read_bytes_dense / self.read_bytes,
                "against": [asdict(step) for step in self.against],
            },
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "notes": list(self.notes),
        }


def explain_artifact(
    path: Path, *, past_len: int = 256, threads: int | Literal["auto"] = "auto", on_step: OnStep = silent
) -> Explanation:
    """Explain an artifact.

    ONNX Runtime is asked which nodes it runs where: the model is loaded, and one token runs through it. DeepSparse is
    not started.

    Args:
        path: folder of the artifact.
        past_len: tokens in the cache of the step that is explained.
        threads: of the bandwidth and of the engine.
        on_step: told of the three steps.

    Raises:
        RecipeError: the artifact does not hold that many positions.
        UnsupportedModelError: the folder is no artifact of this version, or a file of it is missing or damaged.
    """
    artifact = open_artifact(path)
    if not 0 <= past_len < artifact.facts.max_positions:
        raise RecipeError(
            f"past_len must be in [0, {artifact.facts.max_positions}), the positions that {artifact.name} holds, "
            f"got {past_len}"
        )
    count = resolve_threads(threads)
    on_step(Step("explaining", 0, 3, "graph"))
    graph = read_graph(path, n_blocks=artifact.facts.n_blocks)
    matrices = matrix_facts(artifact, graph)
    on_step(Step("explaining", 1, 3, "nodes"))
    nodes = _nodes(artifact, graph, count.n)
    on_step(Step("explaining", 2, 3, "memory bandwidth"))
    bandwidth = memory_bandwidth(count.n)
    on_step(Step("explaining", 3, 3))
    parts = _parts(artifact, graph, matrices, past_len, bandwidth)
    explanation = Explanation(
        artifact=artifact,
        past_len=past_len,
        threads=count.n,
        machine={
            **machine_facts(count),
            "class": this_machine_class(),
            "memory_bandwidth_bytes_per_s": bandwidth,
        },
        nodes=nodes,
        parts=parts,
        matrices=tuple(matrices),
        against=_against(parts, matrices, bandwidth),
    )
    return replace(explanation, notes=tuple(explain_notes(explanation)))


def _nodes(artifact: OnnxArtifact, graph: GraphFacts, threads: int) -> Nodes:
    """Ask the engine about the nodes, where it is here and tells."""
    found: RunNodes | None = None
    engine: str | None = None
    missing: str | None = None
    try:
        if artifact.facts.target == "deepsparse":
            reason = bridge_status().reason
            missing = f"{_UNTOLD} ({reason})" if reason else _UNTOLD
        elif reason := onnxruntime_status().reason:
            missing = f"where nodes run: {reason}"
        else:
            operators = library_path() if artifact.facts.weights == "sparse-operator" else None
            found = run_nodes(artifact.path / "model.onnx", threads=threads, operators=operators)
            engine = f"onnxruntime {found.version}"
    except EngineUnavailableError as error:
        missing = f"where nodes run: {error}"
    has_blocks = artifact.manifest.get("graph", "lean") == "lean"
    return Nodes(_node_rows(graph, found), graph.nodes_of_blocks if has_blocks else (), engine, missing)


def _node_rows(graph: GraphFacts, found: RunNodes | None) -> tuple[NodeRow, ...]:
    """Return operators by how often they are in the file, those that only the engine knows last."""
    in_file = sorted(graph.n_nodes.items(), key=lambda item: -item[1])
    if found is None:
        return tuple(NodeRow(operator, domain, count, None, None, None) for (domain, operator), count in in_file)
    places: dict[tuple[str | None, str], set[str]] = {key: set() for key, _ in in_file}
    for provider, domain, operator in found.assigned:
        places.setdefault((domain, operator), set()).add(provider)
    domains = {operator: domain for domain, operator in reversed(places)}
    for provider, operator in found.run:
        places.setdefault((domains.get(operator), operator), set()).add(provider)
    rows = []
    for (place, operator), providers in places.items():
        n_in_file = 0 if place is None else graph.n_nodes.get((place, operator), 0)
        if not providers:  # optimised away
            rows.append(NodeRow(operator, place, n_in_file, None, 0, 0))
        for provider in sorted(providers):
            n_assigned = 0 if place is None else found.assigned.get((provider, place, operator), 0)
            n_run = found.run.get((provider, operator), 0) if domains.get(operator) == place else 0
            rows.append(NodeRow(operator, place, n_in_file, provider, n_assigned, n_run))
            n_in_file = 0  # counted once
    return tuple(rows)


def _parts(
    artifact: OnnxArtifact, graph: GraphFacts, matrices: Sequence[MatrixFacts], past_len: int, bandwidth: float
) -> tuple[Part, ...]:
    """Return what one step reads, in the order in which it is read first."""
    read: dict[str, tuple[bool, int, int, int]] = {}
    for matrix in sorted(matrices, key=lambda matrix: not matrix.is_in_block):
        _, *before = read.get(matrix.part, (False, 0, 0, 0))
        mine = (matrix.read_bytes, matrix.read_bytes_dense, 4 * matrix.n_weights)
        one, two, three = (a + b for a, b in zip(before, mine, strict=True))
        read[matrix.part] = (matrix.is_in_block, one, two, three)
    kept = {
        "embedding rows": graph.row_bytes,
        "vectors": graph.vector_bytes,
        "KV cache": artifact.kv_bytes(past_len),
    }
    read |= {name: (False, n_bytes, n_bytes, n_bytes) for name, n_bytes in kept.items()}
    total = sum(n_bytes for _, n_bytes, _, _ in read.values())
    return tuple(
        Part(name, *counts, ms=1e3 * counts[1] / bandwidth, share=counts[1] / total) for name, counts in read.items()
    )


def _against(parts: Sequence[Part], matrices: Sequence[MatrixFacts], bandwidth: float) -> tuple[DenseStep, ...]:
    """Return the floors of dense artifacts; rows, vectors and cache are taken to be the same."""
    now = sum(part.read_bytes for part in parts)
    multiplied = sum(matrix.read_bytes for matrix in matrices)
    steps = []
    for precision, head_precision in _DENSE:
        dense = now - multiplied
        for matrix in matrices:
            dense += dense_bytes(matrix.shape, precision if matrix.is_in_block else head_precision)
        steps.append(DenseStep(precision, dense, 1e3 * dense / bandwidth, dense / now))
    return tuple(steps)
