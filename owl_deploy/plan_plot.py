"""A plan as a picture: sparsity by block, and the figure that decided it.

In: the facts of a plan. Out: the bytes of an SVG, the same for the same facts. Nothing is predicted here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from owl_deploy.plan_tables import figure_names
from owl_deploy.svg import COLOURS, DASHES, INK, new_figure, svg_bytes

__all__ = ["plan_svg"]


def plan_svg(facts: Mapping[str, Any]) -> bytes:
    """Draw a plan.

    Args:
        facts: content of plan.json.
    """
    settings = facts["recipe"]["prune"]
    allocation = "file" if settings["allocation"].startswith("file:") else settings["allocation"]
    title = f"Sparsity by block: {settings['method']}, {allocation}, {facts['sparsity']['target']:.0%}"
    figures = figure_names(facts["blocks"])
    with new_figure(9, 5.4 if figures else 3.6) as drawn:
        ratios = [2, 1] if figures else [1]
        axes = drawn.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        _draw_sparsities(axes[0], facts)
        axes[0].set_title(title)
        if figures:
            _draw_figure(axes[1], facts["blocks"], figures[0])
        axes[-1].set_xlabel("decoder block")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlim(-0.7, len(facts["blocks"]) - 0.3)
        return svg_bytes(drawn, title, _description(facts, figures))


def _draw_sparsities(axes: Axes, facts: Mapping[str, Any]) -> None:
    blocks, target = facts["blocks"], facts["sparsity"]["target"]
    indices = [block["index"] for block in blocks]
    by_kind = _by_kind(facts["linears"]) if any("lowest" in block for block in blocks) else {}
    if facts["range"] is not None:
        low, high = facts["range"]["lowest"], facts["range"]["highest"]
        axes.bar(indices, [high - low] * len(blocks), 0.8, bottom=low, color=COLOURS[0], alpha=0.35)
        words = "what the rule allows; which of it, weights decide"
        axes.text(0.5, low / 2, words, ha="center", transform=axes.get_yaxis_transform())
        shown = [low, high]
    elif by_kind:
        for place, (kind, values) in enumerate(by_kind.items()):
            axes.plot(
                list(values),
                list(values.values()),
                label=kind,
                color=COLOURS[place % len(COLOURS)],
                linestyle=DASHES[place % len(DASHES)],
                marker="o",
                markersize=3,
            )
        shown = [value for values in by_kind.values() for value in values.values()]
    else:
        axes.bar(indices, [block["sparsity"] for block in blocks], 0.8, color=COLOURS[0])
        shown = [block["sparsity"] for block in blocks]
    axes.axhline(target, color=INK, linewidth=1.2, linestyle=(0, (6, 3)), label=f"target {target:g}")
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
    axes.bar([block["index"] for block in blocks], [block[name] for block in blocks], 0.8, color=COLOURS[1])
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
