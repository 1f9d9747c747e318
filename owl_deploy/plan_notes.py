"""What a reader of a plan should not find out afterwards.

In: the facts of a plan. Out: sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plan_notes"]

_NO_SPEEDUP = 0.4
"""Published decode times (OWL, LSA) and our own kernels gain little or nothing below this sparsity."""


def plan_notes(facts: Mapping[str, Any]) -> list[str]:
    """Return the notes of a plan, given the other content of its plan.json."""
    notes = []
    if facts["range"] is not None:
        notes.append(
            f"The allocation {facts['recipe']['prune']['allocation']} needs weights, and this folder has none: only "
            "the range that the rule allows is known; sizes and sparsities are those of uniform sparsity."
        )
    asked = [block["sparsity"] for block in facts["blocks"] if block["sparsity"] is not None]
    low = [sparsity for sparsity in asked if sparsity < _NO_SPEEDUP]
    if low:
        notes.append(
            f"{len(low)} of {len(asked)} blocks are asked for less than {_NO_SPEEDUP:.0%} (the lowest {min(low):.1%}): "
            "they will hardly be faster than dense ones."
        )
    if facts["time"]["device"] != "cpu":
        notes.append(f"The time was never compared with runs on {facts['time']['device']}: it may be far off.")
    artifacts = facts["sizes"]["artifacts"]
    dense = {(one["target"], one["precision"]): one["bytes"] for one in artifacts if one["weights"] == "dense"}
    for artifact in artifacts:
        before = dense.get((artifact["target"], artifact["precision"]), artifact["bytes_dense"])
        if artifact["weights"] != "dense" and artifact["bytes"] >= 0.99 * before:
            notes.append(f"The artifact {artifact['name']} is not predicted to shrink.")
        if "reason" in artifact:
            notes.append(f"The artifact {artifact['name']}: {artifact['reason']}.")
    if facts["sizes"]["reason"] is not None:
        notes.append(f"No artifact is predicted: {facts['sizes']['reason']}.")
    return notes
