from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL_BENCH, call

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.engines import process
from owl_deploy.engines.process import EngineProcess, open_engine, open_worker
from owl_deploy.errors import EngineFailedError
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings

TOKENS = np.arange(4, dtype=np.int64)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "good"
    export_onnx(str(tiny_model), ExportSettings(max_positions=128), out=out, parity=False)
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> OnnxArtifact:
    """A copy that a test may damage."""
    return open_artifact(Path(shutil.copytree(exported, tmp_path / "copy")))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def load(artifact: OnnxArtifact, timeout_s: float = 60.0) -> None:
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8, timeout_s=timeout_s) as engine:
        engine.forward(TOKENS, 0)


def pid(engine: EngineProcess) -> int:
    return engine._process.pid


def test_worker_runs_an_artifact_and_ends_without_a_trace(
    artifact: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8) as engine:
        worker = pid(engine)
        assert engine.forward(TOKENS, 0).shape == (4, 260)
        assert len(engine.measure(TOKENS, 2, 3)) == 3
        assert engine.load_ms > 0
        assert engine.peak_rss_bytes() > 1 << 20
        assert engine.version
    assert not is_alive(worker)
    assert list(scratch.iterdir()) == []


def test_worker_leaves_out_all_logits_but_the_last(artifact: OnnxArtifact) -> None:
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8) as engine:
        expected = engine.forward(TOKENS, 0)
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8, last_logits_only=True) as engine:
        np.testing.assert_allclose(engine.forward(TOKENS, 0), expected[-1:], rtol=1e-5, atol=1e-6)
        assert len(engine.measure(TOKENS, 2, 3)) == 3


def test_worker_has_a_session_of_its_own(artifact: OnnxArtifact) -> None:
    """So Ctrl-C in a terminal reaches the command alone, which then ends the worker."""
    with open_worker("onnxruntime") as engine:
        assert os.getsid(pid(engine)) == pid(engine)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_corrupted_model_is_an_engine_failure_with_its_reason(artifact: OnnxArtifact, content: bytes | None) -> None:
    model = artifact.path / "model.onnx"
    model.write_bytes(model.read_bytes()[:-100] if content is None else content)
    with pytest.raises(EngineFailedError, match=r"onnxruntime failed at load: .*model\.onnx") as caught:
        load(artifact)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("size", [None, 1000], ids=["missing", "truncated"])
def test_missing_or_short_data_file_is_an_engine_failure(artifact: OnnxArtifact, size: int | None) -> None:
    data = artifact.path / "model.onnx.data"
    content = data.read_bytes()
    data.unlink()
    if size is not None:
        data.write_bytes(content[:size])
    with pytest.raises(EngineFailedError, match=r"onnxruntime failed at load: .*(External|external)"):
        load(artifact)


def test_too_many_tokens_for_the_cache_are_refused_and_the_worker_goes_on(artifact: OnnxArtifact) -> None:
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8) as engine:
        with pytest.raises(EngineFailedError, match="4 tokens after 5 do not fit a cache of 8"):
            engine.forward(TOKENS, 5)
        assert engine.forward(TOKENS, 4).shape == (4, 260)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_killed_worker_is_an_engine_failure_naming_the_signal(artifact: OnnxArtifact, number: signal.Signals) -> None:
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8) as engine:
        os.kill(pid(engine), number)
        with pytest.raises(EngineFailedError, match=rf"onnxruntime crashed \(signal {number.name}\)"):
            engine.forward(TOKENS, 0)
        with pytest.raises(EngineFailedError, match=number.name):  # and again
            engine.forward(TOKENS, 0)


def test_hung_worker_is_stopped_after_the_time_limit(artifact: OnnxArtifact) -> None:
    with open_engine(artifact, threads=1, n_tokens=4, capacity=8) as engine:
        os.kill(pid(engine), signal.SIGSTOP)
        engine.timeout_s = 0.2
        with pytest.raises(EngineFailedError, match=r"onnxruntime gave no answer for 0\.2 s and was stopped"):
            engine.forward(TOKENS, 0)
        assert not is_alive(pid(engine))


def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a program in the place of the worker; it gets a request on stdin."""
    file = tmp_path / "fake.py"
    file.write_text("import json, os, sys, time\nsys.stdin.readline()\n" + textwrap.dedent(code))
    monkeypatch.setattr(process, "_WORKER", file)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('hello')", r"onnxruntime failed at memory: it answered b'hello'"),
        ("print('[1]')", r"it answered b'\[1\]'"),
        ("print('3')", r"it answered b'3'"),
        ("print('x' * 10**6)", r"it answered b'x{100}'$"),
        ("print()", r"it answered b''"),
        ("sys.stdout.buffer.write(bytes([255, 10]))", r"it answered b'\\xff'"),
        ("print(json.dumps({'error': 'no such graph'}))", r"failed at memory: no such graph"),
        ("sys.exit(3)", r"onnxruntime crashed \(exit code 3\)$"),
        ("pass", r"onnxruntime crashed \(exit code 0\)$"),
        ("print('half a line', end='', flush=True); os.abort()", r"crashed \(signal SIGABRT\)"),
        ("sys.exit('first\\nthe last words')", r"crashed \(exit code 1\): the last words$"),
        ("sys.stderr.buffer.write(bytes([255, 10])); sys.exit(2)", r"crashed \(exit code 2\): \ufffd$"),
    ],
)
def test_whatever_a_worker_does_is_an_engine_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    fake_worker(tmp_path, monkeypatch, code)
    with open_worker("onnxruntime", timeout_s=30) as engine:
        with pytest.raises(EngineFailedError, match=message) as caught:
            engine.ask("memory")
        worker = pid(engine)
    assert not is_alive(worker)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("code", ["pass", "print('no end of line', end='', flush=True)"])
def test_silent_worker_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    fake_worker(tmp_path, monkeypatch, f"{code}\ntime.sleep(60)")
    with open_worker("onnxruntime", timeout_s=0.5) as engine:
        with pytest.raises(EngineFailedError, match=r"onnxruntime gave no answer for 0\.5 s and was stopped"):
            engine.ask("memory")
        assert not is_alive(pid(engine))


def test_worker_that_closes_its_output_and_lives_on_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_worker(tmp_path, monkeypatch, "os.close(1); time.sleep(60)")
    monkeypatch.setattr(process, "_LAST_WORDS_S", 0.2)
    with open_worker("onnxruntime") as engine:
        with pytest.raises(EngineFailedError, match="onnxruntime stopped answering and was stopped"):
            engine.ask("memory")
        assert not is_alive(pid(engine))


def test_bench_goes_on_behind_a_broken_artifact(artifact: OnnxArtifact, exported: Path, tmp_path: Path) -> None:
    (artifact.path / "model.onnx").write_bytes(b"garbage")
    done = call("bench", exported, artifact.path, "--baseline", "good", *SMALL_BENCH, "--out", tmp_path / "r", "--json")
    assert done.code == 1
    assert "an engine failed; its rows say why" in done.stderr
    rows = done.document["rows"]
    assert [(row["artifact"], row["status"]) for row in rows] == [("good", "ok"), ("copy", "failed")] * 2
    assert all("onnxruntime failed at load" in row["reason"] for row in rows if row["status"] == "failed")
    assert all(row["ms"] is None and row["speedup"] is None for row in rows if row["status"] == "failed")
    written = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [row["status"] for row in written["rows"]] == ["ok", "failed"] * 2


def test_bench_goes_on_behind_a_broken_baseline(artifact: OnnxArtifact, exported: Path, tmp_path: Path) -> None:
    (artifact.path / "model.onnx.data").unlink()
    done = call("bench", artifact.path, exported, "--baseline", "copy", *SMALL_BENCH, "--out", tmp_path / "r")
    assert done.code == 1
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "ok"] * 2
    assert all(row["speedup"] is None for row in rows)
    assert all(row["ms"] is not None for row in rows if row["status"] == "ok")


def test_peak_memory_is_the_worker_s_own_whatever_its_parent_held() -> None:
    held = np.ones(1 << 28, dtype=np.uint8)  # a child process begins with its parent's ru_maxrss
    with open_worker("onnxruntime") as worker:
        assert 1 << 20 < worker.peak_rss_bytes() < held.nbytes


def test_onnxruntime_is_started_without_telemetry(
    artifact: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its telemetry keeps a session file, .ses, once it is imported
    with open_engine(artifact, threads=1, n_tokens=1, capacity=8) as engine:
        engine.forward(np.asarray([5]), 0)
        assert not (tmp_path / ".ses").exists()
