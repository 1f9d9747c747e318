"""A decoder in llama.cpp, through the C interface that llama-cpp-python hands on.

Runs in llama.cpp's own environment: Python, numpy and llama_cpp. The model file lies in the folder as model.gguf.
"""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

# llama.cpp's own names of its mixtures: those of llama-quantize.
_FILE_TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def quantize(source: str, file: str, precision: str, threads: int) -> None:
    """Write `source` in fewer bits to `file`, by llama.cpp's quantiser with its defaults."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _FILE_TYPES[precision]
    parameters.nthread = threads
    llama_cpp.llama_backend_init()
    code = llama_cpp.llama_model_quantize(source.encode(), file.encode(), parameters)
    if code != 0:
        raise RuntimeError("llama.cpp's quantiser ended with code {}".format(code))


class LlamaCppSession:
    """One GGUF file with a cache of `capacity` positions, all else llama.cpp's defaults (keys and values are float16).

    `last_logits_only` leaves out the logits of all tokens of a call but the last.
    """

    def __init__(self, folder: str, threads: int, n_tokens: int, capacity: int, last_logits_only: bool = False) -> None:
        llama_cpp.llama_backend_init()
        self.version = metadata.version("llama-cpp-python")
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(Path(folder) / "model.gguf").encode(), model_parameters)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load model.gguf")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = capacity  # computed 512 at a time all the same, llama.cpp's default
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a cache of {} positions".format(capacity))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(capacity, 0, 1)
        self.last_logits_only = last_logits_only
        self.capacity = capacity
        self.n_seen = 0

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Return the logits (len(tokens) or 1, vocab) of tokens at positions past_len, past_len + 1, ..."""
        self._check(tokens, past_len)
        self._rewind(past_len)
        self._fill(tokens, past_len)
        self._decode()
        self.n_seen = past_len + len(tokens)
        pointer = llama_cpp.llama_get_logits(self._context)
        n_rows = 1 if self.last_logits_only else len(tokens)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(n_rows, self._vocab_size)).copy()
        return logits

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds per call with `past_len` positions really in the cache.

        Filling the batch and taking the step back are outside the clock; the call and access to its logits are inside.
        """
        self._check(tokens, past_len)
        if self.n_seen < past_len:
            self.forward(np.resize(tokens, past_len), 0)
        self._fill(tokens, past_len)
        samples = []
        for _ in range(n_samples):
            self._rewind(past_len)
            started = time.perf_counter_ns()
            self._decode()
            llama_cpp.llama_get_logits(self._context)  # waits for what may still run
            samples.append(time.perf_counter_ns() - started)
            self.n_seen = past_len + len(tokens)
        return samples

    def _check(self, tokens: NDArray[np.int64], past_len: int) -> None:
        if past_len + len(tokens) > self.capacity:
            raise ValueError("{} tokens after {} do not fit a cache of {}".format(len(tokens), past_len, self.capacity))
        if past_len < 0 or len(tokens) == 0:
            raise ValueError("a call needs tokens and a past_len of at least 0")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError("tokens must be in [0, {})".format(self._vocab_size))

    def _rewind(self, past_len: int) -> None:
        """Forget all but the first `past_len` positions."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, past_len, -1):
            raise RuntimeError("llama.cpp cannot take this model's cache back to {} positions".format(past_len))

    def _fill(self, tokens: NDArray[np.int64], first: int) -> None:
        """Make the batch hold tokens at positions first, first + 1, ..."""
        batch, n = self._batch, len(tokens)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = int(tokens[i])
            batch.pos[i] = first + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = not self.last_logits_only or i == n - 1

    def _decode(self) -> None:
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError("llama_decode ended with code {}".format(code))
