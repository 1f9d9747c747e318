"""Plots of a bench result as plain plotly.js figures: rows and profiles in, JSON-ready dicts out.

Colours of text, grid and background are left to the page's style sheet, which knows whether it is light, dark or on
paper; the series colours below were chosen to stand out on both. This module writes no HTML, and treats every name
in a result as hostile text.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Figure: TypeAlias = dict[str, Any]

# Each has at least 3:1 contrast on the page's light and dark panels; the symbols tell series apart without colour.
PALETTE = ("#2f78d0", "#c8602a", "#23906a", "#a95bc6", "#c4485f", "#8a7a1f", "#2a8a9c", "#7b7f87")
_SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"),
    *("triangle-down", "bowtie", "hourglass", "pentagon", "star-triangle-up"),
)
_GREY = "#7b7f87"
_MAX_TEXT = 48
_SPARSE = 0.05
BLANK = "\u2013"


@dataclass(frozen=True)
class Plot:
    """One figure of the page.

    `name` is unique within the page (an HTML id), `title` a heading, `caption` says how to read it, `alt` says in words
    what it shows, `figure` is plotly.js' {data, layout}.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def series_name(row: Row) -> str:
    """Return what a line or a colour stands for: engine, weights and precision; how it was pruned, in a sweep."""
    start = f"{row['cell']}," if row.get("cell") else row["engine"]
    return f"{start} {row['weights']} {row['precision']}"


def is_sparse(row: Row) -> bool:
    """True if zeros are more than chance: a dense model that was once on a coarse grid has some."""
    return bool(row["sparsity"] >= _SPARSE)


def percent(fraction: float | None, digits: int = 1, unknown: str = BLANK) -> str:
    """Return a fraction in percent, as "70 %" or "70.5 %"; `unknown` if it is None or not finite."""
    if fraction is None or not math.isfinite(fraction):
        return unknown
    return f"{100 * fraction:.{digits}f}".removesuffix(".0") + " %"


def number(value: float | None) -> str:
    """Return three significant digits, or `<1e-5`."""
    if value is None or not math.isfinite(value):
        return BLANK
    if 0 < abs(value) < 1e-5:
        return "<1e-5"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


def latency_plot(name: str, title: str, rows: Sequence[Row], colours: dict[str, int]) -> Plot:
    """Return bars of the median latency with a whisker up to p90, one per row in the order given.

    Args:
        name: HTML id.
        title: the workload in words.
        rows: of one workload; failed ones keep their place, without a bar.
        colours: index into the palette per `series_name`.
    """
    positions = list(range(len(rows)))
    p50 = [row["ms"]["p50"] if row["ms"] else None for row in rows]
    above = [row["ms"]["p90"] - row["ms"]["p50"] if row["ms"] else None for row in rows]
    labels = [_bar_label(row) for row in rows]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": p50,
        "y": positions,
        "width": 0.28,
        "marker": {"color": [_colour(colours[series_name(row)]) for row in rows]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": [0.0] * len(rows),
            "thickness": 1.5,
        },
        "customdata": [number(row["ms"]["p90"]) if row["ms"] else "" for row in rows],
        "text": labels,
        "textposition": "none",
        "hovertemplate": "%{text}<br>p90 %{customdata} ms<extra></extra>",
    }
    # Names stand above the bars, not beside them: a phone's width is left to the bars.
    notes = [
        {"x": 0, "y": y, "xref": "x", "yref": "y", "xanchor": "left", "yanchor": "bottom", "yshift": 8, "text": text}
        for y, text in zip(positions, labels, strict=True)
    ]
    layout = figure_layout(
        height=64 + 58 * len(rows),
        xaxis=figure_axis("milliseconds, shorter is better", rangemode="tozero", fixedrange=True),
        yaxis={"visible": False, "range": [len(rows) - 0.5, -0.9], "fixedrange": True},
        annotations=[note | {"showarrow": False, "align": "left"} for note in notes],
        margin={"l": 8, "r": 16, "t": 4, "b": 48},
        showlegend=False,
    )
    said = "; ".join(
        f"{_plain(row)} {number(row['ms']['p50'])} ms, p90 {number(row['ms']['p90'])} ms"
        if row["ms"]
        else f"{_plain(row)} failed"
        for row in rows
    )
    return Plot(
        name,
        title,
        "Bar: median. Whisker: up to the 90th percentile. Shorter is better.",
        f"Bar chart of latency, {title}: {said}.",
        {"data": [bars], "layout": layout},
    )


def speedup_plot(name: str, title: str, rows: Sequence[Row], colours: dict[str, int]) -> Plot | None:
    """Return speed-up against sparsity with intervals, one line per series; None if no row has a speed-up.

    Args:
        name: HTML id.
        title: the workload in words.
        rows: of one workload, only those whose speed-up may be shown.
        colours: index into the palette per `series_name`.
    """
    shown = [row for row in rows if row["speedup"]]
    if all(row["is_baseline"] for row in shown):
        return None
    data = []
    for series in dict.fromkeys(series_name(row) for row in shown):
        points = sorted((row for row in shown if series_name(row) == series), key=lambda row: float(row["sparsity"]))
        middle = [row["speedup"]["p50"] for row in points]
        data.append(
            series_line(series, colours[series])
            | {
                "x": [100 * row["sparsity"] for row in points],
                "y": middle,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [row["speedup"]["high"] - row["speedup"]["p50"] for row in points],
                    "arrayminus": [row["speedup"]["p50"] - row["speedup"]["low"] for row in points],
                    "thickness": 1.5,
                },
                "customdata": [f"{row['speedup']['low']:.2f}-{row['speedup']['high']:.2f}" for row in points],
                "hovertemplate": "%{x:.1f} % sparse: %{y:.2f}x (%{customdata})<extra>%{fullData.name}</extra>",
            }
        )
    layout = figure_layout(
        height=330 + 20 * len(data),
        xaxis=figure_axis("sparsity, %", range=[-4, 104], fixedrange=True),
        yaxis=figure_axis("speed-up, times the baseline", rangemode="tozero", fixedrange=True),
        shapes=[_level(1.0)],
        annotations=[_level_label(1.0, "baseline", "right", "bottom")],
    )
    ratios = [(_plain(row), row["speedup"]) for row in shown]
    said = "; ".join(f"{name} {r['p50']:.2f}, interval {r['low']:.2f} to {r['high']:.2f}" for name, r in ratios)
    return Plot(
        name,
        title,
        "Above the dashed line is faster than the baseline, below it slower. Whiskers: 95 % interval.",
        f"Speed-up against sparsity, {title}: {said}.",
        {"data": data, "layout": layout},
    )


def quality_plot(name: str, title: str, rows: Sequence[Row], colours: dict[str, int]) -> Plot | None:
    """Return perplexity (logarithmic) against speed-up, one mark per row; None below two marks.

    Args:
        name: HTML id.
        title: the workload in words.
        rows: of one workload, only those whose speed-up may be shown: their perplexity is known.
        colours: index into the palette per `series_name`.
    """
    shown = [row for row in rows if row["speedup"] and row["perplexity"]]
    if len(shown) < 2:
        return None
    data = []
    for series in dict.fromkeys(series_name(row) for row in shown):
        points = [row for row in shown if series_name(row) == series]
        data.append(
            series_line(series, colours[series])
            | {
                "mode": "markers+text",
                "x": [row["speedup"]["p50"] for row in points],
                "y": [row["perplexity"] for row in points],
                "text": [percent(row["sparsity"]) if is_sparse(row) else "" for row in points],
                "customdata": [percent(row["sparsity"]) for row in points],
                "textposition": "top center",
                "cliponaxis": False,
                "hovertemplate": "%{customdata} sparse: %{x:.2f}x, perplexity %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    fastest = max(row["speedup"]["p50"] for row in shown)
    ticks = log_ticks([row["perplexity"] for row in shown])
    layout = figure_layout(
        height=330 + 20 * len(data),
        xaxis=figure_axis("speed-up, times the baseline", range=[0, 1.12 * max(1.0, fastest)], fixedrange=True),
        yaxis=figure_axis(
            "perplexity, lower is better",
            type="log",
            range=[math.log10(ticks[0]), math.log10(ticks[-1])],
            tickvals=ticks,
            ticktext=[f"{tick:,}" for tick in ticks],
            fixedrange=True,
        ),
    )
    said = "; ".join(
        f"{_plain(row)} {row['speedup']['p50']:.2f} times at perplexity {number(row['perplexity'])}" for row in shown
    )
    return Plot(
        name,
        title,
        "Best is right and low: fast, and still a good language model. Sparse marks carry their sparsity.",
        f"Perplexity against speed-up, {title}: {said}.",
        {"data": data, "layout": layout},
    )


def profile_plot(name: str, profiles: Iterable[dict[str, Any]]) -> Plot | None:
    """Return sparsity per decoder block, one line per distinct profile; None without profiles.

    Artifacts exported from one checkpoint have one profile: they share a line.
    """
    artifacts: dict[str, list[str]] = {}
    distinct: dict[str, dict[str, Any]] = {}
    for profile in profiles:
        key = repr([profile["method"], profile["allocation"], profile["target"], profile["blocks"]])
        artifacts.setdefault(key, []).append(profile["artifact"])
        distinct[key] = profile
    if not distinct:
        return None
    data, said = [], []
    for number, (key, profile) in enumerate(distinct.items()):
        how = f"{profile['method']}, {profile['allocation']}, target {percent(profile['target'])}"
        others = f" and {len(artifacts[key]) - 1} more" if len(artifacts[key]) > 1 else ""
        sparsities = [100 * block["sparsity"] for block in profile["blocks"]]
        outliers = [block.get("outlier_ratio") for block in profile["blocks"]]
        data.append(
            series_line("", number)
            | {
                "name": f"{plain_text(artifacts[key][0] + others)}<br>{plain_text(how)}",
                "x": [block["index"] for block in profile["blocks"]],
                "y": sparsities,
                "customdata": ["" if ratio is None else f"<br>outlier ratio {ratio:.3g}" for ratio in outliers],
                "hovertemplate": "block %{x}: %{y:.1f} %%{customdata}<extra></extra>",
            }
        )
        spread = f"from {min(sparsities):.1f} to {max(sparsities):.1f} %" if sparsities else "no blocks"
        said.append(f"{artifacts[key][0]}{others} ({how}) {spread}")
    targets = sorted({float(profile["target"]) for profile in distinct.values()})
    layout = figure_layout(
        height=330 + 20 * len(data),
        xaxis=figure_axis("decoder block, from the input", fixedrange=True),
        yaxis=figure_axis("sparsity, %", fixedrange=True),
        shapes=[_level(100 * target) for target in targets],
        annotations=[_level_label(100 * target, percent(target), "left", "middle") for target in targets],
        margin={"l": 56, "r": 52, "t": 12, "b": 48},
    )
    return Plot(
        name,
        "Sparsity of each decoder block",
        "Blocks with more outliers keep more weights. Dashed: the target, which is the mean over all weights.",
        f"Line chart of sparsity per decoder block: {'; '.join(said)}.",
        {"data": data, "layout": layout},
    )


def figure_layout(**settings: Any) -> dict[str, Any]:
    """Return a layout with what all figures share; the page's style sheet paints the text."""
    shared = {
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        # A drag belongs to the reader's scrolling, not to zooming.
        "dragmode": False,
        "showlegend": True,
        "legend": {"orientation": "v", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "xanchor": "left"},
    }
    return shared | settings


def figure_axis(title: str, **settings: Any) -> dict[str, Any]:
    """Return an axis with what all axes share."""
    return {"title": {"text": title}, "automargin": True, "zeroline": False} | settings


def log_ticks(values: Sequence[float]) -> list[int]:
    """Return the numbers 1, 2, 5, 10, 20, ... from the last not above all values (1 or more) to the first not below."""
    series = [digit * 10**exponent for exponent in range(len(f"{max(values):.0f}") + 1) for digit in (1, 2, 5)]
    first = max(tick for tick in series if tick <= max(1.0, min(values)))
    last = min(tick for tick in series if tick >= max(values) and tick > first)
    return [tick for tick in series if first <= tick <= last]


def series_line(series: str, number: int) -> dict[str, Any]:
    """Return a named line with markers, its colour and symbol taken by number."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain_text(series),
        "line": {"color": _colour(number), "width": 2},
        "marker": {"color": _colour(number), "size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
    }


def _level(y: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": _GREY, "width": 1.5, "dash": "dash"},
        "layer": "below",
    }


def _level_label(y: float, text: str, xanchor: str, yanchor: str) -> dict[str, Any]:
    return {"xref": "paper", "x": 1, "xanchor": xanchor, "y": y, "yanchor": yanchor, "text": text, "showarrow": False}


def _bar_label(row: Row) -> str:
    """Return two lines: the time and what ran; its sparsity and quality, since a speed alone would flatter."""
    time = f"{number(row['ms']['p50'])} ms" if row["ms"] else "failed"
    return f"<b>{time}</b> {plain_text(series_name(row))}<br>{percent(row['sparsity'])} sparse{_quality(row)}"


def _quality(row: Row) -> str:
    if not row["ms"]:
        return ""
    perplexity = "unknown" if row.get("perplexity") is None else number(row["perplexity"])
    return f", perplexity {perplexity}" + (
        ", parity failed" if row.get("parity") and not row["parity"]["passed"] else ""
    )


def _plain(row: Row) -> str:
    return f"{series_name(row)}, {percent(row['sparsity'])}"


def _colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def plain_text(text: str) -> str:
    """Return text that plotly.js shows as it is: it would read tags, and break the line nowhere."""
    short = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
    return html.escape(short, quote=False)
