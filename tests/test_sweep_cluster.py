"""A sweep on a Ray cluster of this machine: the same results, workers killed in the middle, and what goes wrong."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from command_line import call
from test_sweep import mapping, two_cells

from owl_deploy import sweep_cluster
from owl_deploy.errors import EngineUnavailableError, OwlDeployError
from owl_deploy.machine_lock import busy_machine, quiet_machine
from owl_deploy.progress import Step
from owl_deploy.recipe import recipe_from_mapping
from owl_deploy.sweep import run_sweep
from owl_deploy.sweep_cluster import run_sweep_on_cluster
from owl_deploy.sweep_records import SweepRecords

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

GRID = [{"method": "magnitude", "allocation": "uniform", "sparsity": [0.5, 0.6, 0.7]}]
VARIES = ("created", "command", "seconds", "peak_rss_bytes")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a cluster with room for three cells at once, and give its address to this process' sweeps."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    command = [*ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=3"]
    quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 60}
    subprocess.run([*command, "--include-dashboard=false", "--disable-usage-stats"], check=True, **quiet)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address
    yield address
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    subprocess.run([*ray, "stop", "--force"], check=True, **quiet)


def without_times(document: Any) -> Any:
    """Leave out what differs between two runs that did the same."""
    if isinstance(document, dict):
        return {key: without_times(value) for key, value in document.items() if key not in VARIES}
    return [without_times(item) for item in document] if isinstance(document, list) else document


def workers() -> list[psutil.Process]:
    """Return the processes that make a cell now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"]
        if line and line[0].startswith("ray::_make"):
            found.append(process)
    return found


class Killer(threading.Thread):
    """Kills the first worker that makes a cell, once that has begun."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.n_killed = 0

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while not self.n_killed and time.monotonic() < deadline:
            for process in workers()[:1]:
                process.kill()
                self.n_killed += 1
            time.sleep(0.02)


def test_the_results_are_those_of_one_machine(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_mapping(mapping(tiny_model, grid=GRID))
    notes: list[Step] = []
    found = run_sweep_on_cluster(recipe, out=tmp_path / "ray", on_step=notes.append)
    assert without_times(found) == without_times(run_sweep(recipe, out=tmp_path / "here"))
    assert json.loads((tmp_path / "ray" / "results.json").read_text("utf-8")) == found
    assert (notes[-1].done, notes[-1].total) == (3, 3)
    assert sorted(item.name for item in (tmp_path / "ray").iterdir()) == sorted(
        item.name for item in (tmp_path / "here").iterdir()
    )


def test_a_killed_worker_costs_time_and_no_result(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_mapping(mapping(tiny_model, grid=GRID))
    killer = Killer()
    killer.start()
    found = run_sweep_on_cluster(recipe, out=tmp_path / "out")
    killer.join()
    assert killer.n_killed == 1
    assert [row["status"] for row in found["rows"]] == ["ok"] * 3


def test_finished_cells_are_not_made_again(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = two_cells(tiny_model)
    first = run_sweep_on_cluster(recipe, out=tmp_path / "out", only="*0.5")
    assert [row["status"] for row in first["rows"]] == ["ok", "pending"]
    time_of_first = (tmp_path / "out" / "cells" / "magnitude-uniform-0.5.json").stat().st_mtime_ns
    second = run_sweep_on_cluster(recipe, out=tmp_path / "out")
    assert [row["status"] for row in second["rows"]] == ["ok", "ok"]
    assert (tmp_path / "out" / "cells" / "magnitude-uniform-0.5.json").stat().st_mtime_ns == time_of_first


def test_a_cell_that_fails_is_a_row(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    grid = [{"method": ["magnitude", "wanda"], "allocation": "uniform", "sparsity": 0.5, "seq_len": 100_000}]
    found = run_sweep_on_cluster(recipe_from_mapping(mapping(tiny_model, grid=grid)), out=tmp_path / "out")
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["magnitude"]["status"] == "ok"
    assert rows["wanda"]["status"] == "failed"
    assert "100000" in rows["wanda"]["reason"]


def test_the_command_line_knows_the_cluster(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping(tiny_model, grid=GRID[:1])))
    done = call(
        "sweep", tmp_path / "r.yaml", "--out", tmp_path / "out", "--executor", "ray", "--only", "*0.6", "--json"
    )
    assert done.code == 0, done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["rows"]] == ["pending", "ok", "pending"]


def test_a_stop_keeps_what_was_made(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.done == 1:
            raise KeyboardInterrupt

    recipe = recipe_from_mapping(mapping(tiny_model, grid=GRID))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_sweep_on_cluster(recipe, out=tmp_path / "out", on_step=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list((tmp_path / "out" / "cells").glob("magnitude*.json"))) == 1
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()


def test_more_threads_than_any_machine_has_are_refused(cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_mapping(mapping(tiny_model, grid=GRID) | {"threads": 999})
    with pytest.raises(OwlDeployError, match="no machine of the cluster has 999 processors"):
        run_sweep_on_cluster(recipe, out=tmp_path / "out")


def test_a_cluster_that_does_not_answer_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1:1 does not answer"):
        run_sweep_on_cluster(two_cells(tiny_model), out=tmp_path / "out")


def test_records_of_other_versions_are_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = SweepRecords.open(two_cells(tiny_model), tmp_path / "out", offline=True)
    records.folder.mkdir(parents=True)
    cell = records.cells[0]
    identity = {**records.identity(cell), "versions": {"torch": "0"}}
    sweep_cluster._keep(records, cell, {f"{cell.name}.json": {"status": "ok", "identity": identity}})
    kept = records.load(cell)
    assert kept is not None
    assert kept["status"] == "failed"
    assert "versions {'torch': '0'} instead of" in kept["reason"]


@pytest.fixture
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file that tests running beside these do not know; its folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("own_machine")
def test_times_are_taken_on_a_machine_without_other_cells() -> None:
    """Whoever computes shares the machine; who takes times waits for them, and lets no one in before."""
    seen: list[str] = []

    def hold(kind: Any, name: str, seconds: float) -> threading.Thread:
        def work() -> None:
            with kind():
                seen.append(f"{name} in")
                time.sleep(seconds)
                seen.append(f"{name} out")

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        return thread

    threads = [hold(busy_machine, "a", 2.0), hold(busy_machine, "b", 1.0)]
    threads += [hold(quiet_machine, "times", 0.2), hold(busy_machine, "c", 0.0)]
    for thread in threads:
        thread.join()
    assert seen == ["a in", "b in", "b out", "a out", "times in", "times out", "c in", "c out"]


def test_the_lock_ends_with_its_process(own_machine: Path) -> None:
    code = "import time\nfrom owl_deploy.machine_lock import quiet_machine\nwith quiet_machine():\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while is_free(own_machine):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert is_free(own_machine)


def is_free(folder: Path) -> bool:
    """Return whether nobody holds the machine."""
    with (folder / f"owl-deploy-{os.getuid()}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
