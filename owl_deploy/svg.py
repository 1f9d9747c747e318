"""How pictures look: colours, dashes, and a figure as an SVG that can be read out.

In: what a module has drawn with matplotlib. Out: the bytes of an SVG, the same for the same drawing. What is drawn is
not known here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["COLOURS", "DASHES", "INK", "new_figure", "svg_bytes"]

# On white, each with a contrast of 3:1 or more; dashes and order tell them apart without colour.
COLOURS = ("#2f78d0", "#c8602a", "#23906a", "#a95bc6", "#c4485f", "#8a7a1f", "#2a8a9c", "#5d6470")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_GREY, INK = "#8a9099", "#24292f"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "owl-deploy",  # ids of clip paths would be random
    "svg.fonttype": "none",  # text stays text: a third of the size, and it can be read out and searched
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of so many inches, to be drawn and saved in this block.

    The background is white, not transparent: text then has its full contrast in a dark page too.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        yield figure


def svg_bytes(figure: Figure, title: str, description: str) -> bytes:
    """Return a figure with what readers of the screen say, which they look for at the start of the picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    svg = buffer.getvalue().decode()
    heading = f"<title>{escape(title)}</title>"
    start = svg.index(heading)
    words = f'<title id="title">{escape(title)}</title>\n <desc id="desc">{escape(description)}</desc>'
    svg = svg[:start] + words + svg[start + len(heading) :]
    return svg.replace("<svg ", '<svg role="img" aria-labelledby="title desc" ', 1).encode()
