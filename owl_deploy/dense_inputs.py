"""What calibration shows of the inputs of every linear of the dense model.

In: a skeleton and calibration tokens. Out: the norms of the inputs, kept in the cache, since they serve every
sparsity, method and allocation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.calibration import Calibration
from owl_deploy.files import write_bytes
from owl_deploy.observation import Observed
from owl_deploy.progress import OnStep, Step
from owl_deploy.replicas import Replicas
from owl_deploy.skeleton import Skeleton
from owl_deploy.statistics import SquaredNorm
from owl_deploy.versions import versions

__all__ = ["dense_inputs", "norm_of"]


def dense_inputs(
    skeletons: Sequence[Skeleton],
    calibration: Calibration,
    on_step: OnStep,
    *,
    n_threads: int,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> list[dict[str, Observed]]:
    """Return, per block, what was seen of the inputs of each linear of the dense model: one `SquaredNorm`.

    Kept in the cache under a hash of the model's files, the tokens, the versions, the device and the threads (by
    which sums may round differently).

    Args:
        skeletons: of the dense model, one per device.
        calibration: the tokens.
        on_step: told of every block.
        n_threads: of torch.
        dtype: of matrix products.
        folder: for the hidden states, where they are to be on disk.

    Raises:
        OwlDeployError: an activation is NaN or Inf.
    """
    skeleton = skeletons[0]
    path = _cache_path(skeletons, calibration, n_threads, dtype)
    try:
        return _read(path, skeleton)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # not there, or damaged: made anew
    tokens = torch.from_numpy(calibration.tokens)
    replicas = Replicas.capture(skeletons, tokens, threads_apart=True, dtype=dtype, folder=folder)
    n_blocks = len(skeleton.blocks)
    seen: list[dict[str, Observed]] = []
    for index in range(n_blocks):
        with replicas.filled(index):
            seen.append(replicas.observe_and_advance_(index, replicas.input_groups(index), (SquaredNorm,)))
        on_step(Step("inputs of the dense model", index + 1, n_blocks))
    by_name = {name: observed for block_seen in seen for name, observed in block_seen.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Linears with the same inputs share a tensor, which the format refuses.
    tensors = {name: norm_of(observed).mean.cpu().clone() for name, observed in by_name.items()}
    n_tokens = {name: observed.n_tokens for name, observed in by_name.items()}
    write_bytes(path, save(tensors, metadata={"n_tokens": json.dumps(n_tokens)}))
    return seen


def norm_of(observed: Observed) -> SquaredNorm:
    """Return the norm that was observed first."""
    norm = observed.statistics[0]
    assert isinstance(norm, SquaredNorm)
    return norm


def _cache_path(skeletons: Sequence[Skeleton], calibration: Calibration, n_threads: int, dtype: torch.dtype) -> Path:
    facts = {
        "model": skeletons[0].checkpoint.fingerprint,
        "tokens": calibration.sha256,
        "versions": versions("torch", "transformers"),
        "threads": n_threads,
        "devices": [skeleton.device.type for skeleton in skeletons],
        "dtype": str(dtype),
        "format_version": 3,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return owl_deploy_cache() / "statistics" / f"{digest[:32]}.safetensors"


def _read(path: Path, skeleton: Skeleton) -> list[dict[str, Observed]]:
    """Read the cache. Raises KeyError, TypeError or ValueError where it is not what was written."""
    with safe_open(path, framework="pt", device=str(skeleton.device)) as stored:
        n_tokens = json.loads((stored.metadata() or {})["n_tokens"])
        seen = []
        for index in range(len(skeleton.blocks)):
            block_seen = {}
            for name, linear in skeleton.linears(index).items():
                norm = SquaredNorm(linear.in_features)
                mean = stored.get_tensor(name)
                if mean.shape != norm.mean.shape or not isinstance(n_tokens[name], int):
                    raise ValueError(name)
                norm.mean = mean
                block_seen[name] = Observed((norm,), n_tokens[name])
            seen.append(block_seen)
    return seen
