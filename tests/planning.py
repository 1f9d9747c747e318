"""What tests of plans share: settings of a small pruning, and figures of LLaMA-7B."""

from __future__ import annotations

from typing import Any

from command_line import TEXT

from owl_deploy.recipe import PruneSettings

LLAMA_7B_LINEARS = 6_476_005_376
"""32 blocks of 4 x 4096 x 4096 and 3 x 4096 x 11008."""
GIB = 2**30


def settings(**changes: Any) -> PruneSettings:
    values = {"sparsity": 0.6, "owl_m": 3.0, "calibration": TEXT, "n_samples": 4, "seq_len": 32}
    return PruneSettings.model_validate({**values, **changes})
