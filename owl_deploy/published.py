"""What may be published of settings and messages: everything but the folders of this machine.

In: settings, text sources, sentences. Out: the same without folders, and the hashes of files, whose content counts and
not where they lie.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from owl_deploy.files import file_sha256
from owl_deploy.recipe import PruneSettings

__all__ = ["file_hashes", "public_settings", "public_source", "without_folders"]

_KINDS_WITH_PATH = ("text", "jsonl", "wikitext2", "c4", "file")


def public_settings(settings: PruneSettings) -> dict[str, Any]:
    """Return settings as JSON values, files by their names."""
    values = settings.model_dump(mode="json")
    return {**values, **{key: public_source(values[key]) for key in ("calibration", "allocation")}}


def file_hashes(settings: PruneSettings) -> dict[str, str]:
    """Return the hashes of the files that settings name, by key: their content counts, not where they lie."""
    found: dict[str, str] = {}
    for key in ("calibration", "allocation"):
        kind, _, rest = str(getattr(settings, key)).partition(":")
        paths = [Path(rest), Path(rest.rpartition(":")[0])] if kind in _KINDS_WITH_PATH and rest else []
        for path in filter(Path.is_file, paths):
            found[key] = _hash(path, path.stat().st_mtime_ns)
    return found


@functools.cache
def _hash(path: Path, _: int) -> str:
    """Return the hash of a file, read once per change: every cell asks, and a shard of C4 has 300 MB."""
    return file_sha256(path)


def public_source(source: str) -> str:
    """Return a text source or an allocation without the folder that its file lies in."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{Path(rest).name}" if rest and kind in _KINDS_WITH_PATH else source


def without_folders(sentence: str) -> str:
    """Return a sentence in which absolute paths are cut to their last part."""
    return re.sub(r"(?<![\w/.])/(?:[^\s/:'\"]+/)+", "", sentence)
