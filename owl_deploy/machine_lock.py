"""Who may use this machine now: any number of jobs that only compute, or one that takes times.

In: nothing but the machine. Out: contexts. The lock is of the operating system (flock) on one file per user, so that
it ends with the process that holds it, however that ends. Jobs that do not ask are not kept away.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["busy_machine", "quiet_machine"]

log = logging.getLogger(__name__)


@contextmanager
def busy_machine() -> Iterator[None]:
    """Hold the machine together with others that compute; wait while one takes times."""
    with _held(fcntl.LOCK_SH):
        yield


@contextmanager
def quiet_machine() -> Iterator[None]:
    """Hold the machine alone, to take times; wait until nobody else holds it."""
    with _held(fcntl.LOCK_EX):
        yield


@contextmanager
def _held(kind: int) -> Iterator[None]:
    path = Path(tempfile.gettempdir()) / f"owl-deploy-{os.getuid()}.lock"
    # Two locks, as at a door with a vestibule: who waits for the machine alone lets no further ones in before it.
    with path.with_suffix(".queue").open("ab") as queue, path.open("ab") as file:
        fcntl.flock(queue, fcntl.LOCK_EX)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting until another job of owl-deploy has finished with this machine")
            fcntl.flock(file, kind)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
