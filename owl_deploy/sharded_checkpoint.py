"""A checkpoint put together from blocks that were written one by one.

In: a skeleton, the shard of every block, a folder that is not public yet. Out: in that folder a checkpoint like the one
the skeleton was opened from, but for the weights of its blocks. What happened to these is not known here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from owl_deploy.files import write_json, write_tensors
from owl_deploy.skeleton import Skeleton

__all__ = ["block_dtypes", "fill_from_shard_", "write_shard", "write_sharded_checkpoint"]


def block_dtypes(skeleton: Skeleton, index: int) -> dict[str, torch.dtype]:
    """Return the type in which the checkpoint stores each parameter of a block, by the model's name of it."""
    names = skeleton.block_tensors(index)
    return {parameter: skeleton.checkpoint.dtype(tensor) for parameter, tensor in names.items()}


def write_shard(skeleton: Skeleton, index: int, shard: Path) -> None:
    """Write the parameters of a filled block in the types of the checkpoint; the file appears whole or not at all."""
    block, dtypes = skeleton.blocks[index], block_dtypes(skeleton, index)
    prefix = f"{skeleton.prefix}.{index}."
    tensors = {
        tensor: block.get_parameter(parameter.removeprefix(prefix)).detach().to(dtypes[parameter])
        for parameter, tensor in skeleton.block_tensors(index).items()
    }
    write_tensors(shard, tensors)


def fill_from_shard_(skeleton: Skeleton, index: int, shard: Path) -> None:
    """Put the weights of a finished block back into it."""
    stored = load_file(shard)
    prefix = f"{skeleton.prefix}.{index}."
    for parameter, tensor in skeleton.block_tensors(index).items():
        skeleton.fill_(skeleton.blocks[index], parameter.removeprefix(prefix), stored[tensor])


def write_sharded_checkpoint(skeleton: Skeleton, shard: Callable[[int], Path], folder: Path) -> None:
    """Gather shards, the tensors outside the blocks, configuration and tokenizer.

    Args:
        skeleton: its checkpoint gives what the shards do not hold.
        shard: of a block, by its index; linked where the file system can, else copied.
        folder: to be filled.
    """
    checkpoint = skeleton.checkpoint
    n_blocks = len(skeleton.blocks)
    in_blocks = {tensor for index in range(n_blocks) for tensor in skeleton.block_tensors(index).values()}
    outside = {name: checkpoint.read(name) for name in checkpoint.tensors if name not in in_blocks}
    first = f"model-{1:05d}-of-{n_blocks + 1:05d}.safetensors"
    write_tensors(folder / first, outside)
    weight_map = dict.fromkeys(outside, first)
    del outside
    for index in range(n_blocks):
        name = f"model-{index + 2:05d}-of-{n_blocks + 1:05d}.safetensors"
        _link(shard(index), folder / name)
        weight_map |= dict.fromkeys(skeleton.block_tensors(index).values(), name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    for file in sorted(checkpoint.path.iterdir()):
        if (
            file.is_file()
            and file.suffix in (".json", ".jinja", ".txt", ".model")
            and not file.name.endswith(".index.json")
        ):
            shutil.copyfile(file, folder / file.name)


def _link(source: Path, target: Path) -> None:
    """Give a finished shard its final name without copying it, where the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
