"""Where text comes from, and how it becomes tokens. Needs neither torch nor a network by itself.

In: a source as users name it (`python-docs`, `text:PATH`, ...) and whether its calibration or its
evaluation part is meant; a folder with a `tokenizer.json`. Out: documents, and token ids.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError

__all__ = ["TEXT_SOURCES", "Encoder", "Part", "documents", "evaluation_text", "tokens_sha256"]

Part = Literal["calibration", "evaluation"]
TEXT_SOURCES = (
    "generated, python-docs, wikitext2[:PATH], c4[:PATH], text:PATH, jsonl:PATH[:field], hf:NAME[:config[:split]]"
)

# First shard of the English part, as all published pruning code uses it (algorithms: 1.5 and 1.6).
_C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}
_C4_EVALUATION_DOCUMENTS = 1100


def documents(source: str, part: Part) -> Iterator[str]:
    """Yield the documents of a text source, lazily.

    Args:
        source: a name from `TEXT_SOURCES` other than `generated`.
        part: `python-docs`, `wikitext2` and `c4` keep calibration and evaluation text apart; the
            other sources give the same text for both.

    Raises:
        RecipeError: the source is unknown.
        OwlDeployError: its file or data set cannot be read.
    """
    kind, _, rest = source.partition(":")
    if source == "python-docs":
        yield _python_docs(part)
    elif kind == "text" and rest:
        yield _read_text(Path(rest))
    elif kind == "jsonl" and rest:
        yield from _jsonl(rest)
    elif kind == "wikitext2":
        yield _wikitext_local(Path(rest)) if rest else _wikitext_hub(part)
    elif kind == "c4":
        split, file = _C4_FILES[part]
        if rest:
            yield from _data_set("json", data_files={split: rest}, split=split)
        else:
            yield from _data_set("allenai/c4", data_files={split: file}, split=split)
    elif kind == "hf" and rest:
        name, *more = rest.split(":")
        config = more[0] if more else None
        yield from _data_set(name, name=config, split=more[1] if len(more) > 1 else "train")
    else:
        raise RecipeError(f"unknown text source {source!r}; known are {TEXT_SOURCES}")


def evaluation_text(source: str) -> str:
    """Return the evaluation part of a source as one string, joined as its published protocol joins it.

    C4: the first 1100 validation documents joined by a space; documents of other sources are
    joined by two newlines (WikiText-2 rows too: GPTQ and SparseGPT evaluation).
    """
    if source == "generated":
        raise RecipeError("generated text comes from the model itself: evaluate on another text, such as python-docs")
    if source.partition(":")[0] == "c4":
        return " ".join(
            text for _, text in zip(range(_C4_EVALUATION_DOCUMENTS), documents(source, "evaluation"), strict=False)
        )
    return "\n\n".join(documents(source, "evaluation"))


def _python_docs(part: Part) -> str:
    """Return the Python language reference: its first 80 % of characters, or its last 20 %."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 4 // 5
    return text[:cut] if part == "calibration" else text[cut:]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OwlDeployError(f"cannot read the text {path}: {error}") from error


def _jsonl(rest: str) -> Iterator[str]:
    """Yield a field (`text` unless named) of every line of a JSON Lines file."""
    path, _, field = rest.rpartition(":")
    if not path or Path(rest).exists():
        path, field = rest, "text"
    for number, line in enumerate(io.StringIO(_read_text(Path(path))), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise OwlDeployError(f"{path} line {number} is not a JSON object with a field {field!r}") from error
        if not isinstance(value, str):
            raise OwlDeployError(f"{path} line {number}: field {field!r} is not text")
        yield value


def _wikitext_local(path: Path) -> str:
    """Return a raw WikiText file joined as the hub serves it: rows keep their newline, blank rows are empty."""
    lines = io.StringIO(_read_text(path))  # not splitlines, which also cuts at U+2028 and the like
    return "\n\n".join("" if not line.strip() else line for line in lines)


def _wikitext_hub(part: Part) -> str:
    """Return WikiText-2 raw: test rows joined by two newlines, train rows (calibration) by one space."""
    split, glue = ("train", " ") if part == "calibration" else ("test", "\n\n")
    return glue.join(_data_set("Salesforce/wikitext", name="wikitext-2-raw-v1", split=split))


def _data_set(path: str, **arguments: Any) -> Iterator[str]:
    """Yield the text of a data set's rows, streamed."""
    from datasets import load_dataset

    try:
        for row in load_dataset(path, streaming=True, **arguments):
            yield row["text"]
    except KeyError as error:
        raise OwlDeployError(f"the data set {path} has no column named text") from error
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and aiohttp's errors
        raise OwlDeployError(
            f"the data set {path} cannot be read ({type(error).__name__}): without a hub use python-docs, "
            "generated or text:PATH"
        ) from error


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer, from its `tokenizer.json`."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    adds_bos: bool
    """Whether the tokenizer by itself starts a text with the begin-of-sequence token."""

    @classmethod
    def open(cls, folder: Path) -> Encoder:
        """Read the tokenizer of a checkpoint or an artifact. Raises UnsupportedModelError."""
        file = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else _slow_tokenizer(folder)
        except Exception as error:  # tokenizers raises plain Exception
            raise UnsupportedModelError(f"no tokenizer in {folder}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        bos, eos = (_special_id(folder, tokenizer, name) for name in ("bos_token", "eos_token"))
        start = tokenizer.encode("a").ids[:1]
        return cls(tokenizer, bos, eos, adds_bos=bos is not None and start == [bos])

    def encode(self, text: str, *, special_tokens: bool = True) -> NDArray[np.int64]:
        """Return the token ids of one text, (n,) int64."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids, dtype=np.int64)


def _slow_tokenizer(folder: Path) -> Tokenizer:
    """Convert a tokenizer that has no tokenizer.json; transformers knows how."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer


def _special_id(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """Return the id of a special token named in the tokenizer's or the model's configuration."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"{path} is not a JSON object: {error}") from error
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found: int | None = tokenizer.token_to_id(content)
            return found
    return None


def tokens_sha256(tokens: NDArray[np.int64]) -> str:
    """Return the SHA-256 of token ids as little-endian int64 in row order, in hex."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i8").tobytes()).hexdigest()
