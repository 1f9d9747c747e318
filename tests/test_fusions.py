"""What the comparison of routes to a graph counts and times, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from random_models import random_model, save

from owl_deploy.bench.fusions import GraphSize, decode_times, graph_sizes
from owl_deploy.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def sizes(folder: Path) -> dict[str, GraphSize]:
    model = save(random_model("llama"), folder / "model")
    return {size.route: size for size in graph_sizes(open_checkpoint(str(model)), folder)}


def test_every_route_gets_smaller_and_the_direct_one_is_the_smallest(sizes: dict[str, GraphSize]) -> None:
    for route in ("optimum", "torch.onnx, sdpa", "torch.onnx, eager"):
        counts = [sizes[name].n_nodes for name in (route, f"{route}, optimizer", f"{route}, ort_fusions")]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] > sizes["written directly"].n_nodes
        assert sum(sizes[route].operators.values()) == counts[0]


def test_attention_written_out_is_fused_in_every_block(sizes: dict[str, GraphSize]) -> None:
    assert sizes["torch.onnx, eager, ort_fusions"].operators["GroupQueryAttention"] == 2
    assert sizes["torch.onnx, eager, ort_fusions"].fused["gqa"] == 2
    assert sizes["torch.onnx, eager"].fused == {}


def test_the_graphs_that_are_timed_say_the_same(sizes: dict[str, GraphSize], folder: Path) -> None:
    logits = []
    for name in ("torch-eager", "lean"):
        session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
        feeds = {}
        for entry in session.get_inputs():
            if len(entry.shape) == 4:
                feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            elif entry.name == "position_ids":
                feeds[entry.name] = np.arange(4)[None]
            else:
                feeds[entry.name] = np.ones((1, 4), np.int64)
        logits.append(session.run(["logits"] if name == "lean" else None, feeds)[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert sizes["written directly"].n_nodes > 0


def test_every_graph_is_timed(sizes: dict[str, GraphSize], folder: Path) -> None:
    graphs = {name: folder / name / "model.onnx" for name in ("optimum", "torch-sdpa", "torch-eager", "lean")}
    times = decode_times(graphs, past_len=4, rounds=1, threads=1)
    assert list(times) == list(graphs)
    assert all(ms > 0 for ms in times.values())
    assert sizes
