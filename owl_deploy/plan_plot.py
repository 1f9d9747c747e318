"""A plan as a picture: sparsity by block, and the figure that decided it.

In: the facts of a plan. Out: the bytes of an SVG, the same for the same facts. Nothing is predicted here.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from owl_deploy.plan_tables import figure_names

__all__ = ["plan_svg"]

# On white, each with a contrast of 3:1 or more; dashes and order tell them apart without colour.
_COLOURS = ("#2f78d0", "#c8602a", "#23906a", "#a95bc6", "#c4485f", "#8a7a1f", "#2a8a9c", "#5d6470")
_GREY, _INK = "#8a9099", "#24292f"
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "owl-deploy",  # ids of clip paths would be random
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be read out and searched
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}


def plan_svg(facts: Mapping[str, Any]) -> bytes:
    """Draw a plan.

    The background is white, not transparent: text then has its full contrast in a dark page too.

    Args:
        facts: content of plan.json.
    """
    settings = facts["recipe"]["prune"]
    allocation = "file" if settings["allocation"].startswith("file:") else settings["allocation"]
    title = f"Sparsity by block: {settings['method']}, {allocation}, {facts['sparsity']['target']:.0%}"
    figures = figure_names(facts["blocks"])
    with mpl.rc_context(_STYLE):
        drawn = Figure(figsize=(9, 5.4 if figures else 3.6), layout="constrained", facecolor="white")
        FigureCanvasSVG(drawn)
        ratios = [2, 1] if figures else [1]
        axes = drawn.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _draw_sparsities(axes[0], facts)
        axes[0].set_title(title)
        if figures:
            _draw_figure(axes[1], facts["blocks"], figures[0])
        axes[-1].set_xlabel("decoder block")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlim(-0.7, len(facts["blocks"]) - 0.3)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return _described(buffer.getvalue().decode(), title, _description(facts, figures)).encode()


def _draw_sparsities(axes: Axes, facts: Mapping[str, Any]) -> None:
    blocks, target = facts["blocks"], facts["sparsity"]["target"]
    indices = [block["index"] for block in blocks]
    by_kind = _by_kind(facts["linears"]) if any("lowest" in block for block in blocks) else {}
    if facts["range"] is not None:
        low, high = facts["range"]["lowest"], facts["range"]["highest"]
        axes.bar(indices, [high - low] * len(blocks), 0.8, bottom=low, color=_COLOURS[0], alpha=0.35)
        words = "what the rule allows; which of it, weights decide"
        axes.text(0.5, low / 2, words, ha="center", transform=axes.get_yaxis_transform())
        shown = [low, high]
    elif by_kind:
        for place, (kind, values) in enumerate(by_kind.items()):
            axes.plot(
                list(values),
                list(values.values()),
                label=kind,
                color=_COLOURS[place % len(_COLOURS)],
                linestyle=_DASHES[place % len(_DASHES)],
                marker="o",
                markersize=3,
            )
        shown = [value for values in by_kind.values() for value in values.values()]
    else:
        axes.bar(indices, [block["sparsity"] for block in blocks], 0.8, color=_COLOURS[0])
        shown = [block["sparsity"] for block in blocks]
    axes.axhline(target, color=_INK, linewidth=1.2, linestyle=(0, (6, 3)), label=f"target {target:g}")
    axes.set_ylabel("sparsity asked")
    # From zero: a bar is as long as its value. Lines have no length, and differences show better close up.
    low = max(0.0, math.floor(10 * (min(shown) - 0.05)) / 10) if by_kind else 0.0
    axes.set_ylim(low, min(1.0, math.ceil(10 * (max([*shown, target]) + 0.02)) / 10))
    # Seven lines and more want a column of names; the target alone fits beside the title.
    legend: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    if by_kind and facts["range"] is None:
        legend = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(frameon=False, **legend)


def _draw_figure(axes: Axes, blocks: Sequence[Mapping[str, Any]], name: str) -> None:
    axes.bar([block["index"] for block in blocks], [block[name] for block in blocks], 0.8, color=_COLOURS[1])
    axes.set_ylabel(name.replace("_", " "))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))


def _by_kind(linears: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return, by kind of linear, block -> sparsity: the mean over its experts where a kind has several."""
    paths = {linear["name"]: re.sub(r"^.*?\.\d+\.", "", linear["name"], count=1) for linear in linears}
    kinds = {name: [part for part in path.split(".") if not part.isdecimal()] for name, path in paths.items()}
    # A last name alone says enough unless two places in a block have it, as GPT-2's c_proj.
    places: dict[str, set[str]] = {}
    for parts in kinds.values():
        places.setdefault(parts[-1], set()).add(".".join(parts))
    found: dict[str, dict[int, list[float]]] = {}
    for linear in linears:
        parts = kinds[linear["name"]]
        kind = parts[-1] if len(places[parts[-1]]) == 1 else ".".join(parts)
        found.setdefault(kind, {}).setdefault(linear["block"], []).append(linear["sparsity"])
    return {
        kind: {block: math.fsum(values) / len(values) for block, values in by_block.items()}
        for kind, by_block in found.items()
    }


def _description(facts: Mapping[str, Any], figures: Sequence[str]) -> str:
    """Say in words what the picture shows."""
    target, n_blocks = facts["sparsity"]["target"], len(facts["blocks"])
    if facts["range"] is not None:
        low, high = facts["range"]["lowest"], facts["range"]["highest"]
        return f"Each of {n_blocks} blocks may get a sparsity of {low:.3f} to {high:.3f}; the target is {target:g}."
    values = [block["sparsity"] for block in facts["blocks"]]
    words = (
        f"Sparsity of {n_blocks} blocks, {min(values):.3f} (block {values.index(min(values))}) to {max(values):.3f} "
        f"(block {values.index(max(values))}); the target is {target:g}."
    )
    if figures:
        found = [block[figures[0]] for block in facts["blocks"]]
        words += f" Below, the {figures[0].replace('_', ' ')} of each block, {min(found):.4g} to {max(found):.4g}."
    return words


def _described(svg: str, title: str, description: str) -> str:
    """Add what readers of the screen say, which they look for at the start of the picture."""
    heading = f"<title>{escape(title)}</title>"
    start = svg.index(heading)
    words = f'<title id="title">{escape(title)}</title>\n <desc id="desc">{escape(description)}</desc>'
    svg = svg[:start] + words + svg[start + len(heading) :]
    return svg.replace("<svg ", '<svg role="img" aria-labelledby="title desc" ', 1)
