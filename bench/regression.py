"""Two reports against each other: did anything get slower from A to B, beyond what noise can do?

In: the contents of two report.json files. Out: one pair of rows per artifact and workload, with the speed-up of B over
A, what it shows, and what weakens the comparison. Nothing is measured here, and nothing printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from owl_deploy.bench.between_runs import between_runs_speedup
from owl_deploy.bench.comparison import Result, Workload, is_comparable, void_reason, workloads_of
from owl_deploy.bench.plots import Row
from owl_deploy.bench.report_file import WORKLOAD_KEYS
from owl_deploy.bench.statistics import Speedup, summary_ms
from owl_deploy.bench.verdict import noise_cautions
from owl_deploy.errors import RecipeError, shown

__all__ = ["Outcome", "ReportComparison", "RowPair", "compare_reports"]

_CONFIDENCE = 0.95
# Of a memory bandwidth that is measured in seconds, twice: more than this is another state of the machine.
_SAME_BANDWIDTH = 0.10

Outcome = Literal["regression", "slower", "faster", "no difference shown", "failed", "void"]
_MACHINE = {
    "cpu": "processor",
    "isa": "instruction sets",
    "n_cores": "cores allowed",
    "caches": "caches",
    "memory_bytes": "memory",
    "governor": "frequency governor",
    "os": "system",
}
_PROTOCOL = {
    "samples_per_round": "samples per round",
    "cold_calls_per_round": "calls before them, not counted",
    "warmup": "warm-up",
    "interleaved": "order of the engines",
    "outside_clock": "what is outside the clock",
}


@dataclass(frozen=True)
class RowPair:
    """One artifact in one engine at one workload, in both reports."""

    workload: Workload
    """As report B has it."""
    a: Row
    b: Row
    speedup: Speedup | None
    """Of B over A: above 1 is faster. None where a row failed or is void."""
    outcome: Outcome
    """`regression`: slower by more than the tolerance; `slower`: within it; `failed`: B has no figures."""
    reason: str = ""
    """Why there is no speed-up."""

    @property
    def is_regression(self) -> bool:
        """Whether B must not pass: it is slower beyond noise and tolerance, or lost what A had."""
        return self.outcome == "regression" or (self.outcome in ("failed", "void") and _reason(self.a) is None)

    def to_json(self) -> dict[str, Any]:
        """Return this pair as `owl-deploy compare --json` prints it."""
        row, speedup = self.b, self.speedup
        return {
            "engine": row["engine"],
            "artifact": row["artifact"],
            **{key: row[key] for key in WORKLOAD_KEYS},
            "outcome": self.outcome,
            "is_regression": self.is_regression,
            "reason": self.reason,
            "speedup": {"p50": speedup.p50, "low": speedup.low, "high": speedup.high} if speedup else None,
            "ms": {"a": _ms(self.a), "b": _ms(self.b)},
            "perplexity": {"a": self.a.get("perplexity"), "b": self.b.get("perplexity")},
        }


def _ms(row: Row) -> dict[str, float | int] | None:
    return summary_ms(row["samples_ns"]) if row["status"] == "ok" else None


@dataclass(frozen=True)
class ReportComparison:
    """What two reports say about each other."""

    pairs: tuple[RowPair, ...]
    tolerance: float
    """Share by which B may be slower."""
    confidence: float
    """With which all intervals together hold the true speed-ups."""
    warnings: tuple[str, ...]
    """What weakens the comparison, a sentence each."""

    @property
    def regressions(self) -> list[RowPair]:
        """The pairs that must not pass."""
        return [pair for pair in self.pairs if pair.is_regression]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy compare --json` prints."""
        return {
            "is_regression": bool(self.regressions),
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "rows": [pair.to_json() for pair in self.pairs],
            "warnings": list(self.warnings),
        }


def compare_reports(a: Result, b: Result, *, tolerance: float, seed: int = 0) -> ReportComparison:
    """Compare the rows of two results that have the same artifact, engine and workload.

    The intervals hold together: with n rows each has a confidence of 1 - 0.05 / n (Bonferroni), so that of equal runs
    at most one comparison in twenty shows any difference, however many rows it has. A row of B is a regression if the
    whole interval lies below 1 / (1 + tolerance), or if it failed or became void where that of A did not.

    Args:
        a: content of the earlier report.json, from `read_report`.
        b: content of the later one.
        tolerance: share by which B may be slower, in [0, 1): for what no sample of two runs holds, see `between_runs`.
        seed: of the bootstrap.

    Raises:
        RecipeError: the reports have other workloads, or no row that could be compared.
    """
    if not 0.0 <= tolerance < 1.0:
        raise RecipeError(f"tolerance must be in [0, 1), got {tolerance}: 0.02 lets B be 2 % slower")
    loads_a, loads_b = _by_workload(a), _by_workload(b)
    _check_workloads(loads_a, loads_b)
    matched = [
        (load, row, other)
        for key, load in loads_b.items()
        for name, row in _by_name(load, "B").items()
        if (other := _by_name(loads_a[key], "A").get(name)) is not None
    ]
    # What A had and B lost is something to say, even of all rows.
    if all(_reason(other) is not None for _, _, other in matched):
        raise RecipeError(_nothing(matched, a, b))
    n_compared = sum(_reason(other) is None and _reason(row) is None for _, row, other in matched)
    confidence = 1.0 - (1.0 - _CONFIDENCE) / max(1, n_compared)
    pairs = tuple(_pair(load, other, row, tolerance, confidence, seed) for load, row, other in matched)
    return ReportComparison(pairs, tolerance, _CONFIDENCE, tuple(_warnings(a, b, pairs)))


def _by_workload(result: Result) -> dict[tuple[Any, ...], Workload]:
    loads = workloads_of(result)
    return {tuple(getattr(load, key) for key in WORKLOAD_KEYS): load for load in loads}


def _by_name(load: Workload, report: str) -> dict[tuple[str, str], Row]:
    """Return the rows of one workload by artifact and engine."""
    rows: dict[tuple[str, str], Row] = {}
    for row in load.rows:
        name = (row["artifact"], row["engine"])
        if name in rows:
            raise RecipeError(
                f"report {report} has two rows of {shown(name[0])} at {load.title} and only one can be compared: "
                "bench anew"
            )
        rows[name] = row
    return rows


def _check_workloads(a: dict[tuple[Any, ...], Workload], b: dict[tuple[Any, ...], Workload]) -> None:
    only = {
        "A": [load.title for key, load in a.items() if key not in b],
        "B": [load.title for key, load in b.items() if key not in a],
    }
    if only["A"] or only["B"]:
        found = "; ".join(f"only {report} has {' and '.join(titles)}" for report, titles in only.items() if titles)
        raise RecipeError(
            f"the reports have different workloads ({found}): bench both with the same --past-len and --prompt-len"
        )


def _nothing(matched: list[tuple[Workload, Row, Row]], a: Result, b: Result) -> str:
    """Say why no row can be compared."""
    if not matched:
        names = [", ".join(dict.fromkeys(shown(row["artifact"]) for row in result["rows"])) for result in (a, b)]
        return f"no artifact is in both reports (A has {names[0]}; B has {names[1]}): rows are matched by name"
    reasons = dict.fromkeys(
        f"{shown(row['artifact'])} in {report}: {reason}"
        for _, after, before in matched
        for report, row in (("A", before), ("B", after))
        if (reason := _reason(row)) is not None
    )
    return f"no row can be compared ({'; '.join(reasons)}): bench artifacts that passed parity, with their perplexity"


def _pair(load: Workload, a: Row, b: Row, tolerance: float, confidence: float, seed: int) -> RowPair:
    for row, report in ((b, "B"), (a, "A")):
        if reason := _reason(row):
            outcome: Outcome = "failed" if row["status"] != "ok" else "void"
            return RowPair(load, a, b, None, outcome, f"{report}: {reason}")
    speedup = between_runs_speedup(a["samples_ns"], b["samples_ns"], seed=seed, confidence=confidence)
    return RowPair(load, a, b, speedup, _outcome(speedup, tolerance))


def _outcome(speedup: Speedup, tolerance: float) -> Outcome:
    if speedup.no_difference_shown:
        return "no difference shown"
    if speedup.low > 1.0:
        return "faster"
    return "regression" if speedup.high < 1.0 / (1.0 + tolerance) else "slower"


def _reason(row: Row) -> str | None:
    """Return why a row has no figure that may be compared, or None: no speed without parity and perplexity."""
    if row["status"] != "ok":
        return f"failed: {row.get('reason') or 'no reason given'}"
    return void_reason(row)


# What weakens a comparison.


def _warnings(a: Result, b: Result, pairs: Iterable[RowPair]) -> list[str]:
    return [
        *_differences("machine", _MACHINE, a["machine"], b["machine"]),
        *_threads(a, b, pairs),
        *_differences("versions", {}, a["versions"], b["versions"]),
        *_differences("protocol", _PROTOCOL, a["protocol"], b["protocol"]),
        *_bandwidths(a["machine"], b["machine"]),
        *(f"{name}: {sentence}" for name, result in (("A", a), ("B", b)) for sentence in noise_cautions(result)),
        *_other_artifacts(a, b),
        *_other_qualities(pairs),
        *_same_bytes(a, b, pairs),
    ]


def _differences(what: str, names: dict[str, str], a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return one sentence that names what differs; without `names` every key counts."""
    words = []
    for key in names or dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            values = [_short(result.get(key)) for result in (a, b)]
            words.append(names.get(key, key) + (f" {values[0]} / {values[1]}" if all(values) else ""))
    if not words:
        return []
    return [f"Not the same {what} (A / B): {', '.join(words)}."]


def _short(value: Any) -> str:
    """Return a value where it is short enough for a sentence, else nothing."""
    text = "none" if value is None else str(value) if isinstance(value, str | int | float) else ""
    return text if len(text) <= 40 else ""


def _threads(a: Result, b: Result, pairs: Iterable[RowPair]) -> list[str]:
    numbers = [{pair.a["threads"] for pair in pairs}, {pair.b["threads"] for pair in pairs}]
    if numbers[0] == numbers[1]:
        return []
    words = (
        f"{', '.join(map(str, sorted(n)))} ({result['machine'].get('threads_source') or 'unknown source'})"
        for n, result in zip(numbers, (a, b), strict=True)
    )
    return [f"Not the same threads (A / B): {' / '.join(words)}."]


def _bandwidths(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    key = "memory_bandwidth_bytes_per_s"
    if not a.get(key) or not b.get(key) or abs(b[key] / a[key] - 1.0) <= _SAME_BANDWIDTH:
        return []
    return [
        f"The memory read {a[key] / 1e9:.1f} GB/s in A and {b[key] / 1e9:.1f} in B: the machine was in another state."
    ]


def _other_artifacts(a: Result, b: Result) -> list[str]:
    names = [dict.fromkeys((row["artifact"], row["engine"]) for row in result["rows"]) for result in (a, b)]
    sentences = []
    for report, mine, other in (("A", *names), ("B", *reversed(names))):
        if only := [f"{artifact} in {engine}" for artifact, engine in mine if (artifact, engine) not in other]:
            sentences.append(f"Only {report} has {', '.join(only)}: not compared.")
    return sentences


def _other_qualities(pairs: Iterable[RowPair]) -> list[str]:
    """Say where B computes something else: other storage, or another perplexity on the same text."""
    sentences = []
    for pair in pairs:
        name = pair.b["artifact"]
        for key in ("weights", "precision"):
            if pair.a[key] != pair.b[key]:
                sentences.append(f"{name} has {key} {pair.a[key]} in A and {pair.b[key]} in B.")
        before, after = (row.get("perplexity") for row in (pair.a, pair.b))
        if before is None or after is None:
            continue
        if not is_comparable(pair.b, pair.a):
            sentences.append(f"The perplexities of {name} cannot be compared: other text or windows.")
        elif abs(after - before) > 0.01 * before:
            sentences.append(f"{name} has perplexity {before:.4g} in A and {after:.4g} in B.")
    return list(dict.fromkeys(sentences))


def _same_bytes(a: Result, b: Result, pairs: Iterable[RowPair]) -> list[str]:
    """Say where a difference cannot come from what was measured, because that is the same to the byte."""
    if a["versions"] != b["versions"] or not a.get("commit") or a["commit"] != b.get("commit"):
        return []
    hashes = [result.get("artifacts") or {} for result in (a, b)]
    moved = dict.fromkeys(
        pair.b["artifact"]
        for pair in pairs
        if pair.outcome in ("regression", "slower", "faster")
        and (known := hashes[0].get(pair.b["artifact"])) is not None
        and known == hashes[1].get(pair.b["artifact"])
    )
    if not moved:
        return []
    return [f"The same artifact, versions and commit in both, yet not the same speed: {', '.join(moved)}. The machine?"]
