"""Biases that undo what pruning did to the mean of every linear's outputs; nothing is trained.

In: a filled sparse block, the weights of its dense twin, inputs of both. Out: the block with other biases, and the
checkpoint with zeros for biases where a family can have them and has none. No weight changes. Which text runs, and
whether the result is kept, is not known here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.files import new_folder, write_json, write_tensors
from owl_deploy.observation import input_groups, observe
from owl_deploy.skeleton import BlockInputs, Prunable, Skeleton, open_skeleton

__all__ = ["InputMean", "correct_biases_", "mean_outputs", "with_biases"]

# Model types whose configuration gives every linear of a block a bias, which the graphs of all export targets carry.
_FLAGS = {"llama": ("attention_bias", "mlp_bias"), "smollm3": ("attention_bias", "mlp_bias")}


class InputMean:
    """Mean over all tokens of a linear's inputs."""

    def __init__(self, in_features: int) -> None:
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.n_tokens = 0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        self.total += inputs.double().sum(dim=0).to(self.total.device)
        self.n_tokens += len(inputs)

    def merge(self, other: InputMean) -> None:
        """Take in what another has seen of other sequences."""
        self.total += other.total
        self.n_tokens += other.n_tokens

    def is_finite(self) -> bool:
        """Return whether all inputs were finite."""
        return bool(torch.isfinite(self.total).all())

    @property
    def mean(self) -> torch.Tensor:
        """(in_features,) float64."""
        return self.total / max(1, self.n_tokens)


def with_biases(skeleton: Skeleton, folder: Path) -> Skeleton:
    """Return the same model with a bias, of zeros where there was none, for every linear that can have one.

    Args:
        skeleton: of a checkpoint.
        folder: the checkpoint with biases is written there, its weights linked and not copied; if all have one, or only
            some can, nothing is.

    Raises:
        UnsupportedModelError: no linear of the blocks has a bias, and none can be added that all export targets carry.
    """
    checkpoint = skeleton.checkpoint
    linears = [linear for index in range(len(skeleton.blocks)) for linear in skeleton.linears(index).values()]
    kind = checkpoint.config.get("model_type")
    flags = _FLAGS.get(str(kind), ())
    lacking = [linear for linear in linears if _bias(linear) is None]
    if not flags:
        if len(lacking) == len(linears):
            raise UnsupportedModelError(
                f"{checkpoint.path}: the linears of model type {kind!r} have no biases, and none can be added that "
                f"every export target carries (they can for {', '.join(_FLAGS)}): use another method"
            )
        return skeleton
    return open_skeleton(_with_zeros(skeleton, lacking, flags, folder)) if lacking else skeleton


def _with_zeros(skeleton: Skeleton, lacking: list[Prunable], flags: tuple[str, ...], folder: Path) -> Checkpoint:
    checkpoint = skeleton.checkpoint
    biases = {}
    for linear in lacking:
        tensor = skeleton.tensor_name(linear.parameter)
        biases[f"{tensor.removesuffix('weight')}bias"] = torch.zeros(
            linear.out_features, dtype=checkpoint.dtype(tensor)
        )
    with new_folder(folder, replace=True) as temporary:
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
                shutil.copyfile(file, temporary / file.name)
        for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
            _link(file, temporary / file.name)
        write_tensors(temporary / "biases.safetensors", biases)
        files = {name: entry.file.name for name, entry in checkpoint.tensors.items()}
        weight_map = {**files, **dict.fromkeys(biases, "biases.safetensors")}
        write_json(temporary / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        write_json(temporary / "config.json", {**checkpoint.config, **dict.fromkeys(flags, True)})
    return open_checkpoint(str(folder))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _bias(linear: Prunable) -> torch.Tensor | None:
    found = getattr(linear.owner, "bias", None) if linear.expert is None else None
    return found if isinstance(found, torch.Tensor) else None


def mean_outputs(
    block: nn.Module, inputs: BlockInputs, index: int, linears: Mapping[str, Prunable]
) -> dict[str, torch.Tensor]:
    """Return the mean over tokens of what each linear of a filled block gives, (out_features,) float64, bias included.

    Linears that no token reached are left out.
    """
    groups = input_groups(block, inputs, index, linears)
    found = {}
    for name, observed in observe(block, inputs, index, linears, groups, (InputMean,)).items():
        if observed.n_tokens:
            found[name] = _mean_output(linears[name], observed.statistics[0])
    return found


def _mean_output(linear: Prunable, seen: object) -> torch.Tensor:
    assert isinstance(seen, InputMean)
    bias = _bias(linear)
    product = linear.weight.double().cpu() @ seen.mean
    return product if bias is None else product + bias.double().cpu()


@torch.no_grad()
def correct_biases_(
    block: nn.Module,
    inputs: BlockInputs,
    index: int,
    linears: Mapping[str, Prunable],
    wanted: Mapping[str, torch.Tensor],
) -> None:
    """Set biases so that the mean output of every linear over these inputs is the wanted one.

    Linears are taken in the order in which they are called, each on what the corrected ones before it leave, as
    Data-Free Quantization (arXiv 1906.04721, section 4.2) does after rounding.

    Args:
        block: filled, sparse.
        inputs: of the block.
        index: of the block.
        linears: of the block; those without a bias stay as they are.
        wanted: mean output by name, (out_features,); of `mean_outputs` of the dense block.
    """
    for group in input_groups(block, inputs, index, linears):
        seen = observe(block, inputs, index, linears, [group], (InputMean,))
        for name in group:
            bias, observed = _bias(linears[name]), seen[group[0]]
            if bias is not None and name in wanted and observed.n_tokens:
                shift = wanted[name] - _mean_output(linears[name], observed.statistics[0])
                bias += shift.to(bias)
