"""A decoder in ONNX Runtime that runs several sequences at once, each in a row of one shared KV cache.

In: an artifact; token ids of a prompt for one row, or the newest token of every row. Out: logits of the last tokens. It
does not know what the tokens mean, who asked, or which row is whose.

Why not onnxruntime-genai's Engine, which has an interface for this: at 0.18 its continuous batching needs
PagedAttention, which exists for CUDA alone, and its static batching gains little on a CPU. GroupQueryAttention itself
takes a length per row, from the sum of the attention mask's row, and writes in place: rows of different lengths decode
in one call of the graph as it is. Tokens per second of one request and of eight, SmolLM2-135M, 48 tokens behind a
prompt of 11, prompts included, one thread of an AMD EPYC with AVX-512, in one sitting:

    artifact                      genai    here
    dense float32              27    44    33   156  (4.7x)
    sparse operator, float32               49   154  (3.1x)
    dense int8 (MatMulNBits)               94   260  (2.8x)
    sparse operator, int8     122    98   134   245  (1.8x)

The last was before the operator took eight rows of X at once. Its steps of 1, 2, 4 and 8 rows behind 64 tokens now take
4.2, 5.3, 7.6 and 11.1 ms with two threads (medians of 160, interleaved), 3.0 times the tokens per second of one row
with eight. Threads of ONNX Runtime spin between steps: without that one client gets 30 % fewer tokens. Logits of dense
float32 are those of a row alone; int8 products round a little differently with the number of rows, so that near ties
may fall to the other side.
"""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported; on by default in 1.31

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.errors import EngineFailedError, OwlDeployError, UnsupportedModelError
from owl_deploy.kernels import library_path
from owl_deploy.memory import available_bytes

__all__ = ["DecoderBatch"]

_Floats = NDArray[np.float32]


class DecoderBatch:
    """A loaded artifact and the KV cache of its rows. Not thread-safe."""

    def __init__(self, artifact: OnnxArtifact, *, n_rows: int, capacity: int, threads: int) -> None:
        """Load the artifact and run it once.

        Args:
            artifact: of target onnxruntime, with a lean graph.
            n_rows: sequences in the cache.
            capacity: positions of each.
            threads: of the engine.

        Raises:
            UnsupportedModelError: its graph cannot run several sequences, or another engine's.
            OwlDeployError: the cache does not fit into memory.
            EngineUnavailableError: it needs the operator library, and there is none for this machine.
            EngineFailedError: ONNX Runtime refuses it.
        """
        facts = artifact.facts
        if facts.target != "onnxruntime":
            raise UnsupportedModelError(
                f"{artifact.name} was exported for {facts.target}, and serve runs in ONNX Runtime: export it with "
                "--target onnxruntime"
            )
        if artifact.manifest.get("graph") == "traced":
            raise UnsupportedModelError(
                f"{artifact.name} has a traced graph, which runs one sequence at a time: serve takes the families that "
                "export writes a lean graph for"
            )
        needed = n_rows * artifact.kv_bytes(capacity)
        if needed > available_bytes():
            raise OwlDeployError(
                f"{n_rows} sequences of {capacity} tokens have {needed / 2**30:.1f} GiB of keys and values and "
                f"{available_bytes() / 2**30:.1f} are free: lower --batch-size or --context-length"
            )
        self.n_rows, self.capacity, self.vocab_size = n_rows, capacity, facts.vocab_size
        self.kv_bytes = needed
        self._session = self._open(artifact, threads)
        names = [entry.name for entry in self._session.get_inputs()]
        shape = (n_rows, facts.n_kv_heads, capacity, facts.head_dim)
        # Not filled: attention reads no further than a row's length, and the system hands out pages as they are
        # written.
        self._cache = {name: _pages(shape) for name in names if name.startswith("past_key_values.")}
        self._columns = np.arange(capacity)
        self._bindings: dict[tuple[int, int], Any] = {}
        self.prefill(0, np.zeros(1, np.int64), 0)

    def _open(self, artifact: OnnxArtifact, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if artifact.facts.weights == "sparse-operator":
            # Always the library that is installed here: an artifact brings one too, and its code is not to be trusted.
            options.register_custom_ops_library(str(library_path()))
        # Logits of the last token alone; the session refers to this memory.
        self._first_logit = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([-1]))
        options.add_initializer("first_logit", self._first_logit)
        try:
            return onnxruntime.InferenceSession(
                str(artifact.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise EngineFailedError(f"ONNX Runtime cannot load {artifact.name}: {error}") from error

    def prefill(self, row: int, tokens: NDArray[np.int64], past_len: int) -> _Floats:
        """Run tokens (T,) behind `past_len` positions of a row; returns the last one's logits, (vocab,) float32."""
        n_all = past_len + len(tokens)
        if not 0 <= row < self.n_rows or not 0 < n_all <= self.capacity:
            raise ValueError(f"{len(tokens)} tokens behind {past_len} do not fit row {row}")
        logits: _Floats = self._run(row, row + 1, tokens[None], np.ones((1, n_all), np.int64))[0]
        return logits

    def decode(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> _Floats:
        """Run one token more for the first rows.

        Args:
            tokens: (n,), of rows 0 to n - 1.
            lengths: (n,), positions of each row, the new one counted.

        Returns:
            Logits, (n, vocab) float32.
        """
        if len(tokens) > self.n_rows or lengths.max() > self.capacity:
            raise ValueError(f"{len(tokens)} rows of at most {lengths.max()} tokens do not fit the cache")
        # Rows are padded behind their end: the operator counts the ones of a row to know its length.
        mask = (self._columns[: lengths.max()] < lengths[:, None]).astype(np.int64)
        return self._run(0, len(tokens), tokens[:, None], mask)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another."""
        for values in self._cache.values():
            values[target, :, :length] = values[source, :, :length]

    def _run(self, first: int, last: int, tokens: NDArray[np.int64], mask: NDArray[np.int64]) -> _Floats:
        """Run the graph on rows first to last - 1; returns the logits of their last tokens."""
        binding = self._binding(first, last)
        logits = np.empty((last - first, 1, self.vocab_size), np.float32)
        tokens = np.ascontiguousarray(tokens)
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits[:, 0]

    def _binding(self, first: int, last: int) -> Any:
        """Return past and present of some rows, bound to one place. Kept: there are 120 names to bind."""
        if (first, last) not in self._bindings:
            binding = self._session.io_binding()
            for name, values in self._cache.items():
                rows = values[first:last]
                place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(name.replace("past_key_values.", "present."), *place)
            self._bindings[first, last] = binding
        return self._bindings[first, last]


def _pages(shape: tuple[int, ...]) -> _Floats:
    """Return an array whose memory is taken in small pages, as it is written.

    numpy's own asks for huge pages, and a row's first token then takes 2 MiB of every head: all 1440 MiB that eight
    sequences of 4096 tokens of SmolLM2 may ever need, instead of the few MiB that they do need at first.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)
