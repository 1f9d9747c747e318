"""A diagnosis as lines of text: facts, then what is wrong. In: the document of `doctor --json`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from owl_deploy.bench.comparison import printable
from owl_deploy.bench.report import machine_lines
from owl_deploy.engines.status import EngineStatus

__all__ = ["diagnosis_lines"]

_WIDTH = 100
_TERM = 31


def diagnosis_lines(document: dict[str, Any]) -> list[str]:
    """Return the lines, at most 100 columns each unless a word is longer."""
    lines = [line for term, value in _facts(document) for line in _wrapped(f"{term:<{_TERM}}", value)]
    found = document["findings"]
    lines.append("")
    for finding in found:
        lines += _wrapped(f"{finding['severity']}: ", finding["sentence"])
    n_errors = sum(finding["severity"] == "error" for finding in found)
    lines.append(
        "Nothing is wrong."
        if not found
        else f"{_count(n_errors, 'error')}, {_count(len(found) - n_errors, 'warning')}."
    )
    return lines


def _facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    machine, operator, cache = document["machine"], document["operator"], document["cache"]
    yield from machine_lines(machine)
    quota = "none" if machine["cgroup_quota"] is None else f"{machine['cgroup_quota']:g} CPUs"
    physical = "" if machine["n_physical_cores"] is None else f" on {machine['n_physical_cores']} physical"
    yield (
        "cores allowed, and why",
        f"{machine['n_cores']}{physical} of {machine['n_cores_machine']} by the affinity mask; cgroup quota {quota}",
    )
    limit = machine["memory_limit_bytes"]
    free = f"{machine['memory_available_bytes'] / 2**30:.1f} GiB"
    yield "memory free", free + (f", cgroup limit {limit / 2**30:.1f} GiB" if limit is not None else "")
    yield "operator library", operator["library"] or "not there"
    if operator["targets"]:
        chosen = operator["target"] or "none"
        yield "its target (those available)", f"{chosen} ({' '.join(operator['targets'])})"
    for engine in document["engines"]:
        yield f"engine {engine['name']}", EngineStatus(**engine).state
    yield "versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    state = "" if cache["exists"] else " (not made yet)"
    yield "cache folder", f"{cache['folder']}{state}, {cache['free_bytes'] / 2**30:.1f} GiB free"


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        printable(text),
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'s' * (number != 1)}"
