"""Which positions of a matrix may be zero: any, or so many in every group of columns.

Written "unstructured" or "keep N of M": papers and codes disagree whether 2:4 names the kept or the
pruned ones of a group, so neither spelling is taken here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Pattern", "parse_pattern"]


@dataclass(frozen=True)
class Pattern:
    """N:M: in every row, each group of `of` successive columns (the reduction axis) keeps `keep` of them."""

    keep: int
    of: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.keep / self.of

    def __str__(self) -> str:
        return f"keep {self.keep} of {self.of}"

    def check_columns(self, columns: int) -> None:
        """Raise ValueError where so many columns do not divide into groups."""
        if columns % self.of:
            raise ValueError(f"{columns} columns do not divide into groups for {self}")


def parse_pattern(text: str) -> Pattern | None:
    """Return the pattern that `text` names; None is unstructured.

    Raises:
        ValueError: it is neither `unstructured` nor `keep N of M` with 0 < N < M <= 64.
    """
    if text == "unstructured":
        return None
    match = re.fullmatch(r"keep (\d+) of (\d+)", text)
    if match is None:
        hint = " (2:4 is ambiguous: papers mean the kept ones, codes the pruned ones)" if ":" in text else ""
        raise ValueError(f'must be unstructured or "keep N of M", such as "keep 2 of 4"{hint}')
    keep, of = int(match[1]), int(match[2])
    if not 0 < keep < of <= 64:
        raise ValueError(f"must keep at least one of a group and not all of them, in groups of at most 64, got {text}")
    return Pattern(keep, of)
