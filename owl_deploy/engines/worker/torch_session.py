"""A checkpoint in torch and transformers, eager or compiled: what a model costs before anything is exported.

Code of the model is not run, and its weights are safetensors.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"  # a folder is loaded, nothing is asked

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchSession:
    """One checkpoint; eager with a cache that grows, compiled with one of `capacity` positions.

    Compiled are calls of `n_tokens` tokens, others run eagerly: every length would be compiled anew.

    `last_logits_only` leaves out the logits of all tokens of a call but the last.
    """

    def __init__(
        self,
        folder: str,
        threads: int,
        n_tokens: int,
        capacity: int,
        precision: str = "fp32",
        is_compiled: bool = False,
        last_logits_only: bool = False,
    ) -> None:
        torch.set_num_threads(threads)
        self.version = str(torch.__version__)
        self.capacity = capacity
        self.last_logits_only = last_logits_only
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[precision], trust_remote_code=False, use_safetensors=True
        ).eval()
        self._is_compiled = is_compiled
        self._n_tokens = n_tokens
        self._compiled: Any = torch.compile(self.model, fullgraph=True, dynamic=False) if is_compiled else None
        self._cache: Any = self._empty_cache()
        self.n_seen = 0

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Return the logits (len(tokens) or 1, vocab) of tokens at positions past_len, past_len + 1, ..."""
        self._check(tokens, past_len)
        with torch.inference_mode():
            self._rewind(past_len)
            logits = self._run(*self._inputs(tokens, past_len))
        self.n_seen = past_len + len(tokens)
        found: NDArray[np.float32] = logits[0].float().numpy()
        return found

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds per call with `past_len` positions really in the cache; the step back is outside."""
        self._check(tokens, past_len)
        samples = []
        with torch.inference_mode():
            if self.n_seen < past_len:
                self.forward(np.resize(tokens, past_len), 0)
            inputs = self._inputs(tokens, past_len)
            for _ in range(n_samples):
                self._rewind(past_len)
                started = time.perf_counter_ns()
                self._run(*inputs)
                samples.append(time.perf_counter_ns() - started)
                self.n_seen = past_len + len(tokens)
        return samples

    def _check(self, tokens: NDArray[np.int64], past_len: int) -> None:
        if past_len + len(tokens) > self.capacity:
            raise ValueError("{} tokens after {} do not fit a cache of {}".format(len(tokens), past_len, self.capacity))

    def _empty_cache(self) -> Any:
        if self._is_compiled:
            return StaticCache(config=self.model.config, max_cache_len=self.capacity)
        return DynamicCache()  # without the config: layers with a sliding window could not be cut back

    def _rewind(self, past_len: int) -> None:
        """Forget all but the first `past_len` positions; a cache of fixed size is written over, and masked beyond."""
        if self._is_compiled:
            return
        if past_len == 0:
            self._cache = self._empty_cache()
        elif past_len < self.n_seen:
            self._cache.crop(past_len)

    def _inputs(self, tokens: NDArray[np.int64], past_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(tokens)[None], torch.arange(past_len, past_len + len(tokens))

    def _run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        call = self._compiled if self._is_compiled and ids.shape[1] == self._n_tokens else self.model
        logits: torch.Tensor = call(
            input_ids=ids,
            cache_position=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if self.last_logits_only else 0,
        ).logits
        return logits
