"""A whole sparse model trained at once, by its own weights or by adapters, in one process or in one per device.

In: skeletons of the sparse and the dense checkpoint, tokens, a folder that keeps the state of a stopped run. Out: the
parameters of the decoder blocks, where they are pruned, and how training went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from owl_deploy.adapters import attach, merge
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.distillation import Distillation, distill_, held_out_loss, load_state_, save_state
from owl_deploy.generation import load_torch_model
from owl_deploy.process_group import ALONE, ProcessGroup, run_together
from owl_deploy.progress import OnStep
from owl_deploy.recipe import RecoverSettings
from owl_deploy.skeleton import Skeleton, open_skeleton

__all__ = ["ModelRecovery", "recover_model"]


@dataclass(frozen=True)
class ModelRecovery:
    """What training left, and how it went."""

    parameters: dict[str, torch.Tensor]
    """By name, on the CPU; pruned weights are zero."""
    masks: dict[str, torch.Tensor]
    """Of the prunable linears' parameters, bool, True where pruned."""
    training: dict[str, Any]
    """Held-out losses over the steps."""
    measured: dict[str, Any]
    """Seconds at those steps."""


def recover_model(
    sparse: Skeleton,
    dense: Skeleton,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    *,
    n_held_out: int,
    seed: int,
    devices: Sequence[torch.device],
    folder: Path,
    on_step: OnStep,
) -> ModelRecovery:
    """Train a sparse model against a dense one, with what `distillation.distill_` does.

    With one device, both models are there in float32, with gradients and two moments of what is trained: about 24
    bytes per parameter. Several devices share all that out (FSDP2), and each step's sequences, but each process loads
    both models into the machine's memory first.

    Args:
        sparse: skeleton of the sparse checkpoint.
        dense: of its reference.
        settings: method distill, spp or lora, and what it has.
        tokens: (n, seq_len) int64; the last `n_held_out` sequences only judge.
        n_held_out: sequences.
        seed: of adapters and of the order of the sequences.
        devices: where to train, one process each if there are several.
        folder: holds the state of the run; a later call goes on with it.
        on_step: told of every step.

    Raises:
        OwlDeployError: the loss is NaN or Inf, training diverges, or one of several processes was ended.
    """
    file = folder / "state.safetensors"
    shared: dict[str, Any] = {
        "settings": settings,
        "tokens": tokens,
        "n_held_out": n_held_out,
        "seed": seed,
        "file": file,
    }
    if len(devices) > 1:
        paths = {"sparse_path": sparse.checkpoint.path, "dense_path": dense.checkpoint.path}
        run_together(_train_share, devices, {**shared, **paths}, folder=folder, on_step=on_step)
    # after training in several processes this puts the best values into a model of one process
    model, teacher, masks, state = _train(sparse, dense, **shared, device=devices[0], on_step=on_step)
    curve = [{"step": step, "loss": loss} for step, _, loss in state.curve]
    training: dict[str, Any] = {"curve": curve}
    if settings.method == "spp" or settings.method == "lora":
        model = merge(model, settings.method)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, pruned in masks.items():
            parameters[name].masked_fill_(pruned.to(parameters[name].device), 0)
    if settings.method == "lora":
        after = held_out_loss(model, teacher, tokens[-n_held_out:], settings)
        training["pruned_again"] = {"before": min(check["loss"] for check in curve), "after": after}
    measured = {"curve": [{"step": step, "seconds": seconds} for step, seconds, _ in state.curve]}
    return ModelRecovery({name: value.detach().cpu() for name, value in parameters.items()}, masks, training, measured)


def _train_share(*, sparse_path: Path, dense_path: Path, **arguments: Any) -> None:
    """Do what one of several processes does; what it trains is in the state's file afterwards."""
    sparse, dense = (open_skeleton(open_checkpoint(str(path), offline=True)) for path in (sparse_path, dense_path))
    _train(sparse, dense, **arguments)


def _train(
    sparse: Skeleton,
    dense: Skeleton,
    *,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    n_held_out: int,
    seed: int,
    file: Path,
    device: torch.device,
    on_step: OnStep,
    group: ProcessGroup = ALONE,
) -> tuple[Any, Any, dict[str, torch.Tensor], Distillation]:
    """Train until the end, or go on from the file; return both models, where linears are pruned, and the state."""
    model, teacher = load_torch_model(sparse.checkpoint), load_torch_model(dense.checkpoint)
    parameters = dict(model.named_parameters())
    n_blocks = len(sparse.blocks)
    names = [linear.parameter for index in range(n_blocks) for linear in sparse.linears(index).values()]
    masks = {name: parameters[name].detach() == 0 for name in names}
    blocks = list(model.get_submodule(sparse.prefix))
    trained = [name for name in parameters if name.startswith(f"{sparse.prefix}.")]
    if settings.method == "spp" or settings.method == "lora":
        model, trained = attach(model, sparse, settings.method, rank=settings.rank, seed=seed)
    model.to(device)
    teacher.to(device)
    group.shard_(model, blocks)
    group.shard_(teacher, teacher.get_submodule(dense.prefix))
    state = distill_(
        model,
        teacher,
        tokens,
        masks if settings.method == "distill" else {},
        trained,
        settings,
        n_held_out=n_held_out,
        seed=seed,
        state=load_state_(model, trained, file),
        on_check=lambda state: save_state(state, model, trained, file, group),
        on_step=on_step,
        group=group,
    )
    return model, teacher, masks, state
