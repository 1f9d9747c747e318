"""A comparison of two reports in words: a table for the terminal or for Markdown, and the sentences below it.

Names and reasons come from files that others may have written: they are printed without control characters.
"""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.comparison import printable, times
from owl_deploy.bench.plots import BLANK, number, percent
from owl_deploy.bench.regression import ReportComparison, RowPair
from owl_deploy.bench.statistics import summary_ms

__all__ = ["comparison_verdict", "print_comparison"]

_WIDTH = 100
# Intervals that hold a slow-down by more than this are wide for a gate.
_WIDE = 1.05
_MARKDOWN_ACTS_ON = "\\`*_[]<>|&"


def comparison_verdict(comparison: ReportComparison) -> str:
    """Return the outcome in one sentence: what regressed, or how much noise could still hide."""
    bar = f"beyond noise and a tolerance of {percent(comparison.tolerance)}"
    regressions = comparison.regressions
    if not regressions:
        return f"No regression: nothing is shown to be slower in B {bar}{_hidden(comparison)}."
    slower = [(pair.speedup.p50, pair) for pair in regressions if pair.speedup is not None]
    lost = [pair for pair in regressions if pair.speedup is None]
    clauses = []
    if slower:
        p50, worst = min(slower, key=lambda item: item[0])
        rows = f"{len(slower)} of {len(comparison.pairs)} row{'s' * (len(comparison.pairs) != 1)}"
        clauses.append(f"{rows} slower in B {bar}, most of all {_name(worst)}: {times(1 / p50)} slower")
    if lost:
        clauses.append(f"{', '.join(f'{_name(pair)} {pair.outcome}' for pair in lost)} in B and not in A")
    return f"Regression: {'; '.join(clauses)}."


def _hidden(comparison: ReportComparison) -> str:
    """Say what slow-down the widest interval still holds."""
    low, widest = min(((pair.speedup.low, pair) for pair in comparison.pairs if pair.speedup), key=lambda item: item[0])
    if low >= 1.0:
        return ""
    advice = ", which more --rounds narrow down" if 1 / low > _WIDE else ""
    return f"; up to {times(1 / low)} slower is possible ({_name(widest)}){advice}"


def print_comparison(comparison: ReportComparison, *, as_markdown: bool = False) -> None:
    """Print the table, what it means, the warnings and the verdict on stdout; at most 100 columns wide."""
    table = _table(comparison, as_markdown=as_markdown)
    n_compared = sum(pair.speedup is not None for pair in comparison.pairs)
    together = f"All {n_compared} intervals together hold" if n_compared > 1 else "Its interval holds"
    below = [
        *(f"({k}) {reason}" for k, reason in enumerate(_reasons(comparison), start=1)),
        f"Speed-up of B over A: above 1 is faster. {together} the truth at {percent(comparison.confidence)}, as far as "
        "rounds within a run show the noise between runs.",
        *(f"Warning: {warning}" for warning in comparison.warnings),
    ]
    if as_markdown:
        console = Console(width=10_000, highlight=False)
        with console.capture() as captured:
            console.print(table)
        lines = [line for line in captured.get().splitlines() if line.strip()]
        sentences = [f"- {_escaped(sentence)}" for sentence in below]
        print("\n".join([*lines, "", *sentences, "", f"**{_escaped(comparison_verdict(comparison))}**"]))
        return
    console = Console(width=min(_WIDTH, Console().width) if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    for sentence in (*below, comparison_verdict(comparison)):
        console.print(printable(sentence), markup=False, highlight=False)


def _table(comparison: ReportComparison, *, as_markdown: bool) -> Table:
    table = Table(
        box=box.MARKDOWN if as_markdown else box.SIMPLE_HEAD, show_edge=as_markdown, padding=0, pad_edge=False
    )
    if as_markdown:
        table.padding = (0, 1)
    for heading in ("artifact", "workload"):
        table.add_column(heading, overflow="fold")
    for heading in ("A ms", "B ms", "speed-up", "perplexity"):
        table.add_column(heading, justify="right")
    table.add_column("outcome", overflow="fold")
    reasons = _reasons(comparison)
    last = None
    for pair in comparison.pairs:
        if last not in (None, pair.workload) and not as_markdown:
            table.add_section()
        last = pair.workload
        cells = _cells(pair, reasons)
        table.add_row(*(Text(_escaped(cell.replace("\n", " ")) if as_markdown else cell) for cell in cells))
    return table


def _cells(pair: RowPair, reasons: list[str]) -> tuple[str, ...]:
    row, load = pair.b, pair.workload
    lengths = {"prefill": f"len {load.prompt_len}", "generate": f"{load.prompt_len}x{load.n_new}"}
    length = lengths.get(load.phase, f"past {load.past_len}")
    batch = f"\nbatch {load.batch}" if load.batch != 1 else ""
    ms = (
        number(summary_ms(side["samples_ns"])["p50"]) if side["status"] == "ok" else BLANK for side in (pair.a, pair.b)
    )
    ratio = BLANK
    if pair.speedup is not None:
        ratio = f"{times(pair.speedup.p50)}\n{pair.speedup.low:.3f}-{pair.speedup.high:.3f}"
    perplexity = dict.fromkeys(number(side.get("perplexity")) for side in (pair.a, pair.b))
    shown = pair.outcome if not pair.reason else f"{pair.outcome} ({reasons.index(pair.reason) + 1})"
    return (
        f"{printable(row['artifact'])}\n{printable(row['engine'])} {printable(row['precision'])}",
        f"{printable(load.phase)}\n{length}{batch}",
        *ms,
        ratio,
        "\n".join(perplexity),
        shown.upper() if pair.is_regression else shown,
    )


def _reasons(comparison: ReportComparison) -> list[str]:
    return list(dict.fromkeys(pair.reason for pair in comparison.pairs if pair.reason))


def _name(pair: RowPair) -> str:
    title = pair.workload.title
    return f"{pair.b['artifact']} in {pair.b['engine']} ({title[:1].lower()}{title[1:]})"


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in _MARKDOWN_ACTS_ON else letter for letter in printable(text))
