"""The operator library: found where it was built, refused with a sentence where it is missing or of another machine."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from owl_deploy import kernels
from owl_deploy.errors import EngineUnavailableError
from owl_deploy.export.packing import pack_matrix


def test_library_exports_the_function_that_onnxruntime_asks_for() -> None:
    assert ctypes.CDLL(str(kernels.library_path())).RegisterCustomOps


def test_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _package: tmp_path)
    with pytest.raises(EngineUnavailableError, match=r"wheel\.cmake=false"):
        kernels.library_path()


def test_library_of_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = bytearray(kernels.library_path().read_bytes()[:4096])
    library[18:20] = (243).to_bytes(2, "little")  # e_machine of RISC-V
    (tmp_path / kernels.library_path().name).write_bytes(library)
    monkeypatch.setattr("importlib.resources.files", lambda _package: tmp_path)
    with pytest.raises(EngineUnavailableError, match="ELF machine 243"):
        kernels.library_path()


def _product(weight: np.ndarray, *, k: int | None = None, damage: int | None = None) -> bytes:
    packed = pack_matrix(weight, precision="fp32", encoding="bitmask")
    if damage is not None:
        packed[damage] ^= 0xFF
    node = helper.make_node(
        "SparseMatMul", ["x", "w"], ["y"], domain="owl_deploy", N=weight.shape[0], K=k or weight.shape[1]
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "m", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "m", None])],
        [helper.make_tensor("w", TensorProto.UINT8, [len(packed)], packed.tobytes(), raw=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("owl_deploy", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


_SCRIPT = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(sys.argv[1])
try:
    session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
    print(session.run(None, {"x": np.ones((1, 2, int(sys.argv[3])), np.float32)})[0].sum())
except Exception as error:
    print(type(error).__name__, error)
"""


def _run(model: bytes, columns: int, tmp_path: Path, **environment: str) -> str:
    """Run a product in a process of its own, so that the target is chosen anew; return what it prints."""
    path = tmp_path / "product.onnx"
    path.write_bytes(model)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(kernels.library_path()), str(path), str(columns)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout


def test_every_target_of_this_machine_gives_the_same_sum(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((9, 70)).astype(np.float32)
    weight[weight < 0.3] = 0
    sentence = _run(_product(weight), 70, tmp_path, OWL_KERNEL_TARGET="vax")
    assert "OWL_KERNEL_TARGET is vax" in sentence
    targets = sentence.split("this machine has ")[1].split(":")[0].split()
    assert targets[-1] == "portable"
    for target in targets:
        assert float(_run(_product(weight), 70, tmp_path, OWL_KERNEL_TARGET=target)) == pytest.approx(
            2 * weight.sum(), rel=1e-5
        )


@pytest.mark.parametrize(
    ("model", "columns", "words"),
    [
        (_product(np.ones((3, 64), np.float32), k=65), 65, "the node says N = 3, K = 65"),
        (_product(np.ones((3, 64), np.float32)), 65, "X must be float32 [..., 64], found shape [1, 2, 65]"),
        (_product(np.ones((3, 64), np.float32), damage=8), 64, "version"),
        (_product(np.ones((3, 64), np.float32), damage=0), 64, "packed matrix"),
    ],
    ids=["other K", "other X", "version", "magic"],
)
def test_what_does_not_fit_is_one_sentence(model: bytes, columns: int, words: str, tmp_path: Path) -> None:
    assert words in _run(model, columns, tmp_path)


def test_shape_is_inferred_from_the_node(tmp_path: Path) -> None:
    script = _SCRIPT.replace("print(session.run", "print(session.get_outputs()[0].shape, session.run")
    path = tmp_path / "product.onnx"
    model = onnx.load_model_from_string(_product(np.ones((3, 64), np.float32)))
    model.graph.output[0].ClearField("type")
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    path.write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", script, str(kernels.library_path()), str(path), "64"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "3]" in done.stdout


_MEMORY_SCRIPT = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[1])
before = anonymous()
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": np.ones((1, 1, 4096), np.float32)})
print(anonymous() - before)
"""


def test_packed_matrix_is_read_where_the_file_is_mapped(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    model = onnx.load_model_from_string(_product(weight))
    onnx.save_model(model, tmp_path / "product.onnx", save_as_external_data=True, location="product.data")
    assert (tmp_path / "product.data").stat().st_size > weight.nbytes
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, str(kernels.library_path()), str(tmp_path / "product.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < weight.nbytes / 4


def test_thousands_of_rows(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 130)).astype(np.float32)
    script = _SCRIPT.replace("(1, 2, ", "(1, 5000, ")
    path = tmp_path / "product.onnx"
    path.write_bytes(_product(weight))
    done = subprocess.run(
        [sys.executable, "-c", script, str(kernels.library_path()), str(path), "130"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(5000 * weight.sum(dtype=np.float64), rel=1e-3)
