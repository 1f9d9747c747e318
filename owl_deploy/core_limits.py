"""What keeps the cores that a program may use from being wholly its own, as Linux tells.

In: the folders in which the kernel shows it. Out: plain numbers, None where it does not say (another system, a virtual
machine, another version of cgroups). Judging them is the business of `doctor`.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_cpus", "frequency_share", "memory_limit_bytes", "n_physical_cores", "n_thermal", "n_throttled"]

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# What version 1 of cgroups says where there is no limit: the largest multiple of a page in 63 bits.
_NO_LIMIT = 1 << 62


def allowed_cpus() -> set[int]:
    """Return the numbers of the processors in the affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def n_physical_cores(cpus: set[int], root: Path = _CPUS) -> int | None:
    """Return how many cores these processors are: fewer, where two of them are threads of one core."""
    siblings = [_text(root / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in cpus]
    return len(set(siblings)) if all(siblings) else None


def n_throttled(root: Path = _CGROUP) -> int | None:
    """Return how often the cgroup's quota has stopped this group of processes, since it was made."""
    for file in (root / "cpu.stat", root / "cpu" / "cpu.stat"):
        for line in (_text(file) or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "nr_throttled" and value.isdecimal():
                return int(value)
    return None


def n_thermal(cpus: set[int], root: Path = _CPUS) -> int | None:
    """Return how often heat has slowed one of these processors since the machine started: the largest count."""
    texts = [_text(root / f"cpu{cpu}" / "thermal_throttle" / "core_throttle_count") for cpu in cpus]
    counts = [int(text) for text in texts if text is not None and text.isdecimal()]
    return max(counts, default=None)


def frequency_share(cpus: set[int], root: Path = _CPUS) -> float | None:
    """Return the lowest share of its highest frequency that one of these processors runs at now."""
    shares = []
    for cpu in cpus:
        now, highest = (
            _text(root / f"cpu{cpu}" / "cpufreq" / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq")
        )
        if now is not None and highest is not None and now.isdecimal() and highest.isdecimal() and int(highest) > 0:
            shares.append(int(now) / int(highest))
    return min(shares, default=None)


def memory_limit_bytes(root: Path = _CGROUP) -> int | None:
    """Return the memory that the cgroup allows; None for no limit."""
    text = _text(root / "memory.max") or _text(root / "memory" / "memory.limit_in_bytes")
    if text is None or not text.isdecimal() or int(text) >= _NO_LIMIT:
        return None
    return int(text)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
