"""The prune stage beside a plain rendition of the published drivers: time, processor time, memory, and the same masks.

In: a model, sizes, a method. Out: a table of OWL with that method as `owl_deploy.bench.published_driver` does it, as
`owl_deploy.prune` does it, as prune does it again, its statistics of the dense model known, and with products in
bfloat16. Each run has a process of its own, all in turn. Inside the clock is the stage from the files of the model to
those of the pruned one; outside are the start of Python and its imports, the conversion of a GGUF file, and the tokens,
which the model has sampled from itself before. Run it as `python -m owl_deploy.bench.pruning`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from owl_deploy.bench.machine import MachineWatch, machine_facts
from owl_deploy.bench.statistics import speedup_interval
from owl_deploy.errors import OwlDeployError
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import PruneSettings, checked
from owl_deploy.terminal import TerminalProgress
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import commit, versions

__all__ = ["main", "measure_drivers"]

Driver = Literal["owl_deploy", "published"]
_CASES: dict[str, tuple[Driver, dict[str, Any]]] = {
    "published driver": ("published", {}),
    "owl_deploy": ("owl_deploy", {}),
    "owl_deploy, statistics known": ("owl_deploy", {}),
    "owl_deploy, bfloat16": ("owl_deploy", {"forward_dtype": "bfloat16"}),
}
"""Name of a row -> what runs, and with which settings. The third finds what the second left in the cache, the last
does not: statistics in another type are others."""

_OUTSIDE_CLOCK = "start of Python, imports, conversion of GGUF files, sampling of the tokens"
_END = "finish"


@dataclass(frozen=True)
class _Run:
    """One run of one driver."""

    seconds: float
    cpu_seconds: float
    """Processor time of all threads, system calls included: less at the mercy of what else runs."""
    peak_rss_bytes: int
    """High-water mark of the process (VmHWM), imports included."""
    phases: dict[str, float]
    """Seconds by stage; the first one includes what comes before it: reading, hashing, embedding."""
    layer_sparsities: list[float]


def measure_drivers(
    model: str,
    settings: PruneSettings,
    *,
    rounds: int,
    threads: int | Literal["auto"] = "auto",
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Time the prune stage and the rendition of the published drivers in interleaved rounds.

    Args:
        model: MODEL as on the command line, of Llama's layout.
        settings: method wanda or sparsegpt, allocation owl. Calibration text other than `generated` is tokenised by
            the prune stage inside its clock, about a second for python-docs; the published driver is given tokens.
        rounds: in each one every case runs once.
        threads: of every run.
        on_step: told of every run.

    Returns:
        A document with the settings, the machine, one row per case, and how far the results agree.

    Raises:
        OwlDeployError: a driver failed.
    """
    from owl_deploy.calibration import calibration_tokens
    from owl_deploy.checkpoint import open_checkpoint

    count = resolve_threads(threads)
    checkpoint = open_checkpoint(model)
    calibration = calibration_tokens(checkpoint, settings, seed=0, on_step=on_step)
    watch = MachineWatch.start()
    runs: dict[str, list[_Run]] = {name: [] for name in _CASES}
    agreement: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as temporary:
        folder = Path(temporary)
        np.save(folder / "tokens.npy", calibration.tokens, allow_pickle=False)
        for index in range(rounds):
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)  # no statistics
            _give_tokens(cache)
            for name, (driver, changes) in _CASES.items():
                job = {
                    "driver": driver,
                    "model": str(checkpoint.path.resolve()),
                    "tokens": str(folder / "tokens.npy"),
                    "settings": {**settings.model_dump(mode="json"), **changes},
                    "threads": count.n,
                    "out": str(folder / name),
                }
                run = _run_in_child(job, cache)
                runs[name].append(run)
                done = sum(map(len, runs.values()))
                on_step(Step("pruning rounds", done, rounds * len(_CASES), f"{name}: {run.seconds:.1f} s"))
            if index == 0:
                ours, published = (folder / name for name in ("owl_deploy", "published driver"))
                agreement = _agreement(ours, published, runs["owl_deploy"][0], runs["published driver"][0])
            for name in _CASES:
                shutil.rmtree(folder / name)
    return {
        "settings": {"model": model, "rounds": rounds, **settings.model_dump(mode="json")},
        "versions": versions("torch", "transformers", "safetensors", "numpy"),
        "commit": commit(),
        "machine": {**machine_facts(count), **watch.facts()},
        "outside_clock": _OUTSIDE_CLOCK,
        "agreement": agreement,
        "rows": [_row(name, runs[name], runs["published driver"]) for name in _CASES],
    }


def _give_tokens(cache: Path) -> None:
    """Let a fresh cache have the text that was sampled before, and nothing else."""
    from owl_deploy.cache import owl_deploy_cache

    cache.mkdir()
    (cache / "generated").symlink_to((owl_deploy_cache() / "generated").resolve())


def _run_in_child(job: dict[str, Any], cache: Path) -> _Run:
    """Run a job in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--job", json.dumps(job)]
    environment = {**os.environ, "OWL_DEPLOY_CACHE": str(cache)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OwlDeployError(f"the {job['driver']} driver ended with exit code {ended.returncode}: {last}")
    return _Run(**json.loads(ended.stdout))


def _work(job: dict[str, Any]) -> _Run:
    """Do a job in this process, which is fresh, and measure it."""
    settings = checked(PruneSettings, job["settings"], where="job")
    import torch

    import owl_deploy.pruning
    from owl_deploy.memory import peak_rss_bytes

    torch.set_num_threads(job["threads"])
    model, out = Path(job["model"]), Path(job["out"])
    _import_model_code(model)
    phases = _Phases()
    peak_before = peak_rss_bytes()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    phases.last = started
    if job["driver"] == "published":
        from owl_deploy.bench.published_driver import prune_as_published

        tokens = np.load(job["tokens"], allow_pickle=False)
        sparsities = prune_as_published(model, tokens, settings, out=out, on_step=phases).layer_sparsities
    else:
        report = owl_deploy.pruning.prune(str(model), settings, out=out, threads=job["threads"], on_step=phases)
        sparsities = [block["sparsity"] for block in report.facts["blocks"]]
    phases(Step(_END, 1, 1))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return _Run(
        seconds=phases.last - started,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        # prune restarts the mark once it has tokens; ru_maxrss has no restart, but begins with the parent's.
        peak_rss_bytes=max(peak_before, peak_rss_bytes()),
        phases=phases.seconds,
        layer_sparsities=sparsities,
    )


def _import_model_code(model: Path) -> None:
    """Import what transformers otherwise imports when it first makes a model of this kind."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)


class _Phases:
    """Adds up the time between steps by their stage."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: Step) -> None:
        now = time.perf_counter()
        self.seconds[step.stage] = self.seconds.get(step.stage, 0.0) + now - self.last
        self.last = now


def _agreement(ours: Path, published: Path, our_run: _Run, published_run: _Run) -> dict[str, float]:
    """Compare two pruned checkpoints, linear by linear.

    The first block tells how alike the drivers are. Later ones see pruned blocks before them, and differences grow: on
    SmolLM2 (2 x 128 tokens of python-docs, Wanda) 0.13 % of the mask of block 0 differ by rounding alone, and 7.6 % of
    the last; with the same rounding none in any block; with that and statistics off by 1e-6, 7.5 % of the last again.
    """
    n_same = n_weights = n_same_first = n_first = 0
    squares = difference = 0.0
    for is_first, a, b in _linears(ours, published):
        same = int(((a != 0) == (b != 0)).sum())
        n_weights += a.size
        n_same += same
        n_first += a.size * is_first
        n_same_first += same * is_first
        squares += float(np.square(b, dtype=np.float64).sum())
        difference += float(np.square(a - b, dtype=np.float64).sum())
    pairs = zip(our_run.layer_sparsities, published_run.layer_sparsities, strict=True)
    return {
        "same_mask": n_same / n_weights,
        "same_mask_first_block": n_same_first / n_first,
        "weight_difference": (difference / squares) ** 0.5,
        "largest_layer_sparsity_difference": max(abs(a - b) for a, b in pairs),
    }


def _linears(ours: Path, published: Path) -> Iterator[tuple[bool, Any, Any]]:
    """Yield every pruned linear of two checkpoints as float32 arrays, and first whether it is one of block 0."""
    from owl_deploy.checkpoint import open_checkpoint

    a, b = open_checkpoint(str(ours)), open_checkpoint(str(published))
    assert a.manifest is not None
    for linear in a.manifest["linears"]:
        name = f"{linear['name']}.weight"
        yield name.startswith("model.layers.0."), a.read(name).float().numpy(), b.read(name).float().numpy()


def _row(name: str, runs: list[_Run], baseline: list[_Run]) -> dict[str, Any]:
    ratio = speedup_interval(*([[round(run.seconds * 1e9)] for run in case] for case in (baseline, runs)))
    cpu_ratio = speedup_interval(*([[round(run.cpu_seconds * 1e9)] for run in case] for case in (baseline, runs)))
    phases = {stage: float(np.median([run.phases[stage] for run in runs])) for stage in runs[0].phases}
    return {
        "case": name,
        "seconds": float(np.median([run.seconds for run in runs])),
        "rounds_seconds": [run.seconds for run in runs],
        "times_faster": {"p50": ratio.p50, "low": ratio.low, "high": ratio.high},
        "cpu_seconds": float(np.median([run.cpu_seconds for run in runs])),
        "rounds_cpu_seconds": [run.cpu_seconds for run in runs],
        "times_less_cpu": {"p50": cpu_ratio.p50, "low": cpu_ratio.low, "high": cpu_ratio.high},
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "phases_seconds": phases,
    }


def _threads(_context: click.Context, _option: click.Parameter, text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise click.BadParameter(f"must be auto or 1 to 1024, got {text!r}")
    return int(text)


@click.command()
@click.option("--model", default="demo:smollm2-135m", show_default=True, help="Model of Llama's layout.")
@click.option("--n-samples", default=64, show_default=True, help="Calibration sequences.")
@click.option("--seq-len", default=512, show_default=True, help="Tokens per sequence.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Every case runs once in each.")
@click.option("--method", type=click.Choice(["wanda", "sparsegpt"]), default="wanda", show_default=True)
@click.option(
    "--calibration",
    default="generated",
    show_default=True,
    help="Text source. Generated text is sampled before; another one owl_deploy tokenises while it is timed.",
)
@click.option("--sparsity", default=0.7, show_default=True, help="Target.")
@click.option("--threads", default="auto", show_default=True, callback=_threads, help="Threads of every run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, every round included.")
@click.option("--job", hidden=True, help="What a child process has to do.")
def main(
    model: str,
    rounds: int,
    threads: int | Literal["auto"],
    as_json: bool,
    job: str | None,
    **values: Any,
) -> None:
    """Time OWL with Wanda or SparseGPT beside a plain rendition of the published drivers.

    Example: python -m owl_deploy.bench.pruning --n-samples 16 --rounds 2
    """
    try:
        if job is not None:
            click.echo(json.dumps(vars(_work(json.loads(job)))))
            return
        settings = checked(PruneSettings, values, where="command line")
        with TerminalProgress(is_quiet=False) as progress:
            document = measure_drivers(model, settings, rounds=rounds, threads=threads, on_step=progress)
    except OwlDeployError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(document, indent=1) if as_json else _table(document))


def _table(document: dict[str, Any]) -> str:
    """Return what a person reads."""
    settings, machine, agreement = document["settings"], document["machine"], document["agreement"]
    lines = [
        f"{settings['model']}: OWL with {settings['method']}, sparsity {settings['sparsity']:g}, "
        f"{settings['n_samples']} x {settings['seq_len']} tokens, {machine['threads']} threads, "
        f"{settings['rounds']} rounds; load {machine['load_before']} before, {machine['load_after']} after",
        f"{'':30}{'median':>10}{'times faster (95 %)':>24}{'CPU time':>11}{'less CPU':>10}{'peak RSS':>11}",
    ]
    for row in document["rows"]:
        faster, less = row["times_faster"], row["times_less_cpu"]
        shown = f"{faster['p50']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})"
        lines.append(
            f"{row['case']:30}{row['seconds']:8.1f} s{shown:>24}{row['cpu_seconds']:9.1f} s{less['p50']:9.2f}x"
            f"{row['peak_rss_bytes'] / 2**20:7.0f} MiB"
        )
    lines.append("")
    for row in document["rows"]:
        seconds = ", ".join(f"{value:.1f}" for value in row["rounds_seconds"])
        phases = ", ".join(f"{stage} {value:.1f}" for stage, value in row["phases_seconds"].items())
        lines.append(f"{row['case']}: rounds of {seconds} s; medians of its parts, s: {phases}")
    lines.append(
        f"same masks: {agreement['same_mask_first_block']:.3%} of block 0, {agreement['same_mask']:.3%} of all, as "
        "differences grow from block to block; relative difference of the weights "
        f"{agreement['weight_difference']:.2g}; of layer sparsities at most "
        f"{agreement['largest_layer_sparsity_difference']:.1g}"
    )
    lines.append(f"outside the clock: {document['outside_clock']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
