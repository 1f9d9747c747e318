"""The report of a load test: the result in, report.json, report.md, report.html and a terminal table out.

It has the form and the page of the latency report. Nothing here measures or decides.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.comparison import Result, printable
from owl_deploy.bench.machine import IDLE_LOAD, LITTLE_STEAL
from owl_deploy.bench.plots import BLANK, Row, number, percent
from owl_deploy.bench.report import (
    Facts,
    code_block,
    csp_hash,
    evaluations,
    machine_lines,
    markdown_facts,
    markdown_line,
    markdown_list,
    markdown_text,
    origin_facts,
    without_nan,
)
from owl_deploy.files import new_folder, write_json

__all__ = ["load_table", "write_load_report"]

_DEFINITIONS: Facts = [
    ("TTFT", "From sending a request to the first text of its answer, in milliseconds: queue, prompt and network."),
    ("ITL", "Gaps between successive events of an answer, the first text excluded, in milliseconds."),
    ("p50, p95", "Percentiles over all samples of all turns."),
    ("tokens/s", "New tokens of all clients together that arrived within the turns, over the turns' seconds."),
    ("x one client", "Tokens/s over those of one client of the same artifact."),
    ("perplexity", "Of that very artifact, in its engine, on the text that Protocol names."),
    ("requests each", "Fewest and most requests that one client got answered: how fairly the queue served them."),
    ("errors", "Requests that were refused, cut or answered with an error; 0 is what is expected."),
    ("memory, growth", "Resident set of the server at the end, and the slope of a line through all samples."),
]

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens/s", lambda row: number(row["tokens_per_s"])),
    ("x one client", lambda row: f"{row['times_one_client']:.2f}x" if row["times_one_client"] else BLANK),
    ("TTFT p50", lambda row: _quantile(row["ttft_ms"], "p50")),
    ("TTFT p95", lambda row: _quantile(row["ttft_ms"], "p95")),
    ("ITL p50", lambda row: _quantile(row["itl_ms"], "p50")),
    ("ITL p95", lambda row: _quantile(row["itl_ms"], "p95")),
    ("perplexity", lambda row: _perplexity(row)),
    ("requests", lambda row: str(row["requests"])),
    ("requests each", lambda row: f"{row['requests_per_client']['min']}-{row['requests_per_client']['max']}"),
    ("errors", lambda row: str(row["errors"])),
    ("memory", lambda row: f"{row['rss']['last_bytes'] / 2**20:.0f} MiB" if row["rss"] else "unknown"),
    ("growth", lambda row: f"{row['rss']['bytes_per_minute'] / 2**20:+.1f} MiB/min" if row["rss"] else "unknown"),
)


def write_load_report(result: Result, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`, all or none; a folder already there is replaced."""
    known: Result = without_nan(result)
    with new_folder(folder, replace=True) as temporary:
        write_json(temporary / "report.json", known)
        (temporary / "report.md").write_text(_markdown(known), encoding="utf-8")
        (temporary / "report.html").write_text(_html(known), encoding="utf-8")


def load_table(result: Result) -> Table:
    """Return all rows as a table that fits 120 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("artifact", overflow="fold")
    for heading in ("clients", *(heading for heading, _ in _COLUMNS)):
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for row in result["rows"]:
        cells = [row["artifact"], str(row["clients"]), *(cell(row) for _, cell in _COLUMNS)]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _quantile(quantiles: dict[str, float] | None, name: str) -> str:
    return number(quantiles[name]) if quantiles else BLANK


def _perplexity(row: Row) -> str:
    return "unknown" if row["perplexity"] is None else number(row["perplexity"])


def _clients(row: Row) -> str:
    return f"{row['clients']} client{'s' if row['clients'] != 1 else ''}"


def _findings(result: Result) -> list[str]:
    """Return one sentence per row."""
    return [
        f"{_clients(row).capitalize()}, {row['artifact']}: {number(row['tokens_per_s'])} tokens/s, first text after "
        f"{_quantile(row['ttft_ms'], 'p50')} ms, then one every {_quantile(row['itl_ms'], 'p50')} ms (medians), "
        f"perplexity {_perplexity(row)}."
        for row in result["rows"]
    ]


def _verdict(result: Result) -> str:
    n_requests = sum(row["requests"] for row in result["rows"])
    n_errors = sum(row["errors"] for row in result["rows"])
    return f"{n_requests} requests answered, {n_errors} errors."


def _cautions(result: Result) -> list[str]:
    machine = result["machine"]
    cautions = ["Clients and server share the processor: what clients cost is in the figures."]
    if machine["load_before"] > IDLE_LOAD:
        cautions.append(f"The machine was not idle: its load average was {machine['load_before']:.2f} before.")
    if (machine.get("steal_fraction") or 0) > LITTLE_STEAL:
        cautions.append(f"The hypervisor took {percent(machine['steal_fraction'])} of the processor's time.")
    examples = [example for row in result["rows"] for example in row["error_examples"]]
    return [*cautions, *(f"A request failed: {example}" for example in examples[:5])]


def _protocol(result: Result) -> Facts:
    protocol = result["protocol"]
    order = "servers take turns (A-B-A-B)" if protocol["is_interleaved"] else "one server"
    return [
        ("clients", "each asks, reads its stream to the end, and asks again"),
        ("time per row", f"{protocol['duration_s']:g} s in {protocol['n_turns']} turns, {order}"),
        ("warm-up", f"{protocol['warmup_s']:g} s of {max(protocol['clients'])} clients"),
        ("requests", f"{protocol['prompt_words']} words, at most {protocol['max_tokens']} tokens, temperature 0"),
        ("perplexity", "; ".join(evaluations(result["rows"])) or "not measured"),
        ("server", "; ".join(dict.fromkeys(_server_words(row) for row in result["rows"]))),
    ]


def _server_words(row: Row) -> str:
    return f"{row['threads']} threads, {row['batch']} sequences together" if row["threads"] else "settings unknown"


def _groups(result: Result) -> list[tuple[str, list[Row]]]:
    """Return the rows by number of clients, with a heading."""
    groups: dict[int, list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault(row["clients"], []).append(row)
    return [(f"Serve, {_clients(rows[0])}", rows) for rows in groups.values()]


def _markdown(result: Result) -> str:
    parts = [
        "# Load report",
        f"**{markdown_text(_verdict(result))}**",
        *[markdown_text(sentence) for sentence in _findings(result)],
        *markdown_list("What weakens these figures", _cautions(result)),
    ]
    headings = ["engine", "weights", "artifact", *(heading for heading, _ in _COLUMNS)]
    for title, rows in _groups(result):
        lines = [markdown_line(headings), "|" + " --- |" * 3 + " ---: |" * len(_COLUMNS)]
        for row in rows:
            names = [row["engine"], f"{row['weights']} {row['precision']}", row["artifact"]]
            lines.append(markdown_line([*names, *(cell(row) for _, cell in _COLUMNS)]))
        parts += [f"## {title}", "\n".join(lines)]
    for heading, facts in _fact_lists(result):
        parts += markdown_facts(heading, facts)
    return "\n\n".join([*parts, "Command:", code_block(result["command"])]) + "\n"


def _fact_lists(result: Result) -> list[tuple[str, Facts]]:
    return [
        ("Protocol", _protocol(result)),
        ("Machine", machine_lines(result["machine"])),
        ("Origin", origin_facts(result)),
        ("Definitions", _DEFINITIONS),
    ]


def _html(result: Result) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_hash"] = csp_hash
    template = environment.from_string((files("owl_deploy.bench") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        verdict=_verdict(result),
        findings=_findings(result),
        cautions=_cautions(result),
        plots=[],
        tables=[_html_table(title, rows) for title, rows in _groups(result)],
        fact_lists=_fact_lists(result),
        how_to_read="All times in milliseconds.",
        notes=[],
        command=result["command"],
        recipe="",
        created=result["created"],
        cpu=result["machine"]["cpu"],
        plotly="",
    )


def _html_table(title: str, rows: list[Row]) -> dict[str, Any]:
    return {
        "title": title,
        "headings": [heading for heading, _ in _COLUMNS],
        "rows": [
            {
                "engine": row["engine"],
                "weights": f"{row['weights']} {row['precision']}",
                "artifact": row["artifact"],
                "is_baseline": False,
                "failure": "",
                "sparsity": percent(row["sparsity"]),
                "cells": [(heading, cell(row)) for heading, cell in _COLUMNS],
            }
            for row in rows
        ],
    }
