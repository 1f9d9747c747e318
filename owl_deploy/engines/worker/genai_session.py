"""An artifact in onnxruntime-genai: the same graph in ONNX Runtime, driven by its generator.

The folder has been checked before: genai loads the operator library that lies in it.
"""

from __future__ import annotations

import json
import os
import time
from importlib import metadata

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded

import numpy as np
import onnxruntime_genai
from numpy.typing import NDArray


class GenaiSession:
    """One artifact with a cache of `capacity` positions; `n_tokens` may differ from call to call.

    genai computes the logits of all tokens of a call. `last_logits_only` leaves out what `forward` returns alone.
    """

    def __init__(self, folder: str, threads: int, n_tokens: int, capacity: int, last_logits_only: bool = False) -> None:
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config = onnxruntime_genai.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.version = metadata.version("onnxruntime-genai")
        self.capacity = capacity
        self.last_logits_only = last_logits_only
        # Referred to by the generator for as long as it lives.
        self._model = onnxruntime_genai.Model(config)
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        # One more: it counts the token that would be sampled from the last logits.
        parameters.set_search_options(max_length=capacity + 1)
        self._generator = onnxruntime_genai.Generator(self._model, parameters)

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Return the logits (len(tokens) or 1, vocab) of tokens at positions past_len, past_len + 1, ..."""
        self._check(tokens, past_len)
        self._generator.rewind_to(past_len)
        self._generator.append_tokens(tokens.astype(np.int32))
        logits: NDArray[np.float32] = np.array(self._generator.get_output("logits")[0])
        return logits[-1:] if self.last_logits_only else logits

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds per call with `past_len` positions really in the cache.

        Making the tokens known to the generator and running the graph are inside the clock, the step back is outside.
        """
        self._check(tokens, past_len)
        n_seen = self._generator.token_count()
        if n_seen < past_len:
            self.forward(np.resize(tokens, past_len), 0)
        new = tokens.astype(np.int32)
        samples = []
        for _ in range(n_samples):
            self._generator.rewind_to(past_len)
            started = time.perf_counter_ns()
            self._generator.append_tokens(new)
            samples.append(time.perf_counter_ns() - started)
        return samples

    def _check(self, tokens: NDArray[np.int64], past_len: int) -> None:
        if past_len + len(tokens) > self.capacity:
            raise ValueError("{} tokens after {} do not fit a cache of {}".format(len(tokens), past_len, self.capacity))
