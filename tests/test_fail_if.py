"""Conditions under which a bench does not pass: how they are read, which rows they speak of, and what they cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import SMALL_BENCH, TEXT, Call, call
from conftest import save_tiny_model
from test_report import FAILED, bench_result, bench_row

from owl_deploy.bench.gate import failed_conditions
from owl_deploy.condition import QUANTITIES, Condition, parse_condition
from owl_deploy.errors import RecipeError
from owl_deploy.recipe import recipe_from_mapping

FAST = bench_row("onnxruntime", "fast", 9.5)  # 2x the baseline's 19 ms, perplexity 812
SLOW = bench_row("onnxruntime", "slow", 38.0, perplexity=33.0)


# Reading.


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("speedup<1.5", Condition("speedup", "<", 1.5)),
        (" perplexity >= 30 ", Condition("perplexity", ">=", 30.0)),
        ("ms.p90<=1e1", Condition("ms.p90", "<=", 10.0)),
        ("peak_rss_bytes>2.5E+9", Condition("peak_rss_bytes", ">", 2.5e9)),
        ("kl_divergence>-.5", Condition("kl_divergence", ">", -0.5)),
    ],
)
def test_condition_is_read(text: str, condition: Condition) -> None:
    assert parse_condition(text) == condition


def test_condition_reads_itself() -> None:
    for quantity in QUANTITIES:
        condition = Condition(quantity, "<=", 0.125)
        assert parse_condition(str(condition)) == condition


@pytest.mark.parametrize(
    "text",
    [
        "",
        "speedup",
        "speedup<",
        "<1.5",
        "speedup=1.5",
        "speedup==1.5",
        "speedup<>1.5",
        "speedup < 1.5x",
        "speedup<1,5",
        "speedup<1.5.2",
        "speedup<nan",
        "speedup<inf",
        "speedup<1e999",
        "1.5>speedup",
        "speedup<1.5 and perplexity>30",
        "speedup<\u0661",
        "__import__('os')<1",
    ],
)
def test_text_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no condition: write a quantity, one of < <= > >=, and a number"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("speed_up<1.5", "speedup"), ("perplexty>30", "perplexity"), ("ms.p95>3", "ms.p9"), ("Speedup<2", "speedup")],
)
def test_unknown_quantity_names_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown quantity .*; did you mean {nearest}"):
        parse_condition(text)


def test_quantity_near_nothing_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"known are speedup, .*ceiling_fraction"):
        parse_condition("joules>3")


@pytest.mark.parametrize(
    ("comparison", "held"), [("<", [True, False, False]), ("<=", [True, True, False]), (">", [False, False, True])]
)
def test_comparison_is_strict_only_where_it_says_so(comparison: Any, held: list[bool]) -> None:
    condition = Condition("perplexity", comparison, 30.0)
    assert [condition.holds(value) for value in (29.0, 30.0, 31.0)] == held


# Judging.


def test_every_row_and_condition_that_fails_is_named() -> None:
    found = failed_conditions(bench_result(FAST, SLOW), ["speedup<1.5", "perplexity>30"])
    assert found == [
        "speedup<1.5: slow in onnxruntime, Decode, batch 1, 256 tokens of context: speedup 0.5",
        "perplexity>30: dense in onnxruntime, Decode, batch 1, 256 tokens of context: perplexity 31.4",
        "perplexity>30: fast in onnxruntime, Decode, batch 1, 256 tokens of context: perplexity 812.4",
        "perplexity>30: slow in onnxruntime, Decode, batch 1, 256 tokens of context: perplexity 33",
    ]


@pytest.mark.parametrize(
    "condition", ["speedup<0.1", "speedup.low<0.1", "ms.p50>100", "top1_agreement<0.1", "sparsity>0.9"]
)
def test_rows_that_do_not_meet_it_pass(condition: str) -> None:
    assert failed_conditions(bench_result(FAST, SLOW), [condition]) == []


def test_no_condition_fails_nothing() -> None:
    assert failed_conditions(bench_result(FAST, FAILED), []) == []


def test_baseline_has_no_speedup_to_be_asked_for() -> None:
    baseline = bench_result(FAST)
    baseline["rows"][0]["speedup"] = {"p50": 1.0, "low": 1.0, "high": 1.0}
    assert failed_conditions(baseline, ["speedup<1.5"]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parity": None}, "parity not checked"),
        ({"parity": {"passed": False}}, "parity failed"),
        ({"perplexity": None}, "perplexity unknown"),
    ],
)
def test_void_speedup_fails_however_large(change: dict[str, Any], words: str) -> None:
    assert [words in found for found in failed_conditions(bench_result(FAST | change), ["speedup<0.1"])] == [True]


def test_speedup_without_a_baseline_fails() -> None:
    result = bench_result(FAST)
    result["rows"][0] |= {"status": "failed", "reason": "aborted", "ms": None}
    assert "the baseline has no result" in failed_conditions(result, ["speedup<0.1"])[0]


@pytest.mark.parametrize(
    ("condition", "change", "words"),
    [
        ("perplexity>30", {"perplexity": float("nan")}, "perplexity unknown"),
        ("kl_divergence>9", {"kl_divergence": None}, "kl_divergence unknown, it needs --reference"),
        ("ms.p99>100", {}, "ms.p99 unknown, it needs 100 samples"),
    ],
)
def test_unknown_figure_fails(condition: str, change: dict[str, Any], words: str) -> None:
    found = failed_conditions(bench_result(FAST | change), [condition])
    assert any("fast" in sentence and words in sentence for sentence in found)


def test_infinite_perplexity_fails_below_no_limit() -> None:
    assert failed_conditions(bench_result(FAST | {"perplexity": float("inf")}), ["perplexity>1e300"]) != []


def test_prefill_is_not_asked_for_bytes_per_step() -> None:
    prefill = FAST | {"phase": "prefill", "prompt_len": 256, "past_len": 0, "bytes_per_step": None}
    assert failed_conditions(bench_result(prefill), ["bytes_per_step>1e12"]) == []


def test_failed_row_is_passed_over() -> None:
    assert failed_conditions(bench_result(FAST, FAILED), ["speedup<1.5"]) == []


def test_condition_that_no_row_can_answer_fails() -> None:
    assert failed_conditions(bench_result(FAILED), ["speedup<1.5"]) == [
        "speedup<1.5: no row has speedup, so nothing was checked"
    ]


def test_every_quantity_is_found_in_a_row() -> None:
    """A misspelt name in the list would be unknown in every row."""
    row = FAST | {"ms": {"p50": 9.5, "p90": 10.0, "p99": 11.0, "min": 9.0, "n": 200}}
    for quantity in QUANTITIES:
        found = failed_conditions(bench_result(row), [f"{quantity}>-1"])
        assert any("fast" in sentence and "unknown" not in sentence for sentence in found), quantity


# The command and the recipe.


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fail-if")
    model = save_tiny_model(folder / "model")
    flags = ("--weights", "dense", "--max-positions", "256", "--threads", "1", "--quiet")
    assert call("export", model, *flags, "--out", folder / "artifact").code == 0
    return folder / "artifact"


def bench(artifact: Path, out: Path, *flags: str) -> Call:
    return call(
        "bench", artifact, "--baseline", "artifact", "--text", TEXT, *SMALL_BENCH, "--quiet", *flags, "--out", out
    )


def test_failed_condition_is_exit_code_3_with_the_report_written(artifact: Path, tmp_path: Path) -> None:
    flags = ("--fail-if", "perplexity>0", "--fail-if", "ms.p50<0", "--fail-if", "sparsity<0.5", "--json")
    done = bench(artifact, tmp_path / "r", *flags)
    assert done.code == 3
    assert [line.split()[2] for line in done.stderr.splitlines()] == ["perplexity>0:"] * 2 + ["sparsity<0.5:"] * 2
    assert len(done.document["failed_conditions"]) == 4
    assert json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))["rows"]


def test_conditions_that_pass_are_exit_code_0(artifact: Path, tmp_path: Path) -> None:
    done = bench(artifact, tmp_path / "r", "--fail-if", "perplexity>1e9", "--fail-if", "load_ms>1e9")
    assert (done.code, done.stderr) == (0, "")


def test_wrong_condition_is_known_before_anything_is_measured(tmp_path: Path) -> None:
    done = bench(tmp_path / "nowhere", tmp_path / "r", "--fail-if", "perplexity>30", "--fail-if", "sped<1")
    assert done.code == 2
    assert "unknown quantity 'sped'" in done.sentence
    assert not (tmp_path / "r").exists()


def recipe(*conditions: str) -> dict[str, Any]:
    return {
        "model": "demo:smollm2-135m",
        "export": [{"name": "dense", "checkpoint": "dense"}],
        "bench": {"baseline": "dense", "fail_if": list(conditions)},
    }


def test_recipe_may_hold_conditions() -> None:
    found = recipe_from_mapping(yaml.safe_load(yaml.safe_dump(recipe("speedup<1.5"))), where="x.yaml")
    assert found.bench is not None
    assert found.bench.fail_if == ("speedup<1.5",)


def test_wrong_condition_in_a_recipe_names_the_key() -> None:
    with pytest.raises(RecipeError, match=r"fail_if.*is no condition"):
        recipe_from_mapping(recipe("speedup!"), where="x.yaml")


def test_other_conditions_judge_a_report_that_is_there(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "model": str(save_tiny_model(tmp_path / "model")),
        "threads": 1,
        "prune": {"method": "magnitude", "allocation": "uniform"},
        "export": [{"name": "dense", "checkpoint": "dense", "weights": "dense", "max_positions": 128}],
        "eval": {"text": TEXT, "window": 64, "max_windows": 1},
        "bench": {
            **{"baseline": "dense", "past_len": [8], "prompt_len": [8], "rounds": 2},
            **{"decode_samples": 2, "prefill_samples": 1},
        },
    }
    file, report = tmp_path / "recipe.yaml", tmp_path / "out" / "report" / "report.json"
    made = []
    for conditions, code in (([], 0), (["perplexity>0"], 3), (["perplexity>1e9"], 0)):
        content["bench"]["fail_if"] = conditions
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        done = call("run", file, "--out", tmp_path / "out", "--quiet")
        assert done.code == code
        made.append(report.read_bytes())
    assert made == [made[0]] * 3
