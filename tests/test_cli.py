from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import tomllib
import yaml
from command_line import SMALL_BENCH, SMALL_PRUNE, TEXT, Call, call
from conftest import OwlDeploy

from owl_deploy.cli import cli
from owl_deploy.export import parity
from owl_deploy.recipe import BenchSettings, EvalSettings, ExportSettings, PruneSettings, load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EVAL = ("--text", TEXT, "--window", "64", "--max-windows", "1", "--threads", "1")


def commands(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by the words that call it, groups included."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")


COMMANDS = dict(commands())


def options(command: click.Command) -> dict[str, click.Option]:
    return {option.opts[0]: option for option in command.params if isinstance(option, click.Option)}


# Help.


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_ends_with_an_example_of_that_command(name: str) -> None:
    done = call(*name.split(), "--help")
    assert (done.code, done.stderr) == (0, "")
    _, _, behind = done.stdout.partition("Example:\n")
    example = behind.split("\n\n")[0].replace("\\\n", " ")
    assert " ".join(example.split()).startswith(f"owl-deploy {name}".strip())


@pytest.mark.parametrize("name", [name for name in COMMANDS if not isinstance(COMMANDS[name], click.Group)])
def test_example_in_the_help_is_a_valid_command_line(name: str) -> None:
    text = (COMMANDS[name].help or "").partition("Example:")[2].replace("\\\n", " ")
    words = shlex.split(text)
    assert words[: 1 + len(name.split())] == ["owl-deploy", *name.split()]
    command = COMMANDS[name]
    command.make_context(name, words[1 + len(name.split()) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_flag_says_what_it_does(name: str) -> None:
    assert (COMMANDS[name].help or "").strip()
    assert [flag for flag, option in options(COMMANDS[name]).items() if not (option.help or "").strip()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_flag_works(name: str) -> None:
    assert call(*name.split(), "-h").stdout == call(*name.split(), "--help").stdout


def test_help_imports_no_heavy_library() -> None:
    """Imports of these take seconds; --help and --version must answer at once."""
    code = (
        "import sys; from owl_deploy.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = ('torch', 'transformers', 'onnxruntime', 'onnx', 'datasets', 'numpy', 'scipy', 'plotly')\n"
        "assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)"
    )
    for arguments in (["--help"], ["run", "--help"], ["prune", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_package_imports_no_heavy_library() -> None:
    code = "import sys, owl_deploy; assert not {'torch', 'numpy', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_the_projects(owl_deploy: OwlDeploy) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = owl_deploy("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"owl-deploy {version}\n", "")


def test_without_a_command_it_shows_its_help() -> None:
    done = call()
    assert done.code == 2
    assert all(name in done.stderr for name in cli.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_every_command(name: str) -> None:
    assert f"owl-deploy {name}" in (ROOT / "README.md").read_text()


def test_readme_names_no_flag_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^\s*(?:\$ )?owl-deploy (.*)$", text, flags=re.MULTILINE):
        name = next((name for name in sorted(COMMANDS, key=len, reverse=True) if line.startswith(name)), None)
        if name is None:
            continue
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", line):
            assert flag in [*options(COMMANDS[name]), "--help"], line


# Recipes.


def test_there_are_recipes() -> None:
    assert [path.name for path in RECIPES].count("quickstart.yaml") == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads_and_begins_by_saying_what_it_is_for(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert re.match(r"# \S.{20}", first)
    assert load_recipe(path).model


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("prune", [PruneSettings]),
        ("eval", [EvalSettings]),
        ("export", [ExportSettings]),
        ("bench", [BenchSettings, EvalSettings]),
    ],
)
def test_flags_are_recipe_keys_with_their_defaults(name: str, kinds: list[Any]) -> None:
    found = options(COMMANDS[name])
    for kind in kinds:
        for key, field in kind.model_fields.items():
            option = found[f"--{key.replace('_', '-')}"]
            text = " ".join((option.help or "").split())
            assert text.startswith(" ".join((field.description or "").split()))
            if field.default not in (None, ()):
                shown = field.default if not isinstance(field.default, tuple) else " ".join(map(str, field.default))
                assert text.endswith(f"[default: {shown}]")


def test_flags_that_are_no_recipe_keys_are_known() -> None:
    """A new key must become a flag by itself; what else there is, is listed here."""
    common = {"--threads", "--offline", "--quiet", "--json", "--out", "--force"}
    own = {
        "prune": {"--model", "--seed", "--resume", "--device", "--max-memory"},
        "eval": {"--reference", "--tasks", "--tasks-path", "--limit", "--num-fewshot"},
        "export": {"--no-parity"},
        "bench": {"--baseline", "--reference", "--seed"},
    }
    for name, extra in own.items():
        keys = {
            key for kind in (PruneSettings, EvalSettings, ExportSettings, BenchSettings) for key in kind.model_fields
        }
        flags = {flag for flag in options(COMMANDS[name]) if flag[2:].replace("-", "_") not in keys}
        assert flags <= common | extra, name


# Results.


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Call]:
    out = tmp_path_factory.mktemp("cli") / "sparse"
    return out, call("prune", "--model", tiny_model, *SMALL_PRUNE, "--out", out, "--json")


@pytest.fixture(scope="module")
def exported(pruned: tuple[Path, Call], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Call]:
    out = tmp_path_factory.mktemp("cli") / "artifact"
    flags = ("--weights", "sparse-initializer", "--max-positions", "256", "--threads", "1")
    return out, call("export", pruned[0], *flags, "--out", out, "--json")


def test_prune_prints_one_document(pruned: tuple[Path, Call]) -> None:
    out, done = pruned
    assert done.code == 0, done.stderr
    document = done.document
    assert document["checkpoint"] == str(out)
    keys = {"checkpoint", "method", "allocation", "pattern", "sparsity", "blocks", "linears", "seconds"}
    assert keys | {"peak_rss_bytes", "tokens_sha256"} <= document.keys()
    assert {"target", "linears", "model"} <= document["sparsity"].keys()
    assert all({"index", "sparsity", "outlier_ratio"} <= block.keys() for block in document["blocks"])
    assert all({"name", "shape", "sparsity"} <= linear.keys() for linear in document["linears"])


def test_peak_memory_is_promised_before_and_reported_after(tiny_model: Path, tmp_path: Path) -> None:
    done = call("prune", "--model", tiny_model, *SMALL_PRUNE, "--out", tmp_path / "out")
    promise = re.search(r"predicted peak memory: (\d+\.\d\d) GiB", done.stderr)
    result = re.search(r"peak memory (\d+\.\d\d) GiB", done.stdout)
    assert promise is not None
    assert result is not None
    assert done.stderr.index("predicted peak memory") < done.stderr.index("pruning blocks")
    assert abs(float(promise[1]) - float(result[1])) < 0.3


def test_quiet_says_nothing_on_stderr(tiny_model: Path, tmp_path: Path) -> None:
    done = call("prune", "--model", tiny_model, *SMALL_PRUNE, "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    assert f"Checkpoint: {tmp_path / 'out'}" in done.stdout


def test_export_prints_one_document(exported: tuple[Path, Call]) -> None:
    out, done = exported
    assert done.code == 0, done.stderr
    document = done.document
    assert document["artifact"] == str(out)
    keys = {"artifact", "target", "weights", "precision", "bytes_on_disk", "bytes_dense", "sparsity", "parity"}
    assert keys <= document.keys()
    assert {"max_abs_logit_difference", "kl_divergence", "top1_agreement"} <= document["parity"].keys()


def test_eval_prints_one_document(tiny_model: Path, pruned: tuple[Path, Call], exported: tuple[Path, Call]) -> None:
    document = call("eval", exported[0], *EVAL, "--reference", tiny_model, "--json").document
    assert {"perplexity", "window", "n_windows", "text", "kl_divergence", "top1_agreement"} <= document.keys()
    both = call("eval", exported[0], pruned[0], *EVAL, "--json").document["evaluations"]
    assert [item["model"] for item in both] == [str(exported[0]), str(pruned[0])]
    assert both[0]["perplexity"] == pytest.approx(both[1]["perplexity"], rel=1e-4)


def test_eval_prints_the_perplexity_of_every_model(pruned: tuple[Path, Call], tiny_model: Path) -> None:
    done = call("eval", pruned[0], tiny_model, *EVAL, "--quiet")
    assert done.code == 0
    assert done.stdout.index(str(pruned[0])) < done.stdout.index(str(tiny_model))
    assert done.stdout.count("perplexity") == 2


def test_bench_prints_one_document(exported: tuple[Path, Call], tmp_path: Path) -> None:
    done = call("bench", exported[0], "--baseline", "artifact", *SMALL_BENCH, "--out", tmp_path / "report", "--json")
    assert done.code == 0, done.stderr
    document = done.document
    assert document["report"] == str(tmp_path / "report")
    assert document["baseline"] == "artifact"
    assert document["machine"]
    assert [row["phase"] for row in document["rows"]] == ["decode", "prefill"]
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["rows"] == document["rows"]
    assert sorted(item.name for item in (tmp_path / "report").iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_engines_list_prints_one_document_or_a_line_each() -> None:
    document = call("engines", "list", "--json").document
    names = ["onnxruntime", "deepsparse", "llama.cpp", "openvino", "onnxruntime-genai", "torch"]
    assert [engine["name"] for engine in document["engines"]] == names
    assert document["engines"][0]["is_available"]
    assert len(call("engines", "list").stdout.splitlines()) == len(names)


# Errors as JSON, and exit codes.


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("prune", "--model", "./nosuch", "--out", "OUT"), 1),
        (("prune", "--model", "./nosuch", "--sparsity", "2", "--out", "OUT"), 2),
        (("prune", "--out", "OUT"), 2),
        (("prune", "--model", "./nosuch", "--out", "OUT", "--threads", "0"), 2),
        (("eval", "./nosuch"), 1),
        (("export", "./nosuch", "--out", "OUT", "--target", "nosuch"), 2),
        (("bench", "./nosuch", "--baseline", "x", "--out", "OUT"), 1),
        (("run", "./nosuch.yaml"), 2),
        (("nosuch",), 2),
    ],
)
def test_error_is_one_document_too(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    done = call(*(str(tmp_path / "out") if word == "OUT" else word for word in arguments), "--json", "--quiet")
    assert done.code == code
    assert done.document["exit_code"] == code
    assert len(done.document["error"].splitlines()) == 1
    assert done.document["error"] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failed_gate_is_exit_code_3_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.MAX_RELATIVE_DIFFERENCE, "fp32", 0.0)
    done = call("export", tiny_model, "--max-positions", "256", "--out", tmp_path / "out", "--quiet", "--threads", "1")
    assert done.code == 3
    assert "logits differ from the checkpoint by" in done.sentence
    assert list(tmp_path.iterdir()) == []


def test_missing_engine_is_exit_code_4_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))  # so no bridge is installed
    flags = ("--target", "deepsparse", "--max-positions", "256", "--threads", "1")
    done = call("export", tiny_model, *flags, "--out", tmp_path / "out", "--quiet")
    assert done.code == 4
    assert "owl-deploy engines install deepsparse" in done.sentence
    assert list(tmp_path.iterdir()) == []


def test_missing_library_says_what_to_install(tmp_path: Path) -> None:
    """An image that serves artifacts has no torch."""
    code = "import sys; sys.modules['torch'] = None; from owl_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "prune", "--model", "./nosuch", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("owl-deploy: torch is not installed: pip install 'owl-deploy[prune]'")
    assert len(done.stderr.splitlines()) == 1


def test_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m owl_deploy engines list --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


# The whole line.


def small_recipe(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "threads": 1,
        "prune": {"sparsity": 0.5, "calibration": TEXT, "n_samples": 4, "seq_len": 32},
        "export": [
            {"name": "dense", "checkpoint": "dense", "max_positions": 256},
            {"name": "sparse", "checkpoint": "pruned", "weights": "sparse-initializer", "max_positions": 256},
        ],
        "eval": {"text": TEXT, "window": 64, "max_windows": 1},
        "bench": {
            "baseline": "dense",
            **{"past_len": [8], "prompt_len": [8], "rounds": 2, "decode_samples": 2, "prefill_samples": 1},
        },
    }


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Call]:
    """Calls of `run` one after the other into the same folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text("# A test.\n" + yaml.safe_dump(small_recipe(tiny_model)))
    command = ("run", folder / "r.yaml", "--out", folder / "out", "--json")
    return {
        "first": call(*command),
        "second": call(*command),
        "sparser": call(*command, "--sparsity", "0.75"),
        "forced": call(*command, "--sparsity", "0.75", "--force"),
    }


@pytest.mark.parametrize("name", ["first", "second", "sparser", "forced"])
def test_run_prints_one_document(runs: dict[str, Call], name: str) -> None:
    done = runs[name]
    assert done.code == 0, done.stderr
    assert {"checkpoint", "artifacts", "report", "rows"} <= done.document.keys()
    assert [row["artifact"] for row in done.document["rows"]] == ["dense", "sparse"] * 2
    assert all(row["speedup"] and row["kl_divergence"] is not None for row in done.document["rows"])


def test_first_run_makes_everything(runs: dict[str, Call]) -> None:
    assert "reusing" not in runs["first"].stderr
    assert all(stage in runs["first"].stderr for stage in ("pruning blocks", "writing weights", "checking parity"))


def test_second_run_reuses_everything_and_says_so(runs: dict[str, Call]) -> None:
    reused = re.findall(r"reusing the (sparse checkpoint|artifact|report)", runs["second"].stderr)
    assert reused == ["sparse checkpoint", "artifact", "artifact", "report"]
    assert "pruning blocks" not in runs["second"].stderr
    assert runs["second"].document == runs["first"].document


def test_other_sparsity_makes_only_what_depends_on_it(runs: dict[str, Call]) -> None:
    log = "".join(runs["sparser"].stderr.split())  # the terminal breaks lines
    assert len(re.findall("reusingthe", log)) == 1
    assert re.search("reusingtheartifact.*/dense", log)
    assert "pruning blocks" in runs["sparser"].stderr
    sparsities = [[row["sparsity"] for row in runs[name].document["rows"]] for name in ("first", "sparser")]
    assert sparsities[0] == pytest.approx([0, 0.5, 0, 0.5], abs=0.01)
    assert sparsities[1] == pytest.approx([0, 0.75, 0, 0.75], abs=0.01)


def test_force_makes_everything_anew(runs: dict[str, Call]) -> None:
    assert "reusing" not in runs["forced"].stderr


def test_report_with_a_failed_row_is_measured_again(runs: dict[str, Call]) -> None:
    folder = Path(runs["forced"].document["report"])
    measured = json.loads((folder / "report.json").read_text())
    measured["rows"][0].update(status="failed", reason="a test")
    (folder / "report.json").write_text(json.dumps(measured))
    recipe = folder.parent.parent / "r.yaml"
    done = call("run", recipe, "--out", folder.parent, "--sparsity", "0.75", "--json")
    assert done.code == 0
    assert done.stderr.count("reusing the artifact") == 2
    assert "reusing the report" not in done.stderr
    assert [row["status"] for row in done.document["rows"]] == ["ok"] * 4


def test_run_without_bench_prints_where_things_are(tiny_model: Path, tmp_path: Path) -> None:
    recipe = {key: value for key, value in small_recipe(tiny_model).items() if key not in ("bench", "export")}
    quality = recipe.pop("eval")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = call("run", tmp_path / "r.yaml", "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'out' / 'checkpoint'}\n")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "eval": quality}))
    done = call("run", tmp_path / "r.yaml", "--out", tmp_path / "out", "--quiet")
    assert done.code == 0
    assert done.stdout.splitlines()[0] == str(tmp_path / "out" / "checkpoint")
    assert "perplexity" in done.stdout


def test_flags_override_the_recipe(tiny_model: Path, tmp_path: Path) -> None:
    recipe = {key: value for key, value in small_recipe(tiny_model).items() if key not in ("bench", "export")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "model": "./nosuch", "seed": 5}))
    flags = ("--model", tiny_model, "--seed", "7", "--sparsity", "0.25", "--threads", "2", "--quiet")
    assert call("run", tmp_path / "r.yaml", "--out", tmp_path / "out", *flags).code == 0
    facts = json.loads((tmp_path / "out" / "checkpoint" / "owl.json").read_text())
    assert facts["recipe"]["model"] == str(tiny_model)
    assert facts["recipe"]["seed"] == 7
    assert facts["recipe"]["prune"]["sparsity"] == 0.25
