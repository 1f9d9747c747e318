"""Whether the operator library works here, and which of its targets it uses: found out by using it.

A small product is computed in a process of its own (`python -m owl_deploy.operator_status LIBRARY MODEL`), because the
library chooses its target once per process. It is the one place that asks the processor what it can do; the targets
that this machine has are in what it answers to a target that no machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from owl_deploy.errors import EngineUnavailableError
from owl_deploy.kernels import library_path

__all__ = ["OperatorStatus", "operator_status"]

_VARIABLE = "OWL_KERNEL_TARGET"
_NO_TARGET = "none-such"
_BEFORE, _BEHIND = "this machine has", ": unset it"
_TIMEOUT_S = 120.0
_N_ROWS, _N_COLUMNS = 9, 70  # odd, so that every target meets the rest of a vector


@dataclass(frozen=True)
class OperatorStatus:
    """What the operator library does on this machine."""

    is_available: bool
    reason: str
    """Why it does not work and what to do, one sentence; empty when it does."""
    library: str | None
    targets: tuple[str, ...] = ()
    """Sets of instructions that it could use here, best first."""
    forced: str | None = None
    """What OWL_KERNEL_TARGET asks for, if it is set."""

    @property
    def target(self) -> str | None:
        """The one that it uses."""
        return self.forced or next(iter(self.targets), None) if self.is_available else None


def operator_status() -> OperatorStatus:
    """Load the library in ONNX Runtime, and have it compute a product of known result."""
    forced = os.environ.get(_VARIABLE) or None
    try:
        library = library_path()
    except EngineUnavailableError as error:
        return OperatorStatus(False, str(error), None, (), forced)
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
        model = Path(folder) / "product.onnx"
        expected = _write_product(model)
        answer = _answer(library, model, os.environ)
        known = _answer(library, model, {**os.environ, _VARIABLE: _NO_TARGET})
    targets = tuple(known.partition(_BEFORE)[2].partition(_BEHIND)[0].split())
    reason = ""
    if _VARIABLE in answer:
        reason = answer[answer.index(_VARIABLE) :]
    elif _number(answer) is None:
        reason = (
            f"the operator library {library} does not work: {answer or 'it says nothing'}; install owl-deploy again"
        )
    elif not np.isclose(_number(answer) or 0.0, expected, rtol=1e-5):
        reason = (
            f"the operator library {library} computes {answer} in place of {expected:.6g}: install owl-deploy again"
        )
    return OperatorStatus(not reason, reason, str(library), targets, forced)


def _write_product(path: Path) -> float:
    """Write a model of one sparse product, and return the sum of what it gives for ones."""
    from onnx import TensorProto, helper, save_model

    from owl_deploy.export.packing import pack_matrix

    weight = np.random.default_rng(0).standard_normal((_N_ROWS, _N_COLUMNS)).astype(np.float32)
    weight[weight < 0.3] = 0
    packed = pack_matrix(weight, precision="fp32", encoding="bitmask")
    node = helper.make_node("SparseMatMul", ["x", "w"], ["y"], domain="owl_deploy", N=_N_ROWS, K=_N_COLUMNS)
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", None]) for name in ("x", "y"))
    weights = helper.make_tensor("w", TensorProto.UINT8, [len(packed)], packed.tobytes(), raw=True)
    graph = helper.make_graph([node], "product", [inputs], [outputs], [weights])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("owl_deploy", 1)]
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return float(weight.sum(dtype=np.float64))


def _answer(library: Path, model: Path, environment: Mapping[str, str]) -> str:
    """Return the last line of what a process says that computes the product: the sum, or what went wrong."""
    command = [sys.executable, "-m", "owl_deploy.operator_status", str(library), str(model)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with code {done.returncode}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _compute(library: str, model: str) -> float:
    """Compute the product for ones in this process; returns the sum of the result."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    product = session.run(None, {"x": np.ones((1, _N_COLUMNS), np.float32)})[0]
    return float(np.asarray(product, dtype=np.float64).sum())


if __name__ == "__main__":
    try:
        print(_compute(sys.argv[1], sys.argv[2]))
    except Exception as error:  # noqa: BLE001  (the other side makes a sentence of it)
        print(" ".join(str(error).split()))
