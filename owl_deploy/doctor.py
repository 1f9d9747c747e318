"""What this machine is, as far as owl-deploy is concerned, and what is wrong with it.

In: the states of the engines. Out: the machine's facts and findings, each a sentence that says what to do. An *error*
is something that will fail; a *warning* makes figures worse or less certain. `diagnose` gathers the facts, `findings`
judges them and looks at nothing else. Nothing is changed or repaired here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from owl_deploy.bench.bandwidth import memory_bandwidth
from owl_deploy.bench.machine import IDLE_LOAD, LITTLE_STEAL, MachineWatch, machine_facts
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.core_limits import (
    allowed_cpus,
    frequency_share,
    memory_limit_bytes,
    n_physical_cores,
    n_thermal,
    n_throttled,
)
from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import OwlDeployError
from owl_deploy.memory import available_bytes
from owl_deploy.operator_status import operator_status
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.threads import cgroup_quota, resolve_threads
from owl_deploy.versions import versions

__all__ = ["Diagnosis", "Finding", "diagnose", "findings"]

_GIB = 1 << 30
# The probe of the memory bandwidth reads half a GiB; a machine with less than this to spare has other worries.
_PROBE_NEEDS = _GIB
# SmolLM2-135M alone takes half a GiB in float32, and a bench holds several artifacts side by side.
_LITTLE_MEMORY = 2 * _GIB
# The quickstart leaves about 4 GB: checkpoint, seven artifacts, and the converted model in the cache.
_LITTLE_DISK = 5 * _GIB
_SLOW = 0.6
_PACKAGES = ("onnxruntime", "onnx", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    severity: Literal["error", "warning"]
    """error: something will fail; warning: figures are worse, or less certain, than they could be."""
    sentence: str
    """What is wrong, what was found, and what to do."""


@dataclass(frozen=True)
class Diagnosis:
    """What `owl-deploy doctor` says."""

    facts: dict[str, Any]
    """machine, operator, engines, versions and cache, as plain values."""
    findings: tuple[Finding, ...]

    @property
    def has_error(self) -> bool:
        """Whether something will fail."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy doctor --json` prints."""
        return {
            **self.facts,
            "findings": [asdict(finding) for finding in self.findings],
            "has_error": self.has_error,
        }


def diagnose(
    engines: Sequence[EngineStatus], *, threads: int | Literal["auto"] = "auto", on_step: OnStep = silent
) -> Diagnosis:
    """Look at the machine, and at what is installed; takes a few seconds, most of them for the memory bandwidth.

    Args:
        engines: that there are, available or not.
        threads: that other commands would be given.
        on_step: told when a part is done.

    Raises:
        RecipeError: threads is not positive.
    """
    count = resolve_threads(threads)
    watch, cpus, throttled_before = MachineWatch.start(), allowed_cpus(), n_throttled()
    operator = operator_status()
    on_step(Step("looking at this machine", 1, 2, "operator library"))
    available = available_bytes()
    bandwidth, bandwidth_error = _bandwidth(count.n, available)
    throttled = n_throttled()
    on_step(Step("looking at this machine", 2, 2, "memory bandwidth"))
    facts = {
        "machine": {
            **machine_facts(count),
            **watch.facts(),
            "n_cores_machine": os.cpu_count(),
            "n_physical_cores": n_physical_cores(cpus),
            "cgroup_quota": cgroup_quota(),
            "n_throttled": None if throttled is None or throttled_before is None else throttled - throttled_before,
            "n_thermal": n_thermal(cpus),
            "frequency_share": frequency_share(cpus),
            "memory_available_bytes": available,
            "memory_limit_bytes": memory_limit_bytes(),
            "memory_bandwidth_bytes_per_s": bandwidth,
            "memory_bandwidth_error": bandwidth_error,
        },
        "operator": {**asdict(operator), "target": operator.target},
        "engines": [asdict(engine) for engine in engines],
        "versions": versions(*_PACKAGES),
        "cache": _cache_facts(owl_deploy_cache()),
    }
    return Diagnosis(facts, tuple(findings(facts)))


def _bandwidth(n_threads: int, available: int) -> tuple[float | None, str | None]:
    """Return the memory bandwidth, or None and why there is none."""
    if available < _PROBE_NEEDS:
        return None, "too little memory is free to measure the memory bandwidth: end other programs"
    try:
        return memory_bandwidth(n_threads), None
    except OwlDeployError as error:
        return None, str(error)


def _cache_facts(folder: Path) -> dict[str, Any]:
    """Return where the cache is, whether it can be written, and what is free there; makes nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "is_writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """Judge the facts of `diagnose`: errors first."""
    yield from (Finding("error", sentence) for sentence in _errors(facts))
    yield from (Finding("warning", sentence) for sentence in _warnings(facts))


def _errors(facts: dict[str, Any]) -> Iterator[str]:
    for engine in facts["engines"]:
        # The others are optional: their absence is a fact, not a fault.
        if engine["name"] == "onnxruntime" and not engine["is_available"]:
            yield engine["reason"]
    if not facts["operator"]["is_available"]:
        yield facts["operator"]["reason"]
    cache = facts["cache"]
    if not cache["is_writable"]:
        yield f"the cache folder {cache['folder']} cannot be written: set OWL_DEPLOY_CACHE to one that can"


def _warnings(facts: dict[str, Any]) -> Iterator[str]:
    yield from _core_warnings(facts["machine"])
    yield from _noise_warnings(facts["machine"])
    yield from _room_warnings(facts["machine"], facts["cache"])
    operator = facts["operator"]
    best = next(iter(operator["targets"]), None)
    if operator["is_available"] and operator["target"] != best:
        yield f"OWL_KERNEL_TARGET forces {operator['target']} where this machine has {best}: unset it"
    elif best == "portable":
        yield (
            "the sparse operator has no fast kernels for this processor and runs portable code: "
            "use a machine with AVX2, AVX-512 or NEON with dot products"
        )


def _core_warnings(machine: dict[str, Any]) -> Iterator[str]:
    threads, cores, quota = machine["threads"], machine["n_cores"], machine["cgroup_quota"]
    physical = machine["n_physical_cores"]
    if threads > cores:
        yield f"{threads} threads on {cores} allowed cores wait for each other: give --threads auto"
    if quota is not None and threads > quota:
        yield (
            f"{threads} threads under a cgroup quota of {quota:g} CPUs are stopped again and again: "
            f"raise the quota to whole CPUs, or give --threads {max(1, int(quota))}"
        )
    if physical is not None and physical < min(threads, cores):
        yield (
            f"{threads} threads share {physical} physical cores, which seldom pays for matrix products: "
            f"give --threads {physical} and compare"
        )
    if machine["n_throttled"]:
        yield (
            f"the cgroup's quota stopped this process {machine['n_throttled']} times within seconds: "
            "use fewer threads or raise the quota"
        )


def _noise_warnings(machine: dict[str, Any]) -> Iterator[str]:
    if machine["load_before"] > IDLE_LOAD:
        yield (
            f"the machine is not idle, load average {machine['load_before']:.1f}: "
            "end other programs before you measure, reports will say so otherwise"
        )
    if (machine["steal_fraction"] or 0.0) > LITTLE_STEAL:
        yield (
            f"the hypervisor takes {machine['steal_fraction']:.1%} of the processor time: "
            "measure on dedicated cores, or with more --rounds"
        )
    if machine["governor"] not in (None, "performance"):
        yield (
            f"the frequency governor is {machine['governor']}, so that clocks follow the load: "
            "run cpupower frequency-set -g performance as root before you measure"
        )
    if machine["n_thermal"]:
        yield (
            f"heat has slowed a core {machine['n_thermal']} times since the machine started: "
            "look after its cooling, and let it rest between measurements"
        )
    share = machine["frequency_share"]
    if share is not None and share < _SLOW and machine["governor"] == "performance":
        yield (
            f"a core runs at {share:.0%} of its highest frequency although the governor is performance: "
            "look for a limit of power or heat"
        )


def _room_warnings(machine: dict[str, Any], cache: dict[str, Any]) -> Iterator[str]:
    if machine["memory_bandwidth_error"]:
        yield machine["memory_bandwidth_error"]
    limit = machine["memory_limit_bytes"]
    if machine["memory_available_bytes"] < _LITTLE_MEMORY:
        free = machine["memory_available_bytes"] / _GIB
        yield f"only {free:.1f} GiB of memory are free: end other programs, or bench one artifact at a time"
    elif limit is not None and limit < _LITTLE_MEMORY:
        yield f"the cgroup allows {limit / _GIB:.1f} GiB of memory: raise the limit, or bench one artifact at a time"
    if cache["free_bytes"] < _LITTLE_DISK:
        yield (
            f"only {cache['free_bytes'] / _GIB:.1f} GiB are free where the cache is ({cache['folder']}): "
            "free some space, or set OWL_DEPLOY_CACHE to another disk"
        )
