"""A decoder graph whose linears multiply 8-bit integers, in the form that DeepSparse 1.8.0 compiles.

In: operators, one after the other, as for any `GraphWriter`, and how the inputs of linears are quantised. Out: besides
the graph, which linears are stored as integers. No large weight is read here.

The form is QuantizeLinear, MatMulInteger, Cast, Mul by scales of the output channels. Two products of 2048 x 5632 and
back with 256 rows and 70 % zeros take 9.5 ms so (27.6 ms in float32). With DequantizeLinear on both sides they take
68 ms where there is one scale, and are left to ONNX Runtime where there are scales per channel; DynamicQuantizeLinear
crashes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from owl_deploy.export.activation_quantization import InputQuantization, QuantizationPlan
from owl_deploy.export.families import NormKind
from owl_deploy.export.graph import GraphWriter

__all__ = ["Int8GraphWriter", "Int8Linear", "quantize_columns"]


@dataclass(frozen=True)
class Int8Linear:
    """One linear that is stored as int8, (in, out), with a scale per output channel."""

    name: str
    inputs: InputQuantization

    @property
    def codes_name(self) -> str:
        """Initializer that is the integers, int8 (in, out)."""
        return f"{self.name}.weight.int8"

    @property
    def scales_name(self) -> str:
        """Initializer that is the scales of inputs and weights together, float32 (out,)."""
        return f"{self.name}.weight.scales"


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight (out, in) to integers of -127 to 127 with a scale per row; zeros stay zeros.

    Returns:
        int8 (in, out) and scales (out,).
    """
    scales = np.maximum(np.abs(weight).max(axis=1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    codes = np.rint(weight / scales[:, None]).clip(-127, 127).astype(np.int8)
    return np.ascontiguousarray(codes.T), scales


class Int8GraphWriter(GraphWriter):
    """Writes the linears of a plan as products of integers, all others as `GraphWriter` does."""

    def __init__(self, plan: QuantizationPlan, *, opsets: dict[str, int], ir_version: int) -> None:
        super().__init__(opsets=opsets, ir_version=ir_version)
        self._plan = plan
        self._quantized_inputs: dict[tuple[int, str], tuple[ir.Value, ir.Value]] = {}
        self.integers: dict[str, Int8Linear] = {}
        """Linears that are stored as integers, in the order of the file."""

    def norm_weights(self, name: str, size: int, *, kind: NormKind, offset: float) -> list[ir.Value]:
        """Name what a norm multiplies by and adds; where its channels are evened out, with that in it."""
        if name not in self._plan.norms:
            return super().norm_weights(name, size, kind=kind, offset=offset)
        return [
            self.constant(array, f"{name}.{part}")
            for array, part in zip(self._plan.norms[name], ("weight", "bias"), strict=False)
        ]

    def linear(self, hidden: ir.Value, name: str, n_in: int, n_out: int, *, has_bias: bool = False) -> ir.Value:
        """Multiply `hidden` (..., n_in) by a matrix of integers."""
        inputs = self._plan.linears.get(name)
        if inputs is None:
            return super().linear(hidden, name, n_in, n_out, has_bias=has_bias)
        op = self.op
        integer = self.integers[name] = Int8Linear(name, inputs)
        rounded, zero_point = self._rounded(hidden, name, inputs)
        codes = ir.val(integer.codes_name, dtype=ir.DataType.INT8, shape=(n_in, n_out))
        no_offset = self.constant(np.zeros((), np.int8), f"{name}.weight.zero_point")
        product = op.Cast(op.MatMulInteger(rounded, codes, zero_point, no_offset), to=ir.DataType.FLOAT)
        product = op.Mul(product, ir.val(integer.scales_name, dtype=ir.DataType.FLOAT, shape=(n_out,)))
        return op.Add(product, self.weight(f"{name}.bias", (n_out,))) if has_bias else product

    def linears(
        self, hidden: ir.Value, block: str, parts: dict[str, int], n_in: int, *, has_bias: bool = False
    ) -> list[ir.Value]:
        """Multiply `hidden` by several linears of a block; returns one value for each."""
        return [self.linear(hidden, f"{block}.{name}", n_in, n_out, has_bias=has_bias) for name, n_out in parts.items()]

    def _rounded(self, hidden: ir.Value, name: str, inputs: InputQuantization) -> tuple[ir.Value, ir.Value]:
        """Return inputs as uint8 and their zero point; linears of one input share them."""
        key = (id(hidden), f"{inputs.scale} {inputs.zero_point}")
        if key not in self._quantized_inputs:
            scale = self.constant(np.array(inputs.scale, np.float32), f"{name}.input.scale")
            zero_point = self.constant(np.array(inputs.zero_point, np.uint8), f"{name}.input.zero_point")
            self._quantized_inputs[key] = (self.op.QuantizeLinear(hidden, scale, zero_point), zero_point)
        return self._quantized_inputs[key]
