"""Weights in eight and four bits: small integers, and the scales that turn them back into weights.

In: a matrix of float32 weights whose zeros are pruned. Out: its quantised parts, which
`kernels/FORMAT.md` says how to read. Bytes and encodings are the business of `packing`.

No activations are known here. The error that is made small is that of the weights; in four bits the
columns that pruning spared count more, see `_column_importances`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Int4Matrix", "Int8Matrix", "quantize_int4", "quantize_int8"]

_LARGEST = 127  # of an int8 value and of a codebook entry: -128 has no counterpart
_LARGEST_GROUP_SCALE = 255
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # a scale below it would be zero where subnormal numbers are flushed
_N_CODES = 16
_HALF_BINS = 2048  # of the histogram, each side of zero: 16 bins for each step of a codebook entry
_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)  # tried on each group's scale; the first wins a tie
# Elements of rows that are worked on at once. int4 of 10000 x 576 takes 0.22 s of one AVX-512 core so, 0.33 s with
# 2^13, 0.42 s with 2^22.
_CHUNK_ELEMENTS = 1 << 17
# Least threshold that `_column_importances` tells apart, as a share of its row's mean weight: the KL of SmolLM2-135M,
# 60 % pruned, is 0.12 nats with 0.003 and with 0.01, 0.16 with 0.03. In few rows it is larger, so that a few weights of
# a column would lie below it by chance.
_LEAST_THRESHOLD = 0.01
_CHANCE_WEIGHTS = 6


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in eight bits: weight = row scale x group scale x value."""

    values: NDArray[np.int8]
    """(N, K), -127 to 127."""
    row_scales: NDArray[np.float32]
    """(N,)."""
    group_scales: NDArray[np.uint8] | None
    """(N, ceil(K / group)), at least 1; None where `group` is 0."""
    group: int
    """Columns that share a group scale; 0: all of a row."""

    @property
    def levels(self) -> NDArray[np.float32]:
        """What a weight over its scale may be, (255,), ascending."""
        return np.arange(-_LARGEST, _LARGEST + 1, dtype=np.float32)

    def column_scales(self) -> NDArray[np.float32]:
        """Return the scale of every weight, (N, K), or (N, 1) without groups."""
        return _by_column(_scales(self.row_scales, self.group_scales), self.group, self.values.shape[1])

    def with_levels(self, positions: NDArray[np.uint8]) -> Int8Matrix:
        """Return the matrix with other values: positions (N, K) in `levels`."""
        return replace(self, values=(positions.astype(np.int16) - _LARGEST).astype(np.int8))

    def dequantized(self) -> NDArray[np.float32]:
        """Return the weights that a reader computes, (N, K)."""
        return self.column_scales() * self.values.astype(np.float32)


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix in four bits: weight = row scale x group scale x codebook entry, zero where it is not stored."""

    codes: NDArray[np.uint8]
    """(N, K), 0 to 15; without meaning where the mask is False."""
    codebook: NDArray[np.int8]
    """(16,), ascending, -127 to 127."""
    row_scales: NDArray[np.float32]
    """(N,)."""
    group_scales: NDArray[np.uint8] | None
    """(N, ceil(K / group)), at least 1; None where `group` is 0."""
    group: int
    """Columns that share a group scale; 0: all of a row."""
    mask: NDArray[np.bool_] | None
    """(N, K), True where a weight is stored; None where all are."""

    @property
    def levels(self) -> NDArray[np.float32]:
        """What a weight over its scale may be, (16,), ascending."""
        return self.codebook.astype(np.float32)

    def column_scales(self) -> NDArray[np.float32]:
        """Return the scale of every weight, (N, K), or (N, 1) without groups."""
        return _by_column(_scales(self.row_scales, self.group_scales), self.group, self.codes.shape[1])

    def with_levels(self, positions: NDArray[np.uint8]) -> Int4Matrix:
        """Return the matrix with other values: positions (N, K) in `levels`."""
        return replace(self, codes=positions)

    def dequantized(self) -> NDArray[np.float32]:
        """Return the weights that a reader computes, (N, K)."""
        weight = self.column_scales() * self.levels[self.codes]
        if self.mask is not None:
            weight[~self.mask] = 0
        return weight


def quantize_int8(weight: NDArray[np.float32], group: int = 0) -> Int8Matrix:
    """Round weights to the nearest of 255 evenly spaced values.

    No weight moves by more than half a step, which is row scale x group scale; zeros stay zero.

    Args:
        weight: (N, K), finite.
        group: columns that share a group scale; 0: one scale for a row.
    """
    maxima = _group_maxima(weight, group)
    row_scales = _row_scales(maxima / _LARGEST, group)
    group_scales = None
    if group:
        # Rounded up, so that no weight is beyond the last value; but not for float32's own rounding.
        wanted = maxima / (_LARGEST * row_scales[:, None].astype(np.float64))
        group_scales = np.clip(np.ceil(wanted * (1 - 1e-6)), 1, _LARGEST_GROUP_SCALE).astype(np.uint8)
    scales = _scales(row_scales, group_scales)
    values = np.empty(weight.shape, np.int8)
    for rows in _row_chunks(weight.shape):
        steps = weight[rows] / _by_column(scales[rows], group, weight.shape[1])
        values[rows] = np.clip(np.rint(steps), -_LARGEST, _LARGEST)
    return Int8Matrix(values, row_scales, group_scales, group)


def quantize_int4(weight: NDArray[np.float32], group: int = 64, *, stores_zeros: bool = False) -> Int4Matrix:
    """Round weights to 16 values that are learned from the matrix, times a scale for each group.

    The values and the scales make the squared error small, each column weighed by its importance.

    Args:
        weight: (N, K), finite.
        group: columns that share a group scale; 0: one scale for a row.
        stores_zeros: zeros take codes too, as in a dense matrix; one code then means exactly zero
            where there are any. Otherwise the 16 values are spent on the non-zero weights alone.
    """
    maxima = _group_maxima(weight, group)
    importances = _column_importances(weight)
    histogram = _histogram(weight, maxima, importances, group, stores_zeros=stores_zeros)
    centroids = _centroids(histogram, has_zero=stores_zeros and not weight.all())
    reach = np.abs(centroids).max()
    codebook = np.rint(centroids * (_LARGEST / reach)).astype(np.int8)
    # Where midpoints of int8 numbers are multiples of a half, a table in steps of a half is exact.
    halves = (np.arange(-2 * _LARGEST - 2, 2 * _LARGEST + 2) + 0.5) / 2
    code_table = np.searchsorted((codebook[1:].astype(np.float64) + codebook[:-1]) / 2, halves).astype(np.uint8)
    entry_table = codebook.astype(np.float32)[code_table]

    units = maxima * (reach / _LARGEST)  # scale at which the outermost entry means the outermost centroid
    row_scales = _row_scales(max(_FACTORS) * units if group else units, group)
    group_scales = np.ones(maxima.shape, np.uint8) if group else None
    codes = np.empty(weight.shape, np.uint8)
    root_importances = _in_groups(np.sqrt(importances[None]).astype(np.float32), group)
    for rows in _row_chunks(weight.shape):
        blocks = _in_groups(weight[rows], group)
        counts = root_importances * _stored(blocks, weight.shape[1], stores_zeros=stores_zeros)
        least = np.full(blocks.shape[:2], np.inf)
        best = np.ones(blocks.shape[:2], np.float32)
        relative = units[rows] / row_scales[rows, None]
        for factor in _FACTORS:
            multiples = _rounded_group_scales(factor * relative) if group else np.full_like(best, factor)
            scales = row_scales[rows, None] * multiples
            entries = blocks / scales[:, :, None]
            entries -= entry_table[_table_index(entries)]
            entries *= counts
            errors = np.einsum("rgk,rgk->rg", entries, entries) * scales.astype(np.float64) ** 2
            best = np.where(errors < least, multiples, best)
            least = np.minimum(errors, least)
        if group_scales is None:
            row_scales[rows] *= best[:, 0]
            scales = row_scales[rows, None]
        else:
            group_scales[rows] = best.astype(np.uint8)
            scales = row_scales[rows, None] * best
        nearest = code_table[_table_index(blocks / scales[:, :, None])]
        codes[rows] = nearest.reshape(len(blocks), -1)[:, : weight.shape[1]]
    return Int4Matrix(codes, codebook, row_scales, group_scales, group, None if stores_zeros else weight != 0)


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of rows that bound the memory of temporaries."""
    n_rows, n_columns = shape
    step = max(1, _CHUNK_ELEMENTS // n_columns)
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


def _in_groups(rows: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """Return rows as (rows, groups, columns of a group), with zeros behind the last column."""
    n_rows, n_columns = rows.shape
    group = group or n_columns
    padding = -n_columns % group
    return (np.pad(rows, ((0, 0), (0, padding))) if padding else rows).reshape(n_rows, -1, group)


def _stored(blocks: NDArray[np.float32], n_columns: int, *, stores_zeros: bool) -> NDArray[np.bool_]:
    """Return what of `blocks` will be stored, in a shape that broadcasts to theirs."""
    if not stores_zeros:
        return blocks != 0
    return (np.arange(blocks.shape[1] * blocks.shape[2]) < n_columns).reshape(1, *blocks.shape[1:])


def _group_maxima(weight: NDArray[np.float32], group: int) -> NDArray[np.float64]:
    """Return the largest magnitude of each group, (N, groups)."""
    chunks = [np.abs(_in_groups(weight[rows], group)).max(axis=2) for rows in _row_chunks(weight.shape)]
    maxima = np.concatenate(chunks).astype(np.float64)
    if not np.isfinite(maxima).all():
        raise ValueError("weights to quantise must be finite, found infinity or NaN")
    return maxima


def _row_scales(wanted: NDArray[np.float64], group: int) -> NDArray[np.float32]:
    """Return row scales with which the largest of the wanted group scales (N, groups) is 255, or 1 without groups."""
    largest = wanted.max(axis=1) / (_LARGEST_GROUP_SCALE if group else 1)
    return np.where(largest > 0, np.maximum(largest, _SMALLEST_SCALE), 1).astype(np.float32)


def _rounded_group_scales(wanted: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.clip(np.rint(wanted), 1, _LARGEST_GROUP_SCALE).astype(np.float32)


def _scales(row_scales: NDArray[np.float32], group_scales: NDArray[np.uint8] | None) -> NDArray[np.float32]:
    """Return the scale of each group, (N, groups)."""
    if group_scales is None:
        return row_scales[:, None]
    return row_scales[:, None] * group_scales.astype(np.float32)


def _by_column(scales: NDArray[np.float32], group: int, n_columns: int) -> NDArray[np.float32]:
    """Return the scale of each column, (N, K), or (N, 1) without groups."""
    return np.repeat(scales, group, axis=1)[:, :n_columns] if group else scales


def _column_importances(weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how much a squared error counts in each column, (K,): read from what pruning left there.

    Pruning that knows activations (Wanda: weight times norm of the input) keeps small weights only
    where inputs are large, so the smallest that a column kept is inversely proportional to the norm
    of its input. A few columns carry nearly all of a product, in `down_proj` up to 90 %, and their
    small weights would all become the innermost codes, which other columns have no use for: on
    SmolLM2-135M the KL to the unquantised model is 7.6 nats where columns count alike and 0.12 so
    (60 % pruned; 3.7 and 0.11 at 70 %). A column without weights counts nothing. Where nothing was
    pruned, columns do count alike.
    """
    if weight.all() or not weight.any():
        return np.ones(weight.shape[1])
    smallest = np.full(weight.shape[1], np.inf)
    for rows in _row_chunks(weight.shape):
        magnitudes = np.abs(weight[rows]).astype(np.float64)
        is_kept = magnitudes > 0
        means = magnitudes.sum(axis=1) / np.maximum(is_kept.sum(axis=1), 1)
        magnitudes /= np.where(means > 0, means, 1)[:, None]
        smallest = np.minimum(smallest, np.where(is_kept, magnitudes, np.inf).min(axis=0))
    thresholds = np.maximum(smallest, max(_LEAST_THRESHOLD, _CHANCE_WEIGHTS / len(weight)))
    importances: NDArray[np.float64] = (thresholds.min() / thresholds) ** 2
    return importances


def _histogram(
    weight: NDArray[np.float32],
    maxima: NDArray[np.float64],
    importances: NDArray[np.float64],
    group: int,
    *,
    stores_zeros: bool,
) -> NDArray[np.float64]:
    """Return how much weights from -1 to 1 of their group's maximum count, in evenly spaced bins.

    Each counts by its group's maximum squared, which makes the error of a bin one of the weights,
    times the importance of its column.
    """
    histogram = np.zeros(2 * _HALF_BINS + 1)
    largest = maxima.max()
    if largest == 0:
        return histogram
    to_bins = _HALF_BINS / np.where(maxima > 0, maxima, 1)
    by_group = (maxima / largest) ** 2
    by_column = _in_groups(importances[None].astype(np.float32), group)
    for rows in _row_chunks(weight.shape):
        blocks = _in_groups(weight[rows], group)
        bins = np.rint(blocks * to_bins[rows, :, None]).astype(np.intp) + _HALF_BINS
        is_stored = _stored(blocks, weight.shape[1], stores_zeros=stores_zeros)
        counts = by_group[rows, :, None] * by_column * is_stored
        histogram += np.bincount(bins.ravel(), counts.ravel(), minlength=len(histogram))
    return histogram


def _centroids(histogram: NDArray[np.float64], *, has_zero: bool) -> NDArray[np.float64]:
    """Return 16 ascending points in [-1, 1] with a least squared distance to a histogram over it (Lloyd).

    One of them is zero if `has_zero`. It stays there while the others move: with stored zeros the
    KL of SmolLM2-135M, 70 % pruned, is then 0.13 nats, and 0.16 where one is made zero in the end.
    """
    bins = np.linspace(-1, 1, len(histogram))
    if not histogram.any():
        return np.arange(1 - _N_CODES // 2, _N_CODES // 2 + 1) / (_N_CODES // 2)
    # Many points are best spread with the cube root of the density: a start from which few rounds are needed.
    spread = np.cumsum(np.cbrt(histogram))
    centroids = bins[np.searchsorted(spread, (np.arange(_N_CODES) + 0.5) / _N_CODES * spread[-1])]
    mass = np.concatenate([[0], np.cumsum(histogram)])
    moment = np.concatenate([[0], np.cumsum(histogram * bins)])
    for _ in range(300):
        borders = np.searchsorted(bins, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate([[0], borders, [len(bins)]])
        masses = np.diff(mass[cuts])
        has_mass = masses > 0
        moved = np.where(has_mass, np.diff(moment[cuts]) / np.where(has_mass, masses, 1), centroids)
        if has_zero:
            moved[np.abs(moved).argmin()] = 0
        is_still = np.abs(moved - centroids).max() < 1e-5
        centroids = np.sort(moved)
        if is_still:
            break
    return centroids


def _table_index(entries: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return where to look up the code or entry that is nearest to each real number."""
    doubled = np.clip(entries * 2 + (2 * _LARGEST + 2), 0, 4 * _LARGEST + 3)
    return doubled.astype(np.intp)
