"""The linears of a dense model, pruned to any of a few levels: the database of EvoPress (arXiv 2410.14649).

In: a skeleton, a method, what was seen of the inputs of the dense model's linears. Out: the weights of a linear at a
sparsity, in the type of the checkpoint. Which levels there are, and which one is wanted when, is not known here.

The paper makes all levels of all linears beforehand (100 to 200 GB for 7B). Here a level is made when it is asked for
first, and kept on the disk: a search of ten minutes on a CPU asks for a few hundred out of thousands.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file

from owl_deploy.block_pruning import prune_linear, statistic_kinds
from owl_deploy.calibration import Calibration
from owl_deploy.dense_inputs import norm_of
from owl_deploy.files import write_tensors
from owl_deploy.methods import METHODS, Goal
from owl_deploy.observation import Observed
from owl_deploy.progress import OnStep, Step
from owl_deploy.recipe import PruneSettings
from owl_deploy.replicas import Replicas
from owl_deploy.skeleton import Skeleton
from owl_deploy.statistics import Hessian, SquaredNorm

__all__ = ["LevelDatabase", "most_bytes", "observed_inputs", "open_level_database"]


@dataclass(frozen=True)
class LevelDatabase:
    """Pruned weights, made on demand and kept in a folder."""

    skeleton: Skeleton
    """Of the dense model."""
    settings: PruneSettings
    """Method, refinement and their options."""
    observed: list[dict[str, Observed]]
    """Of `observed_inputs`."""
    folder: Path

    def weight(self, index: int, name: str, sparsity: float) -> torch.Tensor:
        """Return the weight (out, in) of a linear as the checkpoint would hold it at a sparsity, in its type.

        It is what `block_pruning.prune_linear` makes of the dense weight.

        Args:
            index: of the block.
            name: of the linear.
            sparsity: in [0, 1).

        Raises:
            OwlDeployError: a Hessian cannot be inverted, or the disk is full.
        """
        path = self.folder / f"{name}@{sparsity!r}.safetensors"
        if path.exists():
            return load_file(path)["weight"]
        weight = self._pruned(index, name, Goal(sparsity))
        write_tensors(path, {"weight": weight})
        return weight

    def _pruned(self, index: int, name: str, goal: Goal) -> torch.Tensor:
        skeleton, linear = self.skeleton, self.skeleton.linears(index)[name]
        tensor = skeleton.tensor_name(linear.parameter)
        block = skeleton.blocks[index]
        parameter = linear.parameter.removeprefix(f"{skeleton.prefix}.{index}.")
        seen = self.observed[index].get(name)
        skeleton.fill_(block, parameter, skeleton.checkpoint.read(tensor))
        try:
            pruned = prune_linear(name, linear, self.settings, seen, self._neurons(index, linear.mlp), goal)
        finally:
            set_module_tensor_to_device(block, parameter, "meta")
        for statistic in seen.statistics if seen is not None else ():
            if isinstance(statistic, Hessian):
                statistic.inverses.clear()  # as large as itself, for every linear of the model
        return pruned.weight.to(skeleton.checkpoint.dtype(tensor))

    def _neurons(self, index: int, mlp: str | None) -> SquaredNorm | None:
        """Return what was seen of the inputs of the down projection of an MLP, where the method needs it."""
        if mlp is None or not METHODS[self.settings.method].needs_neurons:
            return None
        linears = self.skeleton.linears(index)
        down = next(name for name, linear in linears.items() if linear.mlp == mlp and linear.role == "down")
        return norm_of(self.observed[index][down])


@contextmanager
def open_level_database(
    skeleton: Skeleton, settings: PruneSettings, observed: list[dict[str, Observed]], folder: Path
) -> Iterator[LevelDatabase]:
    """Yield an empty database in a folder of its own inside `folder`; delete it afterwards.

    What a killed process left there is deleted, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".levels.*.tmp"):
        pid = left.name.split(".")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    own = folder / f".levels.{os.getpid()}.tmp"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    try:
        yield LevelDatabase(skeleton, settings, observed, own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def most_bytes(skeleton: Skeleton, n_levels: Mapping[str, int]) -> int:
    """Return what the database takes on the disk where every level is asked for.

    Args:
        skeleton: of the model.
        n_levels: of every linear.
    """
    total = 0
    for index in range(len(skeleton.blocks)):
        for name, linear in skeleton.linears(index).items():
            width = skeleton.checkpoint.dtype(skeleton.tensor_name(linear.parameter)).itemsize
            total += n_levels[name] * linear.weight.numel() * width
    return total


def observed_inputs(
    skeletons: Sequence[Skeleton],
    settings: PruneSettings,
    calibration: Calibration,
    seen: list[dict[str, Observed]] | None,
    on_step: OnStep,
    *,
    folder: Path | None = None,
) -> list[dict[str, Observed]]:
    """Return, per block, what the method needs to know of the inputs of the dense model's linears.

    Statistics of all blocks are in memory: Hessians of a Llama are about as large as its weights in float32.

    Args:
        skeletons: of the dense model, one per device.
        settings: method and refinement.
        calibration: the tokens.
        seen: of `dense_inputs`, which is what it is where the method looks at norms alone; None if not known.
        on_step: told of every block.
        folder: for the hidden states, where they are to be on disk.

    Raises:
        OwlDeployError: an input is NaN or Inf.
    """
    kinds = statistic_kinds(settings)
    n_blocks = len(skeletons[0].blocks)
    if not kinds:
        return [{} for _ in range(n_blocks)]
    if seen is not None and kinds == (SquaredNorm,):
        return seen
    replicas = Replicas.capture(skeletons, torch.from_numpy(calibration.tokens), folder=folder)
    observed: list[dict[str, Observed]] = []
    for index in range(n_blocks):
        with replicas.filled(index):
            observed.append(replicas.observe_and_advance_(index, replicas.input_groups(index), kinds))
        on_step(Step("inputs of the dense model", index + 1, n_blocks))
    return observed
