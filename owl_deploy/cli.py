"""The command line: reads settings, calls one function, prints its result.

Results go to stdout (one JSON document with --json), progress to stderr. Heavy libraries are
imported by the command that needs them, so that --help answers at once.
"""

from __future__ import annotations

import errno
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TypeVar

import click
from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import GateError, OwlDeployError
from owl_deploy.plan_tables import print_pruning_plan
from owl_deploy.recipe import (
    BenchSettings,
    DepthSettings,
    EvalSettings,
    ExportSettings,
    PruneSettings,
    Recipe,
    RecoverSettings,
    Settings,
    SettingsT,
    StructureSettings,
    checked,
    load_recipe,
    recipe_from_mapping,
)
from owl_deploy.results import (
    print_artifact,
    print_depth,
    print_evaluation,
    print_json,
    print_plan,
    print_recovery,
    print_report,
    print_sparsity,
    print_structure,
    print_tasks,
)
from owl_deploy.serve.settings import ServeSettings
from owl_deploy.sweep_tables import print_sweep
from owl_deploy.terminal import TerminalProgress

__all__ = ["main"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _settings_options(kind: type[Settings], *, environment: str | None = None) -> Callable[[Command], Command]:
    """Add one flag per settings field: same name, same default, same description as in a recipe.

    Args:
        kind: the settings.
        environment: prefix of the environment variables that stand in for flags not given; None for no such variables.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(kind.model_fields.items()):
            if field.is_required():
                continue
            is_many = isinstance(field.default, tuple)
            shown = " ".join(map(str, field.default)) if is_many else field.default
            default = f"  [default: {shown}]" if field.default not in (None, ()) else ""
            flag = f"--{name.replace('_', '-')}"
            twin = None if environment is None else f"{environment}{name.upper()}"
            describe = f"{field.description}{default}"
            command = click.option(
                flag, name, multiple=is_many, help=describe, envvar=twin, show_envvar=twin is not None
            )(command)
        return command

    return decorate


def _settings(kind: type[SettingsT], flags: dict[str, Any]) -> SettingsT:
    """Take the flags of `kind` out of `flags` and check them; those not given keep their default."""
    values = {name: flags.pop(name) for name in kind.model_fields if name in flags}
    return checked(
        kind, {name: value for name, value in values.items() if value not in (None, ())}, where="command line"
    )


@dataclass(frozen=True)
class _Common:
    """The flags that every long-running command has."""

    threads: int | Literal["auto"]
    offline: bool
    quiet: bool
    as_json: bool

    def progress(self) -> TerminalProgress:
        """Return what shows the steps of the command."""
        return TerminalProgress(is_quiet=self.quiet, before_step=_stop_if_asked)


def _common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the common flags, and hand them over as one value."""

    @functools.wraps(command)
    def wrapped(*, threads: str, offline: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
        _prepare(offline)
        command(common=_Common(_threads(threads), offline, quiet, as_json), **flags)

    options = (
        click.option(
            "--threads",
            default="auto",
            show_default=True,
            help="Threads: auto (affinity and cgroup quota) or a number.",
        ),
        click.option("--offline", is_flag=True, help="Never ask a model hub."),
        click.option("--quiet", is_flag=True, help="No progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout."),
    )
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


_seed = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of everything random."
)
_device = click.option("--device", default="auto", show_default=True, help=Recipe.model_fields["device"].description)
_max_memory = click.option(
    "--max-memory", help=f"{Recipe.model_fields['max_memory'].description}  [default: what is free]"
)
_force = click.option("--force", is_flag=True, help="Replace what is at --out.")
_out = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it appears whole or not at all."
)


def _threads(text: str) -> Any:
    """Return auto or a number. Raises click.BadParameter."""
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise click.BadParameter(f"must be auto or 1 to 1024, got {text!r}", param_hint="--threads")
    return int(text)


def _bytes(text: str | None) -> int | None:
    """Return a size such as 6GiB in bytes. Raises click.BadParameter."""
    if text is None:
        return None
    try:
        return TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(text)
    except ValidationError as error:
        raise click.BadParameter(f"must be a size such as 6GiB, got {text!r}", param_hint="--max-memory") from error


def _prepare(offline: bool) -> None:
    """Set what libraries read when they are imported: quiet, and no network where it is not wanted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["TQDM_DISABLE"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="owl-deploy", prog_name="owl-deploy", message="%(prog)s %(version)s")
def cli() -> None:
    """Make a Hugging Face language model sparse, and measure what that is worth on this CPU.

    Three stages: prune (OWL and its kin), export (ONNX), bench (ONNX Runtime and DeepSparse).
    `run` does all of them from one recipe.

    \b
    Example:
      owl-deploy run recipes/quickstart.yaml --out runs/quickstart
    """


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of all results.  [default: runs/NAME-OF-THE-RECIPE]"
)
@click.option("--model", help="Override the recipe's model.")
@click.option("--sparsity", help="Override the recipe's prune.sparsity.")
@click.option("--seed", type=int, help="Override the recipe's seed.")
@click.option("--threads", help="Override the recipe's threads: auto or a number.")
@click.option("--resume", is_flag=True, help="Continue a pruning that was stopped.")
@click.option("--force", is_flag=True, help="Make everything anew, also what could be reused.")
@click.option("--offline", is_flag=True, help="Never ask a model hub.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def run(recipe: Path, out: Path | None, offline: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Run all stages of a RECIPE (YAML): prune, export, check, bench.

    Finished stages are reused when their settings did not change.

    \b
    Example:
      owl-deploy run recipes/quickstart.yaml --out runs/quickstart --sparsity 0.6
    """
    switches = {name: flags.pop(name) for name in ("force", "resume")}
    settings = _overridden(load_recipe(recipe), flags, str(recipe))
    _prepare(offline)
    from owl_deploy.pipeline import run as run_recipe

    folder = out or Path("runs") / recipe.stem
    with TerminalProgress(is_quiet=quiet, before_step=_stop_if_asked) as progress:
        result = run_recipe(settings, out=folder, offline=offline, on_step=progress, **switches)
    if as_json:
        print_json(result.to_json())
    elif result.measured is not None and result.report is not None:
        print_report(result.measured, result.report)
    else:
        click.echo("\n".join(str(path) for path in (result.checkpoint, *result.artifacts)))
        for model, evaluation in result.evaluations:
            print_evaluation(model, evaluation.to_json())
    if result.measured is not None and result.report is not None:
        _exit_if_failed(result.measured, result.report, settings.bench.fail_if)


def _overridden(recipe: Any, flags: dict[str, Any], where: str) -> Any:
    """Return a recipe with the given flags in place of its keys, checked again."""
    mapping = recipe.model_dump(mode="json", exclude_unset=True)
    given = {name: value for name, value in flags.items() if value is not None}
    if "sparsity" in given:
        mapping.setdefault("prune", {})["sparsity"] = given.pop("sparsity")
    if "threads" in given:
        given["threads"] = _threads(given["threads"])
    return recipe_from_mapping({**mapping, **given}, where=where)


@cli.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Local folder (a config.json alone will do), .gguf file, hub id, or demo:smollm2-135m.")
@_settings_options(PruneSettings)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for plan.json, plan.svg and allocation.json (for --allocation file:PATH).",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed of everything random.  [default: 0]")
@_device
@_max_memory
@_force
@_common_options
def plan(
    recipe: Path | None,
    model: str | None,
    out: Path | None,
    seed: int | None,
    device: str,
    max_memory: str | None,
    force: bool,
    common: _Common,
    **flags: Any,
) -> None:
    """Show what pruning will do, before it does: allocation, memory, time, sizes.

    Of a RECIPE or of a --model; flags of prune override the keys of a recipe. What an allocation has to learn from
    the model stays in the cache for prune.

    \b
    Example:
      owl-deploy plan --model demo:smollm2-135m --sparsity 0.7 --calibration python-docs \\
        --n-samples 16 --seq-len 512 --out plan
    """
    if out is not None and out.exists() and not force:
        raise OwlDeployError(f"{out} exists already: give another --out, or --force to replace it")
    planned = _planned(recipe, model, seed, flags)
    memory_limit = planned.max_memory if max_memory is None else _bytes(max_memory)
    from owl_deploy.plan import ALL_ARTIFACTS, plan_pruning, write_plan

    with common.progress() as progress:
        found = plan_pruning(
            planned.model,
            planned.prune,
            artifacts=planned.export or ALL_ARTIFACTS,
            seed=planned.seed,
            threads=planned.threads if common.threads == "auto" else common.threads,
            device=planned.device if device == "auto" else device,
            max_memory=memory_limit,
            offline=common.offline,
            on_step=progress,
        )
    if out is not None:
        write_plan(found, out, force=force)
    if common.as_json:
        print_json(found.facts)
    else:
        print_pruning_plan(found.facts, out)


def _planned(recipe: Path | None, model: str | None, seed: int | None, flags: dict[str, Any]) -> Recipe:
    """Return a recipe with the given flags in place of its keys, or one that is made of flags alone."""
    if recipe is None:
        if model is None:
            raise click.UsageError("Missing argument 'RECIPE' (or option '--model').")
        return Recipe(model=model, seed=seed or 0, prune=_settings(PruneSettings, flags))
    mapping = load_recipe(recipe).model_dump(mode="json", exclude_unset=True)
    given = {name: value for name, value in flags.items() if value is not None}
    mapping["prune"] = {**mapping.get("prune", {}), **given}
    others = {name: value for name, value in (("model", model), ("seed", seed)) if value is not None}
    return recipe_from_mapping({**mapping, **others}, where=str(recipe))


@cli.command()
@click.option("--model", required=True, help="Local folder, .gguf file, hub id, or demo:smollm2-135m.")
@_settings_options(PruneSettings)
@_out
@_seed
@_device
@_max_memory
@click.option("--resume", is_flag=True, help="Continue a run of the same settings that was stopped.")
@_force
@_common_options
def prune(
    model: str,
    out: Path,
    seed: int,
    device: str,
    max_memory: str | None,
    resume: bool,
    force: bool,
    common: _Common,
    **flags: Any,
) -> None:
    """Prune a model: write a sparse checkpoint, one decoder block at a time.

    \b
    Example:
      owl-deploy prune --model demo:smollm2-135m --sparsity 0.7 --calibration python-docs \\
        --n-samples 16 --seq-len 512 --out sparse
    """
    settings = _settings(PruneSettings, flags)
    from owl_deploy.pruning import prune as prune_model

    with common.progress() as progress:
        report = prune_model(
            model,
            settings,
            out=out,
            seed=seed,
            threads=common.threads,
            device=device,
            max_memory=_bytes(max_memory),
            resume=resume,
            force=force,
            offline=common.offline,
            on_step=progress,
        )
    if common.as_json:
        print_json(report.to_json())
    else:
        print_sparsity(report.to_json())


@cli.command()
@click.option("--model", required=True, help="Local folder, .gguf file, hub id, or demo:smollm2-135m.")
@_settings_options(StructureSettings)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; it appears whole or not at all.")
@click.option("--dry-run", is_flag=True, help="Only show the shape that would come out, and write nothing.")
@_seed
@_force
@_common_options
def structure(
    model: str, out: Path | None, dry_run: bool, seed: int, force: bool, common: _Common, **flags: Any
) -> None:
    """Remove attention heads and MLP channels: write a smaller dense checkpoint.

    Which ones, a search by policy gradient decides, with forward passes alone.

    \b
    Example:
      owl-deploy structure --model demo:smollm2-135m --channels-kept 0.8 --calibration python-docs \\
        --n-samples 16 --budget-seconds 90 --out smaller
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or '--dry-run', which writes nothing).")
    settings = _settings(StructureSettings, flags)
    from owl_deploy.structure import structure as cut_model

    with common.progress() as progress:
        report = cut_model(
            model,
            settings,
            out=None if dry_run else out,
            seed=seed,
            threads=common.threads,
            force=force,
            offline=common.offline,
            on_step=progress,
        )
    if common.as_json:
        print_json(report.to_json())
    else:
        print_structure(report.to_json())


@cli.command()
@click.option("--model", required=True, help="Local folder, .gguf file, hub id, or demo:smollm2-135m.")
@click.option("--n-blocks", required=True, help=DepthSettings.model_fields["n_blocks"].description)
@_settings_options(DepthSettings)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; it appears whole or not at all.")
@click.option("--dry-run", is_flag=True, help="Show which blocks would go, and write nothing.")
@_seed
@_force
@_common_options
def depth(model: str, out: Path | None, dry_run: bool, seed: int, force: bool, common: _Common, **flags: Any) -> None:
    """Remove whole decoder blocks: write a smaller dense checkpoint.

    \b
    Example:
      owl-deploy depth --model demo:smollm2-135m --n-blocks 3 --calibration python-docs --out shallow
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or '--dry-run', which writes nothing).")
    settings = _settings(DepthSettings, flags)
    from owl_deploy.depth import prune_depth

    with common.progress() as progress:
        report = prune_depth(
            model,
            settings,
            out=None if dry_run else out,
            seed=seed,
            threads=common.threads,
            force=force,
            offline=common.offline,
            on_step=progress,
        )
    if common.as_json:
        print_json(report.to_json())
    else:
        print_depth(report.to_json())


@cli.command()
@click.argument("model", metavar="CKPT")
@click.option("--reference", help="Dense model that it was pruned from.  [default: the one that its owl.json names]")
@_settings_options(RecoverSettings)
@_out
@_seed
@_device
@click.option("--resume", is_flag=True, help="Continue a run of the same settings that was stopped.")
@_force
@_common_options
def recover(
    model: str,
    reference: str | None,
    out: Path,
    seed: int,
    device: str,
    resume: bool,
    force: bool,
    common: _Common,
    **flags: Any,
) -> None:
    """Train what pruning left: write a sparse checkpoint with the same zeros and better weights.

    \b
    Example:
      owl-deploy recover sparse --reference demo:smollm2-135m --budget 30m --out recovered
    """
    settings = _settings(RecoverSettings, flags)
    from owl_deploy.recovery import recover as recover_weights

    with common.progress() as progress:
        report = recover_weights(
            model,
            reference,
            settings,
            out=out,
            seed=seed,
            threads=common.threads,
            device=device,
            resume=resume,
            force=force,
            offline=common.offline,
            on_step=progress,
        )
    if common.as_json:
        print_json(report.to_json())
    else:
        print_recovery(report.to_json())


@cli.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_settings_options(EvalSettings)
@click.option("--reference", help="Checkpoint or artifact that KL divergence and top-1 agreement are taken against.")
@click.option(
    "--tasks",
    metavar="NAME[,NAME]",
    help="Tasks of lm-evaluation-harness to answer, in place of perplexity unless --text is given too.",
)
@click.option(
    "--tasks-path",
    type=click.Path(path_type=Path),
    help="Folder of task files (YAML) and their data; files that ask for code are refused.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples of each task, from its start; all when not given.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@_common_options
def evaluate(
    models: tuple[str, ...],
    reference: str | None,
    tasks: str | None,
    tasks_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    common: _Common,
    **flags: Any,
) -> None:
    """Measure the perplexity of checkpoints (in torch) or artifacts (in their own engine).

    With --tasks it measures zero-shot or few-shot tasks instead, and perplexity too if --text is
    given. A --window that is given also shortens the context of the tasks.

    \b
    Example:
      owl-deploy eval sparse --text python-docs --reference demo:smollm2-135m --max-windows 2
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and (tasks, tasks_path, limit, num_fewshot) != (None, None, None, None):
        raise click.UsageError("--tasks-path, --limit and --num-fewshot need --tasks with the name of a task")
    has_perplexity = not names or flags["text"] is not None
    if not has_perplexity and (reference, flags["max_windows"]) != (None, None):
        raise click.UsageError("--reference and --max-windows belong to perplexity: with --tasks add --text")
    has_window = flags["window"] is not None
    settings = _settings(EvalSettings, flags)
    documents: list[dict[str, Any]] = [{"model": model} for model in models]
    with common.progress() as progress:
        if has_perplexity:
            from owl_deploy.evaluation import evaluate as evaluate_models

            results = evaluate_models(
                models, settings, reference=reference, threads=common.threads, offline=common.offline, on_step=progress
            )
            for document, result in zip(documents, results, strict=True):
                document.update(result.to_json())
        if names:
            from owl_deploy.tasks import evaluate_tasks

            answers = evaluate_tasks(
                models,
                names,
                folder=tasks_path,
                limit=limit,
                num_fewshot=num_fewshot,
                window=settings.window if has_window else None,
                threads=common.threads,
                offline=common.offline,
                on_step=progress,
            )
            for document, answer in zip(documents, answers, strict=True):
                document.update(answer.to_json())
    if common.as_json:
        print_json(documents[0] if len(documents) == 1 else {"evaluations": documents})
        return
    if has_perplexity:
        for document in documents:
            print_evaluation(document["model"], document)
    if names:
        print_tasks(documents)


@cli.command()
@click.argument("model", metavar="CKPT")
@_settings_options(ExportSettings)
@_out
@click.option("--no-parity", is_flag=True, help="Skip the parity gate; bench then shows no speed-up of this artifact.")
@_force
@_common_options
def export(
    model: str,
    out: Path,
    no_parity: bool,
    force: bool,
    common: _Common,
    **flags: Any,
) -> None:
    """Export a checkpoint (or any model) as an ONNX artifact for one engine, and check it.

    \b
    Example:
      owl-deploy export sparse --target onnxruntime --weights sparse-initializer --out artifact
    """
    settings = _settings(ExportSettings, flags)
    from owl_deploy.export.writer import export_onnx, export_summary

    with common.progress() as progress:
        artifact = export_onnx(
            model,
            settings,
            out=out,
            threads=common.threads,
            force=force,
            offline=common.offline,
            parity=not no_parity,
            on_step=progress,
        )
    summary = export_summary(artifact)
    if common.as_json:
        print_json(summary)
    else:
        print_artifact(summary)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--past-len",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Tokens in the KV cache of the decode step that is explained.",
)
@click.option(
    "--threads", default="auto", show_default=True, help="Threads: auto (affinity and cgroup quota) or a number."
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def explain(artifact: Path, past_len: int, threads: str, quiet: bool, as_json: bool) -> None:
    """Say why an ARTIFACT decodes as fast as it does: nodes, bytes read per token, matrices, limits.

    \b
    Example:
      owl-deploy explain artifact --past-len 1024
    """
    n_threads = _threads(threads)
    from owl_deploy.explain import explain_artifact
    from owl_deploy.explain_tables import print_explanation

    with TerminalProgress(is_quiet=quiet, before_step=_stop_if_asked) as progress:
        explanation = explain_artifact(artifact, past_len=past_len, threads=n_threads, on_step=progress)
    if as_json:
        print_json(explanation.to_json())
    else:
        print_explanation(explanation)


@cli.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@click.option("--baseline", required=True, help="The artifact (name or path) that the others are compared with.")
@_settings_options(BenchSettings)
@_settings_options(EvalSettings)
@click.option("--reference", help="Model that KL divergence is taken against.")
@_out
@_seed
@_force
@_common_options
def bench(
    artifacts: tuple[Path, ...],
    baseline: str,
    reference: str | None,
    out: Path,
    seed: int,
    force: bool,
    common: _Common,
    **flags: Any,
) -> None:
    """Measure latency and quality of artifacts in their engines, and write a report.

    A condition of --fail-if is asked of every row that has the quantity; one that should have it and does not (a void
    speed-up, KL without --reference) fails it. Exits with 3 where one fails.

    \b
    Example:
      owl-deploy bench dense sparse --baseline dense --max-windows 2 --out report
    """
    settings, evaluation = _settings(BenchSettings, flags), _settings(EvalSettings, flags)
    from owl_deploy.bench.gate import failed_conditions
    from owl_deploy.bench.run import run_bench

    with common.progress() as progress:
        measured = run_bench(
            artifacts,
            out=out,
            force=force,
            settings=settings,
            baseline=baseline,
            evaluation=evaluation,
            reference=reference,
            threads=common.threads,
            seed=seed,
            on_step=progress,
        )
    if common.as_json:
        print_json({"report": str(out), "failed_conditions": failed_conditions(measured, settings.fail_if), **measured})
    else:
        print_report(measured, out)
    _exit_if_failed(measured, out, settings.fail_if)


@cli.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=float,
    # A choice, not a measurement. With 8 rounds that differ by 1 % (standard deviation), samples by 3 %, and four rows,
    # a slow-down of 5 % is found in 99 % of simulated runs; a tolerance of 0.02 leaves 81 %.
    default=0.01,
    show_default=True,
    help="Share by which B may be slower: allows for what differs between two runs and not within one.",
)
@_seed
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def compare(a: Path, b: Path, tolerance: float, seed: int, as_markdown: bool, as_json: bool) -> None:
    """Compare two reports: is anything in B slower than in A?

    A and B are folders of bench reports, or their report.json, of the same workloads. Exits with 3 where a row is
    slower beyond noise and --tolerance, or fails in B and not in A.

    \b
    Example:
      owl-deploy compare report-of-yesterday report --tolerance 0.03
    """
    from owl_deploy.bench.regression import compare_reports
    from owl_deploy.bench.regression_tables import print_comparison
    from owl_deploy.bench.report_file import read_report

    comparison = compare_reports(read_report(a), read_report(b), tolerance=tolerance, seed=seed)
    if as_json:
        print_json({"a": str(a), "b": str(b), **comparison.to_json()})
    else:
        print_comparison(comparison, as_markdown=as_markdown)
    if comparison.regressions:
        raise click.exceptions.Exit(GateError.exit_code)


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of all results.  [default: runs/NAME-OF-THE-RECIPE]"
)
@click.option("--only", default="*", help="Make only the cells whose names fit, such as 'wanda-*-0.7'.  [default: all]")
@click.option("--dry-run", is_flag=True, help="List the cells, in order, and which of them are finished.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where cells are made: on this machine, or on the Ray cluster of RAY_ADDRESS, one to a machine at a time.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="Read an evaluation text from another place: wikitext2:PATH stands in for the recipe's wikitext2.",
)
@click.option("--model", help="Override the recipe's model.")
@click.option("--threads", help="Override the recipe's threads: auto or a number.")
@click.option("--offline", is_flag=True, help="Never ask a model hub.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def sweep(
    recipe: Path,
    out: Path | None,
    only: str,
    dry_run: bool,
    executor: str,
    texts: tuple[str, ...],
    offline: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Prune a model in every way of a RECIPE's grid, measure the quality of each, and write one table.

    A recipe with `export` and `bench` takes every cell along the whole line, beside the dense artifacts, and ends in a
    report of the frontier: which quality can be had at which speed.

    Finished cells are kept: to go on after a stop, run the same command again.

    \b
    Example:
      owl-deploy sweep recipes/methods-smollm2.yaml --out runs/methods --only 'wanda-*'
    """
    settings = _overridden(load_recipe(recipe), flags, str(recipe))
    _prepare(offline)
    from owl_deploy.bench.frontier_report import print_frontier
    from owl_deploy.sweep import plan, run_sweep
    from owl_deploy.sweep_grid import with_local_texts
    from owl_deploy.sweep_line import has_line

    folder = out or Path("runs") / recipe.stem
    settings = with_local_texts(settings, texts)
    if dry_run:
        cells = plan(settings, out=folder, only=only, offline=offline)
        if as_json:
            print_json({"cells": [{"name": cell.name, "is_finished": is_finished} for cell, is_finished in cells]})
        else:
            print_plan([(cell.name, is_finished) for cell, is_finished in cells])
        return
    if executor == "ray":
        from owl_deploy.sweep_cluster import run_sweep_on_cluster as run_sweep
    with TerminalProgress(is_quiet=quiet, before_step=_stop_if_asked) as progress:
        command = shlex.join(["owl-deploy", *sys.argv[1:]])
        result = run_sweep(settings, out=folder, only=only, command=command, offline=offline, on_step=progress)
    if as_json:
        print_json({"results": str(folder), **result})
    elif has_line(settings):
        print_frontier(folder)
    else:
        print_sweep(result, folder)
    if any(row["status"] == "failed" for row in result["rows"]):
        table = folder / ("results.json" if has_line(settings) else "results.md")
        click.echo(f"owl-deploy: a cell failed; its row says why ({table})", err=True)
        raise click.exceptions.Exit(1)


def _exit_if_failed(measured: dict[str, Any], folder: Path, fail_if: tuple[str, ...]) -> None:
    """Exit with 3 where a condition failed, else with 1 where a row did.

    The result is printed already, so these sentences go to stderr alone.
    """
    from owl_deploy.bench.gate import failed_conditions

    failures = failed_conditions(measured, fail_if)
    for failure in failures:
        click.echo(f"owl-deploy: --fail-if {failure}", err=True)
    has_failed_row = any(row["status"] == "failed" for row in measured["rows"])
    if has_failed_row:
        click.echo(f"owl-deploy: an engine failed; its rows say why ({folder / 'report.md'})", err=True)
    if failures or has_failed_row:
        raise click.exceptions.Exit(GateError.exit_code if failures else 1)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path), envvar="OWL_DEPLOY_ARTIFACT")
@_settings_options(ServeSettings, environment="OWL_DEPLOY_")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout, when it listens.")
def serve(artifact: Path, as_json: bool, **flags: Any) -> None:
    """Serve an artifact over HTTP, as OpenAI's interface has it, to several clients at once.

    Clients find completions and chats under /v1, a page to chat with at /, the interface's description at
    /openapi.json, figures at /metrics, and whether it works at /health/live and /health/ready. An API key may be in
    OWL_DEPLOY_API_KEY. SIGTERM and Ctrl-C let it answer what was begun, and end it.

    \b
    Example:
      owl-deploy serve runs/quickstart/artifacts/operator-int8 --port 8000 --batch-size 8
    """
    settings = _settings(ServeSettings, flags)
    try:
        from owl_deploy.serve.server import ServeFacts
        from owl_deploy.serve.server import serve as run_server
    except ModuleNotFoundError as error:
        raise OwlDeployError(
            f"{error.name} is not installed: pip install 'owl-deploy[serve]' brings what serving needs"
        ) from error

    def show(facts: ServeFacts) -> None:
        if as_json:
            print_json(asdict(facts))
        else:
            click.echo(facts.text())
        sys.stdout.flush()

    run_server(artifact, settings, on_ready=show)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@_out
@click.option("--name", help="Name of the model, the image and the deployment.  [default: the artifact's folder]")
@click.option("--unchecked", is_flag=True, help="Take an artifact that has not passed the parity gate of export.")
@_force
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def package(
    artifact: Path, out: Path, name: str | None, unchecked: bool, force: bool, quiet: bool, as_json: bool
) -> None:
    """Write a folder that any container tool builds an artifact's serving image from.

    It holds the Dockerfile, a wheel of this owl-deploy, the artifact, and files for Compose, Kubernetes and KServe.

    \b
    Example:
      owl-deploy package runs/quickstart/artifacts/operator-int8 --out runs/quickstart/image
    """
    from owl_deploy.package_context import write_context

    with TerminalProgress(is_quiet=quiet, before_step=_stop_if_asked) as progress:
        context = write_context(artifact, out=out, name=name, unchecked=unchecked, force=force, on_step=progress)
    if as_json:
        print_json(asdict(context))
    else:
        click.echo(f"{context.context}: {len(context.files)} files, the artifact {context.artifact_bytes / 1e6:.1f} MB")
        click.echo(f"Next: docker build -t {context.image} {shlex.quote(context.context)}")


@cli.command()
@click.option(
    "--threads", default="auto", show_default=True, help="Threads: auto (affinity and cgroup quota) or a number."
)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def doctor(threads: str, quiet: bool, as_json: bool) -> None:
    """Say what this machine is and what is wrong with it, each with what to do.

    Exits with 0 where nothing is wrong, or only what makes figures worse or less certain (a warning), and with 3
    where something will fail (an error).

    \b
    Example:
      owl-deploy doctor
    """
    n_threads = _threads(threads)
    from owl_deploy.doctor import diagnose
    from owl_deploy.doctor_text import diagnosis_lines

    with TerminalProgress(is_quiet=quiet, before_step=_stop_if_asked) as progress:
        diagnosis = diagnose(_engine_statuses(), threads=n_threads, on_step=progress)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        click.echo("\n".join(diagnosis_lines(diagnosis.to_json())))
    if diagnosis.has_error:
        raise click.exceptions.Exit(GateError.exit_code)


def _engine_statuses() -> list[EngineStatus]:
    """Return the engines that there are, here or not."""
    from owl_deploy.engines.bridge import bridge_status
    from owl_deploy.engines.llama_cpp import LLAMA_CPP
    from owl_deploy.engines.openvino import OPENVINO
    from owl_deploy.engines.status import library_status, onnxruntime_status

    libraries = [library_status("onnxruntime-genai"), library_status("torch")]
    return [onnxruntime_status(), bridge_status(), LLAMA_CPP.status(), OPENVINO.status(), *libraries]


@cli.group()
def engines() -> None:
    """Show and install the engines that run artifacts.

    \b
    Example:
      owl-deploy engines list
    """


@engines.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
def list_engines(as_json: bool) -> None:
    """List the engines, their versions, and why one is not available.

    \b
    Example:
      owl-deploy engines list --json
    """
    found = _engine_statuses()
    if as_json:
        print_json({"engines": [asdict(status) for status in found]})
        return
    for status in found:
        click.echo(f"{status.name:<18} {status.state}")


@engines.command()
@click.argument("engine", type=click.Choice(["deepsparse", "llama.cpp", "openvino"]))
@click.option(
    "--python",
    help="Interpreter (3.8 to 3.11 for deepsparse, 3.10 to 3.12 for the others) to build the environment with.  "
    "[default: the first that fits]",
)
def install(engine: str, python: str | None) -> None:
    """Install an engine into an environment of its own.

    \b
    Example:
      owl-deploy engines install deepsparse
    """
    from owl_deploy.engines.bridge import install_bridge
    from owl_deploy.engines.llama_cpp import LLAMA_CPP
    from owl_deploy.engines.openvino import OPENVINO

    installers = {"deepsparse": install_bridge, "llama.cpp": LLAMA_CPP.install, "openvino": OPENVINO.install}
    folder = installers[engine](python, lambda line: click.echo(line, err=True))
    click.echo(f"{engine}: {folder}")


def main() -> None:
    """Run the command line and exit with its code: see `owl_deploy.errors`."""
    _stopped_by.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        sys.exit(cli.main(standalone_mode=False))
    except SystemExit:
        raise
    except BaseException as error:
        # Whatever it is by now: native code of libraries turns an interrupt into errors of its own.
        if _stopped_by:
            word = "interrupted" if _stopped_by[0] == signal.SIGINT else "terminated"
            _leave(f"{word}: {_STOPPED}", 128 + _stopped_by[0])
        _explain(error)
        raise


_stopped_by: list[int] = []
"""Signals that arrived and ask this process to end."""
_STOPPED = "nothing half-written was left; prune and run continue with --resume, sweep by itself"


def _stop(number: int, _: FrameType | None) -> None:
    _stopped_by.append(number)
    raise KeyboardInterrupt


def _stop_if_asked() -> None:
    """Raise again what was lost: Python drops an exception raised inside a destructor."""
    if _stopped_by:
        raise KeyboardInterrupt


def _explain(error: BaseException) -> None:
    """Exit with one sentence where the error is one that a user can do something about."""
    if isinstance(error, click.ClickException):
        error.show()
        _leave(error.format_message(), error.exit_code, is_shown=True)
    if isinstance(error, OwlDeployError):
        _leave(str(error), error.exit_code)
    if isinstance(error, ModuleNotFoundError):
        _leave(
            f"{error.name} is not installed: pip install 'owl-deploy[prune]' brings what pruning and exporting need", 1
        )
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            os._exit(1)
        _leave(f"{error.strerror or error}: {error.filename or 'no file named'}", 1)
    if isinstance(error, MemoryError):
        _leave("out of memory: lower n_samples or seq_len, or free some memory", 1)


def _leave(message: str, code: int, *, is_shown: bool = False) -> None:
    """Say what went wrong in one sentence, as JSON too where that was asked for, and exit."""
    message = " ".join(message.splitlines())  # what libraries say may have many lines
    if not is_shown:
        click.echo(f"owl-deploy: {message}", err=True)
    if "--json" in sys.argv:
        print_json({"error": message, "exit_code": code})
    sys.exit(code)
