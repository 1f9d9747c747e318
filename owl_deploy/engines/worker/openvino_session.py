"""A decoder in OpenVINO, its KV cache a state of the model as openvino-genai keeps it.

Runs in OpenVINO's own environment: Python, numpy, openvino and nncf. The model lies in the folder as model.xml, made by
`convert` from a graph of standard operators with the inputs and outputs of `owl_deploy.export.deepsparse_graph`.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray


def convert(source: str, file: str, precision: str) -> None:
    """Write the graph `source` (.onnx) as `file` (.xml), its weights in `precision`: fp32, int8 or int4.

    int8 is NNCF's default of that mode, a scale per row of a matrix. int4 has groups of 32, symmetric, as dense int4 of
    this package has: NNCF's default of 128 does not divide the width of every model. Head and embedding are int8 then,
    NNCF's default.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = openvino.Core().read_model(source)
    for key in model.inputs:
        name = key.get_any_name()
        if name.startswith("past_key_values."):
            shape = key.get_partial_shape()
            shape[0] = 1  # the initial state is empty, but its other sizes have to be known
            model.reshape({name: shape})
    if precision != "fp32":
        import nncf

        if precision == "int8":
            model = nncf.compress_weights(model)
        else:
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0)
    names = [entry.get_any_name() for entry in model.inputs]
    pasts = [name for name in names if name.startswith("past_key_values.")]
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values.", "present.") for name in pasts})
    openvino.save_model(model, file, compress_to_fp16=False)


def _keep_last_logits(model: openvino.Model) -> None:
    """Let the head multiply the last token's state alone, as openvino-genai does."""
    from openvino import opset13 as ops

    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise RuntimeError("the logits are made by {} and not by MatMul".format(head.get_type_name()))
    last = ops.slice(head.input_value(0), np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1]))
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class OpenVinoSession:
    """One model; its cache grows. In fp32 it computes in float32, else OpenVINO's defaults for the machine hold."""

    def __init__(
        self,
        folder: str,
        threads: int,
        n_tokens: int,
        capacity: int,
        precision: str = "fp32",
        last_logits_only: bool = False,
    ) -> None:
        self.version = openvino.get_version().split("-")[0]
        self.capacity = capacity
        self.last_logits_only = last_logits_only
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "fp32":
            options.update(INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
        core = openvino.Core()
        model = core.read_model(str(Path(folder) / "model.xml"))
        if last_logits_only:
            _keep_last_logits(model)
        compiled = core.compile_model(model, "CPU", options)
        self._vocab_size = compiled.output("logits").get_partial_shape()[2].get_length()
        self._request = compiled.create_infer_request()
        self.n_seen = 0

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Return the logits (len(tokens) or 1, vocab) of tokens at positions past_len, past_len + 1, ..."""
        self._check(tokens, past_len)
        self._rewind(past_len)
        logits: NDArray[np.float32] = self._run(self._inputs(tokens, past_len))
        self.n_seen = past_len + len(tokens)
        return logits.copy()

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds per call with `past_len` positions in the cache or a few more.

        Taking a state back makes the next call copy it, which no generation does: so steps follow one another, each
        with one position more, and the one behind the way back is not timed. A prompt starts from an empty state.
        """
        self._check(tokens, past_len)
        if self.n_seen < past_len:
            self.forward(np.resize(tokens, past_len), 0)
        if past_len:
            self.forward(tokens, past_len)
        samples = []
        for _ in range(n_samples):
            if not past_len:
                self._rewind(0)
            first = self.n_seen if past_len else 0
            self._check(tokens, first)
            inputs = self._inputs(tokens, first)
            started = time.perf_counter_ns()
            self._run(inputs)
            samples.append(time.perf_counter_ns() - started)
            self.n_seen = first + len(tokens)
        return samples

    def _check(self, tokens: NDArray[np.int64], past_len: int) -> None:
        if past_len + len(tokens) > self.capacity:
            raise ValueError("{} tokens after {} do not fit a cache of {}".format(len(tokens), past_len, self.capacity))

    def _rewind(self, past_len: int) -> None:
        """Forget all but the first `past_len` positions."""
        if past_len == 0:
            self._request.reset_state()
        elif past_len < self.n_seen:
            for state in self._request.query_state():
                state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :past_len]))

    def _inputs(self, tokens: NDArray[np.int64], past_len: int) -> dict[str, NDArray[np.int64]]:
        positions = np.arange(past_len, past_len + len(tokens))
        columns = np.arange(past_len + len(tokens))
        return {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, len(columns)), np.int64),
            "positions": positions[None],
            "causal_mask": (columns[None] <= positions[:, None]).astype(np.int64)[None, None],
        }

    def _run(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        self._request.infer(inputs, share_inputs=True)
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data[0]
        return logits
