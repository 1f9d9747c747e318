"""How a long stage tells its caller where it is; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["OnStep", "Step", "silent"]


@dataclass(frozen=True)
class Step:
    """One step of a stage is done."""

    stage: str
    """What runs, in a few words; a new text opens a new progress bar."""
    done: int
    """Steps finished so far, 0..total."""
    total: int
    note: str = ""
    """A figure worth seeing beside the bar."""


OnStep = Callable[[Step], None]


def silent(step: Step) -> None:
    """Ignore a step: the default of every stage."""
