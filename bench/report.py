"""The latency report: one bench result in, report.json, report.md, report.html and a terminal table out.

The result is the plain dict that report.json holds. Nothing here measures or decides: every figure shown is a figure of
the result, and the sentences are built from the rows by fixed rules that name a loss as readily as a gain. Artifact
names, engines' error messages and notes are untrusted text, escaped for whichever page they land on.

The void rule: a speed-up is shown only if that very artifact passed its parity check and its perplexity is known, and
the baseline did not fail its own.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.plots import (
    BLANK,
    Plot,
    Row,
    is_sparse,
    latency_plot,
    number,
    percent,
    profile_plot,
    quality_plot,
    series_name,
    speedup_plot,
)
from owl_deploy.files import new_folder, write_json

__all__ = ["cautions", "findings", "html_page", "markdown", "terminal_table", "verdict", "void_reason", "write_report"]

Result: TypeAlias = dict[str, Any]
Facts: TypeAlias = list[tuple[str, str]]

# A case counts as "about as good as the baseline" up to this much more perplexity.
_CLOSE_PERPLEXITY = 1.10
_EVALUATION_KEYS = ("text", "tokens_sha256", "starts_with_bos", "window", "n_windows")

DEFINITIONS: Facts = [
    ("decode", "One step with a filled KV cache: one new token per sequence of the batch."),
    ("prefill", "The whole prompt at once, from an empty KV cache, up to the logits of its last token."),
    ("p50, p90, p99", "Percentiles over all samples of all rounds, in milliseconds. p99 only from 100 samples up."),
    (
        "tokens/s",
        "Tokens of all sequences of the batch, over the median time: prompt tokens in prefill, new ones in decode.",
    ),
    ("speed-up", "Median of the baseline over median of the case, same workload: above 1 is faster, below 1 slower."),
    (
        "95 % interval",
        "Of the speed-up: bootstrap over rounds, then samples within rounds. One that contains 1 shows no difference.",
    ),
    (
        "void",
        "A speed-up not shown: the artifact did not pass parity, its perplexity is unknown, or the baseline failed.",
    ),
    ("bytes/step", "What a step has to read at least; the protocol says what is counted."),
    ("of ceiling", "Bytes per step over the median time, as a share of the memory bandwidth measured on this machine."),
    (
        "perplexity",
        "exp of the mean negative log-likelihood per token, measured on this very artifact; lower is better.",
    ),
    (
        "KL",
        "Mean Kullback-Leibler divergence from the reference model's next-token distribution, in nats; 0 is identical.",
    ),
    ("top-1", "Share of positions at which the most likely token is that of the reference model."),
    ("memory", "Largest resident set of the engine's process."),
    ("load", "From opening the artifact to ready for the first token."),
    ("sparsity", "Zeros over elements of the pruned matrices."),
]

HOW_TO_READ = "In brackets: the 95 % interval of the speed-up, and the change of perplexity against the baseline."

DEEPSPARSE_LICENCE = (
    "DeepSparse may be used for evaluation only, not in production, and its development ended in June 2025. "
    "Its rows are here for comparison."
)


@dataclass(frozen=True)
class Workload:
    """The rows that may be compared with each other: same phase, batch, prompt length and past length (tokens)."""

    phase: str
    batch: int
    prompt_len: int
    past_len: int
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What is run, in words."""
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
        return [row for row in self.rows if _has_speedup(row, self.baseline) and not row["is_baseline"]]


def write_report(result: Result, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`, all or none; a folder already there is replaced.

    A number that is not finite becomes null: JSON has no other word for "unknown".
    """
    known: Result = _without_nan(result)
    with new_folder(folder, replace=True) as temporary:
        write_json(temporary / "report.json", known)
        (temporary / "report.md").write_text(markdown(known), encoding="utf-8")
        (temporary / "report.html").write_text(html_page(known), encoding="utf-8")


def void_reason(row: Row, baseline: Row | None = None) -> str | None:
    """Return why this row's speed-up over the baseline's row must not be shown, or None."""
    if not row.get("parity"):
        return "parity not checked"
    if _failed_parity(row):
        return "parity failed"
    if not _is_number(row.get("perplexity")):
        return "perplexity unknown"
    return "baseline failed parity" if baseline is not None and _failed_parity(baseline) else None


# The sentences.


def verdict(result: Result) -> str:
    """Return the result in one sentence: the baseline, the fastest case, and what that speed costs in quality.

    It speaks of the first decode workload, or of the first workload if none decodes.
    """
    workloads = _workloads(result)
    if not workloads:
        return "Nothing was measured."
    return _sentence(_main_workload(workloads))


def findings(result: Result) -> list[str]:
    """Return one sentence for each workload that the verdict does not speak of."""
    workloads = _workloads(result)
    return [_sentence(workload) for workload in workloads if workload is not _main_workload(workloads)]


def cautions(result: Result) -> list[str]:
    """Return what makes these figures weaker than they look, one sentence each."""
    rows, machine = result["rows"], result["machine"]
    sentences = []
    if machine["load_before"] > 0.5:
        sentences.append(f"The machine was not idle: load average {machine['load_before']:.1f} before the run.")
    if (machine.get("steal_fraction") or 0.0) > 0.01:
        sentences.append(f"The hypervisor took {percent(machine['steal_fraction'])} of the processor time.")
    if result["protocol"]["n_rounds"] < 5:
        sentences.append(f"Only {result['protocol']['n_rounds']} rounds: the intervals say little about drift.")
    if any((row.get("ceiling_fraction") or 0.0) > 1.0 for row in rows):
        sentences.append("A row above 100 % of the ceiling reads part of its weights from the cache, not from memory.")
    ok = [row for row in rows if row["status"] == "ok"]
    for reason in ("parity failed", "parity not checked", "perplexity unknown"):
        if names := _names(row for row in ok if void_reason(row) == reason):
            sentences.append(f"{reason.capitalize()}: {names}.")
    if names := _names(
        row for load in _workloads(result) for row in load.cases if not _is_comparable(row, load.baseline)
    ):
        sentences.append(f"Perplexity cannot be compared with the baseline's (other text or windows): {names}.")
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
    if workload.phase == "prefill":
        prompts = "a prompt" if workload.batch == 1 else f"{workload.batch} prompts"
        return f"{_description(baseline)} reads {prompts} of {workload.prompt_len} tokens in {time}"
    step = "token" if workload.batch == 1 else f"step of {workload.batch} tokens"
    return f"{_description(baseline)} decodes in {time} per {step} ({workload.past_len} tokens of context)"


def _comparison(row: Row) -> str:
    """Return "1.21x faster (95 % interval 1.10-1.32)", turned over when the case is slower."""
    p50, low, high = (row["speedup"][key] for key in ("p50", "low", "high"))
    if low <= 1.0 <= high:
        return f"not shown to be faster or slower ({_times(p50)}, 95 % interval {low:.2f}-{high:.2f})"
    if p50 < 1.0:
        return f"{_times(1 / p50)} slower (95 % interval {1 / high:.2f}-{1 / low:.2f})"
    return f"{_times(p50)} faster (95 % interval {low:.2f}-{high:.2f})"


def _quality_clause(row: Row, baseline: Row) -> str:
    mine, other = row["perplexity"], baseline["perplexity"]
    if not _is_number(other):
        return f"at perplexity {number(mine)} (the baseline's is unknown)"
    if not _is_comparable(row, baseline):
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
    if not _is_number(baseline["perplexity"]) or not _is_comparable(row, baseline):
        return False
    return bool(row["perplexity"] <= _CLOSE_PERPLEXITY * baseline["perplexity"])


def _is_comparable(row: Row, baseline: Row | None) -> bool:
    """True if both perplexities were measured on the same tokens in the same windows."""
    if baseline is None or not row.get("evaluation") or not baseline.get("evaluation"):
        return False
    return all(row["evaluation"].get(key) == baseline["evaluation"].get(key) for key in _EVALUATION_KEYS)


def _description(row: Row) -> str:
    return _printable(series_name(row)) + (f" at {percent(row['sparsity'])} sparsity" if is_sparse(row) else "")


# The cells: what a row says in each column, the same words on every page.


@dataclass(frozen=True)
class Column:
    """A column of the full table: heading, and the text of a row's cell given the baseline's row of that workload."""

    heading: str
    cell: Callable[[Row, Row | None], str]


def _columns(rows: Iterable[Row]) -> list[Column]:
    """Return the columns that have something to say about these rows."""
    rows = list(rows)
    has_p99 = any("p99" in (row["ms"] or {}) for row in rows)
    columns = [
        Column("sparsity", lambda row, _: percent(row["sparsity"])),
        Column("p50 ms", lambda row, _: number(row["ms"]["p50"])),
        Column("p90 ms", lambda row, _: number(row["ms"]["p90"])),
        *([Column("p99 ms", lambda row, _: number(row["ms"].get("p99")))] if has_p99 else []),
        Column("tokens/s", lambda row, _: number(row["tokens_per_s"])),
        Column("speed-up", _speedup_cell),
        Column("bytes/step", lambda row, _: _decimal_bytes(row.get("bytes_per_step"))),
        Column("of ceiling", lambda row, _: percent(row.get("ceiling_fraction"), digits=0)),
        Column("perplexity", _perplexity_cell),
        Column("KL", lambda row, _: number(row.get("kl_divergence"))),
        Column("top-1", lambda row, _: percent(row.get("top1_agreement"))),
        Column("memory", lambda row, _: _decimal_bytes(row.get("peak_rss_bytes"))),
        Column("load", lambda row, _: _milliseconds(row.get("load_ms"))),
    ]
    if len({row["threads"] for row in rows}) > 1:
        columns.insert(0, Column("threads", lambda row, _: str(row["threads"])))
    return columns


def _speedup_cell(row: Row, baseline: Row | None) -> str:
    if row["is_baseline"]:
        return "baseline"
    if reason := void_reason(row, baseline):
        return f"void: {reason}"
    if not row["speedup"]:
        return BLANK
    return f"{_times(row['speedup']['p50'])} ({_interval(row)})" + (" no difference" if _shows_nothing(row) else "")


def _perplexity_cell(row: Row, baseline: Row | None) -> str:
    mine = row.get("perplexity")
    if not _is_number(mine):
        return "unknown"
    if row["is_baseline"] or baseline is None or not _is_number(baseline["perplexity"]):
        return number(mine)
    if not _is_comparable(row, baseline):
        return f"{number(mine)} (other text)"
    ratio = mine / baseline["perplexity"]
    return f"{number(mine)} ({_times(ratio)})" if ratio >= 2.0 else f"{number(mine)} ({100 * (ratio - 1):+.1f} %)"


def _interval(row: Row) -> str:
    return f"{row['speedup']['low']:.2f}-{row['speedup']['high']:.2f}"


def _shows_nothing(row: Row) -> bool:
    return bool(row["speedup"]["low"] <= 1.0 <= row["speedup"]["high"])


def _has_speedup(row: Row, baseline: Row | None) -> bool:
    has_ratio = row["status"] == "ok" and bool(row["speedup"] or row["is_baseline"])
    return has_ratio and void_reason(row, baseline) is None


def _failed_parity(row: Row) -> bool:
    return bool(row.get("parity")) and not row["parity"]["passed"]


# The facts around the figures.


def _machine_facts(machine: dict[str, Any]) -> Facts:
    caches = ", ".join(f"{_printable(name)} {_binary_bytes(size)}" for name, size in machine["caches"].items())
    bandwidth = machine.get("memory_bandwidth_bytes_per_s")
    return [
        ("processor", machine["cpu"]),
        ("instruction sets", " ".join(machine["isa"])),
        ("cores, threads used", f"{machine['n_cores']}, {machine['threads']} ({machine['threads_source']})"),
        ("caches", caches or "unknown"),
        ("memory", _binary_bytes(machine["memory_bytes"])),
        ("read bandwidth, measured", f"{bandwidth / 1e9:.1f} GB/s" if bandwidth else "unknown"),
        ("load average before, after", f"{machine['load_before']:.2f}, {machine['load_after']:.2f}"),
        ("time stolen by the hypervisor", percent(machine.get("steal_fraction"), unknown="unknown")),
        ("frequency governor", machine.get("governor") or "unknown"),
        ("system", f"{machine['os']}, Python {machine['python']}"),
    ]


def _protocol_facts(result: Result) -> Facts:
    protocol = result["protocol"]
    samples = ", ".join(f"{n} of {phase}" for phase, n in protocol["samples_per_round"].items())
    order = "engines take turns (A-B-A-B)" if protocol["interleaved"] else "engines one after the other"
    return [
        ("baseline", result["baseline"]),
        ("rounds", f"{protocol['n_rounds']}, {order}"),
        ("samples per round", samples),
        ("warm-up", protocol["warmup"]),
        ("outside the clock", protocol["outside_clock"]),
        ("bytes per step", protocol["bytes_per_step"]),
        ("quality measured on", "; ".join(_evaluations(result["rows"])) or "unknown"),
    ]


def _origin_facts(result: Result) -> Facts:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [("made", result["created"]), ("commit", result.get("commit") or "unknown"), ("versions", versions)]


def _evaluations(rows: Iterable[Row]) -> list[str]:
    """Return the distinct settings under which perplexity was measured, in words."""
    settings = [row["evaluation"] for row in rows if row.get("evaluation")]
    return list(dict.fromkeys(f"{s['text']}, {s['n_windows']} windows of {s['window']} tokens" for s in settings))


def _notes(result: Result) -> list[str]:
    """Return the rows' notes, each once per engine and artifact, and the licence note if DeepSparse was run."""
    rows = result["rows"]
    said = [(row, note) for row in rows for note in row.get("notes") or [] if note != DEEPSPARSE_LICENCE]
    notes = [f"{row['engine']}, {row['artifact']}: {note}" for row, note in said]
    return list(dict.fromkeys([*notes, *_licence_notes(result)]))


def _licence_notes(result: Result) -> list[str]:
    return [DEEPSPARSE_LICENCE] if any(row["engine"] == "deepsparse" for row in result["rows"]) else []


def _engine(row: Row) -> str:
    """Return the engine's name, with the limit of its licence where it has one."""
    return f"{row['engine']} (evaluation only)" if row["engine"] == "deepsparse" else str(row["engine"])


# Markdown.


def markdown(result: Result) -> str:
    """Return the report as GitHub-flavoured Markdown, one table per workload."""
    parts = [
        "# Latency report",
        f"**{_markdown_text(verdict(result))}**",
        *[_markdown_text(sentence) for sentence in findings(result)],
        *_markdown_list("What weakens these figures", cautions(result)),
        HOW_TO_READ,
        *[part for workload in _workloads(result) for part in _markdown_workload(workload)],
        *_markdown_facts("Machine", _machine_facts(result["machine"])),
        *_markdown_facts("Protocol", _protocol_facts(result)),
        *_markdown_facts("Definitions", DEFINITIONS),
        *_markdown_list("Notes", _notes(result)),
        *_markdown_facts("Origin", _origin_facts(result)),
        "Command:",
        _code_block(result["command"]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_workload(workload: Workload) -> list[str]:
    columns = _columns(workload.rows)
    head = ["engine", "weights", "artifact", *(column.heading for column in columns)]
    lines = [_markdown_line(head), "|" + " --- |" * 3 + " ---: |" * len(columns)]
    for row in workload.rows:
        cells = [_engine(row), f"{row['weights']} {row['precision']}", row["artifact"]]
        if row["status"] == "ok":
            cells += [column.cell(row, workload.baseline) for column in columns]
        else:
            cells += [percent(row["sparsity"]), _failure(row), *[""] * (len(columns) - 2)]
        lines.append(_markdown_line(cells))
    return [f"## {workload.title}", "\n".join(lines)]


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"


def _markdown_facts(heading: str, facts: Facts) -> list[str]:
    return [f"## {heading}", "\n".join(f"- {_markdown_text(term)}: {_markdown_text(value)}" for term, value in facts)]


def _markdown_list(heading: str, sentences: list[str]) -> list[str]:
    return [f"## {heading}", "\n".join(f"- {_markdown_text(sentence)}" for sentence in sentences)] if sentences else []


def _markdown_text(text: str) -> str:
    """Return text on one line with what Markdown and HTML would act on escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|&" else letter for letter in _printable(text))


def _code_block(text: str) -> str:
    return "    " + _printable(text)


# Terminal.


def terminal_table(result: Result) -> Table:
    """Return all rows as a table that fits 100 columns; reasons of failures stand below it, by number."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption_justify="left")
    for heading in ("engine", "weights", "phase"):
        table.add_column(heading, overflow="fold")
    for heading in ("sparsity", "ms p50", "tokens\n/s", "speed-up", "of\nceiling", "perplexity", "KL"):
        table.add_column(heading, justify="right")
    failures = list(dict.fromkeys(_failure(row) for row in result["rows"] if row["status"] != "ok"))
    for workload in _workloads(result):
        for row in workload.rows:
            table.add_row(*(Text(cell) for cell in _terminal_cells(workload, row, failures)))
        table.add_section()
    below = [f"({position}) {reason}" for position, reason in enumerate(failures, start=1)]
    table.caption = Text("\n".join([*below, *_licence_notes(result)]))
    return table


def _terminal_cells(workload: Workload, row: Row, failures: list[str]) -> list[str]:
    """Return the cells of one row; a failed one names its reason by its place in `failures`."""
    length = f"len {workload.prompt_len}" if workload.phase == "prefill" else f"past {workload.past_len}"
    batch = f"\nbatch {workload.batch}" if workload.batch > 1 else ""
    cells = [
        f"{_printable(row['engine'])}\n{_printable(row['artifact'])}",
        f"{_printable(row['weights'])}\n{_printable(row['precision'])}",
        f"{workload.phase}\n{length}{batch}",
        percent(row["sparsity"]),
    ]
    if row["status"] != "ok":
        return [*cells, "failed", f"({failures.index(_failure(row)) + 1})", "", "", "", ""]
    # The interval below the ratio, one word of a reason per line: this keeps the column at ten characters.
    speedup = "\n".join(_speedup_cell(row, workload.baseline).replace("(", "").replace(")", "").split())
    return [
        *cells,
        number(row["ms"]["p50"]),
        number(row["tokens_per_s"]),
        speedup,
        percent(row.get("ceiling_fraction"), digits=0),
        number(row.get("perplexity")),
        number(row.get("kl_divergence")),
    ]


# HTML.


def html_page(result: Result) -> str:
    """Return the report as one HTML page that loads nothing: plotly.js and all figures are inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_hash"] = _csp_hash
    template = environment.from_string((files("owl_deploy.bench") / "page.html.j2").read_text(encoding="utf-8"))
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return template.render(
        verdict=verdict(result),
        findings=findings(result),
        cautions=cautions(result),
        plots=_plots(result),
        tables=[_html_table(workload) for workload in _workloads(result)],
        fact_lists=[
            ("Protocol", _protocol_facts(result)),
            ("Machine", _machine_facts(result["machine"])),
            ("Origin", _origin_facts(result)),
            ("Definitions", DEFINITIONS),
        ],
        how_to_read=HOW_TO_READ,
        notes=_notes(result),
        command=result["command"],
        recipe=json.dumps(result["recipe"], indent=2) if result.get("recipe") else "",
        created=result["created"],
        cpu=result["machine"]["cpu"],
        plotly=plotly,
    )


def _plots(result: Result) -> list[Plot]:
    workloads = _workloads(result)
    colours = {name: number for number, name in enumerate(dict.fromkeys(series_name(row) for row in result["rows"]))}
    plots: list[Plot | None] = []
    for k, workload in enumerate(workloads):
        shown = [_with_baseline_at_one(row) for row in workload.rows if _has_speedup(row, workload.baseline)]
        plots.append(latency_plot(f"latency-{k}", f"{workload.title}: latency", workload.rows, colours))
        plots.append(speedup_plot(f"speedup-{k}", f"{workload.title}: speed-up", shown, colours))
        if workload is _main_workload(workloads):
            plots.append(quality_plot("quality", f"{workload.title}: speed against quality", shown, colours))
    return [plot for plot in [*plots, profile_plot("profile", result["profiles"])] if plot]


def _with_baseline_at_one(row: Row) -> Row:
    return row | {"speedup": {"p50": 1.0, "low": 1.0, "high": 1.0}} if row["is_baseline"] else row


def _html_table(workload: Workload) -> dict[str, Any]:
    """Return what the template needs of one workload: title, headings, and per row its names and cells or failure."""
    columns = _columns(workload.rows)
    rows = [
        {
            "engine": _engine(row),
            "weights": f"{row['weights']} {row['precision']}",
            "artifact": row["artifact"],
            "is_baseline": row["is_baseline"],
            "failure": _failure(row) if row["status"] != "ok" else "",
            "sparsity": percent(row["sparsity"]),
            "cells": [(column.heading, column.cell(row, workload.baseline)) for column in columns]
            if row["status"] == "ok"
            else [],
        }
        for row in workload.rows
    ]
    return {"title": workload.title, "headings": [column.heading for column in columns], "rows": rows}


def _csp_hash(script: str) -> str:
    """Return the hash by which the page's content security policy lets this script run, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# Rows in groups, numbers in words.


def _workloads(result: Result) -> list[Workload]:
    """Return the rows grouped by workload: decode before prefill, otherwise in the order measured."""
    groups: dict[tuple[str, int, int, int], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["phase"], row["batch"], row["prompt_len"], row["past_len"]), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != "decode")
    return [Workload(*key, rows=tuple(rows)) for key, rows in ordered]


def _main_workload(workloads: list[Workload]) -> Workload:
    return next((workload for workload in workloads if workload.phase == "decode"), workloads[0])


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(f"{_printable(row['artifact'])} in {_printable(row['engine'])}" for row in rows))


def _failure(row: Row) -> str:
    return f"failed: {_printable(row.get('reason') or 'no reason given')}"


def _printable(text: object) -> str:
    """Return text on one line, without control characters: they could drive a terminal or reorder the line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _without_nan(value: Any) -> Any:
    """Return the value with every number that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _times(ratio: float) -> str:
    return f"{ratio:,.2f}x" if ratio < 10 else f"{ratio:,.1f}x" if ratio < 1000 else f"{ratio:,.0f}x"


def _milliseconds(ms: float | None) -> str:
    if ms is None:
        return BLANK
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _decimal_bytes(size: float | None) -> str:
    if size is None:
        return BLANK
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:.0f} B"


def _binary_bytes(size: float | None) -> str:
    if size is None:
        return "unknown"
    return (
        f"{size / 2**30:.1f} GiB"
        if size >= 2**30
        else f"{size / 2**20:.4g} MiB"
        if size >= 2**20
        else f"{size / 2**10:.4g} KiB"
    )
