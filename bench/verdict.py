"""The sentences of a report: fixed rules over its rows, which name a loss as readily as a gain."""

from collections.abc import Iterable

from owl_deploy.bench.comparison import (
    Result,
    Workload,
    is_comparable,
    is_number,
    main_workload,
    printable,
    times,
    void_reason,
    workloads_of,
)
from owl_deploy.bench.machine import IDLE_LOAD, LITTLE_STEAL
from owl_deploy.bench.plots import Row, is_sparse, number, percent, series_name

__all__ = ["cautions", "findings", "noise_cautions", "verdict"]

# A case counts as "about as good as the baseline" up to this much more perplexity.
_CLOSE_PERPLEXITY = 1.10


def verdict(result: Result) -> str:
    """Return the result in one sentence: the baseline, the fastest case, and what that speed costs in quality.

    It speaks of the first decode workload, or of the first workload if none decodes.
    """
    workloads = workloads_of(result)
    if not workloads:
        return "Nothing was measured."
    return _sentence(main_workload(workloads))


def findings(result: Result) -> list[str]:
    """Return one sentence for each workload that the verdict does not speak of."""
    workloads = workloads_of(result)
    return [_sentence(workload) for workload in workloads if workload is not main_workload(workloads)]


def cautions(result: Result) -> list[str]:
    """Return what makes these figures weaker than they look, one sentence each."""
    rows = result["rows"]
    sentences = noise_cautions(result)
    if result.get("stopped"):
        sentences.append(f"Interrupted in {printable(result['stopped'])}: what was to follow is missing.")
    if any((row.get("ceiling_fraction") or 0.0) > 1.0 for row in rows):
        sentences.append("A row above 100 % of the ceiling reads part of its weights from the cache, not from memory.")
    ok = [row for row in rows if row["status"] == "ok"]
    for reason in ("parity failed", "parity not checked", "perplexity unknown"):
        if names := _names(row for row in ok if void_reason(row) == reason):
            sentences.append(f"{reason.capitalize()}: {names}.")
    if names := _names(
        row for load in workloads_of(result) for row in load.cases if not is_comparable(row, load.baseline)
    ):
        sentences.append(f"Perplexity cannot be compared with the baseline's (other text or windows): {names}.")
    return sentences


def noise_cautions(result: Result) -> list[str]:
    """Return what disturbed the machine while it measured, one sentence each."""
    machine, n_rounds = result["machine"], result["protocol"]["n_rounds"]
    sentences = []
    if machine["load_before"] > IDLE_LOAD:
        sentences.append(f"The machine was not idle: load average {machine['load_before']:.1f} before the run.")
    if (machine.get("steal_fraction") or 0.0) > LITTLE_STEAL:
        sentences.append(f"The hypervisor took {percent(machine['steal_fraction'])} of the processor time.")
    if n_rounds < 5:
        sentences.append(f"Only {n_rounds} rounds: the intervals say little about drift.")
    return sentences


def _sentence(workload: Workload) -> str:
    baseline, cases = workload.baseline, workload.cases
    if baseline is None:
        return f"{workload.title}: the baseline has no result, so no speed-up can be given."
    head = _baseline_clause(workload, baseline)
    if len(workload.rows) == 1:
        return f"{head}; nothing else was measured."
    if not cases:
        n_failed = sum(row["status"] != "ok" for row in workload.rows)
        n_void = len(workload.rows) - 1 - n_failed
        return f"{head}; there is no speed-up to show ({n_failed} failed, {n_void} void)."
    fastest = max(cases, key=lambda row: float(row["speedup"]["p50"]))
    clauses = [head, f"{_description(fastest)} is {_comparison(fastest)} {_quality_clause(fastest, baseline)}"]
    close = [row for row in cases if _is_close(row, baseline)]
    sparse = [row for row in cases if is_sparse(row)]
    if fastest not in close:
        clauses.append(_close_clause(close))
    elif sparse and fastest not in sparse:
        clauses.append(_sparse_clause(sparse, close, baseline))
    return "; ".join(clauses) + "."


def _baseline_clause(workload: Workload, baseline: Row) -> str:
    time = f"{number(baseline['ms']['p50'])} ms"
    if workload.phase == "generate":
        return (
            f"{_description(baseline)} answers a prompt of {workload.prompt_len} tokens with {workload.n_new} in {time}"
        )
    if workload.phase == "prefill":
        prompts = "a prompt" if workload.batch == 1 else f"{workload.batch} prompts"
        return f"{_description(baseline)} reads {prompts} of {workload.prompt_len} tokens in {time}"
    step = "token" if workload.batch == 1 else f"step of {workload.batch} tokens"
    return f"{_description(baseline)} decodes in {time} per {step} ({workload.past_len} tokens of context)"


def _comparison(row: Row) -> str:
    """Return "1.21x faster (95 % interval 1.10-1.32)", turned over when the case is slower."""
    p50, low, high = (row["speedup"][key] for key in ("p50", "low", "high"))
    if low <= 1.0 <= high:
        return f"not shown to be faster or slower ({times(p50)}, 95 % interval {low:.2f}-{high:.2f})"
    if p50 < 1.0:
        return f"{times(1 / p50)} slower (95 % interval {1 / high:.2f}-{1 / low:.2f})"
    return f"{times(p50)} faster (95 % interval {low:.2f}-{high:.2f})"


def _quality_clause(row: Row, baseline: Row) -> str:
    mine, other = row["perplexity"], baseline["perplexity"]
    if not is_number(other):
        return f"at perplexity {number(mine)} (the baseline's is unknown)"
    if not is_comparable(row, baseline):
        return (
            f"at perplexity {number(mine)} (not comparable with the baseline's {number(other)}: other text or windows)"
        )
    if number(mine) == number(other):
        return f"at the same perplexity, {number(mine)}"
    return f"at perplexity {number(mine)} instead of {number(other)}"


def _close_clause(close: list[Row]) -> str:
    faster = [row for row in close if row["speedup"]["low"] > 1.0]
    if not faster:
        return "no case is shown to be both faster and within 10 % of the baseline's perplexity"
    best = max(faster, key=lambda row: float(row["speedup"]["p50"]))
    return f"within 10 % of the baseline's perplexity the fastest is {_description(best)}, {_comparison(best)}"


def _sparse_clause(sparse: list[Row], close: list[Row], baseline: Row) -> str:
    """Return what sparsity gives where a dense case is the fastest: at good quality if there is such a case."""
    good = [row for row in sparse if row in close]
    best = max(good or sparse, key=lambda row: float(row["speedup"]["p50"]))
    which = "the fastest sparse case within 10 % of the baseline's perplexity" if good else "the fastest sparse case"
    return f"{which}, {_description(best)}, is {_comparison(best)} {_quality_clause(best, baseline)}"


def _is_close(row: Row, baseline: Row) -> bool:
    if not is_number(baseline["perplexity"]) or not is_comparable(row, baseline):
        return False
    return bool(row["perplexity"] <= _CLOSE_PERPLEXITY * baseline["perplexity"])


def _description(row: Row) -> str:
    name = printable(series_name(row))
    if is_sparse(row):
        return f"{name} at {percent(row['sparsity'])} sparsity"
    return f"{name} of the dense model" if row["weights"] == "sparse-operator" else name


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(f"{printable(row['artifact'])} in {printable(row['engine'])}" for row in rows))
