"""Runs one engine in a process of its own, told what to do by JSON lines.

Started as `python <this folder> ENGINE`, also by the interpreter of another environment: Python
3.8, the standard library, numpy and the engine are all it may need. One request per line on
stdin, one answer per line on the first stdout; whatever an engine prints goes to stderr.

    {"command": "load", "artifact": DIR, "threads": N, "n_tokens": T, "capacity": S, "operators": FILE.so or null,
     "last_logits_only": true or false, "precision": WORD, "batch": B, "is_serving": true or false}
        -> {"load_ms": ..., "version": ...}
    {"command": "forward", "tokens": [...], "past_len": P, "logits": FILE.npy}
        -> {} and the logits (T or 1, vocab) float32 in the file
    {"command": "measure", "tokens": [...], "past_len": P, "n_samples": N} -> {"ns": [...]}
    {"command": "generate", "tokens": [...], "n_new": N, "n_samples": M} -> {"ns": [[...], ...]}
    {"command": "open-graph", "model": FILE, "threads": N, "shape": [...], "operators": FILE.so or null} -> {}
    {"command": "measure-graph", "n_samples": N, "output": FILE.npy or null} -> {"ns": [...]}
    {"command": "quantize", "source": FILE, "file": FILE, "precision": WORD, "threads": N} -> {} (llama.cpp, openvino)
    {"command": "memory"} -> {"peak_rss_bytes": ...}
    {"command": "check-sparse", "model": FILE} -> what SparseML reads (bridge environment only)

A request that fails is answered {"error": sentence}; a crash is seen by the end of the stream.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def open_session(engine, request):
    """Load an artifact into an engine; the engine's module is imported here and nowhere else."""
    arguments = (request["artifact"], request["threads"], request["n_tokens"], request["capacity"])
    if request["batch"] > 1 and engine != "onnxruntime":
        raise ValueError("this engine runs one sequence at a time here, and {} are asked for".format(request["batch"]))
    if engine == "deepsparse":
        from deepsparse_session import DeepSparseSession

        return DeepSparseSession(*arguments, last_logits_only=request["last_logits_only"])
    if engine == "llama.cpp":
        from llama_cpp_session import LlamaCppSession

        return LlamaCppSession(*arguments, last_logits_only=request["last_logits_only"])
    if engine == "openvino":
        from openvino_session import OpenVinoSession

        return OpenVinoSession(*arguments, precision=request["precision"], last_logits_only=request["last_logits_only"])
    if engine == "onnxruntime-genai":
        from genai_session import GenaiSession

        return GenaiSession(*arguments, last_logits_only=request["last_logits_only"])
    if engine in ("torch", "torch-compiled"):
        from torch_session import TorchSession

        return TorchSession(
            *arguments,
            precision=request["precision"],
            is_compiled=engine == "torch-compiled",
            last_logits_only=request["last_logits_only"],
        )
    if request["is_serving"]:
        from serving_session import ServingSession, can_serve

        if can_serve(request["artifact"]):
            return ServingSession(request["artifact"], request["threads"], request["capacity"])
    from onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(
        *arguments,
        operators=request["operators"],
        last_logits_only=request["last_logits_only"],
        batch=request["batch"],
    )


def generation_ns(session, tokens, n_new):
    """Return nanoseconds from the start to the first token and from each token to the next, the most likely ones."""
    told, ns, past_len = time.perf_counter_ns(), [], 0
    while len(ns) < n_new:
        logits = session.forward(tokens, past_len)
        past_len += len(tokens)
        tokens = np.asarray([int(logits[-1].argmax())], dtype=np.int64)
        now = time.perf_counter_ns()
        ns.append(now - told)
        told = now
    return ns


def peak_rss_bytes():
    """High-water mark of this process; ru_maxrss will not do, a child starts with its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel gives no VmHWM")


class Worker:
    """The session that is open, and the answers to requests about it."""

    def __init__(self, engine):
        self.engine = engine
        self.session = None

    def load(self, request):
        started = time.perf_counter()
        self.session = open_session(self.engine, request)
        return {"load_ms": (time.perf_counter() - started) * 1e3, "version": self.session.version}

    def forward(self, request):
        logits = self.session.forward(np.asarray(request["tokens"], dtype=np.int64), request["past_len"])
        np.save(request["logits"], np.ascontiguousarray(logits, dtype=np.float32), allow_pickle=False)
        return {}

    def measure(self, request):
        tokens = np.asarray(request["tokens"], dtype=np.int64)
        return {"ns": [int(ns) for ns in self.session.measure(tokens, request["past_len"], request["n_samples"])]}

    def generate(self, request):
        tokens = np.asarray(request["tokens"], dtype=np.int64)
        own = getattr(self.session, "generation_ns", None)
        generated = own if own is not None else lambda *given: generation_ns(self.session, *given)
        return {"ns": [generated(tokens, request["n_new"]) for _ in range(request["n_samples"])]}

    def open_graph(self, request):
        from graph_session import GraphSession

        self.session = GraphSession(
            self.engine, request["model"], request["threads"], request["shape"], request["operators"]
        )
        return {}

    def measure_graph(self, request):
        if request["output"]:
            self.session.save(request["output"])
        return {"ns": self.session.measure(request["n_samples"])}

    def quantize(self, request):
        if self.engine == "openvino":
            from openvino_session import convert

            convert(request["source"], request["file"], request["precision"])
            return {}
        from llama_cpp_session import quantize

        quantize(request["source"], request["file"], request["precision"], request["threads"])
        return {}

    def memory(self, request):
        return {"peak_rss_bytes": peak_rss_bytes()}

    def check_sparse(self, request):
        from sparse_check import check_sparse_initializers

        return check_sparse_initializers(request["model"])


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines write banners to stdout
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request["command"].replace("-", "_"))(request)
        except Exception as error:  # noqa: BLE001  (the other side turns it into its own error)
            answer = {"error": " ".join("{}: {}".format(type(error).__name__, error).split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
