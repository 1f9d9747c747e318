"""How many threads this process may really use, and why."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owl_deploy.errors import RecipeError

__all__ = ["ThreadCount", "allowed_threads", "cgroup_quota", "resolve_threads"]


@dataclass(frozen=True)
class ThreadCount:
    """A number of threads and where it came from."""

    n: int
    source: str
    """One of: affinity, cgroup quota, setting."""


def allowed_threads(cgroup: Path = Path("/sys/fs/cgroup")) -> ThreadCount:
    """Return min(affinity mask, cgroup CPU quota), at least 1.

    The count of cores that the machine has is never used: in a container it is the host's.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cgroup_quota(cgroup)
    if quota is not None and quota < n:
        return ThreadCount(max(1, math.ceil(quota)), f"cgroup quota of {quota:g} CPUs")
    return ThreadCount(n, "affinity mask")


def cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the CPUs that the cgroup allows (v2 `cpu.max`, else v1 `cpu.cfs_*`); None for no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def resolve_threads(setting: int | Literal["auto"]) -> ThreadCount:
    """Turn the setting into a number. Raises RecipeError when it is not positive."""
    if setting == "auto":
        return allowed_threads()
    if setting < 1:
        raise RecipeError(f"threads must be auto or at least 1, got {setting}")
    return ThreadCount(setting, "setting")
