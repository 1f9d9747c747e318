"""One figure per decoder block of the dense model, from which an allocation shares out its target.

In: a skeleton and calibration tokens. Out: a list of floats. What is seen of the inputs of the dense
model is kept in the cache, since it serves every sparsity, method and allocation.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.calibration import Calibration
from owl_deploy.files import write_bytes
from owl_deploy.methods.wanda import score as wanda_score
from owl_deploy.observation import advance_, input_groups, observe
from owl_deploy.progress import OnStep, Step
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Skeleton
from owl_deploy.spectrum import hill_alpha_of
from owl_deploy.statistics import SquaredNorm, median, outlier_ratio
from owl_deploy.versions import versions

__all__ = ["FIGURE_NAMES", "NEEDS_INPUTS", "block_figures", "dense_norms"]

FIGURE_NAMES = {"owl": "outlier_ratio", "dlp": "median_score", "alphapruning": "alpha", "isc": "sensitivity"}
"""The allocations that need a figure, and what it is called in owl.json."""

NEEDS_INPUTS = frozenset({"owl", "dlp", "isc"})
"""Those of them that need calibration."""


def block_figures(
    skeleton: Skeleton, settings: PruneSettings, norms: list[dict[str, SquaredNorm]] | None, on_step: OnStep
) -> list[float]:
    """Return the figure of every block that `settings.allocation` needs.

    outlier_ratio: `statistics.outlier_ratio` of its Wanda scores. median_score: their median (DLP,
    arXiv 2505.23807; its code takes the mean in the unstructured path). alpha: mean over its linears of the
    tail exponent (AlphaPruning). sensitivity: mean over its weights of the diagonal of the layer-wise Hessian, the
    cheap stand-in for the Hessian trace of the whole model's loss that arXiv 2310.09499 estimates on GPUs.

    Args:
        norms: of `dense_norms`; None for alphapruning.
    """
    n_blocks = len(skeleton.blocks)
    figures: list[float] = []
    for index in range(n_blocks):
        linears = skeleton.linears(index)
        with skeleton.filled(index):
            if settings.allocation == "alphapruning":
                figure = float(np.mean([hill_alpha_of(linear.weight, name=name) for name, linear in linears.items()]))
            else:
                assert norms is not None
                known = norms[index]
                if settings.allocation == "isc":
                    traces = [
                        float(2 * known[name].mean.sum()) * linear.out_features for name, linear in linears.items()
                    ]
                    figure = sum(traces) / sum(linear.weight.numel() for linear in linears.values())
                else:
                    scores = [wanda_score(linear.weight, known[name]) for name, linear in linears.items()]
                    if settings.allocation == "owl":
                        figure = outlier_ratio(scores, owl_m=settings.owl_m)
                    else:
                        figure = median(scores)
        figures.append(figure)
        on_step(
            Step("figures of the dense model", index + 1, n_blocks, f"{FIGURE_NAMES[settings.allocation]} {figure:.4g}")
        )
    return figures


def dense_norms(
    skeleton: Skeleton, calibration: Calibration, on_step: OnStep, *, n_threads: int
) -> list[dict[str, SquaredNorm]]:
    """Return the norms of the inputs of every linear of the dense model, one mapping per block.

    Kept in the cache under a hash of the model's files, the tokens, the versions and the threads (by which sums may
    round differently).

    Raises:
        OwlDeployError: an activation is NaN or Inf.
    """
    path = _cache_path(skeleton, calibration, n_threads)
    try:
        return _read(path, skeleton)
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or damaged: made anew
    inputs = skeleton.capture(torch.from_numpy(calibration.tokens))
    n_blocks = len(skeleton.blocks)
    norms: list[dict[str, SquaredNorm]] = []
    for index in range(n_blocks):
        linears = skeleton.linears(index)
        with skeleton.filled(index) as block:
            groups = input_groups(block, inputs, index, linears)
            observed = observe(block, inputs, index, linears, groups, (SquaredNorm,))
            advance_(block, inputs, index)
        block_norms = {}
        for name in linears:
            (norm,) = observed[name].statistics
            assert isinstance(norm, SquaredNorm)
            block_norms[name] = norm
        norms.append(block_norms)
        on_step(Step("inputs of the dense model", index + 1, n_blocks))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: norm.mean for block_norms in norms for name, norm in block_norms.items()}
    # Linears with the same inputs share a tensor, which the format refuses.
    write_bytes(path, save({name: tensor.clone() for name, tensor in tensors.items()}))
    return norms


def _cache_path(skeleton: Skeleton, calibration: Calibration, n_threads: int) -> Path:
    facts = {
        "model": skeleton.checkpoint.fingerprint,
        "tokens": calibration.sha256,
        "versions": versions("torch", "transformers"),
        "threads": n_threads,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return owl_deploy_cache() / "statistics" / f"{digest[:32]}.safetensors"


def _read(path: Path, skeleton: Skeleton) -> list[dict[str, SquaredNorm]]:
    stored = load_file(path)
    norms = []
    for index in range(len(skeleton.blocks)):
        block_norms = {}
        for name, linear in skeleton.linears(index).items():
            norm = SquaredNorm(linear.in_features)
            if stored[name].shape != norm.mean.shape:
                raise KeyError(name)
            norm.mean = stored[name]
            block_norms[name] = norm
        norms.append(block_norms)
    return norms
