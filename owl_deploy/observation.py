"""Calibration sequences run through one decoder block, and what its linears see of them.

In: a filled block, the hidden states that enter it. Out: a statistic per group of linears that are
called with the same tensor (queries, keys and values; gate and up), or the hidden states that leave it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from owl_deploy.errors import OwlDeployError
from owl_deploy.skeleton import BlockInputs, Prunable
from owl_deploy.statistics import InputStatistic

__all__ = ["Groups", "Kinds", "Observed", "advance_", "input_groups", "observe", "observe_and_advance_", "run_block"]

Groups = list[tuple[str, ...]]
Kinds = tuple[Callable[[int], InputStatistic], ...]


@dataclass
class Observed:
    """What was seen of the inputs of one linear; shared by all linears that have the same ones."""

    statistics: tuple[InputStatistic, ...]
    """As many as were asked for, in that order."""
    n_tokens: int = 0
    """Rows of inputs over all sequences; an expert sees only the tokens routed to it."""

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        self.n_tokens += len(inputs)
        if len(inputs):
            for statistic in self.statistics:
                statistic.update(inputs)


@torch.inference_mode()
def input_groups(block: nn.Module, inputs: BlockInputs, index: int, linears: Mapping[str, Prunable]) -> Groups:
    """Return the linears that are called with the same tensor, in the order of the first call.

    One sequence is run. A linear that is not called (an expert without a token in it) is a group of its own, at
    the end.
    """
    called: dict[str, torch.Tensor] = {}
    with _hooked(linears, called.setdefault):
        run_block(block, inputs, index, 0)
    groups: dict[Any, list[str]] = {}
    for name, tensor in called.items():
        # All tensors are still alive, so that two with one address are the same.
        groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return [*map(tuple, groups.values()), *((name,) for name in linears if name not in called)]


def observe(
    block: nn.Module, inputs: BlockInputs, index: int, linears: Mapping[str, Prunable], groups: Groups, kinds: Kinds
) -> dict[str, Observed]:
    """Run every sequence through a block and return what each linear of `groups` saw; the hidden states stay.

    A sequence is run no further than to the last of the linears, whose product is not needed: a quarter of a
    Llama block's work.

    Args:
        block: filled.
        inputs: of the block.
        index: of the block.
        linears: of the block, by name.
        groups: of `input_groups`, in their order, or some of them.
        kinds: make the statistics of a linear from its in_features.

    Raises:
        OwlDeployError: an input is NaN or Inf.
    """
    observed, watched = _to_observe(linears, groups, kinds)
    # Which experts a sequence calls, and which one last, is up to its tokens.
    last = None if any(linear.is_expert for linear in watched.values()) else groups[-1][0]

    def see(name: str, tensor: torch.Tensor) -> None:
        observed[name].update(tensor.reshape(-1, tensor.shape[-1]))
        if name == last:
            raise _AllSeenError

    with torch.inference_mode(), _hooked(watched, see):
        for i in range(len(inputs.hidden_states)):
            try:
                run_block(block, inputs, index, i)
            except _AllSeenError:
                continue
    _refuse_overflow(observed, watched)
    return observed


def observe_and_advance_(
    block: nn.Module, inputs: BlockInputs, index: int, linears: Mapping[str, Prunable], groups: Groups, kinds: Kinds
) -> dict[str, Observed]:
    """As `observe`, in one go with `advance_`: for blocks that stay as they are."""
    observed, watched = _to_observe(linears, groups, kinds)
    with _hooked(watched, lambda name, tensor: observed[name].update(tensor.reshape(-1, tensor.shape[-1]))):
        advance_(block, inputs, index)
    _refuse_overflow(observed, watched)
    return observed


@torch.inference_mode()
def advance_(block: nn.Module, inputs: BlockInputs, index: int) -> None:
    """Replace the hidden states by what the block makes of them.

    Raises:
        OwlDeployError: an output is NaN or Inf.
    """
    for i in range(len(inputs.hidden_states)):
        output = run_block(block, inputs, index, i)
        if not torch.isfinite(output).all():
            raise OwlDeployError(
                f"the output of block {index} holds NaN or Inf on calibration sequence {i}: nothing was pruned after it"
            )
        inputs.hidden_states[i] = output


def _to_observe(
    linears: Mapping[str, Prunable], groups: Groups, kinds: Kinds
) -> tuple[dict[str, Observed], dict[str, Prunable]]:
    """Return empty statistics by name, shared within a group, and the one linear to watch of each group."""
    observed: dict[str, Observed] = {}
    for group in groups:
        shared = Observed(tuple(kind(linears[group[0]].in_features) for kind in kinds))
        observed |= dict.fromkeys(group, shared)
    return observed, {group[0]: linears[group[0]] for group in groups}


def _refuse_overflow(observed: Mapping[str, Observed], watched: Mapping[str, Prunable]) -> None:
    for name in watched:
        if not all(statistic.is_finite() for statistic in observed[name].statistics):
            raise OwlDeployError(f"the input of {name} holds NaN or Inf, or its squares overflow float32")


class _AllSeenError(Exception):
    """The last linear was reached: what follows is of no interest."""


def run_block(block: nn.Module, inputs: BlockInputs, index: int, i: int) -> torch.Tensor:
    """Return what a filled block makes of the hidden states of sequence i, (1, seq_len, hidden)."""
    args, kwargs = inputs.arguments[index]
    device = next(block.parameters()).device
    with torch.autocast(device.type, inputs.dtype, enabled=inputs.dtype != torch.float32):
        output = block(inputs.hidden_states[i].to(device), *args, **kwargs)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _hooked(linears: Mapping[str, Prunable], on_input: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    """Call `on_input` with the name and the input of each linear whenever this thread calls it."""
    mine = threading.get_ident()  # others may run other sequences through the same block

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if threading.get_ident() == mine:
                on_input(name, arguments[0])

        return see

    hooks = [linear.module.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
