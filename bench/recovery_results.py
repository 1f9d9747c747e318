"""The results of the recovery benchmark as a table, a spreadsheet and a picture.

In: the content of its results.json. Out: Markdown, CSV, and the bytes of an SVG, each the same for the same results.
How they came about is not known here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from owl_deploy.svg import COLOURS, DASHES, INK, new_figure, svg_bytes

__all__ = ["as_csv", "as_markdown", "recovery_svg"]

Row = Mapping[str, Any]


def as_markdown(document: Mapping[str, Any]) -> str:
    """Return one row per checkpoint, with all that its numbers depend on above the table."""
    texts = [f"{text['text']}, {text['n_windows']} windows of {text['window']}" for text in document["texts"]]
    whole = f"{document['texts'][0]['text']}, whole"
    lines = [
        f"# {document['model']}, pruned and recovered",
        "",
        f"`{document['command']}`" if document["command"] else "",
        "",
        f"Perplexity; {document['threads']} threads; " + ", ".join(f"{k} {v}" for k, v in document["versions"].items()),
        "",
        f"| sparsity | checkpoint | {' | '.join([*texts, whole])} | training | settings |",
        "| ---: | --- |" + " ---: |" * (len(texts) + 2) + " --- |",
    ]
    for row in document["rows"]:
        cells = [f"{row['sparsity']:.0%}", _label(row)]
        if row["status"] == "ok":
            cells += [f"{evaluation['perplexity']:.2f}" for evaluation in row["evaluations"]]
            cells.append(f"{row['whole']['perplexity']:.2f}" if row["whole"] else "")
        else:
            cells += [f"failed: {row['error']}".replace("|", "\\|").replace("\n", " "), *[""] * len(texts)]
        cells += [f"{row['budget_s'] / 60:.3g} min" if row["budget_s"] else "", _settings(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_csv(document: Mapping[str, Any]) -> str:
    """Return one line per checkpoint."""
    texts = [text["text"] for text in document["texts"]]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["name", "part", "sparsity", "budget_s", "status", "seconds", "peak_rss_bytes"]
    writer.writerow([*head, *(f"perplexity {text}" for text in texts), f"perplexity {texts[0]} whole", "error"])
    for row in document["rows"]:
        found = [evaluation["perplexity"] for evaluation in row.get("evaluations", [])] or [""] * len(texts)
        whole = (row.get("whole") or {}).get("perplexity", "")
        writer.writerow([*(row.get(key, "") for key in head), *found, whole, row.get("error", "")])
    return file.getvalue()


def recovery_svg(document: Mapping[str, Any]) -> bytes:
    """Draw perplexity over training time: a panel per text, a line per sparsity, the dense model below."""
    texts, rows = document["texts"], [row for row in document["rows"] if row["status"] == "ok"]
    sparsities = sorted({row["sparsity"] for row in rows if row["part"] != "dense"})
    words = []
    with new_figure(0.8 + 4.4 * len(texts), 4.2) as figure:
        grid = figure.subplots(1, len(texts), squeeze=False)[0]
        for index, (axes, text) in enumerate(zip(grid, texts, strict=True)):
            for place, sparsity in enumerate(sparsities):
                points = [(row["budget_s"] / 60, row["evaluations"][index]["perplexity"])
                          for row in rows if row["sparsity"] == sparsity]  # fmt: skip
                points.sort()
                style = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)]}
                axes.plot(*zip(*points, strict=True), label=f"{sparsity:.0%}", marker="o", markersize=3, **style)
                values = ", ".join(f"{value:.4g} after {minutes:g} min" for minutes, value in points)
                words.append(f"{text['text']}, {sparsity:.0%}: {values}.")
            for row in rows:
                if row["part"] == "dense":
                    dense = row["evaluations"][index]["perplexity"]
                    axes.axhline(dense, color=INK, linewidth=1.2, linestyle=(0, (6, 3)), label=f"dense {dense:.4g}")
            axes.set_yscale("log")
            axes.set_title(text["text"])
            axes.set_xlabel("minutes of training since pruning")
            axes.set_ylabel("perplexity")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(frameon=False, fontsize=8)
        return svg_bytes(figure, f"Recovered checkpoints of {document['model']}", " ".join(words))


def _label(row: Row) -> str:
    if row["part"] in ("dense", "one-shot"):
        return str(row["settings"].get("method", "dense"))
    return f"{row['settings']['method']}" + (
        f" after {row['settings']['after']['method']}" if row["part"] == "chain" else ""
    )


def _settings(row: Row) -> str:
    """Return what a reader would ask of a row: data and effort."""
    settings = row["settings"]
    if not settings:
        return ""
    words = [f"{settings['n_samples']} x {settings['seq_len']} of {settings['calibration']}"]
    if "epochs" in settings:
        rate = f"{settings['learning_rate']:g}" + (" of each RMS" if settings["is_rate_relative"] else "")
        words.append(f"at most {settings['epochs']} epochs, learning rate {rate}")
    if "n_checks" in row:
        words.append(f"{row['n_checks']:.1f} reached")
    return ", ".join(words)
