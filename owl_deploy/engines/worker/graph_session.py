"""Any graph of one input and one output, in either engine: what the benchmark of single products times."""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["NM_DISABLE_ANALYTICS"] = "True"

import numpy as np


class GraphSession:
    """A loaded graph that is fed the same random input again and again."""

    def __init__(self, engine: str, model: str, threads: int, shape: list[int], operators: str | None) -> None:
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if engine == "deepsparse":
            from deepsparse import Engine

            session = Engine(model, batch_size=shape[0], num_cores=threads)
            if session.fraction_of_supported_ops < 1.0:
                raise RuntimeError("DeepSparse compiled only a part of the graph")
            self._run = lambda: session.run([x])[0]
        else:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            if operators:
                options.register_custom_ops_library(operators)
            onnx_session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            name = onnx_session.get_inputs()[0].name
            self._run = lambda: onnx_session.run(None, {name: x})[0]

    def measure(self, n_samples: int) -> list[int]:
        """Return nanoseconds of each of `n_samples` calls."""
        samples = []
        for _ in range(n_samples):
            started = time.perf_counter_ns()
            self._run()
            samples.append(time.perf_counter_ns() - started)
        return samples

    def save(self, file: str) -> None:
        """Write the output of one call as .npy."""
        np.save(Path(file), np.ascontiguousarray(self._run()), allow_pickle=False)
