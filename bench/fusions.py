"""Would ONNX Runtime's fusions of onnxscript make an exported graph as lean as the one that `export` writes?

    python -m owl_deploy.bench.fusions

In: a model. Out: how many nodes its graph has as optimum traces it, as torch.onnx exports it (with the attention of
scaled_dot_product_attention, and written out), after onnxscript's optimizer, after its `ort_fusions`, and written
directly; what was fused; and how long a decode step of the last graph of each route takes, in interleaved rounds.
Nothing is kept. It takes some minutes, and memory for the whole model several times.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported; on by default in 1.31

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn
from transformers import DynamicCache

from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.export.traced_graph import trace
from owl_deploy.export.writer import export_onnx
from owl_deploy.generation import load_torch_model
from owl_deploy.recipe import ExportSettings
from owl_deploy.threads import resolve_threads

__all__ = ["GraphSize", "decode_times", "graph_sizes"]

_PAST, _NEW, _BATCH = 5, 3, 2  # of the example that is exported; all three are free in the graph


@dataclass(frozen=True)
class GraphSize:
    """One route to a graph."""

    route: str
    n_nodes: int
    operators: dict[str, int]
    """Nodes by operator, most frequent first."""
    fused: dict[str, int]
    """What ort_fusions replaced, by its name for it; empty before that."""


class _Decoder(nn.Module):
    """A causal language model whose cache is plain tensors, as a graph has it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        cache = DynamicCache.from_legacy_cache(past)
        out = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache)
        return out.logits, out.past_key_values.to_legacy_cache()


def graph_sizes(checkpoint: Checkpoint, folder: Path) -> Iterator[GraphSize]:
    """Yield the size of the graph of every route, each step of it by itself.

    Args:
        checkpoint: any that optimum and torch.onnx can export.
        folder: the last graph of each route is written to, in a folder of its own, as model.onnx.

    Raises:
        UnsupportedModelError: optimum cannot export the model.
    """
    (folder / "traced").mkdir()
    yield from _steps("optimum", ir.load(trace(checkpoint, folder / "traced")), folder / "optimum")
    for attention in ("sdpa", "eager"):
        yield from _steps(f"torch.onnx, {attention}", _exported(checkpoint, attention), folder / f"torch-{attention}")
    artifact = export_onnx(str(checkpoint.path), ExportSettings(), out=folder / "lean", parity=False)
    lean = ir.from_proto(onnx.load(artifact.path / "model.onnx", load_external_data=False))
    yield _size("written directly", lean)


def _steps(route: str, model: ir.Model, folder: Path) -> Iterator[GraphSize]:
    from onnxscript import optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    yield _size(route, model)
    optimizer.optimize(model, onnx_shape_inference=True)
    yield _size(f"{route}, optimizer", model)
    model, fused = optimize_for_ort(model)
    yield _size(f"{route}, ort_fusions", model, {name: count for name, count in fused.items() if count})
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")


def _exported(checkpoint: Checkpoint, attention: str) -> ir.Model:
    """Let torch.onnx export the model with lengths and batch left free."""
    model = load_torch_model(checkpoint)
    model.set_attn_implementation(attention)
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (_BATCH, config.num_key_value_heads, _PAST, head_size)
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    free = torch.export.Dim.AUTO
    positions = torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1)
    ones: Callable[[int], torch.Tensor] = lambda length: torch.ones(_BATCH, length, dtype=torch.int64)  # noqa: E731
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Decoder(model),
            (ones(_NEW), ones(_PAST + _NEW), positions, past),
            dynamo=True,
            dynamic_shapes=({0: free, 1: free},) * 3 + ([({0: free, 2: free},) * 2] * len(past),),
            optimize=False,
        )
    assert program is not None
    return program.model


def _size(route: str, model: ir.Model, fused: dict[str, int] | None = None) -> GraphSize:
    operators = Counter(node.op_type for node in model.graph)
    return GraphSize(route, operators.total(), dict(operators.most_common()), fused or {})


def decode_times(graphs: dict[str, Path], *, past_len: int, rounds: int, threads: int) -> dict[str, float]:
    """Return the median milliseconds of a decode step per graph: past in, present out, as every graph can.

    Args:
        graphs: name -> model.onnx.
        past_len: positions in the cache.
        rounds: in each, every graph makes five steps.
        threads: of ONNX Runtime.
    """
    steps = {name: _step(path, past_len, threads) for name, path in graphs.items()}
    ns: dict[str, list[int]] = {name: [] for name in graphs}
    for index in range(rounds + 1):
        for name, step in steps.items():
            for _ in range(5):
                started = time.perf_counter_ns()
                step()
                if index:  # the first round warms up
                    ns[name].append(time.perf_counter_ns() - started)
    return {name: float(np.median(found)) / 1e6 for name, found in ns.items()}


def _step(path: Path, past_len: int, threads: int) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if len(entry.shape) == 4:
            feeds[entry.name] = np.zeros((1, entry.shape[1], past_len, entry.shape[3]), np.float32)
        elif entry.name == "attention_mask":
            feeds[entry.name] = np.ones((1, past_len + 1), np.int64)
        else:
            feeds[entry.name] = np.full((1, 1), past_len if entry.name == "position_ids" else 1, np.int64)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    outputs = [entry.name for entry in session.get_outputs()]
    return lambda: session.run_with_ort_values(outputs, values)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", default="demo:smollm2-135m", help="What is exported.")
@click.option("--past-len", default=256, help="Tokens of context of the steps that are timed.")
@click.option("--rounds", default=12, help="Interleaved rounds of five steps; the first one does not count.")
def main(model: str, past_len: int, rounds: int) -> None:
    """Print one line per step of every route, then the times."""
    with tempfile.TemporaryDirectory() as folder:
        for size in graph_sizes(open_checkpoint(model), Path(folder)):
            frequent = ", ".join(f"{count} {name}" for name, count in list(size.operators.items())[:4])
            fused = "; fused: " + (", ".join(f"{n} {name}" for name, n in size.fused.items()) or "nothing")
            click.echo(f"{size.n_nodes:6} nodes  {size.route}: {frequent}{fused if 'fusions' in size.route else ''}")
        graphs = {name: Path(folder) / name / "model.onnx" for name in ("optimum", "torch-sdpa", "torch-eager", "lean")}
        threads = resolve_threads("auto").n
        for name, ms in decode_times(graphs, past_len=past_len, rounds=rounds, threads=threads).items():
            click.echo(f"{ms:8.2f} ms per decode step at {past_len} tokens, {threads} threads: {name}")


if __name__ == "__main__":
    main()
