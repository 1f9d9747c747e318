"""Text that a model samples from itself, and the greedy continuation that parity compares.

In: a loaded torch model, or a checkpoint. Out: token ids. Nothing here knows of tokenizers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import attention_options, open_skeleton

__all__ = ["SAMPLED_TOGETHER", "load_torch_model", "sample_tokens", "torch_logits"]

# Sequences sampled side by side: enough to keep the cores busy, and 200 MiB of cache per 512 tokens of SmolLM2.
SAMPLED_TOGETHER = 32


def load_torch_model(checkpoint: Checkpoint) -> Any:
    """Load a whole checkpoint as a float32 transformers model in evaluation mode.

    Raises:
        UnsupportedModelError: a tensor is missing or of another shape than config.json says.
        OwlDeployError: a weight holds NaN or Inf.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    open_skeleton(checkpoint)  # transformers would make up what is missing
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        **attention_options(config),
    )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise OwlDeployError(
                f"tensor {name} holds NaN or Inf: the checkpoint is damaged or overflowed when it was saved"
            )
    return model.eval()


@torch.inference_mode()
def sample_tokens(
    checkpoint: Checkpoint,
    *,
    n_samples: int,
    seq_len: int,
    first: int | None,
    n_left_out: int = 0,
    seed: int,
    on_step: OnStep = silent,
) -> NDArray[np.int64]:
    """Sample sequences at temperature 1 from the model's own distribution.

    An end-of-text token does not stop a sequence: the model goes on with a new document, so short
    documents are joined as they are in training data.

    Args:
        first: first token of every sequence; drawn uniformly from the vocabulary when None.
        n_left_out: tokens of every sequence, the first one included, that are sampled and left out.

    Returns:
        Token ids, (n_samples, seq_len) int64.
    """
    model = load_torch_model(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    batches = [min(SAMPLED_TOGETHER, n_samples - start) for start in range(0, n_samples, SAMPLED_TOGETHER)]
    n_sampled = n_left_out + seq_len
    total = len(batches) * n_sampled
    done = 0
    rows: list[torch.Tensor] = []
    for batch in batches:
        shape = (batch, 1)
        vocab_size = int(model.config.vocab_size)
        token = torch.full(shape, first) if first is not None else torch.randint(vocab_size, shape, generator=generator)
        columns, cache = [token], None
        while len(columns) < n_sampled:
            output = model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
            columns.append(torch.multinomial(probabilities, 1, generator=generator))
            on_step(Step("sampling calibration text", done + len(columns), total))
        done += n_sampled
        rows.append(torch.cat(columns[n_left_out:], dim=1))
    return torch.cat(rows).numpy().astype(np.int64)


@torch.inference_mode()
def torch_logits(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits (n, vocab) float32 of tokens (n,), each seeing those before it."""
    logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()
    return logits
