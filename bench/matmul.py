"""Single products Y = X Wᵀ in every engine: dense and sparse, from one row of X to a long prompt.

In: shapes, sparsities, numbers of rows. Out: a table of times and ratios to ONNX Runtime's dense
float32 product of the same round. No model and no quality: weights and masks are random. Run it as
`python -m owl_deploy.bench.matmul`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from owl_deploy.engines.process import EngineProcess, open_worker
from owl_deploy.errors import EngineUnavailableError, OwlDeployError
from owl_deploy.export.cost_model import choose_encoding
from owl_deploy.export.machine_class import this_machine_class
from owl_deploy.export.packing import Precision, pack_matrix
from owl_deploy.kernels import library_path
from owl_deploy.threads import resolve_threads

__all__ = ["main", "measure_products"]

_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")


@dataclass
class _Case:
    """One engine with one kind of weights, while it is measured."""

    name: str
    engine: str
    model: Path
    operators: Path | None = None
    process: EngineProcess | None = None
    ns: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None


def measure_products(
    *, rows: int, columns: int, m: tuple[int, ...], sparsity: tuple[float, ...], threads: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Time a pair of products, W (rows, columns) and back, so that weights come from memory and not from a cache.

    Yields:
        One row per sparsity, M and case, as they are measured: median milliseconds of a pair, the
        median of the ratios to the dense float32 product of the same round, and the largest difference
        from its output, relative to the largest element; or the reason why an engine failed.
    """
    for target in sparsity:
        weights = _weights(rows, columns, target)
        with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
            cases = _write_cases(weights, Path(folder))
            for n_rows in m:
                for case in cases:
                    case.process, case.ns, case.error, case.reason = None, [], None, None
                _measure(cases, [1, n_rows, columns], threads, rounds, Path(folder))
                yield from (_row(case, cases[0], target, n_rows, threads) for case in cases)


def _weights(rows: int, columns: int, sparsity: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return two random matrices, (rows, columns) and (columns, rows), with zeros at random places."""
    random = np.random.default_rng(0)

    def matrix(n: int, k: int) -> NDArray[np.float32]:
        weight = random.standard_normal((n, k), np.float32) / np.float32((k * (1 - sparsity)) ** 0.5)
        weight[random.random((n, k), np.float32) < sparsity] = 0
        return weight

    return matrix(rows, columns), matrix(columns, rows)


def _write_cases(weights: tuple[NDArray[np.float32], ...], folder: Path) -> list[_Case]:
    """Write one graph for each kind of weights."""
    dense = folder / "dense.onnx"
    _save(dense, [np.ascontiguousarray(weight.T) for weight in weights], None)
    cases = [_Case("onnxruntime dense fp32", "onnxruntime", dense), _Case("deepsparse fp32", "deepsparse", dense)]
    for precision in _PRECISIONS:
        model = folder / f"{precision}.onnx"
        packed = [pack_matrix(weight, precision=precision, encoding=_encoding(weight, precision)) for weight in weights]
        _save(model, packed, [(weight.shape[0], weight.shape[1]) for weight in weights])
        cases.append(_Case(f"sparse operator {precision}", "onnxruntime", model, library_path()))
    return cases


def _encoding(weight: NDArray[np.float32], precision: Precision) -> Any:
    shape = (weight.shape[0], weight.shape[1])
    return choose_encoding(shape, int(np.count_nonzero(weight)), precision, machine_class=this_machine_class())


def _save(path: Path, initializers: list[NDArray[Any]], shapes: list[tuple[int, int]] | None) -> None:
    """Write a chain of products, of MatMul (in, out) or, with `shapes` (N, K), of SparseMatMul."""
    nodes, tensors = [], []
    value = "x"
    for i, array in enumerate(initializers):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensors.append(helper.make_tensor(f"w{i}", kind, array.shape, array.tobytes(), raw=True))
        output = "y" if i + 1 == len(initializers) else f"y{i}"
        if shapes is None:
            nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [output]))
        else:
            n, k = shapes[i]
            nodes.append(helper.make_node("SparseMatMul", [value, f"w{i}"], [output], domain="owl_deploy", N=n, K=k))
        value = output
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "m", "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "m", "n"])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("owl_deploy", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets[: 1 if shapes is None else 2], ir_version=8), path)


@contextmanager
def _static_copy(case: _Case, shape: list[int], folder: Path) -> Iterator[Path]:
    """Give DeepSparse, which wants every size written down, a copy of the graph; others get the graph itself."""
    if case.engine != "deepsparse":
        yield case.model
        return
    model = onnx.load_model(case.model)
    for value in (*model.graph.input, *model.graph.output):
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size  # a chain ends with as many columns as it begins with
    path = folder / "static.onnx"
    onnx.save_model(model, path)
    yield path
    path.unlink()


def _measure(cases: list[_Case], shape: list[int], threads: int, rounds: int, folder: Path) -> None:
    """Open every case, then time all of them in turn; a failure is remembered and the others go on."""
    with ExitStack() as stack:
        for case in cases:
            try:
                with _static_copy(case, shape, folder) as model:
                    case.process = stack.enter_context(open_worker(case.engine))
                    operators = None if case.operators is None else str(case.operators)
                    case.process.ask("open-graph", model=str(model), threads=threads, shape=shape, operators=operators)
                case.process.ask("measure-graph", n_samples=3, output=str(folder / f"{case.name}.npy"))
                case.error = _difference(folder / f"{cases[0].name}.npy", folder / f"{case.name}.npy")
            except EngineUnavailableError as error:
                if case is cases[0]:
                    raise  # nothing is left to compare with
                case.reason = str(error)
        for _ in range(rounds):
            for case in cases:
                if case.process is not None and case.reason is None:
                    # The first calls after the other engines' turns find cold caches and sleeping threads.
                    n_cold, n_samples = (4, 12) if shape[1] <= 16 else (1, 3)
                    try:
                        answer = case.process.ask("measure-graph", n_samples=n_cold + n_samples, output=None)
                    except EngineUnavailableError as error:
                        if case is cases[0]:
                            raise
                        case.reason = str(error)
                        continue
                    case.ns.append(float(np.median(answer["ns"][n_cold:])))


def _difference(expected: Path, found: Path) -> float:
    reference, output = np.load(expected, allow_pickle=False), np.load(found, allow_pickle=False)
    return float(np.abs(output - reference).max() / np.abs(reference).max())


def _row(case: _Case, dense: _Case, sparsity: float, n_rows: int, threads: int) -> dict[str, Any]:
    is_ok = case.reason is None
    return {
        "sparsity": sparsity,
        "m": n_rows,
        "case": case.name,
        "threads": threads,
        "ms": float(np.median(case.ns)) / 1e6 if is_ok else None,
        "ratio": float(np.median(np.divide(dense.ns, case.ns))) if is_ok else None,
        "relative_difference": case.error,
        "reason": case.reason,
        "samples_ns": case.ns,
    }


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, such as 0.5,0.7") from None


@click.command()
@click.option("--rows", default=4096, show_default=True, help="Rows of the first matrix; the second is its transpose.")
@click.option("--columns", default=11008, show_default=True, help="Columns of the first matrix.")
@click.option("--m", "m", default="1,16,64,128,256", show_default=True, callback=_numbers, help="Rows of X.")
@click.option(
    "--sparsity", default="0.5,0.7,0.8,0.9", show_default=True, callback=_numbers, help="Zeros over elements."
)
@click.option("--threads", default=0, help="Threads of every engine; 0 is what affinity and cgroup allow.")
@click.option("--rounds", default=7, show_default=True, help="Interleaved rounds; every engine is timed in each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, raw samples included.")
def main(
    rows: int, columns: int, m: tuple[float, ...], sparsity: tuple[float, ...], threads: int, rounds: int, as_json: bool
) -> None:
    """Time pairs of products in ONNX Runtime, DeepSparse and the sparse operator.

    Example: python -m owl_deploy.bench.matmul --m 1,128 --sparsity 0.7
    """
    n_threads = threads or resolve_threads("auto").n
    results = measure_products(
        rows=rows, columns=columns, m=tuple(map(int, m)), sparsity=sparsity, threads=n_threads, rounds=rounds
    )
    try:
        if as_json:
            click.echo(json.dumps({"rows": rows, "columns": columns, "results": list(results)}, indent=1))
            return
        click.echo(f"W {rows} x {columns} and back, {n_threads} threads; ratio: to dense float32 of the same round")
        for row in results:
            _print_row(row)
    except OwlDeployError as error:
        raise click.ClickException(str(error)) from error


def _print_row(row: dict[str, Any]) -> None:
    if row["case"] == "onnxruntime dense fp32":
        click.echo(f"\nsparsity {row['sparsity']:g}, M = {row['m']}")
    if row["reason"] is not None:
        click.echo(f"{row['case']:24} failed: {row['reason']}")
        return
    click.echo(
        f"{row['case']:24} {row['ms']:9.3f} ms {row['ratio']:7.2f}x   "
        f"largest difference {row['relative_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
