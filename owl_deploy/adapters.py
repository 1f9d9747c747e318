"""Few new parameters beside the weights of linears, which stay as they are until the adapters are merged into them.

In: a loaded model and its skeleton. Out: the names of the new parameters; later the model as it was, with other
weights. How they are trained is not known here.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.skeleton import Prunable, Skeleton

__all__ = ["attach", "merge"]


class _SparsityPreserving(nn.Module):
    """W + W * (A repeated along the rows) * b: zero where W is zero (SPP, arXiv 2405.16057, section 3.2)."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator, *, is_transposed: bool) -> None:
        super().__init__()
        n_rows, n_columns = shape
        bound = math.sqrt(3 / n_columns)  # Kaiming, for a product with n_columns inputs
        self.a = nn.Parameter(torch.empty(min(rank, n_rows), n_columns).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(n_rows, 1))
        self.is_transposed = is_transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight, in the model's own layout."""
        n_rows = len(self.b)
        repeated = self.a.repeat_interleave(-(-n_rows // len(self.a)), dim=0)[:n_rows]
        factor = 1 + repeated * self.b
        return weight * (factor.T if self.is_transposed else factor)


def attach(
    model: Any, skeleton: Skeleton, method: Literal["spp", "lora"], *, rank: int, seed: int
) -> tuple[Any, list[str]]:
    """Give every prunable linear of the blocks an adapter that changes nothing yet.

    Args:
        model: transformers model in float32; changed.
        skeleton: of the same checkpoint.
        method: spp keeps zeros at zero whatever is trained; lora (arXiv 2106.09685, by peft) does not.
        rank: rows of A, shared by rows of the weight (spp), or inner size of the product (lora).
        seed: of the random half of each adapter.

    Returns:
        What is to be trained, and the names of its new parameters.

    Raises:
        UnsupportedModelError: an expert is a part of a parameter, which has no adapter of its own.
    """
    linears = [linear for index in range(len(skeleton.blocks)) for linear in skeleton.linears(index).values()]
    fused = next((linear for linear in linears if linear.expert is not None), None)
    if fused is not None:
        raise UnsupportedModelError(
            f"{fused.parameter} holds several experts, which adapters do not take: use method blockwise or distill"
        )
    if method == "spp":
        return model, _attach_spp(model, linears, rank, torch.Generator().manual_seed(seed))
    return _attach_lora(model, linears, rank, seed)


def _attach_spp(model: Any, linears: list[Prunable], rank: int, generator: torch.Generator) -> list[str]:
    names = []
    for linear in linears:
        path = linear.parameter.removesuffix(".weight")
        shape = (linear.out_features, linear.in_features)
        adapter = _SparsityPreserving(shape, rank, generator, is_transposed=linear.is_transposed)
        # unsafe: the check that it keeps the shape would run every adapter once
        parametrize.register_parametrization(model.get_submodule(path), "weight", adapter, unsafe=True)
        names += [f"{path}.parametrizations.weight.0.{part}" for part in ("a", "b")]
    return names


def _attach_lora(model: Any, linears: list[Prunable], rank: int, seed: int) -> tuple[Any, list[str]]:
    from peft import LoraConfig, get_peft_model

    targets = [linear.parameter.removesuffix(".weight") for linear in linears]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=any(linear.is_transposed for linear in linears),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    return adapted, [name for name, _ in adapted.named_parameters() if ".lora_" in name]


def merge(adapted: Any, method: Literal["spp", "lora"]) -> Any:
    """Return the model as it was before `attach`, the adapters added to its weights."""
    if method == "lora":
        return adapted.merge_and_unload()
    for module in list(adapted.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return adapted
