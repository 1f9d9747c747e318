"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from owl_deploy.errors import OwlDeployError

if TYPE_CHECKING:
    import torch

__all__ = ["file_sha256", "folder_bytes", "new_folder", "write_bytes", "write_json", "write_tensors"]


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that is renamed to `path` when the block ends well.

    Args:
        path: the folder to make; its parents are made too.
        replace: whether a folder already there is replaced, at the last moment.

    Raises:
        OwlDeployError: `path` exists and `replace` is off, or the disk is full.
    """
    _clear_up(path)
    if path.exists() and not replace:
        raise OwlDeployError(f"{path} exists already: give another --out, or --force to replace it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _clear_up(path: Path) -> None:
    """Remove what a killed process left beside `path`; put back a folder that it had only set aside."""
    if not path.parent.is_dir():
        return
    for item in path.parent.iterdir():
        start, _, kind = item.name.rpartition(".")
        name, _, pid = start.rpartition(".")
        if name != f".{path.name}" or kind not in ("tmp", "old") or not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        if kind == "old" and not path.exists():
            item.rename(path)
        elif item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


def _swap(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, setting aside and then deleting what `path` was."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary sibling, flushed to the disk before it gets its name.

    Raises:
        OwlDeployError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    The library writes it straight to the disk: serialised in memory first it would take as much again.

    Raises:
        OwlDeployError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _disk_errors(path):
        try:
            try:
                save_file(
                    {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                    temporary,
                    metadata={"format": "pt"},
                )
            except SafetensorError as error:  # hides the number of the error
                _raise_os_error(error)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _raise_os_error(error: Exception) -> None:
    """Raise what a library's message says the system said."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        raise error
    raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinities are refused (ValueError)."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OwlDeployError(f"disk full while writing {path}: free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OwlDeployError(f"cannot write {path}: {error.strerror}") from error
        raise


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all the files directly inside `folder`."""
    return sum(item.stat().st_size for item in folder.iterdir() if item.is_file())
