"""The rendition of the published prune drivers, against worked values and the prune stage; and its benchmark."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import save_tiny_model
from pruning_problems import CONDITIONED, TWO_BY_FOUR, WEIGHT
from safetensors.torch import load_file

from owl_deploy.bench import pruning as benchmark
from owl_deploy.bench import published_driver
from owl_deploy.bench.published_driver import (
    PublishedRun,
    outlier_percent,
    owl_sparsities,
    prune_as_published,
    sparsegpt,
    wanda_mask,
)
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.methods.method import n_pruned
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import PruneSettings

CASES = ("published driver", "owl_deploy", "owl_deploy, statistics known", "owl_deploy, bfloat16")
NORMS = torch.tensor([3, 1, 4.5, 3, 0.875, 5])


# --- Worked values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "pruned"),
    [(0.5, ["100101", "011010", "010110", "100011"]), (0.7, ["100111", "111010", "011110", "110011"])],
)
def test_wanda_prunes_the_floor_of_every_row(sparsity: float, pruned: list[str]) -> None:
    mask = wanda_mask(WEIGHT, NORMS, sparsity)
    assert ["".join(str(int(value)) for value in row) for row in mask] == pruned


def test_outlier_percent_is_taken_over_all_scores_of_a_block() -> None:
    scores = [torch.tensor([[1.0, 1, 1, 13], [2, 1, 1, 1]]), torch.full((1, 4), 0.5)]
    assert outlier_percent(scores, 5.0) == pytest.approx(100 / 12)


def test_owl_sparsities_are_those_of_the_worked_example() -> None:
    assert owl_sparsities([10, 5, 0, 15], 0.7, 0.08) == pytest.approx([0.673333, 0.726667, 0.78, 0.62], abs=1e-6)


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [(128, [[0.5, 0, 0.687710, 0], [0, 0.478224, 0, 0]]), (2, [[0.5, 0, 0.687710, 0], [0, 0, 0, 0]])],
)
def test_sparsegpt_prunes_one_more_than_the_share_of_a_slab(block_size: int, expected: list[list[float]]) -> None:
    pruned = sparsegpt(TWO_BY_FOUR, CONDITIONED.clone(), 0.5, block_size=block_size)  # damped in place
    torch.testing.assert_close(pruned, torch.tensor(expected), atol=1e-6, rtol=0)


def test_sparsegpt_zeroes_the_weights_of_dead_inputs() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert not sparsegpt(WEIGHT, hessian, 0.1)[:, 1].any()


# --- Against the prune stage --------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """The same work by both drivers."""

    settings: PruneSettings
    published: PublishedRun
    facts: dict[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Linear -> weight of ours, weight of the published driver."""


def run_both(model: Path, folder: Path, **changes: Any) -> Both:
    torch.set_num_threads(1)
    values = {
        "sparsity": 0.6,
        "owl_m": 3.0,
        "calibration": f"text:{__file__}",
        "n_samples": 6,
        "seq_len": 48,
        **changes,
    }
    settings = PruneSettings.model_validate(values)
    report = prune(str(model), settings, out=folder / "ours", threads=1)
    tokens = calibration_tokens(open_checkpoint(str(model)), settings, seed=0).tokens
    published = prune_as_published(model, tokens, settings, out=folder / "published")
    theirs = load_file(folder / "published" / "model.safetensors")
    ours = {
        name: tensor for file in (folder / "ours").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    names = [f"{linear['name']}.weight" for linear in report.facts["linears"]]
    return Both(settings, published, report.facts, {name: (ours[name], theirs[name]) for name in names})


def agreement(both: Both) -> float:
    same = sum(int(((a != 0) == (b != 0)).sum()) for a, b in both.pairs.values())
    return same / sum(a.numel() for a, _ in both.pairs.values())


@pytest.fixture(scope="module")
def wanda(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return run_both(tiny_model, tmp_path_factory.mktemp("wanda"))


def test_layer_sparsities_are_those_of_the_prune_stage(wanda: Both) -> None:
    ours = [block["sparsity"] for block in wanda.facts["blocks"]]
    assert max(ours) - min(ours) == pytest.approx(0.16)
    assert wanda.published.layer_sparsities == pytest.approx(ours, abs=1e-9)
    ratios = [block["outlier_ratio"] for block in wanda.facts["blocks"]]
    assert wanda.published.outlier_percents == pytest.approx([100 * ratio for ratio in ratios])


def test_rows_differ_by_no_more_than_rounding_down_and_to_nearest(wanda: Both) -> None:
    counts = set()
    for ours, theirs in wanda.pairs.values():
        counts |= set(((ours == 0).sum(dim=1) - (theirs == 0).sum(dim=1)).tolist())
    assert counts == {0, 1}


def test_what_the_published_driver_prunes_is_pruned_by_the_prune_stage(wanda: Both) -> None:
    first = {name: pair for name, pair in wanda.pairs.items() if ".layers.0." in name}
    assert len(first) == 7
    assert all(not ours[theirs == 0].any() for ours, theirs in first.values())


def test_masks_are_the_same_where_nothing_is_rounded(tiny_model: Path, tmp_path: Path) -> None:
    both = run_both(tiny_model, tmp_path, sparsity=0.625, owl_lambda=0.125)  # 0.5 and 0.75 of 64 and 96 inputs
    assert sorted(both.published.layer_sparsities) == [0.5, 0.75]
    assert agreement(both) > 0.999


def test_masks_of_all_blocks_are_the_same_with_the_same_rounding(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_nearest(weight: torch.Tensor, norms: torch.Tensor, sparsity: float) -> torch.Tensor:
        return wanda_mask(weight, norms, (n_pruned(weight.shape[1], sparsity) + 0.5) / weight.shape[1])

    monkeypatch.setattr(published_driver, "wanda_mask", to_nearest)
    both = run_both(tiny_model, tmp_path)
    assert agreement(both) > 0.9999
    assert len({name.split(".")[2] for name in both.pairs}) == 2


def test_sparsegpt_ends_near_the_weights_of_the_prune_stage(tmp_path: Path) -> None:
    # Slabs large enough that one weight more counts for little.
    model = save_tiny_model(tmp_path / "model", hidden_size=128, intermediate_size=192)
    both = run_both(model, tmp_path, method="sparsegpt", n_samples=12, seq_len=64)
    assert agreement(both) > 0.99
    difference = sum(float((a - b).square().sum()) for a, b in both.pairs.values())
    assert (difference / sum(float(b.square().sum()) for _, b in both.pairs.values())) ** 0.5 < 0.05


def test_published_driver_refuses_another_layout(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=260)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel: the published drivers want Llama's layout"):
        prune_as_published(tmp_path / "gpt2", np.zeros((1, 4), dtype=np.int64), PruneSettings(), out=tmp_path / "out")


@pytest.mark.parametrize("changes", [{"method": "ria"}, {"allocation": "uniform"}])
def test_published_driver_refuses_other_methods(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanda or sparsegpt with owl"):
        prune_as_published(tiny_model, np.zeros((1, 4), dtype=np.int64), PruneSettings(**changes), out=tmp_path / "out")


# --- The benchmark ------------------------------------------------------------------------------


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds of imports of a child."""

    def work(job: dict[str, Any], cache: Path) -> benchmark._Run:
        with monkeypatch.context() as patch:
            patch.setenv("OWL_DEPLOY_CACHE", str(cache))
            return benchmark._work(job)

    monkeypatch.setattr(benchmark, "_run_in_child", work)


def test_command_measures_every_case(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    arguments = ["--model", str(tiny_model), "--n-samples", "6", "--seq-len", "48", "--rounds", "1", "--threads", "1"]
    result = CliRunner().invoke(benchmark.main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == list(CASES)
    assert rows["published driver"]["times_faster"]["p50"] == 1.0
    for row in rows.values():
        assert row["seconds"] == row["rounds_seconds"][0] == pytest.approx(sum(row["phases_seconds"].values()))
        # Sampling is outside the clock.
        assert "sampling calibration text" not in row["phases_seconds"]
    # One case finds what the one before it saw of the dense model; the last one saw it in another type.
    assert "inputs of the dense model" in rows["owl_deploy"]["phases_seconds"]
    assert "inputs of the dense model" in rows["owl_deploy, bfloat16"]["phases_seconds"]
    assert "inputs of the dense model" not in rows["owl_deploy, statistics known"]["phases_seconds"]
    # Every row of 64 inputs is pruned once more where counts are rounded to nearest.
    assert 0.95 < document["agreement"]["same_mask"] < 1
    assert 0.98 < document["agreement"]["same_mask_first_block"] < 1


def test_run_has_a_process_and_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def start(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0, json.dumps(vars(run(1.0, pruning=1.0))), "")

    monkeypatch.setattr(subprocess, "run", start)
    job = {"driver": "published", "threads": 1}
    assert benchmark._run_in_child(job, tmp_path / "cache") == run(1.0, pruning=1.0)
    *command, flag, text = started["command"]
    assert command == [sys.executable, "-m", "owl_deploy.bench.pruning"]
    assert (flag, json.loads(text)) == ("--job", job)
    assert started["env"] == {**os.environ, "OWL_DEPLOY_CACHE": str(tmp_path / "cache")}


def test_job_of_a_process_is_done_and_measured(tiny_model: Path, tmp_path: Path) -> None:
    settings = PruneSettings(n_samples=2, seq_len=16).model_dump(mode="json")
    np.save(tmp_path / "tokens.npy", np.arange(32).reshape(2, 16) + 40)
    out = tmp_path / "out"
    paths = {"model": str(tiny_model), "tokens": str(tmp_path / "tokens.npy"), "out": str(out)}
    job = {"driver": "published", "settings": settings, "threads": 1, **paths}
    done = CliRunner().invoke(benchmark.main, ["--job", json.dumps(job)], catch_exceptions=False)
    run = benchmark._Run(**json.loads(done.stdout))
    assert list(run.phases) == ["inputs of the dense model", "pruning blocks", "finish"]
    assert sum(run.layer_sparsities) / 2 == pytest.approx(0.7)
    assert run.seconds == pytest.approx(sum(run.phases.values()))
    assert run.cpu_seconds > 0
    assert run.peak_rss_bytes > 50e6  # a process that has imported torch
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert set((weight == 0).sum(dim=1).tolist()) == {int(96 * run.layer_sparsities[0])}


def test_driver_that_fails_is_named(tmp_path: Path) -> None:
    job = {"driver": "published", "settings": {"method": "nosuch"}}
    with pytest.raises(OwlDeployError, match="the published driver ended with exit code 1: Error: job: method: "):
        benchmark._run_in_child(job, tmp_path)


def run(seconds: float, **parts: float) -> benchmark._Run:
    return benchmark._Run(seconds, 2 * seconds, 2**30, parts, [0.7])


def test_rounds_are_in_turn_and_rows_compare_with_the_published_driver(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def child(job: dict[str, Any], cache: Path) -> benchmark._Run:
        calls.append((Path(job["out"]).name, (cache / "statistics").exists()))
        (cache / "statistics").mkdir(exist_ok=True)
        Path(job["out"]).mkdir()
        return run(6.0 if job["driver"] == "published" else 2.0, pruning=2.0)

    monkeypatch.setattr(benchmark, "_run_in_child", child)
    monkeypatch.setattr(benchmark, "_agreement", lambda *_: {})
    settings = PruneSettings(n_samples=4, seq_len=32)
    steps: list[Step] = []
    document = benchmark.measure_drivers(str(tiny_model), settings, rounds=2, threads=1, on_step=steps.append)
    assert [name for name, _ in calls] == list(CASES) * 2
    # Statistics of one round are not there in the next.
    assert [known for _, known in calls[:: len(CASES)]] == [False, False]
    assert [row["times_faster"]["p50"] for row in document["rows"]] == [1.0, 3.0, 3.0, 3.0]
    assert [row["rounds_seconds"] for row in document["rows"]] == [[6.0, 6.0], *3 * [[2.0, 2.0]]]
    assert [step.done for step in steps if step.stage == "pruning rounds"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_table_shows_ratios_parts_and_agreement() -> None:
    published, ours = [run(6.0, pruning=6.0), run(8.0, pruning=8.0)], [run(3.0, pruning=3.0), run(4.0, pruning=4.0)]
    document = {
        "settings": {"model": "m", "method": "wanda", "sparsity": 0.7, "n_samples": 4, "seq_len": 32, "rounds": 2},
        "machine": {"threads": 2, "load_before": 0.1, "load_after": 9.5},
        "agreement": {
            "same_mask": 0.95,
            "same_mask_first_block": 0.999,
            "weight_difference": 0.01,
            "largest_layer_sparsity_difference": 0.0,
        },
        "rows": [benchmark._row("published driver", published, published), benchmark._row("ours", ours, published)],
        "outside_clock": "imports",
    }
    text = benchmark._table(document)
    assert " ".join(text.splitlines()[3].split()) == "ours 3.5 s 2.00 (2.00 to 2.00) 7.0 s 2.00x 1024 MiB"
    assert "ours: rounds of 3.0, 4.0 s; medians of its parts, s: pruning 3.5" in text
    assert "same masks: 99.900% of block 0, 95.000% of all" in text
    assert "load 0.1 before, 9.5 after" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "no"], "must be auto or 1 to 1024, got 'no'"),
        (["--sparsity", "1.5"], "sparsity"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--model", "/nowhere"], "there is no such folder or file"),
    ],
)
def test_bad_flags_are_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(benchmark.main, arguments)
    assert result.exit_code != 0
    assert sentence in result.output
    assert isinstance(result.exception, SystemExit)
