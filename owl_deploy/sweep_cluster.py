"""The cells of a sweep on the machines of a Ray cluster; the results are those of one machine.

In: a recipe with a `sweep` key, a folder, and the address of a cluster in RAY_ADDRESS (without one, Ray is started on
this machine). Out: what `sweep.run_sweep` writes. Every cell is one task, made from beginning to end on one machine, in
a scratch folder of its own; what travels back is its record. How a cell is made is not known here.

Every machine needs this package, of the same versions, and the model and the texts under the names that the recipe
gives them.
"""

from __future__ import annotations

import glob
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import EngineUnavailableError, OwlDeployError
from owl_deploy.files import write_json
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.published import without_folders
from owl_deploy.recipe import Recipe
from owl_deploy.sweep import measure_dense, run_sweep
from owl_deploy.sweep_grid import Cell, chosen_cells
from owl_deploy.sweep_line import has_line
from owl_deploy.sweep_records import SweepRecords, read_json, write_results

if TYPE_CHECKING:
    import ray

__all__ = ["run_sweep_on_cluster"]

log = logging.getLogger(__name__)

_RETRIES = 3
"""Times that a cell is made anew whose worker died: of a full memory, or with its machine."""
_LISTEN_S = 0.5
_LONGEST_CONNECT_S = 10.0

Files = dict[str, Any]
"""JSON documents by file name."""


def run_sweep_on_cluster(
    recipe: Recipe,
    *,
    out: Path,
    only: str = "*",
    command: str = "owl-deploy sweep",
    offline: bool = False,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """As `sweep.run_sweep`, the cells on the machines of a Ray cluster.

    A cell takes `threads` processors of a machine, with `auto` all of the smallest one. A cell whose worker dies is
    made again, three times; then it is a row that says so.

    Raises:
        EngineUnavailableError: Ray is not installed, or the cluster does not answer.
        OwlDeployError: as `sweep.run_sweep`.
    """
    records = SweepRecords.open(recipe, out, offline=offline)
    to_do = [cell for cell in chosen_cells(records.cells, only) if records.finished(cell) is None]
    records.folder.mkdir(parents=True, exist_ok=True)
    with _cluster() as ray:
        make = _remote(ray, recipe)
        shared = (recipe.model_dump(mode="json"), str(Path.cwd()), offline)
        if not has_line(recipe) and records.finished(None) is None:
            on_step(Step("sweep", 0, len(to_do), "the dense model"))
            _keep(records, None, _wait(ray, [make.remote(None, {}, *shared)], on_step))
        dense = {item.name: read_json(item) for item in records.folder.glob("dense*.json")}
        running = {make.remote(cell.name, dense, *shared): cell for cell in to_do}
        try:
            for done, (cell, files) in enumerate(_finished(ray, running, on_step, len(to_do)), start=1):
                _keep(records, cell, files)
                write_results(records, command)
                on_step(Step("sweep", done, len(to_do), cell.name))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
    return write_results(records, command)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EngineUnavailableError("ray is not installed: pip install 'owl-deploy[ray]'") from error
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for eight minutes
            socket.create_connection((host, int(port)), timeout=_LONGEST_CONNECT_S).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineUnavailableError(
            f"the Ray cluster {address or 'of this machine'} does not answer ({reason}): start it, or set RAY_ADDRESS "
            "to one that runs"
        ) from error
    try:
        for number, handler in handlers.items():  # Ray brings its own, which ends the process where it stands
            signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def _remote(ray: Any, recipe: Recipe) -> Any:
    """Return the task that makes a cell."""
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = recipe.threads if isinstance(recipe.threads, int) else min(size for size in sizes if size)
    if not any(size >= cpus for size in sizes):
        raise OwlDeployError(
            f"no machine of the cluster has {cpus} processors (they have {', '.join(map(str, sizes))}): lower threads"
        )
    return ray.remote(_make).options(num_cpus=cpus, max_retries=_RETRIES, scheduling_strategy="SPREAD")


def _make(name: str | None, dense: Mapping[str, Any], recipe: dict[str, Any], folder: str, offline: bool) -> Files:
    """Make a cell, or what belongs to the dense model (None), on the machine where this runs; return its records."""
    if Path(folder).is_dir():  # relative paths mean the same here as where the sweep was started
        os.chdir(folder)
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as scratch:
        cells = Path(scratch) / "cells"
        cells.mkdir()
        for file, document in dense.items():
            write_json(cells / file, document)
        settings = Recipe.model_validate(recipe)
        if name is None:
            measure_dense(settings, out=Path(scratch), offline=offline)
        else:
            run_sweep(settings, out=Path(scratch), only=glob.escape(name), offline=offline)
        found = {item.name: read_json(item) for item in sorted(cells.glob("*.json"))}
    return {file: document for file, document in found.items() if file not in dense and document is not None}


def _finished(
    ray: Any, running: dict[ray.ObjectRef[Any], Cell], on_step: OnStep, total: int
) -> Iterator[tuple[Cell, Files | str]]:
    """Yield cells in the order in which they are finished, with their records or with why there are none."""
    while running:
        ready, _ = ray.wait(list(running), timeout=_LISTEN_S)
        on_step(Step("sweep", total - len(running), total, f"{len(running)} cells to come"))  # also asks for a stop
        for reference in ready:
            yield running.pop(reference), _result(ray, reference)


def _wait(ray: Any, references: list[Any], on_step: OnStep) -> Files | str:
    while not ray.wait(references, timeout=_LISTEN_S)[0]:
        on_step(Step("sweep", 0, 1, "the dense model"))
    return _result(ray, references[0])


def _result(ray: Any, reference: Any) -> Files | str:
    try:
        files: Files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        own = isinstance(cause, OwlDeployError)
        return " ".join(f"{'' if own else f'{type(cause).__name__}: '}{cause}".split())
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [""]
        return f"its worker died {_RETRIES + 1} times: {type(error).__name__}: {lines[0]}"
    return files


def _keep(records: SweepRecords, cell: Cell | None, found: Files | str) -> None:
    """Put on record what came back of a cell, or of the dense model, which no sweep can do without."""
    name = cell.name if cell else "dense"
    if not isinstance(found, str):
        identity = found.get(f"{name}.json", {}).get("identity")
        if identity == records.identity(cell):
            for file, document in found.items():
                write_json(records.folder / file, document)
            return
        found = f"the machine that made it has other versions or files: {_difference(identity, records.identity(cell))}"
    if cell is None:
        raise OwlDeployError(f"the dense model was not measured: {found}")
    log.warning("%s failed: %s", name, found)
    records.record(cell, {"status": "failed", "reason": without_folders(found)})


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "it sent no record"
    other = [key for key in wanted if found.get(key) != wanted[key]]
    return ", ".join(f"{key} {found.get(key)} instead of {wanted[key]}" for key in other)[:300]
