"""What a reader of an explanation should not have to find out alone.

In: an explanation. Out: sentences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from owl_deploy.engines.bridge import LICENCE_NOTICE

if TYPE_CHECKING:
    from owl_deploy.explain import Explanation

__all__ = ["explain_notes"]


def explain_notes(explanation: Explanation) -> list[str]:
    """Return the notes of an explanation, given all else of it."""
    return [*_engine_notes(explanation), *_weight_notes(explanation), *_limit_notes(explanation)]


def _engine_notes(explanation: Explanation) -> list[str]:
    facts, nodes = explanation.artifact.facts, explanation.nodes
    notes = []
    if nodes.missing is not None:
        notes.append(f"Not known {nodes.missing}.")
    elsewhere = {row.provider for row in nodes.rows if row.n_run} - {"CPUExecutionProvider"}
    if elsewhere:
        notes.append(f"Some nodes do not run on the CPU provider but on {', '.join(sorted(map(str, elsewhere)))}.")
    if facts.target == "deepsparse":
        notes.append(
            "DeepSparse's format in memory is not public: its non-zero values alone are counted, so the bytes and the "
            "floor are lower bounds, and no break-even is known."
        )
        notes.append(LICENCE_NOTICE)
    return notes


def _weight_notes(explanation: Explanation) -> list[str]:
    facts, manifest = explanation.artifact.facts, explanation.artifact.manifest
    notes = []
    if facts.target == "onnxruntime" and facts.weights == "sparse-initializer":
        notes.append(
            "ONNX Runtime expands sparse initializers when it loads them and multiplies them as dense ones: a smaller "
            "file, no speed."
        )
    if facts.target == "onnxruntime" and facts.weights != "sparse-operator":
        if facts.precision == "fp16":
            notes.append(
                "fp16 is how weights lie in the file: ONNX Runtime turns them into float32 when it loads them."
            )
        in_blocks = [matrix for matrix in explanation.matrices if matrix.is_in_block]
        enough = [m for m in in_blocks if m.break_even is not None and m.sparsity >= m.break_even]
        if enough:
            notes.append(
                f"{len(enough)} of {len(in_blocks)} matrices in the blocks have zeros enough to pay, and all are "
                "multiplied here: export with --weights sparse-operator."
            )
    packed_for = (manifest.get("settings") or {}).get("machine") if facts.weights == "sparse-operator" else None
    if packed_for is not None and packed_for != explanation.machine["class"]:
        notes.append(
            f"Encodings were chosen for {packed_for}, and this machine is {explanation.machine['class']}: export with "
            f"--machine {explanation.machine['class']} for it."
        )
    return notes


def _limit_notes(explanation: Explanation) -> list[str]:
    notes = []
    parity = explanation.artifact.manifest.get("parity")
    if not parity:
        notes.append("Its parity with the checkpoint was not checked, so bench shows no speed-up of it.")
    largest_cache = max(explanation.machine["caches"].values(), default=0)
    if explanation.read_bytes < largest_cache:
        notes.append(
            f"A step reads less than the largest cache of this processor holds ({largest_cache / 1e6:.0f} MB): memory "
            "bandwidth need not bound it."
        )
    cache = next(part for part in explanation.parts if part.name == "KV cache")
    n_positions = explanation.artifact.facts.max_positions
    if explanation.past_len and cache.share < 0.5:
        rest = explanation.read_bytes - cache.read_bytes
        even = round(rest / cache.read_bytes * explanation.past_len)
        if even < n_positions:
            notes.append(f"From {even} tokens of context on, the KV cache is more than half of what a step reads.")
    return notes
