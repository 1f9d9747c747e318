"""The hidden folder in which a checkpoint grows, block by block, so that a stopped run can go on.

A finished block is a shard of the final checkpoint, written whole, with a record beside it.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_deploy.errors import RecipeError
from owl_deploy.files import file_sha256, write_json

__all__ = ["WorkFolder"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkFolder:
    """Shards and records of the blocks that are finished."""

    folder: Path

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any], *, resume: bool) -> WorkFolder:
        """Start afresh, or continue a folder of the same fingerprint.

        Raises:
            RecipeError: the folder was begun with other settings, data or model; the first difference is named.
        """
        folder = out.with_name(f".{out.name}.partial")
        work = cls(folder)
        before = work.load("fingerprint.json") if resume else None
        if isinstance(before, dict):
            for key in (*fingerprint, *before):
                if fingerprint.get(key) != before.get(key):
                    raise RecipeError(
                        f"cannot resume {out}: {key} was {before.get(key)!r} and is now {fingerprint.get(key)!r}; "
                        "set it back, or start anew without --resume"
                    )
            return work
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "fingerprint.json", fingerprint)
        return work

    def load(self, name: str) -> Any:
        """Return a JSON file of the folder, or None where it is not there or damaged: it is then made anew."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is damaged and made anew: %s", self.folder / name, error)
            return None

    def keep(self, name: str, value: Any, *, what: str) -> None:
        """Write a value the first time, and make sure that it is the same when the run goes on.

        Raises:
            RecipeError: it is not, which a search that ends by the clock can do where its result left the cache.
        """
        before = self.load(name)
        if before is None:
            write_json(self.folder / name, value)
        elif before != value:
            raise RecipeError(
                f"cannot resume: {what} differs from that of the stopped run; start anew without --resume"
            )

    def is_finished(self, index: int) -> bool:
        """Return whether a block's record and its shard are there and undamaged."""
        record = self.record(index)
        if not isinstance(record, dict) or not {"linears", "measured", "shard_sha256"} <= record.keys():
            return False
        shard = self.shard(index)
        if not shard.is_file() or file_sha256(shard) != record["shard_sha256"]:
            log.warning("%s is missing or damaged and made anew", shard)
            return False
        return True

    def finish(self, index: int, *, linears: list[dict[str, Any]], measured: dict[str, Any], **others: Any) -> None:
        """Record a block whose shard is written: facts of its linears, time and memory, and what else there is."""
        record = {"linears": linears, "measured": measured, "shard_sha256": file_sha256(self.shard(index)), **others}
        write_json(self.folder / f"block-{index:05d}.json", record)

    def record(self, index: int) -> Any:
        """Return what `finish` recorded."""
        return self.load(f"block-{index:05d}.json")

    def shard(self, index: int) -> Path:
        """Return the file of a block's weights."""
        return self.folder / f"block-{index:05d}.safetensors"

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder, ignore_errors=True)
