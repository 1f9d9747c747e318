"""How much each decoder block matters: what it does to the hidden states, or what the model is without it.

In: a skeleton, calibration tokens. Out: a figure per block, low where it can go. What is made of them is not
known here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from owl_deploy.evaluation import perplexity
from owl_deploy.generation import load_torch_model
from owl_deploy.hidden_states import HiddenStates
from owl_deploy.observation import advance_
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import BlockInputs, Skeleton

__all__ = ["block_influences", "perplexities_without", "taylor_scores"]

log = logging.getLogger(__name__)

# Hidden states held at once while every block is left out in turn. A sequence of 2048 tokens of a model of 7 B is
# 1 GiB by itself; with less than that the weights are read from disk more often than they are multiplied.
_STREAM_BYTES = 2**30


@torch.inference_mode()
def block_influences(skeleton: Skeleton, tokens: torch.Tensor, on_step: OnStep = silent) -> list[float]:
    """Return of every block 1 - mean over tokens of cos(hidden state before it, hidden state behind it).

    Block Influence of ShortGPT (Men et al., arXiv 2403.03853, equation 1), in float64. What is behind the last block
    is taken before the final norm, as of all the others. One forward pass, one block of weights at a time; it holds
    the hidden states of all sequences.

    Args:
        tokens: (n_samples, seq_len) int64.

    Raises:
        OwlDeployError: an output is NaN or Inf.
    """
    inputs = skeleton.capture(tokens)
    n_blocks = len(skeleton.blocks)
    influences: list[float] = []
    for index in range(n_blocks):
        cosines: list[float] = []
        with skeleton.filled(index) as block:
            hook = block.register_forward_hook(lambda _, args, output, seen=cosines: seen.append(_cosine(args, output)))
            try:
                advance_(block, inputs, index)
            finally:
                hook.remove()
        influences.append(1 - sum(cosines) / len(cosines))  # sequences are of one length
        on_step(Step("block influence", index + 1, n_blocks, f"{influences[-1]:.4g}"))
    return influences


def _cosine(args: tuple[Any, ...], output: Any) -> float:
    """Return the mean over tokens of the cosine between the input and the output of a block."""
    behind = output[0] if isinstance(output, tuple) else output
    return float(cosine_similarity(args[0].double(), behind.double(), dim=-1).mean())


@torch.inference_mode()
def perplexities_without(
    skeleton: Skeleton, tokens: torch.Tensor, candidates: Sequence[int], on_step: OnStep = silent
) -> dict[int, float]:
    """Return by block the perplexity of the model without that one block, on the given tokens.

    The PPL criterion of Shortened LLaMA (Kim et al., arXiv 2402.02834, section 3.2): exp of the mean negative
    log-likelihood per token. The blocks are streamed: what runs without a block starts from the hidden states
    before it, so that n blocks cost n / 2 forward passes, not n. It holds one block, the head, and n + 1 times the
    hidden states of as many sequences as fit into 1 GiB; the weights are read once per such group.

    Args:
        tokens: (n_samples, seq_len) int64.
        candidates: blocks to leave out, one at a time.

    Raises:
        OwlDeployError: an output is NaN or Inf.
    """
    n_blocks = len(skeleton.blocks)
    hidden: int = skeleton.model.config.get_text_config(decoder=True).hidden_size
    n_together = max(1, _STREAM_BYTES // (4 * (len(candidates) + 1) * tokens.shape[1] * hidden))
    groups = [tokens[start : start + n_together] for start in range(0, len(tokens), n_together)]
    nlls: dict[int, list[float]] = {index: [] for index in candidates}
    for number, rows in enumerate(groups):
        dense = skeleton.capture(rows)
        without: dict[int, BlockInputs] = {}
        for index in range(n_blocks):
            with skeleton.filled(index) as block:
                if index in nlls:
                    without[index] = replace(dense, hidden_states=_copied(dense.hidden_states))
                for left_out, inputs in without.items():
                    if left_out != index:
                        advance_(block, inputs, index)
                advance_(block, dense, index)
            done = number * n_blocks + index + 1
            on_step(Step("perplexity without a block", done, len(groups) * n_blocks))
        with skeleton.head() as logits:
            for left_out, inputs in without.items():
                for row, state in zip(rows, inputs.hidden_states, strict=True):
                    nlls[left_out].append(_nll(logits(row[None], state)[0], row).item())
    return {index: perplexity(values) for index, values in nlls.items()}


def _copied(states: HiddenStates) -> HiddenStates:
    """Return the same hidden states, to be replaced one by one."""
    copied = HiddenStates()
    for state in states:
        copied.append(state)
    return copied


def _nll(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood, in nats, of each token after the first."""
    return cross_entropy(logits[:-1].float(), row[1:])


def taylor_scores(skeleton: Skeleton, tokens: torch.Tensor, on_step: OnStep = silent) -> list[float]:
    """Return of every block the sum over its weights of abs(weight x gradient of the loss).

    The Taylor criterion of Shortened LLaMA (Kim et al., arXiv 2402.02834, section 3.2). As in its code, the gradient
    is that of the mean loss over all sequences, norms count, and biases do not. It needs gradients, and so holds the
    whole model in float32, the gradients of its blocks, and what one sequence leaves behind for its backward pass.

    Args:
        tokens: (n_samples, seq_len) int64.
    """
    n_weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
    n_trained = sum(parameter.numel() for parameter in skeleton.blocks.parameters())
    log.info("Taylor scores hold all weights and their gradients: %.2f GiB", 4 * (n_weights + n_trained) / 2**30)
    model = load_torch_model(skeleton.checkpoint)
    model.requires_grad_(False)
    blocks = model.get_submodule(skeleton.prefix).requires_grad_(True)
    for number, row in enumerate(tokens):
        loss = _nll(model(input_ids=row[None], use_cache=False).logits[0], row)
        torch.autograd.backward(loss / len(tokens))
        on_step(Step("gradients", number + 1, len(tokens), f"loss {loss.item():.3f}"))
    return [
        sum(
            float((parameter.detach() * parameter.grad).abs().sum(dtype=torch.float64))
            for name, parameter in block.named_parameters()
            if parameter.grad is not None and not name.endswith("bias")  # None: an expert without a token
        )
        for block in blocks
    ]
