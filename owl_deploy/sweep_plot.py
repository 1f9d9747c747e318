"""The results of a sweep as a picture: perplexity by sparsity, a line for each method and each allocation.

In: the content of a results.json. Out: the bytes of an SVG, the same for the same results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from owl_deploy.svg import COLOURS, DASHES, INK, new_figure, svg_bytes

__all__ = ["sweep_svg"]

_FEWEST_ALLOCATIONS = 3  # of a method that has a panel of its own
_Lines = Mapping[str, list[tuple[float, float]]]


def sweep_svg(document: Mapping[str, Any]) -> bytes:
    """Draw the finished cells of a sweep: a row of panels per text.

    The first panel has one line per method, in the allocation that most cells have; the others are of methods with
    three allocations or more, one line per allocation.

    Args:
        document: content of results.json.
    """
    texts = document["texts"]
    panels = [_panels(document["rows"], index) for index in range(len(texts))]
    n_columns = max(1, *map(len, panels))
    title = f"Pruned checkpoints of {document['model']}"
    with new_figure(0.8 + 4.4 * n_columns, 0.6 + 3.6 * len(texts)) as figure:
        grid = figure.subplots(len(texts), n_columns, squeeze=False)
        for index, text in enumerate(texts):
            dense = document["dense"]["evaluations"][index]["perplexity"]
            for column, axes in enumerate(grid[index]):
                if column >= len(panels[index]):
                    axes.set_visible(False)
                    continue
                name, lines = panels[index][column]
                _draw(axes, lines, dense)
                axes.set_title(name)
                axes.set_xlabel("sparsity of the linears")
            grid[index][0].set_ylabel(f"perplexity, {text['text']}")
        return svg_bytes(figure, title, _description(document, panels[0]))


def _panels(rows: Sequence[Mapping[str, Any]], index: int) -> list[tuple[str, _Lines]]:
    """Return title and lines of each panel, for the text of that index: (sparsity, perplexity) in ascending order."""
    usual = Counter(row["allocation"] for row in rows).most_common(1)[0][0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = [(f"{usual}, by method", _lines([row for row in rows if row["allocation"] == usual], "method", index))]
    for method in methods:
        lines = _lines([row for row in rows if row["method"] == method], "allocation", index)
        if len(lines) >= _FEWEST_ALLOCATIONS:
            panels.append((f"{method}, by allocation", lines))
    return panels


def _lines(rows: Sequence[Mapping[str, Any]], key: str, index: int) -> _Lines:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: float(row["sparsity"])):
        if row["status"] == "ok":
            others = "".join(f", {name} {value}" for name, value in row.get("settings", {}).items())
            point = (row["sparsity"], row["evaluations"][index]["perplexity"])
            found.setdefault(f"{row[key]}{others}", []).append(point)
    return found


def _draw(axes: Axes, lines: _Lines, dense: float) -> None:
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLOURS[place % len(COLOURS)],
            linestyle=DASHES[place % len(DASHES)],
            marker="o",
            markersize=3,
        )
    axes.axhline(dense, color=INK, linewidth=1.2, linestyle=(0, (6, 3)), label=f"dense {dense:.4g}")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xticks(sorted({sparsity for points in lines.values() for sparsity, _ in points}))
    axes.legend(frameon=False, fontsize=8)


def _description(document: Mapping[str, Any], panels: Sequence[tuple[str, _Lines]]) -> str:
    """Say in words what the first row of panels shows."""
    dense = document["dense"]["evaluations"][0]["perplexity"]
    words = [f"Perplexity by sparsity on {document['texts'][0]['text']}, logarithmic; the dense model has {dense:.4g}."]
    for title, lines in panels:
        last = {name: points[-1] for name, points in lines.items()}
        values = (f"{name} {value:.4g} at {sparsity:.0%}" for name, (sparsity, value) in last.items())
        words.append(f"{title.capitalize()}: {', '.join(values) or 'nothing measured'}.")
    return " ".join(words)
