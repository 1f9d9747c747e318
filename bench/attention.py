"""Attention alone: the operator library's GroupQueryAttention beside ONNX Runtime's own.

In: the shape of a decoder's attention, rows, positions of cache, new tokens. Out: a table of times of all blocks and
ratios to ONNX Runtime's operator in the same round. No model: queries, keys and values are random. Every block has a
cache of its own, which is updated in place, so that keys and values come from memory as they do in a decoder. Run it as
`python -m owl_deploy.bench.attention`.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from owl_deploy.kernels import library_path
from owl_deploy.threads import resolve_threads

__all__ = ["AttentionCase", "main", "measure_attention"]

_OPERATORS = {"onnxruntime": "com.microsoft", "owl-deploy": "owl_deploy"}


@dataclass(frozen=True)
class AttentionCase:
    """All attention of one step."""

    batch: int
    n_tokens: int
    """New tokens of each row."""
    n_past: int
    """Positions of cache before them."""
    n_blocks: int = 30
    n_heads: int = 9
    n_kv_heads: int = 3
    head_dim: int = 64


class _Attention:
    """A session of one operator, with its caches; lives in a process of its own."""

    def __init__(self, case: AttentionCase, domain: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(library_path()))
        self._session = onnxruntime.InferenceSession(_graph(case, domain), options, providers=["CPUExecutionProvider"])
        random = np.random.default_rng(0)
        length = case.n_past + case.n_tokens
        n_stacked = case.n_heads + 2 * case.n_kv_heads
        angles = random.random((length, case.head_dim // 2), np.float32)
        self._binding = self._session.io_binding()
        inputs = {
            "qkv": random.standard_normal((case.batch, case.n_tokens, n_stacked * case.head_dim), np.float32),
            "lengths": np.full(case.batch, length - 1, np.int32),
            "total": np.array(length, np.int32),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
        }
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._kept: list[Any] = [inputs]
        for i in range(case.n_blocks):
            for part in ("key", "value"):
                cache = random.standard_normal((case.batch, case.n_kv_heads, length, case.head_dim), np.float32)
                place = ("cpu", 0, np.float32, cache.shape, cache.ctypes.data)
                self._binding.bind_input(f"past.{i}.{part}", *place)
                self._binding.bind_output(f"present.{i}.{part}", *place)
                self._kept.append(cache)
            self._binding.bind_output(f"y.{i}")

    def sample(self, n: int) -> list[int]:
        """Return nanoseconds of n steps."""
        found = []
        for _ in range(n):
            started = time.perf_counter_ns()
            self._session.run_with_iobinding(self._binding)
            found.append(time.perf_counter_ns() - started)
        return found

    def output(self) -> Any:
        """Return what the last block gave."""
        return self._binding.copy_outputs_to_cpu()[-1]


def _graph(case: AttentionCase, domain: str) -> bytes:
    """Write one attention node for each block, all of the same queries."""
    is_ours = domain == "owl_deploy"
    cache: list[str | int | None] = ["batch", case.n_kv_heads, "positions", case.head_dim]
    inputs = [
        helper.make_tensor_value_info("qkv", TensorProto.FLOAT, ["batch", "tokens", "columns"]),
        helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
        helper.make_tensor_value_info("cos", TensorProto.FLOAT, ["angles", "pairs"]),
        helper.make_tensor_value_info("sin", TensorProto.FLOAT, ["angles", "pairs"]),
    ]
    settings = {"epsilon": 0.0, "softcap": 0.0, "local_window_size": -1} if is_ours else {"do_rotary": 1}
    nodes, outputs = [], []
    for i in range(case.n_blocks):
        caches = [f"{i}.key", f"{i}.value"]
        past, present = [f"past.{name}" for name in caches], [f"present.{name}" for name in caches]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in past]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in present]
        outputs.append(helper.make_tensor_value_info(f"y.{i}", TensorProto.FLOAT, ["batch", "tokens", "mixed"]))
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["qkv", *([] if is_ours else ["", ""]), *past, "lengths", "total", "cos", "sin"],
                [f"y.{i}", *present],
                domain=domain,
                num_heads=case.n_heads,
                kv_num_heads=case.n_kv_heads,
                scale=case.head_dim**-0.5,
                **settings,
            )
        )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


_opened: list[_Attention] = []
"""The session of this process."""


def _open(case: AttentionCase, domain: str, threads: int) -> None:
    _opened.append(_Attention(case, domain, threads))


def _sample(n: int) -> list[int]:
    return _opened[0].sample(n)


def _output() -> Any:
    return _opened[0].output()


def measure_attention(case: AttentionCase, *, threads: int, rounds: int) -> dict[str, Any]:
    """Time both operators in turn, each in a process of its own.

    Returns:
        `ms` by operator, medians of a step of all blocks; `ratio`, the median over rounds of ONNX Runtime's time over
        ours; `difference`, the largest one between outputs; `samples_ns`.
    """
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, mp_context=context) for name in _OPERATORS}
    try:
        for name, domain in _OPERATORS.items():
            pools[name].submit(_open, case, domain, threads).result()
        # The first steps after the other one's turn find cold caches and sleeping threads.
        n_cold, n_samples = (4, 12) if case.n_tokens == 1 else (1, 3)
        found: dict[str, list[float]] = {name: [] for name in pools}
        for _ in range(rounds):
            for name, pool in pools.items():
                found[name].append(float(np.median(pool.submit(_sample, n_cold + n_samples).result()[n_cold:])))
        outputs = [pool.submit(_output).result() for pool in pools.values()]
    finally:
        for pool in pools.values():
            pool.shutdown()
    return {
        "batch": case.batch,
        "n_tokens": case.n_tokens,
        "n_past": case.n_past,
        "threads": threads,
        "ms": {name: float(np.median(ns)) / 1e6 for name, ns in found.items()},
        "ratio": float(np.median(np.divide(found["onnxruntime"], found["owl-deploy"]))),
        "difference": float(np.abs(outputs[0] - outputs[1]).max()),
        "samples_ns": found,
    }


@click.command()
@click.option("--blocks", default=30, show_default=True)
@click.option("--heads", default=9, show_default=True)
@click.option("--kv-heads", default=3, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--threads", default=0, help="Threads of both; 0 is what affinity and cgroup allow.")
@click.option("--rounds", default=9, show_default=True, help="Interleaved rounds; both are timed in each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, raw samples included.")
def main(blocks: int, heads: int, kv_heads: int, head_dim: int, threads: int, rounds: int, as_json: bool) -> None:
    """Time attention of decode and prefill in ONNX Runtime's operator and in ours. The shape is SmolLM2-135M's.

    Example: python -m owl_deploy.bench.attention --blocks 22 --heads 32 --kv-heads 4
    """
    if not 0 < kv_heads <= heads or heads % kv_heads or head_dim % 16:
        raise click.UsageError("--heads must be a multiple of --kv-heads, and --head-dim of 16")
    n_threads = threads or resolve_threads("auto").n
    steps = [(1, 1, 256), (1, 1, 1024), (4, 1, 256), (8, 1, 256), (8, 1, 1024), (1, 256, 0), (1, 1024, 0)]
    if not as_json:
        click.echo(f"{blocks} blocks of {heads} heads, {kv_heads} of keys, of {head_dim}; {n_threads} threads")
        click.echo(f"{'rows':>4} {'tokens':>6} {'past':>5} {'onnxruntime':>12} {'owl-deploy':>12} {'ratio':>7}")
    results = []
    for batch, n_tokens, n_past in steps:
        case = AttentionCase(batch, n_tokens, n_past, blocks, heads, kv_heads, head_dim)
        results.append(row := measure_attention(case, threads=n_threads, rounds=rounds))
        if not as_json:
            theirs, ours = row["ms"].values()
            click.echo(f"{batch:4} {n_tokens:6} {n_past:5} {theirs:9.2f} ms {ours:9.2f} ms {row['ratio']:6.2f}x")
    if as_json:
        click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
