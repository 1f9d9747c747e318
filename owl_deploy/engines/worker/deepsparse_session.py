"""A decoder in DeepSparse 1.8.0, compiled for one number of tokens and one size of the KV cache.

Runs in the bridge environment: Python 3.8, the standard library, numpy and deepsparse (with the
onnx that it brings). The graph is that of `deepsparse_graph`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

os.environ["NM_DISABLE_ANALYTICS"] = "True"  # read when deepsparse is imported

import deepsparse
import numpy as np
import onnx
from deepsparse.engine import LIB, Engine
from numpy.typing import NDArray

_PAST = "past_key_values."
_PRESENT = "present."
# The engine's own cache holds its past positions rounded to the nearest multiple of 64, new tokens
# included, and slides beyond without a word: compiled for 96 it is right for 64 tokens and wrong
# from the 65th, for 112 or 120 right for all; for 257 wrong from the 257th.
_CACHE_MULTIPLE = 64


class DeepSparseSession:
    """One artifact, compiled for calls of `n_tokens` tokens with `capacity` positions in all.

    Decode (one token) leaves the cache inside the engine, everything else passes it in and out.
    Measured on SmolLM2-135M at 70 % sparsity, two cores, interleaved: decode at 256 positions
    14.6 ms inside (compiled for 272) against 15.4 ms passed (lower quartiles of 40). Prefill of 256
    tokens 315 ms inside against 269 ms passed (minima of 7, busy machine), because inside there must
    be room for as many old positions as new ones, and its logits were not a number.
    """

    engine = "deepsparse"

    def __init__(
        self, artifact: str, threads: int, n_tokens: int, capacity: int, last_logits_only: bool = False
    ) -> None:
        if not 1 <= n_tokens <= capacity:
            raise ValueError("n_tokens must be in [1, capacity = {}], got {}".format(capacity, n_tokens))
        self.version: str = deepsparse.__version__
        self.n_tokens = n_tokens
        self.capacity = capacity
        self.n_seen = 0
        """Positions of the cache that hold something."""
        is_internal = n_tokens == 1
        self._n_past = -(-capacity // _CACHE_MULTIPLE) * _CACHE_MULTIPLE if is_internal else max(capacity - n_tokens, 1)
        model = Path(artifact) / "model.onnx"
        with _static_copy(model, n_tokens, self._n_past, last_logits_only) as (path, is_cached):
            self._engine = Engine(
                path, batch_size=1, num_cores=threads, cached_outputs=is_cached if is_internal else None
            )
        # DeepSparse gives what it cannot compile to the ONNX Runtime inside it, and says nothing.
        if self._engine.fraction_of_supported_ops < 1.0:
            raise RuntimeError(
                "DeepSparse compiled only {:.0%} of the operators, so its time would be ONNX Runtime's".format(
                    self._engine.fraction_of_supported_ops
                )
            )
        self._names = list(self._engine.input_names)
        shapes = dict(zip(self._names, self._engine.input_shapes))  # noqa: B905  (Python 3.8)
        self._kv_cache = LIB.kv_cache(0, 0) if is_internal else None
        # With the cache inside, the engine wants inputs of batch 0 in its place. Outside, the last
        # column is always the newest position that was seen.
        self._cache = {
            name: np.zeros((0 if is_internal else 1, *shape[1:]), np.float32)
            for name, shape in shapes.items()
            if name.startswith(_PAST)
        }

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Return the logits (len(tokens), vocab) of tokens at positions past_len, past_len + 1, ...

        Where the session has those of the last token alone, that one is the last it was compiled for.
        `past_len` may be anything up to the number of positions seen; later ones are forgotten.
        Fewer tokens than the session was compiled for are padded behind, which costs as much as
        all, and needs as much room in the cache.
        """
        n = len(tokens)
        self._check(n, past_len)
        self._rewind(past_len)
        logits, present = self._run(self._inputs(tokens, past_len))
        if self._kv_cache is None:
            self._keep(present, n)
        self.n_seen = past_len + n
        found = logits[0, :n]
        if not np.isfinite(found).all():
            raise RuntimeError("DeepSparse returned logits that are not finite")
        return found

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds per call with `past_len` positions really in the cache.

        The engine's call is inside the clock, with the copies that it makes of logits and, where
        it is passed, of the cache; making inputs and taking the step back are outside.
        """
        self._check(len(tokens), past_len)
        self.fill(past_len)
        inputs = self._inputs(tokens, past_len)
        samples = []
        for _ in range(n_samples):
            started = time.perf_counter_ns()
            self._run(inputs)
            samples.append(time.perf_counter_ns() - started)
            if self._kv_cache is not None:
                self._kv_cache.shift_last(1)
        return samples

    def fill(self, past_len: int) -> None:
        """Make the cache hold exactly `past_len` positions: what was seen so far, then tokens 1."""
        self._rewind(min(past_len, self.n_seen))
        while self.n_seen < past_len:
            n = min(self.n_tokens, past_len - self.n_seen)
            self.forward(np.ones(n, np.int64), self.n_seen)

    def _check(self, n: int, past_len: int) -> None:
        if not 1 <= n <= self.n_tokens:
            raise ValueError("this session takes 1 to {} tokens, got {}".format(self.n_tokens, n))
        if past_len + self.n_tokens > self.capacity:
            raise ValueError(
                "a call for {} tokens after {} does not fit a cache of {}".format(
                    self.n_tokens, past_len, self.capacity
                )
            )

    def _rewind(self, past_len: int) -> None:
        """Forget all but the first `past_len` positions."""
        n_back = self.n_seen - past_len
        if n_back < 0:
            raise ValueError("past_len is {}, but only {} positions were seen".format(past_len, self.n_seen))
        if self._kv_cache is not None:
            if past_len == 0:
                self._kv_cache.reset()
            elif n_back:
                self._kv_cache.shift_last(n_back)
        elif n_back:
            self._cache = {name: array[:, :, :-n_back] for name, array in self._cache.items()}
        self.n_seen = past_len

    def _inputs(self, tokens: NDArray[np.int64], past_len: int) -> list[NDArray[Any]]:
        """Arrays in the order of the graph's inputs; new tokens stand behind `_n_past` columns of cache."""
        n_all = self._n_past + self.n_tokens
        column, row = np.arange(n_all) - self._n_past, np.arange(self.n_tokens)[:, None]
        is_visible = (column >= -past_len) & (column <= row)
        ids = np.zeros((1, self.n_tokens), np.int64)
        ids[0, : len(tokens)] = tokens
        # A padding token has no position of its own: beyond the rotary table there is none.
        positions = past_len + np.minimum(np.arange(self.n_tokens), len(tokens) - 1)
        arrays = {
            "input_ids": ids,
            "attention_mask": (column >= -past_len).astype(np.int64)[None],
            "positions": positions.astype(np.int64)[None],
            "causal_mask": is_visible.astype(np.int64)[None, None],
            **(self._cache if self._kv_cache is not None else self._past()),
        }
        return [arrays[name] for name in self._names]

    def _run(self, inputs: list[NDArray[Any]]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Call the engine without the checks of `Engine.run`, which refuse inputs of batch 0."""
        network = self._engine._eng_net
        if self._kv_cache is not None:
            outputs = network.execute_list_out(inputs, self._kv_cache)
        else:
            outputs = network.execute_list_out(inputs)
        return outputs[0], outputs[1:]

    def _keep(self, present: list[NDArray[np.float32]], n: int) -> None:
        """Take `present` as the cache, without the positions of padding tokens."""
        names = [name.replace(_PRESENT, _PAST) for name in self._engine.output_names[1:]]
        kept = [array[:, :, : self._n_past + n] for array in present]
        self._cache = dict(zip(names, kept))  # noqa: B905  (Python 3.8)

    def _past(self) -> dict[str, NDArray[np.float32]]:
        """The newest `_n_past` columns of the cache; after a step back there may be fewer, and zeros in front."""
        past = {}
        for name, array in self._cache.items():
            newest = array[:, :, -self._n_past :]
            n_missing = self._n_past - newest.shape[2]
            past[name] = np.ascontiguousarray(np.pad(newest, ((0, 0), (0, 0), (n_missing, 0), (0, 0))))
        return past


@contextlib.contextmanager
def _static_copy(
    model_path: Path, n_tokens: int, n_past: int, last_logits_only: bool
) -> Iterator[tuple[str, list[bool]]]:
    """Copy a model with numbers for its lengths, because DeepSparse would write them into the file itself.

    External data is linked, not copied. Yields the copy's path, and for each output whether it is cache.
    """
    lengths = {
        "batch": 1,
        "input_ids_len": n_tokens,
        "past_sequence_len": n_past,
        "sequence_len": n_past + n_tokens,
    }
    model = onnx.load(str(model_path), load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in lengths:
                dim.dim_value = lengths[dim.dim_param]
    if last_logits_only:
        first_logit = next(tensor for tensor in model.graph.initializer if tensor.name == "first_logit")
        first_logit.CopyFrom(onnx.numpy_helper.from_array(np.array([-1]), first_logit.name))
        logits = next(value for value in model.graph.output if value.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_value = 1
    del model.graph.value_info[:]  # shapes found for the symbolic lengths
    folder = Path(tempfile.mkdtemp(prefix="owl-deploy-"))
    try:
        for file in model_path.resolve().parent.iterdir():
            if file.name != model_path.name:
                (folder / file.name).symlink_to(file)
        path = folder / model_path.name
        onnx.save(model, str(path))
        yield str(path), [value.name.startswith(_PRESENT) for value in model.graph.output]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
