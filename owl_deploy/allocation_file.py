"""An allocation as a file: JSON or YAML, one sparsity per decoder block or per linear.

A flat mapping, easy to write by hand: block numbers (0, 1, ...) or full names of linears to sparsities.

    0: 0.62
    1: 0.74
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from owl_deploy.allocation import MAX_SPARSITY
from owl_deploy.errors import RecipeError, shown
from owl_deploy.files import write_bytes

__all__ = ["MEAN_TOLERANCE", "is_by_linear", "load_allocation", "save_allocation"]

MEAN_TOLERANCE = 0.001
"""How far the weighted mean of a file may be from the target: values written with three decimals are near enough."""


def save_allocation(path: Path, sparsities: Sequence[float], *, names: Sequence[str] | None = None) -> None:
    """Write an allocation, whole or not at all; `load_allocation` gives exactly the same numbers back.

    Args:
        path: ends in .json, .yaml or .yml; its folder is made when missing.
        sparsities: one per block or linear, each in [0, 1).
        names: full names of the linears. None: sparsities are of blocks 0, 1, ...

    Raises:
        RecipeError: the path ends in something else.
        ValueError: there are not as many different names as sparsities, or a sparsity is out of range.
        OwlDeployError: the disk is full.
    """
    keys = _keys(len(sparsities), names)
    for key, value in zip(keys, sparsities, strict=True):
        if not 0 <= value < 1:  # also refuses NaN
            raise ValueError(f"sparsities must be in [0, 1), got {value} for {key}")
    mapping = {key: float(value) for key, value in zip(keys, sparsities, strict=True)}
    if _is_json(path):
        text = json.dumps(mapping, indent=1) + "\n"
    else:
        plain = mapping if names is not None else {int(key): value for key, value in mapping.items()}
        text = yaml.safe_dump(plain, sort_keys=False, width=1 << 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def is_by_linear(path: Path) -> bool:
    """Return whether a file names linears, not blocks, going by its first key. Raises RecipeError."""
    pairs = _pairs(path)
    return bool(pairs) and not pairs[0][0].isdecimal()


def load_allocation(
    path: Path, n_weights: Sequence[int], target: float, *, names: Sequence[str] | None = None
) -> list[float]:
    """Read an allocation; the numbers are taken as they are.

    Args:
        path: a file as `save_allocation` writes it, or written by hand.
        n_weights: prunable weights of every block or linear.
        target: what the mean of the sparsities, weighted by these, must be to within `MEAN_TOLERANCE`.
        names: full names of the linears, in the order of `n_weights`. None: the file is by blocks 0, 1, ...

    Returns:
        One sparsity per block or linear, each in [0, max(0.99, target)].

    Raises:
        RecipeError: the file cannot be read or is no mapping, a block or linear is missing, unknown or there
            twice, a value is no number or out of range, or the mean is not the target.
        ValueError: there are not as many different names as weight counts, or a count is not positive.
    """
    keys = _keys(len(n_weights), names)
    if any(n <= 0 for n in n_weights):
        raise ValueError(f"need positive weight counts, got {list(n_weights)}")
    ceiling = max(MAX_SPARSITY, target)
    found: dict[str, float] = {}
    known = set(keys)
    for key, value in _pairs(path):
        if key not in known:
            raise RecipeError(
                f"{path}: unknown {_named(key, names)}, of value {shown(value)}; {_hint(key, keys, names)}"
            )
        if key in found:
            raise RecipeError(f"{path}: {_named(key, names)} is there twice, {found[key]:g} and {shown(value)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{path}: sparsity of {_named(key, names)} must be a number, got {shown(value)}")
        if not 0 <= value <= ceiling:  # also refuses NaN
            raise RecipeError(
                f"{path}: sparsity of {_named(key, names)} must be in [0, {ceiling:g}], got {shown(value)}"
            )
        found[key] = float(value)
    missing = [key for key in keys if key not in found]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise RecipeError(f"{path}: {_named(missing[0], names)} is missing{others}; {len(keys)} are needed")
    sparsities = [found[key] for key in keys]
    mean = math.fsum(s * n for s, n in zip(sparsities, n_weights, strict=True)) / sum(n_weights)
    # A mean of 0.701 for 0.7 is within: the slack is for its rounding.
    if not abs(mean - target) <= MEAN_TOLERANCE + 1e-12:
        raise RecipeError(
            f"{path}: the mean sparsity, weighted by the number of weights, is {mean:.6g}, which must be the target "
            f"{target:g} to within {MEAN_TOLERANCE:g}: change the values, or set sparsity to {mean:.4g}"
        )
    return sparsities


def _keys(n: int, names: Sequence[str] | None) -> list[str]:
    """Return what the n values are called in a file."""
    keys = [str(index) for index in range(n)] if names is None else list(names)
    if len(keys) != n or len(set(keys)) != n:
        raise ValueError(f"need {n} different names, got {len(keys)}, {len(set(keys))} of them different")
    return keys


def _is_json(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise RecipeError(f"an allocation is a .json, .yaml or .yml file, got {path}")
    return suffix == ".json"


def _pairs(path: Path) -> list[tuple[str, Any]]:
    """Return keys as they are written, twice where they are there twice, and values. Raises RecipeError."""
    is_json = _is_json(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the allocation {path}: {error}") from error
    try:
        pairs = _json_pairs(text) if is_json else _yaml_pairs(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        kind = "JSON" if is_json else "YAML"
        raise RecipeError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error
    if pairs is None:
        raise RecipeError(f"{path}: an allocation is a mapping of blocks or linears to sparsities")
    return pairs


def _json_pairs(text: str) -> list[tuple[str, Any]] | None:
    # Objects become tuples, which arrays never are; a dictionary would drop keys that are there twice.
    found = json.loads(text, object_pairs_hook=tuple)
    return list(found) if isinstance(found, tuple) else None


def _yaml_pairs(text: str) -> list[tuple[str, Any]] | None:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            return None
        # Keys as written: YAML would make 010 an eight and yes a one.
        keys = [key.value if isinstance(key, yaml.ScalarNode) else shown(key.value) for key, _ in node.value]
        values = [loader.construct_object(value, deep=True) for _, value in node.value]
    finally:
        loader.dispose()
    return list(zip(keys, values, strict=True))


def _named(key: str, names: Sequence[str] | None) -> str:
    text = key if len(key) <= 200 and key.isprintable() and key else shown(key)
    return f"{'block' if names is None else 'linear'} {text}"


def _hint(key: str, keys: list[str], names: Sequence[str] | None) -> str:
    """Say what would have been a known key."""
    if names is None:
        return f"blocks are 0 to {len(keys) - 1}"
    near = difflib.get_close_matches(key[:200], keys, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"the first linear is {keys[0]}"
