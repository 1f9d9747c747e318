"""Does pruning keep its promise of memory? A model of a real size, random weights, pruned in a process of its own.

    python -m owl_deploy.bench.memory --max-memory 6GiB                       # OWL and Wanda, LLaMA-7B's shape
    python -m owl_deploy.bench.memory --max-memory 8GiB --method sparsegpt --allocation uniform

In: a shape. Out: the peak that was predicted and the one that was measured. The weights are written once, as bfloat16
(13.5 GB for LLaMA-7B), and used again if --model says where; they say nothing, so no quality is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from owl_deploy.bench.random_checkpoint import SHAPES, write_random_llama


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--max-memory", default="6GiB", help="The promise.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the random checkpoint is, or is to be written.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="llama-7b", help="Its sizes.")
@click.option(
    "--n-blocks", type=int, help="Decoder blocks, if not those of the shape; the peak hardly depends on them."
)
@click.option("--n-samples", default=8, help="Calibration sequences.")
@click.option("--seq-len", default=256, help="Tokens per sequence.")
@click.argument("prune_options", nargs=-1, type=click.UNPROCESSED)
def main(
    max_memory: str,
    model: Path | None,
    shape: str,
    n_blocks: int | None,
    n_samples: int,
    seq_len: int,
    prune_options: tuple[str, ...],
) -> None:
    """Prune, and print prediction and peak."""
    sizes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as scratch:
        source = model or Path(scratch) / "random-llama"
        if not source.exists():
            write_random_llama(source, replace(sizes, n_blocks=n_blocks or sizes.n_blocks))
        command = [sys.executable, "-m", "owl_deploy", "prune", "--model", str(source), "--max-memory", max_memory]
        command += ["--calibration", "python-docs", "--n-samples", str(n_samples), "--seq-len", str(seq_len)]
        command += ["--out", str(source.with_name(f"{source.name}-pruned")), "--force", "--json", *prune_options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    click.echo(
        f"peak {report['peak_rss_bytes'] / 2**30:.2f} GiB of {max_memory}, {report['seconds']:.0f} s, "
        f"sparsity {report['sparsity']['linears']:.4f}, {report['method']}, {report['allocation']}"
    )


if __name__ == "__main__":
    main()
