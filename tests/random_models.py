"""Seeded models in memory and on disk in which every weight must find its place: no bias is 0 and no norm is 1."""

from pathlib import Path
from typing import Any

import torch
from conftest import TINY, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Windows are shorter than the texts of tests, caps bite, and no scale is what Llama's would be.
_GEMMA_2: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 10,
    "final_logit_softcapping": 6.0,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "qwen3": {"head_dim": 32, "attention_bias": True},
    "gemma": {"head_dim": 32},
    "gemma2": {**_GEMMA_2, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA_2, "rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "phi3": {"sliding_window": 7},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15},
}


def random_model(family: str, *, seed: int = 0, sparsity: float = 0.0, **changes: Any) -> PreTrainedModel:
    """Return a model of the size of `TINY`.

    Args:
        family: model type of its configuration.
        seed: of all weights.
        sparsity: about this share of the weights of the blocks' linears is zero, at random places.
        changes: of the configuration.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**TINY, "initializer_range": 0.15, **_SHAPES.get(family, {}), **changes})
    # torch's fused attention would leave out the caps of Gemma 2.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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
