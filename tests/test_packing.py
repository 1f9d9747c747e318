"""Packed matrices, byte by byte, against a slow reader that was written from FORMAT.md alone."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.errors import OwlDeployError
from owl_deploy.export.packing import Encoding, PackedHeader, Precision, pack_matrix, packed_bytes, unpack_matrix
from owl_deploy.export.quantization import quantize_int4, quantize_int8

Array = NDArray[np.float32]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
LAYOUTS: list[tuple[Precision, Encoding, int]] = [
    (precision, encoding, group)
    for precision in PRECISIONS
    for encoding in ENCODINGS
    for group in ((0, 64, 128, 192) if precision in ("int8", "int4") else (0,))
    if encoding != "index16" or (precision != "int4" and group == 0)
]


def matrix(shape: tuple[int, int], density: float, seed: int = 0) -> Array:
    """Return gaussian weights of a density, the middle row of three or more empty."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal(shape).astype(np.float32)
    weight[generator.random(shape) >= density] = 0
    if shape[0] > 2:
        weight[shape[0] // 2] = 0
    return weight


matrices = st.builds(
    matrix,
    st.tuples(st.integers(1, 9), st.one_of(st.integers(1, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 256]))),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    st.integers(0, 1000),
)


class SlowReader:
    """Reads a packed matrix one number at a time and checks what the format promises on the way."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        assert data[:8] == b"OWLSPMM\0"
        assert self.number("<I", 8) == 1
        self.value_type, self.encoding, self.group = data[12], data[13], self.number("<H", 14)
        self.n_rows, self.n_columns, self.n_values, self.records_offset, self.total_bytes = (
            self.number("<Q", offset) for offset in (16, 24, 32, 40, 48)
        )
        assert data[56:64] == bytes(8)
        assert self.total_bytes == len(data)
        self.weight = np.zeros((self.n_rows, self.n_columns), np.float32)
        self.n_found = 0

        end = 64 + 4 * (self.n_rows + 1)
        self.starts = [8 * self.number("<I", 64 + 4 * row) for row in range(self.n_rows + 1)]
        self.row_scales: list[np.float32] = []
        self.codebook: list[int] = []
        if self.value_type in (3, 4):
            begin = self.aligned(end)
            self.row_scales = [np.float32(self.number("<f", begin + 4 * row)) for row in range(self.n_rows)]
            assert np.isfinite(self.row_scales).all()
            end = begin + 4 * self.n_rows
        if self.value_type == 4:
            begin = self.aligned(end)
            self.codebook = [self.number("<b", begin + code) for code in range(16)]
            end = begin + 16
        assert self.aligned(end) == self.records_offset
        assert self.starts[0] == self.records_offset
        assert self.starts[-1] + 64 == self.total_bytes
        assert data[-64:] == bytes(64)
        for row in range(self.n_rows):
            self.read_record(row)
        assert self.n_found == self.n_values

    def number(self, kind: str, offset: int) -> Any:
        return struct.unpack_from(kind, self.data, offset)[0]

    def aligned(self, end: int) -> int:
        """Return the multiple of 64 from `end` on, up to which there are zero bytes."""
        begin = (end + 63) // 64 * 64
        assert self.data[end:begin] == bytes(begin - end)
        return begin

    def read_record(self, row: int) -> None:
        at, end = self.starts[row], self.starts[row + 1]
        columns = list(range(self.n_columns))
        if self.encoding == 1:
            n_masks = (self.n_columns + 63) // 64
            masks = [self.number("<Q", at + 8 * m) for m in range(n_masks)]
            assert masks[-1] >> ((self.n_columns - 1) % 64 + 1) == 0
            columns = [c for c in columns if masks[c // 64] >> (c % 64) & 1]
            at += 8 * n_masks
        elif self.encoding == 2:
            n = self.number("<I", at)
            columns = [self.number("<H", at + 4 + 2 * i) for i in range(n)]
            assert all(a < b for a, b in pairwise(columns))
            at += 4 + 2 * n
            if n % 2:
                assert self.data[at : at + 2] == bytes(2)
                at += 2
        group_scales: list[int] = []
        if self.group:
            n_groups = (self.n_columns + self.group - 1) // self.group
            group_scales = list(self.data[at : at + n_groups])
            at += n_groups
        values: list[Any] = []
        if self.value_type == 4:
            at = self.read_codes(at, len(columns), values)
        else:
            size = {0: 4, 1: 2, 2: 2, 3: 1}[self.value_type]
            for i in range(len(columns)):
                raw = self.data[at + i * size : at + (i + 1) * size]
                if self.value_type == 2:
                    raw = b"\0\0" + raw
                values.append(struct.unpack({0: "<f", 1: "<e", 2: "<f", 3: "<b"}[self.value_type], raw)[0])
            at += size * len(columns)
        for column, value in zip(columns, values, strict=True):
            number = np.float32(value)
            if self.row_scales:
                g = np.float32(group_scales[column // self.group] if self.group else 1)
                number = self.row_scales[row] * g * number
            self.weight[row, column] = number
        assert 0 <= end - at < 8
        assert self.data[at:end] == bytes(end - at)
        self.n_found += len(columns)

    def read_codes(self, at: int, n: int, values: list[Any]) -> int:
        for first in range(0, n, 128):
            c = min(128, n - first)
            h = (c + 1) // 2
            for j in range(c):
                byte = self.data[at + j] if j < h else self.data[at + j - h]
                values.append(self.codebook[byte & 15 if j < h else byte >> 4])
            if c % 2:
                assert self.data[at + h - 1] >> 4 == 0
            at += h
        return at


def expected(weight: Array, precision: Precision, encoding: Encoding, group: int) -> Array:
    """Return what packed weights should mean."""
    if precision == "int8":
        return quantize_int8(weight, group).dequantized()
    if precision == "int4":
        return quantize_int4(weight, group, stores_zeros=encoding == "dense").dequantized()
    if precision == "fp16":
        return weight.astype(np.float16).astype(np.float32)
    if precision == "bf16":
        return np.array([[nearest_bfloat16(value) for value in row] for row in weight.tolist()], np.float32)
    return weight


def nearest_bfloat16(value: float) -> float:
    """Return the closer of the two bfloat16 numbers around a value, the even one in a tie."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    toward_zero = bits & 0xFFFF0000
    around = [struct.unpack("<f", struct.pack("<I", toward_zero + step))[0] for step in (0, 0x10000)]
    distances = [abs(candidate - value) for candidate in around]
    if distances[0] == distances[1]:
        return float(around[toward_zero >> 16 & 1])
    return float(around[distances.index(min(distances))])


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from(LAYOUTS))
def test_slow_reader_finds_the_weights(weight: Array, layout: tuple[Precision, Encoding, int]) -> None:
    precision, encoding, group = layout
    packed = pack_matrix(weight, precision=precision, encoding=encoding, group=group)
    read = SlowReader(packed.tobytes())
    assert (read.value_type, read.encoding) == (PRECISIONS.index(precision), ENCODINGS.index(encoding))
    assert (read.group, read.weight.shape) == (group, weight.shape)
    assert read.n_values == (weight.size if encoding == "dense" else np.count_nonzero(weight))
    np.testing.assert_array_equal(read.weight, expected(weight, precision, encoding, group))


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from(LAYOUTS))
def test_unpack_agrees_with_the_slow_reader(weight: Array, layout: tuple[Precision, Encoding, int]) -> None:
    precision, encoding, group = layout
    packed = pack_matrix(weight, precision=precision, encoding=encoding, group=group)
    np.testing.assert_array_equal(unpack_matrix(packed), SlowReader(packed.tobytes()).weight)


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from(LAYOUTS))
def test_size_is_predicted(weight: Array, layout: tuple[Precision, Encoding, int]) -> None:
    precision, encoding, group = layout
    packed = pack_matrix(weight, precision=precision, encoding=encoding, group=group)
    predicted = packed_bytes(weight.shape, int(np.count_nonzero(weight)), precision, encoding, group)
    padding = 0 if encoding == "dense" else 10 * len(weight)
    assert predicted <= len(packed) <= predicted + padding


def test_every_byte_of_a_small_bitmask_matrix() -> None:
    weight = np.zeros((2, 66), np.float32)
    weight[0, [1, 65]] = [1.0, -2.0]
    packed = pack_matrix(weight, precision="fp16", encoding="bitmask").tobytes()
    header = b"OWLSPMM\0" + struct.pack("<IBBHQQQQQQ", 1, 1, 1, 0, 2, 66, 2, 128, 128 + 24 + 16 + 64, 0)
    starts = struct.pack("<III", 16, 19, 21) + bytes(52)
    records = struct.pack("<QQee4x", 2, 2, 1.0, -2.0) + struct.pack("<QQ", 0, 0)
    assert packed == header + starts + records + bytes(64)


def test_every_byte_of_a_small_index16_matrix() -> None:
    weight = np.array([[0, 127, -254, 4]], np.float32)
    packed = pack_matrix(weight, precision="int8", encoding="index16").tobytes()
    header = b"OWLSPMM\0" + struct.pack("<IBBHQQQQQQ", 1, 3, 2, 0, 1, 4, 3, 192, 192 + 16 + 64, 0)
    starts = struct.pack("<II", 24, 26) + bytes(56)
    scales = struct.pack("<f", 2.0) + bytes(60)
    record = struct.pack("<IHHH2xbbbx", 3, 1, 2, 3, 64, -127, 2)
    assert packed == header + starts + scales + record + bytes(64)


def test_int4_codes_are_interleaved_in_runs_of_128() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 131)).astype(np.float32)
    codes = quantize_int4(weight, 64, stores_zeros=True).codes[0].tolist()
    packed = pack_matrix(weight, precision="int4", encoding="dense").tobytes()
    begin = struct.unpack_from("<Q", packed, 40)[0] + 3  # three group scales
    assert list(packed[begin : begin + 64]) == [codes[j] | codes[64 + j] << 4 for j in range(64)]
    assert list(packed[begin + 64 : begin + 66]) == [codes[128] | codes[130] << 4, codes[129]]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_default_group_is_64_for_int4_only(precision: Precision, encoding: Encoding) -> None:
    if (precision, encoding) == ("int4", "index16"):
        return
    packed = pack_matrix(matrix((2, 70), 0.5), precision=precision, encoding=encoding)
    assert PackedHeader.from_bytes(packed.tobytes()).group == (64 if precision == "int4" else 0)


def test_header_round_trips() -> None:
    header = PackedHeader("int4", "bitmask", 128, (3, 300), 17, 256, 1024)
    assert len(header.to_bytes()) == 64
    assert PackedHeader.from_bytes(header.to_bytes() + b"more") == header


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("encoding", ["bitmask", "index16"])
def test_weight_that_rounds_to_zero_is_still_stored(precision: Precision, encoding: Encoding) -> None:
    if (precision, encoding) == ("int4", "index16"):
        return
    weight = np.array([[1e-44, 0, 1, -0.0]], np.float32)
    read = SlowReader(pack_matrix(weight, precision=precision, encoding=encoding).tobytes())
    assert read.n_values == 2
    assert (read.weight[0, [1, 3]] == 0).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_not_finite_are_refused(precision: Precision, value: float) -> None:
    weight = matrix((3, 70), 0.5)
    weight[2, 69] = value
    with pytest.raises(OwlDeployError, match="must be finite"):
        pack_matrix(weight, precision=precision, encoding="bitmask")


def test_overflow_is_refused() -> None:
    weight = np.array([[1, -65519]], np.float32)  # the largest that rounds to fp16's 65504
    assert unpack_matrix(pack_matrix(weight, precision="fp16", encoding="dense"))[0, 1] == -65504
    weight[0, 1] = -65520
    with pytest.raises(OwlDeployError, match="weights up to 65520 overflow in fp16: use fp32, int8 or int4"):
        pack_matrix(weight, precision="fp16", encoding="bitmask")
    weight[0, 1] = np.finfo(np.float32).max
    with pytest.raises(OwlDeployError, match="overflow in bf16"):
        pack_matrix(weight, precision="bf16", encoding="dense")


def test_ties_of_bfloat16_go_to_the_even_number() -> None:
    weight = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]], np.float32)
    read = SlowReader(pack_matrix(weight, precision="bf16", encoding="dense").tobytes())
    assert read.weight.tolist() == [[1, 1 + 2**-6, -1, 1 + 2**-7]]


def test_index16_reaches_the_last_column() -> None:
    weight = np.zeros((2, 65536), np.float32)
    weight[1, [0, 65535]] = [3, 4]
    np.testing.assert_array_equal(unpack_matrix(pack_matrix(weight, precision="fp32", encoding="index16")), weight)


@pytest.mark.parametrize(
    ("shape", "precision", "encoding", "group", "message"),
    [
        ((1, 65537), "fp32", "index16", None, "at most 65536 columns, got 65537"),
        ((1, 64), "int4", "index16", None, "no int4 and no group scales"),
        ((1, 64), "int8", "index16", 64, "no int4 and no group scales"),
        ((1, 64), "fp16", "bitmask", 64, "group must be 0 in fp16"),
        ((1, 64), "int8", "bitmask", 32, "group must be a multiple of 64"),
        ((1, 64), "int8", "bitmask", 1 << 16, "group must be a multiple of 64"),
        ((0, 64), "int8", "bitmask", None, "rows and columns, got"),
        ((1, 64), "int2", "bitmask", None, "precision must be one of"),
        ((1, 64), "int8", "csr", None, "encoding must be one of"),
    ],
)
def test_what_the_format_cannot_say_is_refused(
    shape: tuple[int, int], precision: Any, encoding: Any, group: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_matrix(np.zeros(shape, np.float32), precision=precision, encoding=encoding, group=group)
    if precision in PRECISIONS:
        with pytest.raises(ValueError, match=message):
            packed_bytes(shape, 0, precision, encoding, group)


def test_only_float32_matrices_are_packed() -> None:
    wrong: Any = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"must be \(N, K\) float32"):
        pack_matrix(wrong, precision="fp32", encoding="dense")


def test_transposed_view_is_packed_like_its_copy() -> None:
    weight = matrix((70, 5), 0.5).T
    for precision, encoding, group in LAYOUTS:
        of_view, of_copy = (
            pack_matrix(array, precision=precision, encoding=encoding, group=group)
            for array in (weight, np.ascontiguousarray(weight))
        )
        np.testing.assert_array_equal(of_view, of_copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "the file is damaged"),
        (lambda data: data[:40], "the file is cut short"),
        (lambda data: b"GGUF" + data[4:], "begins with"),
        (lambda data: data[:8] + b"\2" + data[9:], "and version 1, found .* and 2"),
        (lambda data: data[:12] + b"\5" + data[13:], "value type 5"),
    ],
)
def test_damaged_headers_are_refused(damage: Any, message: str) -> None:
    data = pack_matrix(matrix((2, 70), 0.5), precision="fp32", encoding="bitmask").tobytes()
    with pytest.raises(OwlDeployError, match=message):
        unpack_matrix(damage(data))
