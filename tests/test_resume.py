"""A pruning that was killed goes on where it stopped, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL_PRUNE, TEXT, call
from conftest import save_tiny_model

from owl_deploy.errors import RecipeError
from owl_deploy.progress import Step
from owl_deploy.pruning import prune
from owl_deploy.recipe import PruneSettings

SETTINGS = PruneSettings(calibration=TEXT, n_samples=4, seq_len=32)
N_BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("resume") / "out"
    prune(str(model), SETTINGS, out=out, threads=1)
    assert sorted(item.name for item in out.parent.iterdir()) == ["out"]
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that must be the same; measured.json holds times and memory."""
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name != "measured.json"}


class StoppedError(Exception):
    pass


def stopped_after(model: Path, out: Path, n_blocks: int, settings: PruneSettings = SETTINGS) -> Path:
    """Prune until some blocks are finished; returns the folder that is left for --resume."""

    def stop(step: Step) -> None:
        if step.stage == "pruning blocks" and step.done == n_blocks:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune(str(model), settings, out=out, threads=1, on_step=stop)
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


def resumed(model: Path, out: Path, settings: PruneSettings = SETTINGS) -> list[str]:
    """Go on; returns what was said of each block: kept, or its sparsity."""
    notes = []

    def note(step: Step) -> None:
        if step.stage == "pruning blocks":
            notes.append(step.note.split()[0])

    prune(str(model), settings, out=out, threads=1, resume=True, on_step=note)
    assert sorted(item.name for item in out.parent.iterdir()) == ["out"]
    return notes


@pytest.mark.parametrize("n_blocks", range(1, N_BLOCKS + 1))
def test_finished_blocks_are_kept(model: Path, expected: dict[str, bytes], tmp_path: Path, n_blocks: int) -> None:
    stopped_after(model, tmp_path / "out", n_blocks)
    assert resumed(model, tmp_path / "out") == ["kept"] * n_blocks + ["sparsity"] * (N_BLOCKS - n_blocks)
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("method", "allocation"), [("magnitude", "uniform"), ("magnitude", "owl"), ("wanda", "uniform")]
)
def test_every_method_goes_on(model: Path, tmp_path: Path, method: str, allocation: str) -> None:
    settings = SETTINGS.model_copy(update={"method": method, "allocation": allocation})
    prune(str(model), settings, out=tmp_path / "whole" / "out", threads=1)
    (tmp_path / "stopped").mkdir()
    stopped_after(model, tmp_path / "stopped" / "out", 2, settings)
    assert resumed(model, tmp_path / "stopped" / "out", settings) == ["kept"] * 2 + ["sparsity"]
    assert files(tmp_path / "stopped" / "out") == files(tmp_path / "whole" / "out")


def test_shards_are_whole_checkpoint_files(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    partial = stopped_after(model, tmp_path / "out", 2)
    shards = sorted(partial.glob("*.safetensors"))
    assert len(shards) >= 2
    assert {shard.read_bytes() for shard in shards} <= set(expected.values())


def test_without_resume_everything_is_made_anew(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    partial = stopped_after(model, tmp_path / "out", 2)
    (partial / "block-00000.safetensors").write_bytes(b"garbage")
    notes = []
    prune(str(model), SETTINGS, out=tmp_path / "out", threads=1, on_step=lambda step: notes.append(step.note))
    assert not [note for note in notes if note.startswith("kept")]
    assert files(tmp_path / "out") == expected


def test_resume_of_nothing_is_a_new_run(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert resumed(model, tmp_path / "out") == ["sparsity"] * N_BLOCKS
    assert files(tmp_path / "out") == expected


# Fingerprints.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--sparsity", "0.5"], "sparsity was 0.7 and is now 0.5"),
        (["--method", "magnitude"], "method was 'wanda' and is now 'magnitude'"),
        (["--allocation", "uniform"], "allocation was 'owl' and is now 'uniform'"),
        (["--owl-lambda", "0.1"], "owl_lambda was 0.08 and is now 0.1"),
        (["--n-samples", "5"], "n_samples was 4 and is now 5"),
        (["--seed", "1"], "seed was 0 and is now 1"),
        (["--threads", "2"], "threads was 1 and is now 2"),
        (["--calibration", "TEXT"], "calibration was 'text:"),
    ],
)
def test_other_setting_is_refused_and_named(model: Path, tmp_path: Path, changes: list[str], sentence: str) -> None:
    (tmp_path / "text").write_text("other words " * 100)
    partial = stopped_after(model, tmp_path / "out", 1)
    before = {item.name: item.read_bytes() for item in partial.iterdir()}
    flags = [f"text:{tmp_path / 'text'}" if flag == "TEXT" else flag for flag in changes]
    command = ("prune", "--model", model, *SMALL_PRUNE, "--out", tmp_path / "out", "--resume")
    done = call(*command, *flags, "--quiet")
    assert (done.code, done.stdout) == (2, "")
    assert done.sentence.startswith(f"cannot resume {tmp_path / 'out'}: {sentence}")
    assert done.sentence.endswith("; set it back, or start anew without --resume")
    assert {item.name: item.read_bytes() for item in partial.iterdir()} == before


def test_other_text_of_the_same_name_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    settings = SETTINGS.model_copy(update={"calibration": f"text:{text}"})
    text.write_text("some words " * 100)
    stopped_after(model, tmp_path / "out", 1, settings)
    text.write_text("other words " * 100)
    with pytest.raises(RecipeError, match=r"cannot resume .*: tokens_sha256 was '"):
        prune(str(model), settings, out=tmp_path / "out", threads=1, resume=True)


def test_other_weights_are_refused(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    stopped_after(copy, tmp_path / "out", 1)
    save_tiny_model(copy, seed=1, num_hidden_layers=N_BLOCKS)
    with pytest.raises(RecipeError, match=r"cannot resume .*: model file model\.safetensors was '"):
        prune(str(copy), SETTINGS, out=tmp_path / "out", threads=1, resume=True)


def test_other_version_of_a_library_is_refused(model: Path, tmp_path: Path) -> None:
    partial = stopped_after(model, tmp_path / "out", 1)
    fingerprint = json.loads((partial / "fingerprint.json").read_text())
    (partial / "fingerprint.json").write_text(json.dumps({**fingerprint, "torch version": "1.0"}))
    with pytest.raises(RecipeError, match=r"cannot resume .*: torch version was '1\.0' and is now "):
        prune(str(model), SETTINGS, out=tmp_path / "out", threads=1, resume=True)


# Damage: what does not agree with its own record is made anew, never used.


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES: list[tuple[str, Any]] = [
    ("block-00000.safetensors", flipped),
    ("block-00001.safetensors", flipped),
    ("block-00000.safetensors", lambda data: data[:-100]),
    ("block-00001.safetensors", lambda _: b""),
    ("block-00001.safetensors", lambda _: b"\xff" * 100),
    ("block-00001.safetensors", None),
    ("block-00000.json", lambda data: data[: len(data) // 2]),
    ("block-00000.json", lambda _: b"null"),
    ("block-00001.json", lambda _: b"[]"),
    ("block-00001.json", lambda _: b"{}"),
    ("block-00001.json", lambda _: b"\xff"),
    ("block-00001.json", None),
    ("fingerprint.json", lambda data: data[:-10]),
    ("fingerprint.json", lambda _: b"[]"),
    ("fingerprint.json", None),
]


@pytest.fixture(scope="module")
def partial(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was stopped after two blocks."""
    return stopped_after(model, tmp_path_factory.mktemp("partial") / "out", 2)


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
@pytest.mark.parametrize("method", ["wanda"])
def test_damaged_file_is_made_anew(
    model: Path, expected: dict[str, bytes], partial: Path, tmp_path: Path, name: str, damage: Any, method: str
) -> None:
    copy = Path(shutil.copytree(partial, tmp_path / ".out.partial"))
    if damage is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
    resumed(model, tmp_path / "out")
    assert files(tmp_path / "out") == expected


def test_damaged_shard_is_found_where_no_data_is_needed(model: Path, tmp_path: Path) -> None:
    """Magnitude pruning never reads a finished shard again, and must not pass on what is wrong with it."""
    settings = PruneSettings(method="magnitude", allocation="uniform")
    prune(str(model), settings, out=tmp_path / "whole" / "out", threads=1)
    (tmp_path / "stopped").mkdir()
    shard = stopped_after(model, tmp_path / "stopped" / "out", 2, settings) / "block-00000.safetensors"
    shard.write_bytes(flipped(shard.read_bytes()))
    assert resumed(model, tmp_path / "stopped" / "out", settings) == ["sparsity", "kept", "sparsity"]
    assert files(tmp_path / "stopped" / "out") == files(tmp_path / "whole" / "out")


# kill -9. One process imports torch, and then forks for every kill and every resume.

KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
from owl_deploy.pruning import prune
from owl_deploy.recipe import PruneSettings

model, root, n_kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree", "shutil.copyfile")
settings = PruneSettings(calibration=sys.argv[4], n_samples=4, seq_len=32)

def run(out, *, resume=False, kill_at=None, count=None):
    \"\"\"Prune in a child that kills itself before its n-th change of the disk; returns how it ended.\"\"\"
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0
    def watch(event, args):
        nonlocal seen
        is_write = event in WRITES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if is_write and str(args[0]).startswith(root):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    prune(model, settings, out=Path(out), threads=1, resume=resume)
    if count:
        Path(count).write_text(str(seen))
    os._exit(0)

os.mkdir(f"{root}/whole")
assert run(f"{root}/whole/out", count=f"{root}/count") == 0
n_writes = int(Path(f"{root}/count").read_text())
for k in range(n_kills):
    kill_at = 1 + k * (n_writes - 1) // (n_kills - 1)
    folder = f"{root}/{kill_at:03d}"
    os.mkdir(folder)
    status = run(f"{folder}/out", kill_at=kill_at)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    # Behind the last rename the checkpoint is complete, and there is nothing to resume.
    if not os.path.exists(f"{folder}/out"):
        assert run(f"{folder}/out", resume=True) == 0, kill_at
print(n_writes)
"""


def test_kill_at_any_write_then_resume_gives_the_same_bytes(
    model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    n_kills = 12
    command = [sys.executable, "-c", KILLER, str(model), str(tmp_path), str(n_kills), TEXT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3 * N_BLOCKS  # a shard and a record of each block, and the files around them
    assert files(tmp_path / "whole" / "out") == expected
    folders = [folder for folder in sorted(tmp_path.iterdir()) if folder.name.isdigit()]
    assert len(folders) == n_kills
    for folder in folders:
        assert files(folder / "out") == expected, folder


@pytest.fixture
def killed(model: Path, tmp_path: Path) -> Path:
    """Output path of a command that was killed as soon as its first block was on disk."""
    out = tmp_path / "out"
    flags = ["--calibration", "python-docs", "--n-samples", "60", "--seq-len", "64", "--threads", "1", "--quiet"]
    command = [sys.executable, "-m", "owl_deploy", "prune", "--model", str(model), *flags, "--out", str(out)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / ".out.partial" / "block-00000.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return out


def test_command_that_was_killed_goes_on_with_resume(model: Path, killed: Path) -> None:
    assert not killed.exists()
    flags = ("--calibration", "python-docs", "--n-samples", "60", "--seq-len", "64", "--threads", "1", "--out")
    done = call("prune", "--model", model, *flags, killed, "--resume")
    assert done.code == 0
    assert "pruning blocks" in done.stderr
    assert call("prune", "--model", model, *flags, killed.parent / "whole", "--quiet").code == 0
    assert files(killed) == files(killed.parent / "whole")
    assert sorted(item.name for item in killed.parent.iterdir()) == ["out", "whole"]


def test_another_allocation_than_before_is_refused(model: Path, tmp_path: Path) -> None:
    """A search that ends by the clock finds another one where its result left the cache."""
    work = stopped_after(model, tmp_path / "out", 1)
    asked = json.loads((work / "asked.json").read_text())
    asked["model.layers.2.mlp.up_proj"] += 0.01
    (work / "asked.json").write_text(json.dumps(asked))
    with pytest.raises(RecipeError, match="the allocation that was found differs from that of the stopped run"):
        prune(str(model), SETTINGS, out=tmp_path / "out", threads=1, resume=True)
