"""Logits of a checkpoint, one block in memory at a time.

In: a checkpoint and tokens. Out: logits as the whole model would give them. Nothing is cached or sampled.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.observation import advance_
from owl_deploy.skeleton import Skeleton

__all__ = ["streamed_logits"]


def streamed_logits(skeleton: Skeleton, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits (n, seq_len, vocab) of sequences (n, seq_len), each token seeing those before it."""
    rows = torch.from_numpy(tokens)
    inputs = skeleton.capture(rows)
    for index in range(len(skeleton.blocks)):
        with skeleton.filled(index) as block:
            advance_(block, inputs, index)
    with skeleton.head() as logits:
        found = [logits(row[None], state)[0].float() for row, state in zip(rows, inputs.hidden_states, strict=True)]
    stacked: NDArray[np.float32] = torch.stack(found).cpu().numpy()
    return stacked
