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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.comparison import (
    Result,
    Workload,
    has_speedup,
    is_comparable,
    is_number,
    main_workload,
    printable,
    times,
    void_reason,
    workloads_of,
)
from owl_deploy.bench.plots import (
    BLANK,
    Plot,
    Row,
    latency_plot,
    number,
    percent,
    profile_plot,
    quality_plot,
    series_name,
    speedup_plot,
)
from owl_deploy.bench.report_csv import report_csv
from owl_deploy.bench.verdict import cautions, findings, verdict
from owl_deploy.engines.bridge import LICENCE_NOTICE
from owl_deploy.files import new_folder, write_json

__all__ = ["evaluations", "html_page", "machine_lines", "markdown", "terminal_table", "write_report"]

Facts: TypeAlias = list[tuple[str, str]]


DEFINITIONS: Facts = [
    ("decode", "One step with a filled KV cache: one new token per sequence of the batch."),
    ("prefill", "The whole prompt at once, from an empty KV cache, up to the logits of its last token."),
    (
        "generate",
        "A prompt answered greedily with a fixed number of tokens, from the request to the last one; speed-up and "
        "tokens/s (new tokens) are those of this whole time.",
    ),
    ("TTFT", "Time to first token: from the request, in the engine, to the first new token."),
    ("ITL", "Inter-token latency: the gaps between successive new tokens, the first token's time left out."),
    ("TPOT", "Time per output token: (whole time - TTFT) / (new tokens - 1), one number per answer; the median."),
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
    ("accuracy", "Mean over the tasks of the recipe; each of them is in report.json."),
    ("memory", "Largest resident set of the engine's process."),
    ("load", "From opening the artifact to ready for the first token."),
    ("sparsity", "Zeros over elements of the pruned matrices."),
]

HOW_TO_READ = "In brackets: the 95 % interval of the speed-up, and the change of perplexity against the baseline."


def write_report(
    result: Result, folder: Path, *, lead: Sequence[str] | None = None, plots: Sequence[Plot] = ()
) -> None:
    """Write report.json, .md, .html and .csv into `folder`, all or none; a folder already there is replaced.

    A number that is not finite becomes null: JSON has no other word for "unknown".

    Args:
        result: what was measured.
        folder: to write.
        lead: sentences in place of the verdict and the findings.
        plots: to be shown before the others.
    """
    known: Result = without_nan(result)
    with new_folder(folder, replace=True) as temporary:
        write_json(temporary / "report.json", known)
        (temporary / "report.md").write_text(markdown(known, lead=lead), encoding="utf-8")
        (temporary / "report.csv").write_text(report_csv(known), encoding="utf-8")
        (temporary / "report.html").write_text(html_page(known, lead=lead, plots=plots), encoding="utf-8")


# The cells: what a row says in each column, the same words on every page.


@dataclass(frozen=True)
class Column:
    """A column of the full table: heading, and the text of a row's cell given the baseline's row of that workload."""

    heading: str
    cell: Callable[[Row, Row | None], str]


def _generation_cell(metric: str, figure: str) -> Callable[[Row, Row | None], str]:
    return lambda row, _: number(row["generation"][metric][figure]) if row.get("generation") else BLANK


_GENERATION_COLUMNS = [
    Column("TTFT ms", _generation_cell("ttft_ms", "p50")),
    Column("ITL p50 ms", _generation_cell("itl_ms", "p50")),
    Column("ITL p90 ms", _generation_cell("itl_ms", "p90")),
    Column("TPOT ms", _generation_cell("tpot_ms", "p50")),
]


def _columns(rows: Iterable[Row]) -> list[Column]:
    """Return the columns that have something to say about these rows."""
    rows = list(rows)
    has_p99 = any("p99" in (row["ms"] or {}) for row in rows)
    has_tasks = any(is_number(row.get("accuracy")) for row in rows)
    columns = [
        Column("sparsity", lambda row, _: percent(row["sparsity"])),
        Column("p50 ms", lambda row, _: number(row["ms"]["p50"])),
        Column("p90 ms", lambda row, _: number(row["ms"]["p90"])),
        *([Column("p99 ms", lambda row, _: number(row["ms"].get("p99")))] if has_p99 else []),
        Column("tokens/s", lambda row, _: number(row["tokens_per_s"])),
        Column("speed-up", _speedup_cell),
        *(_GENERATION_COLUMNS if any(row.get("generation") for row in rows) else []),
        Column("bytes/step", lambda row, _: _decimal_bytes(row.get("bytes_per_step"))),
        Column("of ceiling", lambda row, _: percent(row.get("ceiling_fraction"), digits=0)),
        Column("perplexity", _perplexity_cell),
        Column("KL", lambda row, _: number(row.get("kl_divergence"))),
        Column("top-1", lambda row, _: percent(row.get("top1_agreement"))),
        *([Column("accuracy", lambda row, _: percent(row.get("accuracy")))] if has_tasks else []),
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
    return f"{times(row['speedup']['p50'])} ({_interval(row)})" + (" no difference" if _shows_nothing(row) else "")


def _perplexity_cell(row: Row, baseline: Row | None) -> str:
    mine = row.get("perplexity")
    if not is_number(mine):
        return "unknown"
    if row["is_baseline"] or baseline is None or not is_number(baseline["perplexity"]):
        return number(mine)
    if not is_comparable(row, baseline):
        return f"{number(mine)} (other text)"
    ratio = mine / baseline["perplexity"]
    return f"{number(mine)} ({times(ratio)})" if ratio >= 2.0 else f"{number(mine)} ({100 * (ratio - 1):+.1f} %)"


def _interval(row: Row) -> str:
    return f"{row['speedup']['low']:.2f}-{row['speedup']['high']:.2f}"


def _shows_nothing(row: Row) -> bool:
    return bool(row["speedup"]["low"] <= 1.0 <= row["speedup"]["high"])


# The facts around the figures.


def machine_lines(machine: dict[str, Any]) -> Facts:
    """Return the facts of a machine as pairs of a term and its value, in words."""
    caches = ", ".join(f"{printable(name)} {_binary_bytes(size)}" for name, size in machine["caches"].items())
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
    samples, cold = (
        ", ".join(f"{n} of {phase}" for phase, n in protocol[key].items())
        for key in ("samples_per_round", "cold_calls_per_round")
    )
    order = "engines take turns (A-B-A-B)" if protocol["interleaved"] else "engines one after the other"
    return [
        ("baseline", result["baseline"]),
        ("rounds", f"{protocol['n_rounds']}, {order}"),
        ("samples per round", samples),
        ("calls before them, not counted", cold),
        ("warm-up", protocol["warmup"]),
        ("outside the clock", protocol["outside_clock"]),
        ("bytes per step", protocol["bytes_per_step"]),
        ("quality measured on", "; ".join(evaluations(result["rows"])) or "unknown"),
    ]


def origin_facts(result: Result) -> Facts:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [("made", result["created"]), ("commit", result.get("commit") or "unknown"), ("versions", versions)]


def evaluations(rows: Iterable[Row]) -> list[str]:
    """Return the distinct settings under which perplexity was measured, in words."""
    settings = [row["evaluation"] for row in rows if row.get("evaluation")]
    return list(dict.fromkeys(f"{s['text']}, {s['n_windows']} windows of {s['window']} tokens" for s in settings))


def _notes(result: Result) -> list[str]:
    """Return the rows' notes, each once per engine and artifact, and the licence note if DeepSparse was run."""
    rows = result["rows"]
    said = [(row, note) for row in rows for note in row.get("notes") or [] if note != LICENCE_NOTICE]
    notes = [f"{row['engine']}, {row['artifact']}: {note}" for row, note in said]
    return list(dict.fromkeys([*notes, *_licence_notes(result)]))


def _licence_notes(result: Result) -> list[str]:
    return [LICENCE_NOTICE] if any(row["engine"] == "deepsparse" for row in result["rows"]) else []


def _engine(row: Row) -> str:
    """Return the engine's name, with the limit of its licence where it has one."""
    return f"{row['engine']} (evaluation only)" if row["engine"] == "deepsparse" else str(row["engine"])


# Markdown.


def markdown(result: Result, *, lead: Sequence[str] | None = None) -> str:
    """Return the report as GitHub-flavoured Markdown, one table per workload."""
    first, *others = lead or [verdict(result), *findings(result)]
    parts = [
        "# Latency report",
        f"**{markdown_text(first)}**",
        *[markdown_text(sentence) for sentence in others],
        *markdown_list("What weakens these figures", cautions(result)),
        HOW_TO_READ,
        *[part for workload in workloads_of(result) for part in _markdown_workload(workload)],
        *markdown_facts("Machine", machine_lines(result["machine"])),
        *markdown_facts("Protocol", _protocol_facts(result)),
        *markdown_facts("Definitions", DEFINITIONS),
        *markdown_list("Notes", _notes(result)),
        *markdown_facts("Origin", origin_facts(result)),
        "Command:",
        code_block(result["command"]),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_workload(workload: Workload) -> list[str]:
    columns = _columns(workload.rows)
    head = ["engine", "weights", "artifact", *(column.heading for column in columns)]
    lines = [markdown_line(head), "|" + " --- |" * 3 + " ---: |" * len(columns)]
    for row in workload.rows:
        cells = [_engine(row), f"{row['weights']} {row['precision']}", row["artifact"]]
        if row["status"] == "ok":
            cells += [column.cell(row, workload.baseline) for column in columns]
        else:
            cells += [percent(row["sparsity"]), _failure(row), *[""] * (len(columns) - 2)]
        lines.append(markdown_line(cells))
    return [f"## {workload.title}", "\n".join(lines)]


def markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def markdown_facts(heading: str, facts: Facts) -> list[str]:
    return [f"## {heading}", "\n".join(f"- {markdown_text(term)}: {markdown_text(value)}" for term, value in facts)]


def markdown_list(heading: str, sentences: list[str]) -> list[str]:
    return [f"## {heading}", "\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)] if sentences else []


def markdown_text(text: str) -> str:
    """Return text on one line with what Markdown and HTML would act on escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|&" else letter for letter in printable(text))


def code_block(text: str) -> str:
    return "    " + printable(text)


# Terminal.


def terminal_table(result: Result) -> Table:
    """Return all rows as a table that fits 100 columns; reasons of failures stand below it, by number."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption_justify="left")
    for heading in ("engine", "weights", "phase"):
        table.add_column(heading, overflow="fold")
    for heading in ("sparsity", "ms p50", "tokens\n/s", "speed-up", "of\nceiling", "perplexity", "KL"):
        table.add_column(heading, justify="right")
    failures = list(dict.fromkeys(_failure(row) for row in result["rows"] if row["status"] != "ok"))
    for workload in workloads_of(result):
        for row in workload.rows:
            table.add_row(*(Text(cell) for cell in _terminal_cells(workload, row, failures)))
        table.add_section()
    below = [f"({position}) {reason}" for position, reason in enumerate(failures, start=1)]
    table.caption = Text("\n".join([*below, *_licence_notes(result)]))
    return table


def _terminal_cells(workload: Workload, row: Row, failures: list[str]) -> list[str]:
    """Return the cells of one row; a failed one names its reason by its place in `failures`."""
    lengths = {"prefill": f"len {workload.prompt_len}", "generate": f"{workload.prompt_len}x{workload.n_new}"}
    length = lengths.get(workload.phase, f"past {workload.past_len}")
    batch = f"\nbatch {workload.batch}" if workload.batch > 1 else ""
    cells = [
        f"{printable(row['engine'])}\n{printable(row['artifact'])}",
        f"{_short(printable(row['weights']))}\n{printable(row['precision'])}",
        f"{workload.phase}\n{length}{batch}",
        percent(row["sparsity"]),
    ]
    if row["status"] != "ok":
        return [*cells, "failed", f"({failures.index(_failure(row)) + 1})", "", "", "", ""]
    # The interval below the ratio, "same?" for no difference: this keeps the column at ten characters.
    cell = _speedup_cell(row, workload.baseline).replace("no difference", "same?")
    speedup = "\n".join(cell.replace("(", "").replace(")", "").split())
    return [
        *cells,
        number(row["ms"]["p50"]),
        number(row["tokens_per_s"]),
        speedup,
        percent(row.get("ceiling_fraction"), digits=0),
        number(row.get("perplexity")),
        number(row.get("kl_divergence")),
    ]


def _short(weights: str) -> str:
    """Return a weight encoding in the twelve characters that a hundred columns leave for it."""
    return weights.replace("initializer", "init.").replace("operator", "op.")


# HTML.


def html_page(result: Result, *, lead: Sequence[str] | None = None, plots: Sequence[Plot] = ()) -> str:
    """Return the report as one HTML page that loads nothing: plotly.js and all figures are inside."""
    first, *others = lead or [verdict(result), *findings(result)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_hash"] = csp_hash
    template = environment.from_string((files("owl_deploy.bench") / "page.html.j2").read_text(encoding="utf-8"))
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return template.render(
        verdict=first,
        findings=others,
        cautions=cautions(result),
        # What is to be shown first may say the same of quality, and more.
        plots=[*plots, *(plot for plot in _plots(result) if not plots or plot.name != "quality")],
        tables=[_html_table(workload) for workload in workloads_of(result)],
        fact_lists=[
            ("Protocol", _protocol_facts(result)),
            ("Machine", machine_lines(result["machine"])),
            ("Origin", origin_facts(result)),
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
    workloads = workloads_of(result)
    colours = {name: number for number, name in enumerate(dict.fromkeys(series_name(row) for row in result["rows"]))}
    plots: list[Plot | None] = []
    for k, workload in enumerate(workloads):
        shown = [_with_baseline_at_one(row) for row in workload.rows if has_speedup(row, workload.baseline)]
        plots.append(latency_plot(f"latency-{k}", f"{workload.title}: latency", workload.rows, colours))
        plots.append(speedup_plot(f"speedup-{k}", f"{workload.title}: speed-up", shown, colours))
        if workload is main_workload(workloads):
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


def csp_hash(script: str) -> str:
    """Return the hash by which the page's content security policy lets this script run, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# Numbers in words.


def _failure(row: Row) -> str:
    return f"failed: {printable(row.get('reason') or 'no reason given')}"


def without_nan(value: Any) -> Any:
    """Return the value with every number that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
