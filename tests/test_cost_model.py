"""The predicted time of a product, and the encoding chosen by it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from owl_deploy.export.cost_model import MachineClass, choose_encoding, product_ns
from owl_deploy.export.packing import Encoding, Precision, packed_bytes

SHAPE = (1536, 576)
N = SHAPE[0] * SHAPE[1]
MACHINES: tuple[MachineClass, ...] = get_args(MachineClass)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def test_bound_by_memory_time_is_bytes_over_bandwidth() -> None:
    assert product_ns(SHAPE, N, "fp32", "dense") == packed_bytes(SHAPE, N, "fp32", "dense") / 16.0


def test_bound_by_computing_time_is_that_of_positions_and_values() -> None:
    slow = product_ns(SHAPE, N, "int4", "bitmask", machine_class="x86-avx2")
    assert slow == pytest.approx(N * 0.074 + N * 0.065)


def test_index16_pays_for_stored_values_only() -> None:
    assert product_ns(SHAPE, N // 10, "fp16", "index16", machine_class="x86-avx2") == pytest.approx(N // 10 * 0.68)


def test_few_values_are_looked_up_where_the_kernel_does_so() -> None:
    assert product_ns(SHAPE, N // 10, "fp16", "bitmask") == pytest.approx(N * 0.032)
    assert product_ns(SHAPE, N // 4, "fp16", "bitmask") == pytest.approx(N * 0.055)


@pytest.mark.parametrize("machine_class", MACHINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matrix_without_zeros_is_dense(machine_class: MachineClass, precision: Precision) -> None:
    assert choose_encoding(SHAPE, N, precision, machine_class=machine_class) == "dense"


@pytest.mark.parametrize("machine_class", MACHINES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_nearly_empty_matrix_is_index16(machine_class: MachineClass, precision: Precision) -> None:
    assert choose_encoding(SHAPE, N // 500, precision, machine_class=machine_class) == "index16"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_choice_has_the_least_predicted_time(precision: Precision) -> None:
    encodings: tuple[Encoding, ...] = get_args(Encoding)
    for percent in range(0, 101, 5):
        n_nonzeros = N * percent // 100
        chosen = choose_encoding(SHAPE, n_nonzeros, precision)
        times = {encoding: product_ns(SHAPE, n_nonzeros, precision, encoding) for encoding in encodings}
        assert times[chosen] == min(times.values())


def test_half_sparse_fp32_is_a_bitmask_where_masks_expand_fast() -> None:
    assert choose_encoding(SHAPE, N // 2, "fp32") == "bitmask"


@pytest.mark.parametrize("machine_class", MACHINES)
def test_index16_is_not_chosen_where_it_cannot_store(machine_class: MachineClass) -> None:
    assert choose_encoding((4, 65537), 3, "fp32", machine_class=machine_class) != "index16"
    assert choose_encoding(SHAPE, 3, "int4", machine_class=machine_class) != "index16"


@pytest.mark.parametrize("machine_class", MACHINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_nonzeros_never_take_less_time(machine_class: MachineClass, precision: Precision) -> None:
    times = [
        product_ns(SHAPE, N * percent // 100, precision, "bitmask", machine_class=machine_class)
        for percent in range(101)
    ]
    assert times == sorted(times)


def test_impossible_arguments_are_refused() -> None:
    unknown: Any = "z80"
    with pytest.raises(ValueError, match=r"machine_class must be one of .* got z80"):
        choose_encoding(SHAPE, N, "fp32", machine_class=unknown)
    with pytest.raises(ValueError, match="index16 cannot store int4"):
        product_ns(SHAPE, N, "int4", "index16")
