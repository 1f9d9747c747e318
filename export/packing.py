"""Packed matrices: the bytes that the operator `SparseMatMul` computes from, by `kernels/FORMAT.md`.

In: a matrix of float32 weights whose zeros are pruned, a value type and an encoding. Out: its bytes,
which a file may hold anywhere. Which encoding is fastest is the business of `cost_model`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from owl_deploy.errors import OwlDeployError
from owl_deploy.export.quantization import Int4Matrix, Int8Matrix, quantize_int4, quantize_int8

__all__ = [
    "VALUE_BITS",
    "Encoding",
    "PackedHeader",
    "Precision",
    "default_group",
    "pack_matrix",
    "packed_bytes",
    "unpack_matrix",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Encoding = Literal["dense", "bitmask", "index16"]

_MAGIC = b"OWLSPMM\0"
_VERSION = 1
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)  # the format's numbers are positions in these two
_ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
VALUE_BITS: dict[Precision, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
_BLOCK = 64  # bytes to which sections are aligned, and columns of a mask word
_SLACK = 64  # zero bytes behind the last record
_NIBBLE_RUN = 128  # int4 codes that lie interleaved
_INDEX16_COLUMNS = 1 << 16
_LARGEST_GROUP = (1 << 16) - _BLOCK
_LARGEST_DIMENSION = (1 << 31) - 1
_LARGEST_RECORDS_END = 8 * ((1 << 32) - 1)


@dataclass(frozen=True)
class PackedHeader:
    """The first 64 bytes of a packed matrix."""

    precision: Precision
    encoding: Encoding
    group: int
    """Columns that share a group scale; 0: there are none."""
    shape: tuple[int, int]
    """(N, K): outputs, inputs."""
    n_values: int
    """Stored values of all rows."""
    records_offset: int
    total_bytes: int

    _FORMAT = "<8sIBBHQQQQQ8x"

    def to_bytes(self) -> bytes:
        """Return the 64 bytes."""
        return struct.pack(
            self._FORMAT,
            _MAGIC,
            _VERSION,
            _PRECISIONS.index(self.precision),
            _ENCODINGS.index(self.encoding),
            self.group,
            *self.shape,
            self.n_values,
            self.records_offset,
            self.total_bytes,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> PackedHeader:
        """Read the first 64 of `data`.

        Raises:
            OwlDeployError: these are no packed matrix of a version that is known here.
        """
        if len(data) < struct.calcsize(cls._FORMAT):
            raise OwlDeployError(f"a packed matrix has a header of 64 bytes, found {len(data)}: the file is cut short")
        magic, version, value_type, encoding, group, n_rows, n_columns, n_values, records_offset, total_bytes = (
            struct.unpack_from(cls._FORMAT, data)
        )
        if magic != _MAGIC or version != _VERSION:
            raise OwlDeployError(
                f"a packed matrix begins with {_MAGIC!r} and version {_VERSION}, found {magic!r} and {version}: "
                "export the model again with this owl-deploy"
            )
        if value_type >= len(_PRECISIONS) or encoding >= len(_ENCODINGS):
            raise OwlDeployError(
                f"a packed matrix has value type {value_type} and encoding {encoding}, which version {_VERSION} "
                "does not have: the file is damaged, export the model again"
            )
        shape = (n_rows, n_columns)
        return cls(_PRECISIONS[value_type], _ENCODINGS[encoding], group, shape, n_values, records_offset, total_bytes)


def default_group(precision: Precision) -> int:
    """Return the columns that share a group scale where nobody says otherwise; 0: none."""
    return 64 if precision == "int4" else 0


def pack_matrix(
    weight: NDArray[np.float32],
    *,
    precision: Precision,
    encoding: Encoding,
    group: int | None = None,
    quantized: Int8Matrix | Int4Matrix | None = None,
) -> NDArray[np.uint8]:
    """Return a matrix in its packed form.

    Args:
        weight: (N, K) float32; its zeros are pruned, and only `dense` stores them. A weight that is
            not zero is stored even where it rounds to zero.
        precision: value type; int8 and int4 are quantised here, see `quantization`.
        encoding: how the columns of stored values are told.
        group: columns that share a scale in int8 and int4; 0: only rows have one; None: `default_group`.
        quantized: the values of int8 and int4, where they are more than `weight` rounded to nearest.

    Raises:
        OwlDeployError: a weight is not finite or too large for the value type, or the matrix is.
    """
    if weight.ndim != 2 or weight.dtype != np.float32:
        raise ValueError(f"weight must be (N, K) float32, got {weight.shape} {weight.dtype}")
    n_rows, n_columns = weight.shape
    group = default_group(precision) if group is None else group
    _check_layout((n_rows, n_columns), precision, encoding, group)
    _check_range(weight, precision)

    if quantized is None and precision == "int8":
        quantized = quantize_int8(weight, group)
    elif quantized is None and precision == "int4":
        quantized = quantize_int4(weight, group, stores_zeros=encoding == "dense")
    group_scales = None if quantized is None else quantized.group_scales

    stored = np.full(n_rows, n_columns) if encoding == "dense" else np.count_nonzero(weight, axis=1)
    sections = _section_offsets((n_rows, n_columns), precision)
    starts = np.zeros(n_rows + 1, np.int64)
    np.cumsum(_record_bytes(stored, n_columns, precision, encoding, group), out=starts[1:])
    starts += sections.records
    if starts[-1] > _LARGEST_RECORDS_END:
        raise OwlDeployError(
            f"a packed matrix ends before byte {_LARGEST_RECORDS_END}, one of shape {weight.shape} would take "
            f"{starts[-1]}: use a smaller precision"
        )
    packed = np.zeros(int(starts[-1]) + _SLACK, np.uint8)
    header = PackedHeader(
        precision, encoding, group, (n_rows, n_columns), int(stored.sum()), sections.records, len(packed)
    )
    _write_(packed, 0, np.frombuffer(header.to_bytes(), np.uint8))
    _write_(packed, sections.row_starts, (starts // 8).astype("<u4"))
    if quantized is not None:
        _write_(packed, sections.row_scales, quantized.row_scales.astype("<f4"))
    if isinstance(quantized, Int4Matrix):
        _write_(packed, sections.codebook, quantized.codebook)

    for row, start in enumerate(starts[:-1].tolist()):
        keep = slice(None) if encoding == "dense" else np.flatnonzero(weight[row])
        parts: list[NDArray[Any]] = []
        if encoding == "bitmask":
            masks = np.zeros(-(-n_columns // _BLOCK) * 8, np.uint8)
            bits = np.packbits(weight[row] != 0, bitorder="little")
            masks[: len(bits)] = bits
            parts.append(masks)
        elif isinstance(keep, np.ndarray) and encoding == "index16":
            parts += [np.array([len(keep)], "<u4"), keep.astype("<u2"), np.zeros(len(keep) % 2, "<u2")]
        if group_scales is not None:
            parts.append(group_scales[row])
        if isinstance(quantized, Int4Matrix):
            parts.append(_nibbles(quantized.codes[row, keep]))
        elif isinstance(quantized, Int8Matrix):
            parts.append(quantized.values[row, keep])
        else:
            parts.append(_float_values(weight[row, keep], precision))
        for part in parts:
            start = _write_(packed, start, part)
    return packed


def packed_bytes(
    shape: tuple[int, int], n_nonzeros: int, precision: Precision, encoding: Encoding, group: int | None = None
) -> int:
    """Return what a matrix takes when packed: exactly in `dense`, else without padding, under 10 bytes a row."""
    group = default_group(precision) if group is None else group
    _check_layout(shape, precision, encoding, group)
    n_rows, n_columns = shape
    if encoding == "dense":
        records = n_rows * int(_record_bytes(np.array([n_columns]), n_columns, precision, encoding, group)[0])
    else:
        n_groups = -(-n_columns // group) if group else 0
        row = -(-n_columns // _BLOCK) * 8 + n_groups if encoding == "bitmask" else 4
        columns = 2 * n_nonzeros if encoding == "index16" else 0
        records = n_rows * row + columns + VALUE_BITS[precision] * n_nonzeros // 8
    return _section_offsets(shape, precision).records + records + _SLACK


def unpack_matrix(data: NDArray[np.uint8] | bytes) -> NDArray[np.float32]:
    """Return the weights (N, K) that a packed matrix means, zero where none is stored.

    Raises:
        OwlDeployError: the header is none, or `data` has another length than it says.
    """
    raw = bytes(data)
    header = PackedHeader.from_bytes(raw)
    if len(raw) != header.total_bytes:
        raise OwlDeployError(
            f"a packed matrix should have {header.total_bytes} bytes, found {len(raw)}: the file is damaged, "
            "export the model again"
        )
    n_rows, n_columns = header.shape
    sections = _section_offsets(header.shape, header.precision)
    starts = np.frombuffer(raw, "<u4", n_rows + 1, sections.row_starts).astype(np.int64) * 8
    row_scales = codebook = None
    if header.precision in ("int8", "int4"):
        row_scales = np.frombuffer(raw, "<f4", n_rows, sections.row_scales)
    if header.precision == "int4":
        codebook = np.frombuffer(raw, np.int8, 16, sections.codebook)

    weight = np.zeros((n_rows, n_columns), np.float32)
    for row in range(n_rows):
        at = int(starts[row])
        if header.encoding == "dense":
            columns = np.arange(n_columns)
        elif header.encoding == "bitmask":
            masks = np.frombuffer(raw, np.uint8, -(-n_columns // _BLOCK) * 8, at)
            columns = np.flatnonzero(np.unpackbits(masks, bitorder="little"))
            at += len(masks)
        else:
            n_stored = int(np.frombuffer(raw, "<u4", 1, at)[0])
            columns = np.frombuffer(raw, "<u2", n_stored, at + 4).astype(np.intp)
            at += 4 + -(-2 * n_stored // 4) * 4
        scales = np.ones(len(columns), np.float32)
        if header.group:
            group_scales = np.frombuffer(raw, np.uint8, -(-n_columns // header.group), at)
            scales = group_scales[columns // header.group].astype(np.float32)
            at += len(group_scales)
        values = _read_values(raw, at, len(columns), header.precision, codebook)
        weight[row, columns] = values if row_scales is None else row_scales[row] * scales * values
    return weight


@dataclass(frozen=True)
class _SectionOffsets:
    row_starts: int
    row_scales: int
    codebook: int
    records: int


def _section_offsets(shape: tuple[int, int], precision: Precision) -> _SectionOffsets:
    """Return where sections begin; an absent one begins where the next does."""
    row_scales = _rounded_up(64 + 4 * (shape[0] + 1), _BLOCK)
    codebook = _rounded_up(row_scales + (4 * shape[0] if precision in ("int8", "int4") else 0), _BLOCK)
    records = _rounded_up(codebook + (16 if precision == "int4" else 0), _BLOCK)
    return _SectionOffsets(64, row_scales, codebook, records)


def _record_bytes(
    stored: NDArray[np.integer[Any]], n_columns: int, precision: Precision, encoding: Encoding, group: int
) -> NDArray[np.int64]:
    """Return the bytes of records that store so many values each, padding included."""
    size = -(-stored.astype(np.int64) * VALUE_BITS[precision] // 8)
    if encoding == "bitmask":
        size += -(-n_columns // _BLOCK) * 8
    elif encoding == "index16":
        size += 4 + -(-2 * stored // 4) * 4
    if group:
        size += -(-n_columns // group)
    return -(-size // 8) * 8


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_layout(shape: tuple[int, int], precision: Precision, encoding: Encoding, group: int) -> None:
    """Refuse what the format cannot say."""
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision}")
    if encoding not in _ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(_ENCODINGS)}, got {encoding}")
    if not all(1 <= size <= _LARGEST_DIMENSION for size in shape):
        raise ValueError(f"a packed matrix has 1 to {_LARGEST_DIMENSION} rows and columns, got {shape}")
    if group % _BLOCK or not 0 <= group <= _LARGEST_GROUP:
        raise ValueError(f"group must be a multiple of {_BLOCK} from 0 to {_LARGEST_GROUP}, got {group}")
    if group and precision not in ("int8", "int4"):
        raise ValueError(f"group must be 0 in {precision}, which has no scales, got {group}")
    if encoding != "index16":
        return
    if shape[1] > _INDEX16_COLUMNS:
        raise ValueError(f"index16 has at most {_INDEX16_COLUMNS} columns, got {shape[1]}: use bitmask")
    if precision == "int4" or group:
        raise ValueError(f"index16 has no int4 and no group scales, got {precision} and group {group}: use bitmask")


def _check_range(weight: NDArray[np.float32], precision: Precision) -> None:
    """Refuse weights that the value type cannot hold."""
    largest = np.maximum(np.abs(weight.max()), np.abs(weight.min()))
    if not np.isfinite(largest):
        raise OwlDeployError("weights to pack must be finite, found infinity or NaN: repair the checkpoint")
    if not np.isfinite(_as_float32(_float_values(largest.reshape(1), precision), precision)).all():
        raise OwlDeployError(f"weights up to {largest:g} overflow in {precision}: use fp32, int8 or int4")


def _float_values(values: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
    """Return values in the bytes of a float type; others as float32. What overflows becomes infinity."""
    if precision == "fp16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    if precision == "bf16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")  # to nearest, ties to even
    return values.astype("<f4")


def _as_float32(values: NDArray[Any], precision: Precision) -> NDArray[np.float32]:
    if precision == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _read_values(
    raw: bytes, at: int, n_values: int, precision: Precision, codebook: NDArray[np.int8] | None
) -> NDArray[np.float32]:
    """Return the numbers of a record that begin at byte `at`, before scales."""
    if codebook is not None:
        codes: list[int] = []
        while len(codes) < n_values:
            half = -(-min(_NIBBLE_RUN, n_values - len(codes)) // 2)
            run = raw[at : at + half]
            codes += [byte & 15 for byte in run] + [byte >> 4 for byte in run]
            at += half
        return codebook[np.array(codes[:n_values], np.intp)].astype(np.float32)
    kinds = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "int8": "i1"}
    return _as_float32(np.frombuffer(raw, kinds[precision], n_values, at), precision)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes of a row two to a byte, the halves of each run interleaved."""
    n_whole = len(codes) // _NIBBLE_RUN * _NIBBLE_RUN
    runs = codes[:n_whole].reshape(-1, 2, _NIBBLE_RUN // 2)
    shorter = codes[n_whole:]
    half = -(-len(shorter) // 2)
    last = shorter[:half].copy()
    last[: len(shorter) - half] |= shorter[half:] << 4
    return np.concatenate([(runs[:, 0] | runs[:, 1] << 4).reshape(-1), last])


def _write_(packed: NDArray[np.uint8], offset: int, part: NDArray[Any]) -> int:
    """Copy the bytes of `part` to `offset`; return where they end."""
    raw = np.ascontiguousarray(part).view(np.uint8)
    packed[offset : offset + len(raw)] = raw
    return offset + len(raw)
