"""How the inputs of linears become 8-bit integers of a fixed scale, found on calibration text.

In: a checkpoint and tokens. Out: of each linear that may take integers the scale and zero point of its inputs, and the
norms that even out their channels first. The model runs block by block. No graph is known here.

One scale for all channels drowns in the few that are large: SmolLM2-135M loses 0.64 nats of KL divergence on 1024
tokens. Three quarters of a nat come from the inputs of the MLP's last linear, which therefore stays in floats (0.063
nats without it); SmoothQuant (arXiv 2211.10438) takes care of the others: each channel of a norm's output is divided by
s and the columns of the linears behind it are multiplied by s, which changes nothing but the ranges (0.008 nats).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.export.decoder import Decoder
from owl_deploy.observation import input_groups, observe_and_advance_
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import Skeleton

__all__ = ["InputQuantization", "QuantizationPlan", "plan_quantization"]

# Share of the range that moves from the inputs to the weights (SmoothQuant's alpha): KL divergence on SmolLM2-135M
# 0.0148 nats at 0.5, 0.0082 at 0.8.
_SMOOTHING = 0.8
_LEAST = 1e-5


@dataclass(frozen=True)
class InputQuantization:
    """Inputs of a linear as uint8: value / scale + zero point."""

    scale: float
    zero_point: int
    smoothing: NDArray[np.float32] | None
    """(in,): what the columns of the weight are multiplied by, because the inputs come divided by it."""


@dataclass(frozen=True)
class QuantizationPlan:
    """What the graph needs to know."""

    linears: dict[str, InputQuantization]
    """By name of the linear; those that are missing stay in floats."""
    norms: dict[str, list[NDArray[np.float32]]]
    """Name of a norm -> its gain, offset included, and its bias where it has one, both divided by the smoothing."""


class _Range:
    """Lowest and highest input of each channel: an `InputStatistic`."""

    def __init__(self, in_features: int) -> None:
        self.lowest = torch.full((in_features,), torch.inf)
        self.highest = torch.full((in_features,), -torch.inf)

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        self.lowest = torch.minimum(self.lowest, inputs.float().amin(dim=0).cpu())
        self.highest = torch.maximum(self.highest, inputs.float().amax(dim=0).cpu())

    def merge(self, other: _Range) -> None:
        """Take in what another has seen."""
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)

    def is_finite(self) -> bool:
        """Return whether all inputs were finite."""
        return bool((self.lowest > -torch.inf).all() and (self.highest < torch.inf).all())


def plan_quantization(
    skeleton: Skeleton, decoder: Decoder, tokens: NDArray[np.int64], on_step: OnStep = silent
) -> QuantizationPlan:
    """Find ranges on calibration tokens (n_samples, seq_len).

    The head is one of the linears where it is not tied.

    Raises:
        OwlDeployError: an input is NaN or Inf.
    """
    names, n_blocks = decoder.names, len(skeleton.blocks)
    linears: dict[str, InputQuantization] = {}
    norms: dict[str, list[NDArray[np.float32]]] = {}
    inputs = skeleton.capture(torch.from_numpy(tokens))
    for index in range(n_blocks):
        block_name = f"{names.blocks}.{index}"
        with skeleton.filled(index) as block:
            found = skeleton.linears(index)
            groups = input_groups(block, inputs, index, found)
            seen = observe_and_advance_(block, inputs, index, found, groups, (_Range,))
            for group in groups:
                observed: Any = seen[group[0]].statistics[0]
                parts = {name.removeprefix(f"{block_name}.") for name in group}
                if parts == {f"{names.mlp}.{names.mlp_output}".removeprefix(".")}:
                    continue
                norm = None
                if parts == {f"{names.attention}.{part}" for part in names.query_key_value}:
                    norm = f"{block_name}.{names.attention_norm}"
                elif parts == {f"{names.mlp}.{part}".removeprefix(".") for part in names.mlp_inputs}:
                    norm = f"{block_name}.{names.mlp_norm}"
                smoothing = None
                if norm is not None:
                    columns = torch.stack([found[name].weight.abs().amax(dim=0) for name in group]).amax(dim=0)
                    smoothing = _smoothing(observed, columns)
                    norms[norm] = _smoothed_norm(skeleton, decoder, norm, smoothing)
                linears |= dict.fromkeys(group, _quantization(observed, smoothing))
        on_step(Step("ranges of the inputs", index + 1, n_blocks))
    return QuantizationPlan(linears, norms)


def _smoothing(observed: _Range, columns: torch.Tensor) -> NDArray[np.float32]:
    """Return s, (in,): root of largest input over largest weight of each channel, unevenly split."""
    largest = torch.maximum(observed.lowest.abs(), observed.highest.abs()).clamp_min(_LEAST)
    s: NDArray[np.float32] = (largest**_SMOOTHING / columns.cpu().clamp_min(_LEAST) ** (1 - _SMOOTHING)).numpy()
    return np.maximum(s, np.float32(_LEAST))


def _quantization(observed: _Range, smoothing: NDArray[np.float32] | None) -> InputQuantization:
    """Return the scale at which the whole range, and zero, has a number."""
    lowest, highest = observed.lowest.numpy(), observed.highest.numpy()
    if smoothing is not None:
        lowest, highest = lowest / smoothing, highest / smoothing
    low, high = min(float(lowest.min()), 0.0), max(float(highest.max()), 0.0)
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    return InputQuantization(scale, round(-low / scale), smoothing)


def _smoothed_norm(
    skeleton: Skeleton, decoder: Decoder, name: str, smoothing: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    read = skeleton.checkpoint.read
    arrays = [read(f"{name}.weight").float().numpy() + np.float32(decoder.norm_offset)]
    if decoder.norm == "layer":
        arrays.append(read(f"{name}.bias").float().numpy())
    return [array / smoothing for array in arrays]
