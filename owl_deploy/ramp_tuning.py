"""The slope of an arithmetic allocation, tuned on calibration text (ATP, arXiv 2502.14770).

In: a skeleton, settings, calibration. Out: the slope with the lowest loss, and the losses of all that were tried. The
official code chooses it by perplexity on the test text of WikiText-2, which leaks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from owl_deploy.allocation import largest_slope, ramp
from owl_deploy.block_pruning import forward_dtype, prune_block_, statistic_kinds
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.calibration import Calibration
from owl_deploy.files import write_json
from owl_deploy.methods import Goal
from owl_deploy.progress import OnStep, Step
from owl_deploy.recipe import PruneSettings
from owl_deploy.replicas import Replicas
from owl_deploy.skeleton import Skeleton
from owl_deploy.text import tokens_sha256
from owl_deploy.versions import versions

__all__ = ["TunedSlope", "tune_slope"]

_N_SLOPES = 9
_MAX_SEQUENCES = 16
"""One number is chosen, and neighbouring slopes differ by tens of per cent: few sequences tell them apart."""


@dataclass(frozen=True)
class TunedSlope:
    """The outcome of tuning."""

    slope: float
    losses: dict[str, float]
    """Slope -> mean next-token loss on calibration sequences, nats."""


def tune_slope(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    calibration: Calibration,
    on_step: OnStep,
    *,
    n_threads: int,
    folder: Path | None = None,
) -> TunedSlope:
    """Prune in memory with each of nine slopes, evenly from 0 to the largest, and keep the one of lowest loss.

    Pruned by magnitude where that is the method, else by Wanda: the methods that update weights take many times as
    long, and what the slope shares out is the same. Kept in the cache.

    Args:
        skeletons: of the dense model, one per device.
        settings: target and method.
        calibration: of which up to 16 sequences are used, both for statistics and for the loss.
        on_step: told of every block.
        n_threads: of torch.
        folder: for the hidden states, where they are to be on disk.

    Raises:
        OwlDeployError: an activation is NaN or Inf.
    """
    tokens = torch.from_numpy(calibration.tokens[:_MAX_SEQUENCES])
    method = "magnitude" if settings.method == "magnitude" else "wanda"
    stand_in = settings.model_copy(update={"method": method, "refine": "none", "true_sequential": False})
    facts = {
        "model": skeletons[0].checkpoint.fingerprint,
        "tokens": tokens_sha256(tokens.numpy()),
        "shape": list(tokens.shape),
        "method": method,
        "sparsity": settings.sparsity,
        "min_expert_tokens": settings.min_expert_tokens,
        "forward_dtype": settings.forward_dtype,
        "versions": versions("torch", "transformers"),
        "threads": n_threads,
        "devices": [skeleton.device.type for skeleton in skeletons],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = owl_deploy_cache() / "slopes" / f"{digest[:32]}.json"
    known = _read(path)
    if known is not None:
        return known
    largest = largest_slope(len(skeletons[0].blocks), settings.sparsity)
    slopes = [round(float(slope), 6) for slope in np.linspace(0, largest, _N_SLOPES)]
    slopes[-1] = min(slopes[-1], largest)
    losses: dict[str, float] = {}
    for i, slope in enumerate(slopes):
        losses[repr(slope)] = _loss(skeletons, stand_in, tokens, slope, folder, on_step, i)
    tuned = TunedSlope(float(min(losses, key=lambda slope: losses[slope])), losses)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"slope": tuned.slope, "losses": losses, "of": facts})
    return tuned


def _loss(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    tokens: torch.Tensor,
    slope: float,
    folder: Path | None,
    on_step: OnStep,
    i: int,
) -> float:
    """Return the mean next-token loss of the model pruned with a slope; nothing is written."""
    skeleton = skeletons[0]
    n_blocks = len(skeleton.blocks)
    sparsities = ramp(skeleton.n_weights(), settings.sparsity, slope=slope)
    replicas = Replicas.capture(skeletons, tokens, threads_apart=True, dtype=forward_dtype(settings), folder=folder)
    for index, sparsity in enumerate(sparsities):
        dtypes = {name: skeleton.checkpoint.dtype(tensor) for name, tensor in skeleton.block_tensors(index).items()}
        goals = dict.fromkeys(skeleton.linears(index), Goal(sparsity))
        with replicas.filled(index):
            prune_block_(
                skeleton, settings, index, replicas if statistic_kinds(settings) else None, None, goals, dtypes
            )
            replicas.advance_(index)
        on_step(Step("tuning the slope", i * n_blocks + index + 1, _N_SLOPES * n_blocks, f"slope {slope:g}"))
    losses = []
    with skeleton.head() as logits:
        states = (hidden for inputs in replicas.inputs for hidden in inputs.hidden_states)
        for row, hidden in zip(tokens, states, strict=True):
            found = logits(row[None], hidden)[0, :-1].float()
            losses.append(float(cross_entropy(found, row[1:].to(found.device))))
    return float(np.mean(losses))


def _read(path: Path) -> TunedSlope | None:
    """Return what a file holds; None where it is not there or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return TunedSlope(float(known["slope"]), {str(key): float(loss) for key, loss in known["losses"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
