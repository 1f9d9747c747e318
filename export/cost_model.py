"""Which encoding of a packed matrix is fastest, predicted from its size and its number of non-zeros.

In: a matrix's shape and non-zeros, a value type and a class of machines. Out: an encoding. The product
that counts is that of decode: one row of activations, so that every weight is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from owl_deploy.export.packing import Encoding, Precision, packed_bytes

__all__ = ["MachineClass", "choose_encoding", "product_ns"]

MachineClass = Literal["x86-avx512-vbmi2", "x86-avx2", "arm-neon", "portable"]


# `kLookupPercent` of owl_deploy/kernels/lanes-avx512.h.
_FEW = 0.22


@dataclass(frozen=True)
class _Cost:
    """What one encoding of one value type costs a thread, beside its bytes."""

    column_ns: float
    """For each of N x K positions, stored or not."""
    value_ns: float = 0.0
    """For each stored value."""
    few_column_ns: float | None = None
    """Instead of `column_ns` where at most `_FEW` of the positions are stored: the kernel then has another loop."""


@dataclass(frozen=True)
class _Machine:
    bytes_per_ns: float
    """Bandwidth that one thread has to itself."""
    costs: dict[Encoding, dict[Precision, _Cost]]
    """What an encoding does not list, it cannot store."""


# Fitted to what `make bench-kernels` prints in its column "best ns/64" (nanoseconds of a thread per 64 columns, W
# 4096 x 11008, 50, 70 and 90 %, two cores of an AMD EPYC with AVX-512), with OWL_KERNEL_TARGET for the classes below
# the machine's own. bf16 is taken as fp16. arm-neon is a rough estimate: no such machine was measured.
_MACHINES: MappingProxyType[MachineClass, _Machine] = MappingProxyType(
    {
        "x86-avx512-vbmi2": _Machine(
            bytes_per_ns=16.0,
            costs={
                "dense": {
                    "fp32": _Cost(0.05),
                    "fp16": _Cost(0.055),
                    "bf16": _Cost(0.055),
                    "int8": _Cost(0.018),
                    "int4": _Cost(0.050),
                },
                "bitmask": {
                    "fp32": _Cost(0.053, few_column_ns=0.031),
                    "fp16": _Cost(0.055, few_column_ns=0.032),
                    "bf16": _Cost(0.065, few_column_ns=0.034),
                    "int8": _Cost(0.026),
                    "int4": _Cost(0.031, 0.025),
                },
                "index16": {
                    "fp32": _Cost(0.0, 0.60),
                    "fp16": _Cost(0.0, 0.55),
                    "bf16": _Cost(0.0, 0.55),
                    "int8": _Cost(0.0, 0.48),
                },
            },
        ),
        "x86-avx2": _Machine(
            bytes_per_ns=16.0,
            costs={
                "dense": {
                    "fp32": _Cost(0.07),
                    "fp16": _Cost(0.07),
                    "bf16": _Cost(0.07),
                    "int8": _Cost(0.045),
                    "int4": _Cost(0.062),
                },
                "bitmask": {
                    "fp32": _Cost(0.072, 0.094),
                    "fp16": _Cost(0.066, 0.10),
                    "bf16": _Cost(0.066, 0.10),
                    "int8": _Cost(0.058, 0.06),
                    "int4": _Cost(0.074, 0.065),
                },
                "index16": {
                    "fp32": _Cost(0.0, 0.78),
                    "fp16": _Cost(0.0, 0.68),
                    "bf16": _Cost(0.0, 0.68),
                    "int8": _Cost(0.0, 0.60),
                },
            },
        ),
        "arm-neon": _Machine(
            bytes_per_ns=10.0,
            costs={
                "dense": {
                    "fp32": _Cost(0.12),
                    "fp16": _Cost(0.13),
                    "bf16": _Cost(0.13),
                    "int8": _Cost(0.04),
                    "int4": _Cost(0.05),
                },
                "bitmask": {
                    "fp32": _Cost(0.25),
                    "fp16": _Cost(0.25),
                    "bf16": _Cost(0.25),
                    "int8": _Cost(0.14),
                    "int4": _Cost(0.14, 0.03),
                },
                "index16": {
                    "fp32": _Cost(0.0, 0.60),
                    "fp16": _Cost(0.0, 0.65),
                    "bf16": _Cost(0.0, 0.65),
                    "int8": _Cost(0.0, 0.65),
                },
            },
        ),
        "portable": _Machine(
            bytes_per_ns=10.0,
            costs={
                "dense": {
                    "fp32": _Cost(0.40),
                    "fp16": _Cost(1.50),
                    "bf16": _Cost(0.45),
                    "int8": _Cost(0.92),
                    "int4": _Cost(1.40),
                },
                "bitmask": {
                    "fp32": _Cost(0.50, 0.85),
                    "fp16": _Cost(0.50, 1.85),
                    "bf16": _Cost(0.50, 0.95),
                    "int8": _Cost(0.97, 1.25),
                    "int4": _Cost(1.13, 1.10),
                },
                "index16": {
                    "fp32": _Cost(0.0, 1.15),
                    "fp16": _Cost(0.0, 1.85),
                    "bf16": _Cost(0.0, 1.25),
                    "int8": _Cost(0.0, 1.06),
                },
            },
        ),
    }
)


def choose_encoding(
    shape: tuple[int, int],
    n_nonzeros: int,
    precision: Precision,
    *,
    machine_class: MachineClass = "x86-avx512-vbmi2",
) -> Encoding:
    """Return the encoding whose product with one row of activations takes the least time; if equal, the smallest.

    Args:
        shape: (N, K).
        n_nonzeros: weights that are not zero; only `dense` stores the others.
        precision: value type.
        machine_class: whose instructions the kernel will use.
    """
    encodings = _encodings(shape, precision, machine_class)
    return min(
        encodings,
        key=lambda encoding: (
            product_ns(shape, n_nonzeros, precision, encoding, machine_class=machine_class),
            packed_bytes(shape, n_nonzeros, precision, encoding),
        ),
    )


def product_ns(
    shape: tuple[int, int],
    n_nonzeros: int,
    precision: Precision,
    encoding: Encoding,
    *,
    machine_class: MachineClass = "x86-avx512-vbmi2",
) -> float:
    """Return the nanoseconds that one thread is predicted to take for one row of activations.

    Reading and computing overlap, so that the longer of the two is what shows.
    """
    if encoding not in _encodings(shape, precision, machine_class):
        raise ValueError(f"{encoding} cannot store {precision} of shape {shape}: use bitmask")
    machine = _MACHINES[machine_class]
    cost = machine.costs[encoding][precision]
    n_positions = shape[0] * shape[1]
    n_values = n_positions if encoding == "dense" else n_nonzeros
    reading = packed_bytes(shape, n_nonzeros, precision, encoding) / machine.bytes_per_ns
    column_ns = cost.column_ns
    if cost.few_column_ns is not None and n_values <= _FEW * n_positions:
        column_ns = cost.few_column_ns
    return max(reading, n_positions * column_ns + n_values * cost.value_ns)


def _encodings(shape: tuple[int, int], precision: Precision, machine_class: MachineClass) -> list[Encoding]:
    """Return the encodings that can store such a matrix."""
    if machine_class not in _MACHINES:
        raise ValueError(f"machine_class must be one of {', '.join(get_args(MachineClass))}, got {machine_class}")
    return [
        encoding
        for encoding, costs in _MACHINES[machine_class].costs.items()
        if precision in costs and not (encoding == "index16" and shape[1] > 1 << 16)
    ]
