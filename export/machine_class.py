"""Which class of machines of the cost model this machine belongs to."""

from __future__ import annotations

import platform
from pathlib import Path

from owl_deploy.export.cost_model import MachineClass

__all__ = ["class_of", "this_machine_class"]

_AVX2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"}
_VBMI2 = {
    *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi"),
    *("avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq"),
}


def this_machine_class() -> MachineClass:
    """Return the class of the processor that runs this, portable where it cannot be told."""
    architecture = platform.machine().lower()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Only Apple's ARM processors are met without Linux, and they all have the dot product.
        return class_of(architecture, {"asimddp"} if architecture == "arm64" else set())
    lines = (line.partition(":") for line in text.splitlines())
    features = next((value for key, _, value in lines if key.strip() in ("flags", "Features")), "")
    return class_of(architecture, set(features.split()))


def class_of(architecture: str, features: set[str]) -> MachineClass:
    """Return the class of a processor with these features, in the words of Linux.

    AVX-512 without VBMI2 counts as AVX2: it expands masks in as many steps.
    """
    if architecture in ("x86_64", "amd64"):
        if features >= _AVX2 | _VBMI2:
            return "x86-avx512-vbmi2"
        if features >= _AVX2:
            return "x86-avx2"
    if architecture in ("aarch64", "arm64") and "asimddp" in features:
        return "arm-neon"
    return "portable"
