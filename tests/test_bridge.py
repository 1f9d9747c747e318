"""Finding an interpreter for the bridge environment, and telling a finished one from a half-made one."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from owl_deploy.engines import bridge
from owl_deploy.engines.status import onnxruntime_status
from owl_deploy.errors import EngineUnavailableError


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(bridge, "_cpu_flags", lambda: {"avx2"})


def command(path: Path, body: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def finished_environment(pins: tuple[str, ...] = bridge.PINS) -> Path:
    home = bridge.bridge_home()
    command(home / "bin" / "python", "echo unused")
    (home / "owl-deploy.json").write_text(json.dumps({"pins": pins}), encoding="utf-8")
    return home


def fake_interpreter(path: Path, *, pip: str = "echo Collecting deepsparse", check: str = "echo 1.8.0") -> Path:
    """An interpreter that says it is 3.11 and makes environments whose python runs `pip` and `check`."""
    inner = f'case "$1 $2" in "-m pip") {pip};; *) {check};; esac'
    making = (
        f"mkdir -p \"$3/bin\" && printf '%s\\n' '#!/bin/sh' '{inner}' > \"$3/bin/python\" && chmod +x \"$3/bin/python\""
    )
    return command(path, f'case "$1" in -c) echo 3.11;; *) {making};; esac')


def test_home_lies_in_the_cache_and_names_the_version(tmp_path: Path) -> None:
    assert bridge.bridge_home() == tmp_path / "cache" / "engines" / "deepsparse-1.8.0"


def test_missing_environment_is_one_sentence_that_says_what_to_run() -> None:
    with pytest.raises(EngineUnavailableError, match=r"^.*not installed: run owl-deploy engines install deepsparse$"):
        bridge.bridge_python()


def test_environment_without_its_marker_counts_as_nothing() -> None:
    (finished_environment() / "owl-deploy.json").unlink()
    with pytest.raises(EngineUnavailableError, match="not installed"):
        bridge.bridge_python()


def test_environment_of_other_pins_is_refused() -> None:
    finished_environment(("deepsparse==1.7.0",))
    with pytest.raises(EngineUnavailableError, match="other pins"):
        bridge.bridge_python()


def test_environment_whose_python_is_gone_is_refused() -> None:
    (finished_environment() / "bin" / "python").unlink()
    with pytest.raises(EngineUnavailableError, match="lost the Python"):
        bridge.bridge_python()


def test_finished_environment_is_found_and_reported() -> None:
    home = finished_environment()
    assert bridge.bridge_python() == home / "bin" / "python"
    status = bridge.bridge_status()
    assert (status.name, status.is_available, status.version, status.reason) == ("deepsparse", True, "1.8.0", "")
    assert "evaluation only" in status.licence


@pytest.mark.parametrize(
    ("system", "machine", "flags", "words"),
    [
        ("Darwin", "arm64", {"avx2"}, "Linux only, this is Darwin"),
        ("Linux", "riscv64", {"avx2"}, "this one is riscv64"),
        ("Linux", "x86_64", {"sse2"}, "AVX2"),
    ],
)
def test_machine_that_cannot_run_it_is_told_why(
    system: str, machine: str, flags: set[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(bridge, "_cpu_flags", lambda: flags)
    finished_environment()
    status = bridge.bridge_status()
    assert not status.is_available
    assert words in status.reason
    with pytest.raises(EngineUnavailableError, match=words):
        bridge.install_bridge()


def test_features_of_the_processor_are_read_as_linux_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\n", encoding="utf-8")
    assert bridge._cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}


def test_running_interpreter_is_taken_if_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running = command(tmp_path / "running", "echo 3.9")
    monkeypatch.setattr(sys, "executable", str(running))
    assert bridge.find_interpreter() == str(running)


def test_newest_that_really_starts_is_taken_from_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(command(tmp_path / "running", "echo 3.12")))
    monkeypatch.setenv("PATH", f"{tmp_path}/stubs:{tmp_path}/real:/bin:/usr/bin")
    command(tmp_path / "stubs" / "python3.11", "echo not installed >&2; exit 127")
    command(tmp_path / "stubs" / "python3.10", "echo 3.10")
    good = command(tmp_path / "real" / "python3.11", "echo 3.11")
    assert bridge.find_interpreter() == str(good)


def test_no_interpreter_is_one_sentence_that_lists_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(command(tmp_path / "running", "echo 3.12")))
    monkeypatch.setattr("os.get_exec_path", lambda: [str(tmp_path / "stubs")])
    command(tmp_path / "stubs" / "python3.10", "echo no ensurepip >&2; exit 1")
    with pytest.raises(EngineUnavailableError) as caught:
        bridge.find_interpreter()
    message = str(caught.value)
    assert "needs Python 3.8 to 3.11" in message
    assert "running is 3.12" in message
    assert "python3.10 fails (no ensurepip)" in message


@pytest.mark.parametrize(("named", "words"), [("/no/such/python", "does not start"), (sys.executable, None)])
def test_named_interpreter_is_the_only_one_tried(named: str, words: str | None) -> None:
    if words is None and sys.version_info < (3, 12):
        assert bridge.find_interpreter(named) == named
    else:
        with pytest.raises(EngineUnavailableError, match=words or "is 3.12"):
            bridge.find_interpreter(named)


def test_installation_tells_its_steps_and_the_licence_and_is_done_once(tmp_path: Path) -> None:
    interpreter = fake_interpreter(tmp_path / "python")
    lines: list[str] = []
    python = bridge.install_bridge(str(interpreter), lines.append)
    assert python == bridge.bridge_python()
    assert lines[0] == bridge.LICENCE_NOTICE
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "Collecting deepsparse" in lines
    lines.clear()
    assert bridge.install_bridge("/no/such/python", lines.append) == python
    assert len(lines) == 1
    assert "already installed" in lines[0]


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"pip": "echo ERROR: No matching distribution; echo hint; exit 1"}, "ERROR: No matching distribution"),
        ({"check": "echo ImportError: numpy; exit 1"}, "importing deepsparse and sparseml failed: ImportError: numpy"),
    ],
)
def test_failed_installation_is_one_sentence_and_leaves_nothing(
    fake: dict[str, str], words: str, tmp_path: Path
) -> None:
    interpreter = fake_interpreter(tmp_path / "python", **fake)
    with pytest.raises(EngineUnavailableError, match=words):
        bridge.install_bridge(str(interpreter), lambda line: None)
    assert not bridge.bridge_home().exists()


def test_interrupted_installation_leaves_nothing(tmp_path: Path) -> None:
    interpreter = fake_interpreter(tmp_path / "python")
    with pytest.raises(KeyboardInterrupt):
        bridge.install_bridge(str(interpreter), _interrupting_at("Collecting"))
    assert not bridge.bridge_home().exists()


def _interrupting_at(word: str) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        if line.startswith(word):
            raise KeyboardInterrupt

    return on_line


def test_what_a_killed_installation_left_is_replaced(tmp_path: Path) -> None:
    left = bridge.bridge_home() / "lib" / "half"
    left.mkdir(parents=True)
    bridge.install_bridge(str(fake_interpreter(tmp_path / "python")), lambda line: None)
    assert not left.exists()


def test_pins_name_the_versions_that_install_together() -> None:
    assert {"deepsparse==1.8.0", "sparseml==1.8.0", "onnx==1.14.1", "protobuf==3.20.3", "numpy<2"} == set(bridge.PINS)


def test_onnxruntime_is_available_here() -> None:
    status = onnxruntime_status()
    assert status.is_available
    assert status.version
