"""The report of a sweep: the bench's report over all cells, with the frontier in front.

In: a result of `frontier.merged`. Out: a folder with report.json, report.md and report.html, the frontier as a picture
(frontier.svg) and a spreadsheet (frontier.csv), and a table for the terminal. What the frontier is, and what it means
in words, is decided in `frontier`. The page of a result that was kept without it is made again by

    python -m owl_deploy.bench.frontier_report recipes/results/frontier-smollm2/report.json --out FOLDER
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_deploy.bench.comparison import Result, is_number, main_workload, printable, times, workloads_of
from owl_deploy.bench.frontier import Point, frontier, points, row_of, sentences
from owl_deploy.bench.plots import (
    BLANK,
    Plot,
    figure_axis,
    figure_layout,
    log_ticks,
    number,
    percent,
    plain_text,
    series_line,
)
from owl_deploy.bench.report import write_report
from owl_deploy.bench.report_file import read_report
from owl_deploy.files import write_bytes

__all__ = ["frontier_csv", "frontier_plot", "frontier_svg", "frontier_table", "print_frontier", "write_frontier_report"]

_CAPTION = (
    "Best is right and low (with speed-up) or left and low (with the other axes). The dashed line joins what no other "
    "artifact beats in both; marks on it carry their sparsity. The menu changes the axes."
)

_MARKERS = "osD^vP*Xh<>pd"


def write_frontier_report(result: Result, folder: Path) -> None:
    """Write all files of the report; each of them, and the folder, appears whole or not at all."""
    found = points(result)
    plot = frontier_plot(found)
    write_report(result, folder, lead=sentences(found) if found else None, plots=[plot] if plot else [])
    if found:
        write_bytes(folder / "frontier.svg", frontier_svg(found, main_workload(workloads_of(result)).title))
        write_bytes(folder / "frontier.csv", frontier_csv(found).encode())


_Axis = tuple[str, str, bool]
"""What a point has, its title, and whether it is logarithmic."""
_PERPLEXITY: _Axis = ("perplexity", "perplexity, lower is better", True)
_DIVERGENCE: _Axis = ("kl_divergence", "KL divergence from the dense model, nats", True)
_ACCURACY: _Axis = ("accuracy", "mean accuracy of the tasks, higher is better", False)
_VIEWS: tuple[tuple[str, _Axis, _Axis], ...] = (
    ("decode speed-up, perplexity", ("speedup", "decode, times as fast as the baseline", False), _PERPLEXITY),
    ("decode speed-up, KL", ("speedup", "decode, times as fast as the baseline", False), _DIVERGENCE),
    ("decode speed-up, accuracy", ("speedup", "decode, times as fast as the baseline", False), _ACCURACY),
    ("decode time, perplexity", ("decode_ms", "decode, milliseconds per token", False), _PERPLEXITY),
    ("prefill speed-up, perplexity", ("prefill_speedup", "prefill, times as fast as the baseline", False), _PERPLEXITY),
    ("prefill time, perplexity", ("prefill_ms", "prefill, milliseconds", False), _PERPLEXITY),
    ("memory, perplexity", ("peak_rss_bytes", "largest resident set, bytes", False), _PERPLEXITY),
    ("size on disk, perplexity", ("bytes_on_disk", "artifact on disk, bytes", False), _PERPLEXITY),
)


def frontier_plot(found: Sequence[Point]) -> Plot | None:
    """Return quality against speed, a mark per artifact, with a menu of other axes; None below two artifacts."""
    if len(found) < 2:
        return None
    best = frontier(found)
    groups = {name: [point for point in found if point.series == name] for name in dict.fromkeys(_series(found))}
    data = [_marks(name, group, best, place) for place, (name, group) in enumerate(groups.items())]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "frontier",
            "line": {"color": "#7b7f87", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        }
    )
    lists = [*groups.values(), best]
    shown = [view for view in _VIEWS if all(_known(found, axis[0]) for axis in view[1:])]
    for trace, group in zip(data, lists, strict=True):
        trace |= {"x": _values(group, shown[0][1][0]), "y": _values(group, shown[0][2][0])}
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"x": [_values(group, x[0]) for group in lists], "y": [_values(group, y[0]) for group in lists]},
                {"xaxis": _plotly_axis(found, x), "yaxis": _plotly_axis(found, y)},
            ],
        }
        for label, x, y in shown
    ]
    layout = figure_layout(
        height=430 + 20 * len(data),
        margin={"l": 56, "r": 16, "t": 52, "b": 48},
        xaxis=_plotly_axis(found, shown[0][1]),
        yaxis=_plotly_axis(found, shown[0][2]),
        updatemenus=[
            {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"}
        ],
    )
    said = "; ".join(
        f"{point.name} {point.speedup.p50:.2f} times at perplexity {number(point.perplexity)}" for point in best
    )
    return Plot(
        "frontier",
        "Frontier: quality against speed",
        _CAPTION,
        f"Perplexity against decode speed-up of {len(found)} artifacts. On the frontier: {said}.",
        {"data": data, "layout": layout},
    )


def _series(found: Sequence[Point]) -> list[str]:
    return [point.series for point in found]


def _marks(name: str, group: Sequence[Point], best: Sequence[Point], place: int) -> dict[str, Any]:
    return series_line(name, place) | {
        "mode": "markers+text",
        "text": [_label(point, best) for point in group],
        "textposition": "top center",
        "cliponaxis": False,
        "customdata": [
            [
                plain_text(printable(point.name)),
                percent(point.sparsity),
                f"{times(point.speedup.p50)} ({point.speedup.low:.2f}-{point.speedup.high:.2f})",
                number(point.decode_ms),
                number(point.perplexity),
                number(point.kl_divergence),
            ]
            for point in group
        ],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>%{customdata[1]} sparse<br>decode %{customdata[3]} ms, %{customdata[2]}<br>"
            "perplexity %{customdata[4]}, KL %{customdata[5]}<extra></extra>"
        ),
    }


def _label(point: Point, best: Sequence[Point]) -> str:
    """Return the sparsity of what is on the frontier: elsewhere marks lie too close for text."""
    return percent(point.sparsity, digits=0) if point in best and not point.is_dense else ""


def _values(group: Sequence[Point], key: str) -> list[float | None]:
    found = [point.speedup.p50 if key == "speedup" else getattr(point, key) for point in group]
    return [value if value is not None and math.isfinite(value) else None for value in found]


def _known(found: Sequence[Point], key: str) -> bool:
    return sum(value is not None for value in _values(found, key)) >= 2


def _plotly_axis(found: Sequence[Point], axis: _Axis) -> dict[str, Any]:
    key, title, is_log = axis
    values = [value for value in _values(found, key) if value is not None]
    if not is_log:
        return figure_axis(title, type="linear", range=[0, 1.12 * max(values)], fixedrange=True, tickvals=None)
    if min(values) < 1:  # KL divergences: plotly's own ticks
        low = math.log10(max(min(value for value in values if value > 0), 1e-6))
        return figure_axis(
            title, type="log", range=[low - 0.2, math.log10(max(values)) + 0.2], fixedrange=True, tickvals=None
        )
    ticks = log_ticks(values)
    return figure_axis(
        title,
        type="log",
        range=[math.log10(0.9 * ticks[0]), math.log10(1.2 * ticks[-1])],  # room for marks and their text
        tickvals=ticks,
        ticktext=[f"{tick:,}" for tick in ticks],
        fixedrange=True,
    )


def frontier_svg(found: Sequence[Point], workload: str) -> bytes:
    """Draw quality against decode speed-up, for papers: whiskers are 95 % intervals."""
    from owl_deploy.svg import COLOURS, INK, new_figure, svg_bytes

    best = frontier(found)
    with new_figure(7.2, 5.8) as figure:
        axes = figure.subplots()
        for place, name in enumerate(dict.fromkeys(_series(found))):
            group = [point for point in found if point.series == name]
            x = [point.speedup.p50 for point in group]
            whiskers = [[point.speedup.p50 - point.speedup.low for point in group]]
            whiskers.append([point.speedup.high - point.speedup.p50 for point in group])
            axes.errorbar(
                x,
                [point.perplexity for point in group],
                xerr=whiskers,
                label=printable(name),
                color=COLOURS[place % len(COLOURS)],
                marker=_MARKERS[place % len(_MARKERS)],
                linestyle="none",
                capsize=2,
            )
            for point in group:
                axes.annotate(
                    _label(point, best),
                    (point.speedup.p50, point.perplexity),
                    textcoords="offset points",
                    xytext=(0, 6),
                    ha="center",
                    fontsize=8,
                )
        axes.plot(
            [point.speedup.p50 for point in best],
            [point.perplexity for point in best],
            color=INK,
            linewidth=1,
            linestyle="--",
            label="frontier",
        )
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("speed-up over the baseline")
        axes.set_ylabel("perplexity")
        axes.set_title(workload)
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
        return svg_bytes(figure, f"Quality against speed: {workload}", " ".join(sentences(found)))


def frontier_csv(found: Sequence[Point]) -> str:
    """Return one line per artifact: speeds, sizes, quality, and whether it is on the frontier."""
    best = frontier(found)
    text = io.StringIO()
    rows = [row_of(point, point in best) for point in found]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def frontier_table(result: Result) -> Table:
    """Return the artifacts as a table that fits 100 columns, best perplexity first; failures stand below it."""
    found = points(result)
    best = frontier(found)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption_justify="left")
    table.add_column("artifact", overflow="fold", min_width=22)
    for heading in ("sparse", "decode\nms", "speed-up", "prefill\nms", "memory\nMB", "disk\nMB", "perplexity", "KL"):
        table.add_column(heading, justify="right")
    table.add_column("best")
    for point in sorted(found, key=lambda point: (point.perplexity, -point.speedup.p50)):
        cells = [
            printable(point.name).replace("/", "\n", 1),
            percent(point.sparsity, digits=0),
            number(point.decode_ms),
            "baseline"
            if point.is_baseline
            else f"{times(point.speedup.p50)}\n{point.speedup.low:.2f}-{point.speedup.high:.2f}",
            number(point.prefill_ms),
            _megabytes(point.peak_rss_bytes),
            _megabytes(point.bytes_on_disk),
            number(point.perplexity),
            number(point.kl_divergence) if is_number(point.kl_divergence) else BLANK,
            "yes" if point in best else "",
        ]
        table.add_row(*map(Text, cells))
    missing = _missing(result, {point.name for point in found})
    table.caption = Text("\n".join(f"{name}: {reason}" for name, reason in missing.items()))
    return table


def print_frontier(folder: Path) -> None:
    """Print the table and the sentences of a sweep's folder, and where the report is; stdout, 100 columns at most."""
    report = folder / "report"
    if not (report / "report.json").exists():
        Console().print(f"no cell is finished: {folder / 'results.json'} says why", markup=False, soft_wrap=True)
        return
    result = read_report(report)
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    console.print(frontier_table(result))
    for sentence in sentences(points(result)):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"Report: {report / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _missing(result: Result, shown: set[str]) -> Mapping[str, str]:
    """Return why artifacts have no point."""
    from owl_deploy.bench.comparison import void_reason

    reasons: dict[str, str] = {}
    for row in result["rows"]:
        if row["artifact"] not in shown:
            reason = row.get("reason") if row["status"] != "ok" else void_reason(row)
            reasons.setdefault(printable(row["artifact"]), printable(reason or "the baseline has no result"))
    return reasons


def _megabytes(size: int | None) -> str:
    return BLANK if size is None else f"{size / 1e6:,.0f}"


@click.command(help="Write all files of the report of a sweep's report.json.")
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
def main(report: Path, out: Path) -> None:
    """Make the pages anew."""
    write_frontier_report(read_report(report), out)
    click.echo(str(out / "report.html"))


if __name__ == "__main__":
    main()
