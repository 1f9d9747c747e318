"""Conditions under which a bench result does not pass (`bench --fail-if`): a result and conditions in, failures out.

A condition is asked of every row that has its quantity. A row passes over it that cannot have it: the baseline has no
speed-up, prefill and generation no bytes per step, and a failed engine nothing (it is a failure of its own). A row that
should have it and does not fails it, for what is not known cannot be said to pass: a void speed-up, a perplexity that
overflowed, a KL divergence without a reference. So does a condition that could be asked of no row at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from owl_deploy.bench.comparison import Result, Workload, is_number, printable, void_reason, workloads_of
from owl_deploy.bench.plots import Row
from owl_deploy.condition import Condition, parse_condition

__all__ = ["failed_conditions"]

_DECODE_ONLY = ("bytes_per_step", "ceiling_fraction")
_UNKNOWN = {
    "kl_divergence": "needs --reference",
    "top1_agreement": "needs --reference",
    "ms.p99": "needs 100 samples, rounds times samples",
}


def failed_conditions(result: Result, conditions: Iterable[str]) -> list[str]:
    """Return a sentence for every condition and row that does not pass, in the order of the conditions.

    Raises:
        ValueError: a text is no condition.
    """
    return [sentence for text in conditions for sentence in _failures(parse_condition(text), result)]


def _failures(condition: Condition, result: Result) -> list[str]:
    asked = [
        (workload, row)
        for workload in workloads_of(result)
        for row in workload.rows
        if row["status"] == "ok" and _can_have(condition.quantity, row)
    ]
    if not asked:
        return [f"{condition}: no row has {condition.quantity}, so nothing was checked"]
    return [
        f"{condition}: {printable(row['artifact'])} in {printable(row['engine'])}, {workload.title}: {finding}"
        for workload, row in asked
        if (finding := _finding(condition, row, workload)) is not None
    ]


def _can_have(quantity: str, row: Row) -> bool:
    if quantity.startswith("speedup"):
        return not row["is_baseline"]
    return row["phase"] == "decode" or quantity not in _DECODE_ONLY


def _finding(condition: Condition, row: Row, workload: Workload) -> str | None:
    """Return what is wrong with a row, or None."""
    quantity = condition.quantity
    if quantity.startswith("speedup"):
        if workload.baseline is None:
            return "no speed-up, the baseline has no result"
        if reason := void_reason(row, workload.baseline):
            return f"speed-up void, {reason}"
    value = _value(row, quantity)
    if not is_number(value):
        return f"{quantity} unknown" + (f", it {_UNKNOWN[quantity]}" if quantity in _UNKNOWN else "")
    return f"{quantity} {value:.5g}" if condition.holds(value) else None


def _value(row: Row, quantity: str) -> Any:
    """Return the figure of a row, None where it has none."""
    first, _, second = quantity.partition(".")
    value = row.get(first)
    if isinstance(value, dict):
        return value.get(second or "p50")
    return value
