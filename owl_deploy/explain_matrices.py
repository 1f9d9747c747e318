"""What every matrix of an artifact takes and what its zeros give, by its manifest and the cost model.

In: a manifest and the facts of its graph. Out: one frozen value for each matrix that a decode step multiplies: bytes
stored and read, the sparsity from which sparsity would pay, and why it does not. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.explain_graph import GraphFacts
from owl_deploy.export.cost_model import MachineClass, choose_encoding, product_ns
from owl_deploy.export.families import FAMILIES, Family
from owl_deploy.export.machine_class import this_machine_class
from owl_deploy.export.packing import VALUE_BITS, Encoding, Precision, packed_bytes

__all__ = ["MatrixFacts", "break_even", "dense_bytes", "matrix_facts"]

_COLUMNS_PER_SCALE = 32
"""Of MatMulNBits; `export.nbits_graph` says so too, and needs libraries that running an artifact does not."""


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix that is multiplied at every step."""

    name: str
    """Of its initializer."""
    part: str
    """qkv, o, gate_up (up where the MLP has no gate), down or other of the blocks, or head."""
    shape: tuple[int, int]
    """Outputs, inputs."""
    sparsity: float
    encoding: str
    precision: Precision
    bytes: int
    """In the file."""
    bytes_dense: int
    """In the file, were it stored dense in the same precision."""
    read_bytes: int
    """Of memory, at every step."""
    read_bytes_dense: int
    """The same, were it stored dense in the same precision."""
    break_even: float | None
    """Sparsity from which SparseMatMul is predicted to be faster than on the dense matrix; None where nothing is, or
    where another engine multiplies."""
    pays: bool | None
    """Whether its zeros make the product faster here; None where the engine does not tell."""
    reason: str | None
    """Why they do not."""

    @property
    def is_in_block(self) -> bool:
        """Whether pruning takes it."""
        return self.part != "head"

    @property
    def n_weights(self) -> int:
        """Zeros included."""
        return self.shape[0] * self.shape[1]


class _Entry(BaseModel):
    """A matrix as a manifest lists it."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, int]
    sparsity: float = Field(ge=0, le=1)
    encoding: str
    precision: Precision
    bytes: int = Field(ge=0)


class _Packing(BaseModel):
    """How the matrices of a sparse-operator artifact were packed, as its manifest tells."""

    encoding: Literal["auto", "dense", "bitmask", "index16"]
    machine: MachineClass


_ENTRIES = TypeAdapter(list[_Entry])


def matrix_facts(artifact: OnnxArtifact, graph: GraphFacts) -> list[MatrixFacts]:
    """Return the matrices that a decode step multiplies, in the order of the manifest.

    Raises:
        UnsupportedModelError: the manifest does not describe its matrices as this version does, or other ones than the
            graph multiplies.
    """
    try:
        entries = _ENTRIES.validate_python(artifact.manifest.get("matrices"))
        packing = None
        if artifact.facts.weights == "sparse-operator":
            packing = _Packing.model_validate(artifact.manifest.get("settings"))
    except ValidationError as error:
        raise UnsupportedModelError(
            f"the manifest of {artifact.path} does not describe its matrices as this version does "
            f"({' '.join(str(error.errors()[0]['msg']).split())}): export the model again"
        ) from error
    multiplied = [entry for entry in entries if entry.name in graph.read_whole]
    n_weights = sum(entry.shape[0] * entry.shape[1] for entry in multiplied)
    if 4 * n_weights != artifact.facts.bytes_per_decode_step["dense"]:
        raise UnsupportedModelError(
            f"the manifest of {artifact.path} tells of other matrices than its model.onnx multiplies: "
            "export the model again"
        )
    return [_facts(entry, artifact, graph, packing) for entry in multiplied]


@cache
def break_even(
    shape: tuple[int, int], precision: Precision, machine: MachineClass, encoding: Encoding | None = None
) -> float | None:
    """Return the least sparsity at which the cost model finds an encoding faster than the dense one.

    Args:
        shape: outputs, inputs.
        precision: value type.
        machine: whose kernels.
        encoding: the only one that is considered; None: the fastest.

    Returns:
        A fraction; None where not even a matrix of zeros would be faster.
    """
    n_weights = shape[0] * shape[1]

    def pays(n_nonzeros: int) -> bool:
        if encoding is None:
            return choose_encoding(shape, n_nonzeros, precision, machine_class=machine) != "dense"
        ns = (product_ns(shape, n_nonzeros, precision, kind, machine_class=machine) for kind in (encoding, "dense"))
        return next(ns) <= next(ns)

    if not pays(0):
        return None
    most, too_many = 0, n_weights + 1  # more non-zeros never take less time
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if pays(middle) else (most, middle)
    return 1 - most / n_weights


def dense_bytes(shape: tuple[int, int], precision: Precision) -> int:
    """Return what ONNX Runtime reads of a dense matrix at every step: float32, or codes and scales of MatMulNBits."""
    if precision not in ("int8", "int4"):
        return 4 * shape[0] * shape[1]
    n_scales = -(-shape[1] // _COLUMNS_PER_SCALE)
    return shape[0] * n_scales * (_COLUMNS_PER_SCALE * VALUE_BITS[precision] // 8 + 4)


def _facts(entry: _Entry, artifact: OnnxArtifact, graph: GraphFacts, packing: _Packing | None) -> MatrixFacts:
    module, _, form = entry.name.rpartition(".weight")
    shape = entry.shape[::-1] if form == ".transposed" else entry.shape
    n_weights = shape[0] * shape[1]
    n_nonzeros = round((1 - entry.sparsity) * n_weights)
    value_bytes = VALUE_BITS[entry.precision] / 8
    pays: bool | None = False
    needed: float | None
    if packing is not None and entry.encoding.startswith("packed-"):
        bytes_dense = read_dense = packed_bytes(shape, n_weights, entry.precision, "dense")
        read = entry.bytes
        is_gathered = f"{module}.weight" in graph.gathered
        needed, reason = _packed_break_even(entry, shape, packing, is_gathered=is_gathered)
        pays = reason is None
    elif entry.encoding.startswith("nbits"):
        bytes_dense = read_dense = read = entry.bytes
        needed, reason = break_even(shape, entry.precision, this_machine_class()), "its zeros are multiplied too"
    elif artifact.facts.target == "deepsparse":
        bytes_dense = read_dense = round(value_bytes * n_weights)
        read = round(value_bytes * n_nonzeros)
        pays = needed = reason = None
    else:
        bytes_dense, read, read_dense = round(value_bytes * n_weights), 4 * n_weights, 4 * n_weights
        needed = break_even(shape, entry.precision, this_machine_class())
        reason = "its zeros are multiplied too"
        if entry.encoding != "dense":
            reason = "smaller in the file, but expanded when it is loaded"
        elif artifact.facts.weights == "sparse-initializer":
            reason = f"fewer zeros than the {_smaller_from(n_weights, value_bytes):.1%} from which its file is smaller"
    return MatrixFacts(
        name=entry.name,
        part=_part(module, shape[0], artifact),
        shape=shape,
        sparsity=entry.sparsity,
        encoding=entry.encoding,
        precision=entry.precision,
        bytes=entry.bytes,
        bytes_dense=bytes_dense,
        read_bytes=read,
        read_bytes_dense=read_dense,
        break_even=needed,
        pays=pays,
        reason=reason,
    )


def _packed_break_even(
    entry: _Entry, shape: tuple[int, int], packing: _Packing, *, is_gathered: bool
) -> tuple[float | None, str | None]:
    """Return from which sparsity a packed matrix pays, and why it does not, if so."""
    stored = entry.encoding.removeprefix("packed-")
    asked = packing.encoding if packing.encoding in ("bitmask", "index16") else None
    needed = break_even(shape, entry.precision, packing.machine, asked)
    where = f"{entry.precision} on {packing.machine}"
    limit = f"no number of zeros pays in {where}"
    if needed is not None:
        limit = f"{'more' if entry.sparsity >= needed else 'fewer'} zeros than the {needed:.1%} from which {where} pays"
    if stored != "dense":
        pays = needed is not None and entry.sparsity >= needed
        return needed, None if pays else f"{limit}, but packed as {stored}"
    if is_gathered:
        return needed, "always dense, because its rows are gathered as the embedding"
    if packing.encoding == "dense":
        return needed, "packed dense, as asked"
    return needed, limit


def _smaller_from(n_weights: int, value_bytes: float) -> float:
    """Return the sparsity from which positions in varints take less than the zeros, if they are evenly spread."""
    position_bytes = 1 + sum(max(0, n_weights - (1 << 7 * k)) for k in range(1, 10)) / n_weights
    return position_bytes / (value_bytes + position_bytes)


def _part(module: str, n_outputs: int, artifact: OnnxArtifact) -> str:
    """Return what a module multiplies for."""
    family = FAMILIES.get(str(artifact.manifest.get("model_type")), Family())
    names = family.names
    number, _, inside = module.removeprefix(f"{names.blocks}.").partition(".")
    if not module.startswith(f"{names.blocks}.") or not number.isdigit():
        return "head" if n_outputs == artifact.facts.vocab_size else "other"
    if inside == f"{names.attention}.{names.attention_output}":
        return "o"
    if inside.startswith(f"{names.attention}."):
        return "qkv"
    if inside == f"{names.mlp}.{names.mlp_output}".removeprefix("."):
        return "down"
    return "gate_up" if family.is_gated else "up"
