"""Calibration sequences run through one decoder block, and what its linears see of them.

In: a filled block, the hidden states that enter it. Out: a statistic per group of linears that are
called with the same tensor (queries, keys and values; gate and up), or the hidden states that leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from owl_deploy.errors import OwlDeployError
from owl_deploy.skeleton import BlockInputs, Prunable
from owl_deploy.statistics import InputStatistic

__all__ = ["Observed", "advance_", "input_groups", "observe"]


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
def input_groups(
    block: nn.Module, inputs: BlockInputs, index: int, linears: Mapping[str, Prunable]
) -> list[tuple[str, ...]]:
    """Return the linears that are called with the same tensor, in the order of the first call.

    One sequence is run. A linear that is not called (an expert without a token in it) is a group of its own, at
    the end.
    """
    called: dict[str, torch.Tensor] = {}
    hooks = _hooked(linears, lambda name, tensor: called.setdefault(name, tensor))
    try:
        _call(block, inputs, index, 0)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[str]] = {}
    for name, tensor in called.items():
        # All tensors are still alive, so that two with one address are the same.
        groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return [*map(tuple, groups.values()), *((name,) for name in linears if name not in called)]


def observe(
    block: nn.Module,
    inputs: BlockInputs,
    index: int,
    linears: Mapping[str, Prunable],
    groups: list[tuple[str, ...]],
    kinds: tuple[Callable[[int], InputStatistic], ...],
) -> dict[str, Observed]:
    """Run every sequence through a block and return what each linear of `groups` saw; the hidden states stay.

    Args:
        kinds: make the statistics of a linear from its in_features.

    Raises:
        OwlDeployError: an input or an output of the block is NaN or Inf.
    """
    observed: dict[str, Observed] = {}
    for group in groups:
        shared = Observed(tuple(kind(linears[group[0]].in_features) for kind in kinds))
        observed |= dict.fromkeys(group, shared)
    watched = {group[0]: linears[group[0]] for group in groups}
    _run_(
        block,
        inputs,
        index,
        watched,
        lambda name, tensor: observed[name].update(tensor.reshape(-1, tensor.shape[-1])),
        keep_inputs=True,
    )
    for name in watched:
        if not all(statistic.is_finite() for statistic in observed[name].statistics):
            raise OwlDeployError(f"the input of {name} holds NaN or Inf, or its squares overflow float32")
    return observed


def advance_(block: nn.Module, inputs: BlockInputs, index: int) -> None:
    """Replace the hidden states by what the block makes of them.

    Raises:
        OwlDeployError: an output is NaN or Inf.
    """
    _run_(block, inputs, index, {}, _ignore, keep_inputs=False)


@torch.inference_mode()
def _run_(
    block: nn.Module,
    inputs: BlockInputs,
    index: int,
    watched: Mapping[str, Prunable],
    on_input: Callable[[str, torch.Tensor], Any],
    *,
    keep_inputs: bool,
) -> None:
    hooks = _hooked(watched, on_input)
    try:
        for i in range(len(inputs.hidden_states)):
            output = _call(block, inputs, index, i)
            if not keep_inputs:
                inputs.hidden_states[i] = output
            if not torch.isfinite(output).all():
                raise OwlDeployError(
                    f"the output of block {index} holds NaN or Inf on calibration sequence {i}: nothing was "
                    "pruned after it"
                )
    finally:
        for hook in hooks:
            hook.remove()


def _ignore(_name: str, _tensor: torch.Tensor) -> None:
    pass


def _call(block: nn.Module, inputs: BlockInputs, index: int, i: int) -> torch.Tensor:
    args, kwargs = inputs.arguments[index]
    output = block(inputs.hidden_states[i], *args, **kwargs)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _hooked(linears: Mapping[str, Prunable], on_input: Callable[[str, torch.Tensor], Any]) -> list[Any]:
    """Call `on_input` with the name and the input of each linear whenever it is called. One sequence, one call."""
    return [
        linear.module.register_forward_pre_hook(lambda _, args, name=name: (on_input(name, args[0]), None)[1])
        for name, linear in linears.items()
    ]
