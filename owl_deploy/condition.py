"""Conditions such as `speedup<1.5`, under which a bench result does not pass: text in, checked parts out.

Which rows a condition speaks of, and what is true of them, is the business of `owl_deploy.bench.gate`.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from dataclasses import dataclass
from typing import Literal

from owl_deploy.errors import shown

__all__ = ["QUANTITIES", "Condition", "parse_condition"]

QUANTITIES: tuple[str, ...] = (
    *("speedup", "speedup.low", "speedup.high"),
    *("ms.p50", "ms.p90", "ms.p99", "ms.min", "tokens_per_s"),
    *("perplexity", "kl_divergence", "top1_agreement", "sparsity"),
    *("peak_rss_bytes", "load_ms", "bytes_per_step", "ceiling_fraction"),
)
"""What conditions may be about: the names that a row of report.json has; `speedup` is `speedup.p50` there."""

_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SHAPE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """A quantity, a comparison and a number."""

    quantity: str
    comparison: Literal["<", "<=", ">", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{self.quantity}{self.comparison}{self.limit:g}"

    def holds(self, value: float) -> bool:
        """Return whether a value meets the condition, that is: does not pass."""
        return bool(_COMPARISONS[self.comparison](value, self.limit))


def parse_condition(text: str) -> Condition:
    """Read a condition: a quantity, one of < <= > >=, and a number in the unit of report.json.

    Raises:
        ValueError: it is none, or about nothing that a row has.
    """
    match = _SHAPE.fullmatch(text)
    limit = _number(match[3]) if match else None
    if match is None or limit is None:
        raise ValueError(
            f"{shown(text)} is no condition: write a quantity, one of < <= > >=, and a number, such as speedup<1.5"
        )
    quantity, comparison = match[1], match[2]
    if quantity not in QUANTITIES:
        near = difflib.get_close_matches(quantity.lower(), QUANTITIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(QUANTITIES)}"
        raise ValueError(f"unknown quantity {shown(quantity)}; {hint}")
    return Condition(quantity, comparison, limit)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
