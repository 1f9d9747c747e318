"""The load test: what clients count, what the report says, and servers that are killed, slow or refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
from serving import Running, serving, tiny_artifact

from owl_deploy.bench.load import LoadSettings, main, measure_load
from owl_deploy.bench.load_report import load_table, write_load_report
from owl_deploy.errors import EngineFailedError
from owl_deploy.evaluation import evaluate
from owl_deploy.recipe import EvalSettings

QUICK = LoadSettings(clients=(1, 3), duration_s=0.8, n_turns=2, warmup_s=0.2, prompt_words=4, max_tokens=8)
QUALITY = EvalSettings(text="python-docs", window=32, max_windows=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def running(artifact: Path) -> Iterator[Running]:
    with serving(artifact) as server:
        yield server


@pytest.fixture(scope="module")
def measured(artifact: Path) -> dict[str, Any]:
    return measure_load([artifact], QUICK, evaluation=QUALITY, threads=1, batch_size=2)


def test_rows_are_the_numbers_of_clients(measured: dict[str, Any]) -> None:
    assert [(row["clients"], row["batch"], row["threads"]) for row in measured["rows"]] == [(1, 2, 1), (3, 2, 1)]
    assert measured["rows"][0]["times_one_client"] == 1.0


def test_every_request_is_answered_and_counted(measured: dict[str, Any]) -> None:
    for row in measured["rows"]:
        assert (row["errors"], row["error_examples"]) == (0, [])
        assert row["requests"] > 0
        assert sum(map(len, row["ttft_ns"])) == row["requests"]
        assert (
            row["requests_per_client"]["min"] <= row["requests"] / row["clients"] <= row["requests_per_client"]["max"]
        )


def test_rows_have_the_perplexity_of_their_artifact(measured: dict[str, Any], artifact: Path, tmp_path: Path) -> None:
    (quality,) = evaluate([str(artifact)], QUALITY)
    assert {row["perplexity"] for row in measured["rows"]} == {quality.perplexity}
    assert measured["rows"][0]["evaluation"] == quality.to_json()
    write_load_report(measured, tmp_path / "report")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert f"perplexity {quality.perplexity:.3g}" in text.replace(",", "")
        assert "python-docs, 1 windows of 32 tokens" in text


def test_server_memory_is_watched(measured: dict[str, Any]) -> None:
    for row in measured["rows"]:
        assert row["rss"]["last_bytes"] > 2**20


def test_tokens_are_those_that_the_server_counts(running: Running) -> None:
    def told() -> float:
        metrics = running.send(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")[1].decode()
        return sum(
            float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("owl_deploy_completion_tokens_total")
        )

    before = told()
    settings = LoadSettings(clients=(2,), duration_s=0.5, n_turns=1, warmup_s=0, prompt_words=4, max_tokens=8)
    row = measure_load([], settings, url=running.url)["rows"][0]
    generated = told() - before
    assert generated > 0
    # What arrives behind the end of the turn is not counted: at most one answer of each client.
    assert generated - 2 * 8 <= row["tokens_per_s"] * 0.5 <= generated


def test_refused_requests_are_errors(artifact: Path) -> None:
    settings = LoadSettings(clients=(6,), duration_s=0.5, n_turns=1, warmup_s=0, prompt_words=4, max_tokens=64)
    with serving(artifact, batch_size=1, queue_size=0) as server:
        row = measure_load([], settings, url=server.url)["rows"][0]
    assert (row["perplexity"], row["evaluation"]) == (None, None)
    assert row["errors"] > 0
    assert "status 429" in row["error_examples"][0]


def test_url_without_a_server_is_said() -> None:
    with pytest.raises(EngineFailedError, match="no server answers"):
        measure_load([], QUICK, url="http://127.0.0.1:9")


def test_artifact_that_cannot_be_served_is_said(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in artifact.iterdir():
        (broken / file.name).write_bytes(b"" if file.name == "model.onnx" else file.read_bytes())
    with pytest.raises(EngineFailedError, match="broken ended before it listened"):
        measure_load([broken], QUICK)


@pytest.mark.parametrize("wrong", [{"clients": ()}, {"clients": (0,)}, {"duration_s": 0.0}, {"n_turns": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LoadSettings(**wrong)


def test_report_shows_the_figures_of_the_result(measured: dict[str, Any], tmp_path: Path) -> None:
    write_load_report(measured, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["rows"] == measured["rows"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert "0 errors" in text
        for row in measured["rows"]:
            assert f"{row['rss']['last_bytes'] / 2**20:.0f} MiB" in text
            assert f"{row['requests_per_client']['min']}-{row['requests_per_client']['max']}" in text


def test_names_in_the_report_are_text(measured: dict[str, Any], tmp_path: Path) -> None:
    row = {**measured["rows"][0], "artifact": "<script>alert(1)</script>", "error_examples": ["<b>|"]}
    write_load_report({**measured, "rows": [row]}, tmp_path / "report")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "<b>|" not in text


def test_row_without_an_answer_has_blanks(measured: dict[str, Any], tmp_path: Path) -> None:
    nothing = {"ttft_ms": None, "itl_ms": None, "rss": None, "times_one_client": None, "requests": 0}
    result = {**measured, "rows": [{**measured["rows"][0], **nothing}]}
    write_load_report(result, tmp_path / "report")
    assert load_table(result).row_count == 1


def test_command_prints_one_document_and_fails_where_requests_did(running: Running, tmp_path: Path) -> None:
    flags = ["--url", running.url, "--clients", "1", "--duration", "0.2s", "--warmup", "0s", "--turns", "1"]
    call = click.testing.CliRunner().invoke(main, [*flags, "--max-tokens", "4", "--prompt-words", "3", "--json"])
    assert call.exit_code == 0
    assert json.loads(call.stdout)["rows"][0]["errors"] == 0
    too_many = click.testing.CliRunner().invoke(main, [*flags, "--max-tokens", "9999", "--out", str(tmp_path / "out")])
    assert too_many.exit_code == 1
    assert (tmp_path / "out" / "report.html").is_file()


def test_command_without_anything_to_ask_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, "-m", "owl_deploy.bench.load"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give artifacts or the URL" in done.stderr
