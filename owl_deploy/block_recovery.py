"""One sparse decoder block, trained so that it does again what the dense block did.

In: a filled block, the hidden states that enter it, those that should leave it. Out: the block with other values of its
surviving weights, and how far it was and is from its targets on sequences that it was not trained on. Pruned weights
are zero before, during and after. Which sequences and targets these are is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from owl_deploy.errors import OwlDeployError
from owl_deploy.hidden_states import HiddenStates
from owl_deploy.masked_training import MaskedAdamW, batches
from owl_deploy.observation import run_block
from owl_deploy.recipe import RecoverSettings
from owl_deploy.skeleton import BlockInputs

__all__ = ["BlockRecovery", "mean_output_error", "output_error", "pruned_positions", "recover_block_"]

_DIVERGED = 4.0


@dataclass(frozen=True)
class BlockRecovery:
    """How the training of a block went; errors are those of `output_error` on the held-out sequences."""

    before: float
    after: float
    """The lowest, which is that of the values that the block was left with."""
    curve: tuple[float, ...]
    """After each epoch."""
    seconds: float


def pruned_positions(block: nn.Module, pruned: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return where the parameters of those names (within the block) are zero, bool, of the parameter's shape."""
    return {name: parameter == 0 for name, parameter in block.named_parameters() if name in pruned}


def output_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of |found - wanted|^2 / |wanted|^2; both (1, seq_len, hidden).

    What follows a block normalises every token by itself, so that errors count relative to the size of their token: the
    few tokens whose hidden states are a thousand times as large as the others' would be all that matters otherwise.
    """
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def recover_block_(
    block: nn.Module,
    inputs: BlockInputs,
    targets: HiddenStates,
    index: int,
    masks: dict[str, torch.Tensor],
    settings: RecoverSettings,
    *,
    n_held_out: int,
    seed: int,
    deadline: float | None = None,
) -> BlockRecovery:
    """Train a block in place with AdamW; it is left with the best values that held-out sequences saw.

    Args:
        block: filled.
        inputs: of the block; the last `n_held_out` sequences only judge.
        targets: what should leave the block, in the same order.
        index: of the block.
        masks: of `pruned_positions`: those weights have no gradient, no state of the optimiser, and stay zero.
        settings: epochs, batch size, learning rate.
        n_held_out: sequences, at least one and fewer than there are.
        seed: of the order of the sequences.
        deadline: as `time.monotonic` counts; no step begins after it, and the learning rate falls to zero until then.

    Raises:
        OwlDeployError: the loss is NaN or Inf, or training went away from the targets and stayed there.
    """
    started = time.monotonic()
    n_train = len(inputs.hidden_states) - n_held_out
    before = best = mean_output_error(block, inputs, targets, index, n_train)
    curve: list[float] = []
    parameters = dict(block.named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = MaskedAdamW(parameters, masks, settings.rate, is_relative=settings.is_rate_relative)
    n_steps = settings.epochs * -(-n_train // settings.sequences_per_step)
    order = batches(n_train, batch_size=settings.sequences_per_step, epochs=settings.epochs, seed=seed)
    with _trainable(parameters):
        for step, (batch, ends_epoch) in enumerate(order):
            share = step / n_steps
            if deadline is not None:
                share = max(share, (time.monotonic() - started) / max(deadline - started, 1e-9))
            if share < 1:
                for i in batch:
                    _accumulate(block, inputs, targets, index, i, len(batch))
                optimizer.step(share)
            if ends_epoch or share >= 1:
                curve.append(mean_output_error(block, inputs, targets, index, n_train))
                if curve[-1] < best:
                    best = curve[-1]
                    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            if share >= 1:
                break
    if curve and min(curve) > _DIVERGED * before:
        raise OwlDeployError(
            f"training of block {index} diverges: its error was {before:.3g} and is {min(curve):.3g} at best: "
            f"use a learning_rate below {settings.rate_words}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    return BlockRecovery(before, best, tuple(curve), time.monotonic() - started)


def _accumulate(block: nn.Module, inputs: BlockInputs, targets: HiddenStates, index: int, i: int, n: int) -> None:
    """Add the gradient of one of n sequences."""
    loss = output_error(run_block(block, inputs, index, i), targets[i]) / n
    if not torch.isfinite(loss):
        raise OwlDeployError(f"the loss of block {index} is NaN or Inf: use a lower learning_rate")
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def mean_output_error(block: nn.Module, inputs: BlockInputs, targets: HiddenStates, index: int, first: int) -> float:
    """Return the mean of `output_error` over the sequences from `first` on, which no training saw."""
    n = len(inputs.hidden_states)
    errors = [float(output_error(run_block(block, inputs, index, i), targets[i])) for i in range(first, n)]
    return sum(errors) / len(errors)


@contextmanager
def _trainable(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
