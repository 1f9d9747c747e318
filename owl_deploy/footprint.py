"""How much memory the prune stage will take, before it starts.

In: a skeleton and settings. Out: bytes per phase. Every phase of the stage that holds something large is a line
here; constants are bytes per element that were counted in the code and checked against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from owl_deploy.generation import SAMPLED_TOGETHER
from owl_deploy.hessian_trace import TRACED_TOKENS
from owl_deploy.memory import rss_bytes
from owl_deploy.methods import METHODS
from owl_deploy.methods.method import Method
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import Skeleton
from owl_deploy.statistics import Hessian

__all__ = ["Footprint", "predict_footprint"]

_FLOAT = 4
_GIB = 2**30

_WORKING_BYTES = {"sparsegpt": 20, "isc": 20, "foundation": 28, "alps": 60, "magnitude": 26}
"""Bytes per weight of the matrix at work, its scores, masks and copies: what is not here takes `_SCORING_BYTES`."""
_SCORING_BYTES = 14
_DSNOT_BYTES = 48


@dataclass(frozen=True)
class Footprint:
    """Bytes of resident memory."""

    held: int
    """What the process holds before the stage: the interpreter and its libraries."""
    phases: dict[str, int]
    """What each phase takes beyond that, without hidden states."""
    hidden_states: int
    """Of all calibration sequences between two blocks; on disk they are one sequence's."""
    whole_model: dict[str, int]
    """What phases take that hold the whole model, before there are hidden states."""

    def peak(self, *, states_on_disk: bool) -> int:
        """Return the largest sum, in bytes."""
        return self.held + max(size for size, _ in self._sums(states_on_disk).values())

    def describe(self, *, states_on_disk: bool) -> str:
        """Say the peak and what it consists of, in GiB."""
        sums = self._sums(states_on_disk)
        phase = max(sums, key=lambda name: sums[name])
        size, states = sums[phase]
        parts = [f"{self.held / _GIB:.2f} held", f"{(size - states) / _GIB:.2f} {phase}"]
        if states_on_disk:
            parts.append(f"{self.hidden_states / _GIB:.2f} hidden states on disk")
        elif states:
            parts.append(f"{states / _GIB:.2f} hidden states")
        return f"{(self.held + size) / _GIB:.2f} GiB ({', '.join(parts)})"

    def _sums(self, states_on_disk: bool) -> dict[str, tuple[int, int]]:
        """Return per phase its bytes, and how many of them are hidden states."""
        states = 0 if states_on_disk else self.hidden_states
        sums = {name: (size + states, states) for name, size in self.phases.items()}
        return sums | {name: (size, 0) for name, size in self.whole_model.items()}


def predict_footprint(skeleton: Skeleton, settings: PruneSettings, *, samples_text: bool = False) -> Footprint:
    """Predict what pruning will hold.

    Args:
        skeleton: of the model, empty.
        settings: of the stage.
        samples_text: whether the model is to generate its calibration text first.
    """
    checkpoint, model = skeleton.checkpoint, skeleton.model
    stored = {name: checkpoint.dtype(name).itemsize for name in checkpoint.tensors}
    prefix = f"{skeleton.prefix}."
    outside = {name: p.numel() for name, p in model.named_parameters() if not name.startswith(prefix)}
    outside_stored = sum(stored[skeleton.tensor_name(name)] * n for name, n in outside.items())
    blocks = range(len(skeleton.blocks))
    weights = [{name: p.numel() for name, p in skeleton.blocks[i].named_parameters()} for i in blocks]
    block = _FLOAT * max(sum(sizes.values()) for sizes in weights)
    tensor = max(n for sizes in (*weights, outside) for n in sizes.values())
    linears = [linear for i in blocks for linear in skeleton.linears(i).values()]
    linear = max(linear.weight.numel() for linear in linears)
    width = max(*stored.values(), 2)
    hidden = int(model.config.hidden_size)
    widest = max(max(linear.out_features, linear.in_features) for linear in linears)
    sequence = _FLOAT * settings.seq_len * (10 * hidden + 4 * widest)
    side_by_side = min(torch.get_num_threads(), settings.n_samples) * sequence  # see `Replicas.capture`
    # A tensor is read as stored and as float32; both are there for a moment.
    reading = (width + _FLOAT) * tensor
    method = METHODS[settings.method]
    is_hessian = method.new_statistic is Hessian
    working = _WORKING_BYTES.get(method.name, _SCORING_BYTES) + (_DSNOT_BYTES if settings.refine == "dsnot" else 0)
    # A shard is converted, and serialised by the library.
    shard = 2 * width * block // _FLOAT if width < _FLOAT else block
    phases = {
        "embedding": _FLOAT * sum(outside.values()) + width * max(outside.values()),
        "reading a block": block + reading,
        "pruning a block": block
        + (sequence if is_hessian else side_by_side)
        + max(_hessians(skeleton, method) + working * linear, shard),
        "finishing": 2 * outside_stored,
    }
    if _sees(settings):
        phases["running a dense block"] = block + side_by_side
    if settings.allocation in ("owl", "dlp"):
        phases["scores of a block"] = 2 * block + 16 * linear
    if settings.allocation == "alphapruning":
        side = max(min(linear.in_features, linear.out_features) for linear in linears)
        phases["spectra"] = block + 4 * 8 * side**2 + 8 * 1024 * widest
    whole_model = {}
    if samples_text:
        whole_model["sampling text"] = _whole(model) + _sampling(model.config, settings)
    if settings.allocation == "isc" and settings.isc_sensitivity == "hutchinson":
        whole_model["tracing the loss"] = _tracing(skeleton, settings, widest)
    if settings.allocation == "evopress":
        # The model, its probabilities of the fitness tokens, and logits of a batch with what is made of them.
        vocabulary = _FLOAT * int(model.config.vocab_size)
        held = _whole(model) + vocabulary * (settings.evopress_tokens + 2 * 1024) + working * linear + reading
        whole_model["searching levels"] = held + _all_hessians(skeleton, method)
    states = _FLOAT * settings.n_samples * settings.seq_len * hidden if method.new_statistic or _sees(settings) else 0
    return Footprint(rss_bytes(), phases, states, whole_model)


def _whole(model: Any) -> int:
    """Return the bytes of all parameters."""
    n_parameters: int = sum(parameter.numel() for parameter in model.parameters())
    return _FLOAT * n_parameters


def _sampling(config: Any, settings: PruneSettings) -> int:
    """Return the bytes of the keys and values of a batch, and of its logits."""
    n_heads = int(config.num_attention_heads)
    n_key_value_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads) * n_key_value_heads
    batch = min(SAMPLED_TOGETHER, settings.n_samples)
    # Keys and values grow by a token at a time, by a copy of one block's.
    cache = 2 * batch * settings.seq_len * width * (int(config.num_hidden_layers) + 1)
    return _FLOAT * (cache + 4 * batch * int(config.vocab_size))


def _tracing(skeleton: Skeleton, settings: PruneSettings, widest: int) -> int:
    """Return the bytes of a double backward pass: weights, gradients, probes, and the graph of one sequence.

    Fitted to one measured peak, 4.9 GiB for SmolLM2-135M at 256 tokens.
    """
    config = skeleton.model.config
    n_tokens = min(settings.seq_len, TRACED_TOKENS)
    per_block = n_tokens * (
        30 * int(config.hidden_size) + 30 * widest + 12 * int(config.num_attention_heads) * n_tokens
    )
    return 4 * _whole(skeleton.model) + _FLOAT * len(skeleton.blocks) * per_block


def _sees(settings: PruneSettings) -> bool:
    return settings.refine == "dsnot" or settings.allocation in ("owl", "dlp", "isc", "ramp", "evopress")


def _hessians(skeleton: Skeleton, method: Method) -> int:
    """Return the bytes of a block's Hessians, one per group of linears with the same inputs, and of the largest's work.

    Inverting one holds it, its damped copy, two factors, an inverse and a workspace (LLaMA-7B's shape, SparseGPT: 4.94
    GiB measured, 4.62 predicted without the last).
    """
    if method.new_statistic is not Hessian:
        return 0
    doubled = 2 if method.name == "alps" else 1  # its decomposition is float64
    largest = 0
    for index in range(len(skeleton.blocks)):
        sides = _hessian_sides(skeleton, index)
        largest = max(largest, _FLOAT * (sum(side**2 for side in sides) + 5 * doubled * max(sides) ** 2))
    return largest


def _all_hessians(skeleton: Skeleton, method: Method) -> int:
    """Return the bytes of the Hessians of all blocks together, and of the largest's work."""
    if method.new_statistic is not Hessian:
        return 0
    sides = [side for index in range(len(skeleton.blocks)) for side in _hessian_sides(skeleton, index)]
    return _hessians(skeleton, method) + _FLOAT * sum(side**2 for side in sides)


def _hessian_sides(skeleton: Skeleton, index: int) -> list[int]:
    """Return the number of inputs of every group of a block's linears that has the same ones."""
    found = skeleton.linears(index).values()
    # Only gate and up share for certain what they are called with; attention shares it among three of four.
    groups = {(linear.mlp, linear.in_features, linear.role == "down") for linear in found if linear.mlp}
    sides = [side for _, side, _ in groups]
    return sides + sorted((linear.in_features for linear in found if not linear.mlp), reverse=True)[:2]
