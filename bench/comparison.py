"""Rows that may be compared, and when a comparison may be shown.

In: the rows of a bench result. Out: the same rows grouped by workload, and the reasons against showing a speed-up.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from owl_deploy.bench.plots import Row

__all__ = [
    "Result",
    "Workload",
    "has_speedup",
    "is_comparable",
    "is_number",
    "main_workload",
    "printable",
    "row_sentence",
    "times",
    "void_reason",
    "workloads_of",
]

Result: TypeAlias = dict[str, Any]

_EVALUATION_KEYS = ("text", "tokens_sha256", "starts_with_bos", "window", "n_windows")


@dataclass(frozen=True)
class Workload:
    """The rows that may be compared with each other: same phase, batch and lengths (tokens)."""

    phase: str
    batch: int
    prompt_len: int
    past_len: int
    n_new: int
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What is run, in words."""
        if self.phase == "generate":
            return f"Generate, batch {self.batch}, prompt of {self.prompt_len} tokens, {self.n_new} new ones"
        length = (
            f"prompt of {self.prompt_len} tokens" if self.phase == "prefill" else f"{self.past_len} tokens of context"
        )
        return f"{self.phase.capitalize()}, batch {self.batch}, {length}"

    @property
    def baseline(self) -> Row | None:
        """The baseline's row, if it ran."""
        return next((row for row in self.rows if row["is_baseline"] and row["status"] == "ok"), None)

    @property
    def cases(self) -> list[Row]:
        """The rows that are compared with the baseline and may show their speed-up."""
        return [row for row in self.rows if has_speedup(row, self.baseline) and not row["is_baseline"]]


def workloads_of(result: Result) -> list[Workload]:
    """Return the rows grouped by workload: decode before prefill, otherwise in the order measured."""
    groups: dict[tuple[str, int, int, int, int], list[Row]] = {}
    for row in result["rows"]:
        key = (row["phase"], row["batch"], row["prompt_len"], row["past_len"], row.get("n_new", 0))
        groups.setdefault(key, []).append(row)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != "decode")
    return [Workload(*key, rows=tuple(rows)) for key, rows in ordered]


def main_workload(workloads: list[Workload]) -> Workload:
    """Return the workload that a report speaks of first: decode, if there is any."""
    return next((workload for workload in workloads if workload.phase == "decode"), workloads[0])


def void_reason(row: Row, baseline: Row | None = None) -> str | None:
    """Return why this row's speed-up over the baseline's row must not be shown, or None."""
    if not row.get("parity"):
        return "parity not checked"
    if _failed_parity(row):
        return "parity failed"
    if not is_number(row.get("perplexity")):
        return "perplexity unknown"
    return "baseline failed parity" if baseline is not None and _failed_parity(baseline) else None


def has_speedup(row: Row, baseline: Row | None) -> bool:
    """Return whether the row ran and its speed-up may be shown."""
    has_ratio = row["status"] == "ok" and bool(row["speedup"] or row["is_baseline"])
    return has_ratio and void_reason(row, baseline) is None


def _failed_parity(row: Row) -> bool:
    return bool(row.get("parity")) and not row["parity"]["passed"]


def is_comparable(row: Row, baseline: Row | None) -> bool:
    """Return whether both perplexities were measured on the same tokens in the same windows."""
    if baseline is None or not row.get("evaluation") or not baseline.get("evaluation"):
        return False
    return all(row["evaluation"].get(key) == baseline["evaluation"].get(key) for key in _EVALUATION_KEYS)


def printable(text: object) -> str:
    """Return text on one line, without control characters: they could drive a terminal or reorder the line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def row_sentence(row: Row, baseline: Row | None) -> str:
    """Return a row's artifact and figures in one line, a speed-up only with the quality that it has."""
    name = printable(row["artifact"])
    if row["status"] != "ok":
        return f"{name}: failed: {printable(row['reason'])}"
    found = [f"{row['ms']['p50']:.4g} ms"]
    if has_speedup(row, baseline) and row["speedup"] and not row["is_baseline"]:
        speedup = row["speedup"]
        interval = f"{times(speedup['low'])} to {times(speedup['high'])}"
        found.append(f"{times(speedup['p50'])} ({interval})")
    reason = void_reason(row, baseline)
    quality = f"void: {reason}" if reason else f"perplexity {row['perplexity']:.4g}"
    return f"{name}: {', '.join([*found, quality])}"


def is_number(value: Any) -> bool:
    """Return whether a figure is known."""
    return value is not None and math.isfinite(value)


def times(ratio: float) -> str:
    """Return a ratio in words: 1.21x."""
    return f"{ratio:,.2f}x" if ratio < 10 else f"{ratio:,.1f}x" if ratio < 1000 else f"{ratio:,.0f}x"
