"""A plan as text: a table of the blocks, then what pruning is predicted to take and to give.

In: the content of a plan.json. Out: lines on stdout. Nothing is predicted here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["figure_names", "print_pruning_plan"]


def figure_names(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the figures that decided about the blocks; none where the allocation needs none."""
    return [key for key in blocks[0] if key not in ("index", "sparsity", "n_weights", "predicted", "lowest", "highest")]


def print_pruning_plan(facts: dict[str, Any], out: Path | None) -> None:
    """Print a plan, and the folder that it was written to."""
    from rich.console import Console
    from rich.table import Table

    settings, model, sparsity, blocks = facts["recipe"]["prune"], facts["model"], facts["sparsity"], facts["blocks"]
    _say(
        f"{facts['recipe']['model']}: {model['architecture']}, {model['n_blocks']} blocks, {model['n_linears']} "
        f"linears; {model['prunable_share']:.1%} of {model['n_parameters']:,} parameters can be pruned"
    )
    differs = any("lowest" in block for block in blocks)
    figures = figure_names(blocks)
    table = Table(title=f"{settings['method']}, {settings['allocation']}")
    columns = ("block", "sparsity asked", *(["linears"] if differs else []), "weights")
    for name in (*columns, *(figure.replace("_", " ") for figure in figures)):
        table.add_column(name, justify="right")
    for block in blocks:
        asked = _span(facts["range"]) if block["sparsity"] is None else f"{block['sparsity']:.4f}"
        linears = [_span(block) if "lowest" in block else ""] if differs else []
        values = (f"{block[figure]:.4g}" for figure in figures)
        table.add_row(str(block["index"]), asked, *linears, f"{block['n_weights']:,}", *values)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    _say(
        f"Sparsity: {sparsity['asked']:.4f} asked on average, weighted by size (target {sparsity['target']:g}); about "
        f"{sparsity['linears']:.4f} of the linears, {sparsity['model']:.4f} of the model"
        + (f", {sparsity['mlp']:.4f} of the gated MLPs alone" if "mlp" in sparsity else "")
    )
    _print_memory(facts["memory"])
    _print_time(facts["time"])
    _print_sizes(facts["sizes"])
    for note in facts["notes"]:
        _say(f"Note: {note}")
    if out is not None:
        _say(f"Plan: {out}")


def _say(text: str) -> None:
    """Print a sentence, in lines of the terminal's width, or in one where it goes into a file or a pipe."""
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def _span(bounds: Mapping[str, float]) -> str:
    return f"{bounds['lowest']:.4f} to {bounds['highest']:.4f}"


def _print_memory(memory: Mapping[str, Any]) -> None:
    states = f"{_gib(memory['hidden_states_bytes'])} of hidden states "
    states += "on disk, beside that" if memory["are_hidden_states_on_disk"] else "included"
    _say(f"Memory: about {_gib(memory['peak_bytes'])} at the peak, {states}")
    phases = ", ".join(f"{name} {_gib(n_bytes)}" for name, n_bytes in memory["phases"].items())
    _say(f"  {_gib(memory['held_bytes'])} before it starts; beyond that: {phases}")


def _print_time(time: Mapping[str, Any]) -> None:
    _say(
        f"Time: about {_duration(time['seconds'])}, within a factor of two (threads: {time['threads']}, products at "
        f"{time['flop_per_second'] / 1e9:.0f} GFLOP/s now)"
    )
    phases = (
        f"{name} {'in the cache' if name in time['in_cache'] else _duration(seconds)}"
        for name, seconds in time["phases"].items()
    )
    _say(f"  {', '.join(phases)}")
    if time["sampling_seconds"] is not None:
        more = _duration(time["sampling_seconds"])
        _say(f"  sampling the calibration text, where it is not in the cache yet: about {more} more")


def _print_sizes(sizes: Mapping[str, Any]) -> None:
    _say(f"Sizes: sparse checkpoint about {sizes['checkpoint_bytes'] / 1e6:,.1f} MB")
    for artifact in sizes["artifacts"]:
        kinds = ", ".join(f"{count} {name}" for name, count in artifact["encodings"].items())
        _say(
            f"  {artifact['name']}: about {artifact['bytes'] / 1e6:,.1f} MB "
            f"({artifact['bytes'] / artifact['bytes_dense']:.0%} of dense fp32 weights; matrices {kinds})"
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    """Return two figures and a unit."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h" if seconds < 100 * 3600 else f"{seconds / 86400:.0f} days"
