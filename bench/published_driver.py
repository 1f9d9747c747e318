"""A plain rendition of the published prune drivers, to compare the prune stage with: OWL with Wanda or SparseGPT.

In: a model folder, tokens, settings. Out: a Hugging Face folder with zeros in place, and the layer sparsities. It does
what the official codes of SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695) and OWL (arXiv 2310.05175) do, as
they do it: the whole model in memory, one sequence at a time, a statistic of its own for every linear even where
inputs are shared, two captures, each block run twice in both passes (OWL's code does so over the dense model too, where
the second run gives nothing new), sorts of everything, the rules of rounding included. It is written anew, for the CPU
and in float32.

Knows Llama's layout only (`model.model.layers`, all blocks called alike), no stopping, no checks, no records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import PruneSettings

__all__ = ["PublishedRun", "outlier_percent", "owl_sparsities", "prune_as_published", "sparsegpt", "wanda_mask"]


@dataclass(frozen=True)
class PublishedRun:
    """What the driver decided."""

    outlier_percents: list[float]
    """OWL's D of every block, in percent."""
    layer_sparsities: list[float]


class _SquaredNorms:
    """c: mean over sequences of the sum over tokens of x squared."""

    def __init__(self, linear: nn.Linear) -> None:
        self.n = 0
        self.value = torch.zeros(linear.in_features)

    def add(self, x: torch.Tensor) -> None:
        self.value *= self.n / (self.n + 1)
        self.n += 1
        self.value += x.square().sum(dim=0) / self.n


class _Hessian:
    """H: mean over sequences of 2 X X^T."""

    def __init__(self, linear: nn.Linear) -> None:
        self.n = 0
        self.value = torch.zeros(linear.in_features, linear.in_features)

    def add(self, x: torch.Tensor) -> None:
        self.value *= self.n / (self.n + 1)
        self.n += 1
        x = math.sqrt(2 / self.n) * x
        self.value += x.T @ x


_Statistic = _SquaredNorms | _Hessian


@torch.no_grad()
def prune_as_published(
    folder: Path, tokens: NDArray[np.int64], settings: PruneSettings, *, out: Path, on_step: OnStep = silent
) -> PublishedRun:
    """Prune a model with OWL's allocation and save it.

    Args:
        folder: a Hugging Face folder of a Llama-like model.
        tokens: (n_samples, seq_len) int64.
        settings: method (wanda or sparsegpt), sparsity, owl_m, owl_lambda, block_size, dampening; nothing else counts.
        out: folder to write, float32.
        on_step: told of every finished block, by the names that the prune stage gives its steps.

    Raises:
        UnsupportedModelError: the model is not laid out as Llama is.
        ValueError: another method or allocation is asked for.
    """
    from transformers import AutoModelForCausalLM

    if settings.method not in ("wanda", "sparsegpt") or settings.allocation != "owl":
        raise ValueError(f"wanda or sparsegpt with owl, got {settings.method} with {settings.allocation}")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
    ).eval()
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError(f"{folder} is a {type(model).__name__}: the published drivers want Llama's layout")
    sequences = torch.from_numpy(tokens)
    percents = _outlier_percents(model, blocks, sequences, settings.owl_m, on_step)
    sparsities = owl_sparsities(percents, settings.sparsity, settings.owl_lambda)
    _prune_blocks_(model, blocks, sequences, settings, sparsities, on_step)
    model.save_pretrained(out)
    return PublishedRun(percents, sparsities)


def _outlier_percents(
    model: Any, blocks: nn.ModuleList, sequences: torch.Tensor, owl_m: float, on_step: OnStep
) -> list[float]:
    """Run the dense model block by block, and return D of each."""
    inputs, arguments = _captured(model, blocks, sequences)
    outputs = torch.zeros_like(inputs)
    percents: list[float] = []
    for index, block in enumerate(blocks):
        with _hooked(block, _SquaredNorms) as norms:
            _run(block, inputs, outputs, arguments)
        scores = [_wanda_score(linear.weight, norms[name].value) for name, linear in _linears(block).items()]
        percents.append(outlier_percent(scores, owl_m))
        _run(block, inputs, outputs, arguments)
        inputs, outputs = outputs, inputs
        on_step(Step("inputs of the dense model", index + 1, len(blocks)))
    return percents


def _prune_blocks_(
    model: Any,
    blocks: nn.ModuleList,
    sequences: torch.Tensor,
    settings: PruneSettings,
    sparsities: list[float],
    on_step: OnStep,
) -> None:
    inputs, arguments = _captured(model, blocks, sequences)
    outputs = torch.zeros_like(inputs)
    new_statistic = _SquaredNorms if settings.method == "wanda" else _Hessian
    for index, (block, sparsity) in enumerate(zip(blocks, sparsities, strict=True)):
        with _hooked(block, new_statistic) as statistics:
            _run(block, inputs, outputs, arguments)
        for name, linear in _linears(block).items():
            value = statistics[name].value
            if settings.method == "wanda":
                linear.weight[wanda_mask(linear.weight, value, sparsity)] = 0
            else:
                linear.weight.copy_(
                    sparsegpt(
                        linear.weight,
                        value,
                        sparsity,
                        block_size=settings.block_size,
                        dampening=settings.dampening,
                    )
                )
        _run(block, inputs, outputs, arguments)
        inputs, outputs = outputs, inputs
        on_step(Step("pruning blocks", index + 1, len(blocks)))


class _Caught(Exception):  # noqa: N818  (no error: it ends a forward pass whose rest is not wanted)
    """Block 0 was reached."""


class _Catcher(nn.Module):
    """Stands in for block 0: keeps what it is called with."""

    def __init__(self, block: nn.Module, inputs: torch.Tensor) -> None:
        super().__init__()
        self.block = block
        self.inputs = inputs
        self.n = 0
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> None:
        self.inputs[self.n] = hidden_states[0]
        self.n += 1
        self.arguments = arguments
        raise _Caught

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as attention_type, which the model asks of its blocks
            return getattr(super().__getattr__("block"), name)


def _captured(model: Any, blocks: nn.ModuleList, sequences: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return what enters block 0, (n_samples, seq_len, hidden), and what it is called with besides."""
    catcher = _Catcher(blocks[0], torch.zeros(*sequences.shape, model.config.hidden_size))
    blocks[0] = catcher
    try:
        for sequence in sequences:
            try:
                model(sequence[None], use_cache=False)
            except _Caught:
                continue
    finally:
        blocks[0] = catcher.block
    return catcher.inputs, catcher.arguments


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


@contextmanager
def _hooked(block: nn.Module, new_statistic: Callable[[nn.Linear], _Statistic]) -> Iterator[dict[str, _Statistic]]:
    """Let every linear of a block fill a statistic of its own."""
    statistics = {name: new_statistic(linear) for name, linear in _linears(block).items()}

    def hook(name: str) -> Any:
        return lambda _module, inputs, _output: statistics[name].add(inputs[0].reshape(-1, inputs[0].shape[-1]))

    handles = [linear.register_forward_hook(hook(name)) for name, linear in _linears(block).items()]
    yield statistics
    for handle in handles:
        handle.remove()


def _run(block: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, arguments: dict[str, Any]) -> None:
    for i in range(len(inputs)):
        output = block(inputs[i : i + 1], **arguments)
        outputs[i] = (output[0] if isinstance(output, tuple) else output)[0]


def _wanda_score(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.abs() * norms.sqrt()


def wanda_mask(weight: torch.Tensor, norms: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return which weights go, (out, in) bool: the lowest floor(in * sparsity) of each row after a full sort.

    Args:
        weight: (out, in).
        norms: c, (in,): mean over sequences of the sum over tokens of x squared.
        sparsity: of every row.
    """
    order = torch.sort(_wanda_score(weight, norms), dim=1, stable=True).indices
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    return pruned.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)


def outlier_percent(scores: list[torch.Tensor], owl_m: float) -> float:
    """Return OWL's D: percent of a block's scores, put into one vector, above `owl_m` times their mean."""
    flat = torch.cat([score.flatten() for score in scores])
    return 100 * int((flat > owl_m * flat.mean()).sum()) / flat.numel()


def owl_sparsities(percents: list[float], sparsity: float, owl_lambda: float) -> list[float]:
    """Return OWL's sparsity of every block: S - (r - mean r), r = (D - min D) / (max D - min D) * 2 lambda."""
    d = np.array(percents)
    r = (d - d.min()) / (d.max() - d.min()) * owl_lambda * 2
    return [float(value) for value in sparsity - (r - r.mean())]


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, *, block_size: int = 128, dampening: float = 0.01
) -> torch.Tensor:
    """Return the pruned and updated weight, (out, in).

    A slab of `block_size` columns prunes all scores up to the one of rank floor(slab * sparsity) in a full sort, one
    more than that share.

    Args:
        weight: (out, in), left as it is.
        hessian: (in, in), changed: dead inputs and damping are written into it.
        sparsity: of every slab.
        block_size: columns of a slab.
        dampening: share of the mean diagonal that is added to it.
    """
    weight = weight.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    n_columns = weight.shape[1]
    for start in range(0, n_columns, block_size):
        end = min(start + block_size, n_columns)
        slab, corner = weight[:, start:end].clone(), upper[start:end, start:end]
        score = slab.square() / corner.diagonal().square()
        threshold = score.flatten().sort().values[int(score.numel() * sparsity)]
        pruned = score <= threshold
        errors = torch.zeros_like(slab)
        for j in range(end - start):
            column = slab[:, j].clone()
            kept = column.clone()
            kept[pruned[:, j]] = 0
            error = (column - kept) / corner[j, j]
            slab[:, j:] -= error[:, None] @ corner[None, j, j:]
            slab[:, j] = kept
            errors[:, j] = error
        weight[:, start:end] = slab
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight
