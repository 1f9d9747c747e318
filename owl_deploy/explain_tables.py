"""An explanation as text: tables of nodes, bytes and matrices, then limits and notes.

In: an explanation. Out: lines on stdout, made for 100 columns. Nothing is computed here but sums of groups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.comparison import printable
from owl_deploy.explain import Explanation, Nodes
from owl_deploy.explain_matrices import MatrixFacts

__all__ = ["print_explanation"]


def print_explanation(explanation: Explanation) -> None:
    """Print an explanation."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False)
    facts, machine, nodes = explanation.artifact.facts, explanation.machine, explanation.nodes
    say = console.print
    say(
        f"{printable(explanation.artifact.path)}: {facts.target}, weights {printable(facts.weights)}, "
        f"{printable(facts.precision)}, {facts.n_blocks} blocks, {facts.sparsity['linears']:.1%} of the linears pruned"
    )
    say(
        f"{machine['cpu']} ({machine['class']}), threads {explanation.threads}: reads "
        f"{machine['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, measured now"
    )
    say(f"\nNodes: {nodes.n_in_file} in the file{_per_block(nodes)}; {nodes.engine or 'no engine was asked'}")
    say(_nodes_table(nodes))
    say(
        f"\nBytes read by one decode step at {explanation.past_len} tokens of context, and the time that takes at least"
    )
    say(_parts_table(explanation))
    say("\nMatrices, equal ones together; zeros pay where SparseMatMul is predicted to be faster than dense")
    say(_matrices_table(explanation.matrices))
    for number, reason in enumerate(_reasons(explanation.matrices), start=1):
        say(f"({number}) {reason}")
    say("\nLimits")
    for sentence in _limits(explanation):
        say(sentence)
    for note in explanation.notes:
        say(f"Note: {printable(note)}")


def _per_block(nodes: Nodes) -> str:
    if not nodes.per_block:
        return ""
    low, high = min(nodes.per_block), max(nodes.per_block)
    return f", {low if low == high else f'{low} to {high}'} in each block"


def _table(*left: str, right: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _nodes_table(nodes: Nodes) -> Table:
    keys = {"n_in_file": "in the file", "n_assigned": "assigned", "n_run": "run in a step"}
    if nodes.engine is None:
        keys = {"n_in_file": "in the file"}
    table = _table("operator", "domain", *(["provider"] if nodes.engine else []), right=keys.values())
    for row in nodes.rows:
        provider = [printable(row.provider or "-").removesuffix("ExecutionProvider")] if nodes.engine else []
        counts = (str(getattr(row, key)) for key in keys)
        table.add_row(
            *map(
                Text,
                (
                    printable(row.operator),
                    "?" if row.domain is None else printable(row.domain or "ai.onnx"),
                    *provider,
                    *counts,
                ),
            )
        )
    table.add_section()
    totals = (str(sum(getattr(row, key) for row in nodes.rows)) for key in keys)
    table.add_row("together", "", *([""] if nodes.engine else []), *totals)
    return table


def _parts_table(explanation: Explanation) -> Table:
    table = _table("part", right=("MB", "of the step", "ms", "of dense fp32"))
    for part in explanation.parts:
        table.add_row(
            f"blocks: {part.name}" if part.is_pruned else part.name,
            _mb(part.read_bytes),
            f"{part.share:.1%}",
            f"{part.ms:.3f}",
            f"{part.read_bytes / part.read_bytes_fp32:.1%}" if part.read_bytes_fp32 else "-",
        )
    table.add_section()
    fp32 = sum(part.read_bytes_fp32 for part in explanation.parts)
    ratio = f"{explanation.read_bytes / fp32:.1%}"
    table.add_row("together", _mb(explanation.read_bytes), "100.0%", f"{explanation.floor_ms:.3f}", ratio)
    return table


def _matrices_table(matrices: Iterable[MatrixFacts]) -> Table:
    groups: dict[tuple[object, ...], list[MatrixFacts]] = {}
    for matrix in sorted(matrices, key=lambda matrix: not matrix.is_in_block):
        key = (matrix.part, matrix.shape, matrix.encoding, matrix.precision, matrix.break_even, matrix.reason)
        groups.setdefault(key, []).append(matrix)
    reasons = _reasons(matrices)
    table = _table(
        "part",
        "shape",
        "stored as",
        right=("count", "zeros", "pay from", "MB in file", "of dense", "pay"),
    )
    for group in groups.values():
        first = group[0]
        stored, dense = sum(matrix.bytes for matrix in group), sum(matrix.bytes_dense for matrix in group)
        pays = {True: "yes", False: "no", None: "?"}[first.pays]
        table.add_row(
            first.part,
            f"{first.shape[0]}x{first.shape[1]}",
            Text(f"{printable(first.encoding)} {first.precision}"),
            str(len(group)),
            _span([matrix.sparsity for matrix in group]),
            f"{first.break_even:.1%}" if first.break_even is not None else "?" if first.pays is None else "never",
            _mb(stored),
            f"{stored / dense:.1%}",
            pays if first.reason is None else f"{pays} ({reasons.index(first.reason) + 1})",
        )
    return table


def _reasons(matrices: Iterable[MatrixFacts]) -> list[str]:
    """Return the distinct reasons why zeros do not pay, those of the blocks first."""
    ordered = sorted(matrices, key=lambda matrix: not matrix.is_in_block)
    return list(dict.fromkeys(matrix.reason for matrix in ordered if matrix.reason is not None))


def _limits(explanation: Explanation) -> Iterator[str]:
    yield f"Floor: {explanation.floor_ms:.2f} ms a token, {1e3 / explanation.floor_ms:.0f} tokens/s; so it allows"
    for step in explanation.against:
        operator = "" if step.precision == "fp32" else " by MatMulNBits"
        yield f"  {step.speedup:.2f}x the speed of dense {step.precision}{operator} ({step.ms:.2f} ms)"
    dense, left = explanation.read_bytes_dense, explanation.unpruned_bytes
    kept = sorted((part for part in explanation.parts if not part.is_pruned), key=lambda part: -part.read_bytes_dense)
    shares = (
        f"{part.name} {part.read_bytes_dense / dense:.1%}" for part in kept if part.read_bytes_dense >= dense / 1e3
    )
    yield f"Amdahl: of this precision's dense bytes pruning leaves {left / dense:.1%} alone ({', '.join(shares)}):"
    yield (
        f"  at most {explanation.largest_speedup:.2f}x the speed of dense, however sparse the blocks; now "
        f"{dense / explanation.read_bytes:.2f}x"
    )


def _span(sparsities: list[float]) -> str:
    low, high = f"{min(sparsities):.1%}", f"{max(sparsities):.1%}"
    return low if low == high else f"{low[:-1]}-{high}"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f}"
