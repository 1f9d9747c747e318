"""A graph whose weights are still to be written: what every route to a graph hands on to what fills it."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

from owl_deploy.export.decoder import WeightSource
from owl_deploy.export.int8_graph import Int8Linear
from owl_deploy.export.nbits_graph import NBitsLinear
from owl_deploy.export.packed_graph import PackedLinear

__all__ = ["UnfilledGraph"]


@dataclass(frozen=True)
class UnfilledGraph:
    """Nodes and small constants, and what the other initializers are to be filled with."""

    model: onnx.ModelProto
    weights: dict[str, WeightSource]
    """Initializer name -> where that weight comes from."""
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    """Name -> linears that a SparseMatMul takes; empty for other kinds of weights."""
    quantized: dict[str, NBitsLinear] = field(default_factory=dict)
    """Name -> linears that a MatMulNBits takes; empty for other kinds of weights."""

    integers: dict[str, Int8Linear] = field(default_factory=dict)
    """Name -> linear that a MatMulInteger takes; empty for other kinds of weights."""
    in_constants: frozenset[str] = frozenset()
    """Tensors that the graph holds already, as constants."""

    def used_tensors(self) -> set[str]:
        """Return the names of all tensors that it is filled from."""
        used = {tensor for source in self.weights.values() for tensor in source.tensors} | self.in_constants
        used |= {f"{name}.weight" for name in self.integers}
        linears: list[PackedLinear | NBitsLinear] = [*self.packed.values(), *self.quantized.values()]
        for linear in linears:
            used |= {f"{part}.weight" for part in linear.parts}
            used |= {f"{part}.bias" for part in linear.parts if linear.has_bias}
        return used
