"""A decoder graph under construction: what every engine's dialect needs to name and to add.

In: operators, one after the other. Out: an ONNX model without its weights, and where each of its
weights comes from. No weight is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from owl_deploy.export.decoder import WeightSource
from owl_deploy.export.families import NormKind

__all__ = ["FIRST_LOGIT", "GraphWriter", "stack_name"]

FIRST_LOGIT = "first_logit"
"""Initializer int64 (1,): from which token of a call on logits are computed, at first from all. Whoever wants those of
the last token alone puts -1 in its place when a session is made, which saves the head's product for all others: of a
prefill of 256 tokens of SmolLM2-135M, 14 of 68 GFLOP."""


def stack_name(block: str, parts: Iterable[str]) -> str:
    """Return what to call linears stacked by rows: q_proj, k_proj and v_proj become q_k_v_proj."""
    return f"{block}.{'_'.join(part.removesuffix('_proj') for part in parts)}_proj"


class GraphWriter:
    """Nodes written so far, and the weights that they have named."""

    has_operators = False
    """Whether an artifact of this graph brings the operator library."""

    def __init__(
        self, *, opsets: dict[str, int], ir_version: int, matrix_type: Literal["fp32", "fp16"] = "fp32"
    ) -> None:
        graph = ir.Graph(inputs=[], outputs=[], nodes=[], name="decoder", opset_imports=opsets)
        self._builder = GraphBuilder(graph)
        self._ir_version = ir_version
        self._matrix_type = matrix_type
        self._weight_values: dict[str, ir.Value] = {}
        self.weights: dict[str, WeightSource] = {}
        """Initializer name -> where that weight comes from."""
        self.op: Any = self._builder.op
        """Operators of the standard domain; they are made when asked for, so they have no static type."""

    def weight(
        self, tensor: str, shape: tuple[int, ...], *, is_transposed: bool = False, offset: float = 0.0
    ) -> ir.Value:
        """Name a weight, of `shape` as it lies in the file; the writer of the file fills it in."""
        return self._weight(tensor, WeightSource((tensor,), is_transposed, offset), shape)

    def norm_weights(self, name: str, size: int, *, kind: NormKind, offset: float) -> list[ir.Value]:
        """Name what a norm multiplies by, and where it has one what it then adds."""
        gain = self.weight(f"{name}.weight", (size,), offset=offset)
        return [gain] if kind == "rms" else [gain, self.weight(f"{name}.bias", (size,))]

    def linear(self, hidden: ir.Value, name: str, n_in: int, n_out: int, *, has_bias: bool = False) -> ir.Value:
        """Multiply `hidden` (..., n_in) by a weight that lies in the file as (n_in, n_out)."""
        product = self.op.MatMul(hidden, self.weight(f"{name}.weight", (n_in, n_out), is_transposed=True))
        return self.op.Add(product, self.weight(f"{name}.bias", (n_out,))) if has_bias else product

    def linears(
        self, hidden: ir.Value, block: str, parts: dict[str, int], n_in: int, *, has_bias: bool = False
    ) -> list[ir.Value]:
        """Multiply `hidden` by several linears of a block, each named with its outputs; returns one value for each.

        A dialect that multiplies them stacked returns one value in all, their outputs side by side; here those with a
        bias are, which saves a node for each part.
        """
        if not has_bias:
            return [self.linear(hidden, f"{block}.{name}", n_in, n_out) for name, n_out in parts.items()]
        name, n_out = stack_name(block, parts), sum(parts.values())

        def stacked(kind: str, shape: tuple[int, ...], *, is_transposed: bool) -> ir.Value:
            tensors = tuple(f"{block}.{part}.{kind}" for part in parts)
            return self._weight(f"{name}.{kind}", WeightSource(tensors, is_transposed), shape)

        product = self.op.MatMul(hidden, stacked("weight", (n_in, n_out), is_transposed=True))
        return [self.op.Add(product, stacked("bias", (n_out,), is_transposed=False))]

    def rows(self, indices: ir.Value, name: str, shape: tuple[int, int], *, is_multiplied: bool) -> ir.Value:
        """Gather rows of a matrix of the checkpoint.

        Args:
            indices: int64, of any shape (...).
            name: of the matrix; `linear` multiplies by it too where `is_multiplied`.
            shape: rows and columns of the matrix.
            is_multiplied: whether it is stored once, as `linear` takes it.

        Returns:
            float32 (..., columns).
        """
        if not is_multiplied:
            return self.op.Gather(self.weight(f"{name}.weight", shape), indices)
        # Its columns, one per token: that costs nothing beside the product, and the matrix lies in the file once.
        columns = self.op.Gather(self.weight(f"{name}.weight", shape[::-1], is_transposed=True), indices, axis=1)
        return self.op.Transpose(columns, perm=[1, 2, 0])

    def kept_tokens(self, hidden: ir.Value, *, first: int) -> ir.Value:
        """Return (batch, kept, size) of (batch, T, size): the tokens whose logits are wanted, see `FIRST_LOGIT`.

        Args:
            hidden: of all tokens.
            first: the number that means all of them, 0 or any that is lower than -T.
        """
        return self.op.Slice(hidden, self.constant(np.array([first]), FIRST_LOGIT), [np.iinfo(np.int64).max], [1])

    def _weight(self, name: str, source: WeightSource, shape: tuple[int, ...]) -> ir.Value:
        name = f"{name}.transposed" if source.is_transposed else name
        if name not in self.weights:
            is_half = self._matrix_type == "fp16" and len(shape) == 2
            self.weights[name] = replace(source, is_half=is_half)
            value = ir.val(name, dtype=ir.DataType.FLOAT16 if is_half else ir.DataType.FLOAT, shape=shape)
            # A cast of a constant is done once, when the model is loaded.
            self._weight_values[name] = self.op.Cast(value, to=ir.DataType.FLOAT) if is_half else value
        return self._weight_values[name]

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
