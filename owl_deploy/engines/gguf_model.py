"""A checkpoint written as a GGUF file of 32-bit floats, which is what llama.cpp and its quantiser start from.

In: a checkpoint of an architecture that llama.cpp computes alike. Out: one file, written tensor by tensor, so that one
matrix is in memory at a time. It holds no tokenizer: who runs it hands over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    import gguf

__all__ = ["write_gguf"]

# transformers' model_type -> llama.cpp's architecture, and whether query and key rows change places: llama.cpp turns
# neighbouring rows of a Llama by one angle, transformers rows that are half a head apart.
_ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
_ORDERED = ("self_attn.q_proj.", "self_attn.k_proj.")


def write_gguf(checkpoint: Checkpoint, file: Path) -> None:
    """Write the weights of a checkpoint, float32.

    Layout: the GGUF specification of ggml, metadata and tensor names as llama.cpp's own converter gives them.

    Raises:
        UnsupportedModelError: llama.cpp would compute something else, or the architecture is not one of those known.
    """
    import gguf

    config = checkpoint.config
    architecture, is_reordered = _architecture(config)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    try:
        _describe(writer, config)
        translated = _translated(checkpoint, gguf.MODEL_ARCH[architecture])
        for name, own in translated.items():
            shape = checkpoint.tensors[own].shape
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own in translated.values():
            weight: NDArray[np.float32] = checkpoint.read(own).float().numpy()
            if is_reordered and any(part in own for part in _ORDERED):
                weight = _neighbouring(weight, _n_heads(config, own))
            writer.write_tensor_data(np.ascontiguousarray(weight))
    finally:
        writer.close()


def _architecture(config: dict[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's architecture and whether rows change places; raises UnsupportedModelError."""
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"no GGUF is written of a {kind} model: those known are {', '.join(_ARCHITECTURES)}"
        )
    refused: dict[str, Callable[[Any], bool]] = {
        # Each would need metadata or tensors that are not written here, and llama.cpp would not miss them.
        "rope_scaling": lambda value: value is not None,
        "attention_bias": bool,
        "mlp_bias": bool,
        "hidden_act": lambda value: value not in (None, "silu"),
        "sliding_window": lambda value: value is not None and config.get("use_sliding_window", True),
    }
    for key, is_refused in refused.items():
        if is_refused(config.get(key)):
            raise UnsupportedModelError(f"no GGUF is written of a {kind} model with {key} {config[key]}")
    return _ARCHITECTURES[kind]


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Add the metadata that llama.cpp needs to run the model on tokens."""
    import gguf

    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")


def _translated(checkpoint: Checkpoint, architecture: gguf.MODEL_ARCH) -> dict[str, str]:
    """Return the checkpoint's tensor by llama.cpp's name for it; raises UnsupportedModelError."""
    import gguf

    names = gguf.get_tensor_name_map(architecture, checkpoint.config["num_hidden_layers"])
    found = {}
    for own in checkpoint.tensors:
        if own == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"no GGUF is written of {checkpoint.path}: llama.cpp has no place for {own}")
        found[name] = own
    return found


def _n_heads(config: dict[str, Any], tensor: str) -> int:
    n_heads = int(config["num_attention_heads"])
    return int(config.get("num_key_value_heads") or n_heads) if "k_proj" in tensor else n_heads


def _neighbouring(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Return rows (n_heads * head_dim, in) with row i and row i + head_dim / 2 of each head side by side."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
