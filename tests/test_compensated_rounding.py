"""Rounding that makes up for its errors: against a slow float64 sweep, and on a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from numpy.typing import NDArray
from pydantic import ValidationError
from random_models import random_model, save
from test_onnxruntime_graph import random_tokens, relative_difference, torch_logits
from test_sparse_operator_export import initializers, plain_logits

from owl_deploy.calibration import Calibration
from owl_deploy.export.compensated_rounding import round_and_compensate
from owl_deploy.export.packing import PackedHeader
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix, quantize_int4, quantize_int8
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import ExportSettings
from owl_deploy.statistics import Hessian

Array = NDArray[np.float32]
CODES = ["int8", "int4", "int4 with zeros"]
N_COLUMNS = 200  # more than one span of the sweep, and no multiple of a group


def pruned_weight(seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((9, N_COLUMNS)).astype(np.float32)
    weight[generator.random(weight.shape) < 0.6] = 0
    return weight


def correlated_inputs(seed: int = 0) -> Array:
    """Return (tokens, columns) of which some columns are large and all share a few directions."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((600, 12)) @ generator.standard_normal((12, N_COLUMNS))
    inputs = shared + 0.3 * generator.standard_normal((600, N_COLUMNS))
    return (inputs * 10.0 ** generator.uniform(-1, 1, N_COLUMNS)).astype(np.float32)


def hessian_of(inputs: Array) -> Hessian:
    hessian = Hessian(inputs.shape[1])
    hessian.update(torch.from_numpy(inputs))
    return hessian


def nearest(weight: Array, codes: str) -> Any:
    return quantize_int8(weight) if codes == "int8" else quantize_int4(weight, stores_zeros=codes != "int4")


def slow_sweep(start: Int8Matrix | Int4Matrix, weight: Array, hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round column by column; the inverse of what is left of the Hessian is computed anew for each."""
    scales = np.broadcast_to(start.column_scales(), weight.shape).astype(np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    left = list(np.argsort(-np.diag(hessian), kind="stable"))
    swept, found = weight.astype(np.float64), np.zeros(weight.shape)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        for row in range(len(weight)):
            if weight[row, column]:
                distances = np.abs(swept[row, column] / scales[row, column] - start.levels)
                found[row, column] = start.levels[distances.argmin()] * scales[row, column]
        error = swept[:, column] - found[:, column]
        swept[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        left = left[1:]
    return found


@pytest.mark.parametrize("codes", CODES)
def test_values_are_those_of_a_slow_sweep_in_float64(codes: str) -> None:
    weight, inputs = pruned_weight(), correlated_inputs()
    start = nearest(weight, codes)
    found = round_and_compensate(start, torch.from_numpy(weight), hessian_of(inputs)).dequantized()
    expected = slow_sweep(start, weight, 2 * inputs.astype(np.float64).T @ inputs)
    is_same = np.isclose(found, expected, rtol=1e-4, atol=1e-7)
    assert is_same.mean() > 0.999  # a value halfway between two may go either way


@pytest.mark.parametrize("codes", CODES)
def test_zeros_stay_and_kept_weights_lie_on_the_grid_of_the_start(codes: str) -> None:
    weight = pruned_weight(1)
    start = nearest(weight, codes)
    found = round_and_compensate(start, torch.from_numpy(weight), hessian_of(correlated_inputs(1)))
    assert type(found) is type(start)
    np.testing.assert_array_equal(found.column_scales(), start.column_scales())
    np.testing.assert_array_equal(found.levels, start.levels)
    assert (found.dequantized()[weight == 0] == 0).all()
    assert (found.dequantized() != start.dequantized()).any()


@pytest.mark.parametrize("codes", CODES)
def test_products_are_nearer_than_those_of_weights_rounded_to_nearest(codes: str) -> None:
    weight, inputs = pruned_weight(2), correlated_inputs(2)
    start = nearest(weight, codes)
    found = round_and_compensate(start, torch.from_numpy(weight), hessian_of(inputs))

    def error(rounded: Array) -> float:
        return float(np.square(inputs.astype(np.float64) @ (rounded - weight).T.astype(np.float64)).sum())

    assert error(found.dequantized()) < 0.3 * error(start.dequantized())


@pytest.mark.parametrize("codes", CODES)
def test_inputs_that_have_nothing_in_common_leave_rounding_to_nearest(codes: str) -> None:
    weight = pruned_weight(3)
    hessian = Hessian(N_COLUMNS)
    hessian.matrix = torch.diag(torch.linspace(0.5, 2, N_COLUMNS))
    start = nearest(weight, codes)
    found = round_and_compensate(start, torch.from_numpy(weight), hessian).dequantized()
    steps = np.diff(start.levels).max() * start.column_scales()
    off = np.abs(found - weight) - np.abs(start.dequantized() - weight)
    assert (off <= 1e-3 * np.broadcast_to(steps, off.shape)).all()


def export(folder: Path, out: Path, **settings: Any) -> Any:
    asked = ExportSettings(weights="sparse-operator", max_positions=64, calibration="python-docs", **settings)
    return export_onnx(str(folder), asked, out=out, parity=False)


@pytest.mark.parametrize(
    ("family", "precision"), [("llama", "int4"), ("llama", "int8"), ("phi3", "int4"), ("qwen2", "int4")]
)
def test_artifact_is_nearer_to_its_checkpoint(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tokens it was calibrated on: there is no other text that a random model has in common with them."""
    model, tokens = random_model(family, sparsity=0.6), random_tokens(48)
    calibration = Calibration(tokens[None], source="test", seed=0, bos="never", starts_with_bos=False)
    monkeypatch.setattr("owl_deploy.export.writer.calibration_tokens", lambda *_, **__: calibration)
    folder = save(model, tmp_path / "model")
    expected = torch_logits(model, tokens)
    differences = []
    for rounding in ("nearest", "gptq"):
        artifact = export(folder, tmp_path / rounding, precision=precision, rounding=rounding)
        differences.append(relative_difference(plain_logits(artifact, tokens), expected))
    assert differences[1] < differences[0]


def test_matrices_of_the_blocks_are_compensated_and_the_head_is_not(tmp_path: Path) -> None:
    folder = save(random_model("llama", sparsity=0.6, tie_word_embeddings=False), tmp_path / "model")
    plain = initializers(export(folder, tmp_path / "nearest", precision="int4"))
    found = initializers(export(folder, tmp_path / "gptq", precision="int4", rounding="gptq", n_samples=8, seq_len=32))
    packed = [name for name in found if name.endswith(".packed")]
    assert len(packed) > 4
    for name in packed:
        is_same = np.array_equal(plain[name], found[name])
        assert is_same == (".layers." not in name), name
        if not is_same:
            assert PackedHeader.from_bytes(plain[name].tobytes()) == PackedHeader.from_bytes(found[name].tobytes())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "dense", "precision": "int8"}, "rounding gptq needs weights sparse-operator of precision int8 or"),
        ({"weights": "sparse-operator", "precision": "fp16"}, "rounding gptq needs weights sparse-operator of preci"),
    ],
)
def test_rounding_is_refused_where_nothing_is_rounded_by_us(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportSettings(rounding="gptq", **settings)


def test_calibration_is_refused_where_nothing_is_calibrated() -> None:
    with pytest.raises(
        ValidationError, match="n_samples 4 needs rounding gptq, or target deepsparse of precision int8"
    ):
        ExportSettings(weights="sparse-operator", precision="int4", n_samples=4)


def test_family_that_is_traced_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(random_model("gpt2"), tmp_path / "model")
    options = ["--weights", "sparse-operator", "--precision", "int4", "--rounding", "gptq"]
    result = call("export", str(folder), *options, "--out", str(tmp_path / "out"))
    assert result.code == 1
    assert "rounding gptq is for" in result.stderr
    assert "'gpt2'" in result.stderr
    assert not (tmp_path / "out").exists()
