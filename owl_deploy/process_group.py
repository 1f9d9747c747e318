"""Processes that train one model together: each holds a share of every parameter and takes a share of every batch.

In: models, sequences, figures of one process. Out: its share of them, and what all processes have together. A process
alone has all of everything, so that training reads the same with one and with several. Parameters are shared out by
torch's FSDP2 (`fully_shard`), which accelerate wraps too, but refuses for processes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from owl_deploy.errors import OwlDeployError
from owl_deploy.progress import OnStep, silent

__all__ = ["ALONE", "ProcessGroup", "local", "run_together", "share_like", "whole"]


@dataclass(frozen=True)
class ProcessGroup:
    """One process among those that train together."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    def shard_(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Keep a share of the parameters alone; what a block needs beyond it is fetched when it runs.

        Args:
            model: whole, the same in every process; it moves to the device of this process.
            blocks: decoder blocks of the model, fetched one after another; the rest of the model is fetched as one.
        """
        if self.mesh is not None:
            for block in blocks:
                fully_shard(block, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)

    def share(self, batch: Sequence[int]) -> list[tuple[int, float]]:
        """Return what this process takes of a batch, with the weight of each loss, 1 or 0.

        All take equally many, since each pass through a block is one of all processes: where the batch does not
        divide, the last ones run a sequence whose loss does not count.
        """
        n = -(-len(batch) // self.size)
        mine = [(i, 1.0) for i in batch[self.rank :: self.size]]
        return mine + [(batch[0], 0.0)] * (n - len(mine))

    def total(self, value: float) -> float:
        """Return the sum over processes of a figure that each has."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def longest(self, value: float) -> float:
        """Return the largest of a figure that each has: clocks differ, and all must decide alike."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, operation: Any) -> float:
        if self.mesh is None:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(held, operation)
        return float(held)


ALONE = ProcessGroup()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, on the CPU; every process of the group must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def share_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the share of a whole tensor that belongs to that of a parameter of the same shape, on its device."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    # each process has the whole tensor already: nothing has to be sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def run_together(
    work: Callable[..., None],
    devices: Sequence[torch.device],
    arguments: Mapping[str, Any],
    *,
    folder: Path,
    on_step: OnStep,
) -> None:
    """Run a function in one process per device, until all have ended.

    Args:
        work: of this package or another module (each process imports it); called with `group`, `device`, `on_step` and
            the arguments. Only the steps of the first process are told on.
        devices: of one kind; a device may be there twice.
        arguments: by name; they are pickled.
        folder: for the file by which the processes find one another.
        on_step: told of the steps.

    Raises:
        OwlDeployError: with the sentence of the process that failed, or that one of them was killed. The others are
            ended.
    """
    meeting = folder / "processes"
    meeting.unlink(missing_ok=True)
    told = get_context("spawn").SimpleQueue()
    n_threads = max(1, torch.get_num_threads() // len(devices))
    context = start_processes(  # type: ignore[no-untyped-call]
        _join,
        args=(work, list(devices), dict(arguments), meeting, n_threads, told),
        nprocs=len(devices),
        join=False,
        daemon=True,
        start_method="spawn",
    )
    failures: list[str] = []

    def listen() -> None:
        while not told.empty():
            kind, content = told.get()
            if kind == "step":
                on_step(content)
            else:
                failures.append(content)

    try:
        while not context.join(timeout=0.1):
            listen()
        listen()
    except (ProcessExitedException, ProcessRaisedException) as error:
        listen()
        if failures:
            raise OwlDeployError(failures[0]) from error
        raise OwlDeployError(
            f"process {error.error_index + 1} of {len(devices)} that train together ended: {error}"
        ) from error
    finally:
        for process in context.processes:
            process.kill()
        meeting.unlink(missing_ok=True)


def _join(
    rank: int,
    work: Callable[..., None],
    devices: list[torch.device],
    arguments: dict[str, Any],
    meeting: Path,
    n_threads: int,
    told: Any,
) -> None:
    """Run in each process."""
    torch.set_num_threads(n_threads)
    try:
        with _group(rank, devices, meeting) as group:
            on_step: OnStep = (lambda step: told.put(("step", step))) if rank == 0 else silent
            work(group=group, device=devices[rank], on_step=on_step, **arguments)
    except OwlDeployError as error:
        told.put(("error", str(error)))
        raise SystemExit(1) from error


@contextmanager
def _group(rank: int, devices: list[torch.device], meeting: Path) -> Iterator[ProcessGroup]:
    device = devices[rank]
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    backend = dist.get_default_backend_for_device(device)
    store = dist.FileStore(str(meeting), len(devices))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(devices))
    try:
        yield ProcessGroup(rank, len(devices), init_device_mesh(device.type, (len(devices),)))
    finally:
        dist.destroy_process_group()
