"""Checkpoints of random weights: that they are what their shape says, and that the rest of the project takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from owl_deploy.bench.random_checkpoint import SHAPES, LlamaShape, write_random_llama
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.skeleton import open_skeleton

SMALL = LlamaShape(n_blocks=2, hidden=64, neurons=96, n_heads=4, n_kv_heads=2, vocab=300, max_positions=64)


def test_model_of_the_shape_loads_whole_and_is_finite(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model", SMALL)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_key_value_heads == 2
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(32)[None]).logits).all()


def test_zeros_are_in_the_linears_of_the_blocks_alone(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model", SMALL, sparsity=0.7)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    skeleton = open_skeleton(checkpoint)
    for index in range(2):
        for name in skeleton.linears(index):
            assert (checkpoint.read(f"{name}.weight") == 0).float().mean() == pytest.approx(0.7, abs=0.05)
    assert (checkpoint.read("lm_head.weight") != 0).float().mean() > 0.99


@pytest.mark.parametrize(("name", "n_billions"), [("llama-7b", 6.738), ("tinyllama", 1.100)])
def test_shapes_have_the_parameters_of_their_models(name: str, n_billions: float) -> None:
    shape = SHAPES[name]
    keys = shape.hidden // shape.n_heads * shape.n_kv_heads
    block = 2 * shape.hidden * (shape.hidden + keys) + 3 * shape.hidden * shape.neurons + 2 * shape.hidden
    n_weights = shape.n_blocks * block + (2 * shape.vocab + 1) * shape.hidden
    assert n_weights / 1e9 == pytest.approx(n_billions, abs=0.001)
