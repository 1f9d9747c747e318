"""Peak resident memory of this process, for the promise made before a stage and the figure after it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil

__all__ = ["available_bytes", "peak_rss_bytes", "release_free_memory", "reset_peak_rss", "rss_bytes"]


def reset_peak_rss() -> bool:
    """Restart the kernel's high-water mark (Linux: 5 to /proc/self/clear_refs); False where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Give freed memory back to the system; glibc keeps it otherwise: 7 MB more per block of SmolLM2."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_rss_bytes() -> int:
    """Return the high-water mark of resident memory, in bytes, since the last reset or the start."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Return the resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Return what the machine can still give without swapping, in bytes."""
    return int(psutil.virtual_memory().available)
