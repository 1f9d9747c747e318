"""A decoder in ONNX Runtime, its KV cache in one buffer that past and present share."""

import json
import os
import time
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported; on by default in 1.31

import numpy as np
import onnxruntime


class OnnxRuntimeSession:
    """One artifact, loaded for one cache size; `n_tokens` may differ from call to call.

    `operators` is the operator library that the artifact's graph needs, None where it needs none. `last_logits_only`
    leaves out the logits of all tokens of a call but the last. `batch` equal sequences run at once, each with the
    tokens of a call; the logits that are returned are the first one's.
    """

    def __init__(self, artifact, threads, n_tokens, capacity, operators=None, last_logits_only=False, batch=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if operators is not None:
            options.register_custom_ops_library(operators)
        if last_logits_only:
            # Takes the place of the model's own; the session refers to this memory.
            self.first_logit = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([-1]))
            options.add_initializer("first_logit", self.first_logit)
        self.last_logits_only = last_logits_only
        self.session = onnxruntime.InferenceSession(
            str(Path(artifact) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.version = onnxruntime.__version__
        facts = json.loads((Path(artifact) / "owl.json").read_text(encoding="utf-8"))
        self.vocab_size = facts["vocab_size"]
        self.capacity = capacity
        names = [entry.name for entry in self.session.get_inputs()]
        self.takes_positions = "position_ids" in names
        # GroupQueryAttention writes new positions in place, into one buffer for past and present. A traced graph
        # makes a new buffer at every call, with the old positions and the new ones.
        self.is_growing = facts.get("graph") == "traced"
        if self.is_growing and batch > 1:
            raise ValueError("a traced graph runs one sequence at a time, and {} are asked for".format(batch))
        self.batch = batch
        shape = (batch, facts["n_kv_heads"], 0 if self.is_growing else capacity, facts["head_dim"])
        self.cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name in names
            if name.startswith("past_key_values.")
        }
        self.n_seen = 0

    def _bind(self, tokens, past_len):
        """Bind the inputs and outputs of one call; returns the binding and the buffer of the logits."""
        n_all = past_len + len(tokens)
        if n_all > self.capacity:
            raise ValueError("{} tokens after {} do not fit a cache of {}".format(len(tokens), past_len, self.capacity))
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(np.tile(tokens, (self.batch, 1))))
        binding.bind_cpu_input("attention_mask", np.ones((self.batch, n_all), np.int64))
        if self.takes_positions:
            binding.bind_cpu_input("position_ids", np.tile(np.arange(past_len, n_all), (self.batch, 1)))
        n_logits = 1 if self.last_logits_only else len(tokens)
        logits = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((self.batch, n_logits, self.vocab_size), np.float32))
        binding.bind_ortvalue_output("logits", logits)
        for name, value in self.cache.items():
            present = name.replace("past_key_values.", "present.")
            if self.is_growing:
                if value.shape()[2] != past_len:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()[:, :, :past_len].copy())
                binding.bind_ortvalue_input(name, value)
                binding.bind_output(present)
            else:
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(present, value)
        return binding, logits

    def forward(self, tokens, past_len):
        """Return the logits (len(tokens) or 1, vocab) of tokens at positions past_len, past_len + 1, ..."""
        binding, logits = self._bind(tokens, past_len)
        self.session.run_with_iobinding(binding)
        self.n_seen = past_len + len(tokens)
        if self.is_growing:
            self.cache = dict(zip(self.cache, binding.get_outputs()[1:]))  # noqa: B905  (Python 3.8)
        return np.array(logits.numpy()[0])  # a copy: the view does not keep the OrtValue's memory alive

    def measure(self, tokens, past_len, n_samples):
        """Return nanoseconds per call with `past_len` positions really in the cache.

        Inputs are bound outside the clock; the call itself, logits included, is inside.
        """
        if self.n_seen < past_len:
            self.forward(np.resize(tokens, past_len), 0)
        binding, _ = self._bind(tokens, past_len)
        samples = []
        for _ in range(n_samples):
            started = time.perf_counter_ns()
            self.session.run_with_iobinding(binding)
            samples.append(time.perf_counter_ns() - started)
        if not self.is_growing:
            self.n_seen = past_len + len(tokens)
        return samples
