"""Seeded models in memory and on disk in which every weight must find its place: no bias is 0 and no norm is 1."""

from pathlib import Path
from typing import Any

import torch
from conftest import TINY, byte_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def random_model(family: str, *, seed: int = 0, sparsity: float = 0.0, **changes: Any) -> PreTrainedModel:
    """Return a model of the size of `TINY`.

    Args:
        family: llama, mistral or qwen2.
        seed: of all weights.
        sparsity: about this share of the weights of the blocks' linears is zero, at random places.
        changes: of the configuration.
    """
    torch.manual_seed(seed)
    config, kind = _KINDS[family]
    model: PreTrainedModel = kind(config(**{**TINY, "initializer_range": 0.15, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif sparsity and ".layers." in name:
                parameter.mul_(torch.rand_like(parameter) >= sparsity)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with the byte tokenizer and return its folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
