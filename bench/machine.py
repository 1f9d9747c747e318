"""Facts about the machine that a latency depends on, taken beside the measurement."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from owl_deploy.threads import ThreadCount

__all__ = ["IDLE_LOAD", "LITTLE_STEAL", "MachineWatch", "machine_facts"]

# Above these a measurement is said to be disturbed: load average before it, share of the CPU time stolen meanwhile.
IDLE_LOAD = 0.5
LITTLE_STEAL = 0.01

# Vector extensions that decide how fast a matrix kernel can be; the others are noise in a report.
_ISA = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def machine_facts(threads: ThreadCount) -> dict[str, Any]:
    """Return CPU, vector extensions, caches, cores, memory and system, as plain values."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "isa": [name for name in _ISA if name in flags],
        "n_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": threads.n,
        "threads_source": threads.source,
        "caches": _caches(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@dataclass
class MachineWatch:
    """Load and stolen time between its start and `facts`."""

    load_before: float
    times_before: Any

    @classmethod
    def start(cls, load_before: float | None = None) -> MachineWatch:
        """Begin to watch; `load_before` is given where this process has itself been busy until now."""
        return cls(os.getloadavg()[0] if load_before is None else load_before, psutil.cpu_times())

    def facts(self) -> dict[str, Any]:
        """Return load averages and the share of CPU time that the hypervisor took since the start."""
        before, after = self.times_before, psutil.cpu_times()
        total = sum(after) - sum(before)
        steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
        return {
            "load_before": round(self.load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "steal_fraction": round(steal / total, 4) if total > 0 else None,
        }


def _cpu() -> tuple[str, set[str]]:
    """Return the CPU's name and its feature flags (Linux; elsewhere what Python knows)."""
    text = _read(Path("/proc/cpuinfo")) or ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    name = facts.get("model name") or facts.get("Processor") or platform.processor() or platform.machine()
    return name, set((facts.get("flags") or facts.get("Features") or "").split())


def _caches() -> dict[str, int]:
    """Return cache sizes in bytes as core 0 sees them: L1d, L2, L3."""
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size and size.endswith("K") and kind in ("Data", "Unified"):
            sizes[f"L{level}d" if level == "1" else f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
