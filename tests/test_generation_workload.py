"""Generation end to end and batches in bench: known clocks, known tokens, and engines that cannot or do not answer."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import SMALL_BENCH, call

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.bench.comparison import workloads_of
from owl_deploy.bench.measure import Workload, _Case, _measure_workload, workloads
from owl_deploy.bench.report import markdown
from owl_deploy.bench.report_file import read_report
from owl_deploy.bench.statistics import generation_summary
from owl_deploy.engines import process
from owl_deploy.engines.process import open_engine
from owl_deploy.errors import EngineFailedError, RecipeError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import BenchSettings, ExportSettings, checked

MS = 10**6


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    out = tmp_path_factory.mktemp("generation") / "dense"
    export_onnx(str(tiny_model), ExportSettings(max_positions=64), out=out, parity=False)
    return open_artifact(out)


def bench(artifact: OnnxArtifact, out: Path, *more: Any) -> Any:
    text = ("--text", f"text:{Path(__file__).resolve()}")
    return call("bench", artifact.path, "--baseline", "dense", *text, *SMALL_BENCH, *more, "--out", out, "--json")


# Settings.


@pytest.mark.parametrize("text", ["128", "128x", "x64", "0x8", "8x0", "8x1", "8x-2", "8X8", "8x8x8", "1e3x8", ""])
def test_impossible_generation_is_refused_with_the_form_it_should_have(text: str) -> None:
    with pytest.raises(RecipeError, match=r"generate.*PROMPTxNEW"):
        checked(BenchSettings, {"generate": (text,)}, where="command line")


def test_batch_below_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch"):
        checked(BenchSettings, {"batch": ("0",)}, where="command line")


def test_workloads_are_those_of_every_batch_and_then_generation() -> None:
    plan = workloads(BenchSettings(batch=(1, 4), past_len=(8,), prompt_len=(16,), generate=("8x4",)))
    found = [(one.phase, one.batch, one.n_positions) for one in plan]
    assert found == [("decode", 1, 9), ("decode", 4, 9), ("prefill", 1, 16), ("prefill", 4, 16), ("generate", 1, 12)]


# Statistics.


def test_first_token_gaps_and_mean_per_token_are_told_apart() -> None:
    found = generation_summary([[[100 * MS, 2 * MS, 4 * MS, 12 * MS]], [[300 * MS, 2 * MS, 4 * MS, 12 * MS]]])
    assert found["ttft_ms"]["p50"] == 200
    assert (found["itl_ms"]["p50"], found["itl_ms"]["n"]) == (4, 6)
    assert found["itl_ms"]["p90"] == 12
    assert (found["tpot_ms"]["p50"], found["tpot_ms"]["n"]) == (6, 2)
    assert found["ttft_ms"]["speedup"] is None


def test_speedup_of_generation_is_that_of_each_metric() -> None:
    base = [[[90 * MS, 4 * MS, 4 * MS]]] * 3
    found = generation_summary([[[30 * MS, 8 * MS, 8 * MS]]] * 3, base)
    assert found["ttft_ms"]["speedup"] == {"p50": 3, "low": 3, "high": 3}
    assert found["itl_ms"]["speedup"]["p50"] == found["tpot_ms"]["speedup"]["p50"] == 0.5


# Engines.


def test_serving_loop_and_plain_loop_time_every_token(artifact: OnnxArtifact) -> None:
    for is_serving in (True, False):
        with open_engine(artifact, threads=1, n_tokens=1, capacity=24, is_serving=is_serving) as engine:
            answers = engine.generate(np.arange(16), 8, 2)
        assert [len(answer) for answer in answers] == [8, 8]
        assert min(min(answer) for answer in answers) > 0


def test_generation_beyond_the_cache_is_an_engine_failure(artifact: OnnxArtifact) -> None:
    with (
        open_engine(artifact, threads=1, n_tokens=1, capacity=10, is_serving=True) as engine,
        pytest.raises(EngineFailedError, match=r"failed at generate: .*the engine failed"),
    ):
        engine.generate(np.arange(8), 8, 1)


@pytest.mark.parametrize("last_only", [True, False])
def test_equal_sequences_have_the_logits_of_one(artifact: OnnxArtifact, last_only: bool) -> None:
    found = []
    for batch in (1, 3):
        with open_engine(
            artifact, threads=1, n_tokens=6, capacity=16, last_logits_only=last_only, batch=batch
        ) as engine:
            engine.forward(np.arange(6), 0)
            found.append(engine.forward(np.arange(6, 7), 6))
            assert len(engine.measure(np.arange(1), 7, 2)) == 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


# Bench.


def test_bench_reports_generation_and_keeps_every_gap(artifact: OnnxArtifact, tmp_path: Path) -> None:
    done = bench(artifact, tmp_path / "r", "--generate", "6x5")
    assert done.code == 0
    row = done.document["rows"][-1]
    assert (row["phase"], row["prompt_len"], row["n_new"], row["batch"]) == ("generate", 6, 5, 1)
    assert [[len(answer) for answer in answers] for answers in row["generations_ns"]] == [[5], [5]]
    assert row["samples_ns"] == [[sum(answer) for answer in answers] for answers in row["generations_ns"]]
    assert row["generation"]["itl_ms"]["n"] == 8
    assert row["tokens_per_s"] == pytest.approx(5e3 / row["ms"]["p50"])
    text = markdown(done.document)
    assert "## Generate, batch 1, prompt of 6 tokens, 5 new ones" in text
    assert "TTFT ms" in text.split("## Generate")[1]
    assert "TTFT ms" not in text.split("## Generate")[0]


def test_bench_of_a_batch_counts_the_tokens_of_all_sequences(artifact: OnnxArtifact, tmp_path: Path) -> None:
    done = bench(artifact, tmp_path / "r", "--batch", "1", "--batch", "3")
    rows = done.document["rows"]
    assert [(row["phase"], row["batch"]) for row in rows] == [
        ("decode", 1),
        ("decode", 3),
        ("prefill", 1),
        ("prefill", 3),
    ]
    assert rows[1]["tokens_per_s"] == pytest.approx(3e3 / rows[1]["ms"]["p50"])
    assert rows[3]["tokens_per_s"] == pytest.approx(24e3 / rows[3]["ms"]["p50"])
    kv = rows[1]["bytes_per_step"] - rows[0]["bytes_per_step"]
    assert kv == 2 * artifact.kv_bytes(8)


def test_engine_of_one_sequence_is_a_row_with_a_reason(
    artifact: OnnxArtifact, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = ("--batch", "2", "--peer", "torch", "--reference", tiny_model)
    done = bench(artifact, tmp_path / "r", *wanted)
    assert done.code == 1
    assert [row["status"] for row in done.document["rows"]] == ["ok", "failed"] * 2
    assert "one sequence at a time here, and 2 are asked for" in done.document["rows"][1]["reason"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("os.abort()", "crashed \\(signal SIGABRT\\)"),
        ("time.sleep(60)", "gave no answer for 2 s and was stopped"),
        ("answer({'ns': [[1, 2]]})", "did not generate 4 tokens"),
        ("answer({'ns': [[1, 2, 0, 3]]})", "did not generate 4 tokens"),
    ],
)
def test_engine_that_fails_in_generation_is_a_row_with_a_reason(
    answer: str, reason: str, artifact: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fake.py"
    program.write_text(
        textwrap.dedent(
            """
            import json, os, sys, time
            def answer(document):
                print(json.dumps(document), flush=True)
            for line in sys.stdin:
                request = json.loads(line)
                if request["command"] == "load":
                    answer({"version": "1", "load_ms": 1.0})
                elif request["command"] == "generate":
                    ANSWER
            """
        ).replace("ANSWER", answer)
    )
    monkeypatch.setattr(process, "_WORKER", program)
    case = _Case(artifact)
    _measure_workload([case], Workload("generate", 4, 0, 1, 4), BenchSettings(timeout_s=2), 1, 0, lambda _: None)
    assert case.engine is None
    with pytest.raises(EngineFailedError, match=reason):
        raise EngineFailedError(str(case.reason))


def test_two_generations_are_two_workloads_and_old_reports_still_read(artifact: OnnxArtifact, tmp_path: Path) -> None:
    done = bench(artifact, tmp_path / "r", "--generate", "4x2", "--generate", "4x3")
    assert [load.n_new for load in workloads_of(done.document)] == [0, 0, 2, 3]
    for row in done.document["rows"][:2]:
        del row["n_new"]
    (tmp_path / "old.json").write_text(json.dumps({**done.document, "rows": done.document["rows"][:2]}))
    assert [row["n_new"] for row in read_report(tmp_path / "old.json")["rows"]] == [0, 0]


def test_condition_on_bytes_per_step_is_not_asked_of_generation(artifact: OnnxArtifact, tmp_path: Path) -> None:
    done = bench(artifact, tmp_path / "r", "--generate", "4x2", "--fail-if", "bytes_per_step<1")
    assert done.code == 0
    assert done.document["failed_conditions"] == []
