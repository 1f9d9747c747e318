from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import mounted

from owl_deploy.errors import OwlDeployError
from owl_deploy.files import file_sha256, folder_bytes, new_folder, write_bytes, write_json


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/a"]


def _fill_and_raise(folder: Path, error: type[BaseException]) -> None:
    (folder / "new").write_text("2")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_folder_does_not_appear_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        _fill_and_raise(folder, error)
    assert listing(tmp_path) == []


def test_existing_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OwlDeployError, match="exists already: give another --out, or --force"),
        new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == ["out"]


def test_replaced_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with new_folder(out, replace=True) as folder:
        (folder / "new").write_text("2")
        assert listing(out) == ["old"]
    assert listing(tmp_path) == ["out", "out/new"]


def test_replaced_folder_stays_after_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True) as folder:
        _fill_and_raise(folder, KeyboardInterrupt)
    assert listing(tmp_path) == ["out", "out/old"]


def test_old_folder_comes_back_when_stopped_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True):
        pass
    assert listing(tmp_path) == ["out", "out/old"]


def test_folder_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "a").write_text("1")
    assert listing(tmp_path) == ["out", "out/a"]


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"1")
    write_bytes(tmp_path / "a", b"22")
    assert (tmp_path / "a").read_bytes() == b"22"
    assert listing(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_file_stays_as_it_was_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    write_bytes(tmp_path / "a", b"1")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if function == "fsync" else Path, function, full)
    with pytest.raises(OwlDeployError, match=r"disk full while writing .*a: free some space and run again"):
        write_bytes(tmp_path / "a", b"22")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert listing(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_forbidden_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def forbidden(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", forbidden)
    with pytest.raises(OwlDeployError, match=f"cannot write .*: {os.strerror(number)}"):
        write_bytes(tmp_path / "a", b"1")
    assert listing(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out") as folder:
        folder.read_bytes()


def test_json_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert listing(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with mounted(tmp_path / "disk", "size=256k") as folder:
        yield folder


def test_full_disk_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OwlDeployError, match="disk full while writing"):
        write_bytes(small_disk / "a", bytes(1 << 20))
    with pytest.raises(OwlDeployError, match="disk full while writing"), new_folder(small_disk / "out") as folder:
        (folder / "a").write_bytes(bytes(1 << 20))
    assert listing(small_disk) == []


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000))
def test_hash_is_sha256_of_the_content(tmp_path: Path, data: bytes) -> None:
    write_bytes(tmp_path / "a", data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_folder_bytes_counts_the_files_directly_inside(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / ".b").write_bytes(b"4")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c").write_bytes(b"56")
    assert folder_bytes(tmp_path) == 4


def test_leftovers_of_a_killed_process_are_removed_and_what_it_set_aside_comes_back(tmp_path: Path) -> None:
    gone = 2**22 + 1  # beyond the largest process number of Linux
    for name in (f".out.{gone}.tmp", f".out.{gone}.old", f".out.{os.getpid()}.old", f".other.{gone}.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{gone}.old" / "kept").touch()
    with pytest.raises(OwlDeployError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"out", f".out.{os.getpid()}.old", f".other.{gone}.tmp"}
    assert (tmp_path / "out" / "kept").exists()
