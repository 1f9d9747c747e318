"""Quantised weights: how far they may move, what stays zero, and that a learned codebook is worth it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.export.quantization import Int4Matrix, Int8Matrix, quantize_int4, quantize_int8

Array = NDArray[np.float32]
GROUPS = [0, 64, 128]


def pruned_gaussian(shape: tuple[int, int], sparsity: float, *, seed: int = 0) -> Array:
    """Return gaussian weights whose smallest are zero, rows of very different size, the last one empty."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal(shape)
    weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
    weight *= 10.0 ** generator.uniform(-6, 3, (shape[0], 1))
    if shape[0] > 1:
        weight[-1] = 0
    return weight.astype(np.float32)


matrices = st.builds(
    pruned_gaussian,
    st.tuples(st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from([0.0, 0.5, 0.98]),
    seed=st.integers(0, 1000),
)


def columns_of(scales: NDArray[np.uint8] | None, group: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the group scale of every weight, 1 without groups."""
    if scales is None:
        return np.ones(shape)
    return np.array([[row[column // group] for column in range(shape[1])] for row in scales], np.float64)


def squared_error(found: Array, weight: Array) -> float:
    return float(((found.astype(np.float64) - weight) ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(GROUPS))
def test_int8_weight_moves_by_at_most_half_a_step(weight: Array, group: int) -> None:
    quantized = quantize_int8(weight, group)
    steps = quantized.row_scales[:, None] * columns_of(quantized.group_scales, group, weight.shape)
    slack = np.abs(weight) * 1e-6  # the scale, the quotient and the product are rounded to float32
    assert (np.abs(quantized.dequantized().astype(np.float64) - weight) <= steps / 2 + slack).all()


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(GROUPS))
def test_zeros_of_int8_stay_zero(weight: Array, group: int) -> None:
    assert (quantize_int8(weight, group).dequantized()[weight == 0] == 0).all()


def test_int8_row_scale_is_its_largest_weight_over_127() -> None:
    quantized = quantize_int8(np.array([[1, -254, 3], [0, 0, 0]], np.float32))
    assert quantized.row_scales.tolist() == [2, 1]
    assert quantized.values.tolist() == [[0, -127, 2], [0, 0, 0]]
    assert quantized.group_scales is None


def test_int8_group_with_the_largest_weight_has_scale_255() -> None:
    weight = np.zeros((1, 130), np.float32)
    weight[0, [3, 70]] = [127 * 255, 127 * 10]
    quantized = quantize_int8(weight, 64)
    assert quantized.group_scales is not None
    assert quantized.group_scales.tolist() == [[255, 10, 1]]
    assert quantized.row_scales.tolist() == [1]
    np.testing.assert_array_equal(quantized.dequantized(), weight)


def test_int8_groups_lower_the_error_of_uneven_rows() -> None:
    weight = pruned_gaussian((8, 256), 0.5)
    weight[:, :64] *= 50
    with_groups, without = (quantize_int8(weight, group).dequantized() for group in (64, 0))
    assert squared_error(with_groups[:, 64:], weight[:, 64:]) < 0.1 * squared_error(without[:, 64:], weight[:, 64:])


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(GROUPS), st.booleans())
def test_zeros_of_int4_stay_zero(weight: Array, group: int, stores_zeros: bool) -> None:
    quantized = quantize_int4(weight, group, stores_zeros=stores_zeros)
    assert (quantized.dequantized()[weight == 0] == 0).all()
    assert (quantized.mask is None) == stores_zeros


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(GROUPS), st.booleans())
def test_int4_code_is_the_nearest_entry(weight: Array, group: int, stores_zeros: bool) -> None:
    quantized = quantize_int4(weight, group, stores_zeros=stores_zeros)
    scales = quantized.row_scales[:, None] * columns_of(quantized.group_scales, group, weight.shape)
    distances = np.abs(weight[:, :, None] / scales[:, :, None] - quantized.codebook.astype(np.float64))
    chosen = np.take_along_axis(distances, quantized.codes[:, :, None].astype(np.intp), 2)[:, :, 0]
    assert (chosen <= distances.min(axis=2) + 1e-4)[np.broadcast_to(stores_zeros, weight.shape) | (weight != 0)].all()


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([64, 128]), st.booleans())
def test_int4_parts_are_within_their_ranges(weight: Array, group: int, stores_zeros: bool) -> None:
    quantized = quantize_int4(weight, group, stores_zeros=stores_zeros)
    assert quantized.codes.max() < 16
    assert quantized.codebook.shape == (16,)
    assert quantized.codebook.min() >= -127
    assert (np.diff(quantized.codebook.astype(int)) >= 0).all()
    assert quantized.group_scales is not None
    assert quantized.group_scales.min() >= 1
    assert np.isfinite(quantized.row_scales).all()


@pytest.mark.parametrize("seed", range(3))
def test_learned_codebook_beats_a_uniform_grid(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((64, 512)).astype(np.float32)
    weight[np.abs(weight) < np.median(np.abs(weight))] = 0
    blocks = weight.reshape(64, 8, 64)
    maxima = np.abs(blocks).max(axis=2, keepdims=True)
    learned = squared_error(quantize_int4(weight).dequantized(), weight)
    for grid in (np.arange(-7, 8) / 7, (np.arange(16) - 7.5) / 7.5):
        nearest = grid[np.abs((blocks / maxima)[..., None] - grid).argmin(-1)]
        uniform = squared_error((nearest * maxima * (blocks != 0)).reshape(weight.shape).astype(np.float32), weight)
        assert learned < 0.6 * uniform


def test_zeros_cost_int4_a_code_only_where_they_are_stored() -> None:
    weight = pruned_gaussian((32, 256), 0.5)
    stored, left_out = (quantize_int4(weight, stores_zeros=flag) for flag in (True, False))
    assert 0 in stored.codebook
    assert np.abs(left_out.codebook).min() > 10
    assert squared_error(left_out.dequantized(), weight) < squared_error(stored.dequantized(), weight)


def test_int4_of_sixteen_values_is_nearly_exact() -> None:
    levels = np.array([-127, -101, -80, -66, -50, -33, -21, -8, 5, 17, 30, 45, 62, 80, 99, 127], np.float32)
    weight = np.random.default_rng(0).permuted(np.tile(levels, (8, 4)), axis=1)
    quantized = quantize_int4(weight, 0)
    assert quantized.codebook.tolist() == levels.tolist()
    np.testing.assert_allclose(quantized.dequantized(), weight, rtol=1e-6)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_extreme_matrices_raise_no_warning_and_move_little(
    quantize: Callable[[Array, int], Int8Matrix | Int4Matrix], group: int, size: float
) -> None:
    weight = np.full((3, 70), size, np.float32)
    weight[1] = 0
    weight[2, 5:] *= -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantize(weight, group).dequantized()
    assert (found[1] == 0).all()
    np.testing.assert_allclose(found, weight, rtol=0.01, atol=1e-35)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = np.ones((2, 3), np.float32)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="must be finite"):
        quantize_int8(weight)
    with pytest.raises(ValueError, match="must be finite"):
        quantize_int4(weight)


def wanda_pruned(norms: NDArray[np.float64], sparsity: float, *, n_rows: int = 200) -> Array:
    """Return gaussian weights, of each row the largest by weight times the norm of its input."""
    weight = np.random.default_rng(0).standard_normal((n_rows, len(norms)))
    scores = np.abs(weight) * norms
    weight[scores < np.quantile(scores, sparsity, axis=1, keepdims=True)] = 0
    return weight.astype(np.float32)


@pytest.mark.parametrize("stores_zeros", [True, False])
def test_columns_that_pruning_spared_are_quantised_more_finely(stores_zeros: bool) -> None:
    norms = np.ones(256)
    norms[[30, 200]] = 50  # as in down_proj of the block that makes the massive activations
    weight = wanda_pruned(norms, 0.6)
    found = quantize_int4(weight, stores_zeros=stores_zeros).dequantized()
    by_column = np.linalg.norm(found - weight, axis=0) / np.linalg.norm(weight, axis=0)
    assert by_column[[30, 200]].max() < 0.09
    alike = wanda_pruned(np.ones(256), 0.6)
    assert squared_error(found, weight) < 4 * squared_error(quantize_int4(alike).dequantized(), alike)


def test_columns_count_alike_where_nothing_was_pruned() -> None:
    weight = np.random.default_rng(0).standard_normal((400, 128)).astype(np.float32)
    by_column = np.linalg.norm(quantize_int4(weight).dequantized() - weight, axis=0)
    weight[::50, ::3] = 0  # zeros of the model itself
    with_zeros = quantize_int4(weight, stores_zeros=True).dequantized()
    found = np.linalg.norm(with_zeros - weight, axis=0)
    assert by_column.std() < 0.1 * by_column.mean()
    assert found.std() < 0.1 * found.mean()


def test_rows_beyond_one_chunk_are_quantised_alike() -> None:
    few = pruned_gaussian((40, 64), 0.5)
    many = np.tile(few, (100, 1))
    assert many.size > 1 << 17
    np.testing.assert_array_equal(quantize_int8(many).values, np.tile(quantize_int8(few).values, (100, 1)))
    np.testing.assert_array_equal(
        quantize_int4(many).dequantized(), np.tile(quantize_int4(few).dequantized(), (100, 1))
    )


def test_learned_entries_are_the_means_of_what_they_code() -> None:
    weight = np.random.default_rng(0).laplace(size=(1, 20000)).astype(np.float32)
    quantized = quantize_int4(weight, 0)
    entries = quantized.codebook * quantized.row_scales[0]
    means = [weight[quantized.codes == code].mean() for code in range(16)]
    np.testing.assert_allclose(entries, means, rtol=0, atol=2 * quantized.row_scales[0])


def test_rows_with_larger_weights_shape_the_codebook_more() -> None:
    levels = np.array([-127, -101, -80, -66, -50, -33, -21, -8, 5, 17, 30, 45, 62, 80, 99, 127], np.float32)
    generator = np.random.default_rng(0)
    large = generator.permuted(np.tile(levels, (8, 4)), axis=1)
    small = generator.uniform(-0.01, 0.01, (32, 64)).astype(np.float32)
    found = quantize_int4(np.concatenate([large, small])).dequantized()
    np.testing.assert_allclose(found[:8], large, rtol=0, atol=0.5)
