"""What commands print on stdout: one JSON document, or a few lines and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

__all__ = [
    "print_artifact",
    "print_depth",
    "print_evaluation",
    "print_json",
    "print_plan",
    "print_pruning_plan",
    "print_report",
    "print_sparsity",
    "print_structure",
    "print_sweep",
    "print_tasks",
]


def print_json(value: dict[str, Any]) -> None:
    """Print one document; NaN and infinities have no JSON (ValueError)."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def print_sparsity(facts: dict[str, Any]) -> None:
    """Print a table of the blocks and the totals."""
    from rich.console import Console
    from rich.table import Table

    figures = [key for key in facts["blocks"][0] if key not in ("index", "sparsity", "realised")]
    columns = ("block", "sparsity asked", "realised", *(figure.replace("_", " ") for figure in figures))
    table = Table(*columns, title=f"{facts['method']}, {facts['allocation']}")
    for block in facts["blocks"]:
        row = (f"{block['sparsity']:.4f}", f"{block['realised']:.4f}", *(f"{block[figure]:.4g}" for figure in figures))
        table.add_row(str(block["index"]), *row)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    sparsity = facts["sparsity"]
    click.echo(
        f"Sparsity {sparsity['linears']:.4f} of the linears (target {sparsity['target']:g}), "
        f"{sparsity['model']:.4f} of the model"
        + (f", {sparsity['mlp']:.4f} of the gated MLPs alone" if "mlp" in sparsity else "")
    )
    noted = [linear for linear in facts["linears"] if {"fallback", "dampening"} & linear.get("notes", {}).keys()]
    for linear in noted[:5]:
        click.echo(f"Note on {linear['name']}: {linear['notes']}")
    if len(noted) > 5:
        click.echo(f"... and on {len(noted) - 5} more linears, see owl.json")
    click.echo(f"{facts['seconds']:.0f} s, peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB")
    click.echo(f"Checkpoint: {facts['checkpoint']}")


def print_structure(facts: dict[str, Any]) -> None:
    """Print a table of what there was and what stays, and how the search went."""
    from rich.console import Console
    from rich.table import Table

    shape, search = facts["shape"], facts["search"]
    table = Table("in every block", "before", "after")
    rows = (("heads", "n_heads"), ("key/value heads", "n_key_value_heads"), ("channels", "n_channels"))
    for label, key in (*rows, ("parameters of the model", "n_parameters")):
        table.add_row(label, str(shape[key]["before"]), str(shape[key]["after"]))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if search is None:
        click.echo("Nothing written (--dry-run)")
        return
    loss = search["held_out_loss"]
    click.echo(
        f"Held-out loss {loss['chosen']:.4f}; by the metric alone {loss['metric']:.4f}, dense {loss['dense']:.4f} "
        f"({search['n_held_out']} sequences)"
    )
    swapped, chosen = search["swapped"], search["chosen"]
    click.echo(
        f"{search['n_steps']} steps; chosen at step {chosen['step']}: {swapped['heads']} groups of heads and "
        f"{swapped['channels']} channels are others than the metric's"
    )
    if chosen["step"]:
        click.echo(f"Gain on held-out sequences {chosen['gain']:.4f} (standard error {chosen['gain_error']:.4f})")
    elif search["n_steps"]:
        click.echo("No gain on held-out sequences above its standard error: the metric's own choice is kept")
    click.echo(f"{facts['seconds']:.0f} s, peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB")
    click.echo(f"Checkpoint: {facts['checkpoint']}")


def print_depth(facts: dict[str, Any]) -> None:
    """Print a table of the blocks of the source, and what is left."""
    from rich.console import Console
    from rich.table import Table

    names = {name: name.replace("_", " ") for row in facts["figures"] for name in row if not name.startswith("is_")}
    del names["index"]
    by = f" by {facts['criterion']}" if facts["method"] == "shortened" else ""
    table = Table("block", *names.values(), "", title=f"{facts['method']}{by}")
    for row in facts["figures"]:
        fate = "removed" if row["is_removed"] else "protected" if row["is_protected"] else ""
        table.add_row(str(row["index"]), *(f"{row[name]:.5g}" if name in row else "" for name in names), fate)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    blocks, parameters = facts["n_blocks"], facts["n_parameters"]
    click.echo(
        f"{blocks['after']} of {blocks['before']} blocks, {parameters['after'] / 1e6:.1f} of "
        f"{parameters['before'] / 1e6:.1f} million parameters"
    )
    click.echo(f"{facts['seconds']:.0f} s, peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB")
    click.echo("Nothing written (--dry-run)" if facts["checkpoint"] is None else f"Checkpoint: {facts['checkpoint']}")


def print_evaluation(model: str, facts: dict[str, Any]) -> None:
    """Print the quality of one model, with every setting that it depends on."""
    bos = "starts with BOS" if facts["starts_with_bos"] else "no BOS"
    click.echo(f"{model} ({facts['engine']})")
    click.echo(f"  perplexity {facts['perplexity']:.4f}")
    click.echo(f"  on {facts['text']}, {facts['n_windows']} windows of {facts['window']} tokens, {bos}")
    if "kl_divergence" in facts:
        click.echo(f"  against {facts['reference']}: KL divergence {facts['kl_divergence']:.5f} nats,")
        click.echo(f"  same most likely token at {facts['top1_agreement']:.2%} of positions")


def print_tasks(documents: Sequence[dict[str, Any]]) -> None:
    """Print a table of every metric of every task, the models side by side."""
    from rich.console import Console
    from rich.table import Table

    first = documents[0]
    models = (f"{document['model']} ({document['engine']})" for document in documents)
    table = Table("task", "metric", "samples", "few-shot", *models)
    for task, figures in first["tasks"].items():
        settings = ("n_samples", "num_fewshot", "sha256")
        for metric in (key for key in figures if key not in settings and "_stderr" not in key):
            values = (_with_error(document["tasks"][task], metric) for document in documents)
            table.add_row(task, metric, str(figures["n_samples"]), str(figures["num_fewshot"]), *values)
    # Pipes and files get room enough that no figure is folded.
    Console(width=None if sys.stdout.isatty() else 60 + 40 * len(documents)).print(table)
    click.echo(f"lm-eval {first['lm_eval']}, context of {first['context_length']} tokens")


def _with_error(figures: dict[str, Any], metric: str) -> str:
    """Return a figure with its standard error where there is one."""
    name, comma, chain = metric.partition(",")  # a metric may carry the name of its filter
    value, error = figures[metric], figures.get(f"{name}_stderr{comma}{chain}")
    shown = "not a number" if value is None else f"{value:.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def print_artifact(summary: dict[str, Any]) -> None:
    """Print what each kind of matrix took, and the totals."""
    for matrix in summary["matrices"]:
        if not matrix["encoding"].endswith("dense"):
            shape = "x".join(map(str, matrix["shape"]))
            click.echo(
                f"{matrix['name']} {shape} sparsity {matrix['sparsity']:.3f}: {matrix['encoding']}, "
                f"predicted {matrix['predicted_bytes']} bytes, took {matrix['bytes']}"
            )
    n_dense = sum(matrix["encoding"].endswith("dense") for matrix in summary["matrices"])
    click.echo(f"{n_dense} of {len(summary['matrices'])} matrices are dense")
    click.echo(
        f"{summary['bytes_on_disk'] / 1e6:.1f} MB on disk, {summary['bytes_dense'] / 1e6:.1f} MB as dense float32"
    )
    if summary["parity"]:
        parity = summary["parity"]
        click.echo(
            f"Parity: logits within {parity['relative_logit_difference']:.1e} (relative), "
            f"{parity['n_greedy_tokens']} greedy tokens equal, KL divergence {parity['kl_divergence']:.1e}"
        )
    click.echo(f"Artifact: {summary['artifact']}")


def print_report(measured: dict[str, Any], folder: Path) -> None:
    """Print the table of a result, its verdict, and where the page is."""
    from rich.console import Console

    from owl_deploy.bench.report import terminal_table
    from owl_deploy.bench.verdict import verdict

    # Pipes and files get 100 columns; a terminal gets its own width up to that.
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    console.print(terminal_table(measured))
    console.print(verdict(measured), markup=False, highlight=False)
    console.print(f"Report: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def print_plan(cells: list[tuple[str, bool]]) -> None:
    """Print the names of a sweep's cells in order, and how many are still to be made."""
    for name, is_finished in cells:
        click.echo(f"{name}{' (finished)' if is_finished else ''}")
    click.echo(f"{len(cells)} cells, {sum(is_finished for _, is_finished in cells)} of them finished")


def print_pruning_plan(facts: dict[str, Any], out: Path | None) -> None:
    """Print a table of the blocks, then what pruning is predicted to take and to give."""
    from rich.console import Console
    from rich.table import Table

    settings, model, sparsity = facts["recipe"]["prune"], facts["model"], facts["sparsity"]
    click.echo(
        f"{facts['recipe']['model']}: {model['architecture']}, {model['n_blocks']} blocks, {model['n_linears']} "
        f"linears; {model['prunable_share']:.1%} of {model['n_parameters']:,} parameters can be pruned"
    )
    differs = any("lowest" in block for block in facts["blocks"])
    fixed = ("index", "sparsity", "n_weights", "predicted", "lowest", "highest")
    figures = [key for key in facts["blocks"][0] if key not in fixed]
    columns = ("block", "sparsity asked", *(["linears"] if differs else []), "weights")
    table = Table(title=f"{settings['method']}, {settings['allocation']}")
    for name in (*columns, *(figure.replace("_", " ") for figure in figures)):
        table.add_column(name, justify="right")
    for block in facts["blocks"]:
        row = [str(block["index"])]
        if block["sparsity"] is None:
            row.append(f"{facts['range']['lowest']:.4f} to {facts['range']['highest']:.4f}")
        else:
            row.append(f"{block['sparsity']:.4f}")
        if differs:
            row.append(f"{block['lowest']:.4f} to {block['highest']:.4f}" if "lowest" in block else "")
        table.add_row(*row, f"{block['n_weights']:,}", *(f"{block[figure]:.4g}" for figure in figures))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    click.echo(
        f"Sparsity: {sparsity['asked']:.4f} asked on average, weighted by size (target {sparsity['target']:g}); about "
        f"{sparsity['linears']:.4f} of the linears, {sparsity['model']:.4f} of the model"
        + (f", {sparsity['mlp']:.4f} of the gated MLPs alone" if "mlp" in sparsity else "")
    )
    _print_costs(facts)
    for note in facts["notes"]:
        click.echo(f"Note: {note}")
    if out is not None:
        click.echo(f"Plan: {out}")


def _print_costs(facts: dict[str, Any]) -> None:
    """Print what a plan says of memory, time and sizes."""
    memory, time, sizes = facts["memory"], facts["time"], facts["sizes"]
    states = f"{_gib(memory['hidden_states_bytes'])} of hidden states "
    states += "on disk, beside that" if memory["are_hidden_states_on_disk"] else "included"
    click.echo(f"Memory: about {_gib(memory['peak_bytes'])} at the peak, {states}")
    phases = ", ".join(f"{name} {_gib(n_bytes)}" for name, n_bytes in memory["phases"].items())
    click.echo(f"  {_gib(memory['held_bytes'])} before it starts; beyond that: {phases}")
    click.echo(
        f"Time: about {_duration(time['seconds'])}, within a factor of two (threads: {time['threads']}, products at "
        f"{time['flop_per_second'] / 1e9:.0f} GFLOP/s now)"
    )
    phases = ", ".join(
        f"{name} {'in the cache' if name in time['in_cache'] else _duration(seconds)}"
        for name, seconds in time["phases"].items()
    )
    click.echo(f"  {phases}")
    if time["sampling_seconds"] is not None:
        more = _duration(time["sampling_seconds"])
        click.echo(f"  sampling the calibration text, where it is not in the cache yet: about {more} more")
    click.echo(f"Sizes: sparse checkpoint about {sizes['checkpoint_bytes'] / 1e6:,.1f} MB")
    for artifact in sizes["artifacts"]:
        kinds = ", ".join(f"{count} {name}" for name, count in artifact["encodings"].items())
        click.echo(
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


def print_sweep(document: dict[str, Any], folder: Path) -> None:
    """Print a table of perplexities per evaluation text, and where all the figures are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from owl_deploy.sweep_tables import lowest, perplexity_text, table_rows

    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    sparsities, rows = table_rows(document)
    has_settings = any(others for _, _, others in rows)
    for index, text in enumerate(document["texts"]):
        best = lowest(document, index)
        title = f"perplexity on {text['text']}, {text['n_windows']} windows of {text['window']} tokens"
        table = Table(title=Text(title))
        for name in ("method", "allocation", *(["settings"] if has_settings else [])):
            table.add_column(name, overflow="fold")
        for sparsity in sparsities:
            table.add_column(str(sparsity), justify="right", no_wrap=True)
        dense = perplexity_text(document["dense"]["evaluations"][index]["perplexity"])
        table.add_row("dense", *[""] * (1 + has_settings), *[dense] * len(sparsities))
        for names, by_sparsity in rows.items():
            values = []
            for row in map(by_sparsity.get, sparsities):
                if row is None or row["status"] != "ok":
                    values.append(Text("" if row is None else row["status"]))
                    continue
                value = row["evaluations"][index]["perplexity"]
                values.append(Text(perplexity_text(value), "bold" if value == best[row["sparsity"]] else ""))
            table.add_row(*map(Text, names[: 2 + has_settings]), *values)
        console.print(table)
    for row in document["rows"]:
        if row["status"] == "failed":
            click.echo(f"Failed: {row['name']}: {row['reason']}")
    click.echo(f"Results: {folder / 'results.md'}, with KL divergences; results.csv, results.json")
