"""The sparsity of every linear, searched by evolution over a database of levels (EvoPress, arXiv 2410.14649).

In: a skeleton, settings, where the search starts, calibration. Out: a sparsity for every linear, and how the search
went. The search itself is in `owl_deploy.evolution`, the pruned weights come from `owl_deploy.level_database`; here are
the whole model, which takes on the levels of a candidate, and its distance to the dense one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.calibration import Calibration
from owl_deploy.evolution import Evolved, LevelGrid, Levels, evolve, level_grid
from owl_deploy.files import write_json
from owl_deploy.generation import load_torch_model
from owl_deploy.level_database import LevelDatabase, most_bytes, observed_inputs, open_level_database
from owl_deploy.memory import release_free_memory
from owl_deploy.methods import Goal
from owl_deploy.observation import Observed
from owl_deploy.progress import OnStep
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Prunable, Skeleton
from owl_deploy.versions import versions

__all__ = ["Candidate", "SearchedLevels", "fitness_tokens", "search_levels"]

log = logging.getLogger(__name__)

_N_LEVELS = 8
"""On each side of the start, as in the paper: farther than a search of minutes goes."""
_WINDOW = 256
_BATCH_TOKENS = 1024
"""Per forward pass: logits of 1024 x 49152 float32 are 200 MB."""


@dataclass(frozen=True)
class SearchedLevels:
    """The outcome of a search."""

    sparsities: dict[str, float]
    """By linear; their mean, weighted by size, is that of the start."""
    facts: dict[str, Any]
    """For owl.json: the generations done, and the KL divergence from the dense model after each, in nats."""


def search_levels(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    start: list[dict[str, Goal]],
    calibration: Calibration,
    seen: list[dict[str, Observed]] | None,
    on_step: OnStep,
    *,
    seed: int,
    n_threads: int,
    folder: Path | None = None,
) -> SearchedLevels:
    """Search sparsities with a low KL divergence of the pruned model from the dense one.

    Kept in the cache under a hash of all that it depends on, the time budget included: the same settings give the
    same result again, however far the budget lets a search get.

    Args:
        skeletons: of the dense model, one per device; candidates are run on the first.
        settings: target, method and the size of the search.
        start: per block, by linear; level 0.
        calibration: for the statistics of the method, and of it the fitness tokens.
        seen: of `dense_inputs`, if known.
        on_step: told of every generation.
        seed: of the search.
        n_threads: of torch.
        folder: for hidden states, where they are to be on disk.

    Raises:
        OwlDeployError: an activation or the start's distance is not finite, or the disk is full.
    """
    skeleton = skeletons[0]
    linears = {name: linear for i in range(len(skeleton.blocks)) for name, linear in skeleton.linears(i).items()}
    goals = {name: goal.sparsity for block in start for name, goal in block.items()}
    grid = level_grid(
        [linear.weight.numel() for linear in linears.values()],
        [goals[name] for name in linears],
        step=settings.evopress_step,
        n_levels=_N_LEVELS,
    )
    facts = {
        "model": skeleton.checkpoint.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "start": [goals[name] for name in linears],
        "tokens": calibration.sha256,
        "shape": list(calibration.tokens.shape),  # the hash knows nothing of rows
        "seed": seed,
        "versions": versions("torch", "transformers"),
        "threads": n_threads,
        "devices": [one.device.type for one in skeletons],
        "format_version": 1,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = owl_deploy_cache() / "levels" / f"{digest[:32]}.json"
    evolved = _read(path, grid)
    if evolved is None:
        evolved = _evolved(skeletons, settings, grid, calibration, seen, on_step, seed, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"levels": evolved.levels, "curve": evolved.curve, "of": facts})
    found = dict(zip(linears, grid.sparsities(evolved.levels), strict=True))
    return SearchedLevels(
        found,
        {
            "step_weights": grid.step,
            "n_generations": evolved.n_generations,
            "n_linears_moved": sum(level != 0 for level in evolved.levels),
            "kl_divergence": list(evolved.curve),
        },
    )


def _evolved(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    grid: LevelGrid,
    calibration: Calibration,
    seen: list[dict[str, Observed]] | None,
    on_step: OnStep,
    seed: int,
    folder: Path | None,
) -> Evolved:
    skeleton = skeletons[0]
    names = [name for index in range(len(skeleton.blocks)) for name in skeleton.linears(index)]
    n_levels = {name: 1 + high - low for name, low, high in zip(names, grid.lowest, grid.highest, strict=True)}
    log.info("the levels take at most %.2f GiB on the disk", most_bytes(skeleton, n_levels) / 2**30)
    observed = observed_inputs(skeletons, settings, calibration, seen, on_step, folder=folder)
    tokens = fitness_tokens(torch.from_numpy(calibration.tokens), settings.evopress_tokens)
    with open_level_database(skeleton, settings, observed, folder or owl_deploy_cache() / "levels") as database:
        candidate = Candidate(skeleton, database, grid, tokens)
        evolved = evolve(
            grid.lowest,
            grid.highest,
            candidate.divergence,
            n_sequences=len(tokens),
            n_offspring=settings.evopress_offspring,
            n_generations=settings.evopress_generations,
            budget_seconds=settings.evopress_budget_seconds,
            seed=seed,
            on_step=on_step,
        )
    del candidate, database, observed
    gc.collect()
    release_free_memory()
    return evolved


def fitness_tokens(tokens: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Cut windows out of calibration sequences, the beginnings of all of them first.

    Args:
        tokens: (n_samples, seq_len).
        n_tokens: to be had at most, but one window is always there.

    Returns:
        (n, window), the window no longer than 256: more text in as many tokens is less alike.
    """
    window = min(_WINDOW, tokens.shape[1])
    per_sequence = tokens.shape[1] // window
    windows = tokens[:, : per_sequence * window].reshape(len(tokens), per_sequence, window).transpose(0, 1)
    return windows.reshape(-1, window)[: max(1, n_tokens // window)]


class Candidate:
    """The whole model in float32, which takes on levels, and what the dense one makes of the fitness tokens."""

    def __init__(self, skeleton: Skeleton, database: LevelDatabase, grid: LevelGrid, tokens: torch.Tensor) -> None:
        self.database, self.grid = database, grid
        self.tokens = tokens.to(skeleton.device)
        self.model: Any = load_torch_model(skeleton.checkpoint).requires_grad_(False).to(skeleton.device)
        # The same model with weights: its linears are found as those of the empty one are.
        whole = replace(skeleton, model=self.model, blocks=self.model.get_submodule(skeleton.prefix), _linears={})
        self.linears: list[tuple[int, str, Prunable]] = [
            (index, name, linear) for index in range(len(whole.blocks)) for name, linear in whole.linears(index).items()
        ]
        self.levels: list[int | None] = [None] * len(self.linears)
        """At which each linear is; None is dense."""
        self.batch_size = max(1, _BATCH_TOKENS // tokens.shape[1])
        with torch.inference_mode():
            self.expected: list[torch.Tensor] = []
            """Probabilities of the dense model, (window, vocab) float32 per sequence."""
            for row in self.tokens:
                logits = self.model(row[None], use_cache=False).logits[0].float()
                self.expected.append(torch.softmax(logits, dim=-1))
            # KL(p || q) = sum p log p - sum p z + log sum exp z of the logits z of q: the first term never changes.
            self.negative_entropy = [torch.special.xlogy(p, p).sum(dim=-1) for p in self.expected]

    def take_(self, levels: Levels) -> None:
        """Put the weights of those linears in place that are not at their level already."""
        for i, (index, name, linear) in enumerate(self.linears):
            if self.levels[i] != levels[i]:
                linear.set_(self.database.weight(index, name, self.grid.sparsity(i, levels[i])))
                self.levels[i] = levels[i]

    @torch.inference_mode()
    def divergence(self, levels: Levels, sequences: Sequence[int]) -> float:
        """Return KL(dense || candidate), in nats, the mean over all positions of some of the sequences."""
        self.take_(levels)
        total = 0.0
        for first in range(0, len(sequences), self.batch_size):
            batch = list(sequences[first : first + self.batch_size])
            logits = self.model(self.tokens[batch], use_cache=False).logits.float()
            for row, i in zip(logits, batch, strict=True):  # one at a time: temporaries are as large as the logits
                cross = torch.logsumexp(row, dim=-1) - (self.expected[i] * row).sum(dim=-1)
                total += float((cross + self.negative_entropy[i]).sum(dtype=torch.float64))
        return total / (len(sequences) * self.tokens.shape[1])


def _read(path: Path, grid: LevelGrid) -> Evolved | None:
    """Return what a file holds; None where it is not there or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        levels, curve = tuple(known["levels"]), tuple(float(value) for value in known["curve"])
        bounds = zip(levels, grid.lowest, grid.highest, strict=True)
        if sum(levels) == 0 and all(isinstance(n, int) and low <= n <= high for n, low, high in bounds) and curve:
            return Evolved(levels, curve)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None
