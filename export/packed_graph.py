"""A decoder graph whose linears are SparseMatMul over packed matrices (see `kernels/FORMAT.md`).

In: operators, one after the other, as for any `GraphWriter`. Out: besides the graph, which linears
of the checkpoint each packed matrix is made of. No weight is read here, and no byte is laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.graph import GraphWriter, stack_name
from owl_deploy.recipe import Precision

__all__ = ["OPERATORS", "OPERATOR_DOMAIN", "PackedGraphWriter", "PackedLinear"]

OPERATOR_DOMAIN = "owl_deploy"
OPERATORS: dict[str, Any] = {"_domain": OPERATOR_DOMAIN, "_version": 1}
"""What nodes of the operator library are made with."""

_ROW_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class PackedLinear:
    """One packed matrix of the data file: linears of the checkpoint (out, in), stacked by rows."""

    name: str
    """What the names of its initializers begin with."""
    parts: tuple[str, ...]
    """Linears of the checkpoint, top to bottom."""
    precision: Precision
    has_bias: bool = False
    is_multiplied: bool = True
    """Whether a SparseMatMul takes it."""
    is_gathered: bool = False
    """Whether its rows are gathered too: it is then packed dense, without group scales."""

    @property
    def matrix_name(self) -> str:
        """Initializer that is the packed matrix as a whole, uint8."""
        return f"{self.name}.weight.packed"

    @property
    def bias_name(self) -> str:
        """Initializer that is the bias, float32."""
        return f"{self.name}.bias"

    @property
    def rows_name(self) -> str:
        """Initializer that is the packed values, (out, in)."""
        return f"{self.name}.weight"

    @property
    def row_scales_name(self) -> str:
        """Initializer that is the packed scales of its rows, (out, 1) float32."""
        return f"{self.name}.weight.row_scales"

    def inputs(self, n_out: int) -> list[ir.Value]:
        """Return what a SparseMatMul takes behind what it multiplies."""
        values = [ir.val(self.matrix_name, dtype=ir.DataType.UINT8)]
        if self.has_bias:
            values.append(ir.val(self.bias_name, dtype=ir.DataType.FLOAT, shape=(n_out,)))
        return values


class PackedGraphWriter(GraphWriter):
    """Writes every linear as one SparseMatMul, and several of one input as one."""

    has_operators = True

    def __init__(
        self, precision: Precision, head_precision: Precision, *, opsets: dict[str, int], ir_version: int
    ) -> None:
        super().__init__(opsets=opsets, ir_version=ir_version)
        self._precision: Precision = precision
        self._head_precision: Precision = head_precision
        self.packed: dict[str, PackedLinear] = {}
        """Packed matrices by name, in the order of the file."""

    def linear(self, hidden: ir.Value, name: str, n_in: int, n_out: int, *, has_bias: bool = False) -> ir.Value:
        """Multiply `hidden` (..., n_in) by a packed matrix of n_out rows."""
        is_in_block = ".layers." in name
        # The head of a tied model: its rows are gathered already.
        is_gathered = name in self.packed
        self.packed[name] = PackedLinear(
            name,
            (name,),
            self._precision if is_in_block else self._head_precision,
            has_bias=has_bias,
            is_gathered=is_gathered,
        )
        return self._product(hidden, self.packed[name], n_in, n_out)

    def linears(
        self, hidden: ir.Value, block: str, parts: dict[str, int], n_in: int, *, has_bias: bool = False
    ) -> list[ir.Value]:
        """Multiply `hidden` by several linears stacked by rows; returns one value, their outputs side by side."""
        name = stack_name(block, parts)
        # The error of queries and keys passes through softmax: with these in int8 the KL divergence of SmolLM2-135M in
        # int4 is 0.18 nats instead of 0.30, and 0.07 instead of 0.12 at 60 % sparsity, for 8 to 14 % more bytes.
        precision = "int8" if self._precision == "int4" and next(iter(parts)).startswith("q") else self._precision
        stack = PackedLinear(name, tuple(f"{block}.{part}" for part in parts), precision, has_bias=has_bias)
        self.packed[name] = stack
        return [self._product(hidden, stack, n_in, sum(parts.values()))]

    def rows(self, indices: ir.Value, name: str, shape: tuple[int, int], *, is_multiplied: bool) -> ir.Value:
        """Gather rows of a matrix as `GraphWriter.rows` does; either way it is stored once.

        Raises:
            UnsupportedModelError: packed rows of this length do not lie one right behind the other.
        """
        op, kind = self.op, _ROW_TYPES[self._head_precision]
        if shape[1] * kind.itemsize % 8:
            raise UnsupportedModelError(
                f"hidden size {shape[1]}: rows of {self._head_precision} values are gathered from packed matrices "
                f"only where they take a multiple of 8 bytes: export with weights dense"
            )
        matrix = PackedLinear(name, (name,), self._head_precision, is_multiplied=is_multiplied, is_gathered=True)
        self.packed[name] = matrix
        rows = op.Gather(ir.val(matrix.rows_name, dtype=kind, shape=shape), indices)
        if kind == ir.DataType.FLOAT:
            return rows
        rows = op.Cast(rows, to=ir.DataType.FLOAT)
        if kind == ir.DataType.FLOAT16:
            return rows
        scales = ir.val(matrix.row_scales_name, dtype=ir.DataType.FLOAT, shape=(shape[0], 1))
        return op.Mul(rows, op.Gather(scales, indices))

    def _product(self, hidden: ir.Value, matrix: PackedLinear, n_in: int, n_out: int) -> ir.Value:
        inputs = matrix.inputs(n_out)
        return self.op.SparseMatMul(hidden, *inputs, N=n_out, K=n_in, **OPERATORS)
