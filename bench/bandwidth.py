"""How fast this machine reads memory, measured in a process of its own: `python -m owl_deploy.bench.bandwidth N`.

A process of its own, because numpy's BLAS must not start threads beside ours and reads that from
the environment when it is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.errors import OwlDeployError

__all__ = ["memory_bandwidth"]

_PROBE_BYTES = 1 << 29
_REPEATS = 10
# 4 MiB of a row at a time: with 32 KiB the interpreter between calls halved the figure.
_ROW_ELEMENTS = 1 << 20


def memory_bandwidth(n_threads: int) -> float:
    """Return the best read bandwidth of several tries, in bytes per second.

    Each thread takes dot products of its slice of 512 MiB of float32 with itself: far beyond any
    cache, one multiplication per 4 bytes, so memory bounds it.

    Raises:
        OwlDeployError: the probe could not run.
    """
    command = [sys.executable, "-m", "owl_deploy.bench.bandwidth", str(n_threads)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
        return float(result.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise OwlDeployError(f"the memory bandwidth could not be measured: {error}") from error


def _probe(n_threads: int) -> float:
    """Measure in this process; see `memory_bandwidth`."""
    rows = np.ones(_PROBE_BYTES // 4, dtype=np.float32).reshape(-1, _ROW_ELEMENTS)

    def read(part: NDArray[Any]) -> None:
        for row in part:
            np.dot(row, row)

    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            list(pool.map(read, np.array_split(rows, n_threads)))
            best = min(best, time.perf_counter() - started)
    return _PROBE_BYTES / best


if __name__ == "__main__":
    print(_probe(int(sys.argv[1])))
