"""`genai_config.json`: what onnxruntime-genai wants to know of an artifact to generate text with it."""

from __future__ import annotations

from typing import Any

from owl_deploy.export.artifact_shape import ArtifactShape
from owl_deploy.text import Encoder

__all__ = ["genai_config"]

# Types that onnxruntime-genai 0.18 does not know -> one that runs the same loop: tokens and mask in, logits and cache
# out. The graph counts positions itself, so that nothing of the family is left to do outside of it.
_TYPES = {"opt": "llama"}


def genai_config(
    shape: ArtifactShape, encoder: Encoder, end_tokens: list[int], *, operator_library: str | None = None
) -> dict[str, Any]:
    """Return the configuration in the layout of onnxruntime-genai's model builder (0.18).

    Sampling is off (greedy) and past and present share one buffer, but for traced graphs; users override both. Windows
    are not named: the cache holds every position, and attention itself looks back as far as it should.

    Args:
        shape: sizes and the family's name.
        encoder: gives the special tokens where the model's generation settings name none.
        end_tokens: the model's own, perhaps several or none.
        operator_library: file of the artifact's own operators; genai looks for it in the model's folder alone.
    """
    session_options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if operator_library is not None:
        session_options["custom_ops_library"] = operator_library
    # Configurations of small models keep the numbers of large ones, which genai refuses to load.
    end_tokens = [token for token in end_tokens if 0 <= token < shape.vocab_size]
    eos = end_tokens[0] if end_tokens else encoder.eos_token_id or 0
    return {
        "model": {
            "type": "llama" if shape.is_traced else _TYPES.get(shape.model_type, shape.model_type),
            "bos_token_id": encoder.bos_token_id if encoder.bos_token_id is not None else eos,
            "eos_token_id": end_tokens if len(end_tokens) > 1 else eos,
            "pad_token_id": eos,
            "vocab_size": shape.vocab_size,
            "context_length": shape.max_positions,
            "decoder": {
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.n_heads,
                "num_hidden_layers": shape.n_blocks,
                "num_key_value_heads": shape.n_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if shape.has_position_ids else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": session_options,
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": shape.max_positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": not shape.is_traced,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
