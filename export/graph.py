"""A decoder graph under construction: what every engine's dialect needs to name and to add.

In: operators, one after the other. Out: an ONNX model without its weights, and where each of its
weights comes from. No weight is read here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from owl_deploy.export.decoder import WeightSource

__all__ = ["GraphWriter"]


class GraphWriter:
    """Nodes written so far, and the weights that they have named."""

    def __init__(self, *, opsets: dict[str, int], ir_version: int) -> None:
        graph = ir.Graph(inputs=[], outputs=[], nodes=[], name="decoder", opset_imports=opsets)
        self._builder = GraphBuilder(graph)
        self._ir_version = ir_version
        self._weight_values: dict[str, ir.Value] = {}
        self.weights: dict[str, WeightSource] = {}
        """Initializer name -> where that weight comes from."""
        self.op: Any = self._builder.op
        """Operators of the standard domain; they are made when asked for, so they have no static type."""

    def weight(self, tensor: str, shape: tuple[int, ...], *, is_transposed: bool = False) -> ir.Value:
        """Name a weight, of `shape` as it lies in the file; the writer of the file fills it in."""
        name = f"{tensor}.transposed" if is_transposed else tensor
        if name not in self.weights:
            self.weights[name] = WeightSource(tensor, is_transposed)
            self._weight_values[name] = ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)
        return self._weight_values[name]

    def linear(self, hidden: ir.Value, name: str, n_in: int, n_out: int, *, has_bias: bool = False) -> ir.Value:
        """Multiply `hidden` (..., n_in) by a weight that lies in the file as (n_in, n_out)."""
        product = self.op.MatMul(hidden, self.weight(f"{name}.weight", (n_in, n_out), is_transposed=True))
        return self.op.Add(product, self.weight(f"{name}.bias", (n_out,))) if has_bias else product

    def linears(
        self, hidden: ir.Value, block: str, parts: dict[str, int], n_in: int, *, has_bias: bool = False
    ) -> list[ir.Value]:
        """Multiply `hidden` by several linears of a block, each named with its outputs; returns one value for each.

        A dialect that multiplies them stacked returns one value in all.
        """
        return [self.linear(hidden, f"{block}.{name}", n_in, n_out, has_bias=has_bias) for name, n_out in parts.items()]

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Add a small constant that is part of the graph, not of the checkpoint."""
        return self._builder.initializer(ir.tensor(np.asarray(array, order="C"), name=name))

    def int64_input(self, name: str, shape: list[str | int]) -> ir.Value:
        """Add an input of token ids, positions or masks."""
        return self._builder.input(name, dtype=ir.DataType.INT64, shape=shape)

    def float_input(self, name: str, shape: list[str | int]) -> ir.Value:
        """Add a float32 input."""
        return self._builder.input(name, dtype=ir.DataType.FLOAT, shape=shape)

    def output(self, value: ir.Value, name: str, shape: list[str | int]) -> None:
        """Make a value an output of the model, float32."""
        value.dtype = ir.DataType.FLOAT
        value.shape = ir.Shape(shape)
        self._builder.add_output(value, name)

    def model(self) -> onnx.ModelProto:
        """Return the model as far as it was written, without its weights."""
        return ir.to_proto(ir.Model(self._builder.graph, ir_version=self._ir_version, producer_name="owl-deploy"))
