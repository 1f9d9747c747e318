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
    "print_recovery",
    "print_report",
    "print_sparsity",
    "print_structure",
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
    if (candidate := search["candidate"]) is not None:
        click.echo(f"Best candidate: gain {candidate['gain']:.4f}, standard error {candidate['gain_error']:.4f}")
    click.echo(f"{'Candidate taken' if chosen['step'] else 'Choice of the metric kept'}: {chosen['reason']}")
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


def print_recovery(facts: dict[str, Any]) -> None:
    """Print how far every block was from its targets, and is."""
    from rich.console import Console
    from rich.table import Table

    training = facts["recovery"]
    if "curve" in training:
        table = Table("step", "held-out loss", title="KL divergence from the dense model, nats per token")
        for check in training["curve"]:
            table.add_row(str(check["step"]), f"{check['loss']:.4g}")
    else:
        table = Table("block", "error before", "after", title="Relative error on held-out sequences")
        for block in training["blocks"]:
            table.add_row(str(block["index"]), f"{block['before']:.4g}", f"{block['after']:.4g}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    click.echo(f"{facts['seconds']:.0f} s, peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB")
    if "pruned_again" in training:
        before, after = (training["pruned_again"][key] for key in ("before", "after"))
        click.echo(f"Pruning again after merging: held-out loss {before:.4g} to {after:.4g}")
    click.echo(f"Checkpoint: {facts['checkpoint']}, with the zeros it had (mask {facts['mask_sha256'][:16]})")


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
