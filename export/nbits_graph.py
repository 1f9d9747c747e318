"""A decoder graph whose linears are ONNX Runtime's own MatMulNBits: its best dense int8 and int4.

In: operators, one after the other, as for any `GraphWriter`. Out: besides the graph, which linears of the checkpoint
each quantised matrix is made of. No weight is read here, and no byte is laid out.

Columns share a scale in blocks of 32: a weight is scale x (code - zero point). The zero point is 2^(bits - 1), or one
of the block's own where the graph is not symmetric; either way zeros stay zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from owl_deploy.errors import UnsupportedModelError
from owl_deploy.export.graph import GraphWriter
from owl_deploy.recipe import Precision

__all__ = ["BLOCK_SIZE", "NBitsGraphWriter", "NBitsLinear"]

BLOCK_SIZE = 32
"""Columns that share a scale."""

_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}
_MICROSOFT: dict[str, Any] = {"_domain": "com.microsoft", "_version": 1}


@dataclass(frozen=True)
class NBitsLinear:
    """One quantised matrix of the data file: linears of the checkpoint (out, in), stacked by rows."""

    name: str
    """What the names of its initializers begin with."""
    parts: tuple[str, ...]
    """Linears of the checkpoint, top to bottom."""
    precision: Precision
    """int8 or int4."""
    is_symmetric: bool = True
    """False where each block has a zero point of its own."""
    has_bias: bool = False
    is_multiplied: bool = True
    """Whether a MatMulNBits takes it."""
    is_gathered: bool = False
    """Whether its rows are gathered too."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.precision]

    @property
    def codes_name(self) -> str:
        """Initializer that is the codes as they are multiplied, uint8 (out, ceil(in / 32), 4 x bits)."""
        return f"{self.name}.weight.codes"

    @property
    def scales_name(self) -> str:
        """Initializer that is the scales of the blocks, float32 (out, ceil(in / 32))."""
        return f"{self.name}.weight.scales"

    @property
    def zero_points_name(self) -> str:
        """Initializer that is the zero points of the blocks, uint8 (out, ceil(ceil(in / 32) x bits / 8))."""
        return f"{self.name}.weight.zero_points"

    @property
    def rows_name(self) -> str:
        """Initializer that is the same codes as they are gathered, uint8 (out, in x bits / 8)."""
        return f"{self.name}.weight.rows"

    @property
    def bias_name(self) -> str:
        """Initializer that is the bias, float32."""
        return f"{self.name}.bias"

    def inputs(self, n_in: int, n_out: int) -> list[ir.Value | None]:
        """Return what a MatMulNBits takes behind what it multiplies."""
        shape = (n_out, -(-n_in // BLOCK_SIZE), BLOCK_SIZE * self.bits // 8)
        values: list[ir.Value | None] = [ir.val(self.codes_name, dtype=ir.DataType.UINT8, shape=shape)]
        values += self.scales(n_in, n_out)
        if self.has_bias:
            values += [None] * (4 - len(values))
            values.append(ir.val(self.bias_name, dtype=ir.DataType.FLOAT, shape=(n_out,)))
        return values

    def scales(self, n_in: int, n_out: int) -> list[ir.Value]:
        """Return scales, and zero points where there are any."""
        n_blocks = -(-n_in // BLOCK_SIZE)
        values = [ir.val(self.scales_name, dtype=ir.DataType.FLOAT, shape=(n_out, n_blocks))]
        if not self.is_symmetric:
            n_bytes = -(-n_blocks * self.bits // 8)
            values.append(ir.val(self.zero_points_name, dtype=ir.DataType.UINT8, shape=(n_out, n_bytes)))
        return values


class NBitsGraphWriter(GraphWriter):
    """Writes every linear as one MatMulNBits, and several of one input as one."""

    def __init__(
        self,
        precision: Precision,
        head_precision: Precision,
        *,
        is_symmetric: bool,
        accuracy_level: int,
        opsets: dict[str, int],
        ir_version: int,
    ) -> None:
        super().__init__(opsets=opsets, ir_version=ir_version)
        self._precision: Precision = precision
        self._head_precision: Precision = head_precision
        self._is_symmetric = is_symmetric
        self._accuracy_level = accuracy_level
        self.quantized: dict[str, NBitsLinear] = {}
        """Quantised matrices by name, in the order of the file."""

    def linear(self, hidden: ir.Value, name: str, n_in: int, n_out: int, *, has_bias: bool = False) -> ir.Value:
        """Multiply `hidden` (..., n_in) by a quantised matrix of n_out rows."""
        precision = self._precision if ".layers." in name else self._head_precision
        if precision not in _BITS:
            return super().linear(hidden, name, n_in, n_out, has_bias=has_bias)
        # The head of a tied model: its rows are gathered already.
        is_gathered = name in self.quantized
        matrix = NBitsLinear(name, (name,), precision, self._is_symmetric, has_bias=has_bias, is_gathered=is_gathered)
        return self._product(hidden, matrix, n_in, n_out)

    def linears(
        self, hidden: ir.Value, block: str, parts: dict[str, int], n_in: int, *, has_bias: bool = False
    ) -> list[ir.Value]:
        """Multiply `hidden` by several linears stacked by rows; returns one value, their outputs side by side."""
        # q_proj, k_proj and v_proj become q_k_v_proj.
        name = f"{block}.{'_'.join(part.removesuffix('_proj') for part in parts)}_proj"
        linears = tuple(f"{block}.{part}" for part in parts)
        stack = NBitsLinear(name, linears, self._precision, self._is_symmetric, has_bias=has_bias)
        return [self._product(hidden, stack, n_in, sum(parts.values()))]

    def rows(self, indices: ir.Value, name: str, shape: tuple[int, int], *, is_multiplied: bool) -> ir.Value:
        """Gather rows of a matrix as `GraphWriter.rows` does; either way it is stored once.

        Raises:
            UnsupportedModelError: rows of this length are no whole blocks.
        """
        if self._head_precision not in _BITS:
            return super().rows(indices, name, shape, is_multiplied=is_multiplied)
        if shape[1] % BLOCK_SIZE:
            raise UnsupportedModelError(
                f"hidden size {shape[1]}: an embedding of {self._head_precision} takes a multiple of {BLOCK_SIZE}: "
                "export with head precision fp32"
            )
        matrix = NBitsLinear(
            name,
            (name,),
            self._head_precision,
            self._is_symmetric,
            is_multiplied=is_multiplied,
            is_gathered=True,
        )
        self.quantized[name] = matrix
        return self.op.GatherBlockQuantized(
            ir.val(matrix.rows_name, dtype=ir.DataType.UINT8, shape=(shape[0], shape[1] * matrix.bits // 8)),
            indices,
            *matrix.scales(shape[1], shape[0]),
            bits=matrix.bits,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
            **_MICROSOFT,
        )

    def _product(self, hidden: ir.Value, matrix: NBitsLinear, n_in: int, n_out: int) -> ir.Value:
        self.quantized[matrix.name] = matrix
        attributes = {"K": n_in, "N": n_out, "bits": matrix.bits, "block_size": BLOCK_SIZE}
        return self.op.MatMulNBits(
            hidden, *matrix.inputs(n_in, n_out), **attributes, accuracy_level=self._accuracy_level, **_MICROSOFT
        )
