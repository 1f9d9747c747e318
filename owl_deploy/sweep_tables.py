"""The results of a sweep as tables, for reading and for spreadsheets.

In: the content of a results.json. Out: its rows by method and sparsity, as Markdown, as CSV, on stdout. How they came
about is not known here.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

FIGURES = ("perplexity", "kl_divergence", "top1_agreement")
_MARK = "†"

__all__ = ["FIGURES", "as_csv", "as_markdown", "print_sweep"]


def _table_rows(
    document: dict[str, Any],
) -> tuple[list[float], dict[tuple[str, str, str], dict[float, dict[str, Any]]]]:
    """Arrange the rows of a result as a table.

    Args:
        document: content of results.json.

    Returns:
        The columns, sparsities in ascending order; and by (method, allocation, other settings) the row of each.
    """
    rows: dict[tuple[str, str, str], dict[float, dict[str, Any]]] = {}
    for row in document["rows"]:
        others = ", ".join(f"{key} {value}" for key, value in row.get("settings", {}).items())
        rows.setdefault((row["method"], row["allocation"], others), {})[row["sparsity"]] = row
    return sorted({row["sparsity"] for row in document["rows"]}), rows


def _lowest(document: dict[str, Any], index: int) -> dict[float, float]:
    """Return the lowest perplexity of every sparsity that has one, on the text of that index."""
    best: dict[float, float] = {}
    for row in document["rows"]:
        if row["status"] == "ok":
            value = row["evaluations"][index]["perplexity"]
            best[row["sparsity"]] = min(value, best.get(row["sparsity"], math.inf))
    return best


def _perplexity_text(value: float) -> str:
    """Return a perplexity as tables show it: two decimals up to a thousand, four digits or so above."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def as_markdown(document: dict[str, Any]) -> str:
    """Return the tables: one per evaluation text, with all that its numbers depend on."""
    rows = document["rows"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "pending")}
    missing = "".join(f", {counts[status]} {status}" for status in ("failed", "pending") if counts[status])
    lines = [
        f"# Pruned checkpoints of {document['model']}",
        "",
        f"Made by `{document['command']}`: {counts['ok']} of {len(rows)} cells measured{missing}.",
        "",
        "Perplexity by sparsity of the linears, and in brackets the KL divergence from the dense model in nats. Lower "
        "is better; the lowest perplexity of each column is bold.",
        "",
    ]
    for facts in document["calibration"]:
        lines.append(
            f"- Calibration: {facts['source']}, {facts['n_samples']} sequences of {facts['seq_len']} tokens, "
            f"seed {facts['seed']}, tokens {facts['tokens_sha256'][:16]}"
        )
    lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()))
    for index, text in enumerate(document["texts"]):
        lines += ["", *_text_table(document, index, text)]
    failed = [f"- {row['name']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    notes = [f"- {row['name']}: {note}" for row in rows for note in row.get("notes", ())]
    for title, sentences in (("Failed", failed), ("Notes", notes)):
        if sentences:
            lines += ["", f"## {title}", "", *sentences]
    return "\n".join(lines) + "\n"


def _text_table(document: dict[str, Any], index: int, text: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one table."""
    sparsities, rows = _table_rows(document)
    best = _lowest(document, index)
    heads = ["method", "allocation", *(["settings"] if any(others for _, _, others in rows) else [])]
    dense = _perplexity_text(document["dense"]["evaluations"][index]["perplexity"])
    bos = "starts with BOS" if text["starts_with_bos"] else "no BOS"
    yield f"## {text['text']}"
    yield ""
    yield f"{text['n_windows']} windows of {text['window']} tokens, {bos}, tokens {text['tokens_sha256'][:16]}."
    yield ""
    yield _table_line([*heads, *map(str, sparsities)])
    yield _table_line([*["---"] * len(heads), *["---:"] * len(sparsities)])
    yield _table_line(["dense", *[""] * (len(heads) - 1), *[dense] * len(sparsities)])
    for names, by_sparsity in rows.items():
        values = [_markdown_value(by_sparsity.get(sparsity), index, best.get(sparsity)) for sparsity in sparsities]
        yield _table_line([*names[: len(heads)], *values])
    editions = dict.fromkeys(
        row["evaluations"][index]["tokens_sha256"][:16]
        for row in document["rows"]
        if _is_of_another_edition(row, index)
    )
    if editions:
        yield ""
        yield f"{_MARK} with another edition of the text, which comes with Python: tokens {', '.join(editions)}."


def _is_of_another_edition(row: dict[str, Any], index: int) -> bool:
    return row["status"] == "ok" and "tokens_sha256" in row["evaluations"][index]


def _table_line(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def _markdown_value(row: dict[str, Any] | None, index: int, best: float | None) -> str:
    if row is None or row["status"] != "ok":
        return "" if row is None else row["status"]
    found = row["evaluations"][index]
    shown = _perplexity_text(found["perplexity"]) + (_MARK if _is_of_another_edition(row, index) else "")
    return f"{f'**{shown}**' if found['perplexity'] == best else shown} ({found['kl_divergence']:.3f})"


def as_csv(document: dict[str, Any]) -> str:
    """Return one line per cell and text, the dense model first."""
    columns = ["name", "method", "allocation", "sparsity", "settings", "status", "realised", "text", "window"]
    columns += ["n_windows", "tokens_sha256", *FIGURES, "prune_seconds", "peak_rss_bytes", "mask_sha256"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    dense = {"name": "dense", "method": "dense", "sparsity": 0.0, "status": "ok", **document["dense"]}
    for row in [dense, *document["rows"]]:
        for index, text in enumerate(document["texts"]):
            figures = row["evaluations"][index] if row["status"] == "ok" else {}
            values = {**row, **text, **{key: figures[key] for key in (*FIGURES, "tokens_sha256") if key in figures}}
            values["settings"] = ", ".join(f"{key} {value}" for key, value in row.get("settings", {}).items())
            values["realised"] = row["realised"]["linears"] if "realised" in row else ""
            values["prune_seconds"] = row.get("seconds", {}).get("prune", "")
            writer.writerow({key: values[key] for key in columns if key in values})
    return buffer.getvalue()


def print_sweep(document: dict[str, Any], folder: Path) -> None:
    """Print a table of perplexities per evaluation text, and where all the figures are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    sparsities, rows = _table_rows(document)
    has_settings = any(others for _, _, others in rows)
    for index, text in enumerate(document["texts"]):
        best = _lowest(document, index)
        title = f"perplexity on {text['text']}, {text['n_windows']} windows of {text['window']} tokens"
        table = Table(title=Text(title))
        for name in ("method", "allocation", *(["settings"] if has_settings else [])):
            table.add_column(name, overflow="fold")
        for sparsity in sparsities:
            table.add_column(str(sparsity), justify="right", no_wrap=True)
        dense = _perplexity_text(document["dense"]["evaluations"][index]["perplexity"])
        table.add_row("dense", *[""] * (1 + has_settings), *[dense] * len(sparsities))
        for names, by_sparsity in rows.items():
            values = []
            for row in map(by_sparsity.get, sparsities):
                if row is None or row["status"] != "ok":
                    values.append(Text("" if row is None else row["status"]))
                    continue
                value = row["evaluations"][index]["perplexity"]
                values.append(Text(_perplexity_text(value), "bold" if value == best[row["sparsity"]] else ""))
            table.add_row(*map(Text, names[: 2 + has_settings]), *values)
        console.print(table)
    for row in document["rows"]:
        if row["status"] == "failed":
            click.echo(f"Failed: {row['name']}: {row['reason']}")
    click.echo(f"Results: {folder / 'results.md'}, with KL divergences; results.csv, results.json")
