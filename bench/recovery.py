"""How much quality does training give back, and how fast?

    python -m owl_deploy.bench.recovery OUT --sparsity 0.5 --sparsity 0.7 --text wikitext2 --text python-docs

In: a dense model, sparsities, time budgets. Out: one row per checkpoint (the dense model; by sparsity: SparseGPT in one
shot, `blockwise` for each budget, and after the longest of them the methods of the chain), with its perplexities, as
results.json, .md, .csv and .svg. A row is a JSON file: what is finished is not made again, a killed command goes on
where it was, and parts that are run one after another (`--sparsity`, `--only`) end in one table. A budget counts
training alone: text, evaluation and the blocks' passes outside training are in `seconds`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from owl_deploy.bench.recovery_results import as_csv, as_markdown, recovery_svg
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.evaluation import evaluate, evaluation_windows, open_encoder
from owl_deploy.files import write_bytes, write_json
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.pruning import prune
from owl_deploy.published import public_source, without_folders
from owl_deploy.recipe import Duration, EvalSettings, PruneSettings, RecoverSettings
from owl_deploy.recovery import recover
from owl_deploy.terminal import TerminalProgress
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import commit, versions

__all__ = ["Plan", "Stage", "measure", "stages"]

PARTS = ("one-shot", "blockwise", "chain")


@dataclass(frozen=True)
class Plan:
    """What is measured, and of what."""

    model: str
    sparsities: tuple[float, ...]
    prune: PruneSettings
    blockwise: RecoverSettings
    budgets: tuple[float, ...]
    """Seconds, ascending."""
    chain: tuple[RecoverSettings, ...]
    """What follows the longest budget, each with its own."""
    evals: tuple[EvalSettings, ...]
    """The first one is what the picture shows."""
    threads: int
    is_whole: bool = False
    """Whether the first text is also run whole, of the dense model and of the first and last stage of each sparsity."""


@dataclass(frozen=True)
class Stage:
    """One checkpoint of the table."""

    name: str
    part: str
    """dense, one-shot, blockwise or chain."""
    sparsity: float
    settings: PruneSettings | RecoverSettings | None
    parent: Stage | None
    budget: float
    """Seconds of training since pruning."""
    is_end: bool
    """Whether it is the first or last of its sparsity: those are kept, and run over the whole text where asked."""


def stages(plan: Plan) -> list[Stage]:
    """Return what there is to make, parents before what follows them."""
    found = [Stage("dense", "dense", 0.0, None, None, 0.0, True)]
    for sparsity in plan.sparsities:
        start = f"{sparsity:g}-one-shot"
        one_shot = Stage(
            start, "one-shot", sparsity, plan.prune.model_copy(update={"sparsity": sparsity}), None, 0.0, True
        )
        found.append(one_shot)
        last = one_shot
        for budget in plan.budgets:
            settings = plan.blockwise.model_copy(update={"budget": budget})
            name = f"{sparsity:g}-blockwise-{budget:g}s"
            last = Stage(name, "blockwise", sparsity, settings, one_shot, budget, budget == plan.budgets[-1])
            found.append(last)
        for settings in plan.chain:
            spent = settings.budget or 0.0
            name = f"{last.name}-{settings.method}-{spent:g}s"
            last = Stage(name, "chain", sparsity, settings, last, last.budget + spent, True)
            found.append(last)
    return found


def measure(
    plan: Plan, out: Path, *, only: Sequence[str] = PARTS, command: str = "", on_step: OnStep = silent
) -> dict[str, Any]:
    """Make what is missing of a plan, and return the content of results.json, which has the rows of earlier plans too.

    Args:
        plan: of the same model and texts as what the folder holds; records of others are made anew.
        out: folder of records, checkpoints and results.
        only: parts whose rows are made now; what they start from is made where it is missing.
        command: for the record.
        on_step: told of every finished row, and of the steps within.

    Raises:
        OwlDeployError: a text or the model cannot be read. What fails later is a row with its reason.
    """
    records = out / "rows"
    records.mkdir(parents=True, exist_ok=True)
    shared = _shared(plan)
    dense, *others = stages(plan)
    wanted = [dense, *(stage for stage in others if stage.part in only)]
    for n_done, stage in enumerate(wanted, start=1):
        _finish(stage, plan, out, shared, on_step)
        write_results(out, shared, command)
        on_step(Step("rows", n_done, len(wanted), stage.name))
    return write_results(out, shared, command)


def write_results(out: Path, shared: dict[str, Any], command: str) -> dict[str, Any]:
    """Write the four forms of the results from the records of this model and these texts; return results.json's."""
    found = [_read(file) for file in sorted((out / "rows").glob("*.json"))]
    rows = [row for row in found if row is not None and row["identity"]["shared"] == shared]
    rows.sort(key=lambda row: (row["sparsity"], row["budget_s"], row["name"]))
    public = [{key: value for key, value in row.items() if key != "identity"} for row in rows]
    head = {"kind": "recovery-results", "format_version": 1, "command": command, "commit": commit()}
    document = {**head, **shared, "rows": public}
    write_json(out / "results.json", document)
    write_bytes(out / "results.md", as_markdown(document).encode())
    write_bytes(out / "results.csv", as_csv(document).encode())
    write_bytes(out / "results.svg", recovery_svg(document))
    return document


def _shared(plan: Plan) -> dict[str, Any]:
    """Return what all rows of a table have in common; raise OwlDeployError where a text or the model is not there."""
    encoder, texts = open_encoder(plan.model, offline=False), []
    for settings in plan.evals:
        if settings.text == plan.blockwise.calibration:
            raise OwlDeployError(
                f"{settings.text} is trained on and evaluated on: name another --text or --calibration"
            )
        windows = evaluation_windows(encoder, settings)
        n_windows, window = windows.tokens.shape
        text = {"text": public_source(windows.text), "window": window, "n_windows": n_windows}
        texts.append({**text, "tokens_sha256": windows.sha256, "starts_with_bos": windows.starts_with_bos})
    return {
        "model": Path(plan.model).name if Path(plan.model).exists() else plan.model,
        "model_sha256": open_checkpoint(plan.model).fingerprint,
        "texts": texts,
        "versions": versions("torch", "transformers", "safetensors"),
        "threads": plan.threads,
    }


def _settings(stage: Stage) -> dict[str, Any]:
    """Return all settings that a stage is made with, of its parents too, nearest first."""
    if stage.settings is None:
        return {}
    values = {
        key: public_source(value) if isinstance(value, str) else value
        for key, value in stage.settings.model_dump(mode="json").items()
    }
    if isinstance(stage.settings, RecoverSettings):
        values |= {
            "learning_rate": stage.settings.rate,
            "is_rate_relative": stage.settings.is_rate_relative,
            "batch_size": stage.settings.sequences_per_step,
        }
    return {**values, **({"after": _settings(stage.parent)} if stage.parent else {})}


def _finish(stage: Stage, plan: Plan, out: Path, shared: dict[str, Any], on_step: OnStep) -> None:
    """Make the record of a stage, or what is missing of it."""
    file, identity = out / "rows" / f"{stage.name}.json", {"shared": shared, "settings": _settings(stage)}
    row = _read(file)
    if row is None or row["identity"] != identity or row["status"] != "ok":
        row = None
    needs_whole = plan.is_whole and stage.is_end and (row is None or row["whole"] is None)
    if row is not None and not needs_whole:
        return
    head = {"name": stage.name, "part": stage.part, "sparsity": stage.sparsity, "budget_s": stage.budget}
    head |= {"settings": _settings(stage)}
    try:
        folder = _checkpoint(stage, plan, out, shared, on_step)
        if row is None:
            evaluations = [_evaluation(folder, settings, plan, on_step) for settings in plan.evals]
            row = {**head, "status": "ok", **_measured(folder), "evaluations": evaluations, "whole": None}
            write_json(file, {**row, "identity": identity})  # before the whole text, which takes long
        if needs_whole:
            whole = plan.evals[0].model_copy(update={"max_windows": None})
            row["whole"] = _evaluation(folder, whole, plan, on_step)
        write_json(file, {**row, "identity": identity})
    except OwlDeployError as error:
        failed = {**head, "status": "failed", "error": without_folders(str(error))}
        write_json(file, {**failed, "identity": identity})
        return
    if not stage.is_end:
        shutil.rmtree(folder)


def _checkpoint(stage: Stage, plan: Plan, out: Path, shared: dict[str, Any], on_step: OnStep) -> str:
    """Return the checkpoint of a stage, made where it is not there; a folder's name has the hash of what it is of."""
    if stage.settings is None:
        return plan.model
    facts = json.dumps([shared["model_sha256"], shared["versions"], plan.threads, _settings(stage)], sort_keys=True)
    folder = out / "checkpoints" / f"{stage.name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    if folder.exists():
        return str(folder)
    if isinstance(stage.settings, PruneSettings):
        prune(plan.model, stage.settings, out=folder, threads=plan.threads, resume=True, on_step=on_step)
        return str(folder)
    assert stage.parent is not None
    start = _checkpoint(stage.parent, plan, out, shared, on_step)
    recover(start, plan.model, stage.settings, out=folder, threads=plan.threads, resume=True, on_step=on_step)
    return str(folder)


def _evaluation(model: str, settings: EvalSettings, plan: Plan, on_step: OnStep) -> dict[str, Any]:
    (found,) = evaluate([model], settings, threads=plan.threads, on_step=on_step)
    return {**found.to_json(), "text": public_source(found.text)}


def _measured(folder: str) -> dict[str, Any]:
    """Return what a checkpoint's own records say of its making: time, memory, epochs that the budget left room for."""
    measured = _json(Path(folder) / "measured.json")
    training = (_json(Path(folder) / "owl.json") or {}).get("recovery", {})
    found: dict[str, Any] = {
        key: measured[key] for key in ("seconds", "peak_rss_bytes") if measured and key in measured
    }
    if "blocks" in training:
        found["n_checks"] = sum(len(block["curve"]) for block in training["blocks"]) / len(training["blocks"])
    return found


def _json(file: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where it is not there or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _read(file: Path) -> dict[str, Any] | None:
    row = _json(file)
    return row if row is not None and isinstance(row.get("identity"), dict) else None


def _durations(texts: Sequence[str]) -> Iterator[float]:
    for text in texts:
        try:
            yield TypeAdapter(Duration).validate_python(text)
        except ValidationError as error:
            raise click.BadParameter(f"{text!r} is no time such as 90s, 30m or 2h") from error


def _chain(links: Sequence[str], n_samples: int, seq_len: int, calibration: str) -> Iterator[RecoverSettings]:
    """Read METHOD=BUDGET such as distill=90m."""
    for link in links:
        method, _, budget = link.partition("=")
        try:
            yield RecoverSettings.model_validate(
                {
                    "method": method,
                    "budget": budget,
                    "epochs": 64,  # the budget ends it
                    "n_samples": n_samples,
                    "seq_len": seq_len,
                    "calibration": calibration,
                }
            )
        except ValidationError as error:
            raise click.BadParameter(f"{link!r} is no METHOD=BUDGET such as distill=90m or spp=30m") from error


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default="demo:smollm2-135m", help="A dense model.")
@click.option(
    "--sparsity", type=click.FloatRange(0.01, 0.99), multiple=True, default=(0.5, 0.6, 0.7), help="Repeatable."
)
@click.option("--budget", multiple=True, default=("5m", "10m", "20m", "30m"), help="Of blockwise. Repeatable.")
@click.option("--chain", multiple=True, metavar="METHOD=BUDGET", help="What follows the longest budget. Repeatable.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, default=PARTS, help="Rows to make now. Repeatable.")
@click.option("--text", multiple=True, default=("wikitext2", "python-docs"), help="wikitext2:PATH too. Repeatable.")
@click.option("--window", default=2048, help="Tokens per window.")
@click.option("--max-windows", default=4, help="Windows per text.")
@click.option("--whole", is_flag=True, help="Also the whole first text, of first and last rows.")
@click.option("--calibration", default="generated", help="Text to prune with and to train on.")
@click.option("--epochs", default=32, help="Of blockwise, unless the budget ends before.")
@click.option("--n-samples", default=256, help="Sequences that blockwise trains on.")
@click.option("--chain-samples", default=512, help="Sequences that the chain trains on.")
@click.option("--seq-len", default=512, help="Tokens per sequence.")
@click.option("--threads", default="auto", help="auto or a number.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json, not the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
def main(
    out: Path,
    model: str,
    sparsity: tuple[float, ...],
    budget: tuple[str, ...],
    chain: tuple[str, ...],
    only: tuple[str, ...],
    text: tuple[str, ...],
    window: int,
    max_windows: int,
    whole: bool,
    calibration: str,
    epochs: int,
    n_samples: int,
    chain_samples: int,
    seq_len: int,
    threads: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make rows and print all that there are; exit code 1 where one failed."""
    data = {"calibration": calibration, "n_samples": n_samples, "seq_len": seq_len}
    try:
        plan = Plan(
            model=model,
            sparsities=sparsity,
            prune=PruneSettings(
                method="sparsegpt",
                allocation="uniform",
                calibration=calibration,
                n_samples=32,
                seq_len=min(seq_len, 256),
            ),
            blockwise=RecoverSettings.model_validate({**data, "epochs": epochs}),
            budgets=tuple(sorted(_durations(budget))),
            chain=tuple(_chain(chain, chain_samples, seq_len, calibration)),
            evals=tuple(EvalSettings(text=name, window=window, max_windows=max_windows) for name in text),
            threads=resolve_threads("auto" if threads == "auto" else int(threads)).n,
            is_whole=whole,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    command = shlex.join(["python", "-m", "owl_deploy.bench.recovery", *_public_arguments()])
    try:
        with TerminalProgress(is_quiet=quiet) as progress:
            document = measure(plan, out, only=only, command=command, on_step=progress)
    except OwlDeployError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(document, indent=2) if as_json else as_markdown(document), nl=as_json)
    if any(row["status"] != "ok" for row in document["rows"]):
        raise SystemExit(1)


def _public_arguments() -> list[str]:
    """Return the flags of this command without the folders of this machine."""
    context = click.get_current_context()
    found: list[str] = ["OUT"]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if not isinstance(parameter, click.Option) or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name or ""]
        for one in value if isinstance(value, tuple) else (value,):
            text = without_folders(public_source(str(one)))
            found += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], text]
    return found


if __name__ == "__main__":
    main()
