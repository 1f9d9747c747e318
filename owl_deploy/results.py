"""What commands print on stdout: one JSON document, or a few lines and tables for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["print_artifact", "print_evaluation", "print_json", "print_report", "print_sparsity"]


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


def print_evaluation(model: str, facts: dict[str, Any]) -> None:
    """Print the quality of one model, with every setting that it depends on."""
    bos = "starts with BOS" if facts["starts_with_bos"] else "no BOS"
    click.echo(f"{model} ({facts['engine']})")
    click.echo(f"  perplexity {facts['perplexity']:.4f}")
    click.echo(f"  on {facts['text']}, {facts['n_windows']} windows of {facts['window']} tokens, {bos}")
    if "kl_divergence" in facts:
        click.echo(f"  against {facts['reference']}: KL divergence {facts['kl_divergence']:.5f} nats,")
        click.echo(f"  same most likely token at {facts['top1_agreement']:.2%} of positions")


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
