"""Dense int8 and int4 by ONNX Runtime's MatMulNBits: codes, graphs and artifacts, against numpy and torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from random_models import random_model, save
from test_onnxruntime_graph import random_tokens, torch_logits

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines.process import open_engine
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.nbits_initializers import nbits_bytes, quantize_nbits
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings


def weight(n_rows: int, n_columns: int, *, shift: float = 0.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n_rows, n_columns)) + shift
    return (values * (rng.random(values.shape) < 0.5)).astype(np.float32)


def unpacked(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Return codes of the last axis one by one, low bits first."""
    if bits == 8:
        return codes.astype(np.int64)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1).astype(np.int64)


def dequantized(values: NDArray[np.float32], bits: int, *, is_symmetric: bool = True) -> NDArray[np.float64]:
    codes, scales, zero_points = quantize_nbits(values, bits, is_symmetric=is_symmetric)
    n_rows, n_blocks = scales.shape
    zeros = np.full((n_rows, n_blocks), 1 << (bits - 1))
    if not is_symmetric:
        zeros = unpacked(zero_points, bits)[:, :n_blocks]
    blocks = (unpacked(codes, bits) - zeros[:, :, None]) * scales[:, :, None].astype(np.float64)
    found: NDArray[np.float64] = blocks.reshape(n_rows, -1)[:, : values.shape[1]]
    return found


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("bits", "n_columns"), [(8, 96), (4, 96), (8, 70), (4, 70)])
def test_no_weight_is_further_off_than_a_step_and_zeros_stay(bits: int, n_columns: int, is_symmetric: bool) -> None:
    values = weight(7, n_columns, shift=0.0 if is_symmetric else 1.0)
    found = dequantized(values, bits, is_symmetric=is_symmetric)
    for first in range(0, n_columns, 32):
        block = values[:, first : first + 32]
        if is_symmetric:
            step = np.abs(block).max(axis=1) / (1 << (bits - 1))
        else:
            step = (block.max(axis=1, initial=0) - block.min(axis=1, initial=0)) / ((1 << bits) - 1)
        # Half a step; the zero point is rounded too, and the largest code of the other sign is missing.
        assert (np.abs(found[:, first : first + 32] - block) <= 1.01 * step[:, None]).all()
    assert (found[values == 0] == 0).all()


def test_asymmetric_codes_are_closer_where_a_block_has_one_sign() -> None:
    values = np.abs(weight(16, 64)).astype(np.float32)
    errors = [np.abs(dequantized(values, 4, is_symmetric=kind) - values).mean() for kind in (True, False)]
    assert errors[1] < 0.7 * errors[0]


def export(model: Any, folder: Path, **settings: Any) -> OnnxArtifact:
    source = save(model, folder / "model")
    chosen = ExportSettings(weights="dense", max_positions=64, **settings)
    return export_onnx(str(source), chosen, out=folder / "artifact", parity=False)


def forward(artifact: OnnxArtifact, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with open_engine(artifact, threads=1, n_tokens=len(tokens), capacity=len(tokens)) as engine:
        return engine.forward(tokens, 0)


def rounded_(model: Any, bits: int, *, head_bits: int | None, is_symmetric: bool = True) -> Any:
    """Replace the weights of a model by what their codes mean."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_in_block = ".layers." in name
            chosen = bits if is_in_block else head_bits
            if parameter.ndim == 2 and chosen is not None:
                found = dequantized(parameter.numpy(), chosen, is_symmetric=is_symmetric)
                parameter.copy_(torch.from_numpy(found.astype(np.float32)))
    return model


SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("family", "changes", "settings", "bits", "head_bits"),
    [
        ("llama", {"tie_word_embeddings": True}, {"precision": "int8"}, 8, 8),
        ("llama", {"tie_word_embeddings": True}, {"precision": "int4"}, 4, 8),
        ("llama", {"tie_word_embeddings": False}, {"precision": "int4", "head_precision": "int4"}, 4, 4),
        ("llama", {"tie_word_embeddings": True}, {"precision": "int4", "head_precision": "fp32"}, 4, None),
        ("qwen2", {"tie_word_embeddings": True}, {"precision": "int4", "symmetric": False}, 4, 8),
        ("mistral", {"tie_word_embeddings": False}, {"precision": "int8", "symmetric": False}, 8, 8),
    ],
)
def test_logits_are_those_of_the_rounded_weights(
    family: str, changes: dict[str, Any], settings: dict[str, Any], bits: int, head_bits: int | None, tmp_path: Path
) -> None:
    """With accuracy level 1 products are those of float32."""
    artifact = export(random_model(family, **SIZES, **changes), tmp_path, accuracy_level=1, **settings)
    is_symmetric = settings.get("symmetric", True)
    model = rounded_(random_model(family, **SIZES, **changes), bits, head_bits=head_bits, is_symmetric=is_symmetric)
    tokens = random_tokens(24)
    expected = torch_logits(model, tokens)
    assert np.abs(forward(artifact, tokens) - expected).max() < 2e-4 * np.abs(expected).max()


def test_inputs_in_int8_come_near(tmp_path: Path) -> None:
    artifact = export(random_model("llama", **SIZES), tmp_path, precision="int8")
    tokens = random_tokens(24)
    expected = torch_logits(random_model("llama", **SIZES), tokens)
    assert np.abs(forward(artifact, tokens) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tied_matrix_lies_in_the_file_once(precision: str, tmp_path: Path) -> None:
    artifact = export(random_model("llama", **SIZES, tie_word_embeddings=True), tmp_path, precision=precision)
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    rows, codes = (places[f"model.embed_tokens.weight.{part}"] for part in ("rows", "codes"))
    assert (rows["offset"], rows["length"]) == (codes["offset"], codes["length"])


def test_manifest_lists_the_matrices_with_their_bytes(tmp_path: Path) -> None:
    artifact = export(random_model("llama", **SIZES, num_hidden_layers=1), tmp_path, precision="int4", symmetric=False)
    matrices = {matrix["name"]: matrix for matrix in artifact.manifest["matrices"]}
    down = matrices["model.layers.0.mlp.down_proj.weight.codes"]
    assert (down["encoding"], down["precision"], down["shape"]) == ("nbits4", "int4", [64, 96])
    # 3 blocks of 16 bytes and a scale, and two bytes of zero points a row.
    assert down["bytes"] == down["predicted_bytes"] == nbits_bytes((64, 96), 4, is_symmetric=False) == 64 * (60 + 2)
    step = artifact.manifest["bytes_per_decode_step"]
    assert step["stored"] == sum(matrix["bytes"] for matrix in matrices.values())


def test_quantised_embedding_of_broken_blocks_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    with pytest.raises(UnsupportedModelError, match=r"hidden size 48: .* a multiple of 32: export with head precision"):
        export(model, tmp_path, precision="int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8", "head_precision": "fp16"}, "head precision fp16 needs weights sparse-operator"),
        ({"accuracy_level": 1}, "accuracy_level 1 needs weights dense of precision int8 or int4"),
        ({"weights": "sparse-operator", "symmetric": False}, "symmetric False needs weights dense"),
        ({"weights": "sparse-operator", "head_precision": "int4"}, "head precision int4 needs weights dense"),
        ({"precision": "int4", "encoding": "dense"}, "encoding dense needs weights sparse-operator"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportSettings(**settings)


def test_checkpoint_is_what_the_parity_gate_compares_with(tmp_path: Path) -> None:
    source = save(random_model("llama", **SIZES), tmp_path / "model")
    settings = ExportSettings(weights="dense", precision="int8", max_positions=64)
    artifact = export_onnx(str(source), settings, out=tmp_path / "artifact")
    assert artifact.manifest["parity"]["passed"]
    assert artifact.manifest["checkpoint_sha256"] == open_checkpoint(str(source)).fingerprint
