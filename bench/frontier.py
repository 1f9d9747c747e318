"""The frontier of a sweep: what no other artifact beats in speed and quality at once, as points and in words.

In: one bench result per cell, each with the same dense artifacts in its rounds. Out: one result that holds them all,
its points, those on the frontier, and sentences by fixed rules, which name a loss as readily as a gain. Nothing is
measured here, and no page is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from owl_deploy.bench.comparison import Result, has_speedup, is_number, main_workload, printable, times, workloads_of
from owl_deploy.bench.plots import Row, is_sparse, number, percent, series_name
from owl_deploy.bench.report_file import WORKLOAD_KEYS
from owl_deploy.bench.statistics import Speedup, speedup_interval, summary_ms
from owl_deploy.recipe import ArtifactSettings

__all__ = ["Point", "frontier", "merged", "points", "sentences"]

_CLOSE_PERPLEXITY = 1.10


@dataclass(frozen=True)
class Point:
    """One artifact: how fast, how good and how large; None is unknown."""

    name: str
    series: str
    """Engine, weights and precision; with the method and allocation of what was pruned."""
    sparsity: float
    perplexity: float
    kl_divergence: float | None
    accuracy: float | None
    """Mean over the tasks of the recipe, 0 to 1."""
    decode_ms: float
    speedup: Speedup
    """Of decode, over the baseline in the same rounds; 1 for the baseline itself."""
    over: Mapping[str, Speedup]
    """The same over every other dense artifact, where both ran in the same rounds."""
    prefill_ms: float | None
    prefill_speedup: float | None
    peak_rss_bytes: int | None
    bytes_on_disk: int | None
    is_dense: bool
    """Whether it is of the model before pruning, or of another engine."""
    is_baseline: bool


def merged(
    cells: Mapping[str, Result],
    failed: Mapping[str, Mapping[str, str]],
    *,
    sizes: Mapping[str, Mapping[str, int]],
    series: Mapping[str, str],
    exported: Mapping[str, ArtifactSettings],
    recipe: dict[str, Any],
    command: str,
    seed: int,
) -> Result:
    """Put the results of all cells into one, of the same form.

    The rows of a cell's own artifacts are named CELL/ARTIFACT, and keep the speed-up over the baseline of their own
    rounds. Those of the dense artifacts, which every cell measured, become one: the rounds of all cells together.

    Args:
        cells: results by name of the cell, in order; not empty.
        failed: why there is no result, by name of the cell and of the artifact.
        sizes: bytes on disk by cell and artifact.
        series: what a cell's method and allocation are called, by name of the cell.
        exported: settings of all artifacts, by name; those not of the dense checkpoint are made of every cell.
        recipe: kept in the result.
        command: kept in the result.
        seed: of the bootstrap.
    """
    first = next(iter(cells.values()))
    pruned = {name for name, item in exported.items() if item.checkpoint != "dense"}
    rows: list[Row] = []
    for key in dict.fromkeys(_workload(row) for result in cells.values() for row in result["rows"]):
        found = [(cell, row) for cell, result in cells.items() for row in result["rows"] if _workload(row) == key]
        names = dict.fromkeys(row["artifact"] for _, row in found if row["artifact"] not in pruned)
        dense = {name: [(cell, row) for cell, row in found if row["artifact"] == name] for name in names}
        baselines = {cell: row for cell, row in found if row["is_baseline"]}
        rows += [_pooled(list_of_rows, baselines, seed) for list_of_rows in dense.values()]
        for cell, row in found:
            if row["artifact"] in pruned:
                others = [other for _, other in found if other["artifact"] in names and not other["is_baseline"]]
                beside = [other for where, other in found if where == cell and other in others]
                over = {other["artifact"]: _over(other, row, seed) for other in beside}
                trained = ", recovered" if exported[row["artifact"]].checkpoint == "recovered" else ""
                own = {"artifact": f"{cell}/{row['artifact']}", "cell": series[cell] + trained}
                rows.append(row | own | {"over": {name: found for name, found in over.items() if found}})
        lacking = dict(zip(WORKLOAD_KEYS, key, strict=True))
        reasons = {_name(cell, name, pruned): (name, why) for cell, of in failed.items() for name, why in of.items()}
        for shown, (name, reason) in reasons.items():
            if name in pruned or name not in names:
                rows.append(_failed_row(found[0][1], lacking, shown, exported[name], reason))
    machines = [result["machine"] for result in cells.values()]
    return {
        **first,
        "created": max(result["created"] for result in cells.values()),
        "command": command,
        "recipe": recipe,
        "machine": _machine(machines),
        "artifacts": {
            _name(cell, name, pruned): digest
            for cell, result in cells.items()
            for name, digest in result["artifacts"].items()
        },
        "bytes_on_disk": {
            _name(cell, name, pruned): size for cell, found in sizes.items() for name, size in found.items()
        },
        "rows": rows,
        "profiles": [
            profile | {"artifact": _name(cell, profile["artifact"], pruned)}
            for cell, result in cells.items()
            for profile in result["profiles"]
            if profile["artifact"] in pruned
        ],
    }


def _name(cell: str, artifact: str, pruned: Collection[str]) -> str:
    return f"{cell}/{artifact}" if artifact in pruned else artifact


def _workload(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key, 0) for key in WORKLOAD_KEYS)


def _pooled(rows: Sequence[tuple[str, Row]], baselines: Mapping[str, Row], seed: int) -> Row:
    """Return one row of all rounds in which a dense artifact ran beside the baseline."""
    ran = [(cell, row) for cell, row in rows if row["status"] == "ok"]
    if not ran:
        return rows[0][1]
    first = ran[0][1]
    rounds = [one for _, row in ran for one in row["samples_ns"]]
    ms = summary_ms(rounds)
    both = [(cell, row) for cell, row in ran if cell in baselines and baselines[cell]["status"] == "ok"]
    speedup = None
    if both:
        reference = [one for cell, _ in both for one in baselines[cell]["samples_ns"]]
        speedup = asdict(speedup_interval(reference, [one for _, row in both for one in row["samples_ns"]], seed=seed))
    fractions = [row["ceiling_fraction"] for _, row in ran if row.get("ceiling_fraction")]
    return first | {
        "ms": ms,
        "speedup": speedup,
        "tokens_per_s": first["tokens_per_s"] * first["ms"]["p50"] / ms["p50"],
        "ceiling_fraction": median(fractions) if fractions else None,
        "peak_rss_bytes": max((row["peak_rss_bytes"] or 0 for _, row in ran), default=0) or None,
        "samples_ns": rounds,
    }


def _over(other: Row, row: Row, seed: int) -> dict[str, float] | None:
    if other["status"] != "ok" or row["status"] != "ok":
        return None
    return asdict(speedup_interval(other["samples_ns"], row["samples_ns"], seed=seed))


def _failed_row(model: Row, load: dict[str, Any], name: str, settings: ArtifactSettings, reason: str) -> Row:
    """Return a row that says why there is nothing of an artifact, with the keys of `model`."""
    unknown: Row = {key: [] if isinstance(value, list) else None for key, value in model.items()}
    known = {"engine": settings.target, "artifact": name, "weights": settings.weights, "precision": settings.precision}
    known |= load
    state = {"status": "failed", "reason": reason, "is_baseline": False, "sparsity": 0.0, "threads": model["threads"]}
    return {**unknown, **known, **state}


def _machine(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of the machine, of its worst moments; those of the first where there were several."""
    steal = [facts["steal_fraction"] for facts in machines if facts.get("steal_fraction") is not None]
    bandwidths = [facts["memory_bandwidth_bytes_per_s"] for facts in machines if facts["memory_bandwidth_bytes_per_s"]]
    return {
        **machines[0],
        "load_before": max(facts["load_before"] for facts in machines),
        "load_after": max(facts["load_after"] for facts in machines),
        "steal_fraction": max(steal) if steal else None,
        "memory_bandwidth_bytes_per_s": median(bandwidths) if bandwidths else None,
        "n_machines": len({(facts["cpu"], facts["n_cores"], facts["os"]) for facts in machines}),
    }


def points(result: Result) -> list[Point]:
    """Return the artifacts whose speed-up may be shown, in the order of the rows: those void or failed are left out.

    Args:
        result: of `merged`.
    """
    workloads = workloads_of(result)
    decode = main_workload(workloads)
    prefill = next((load for load in workloads if load.phase == "prefill"), None)
    beside = {row["artifact"]: row for row in prefill.rows if row["status"] == "ok"} if prefill else {}
    found = []
    for row in decode.rows:
        if not has_speedup(row, decode.baseline):
            continue
        other = beside.get(row["artifact"])
        found.append(
            Point(
                name=row["artifact"],
                series=series_name(row),
                sparsity=row["sparsity"],
                perplexity=row["perplexity"],
                kl_divergence=row.get("kl_divergence"),
                accuracy=row.get("accuracy"),
                decode_ms=row["ms"]["p50"],
                speedup=Speedup(1.0, 1.0, 1.0) if row["is_baseline"] else Speedup(**row["speedup"]),
                over={name: Speedup(**ratio) for name, ratio in row.get("over", {}).items()},
                prefill_ms=other["ms"]["p50"] if other else None,
                prefill_speedup=other["speedup"]["p50"] if other and other["speedup"] else None,
                peak_rss_bytes=row.get("peak_rss_bytes"),
                bytes_on_disk=result.get("bytes_on_disk", {}).get(row["artifact"]),
                is_dense="cell" not in row,
                is_baseline=row["is_baseline"],
            )
        )
    return found


def frontier(found: Iterable[Point]) -> list[Point]:
    """Return the points that no other one beats in decode speed and perplexity at once, best perplexity first.

    Of points that are the same in both, the first stays.
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.perplexity, -point.speedup.p50)):
        if not best or point.speedup.p50 > best[-1].speedup.p50:
            best.append(point)
    return best


def sentences(found: Sequence[Point]) -> list[str]:
    """Say what the frontier means: what is fastest at good quality, what each sparse step costs, what beats it."""
    baseline = next((point for point in found if point.is_baseline), None)
    if baseline is None:
        return ["The baseline has no result, so no speed-up can be given."]
    dense = [point for point in found if point.is_dense and not point.is_baseline]
    sparse = [point for point in found if not point.is_dense]
    said = [_close_sentence(baseline, [*dense, *sparse])]
    on_frontier = [point for point in frontier(found) if not point.is_dense]
    fastest = max(dense, key=lambda point: point.speedup.p50, default=baseline)
    said += [_step_sentence(point, fastest) for point in on_frontier]
    if sparse and not on_frontier:
        said.append("No sparse artifact is on the frontier: for each, a dense one is as fast at a better perplexity.")
    said += [sentence for other in dense if (sentence := _beaten_sentence(other, sparse))]
    return said


def _close_sentence(baseline: Point, others: Sequence[Point]) -> str:
    head = f"{_shown(baseline)} decodes in {number(baseline.decode_ms)} ms per token at perplexity "
    head += number(baseline.perplexity)
    close = [point for point in others if point.perplexity <= _CLOSE_PERPLEXITY * baseline.perplexity]
    faster = [point for point in close if point.speedup.low > 1]
    none_sparse = "" if any(not point.is_dense for point in close) else "; no sparse artifact is that good"
    if not faster:
        return f"{head}; nothing within 10 % of that is shown to be faster{none_sparse}."
    best = max(faster, key=lambda point: point.speedup.p50)
    return f"{head}; within 10 % of that the fastest is {_shown(best)}, {_ratio(best.speedup)} as fast{none_sparse}."


def _step_sentence(point: Point, fastest: Point) -> str:
    """Say what a sparse point on the frontier gives over the fastest dense one, and what it costs."""
    ratio = point.speedup if fastest.is_baseline else point.over.get(fastest.name)
    nats = math.log(point.perplexity / fastest.perplexity)
    cost = f"{nats:+.2f} nats per token (perplexity {number(point.perplexity)} instead of "
    cost += f"{number(fastest.perplexity)})"
    start = f"At {percent(point.sparsity)}, {_shown(point)}"
    if ratio is None:
        return f"{start} was not measured beside {_shown(fastest)}; it is at {cost}."
    if ratio.no_difference_shown:
        return f"{start} is not shown to be faster or slower than {_shown(fastest)} ({_ratio(ratio)}), at {cost}."
    return f"{start} decodes {_ratio(ratio)} as fast as {_shown(fastest)}, at {cost}."


def _beaten_sentence(other: Point, sparse: Sequence[Point]) -> str:
    """Name the sparse artifacts that a dense one beats in speed and perplexity at once, beyond noise; or nothing."""
    beaten = [
        point
        for point in sparse
        if (ratio := point.over.get(other.name)) and ratio.high < 1 and point.perplexity > other.perplexity
    ]
    if not beaten:
        return ""
    n_beaten = Counter(map(_kind, beaten))
    n_all = Counter(map(_kind, sparse))
    whole = [kind for kind, n in n_beaten.items() if n == n_all[kind] > 1]
    names = [f"every {printable(kind)}" for kind in whole]
    names += [f"{_shown(point)} at {percent(point.sparsity)}" for point in beaten if _kind(point) not in whole]
    return f"{_shown(other)} is faster and better than {', '.join(names)}."


def _kind(point: Point) -> str:
    """Return which of a cell's artifacts this is, which the same of other cells share."""
    return point.name.rpartition("/")[2]


def _shown(point: Point) -> str:
    return printable(point.name)


def _ratio(speedup: Speedup) -> str:
    return f"{times(speedup.p50)} ({speedup.low:.2f}-{speedup.high:.2f})"


def row_of(point: Point, on_frontier: bool) -> dict[str, Any]:
    """Return a point as flat values, for a table or a spreadsheet."""
    return {
        "artifact": point.name,
        "sparsity": round(point.sparsity, 4),
        "is_sparse": is_sparse({"sparsity": point.sparsity}),
        "decode_ms": point.decode_ms,
        "speedup": point.speedup.p50,
        "speedup_low": point.speedup.low,
        "speedup_high": point.speedup.high,
        "prefill_ms": point.prefill_ms,
        "prefill_speedup": point.prefill_speedup,
        "peak_rss_bytes": point.peak_rss_bytes,
        "bytes_on_disk": point.bytes_on_disk,
        "perplexity": point.perplexity,
        "kl_divergence": point.kl_divergence if is_number(point.kl_divergence) else None,
        "accuracy": point.accuracy,
        "on_frontier": on_frontier,
    }
