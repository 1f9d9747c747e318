"""The doctor: facts read from where the system shows them, every finding with what to do, and the exit code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from owl_deploy import doctor, operator_status
from owl_deploy.core_limits import (
    allowed_cpus,
    frequency_share,
    memory_limit_bytes,
    n_physical_cores,
    n_thermal,
    n_throttled,
)
from owl_deploy.doctor import Diagnosis, Finding, diagnose, findings
from owl_deploy.doctor_text import diagnosis_lines
from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.kernels import library_path
from owl_deploy.operator_status import OperatorStatus

GIB = 1 << 30
ONNXRUNTIME = EngineStatus("onnxruntime", True, "1.31.1", "", "MIT")
DEEPSPARSE = EngineStatus("deepsparse", False, "1.8.0", "DeepSparse is not installed: run this and that", "evaluation")


def sound(**changes: Any) -> dict[str, Any]:
    """Return the facts of a machine with which nothing is wrong; a change is `part__key=value`."""
    facts: dict[str, Any] = {
        "machine": {
            "cpu": "Some CPU at 2.5 GHz",
            "isa": ["avx2", "avx512f"],
            "n_cores": 8,
            "threads": 8,
            "threads_source": "affinity mask",
            "caches": {"L1d": 32768, "L2": 2 << 20},
            "memory_bytes": 64 * GIB,
            "governor": "performance",
            "os": "Linux 6.1",
            "python": "3.11.9",
            "load_before": 0.1,
            "load_after": 1.0,
            "steal_fraction": 0.0,
            "n_cores_machine": 64,
            "n_physical_cores": 8,
            "cgroup_quota": None,
            "n_throttled": 0,
            "n_thermal": 0,
            "frequency_share": 0.98,
            "memory_available_bytes": 40 * GIB,
            "memory_limit_bytes": None,
            "memory_bandwidth_bytes_per_s": 34e9,
            "memory_bandwidth_error": None,
        },
        "operator": {
            "is_available": True,
            "reason": "",
            "library": "/usr/lib/operator.so",
            "targets": ("avx512", "avx2", "portable"),
            "forced": None,
            "target": "avx512",
        },
        "engines": [vars(ONNXRUNTIME), vars(DEEPSPARSE)],
        "versions": {"python": "3.11.9", "onnxruntime": "1.31.1"},
        "cache": {"folder": "/home/me/.cache/owl-deploy", "exists": True, "is_writable": True, "free_bytes": 90 * GIB},
    }
    for name, value in changes.items():
        part, _, key = name.partition("__")
        facts[part][key] = value
    return facts


def found(**changes: Any) -> list[tuple[str, str]]:
    return [(finding.severity, finding.sentence) for finding in findings(sound(**changes))]


# Judging.


def test_sound_machine_has_no_findings() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "words", "to_do"),
    [
        ({"machine__load_before": 3.2}, "not idle, load average 3.2", "end other programs"),
        ({"machine__steal_fraction": 0.034}, "the hypervisor takes 3.4%", "dedicated cores"),
        ({"machine__governor": "powersave"}, "governor is powersave", "cpupower frequency-set -g performance"),
        ({"machine__n_thermal": 7}, "slowed a core 7 times", "cooling"),
        ({"machine__frequency_share": 0.4}, "at 40% of its highest frequency", "limit of power or heat"),
        ({"machine__threads": 12}, "12 threads on 8 allowed cores", "--threads auto"),
        ({"machine__cgroup_quota": 7.5}, "quota of 7.5 CPUs", "--threads 7"),
        ({"machine__cgroup_quota": 0.5, "machine__threads": 1}, "quota of 0.5 CPUs", "--threads 1"),
        ({"machine__n_physical_cores": 4}, "8 threads share 4 physical cores", "--threads 4"),
        ({"machine__n_throttled": 5}, "stopped this process 5 times", "raise the quota"),
        ({"machine__memory_available_bytes": GIB}, "only 1.0 GiB of memory are free", "one artifact at a time"),
        ({"machine__memory_limit_bytes": GIB}, "cgroup allows 1.0 GiB of memory", "raise the limit"),
        ({"machine__memory_bandwidth_error": "it broke: mend it"}, "it broke", "mend it"),
        ({"cache__free_bytes": GIB}, "only 1.0 GiB are free where the cache is", "OWL_DEPLOY_CACHE"),
        (
            {"operator__forced": "avx2", "operator__target": "avx2"},
            "forces avx2 where this machine has avx512",
            "unset",
        ),
        ({"operator__targets": ("portable",), "operator__target": "portable"}, "portable code", "use a machine with"),
    ],
)
def test_warning_says_what_and_what_to_do(changes: dict[str, Any], words: str, to_do: str) -> None:
    ((severity, sentence),) = found(**changes)
    assert severity == "warning"
    assert words in sentence
    assert to_do in sentence.partition(words)[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"cache__is_writable": False},
            "the cache folder /home/me/.cache/owl-deploy cannot be written: set OWL_DEPLOY_CACHE to one that can",
        ),
        (
            {"operator__is_available": False, "operator__reason": "it is missing: install it"},
            "it is missing: install it",
        ),
    ],
)
def test_what_will_fail_is_an_error(changes: dict[str, Any], sentence: str) -> None:
    assert found(**changes) == [("error", sentence)]


def test_missing_onnxruntime_is_an_error_and_another_missing_engine_is_none() -> None:
    missing = EngineStatus("onnxruntime", False, "", "not installed: pip install it", "MIT")
    facts = sound() | {"engines": [vars(missing), vars(DEEPSPARSE)]}
    assert list(findings(facts)) == [Finding("error", "not installed: pip install it")]


def test_unknown_facts_are_no_findings() -> None:
    names = ("governor", "steal_fraction", "n_physical_cores", "n_throttled", "n_thermal", "frequency_share")
    assert found(**{f"machine__{name}": None for name in names}) == []


def test_errors_come_first() -> None:
    severities = [severity for severity, _ in found(machine__load_before=3.0, cache__is_writable=False)]
    assert severities == ["error", "warning"]


def test_only_an_error_makes_it_fail() -> None:
    assert not Diagnosis(sound(), (Finding("warning", "x"),)).has_error
    assert Diagnosis(sound(), (Finding("warning", "x"), Finding("error", "y"))).has_error


# Reading.


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], None]:
    def write_one(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")

    return write_one


def test_nothing_is_read_where_nothing_is(tmp_path: Path) -> None:
    assert n_physical_cores({0, 1}, tmp_path) is None
    assert n_throttled(tmp_path) is None
    assert n_thermal({0}, tmp_path) is None
    assert frequency_share({0}, tmp_path) is None
    assert memory_limit_bytes(tmp_path) is None


def test_threads_of_one_core_count_once(tmp_path: Path, write: Callable[[str, str], None]) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        write(f"cpu{cpu}/topology/thread_siblings_list", siblings)
    assert n_physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert n_physical_cores({0, 1}, tmp_path) == 2
    assert n_physical_cores({0, 2}, tmp_path) == 1


@pytest.mark.parametrize("name", ["cpu.stat", "cpu/cpu.stat"])
def test_throttling_is_read_from_both_versions_of_cgroups(
    tmp_path: Path, write: Callable[[str, str], None], name: str
) -> None:
    write(name, "nr_periods 10\nnr_throttled 4\nthrottled_usec 800")
    assert n_throttled(tmp_path) == 4


def test_heat_counts_where_it_was_worst(tmp_path: Path, write: Callable[[str, str], None]) -> None:
    write("cpu0/thermal_throttle/core_throttle_count", "3")
    write("cpu1/thermal_throttle/core_throttle_count", "9")
    assert n_thermal({0, 1}, tmp_path) == 9
    assert n_thermal({0}, tmp_path) == 3


def test_frequency_is_that_of_the_slowest_core(tmp_path: Path, write: Callable[[str, str], None]) -> None:
    for cpu, now in enumerate([3_000_000, 1_200_000]):
        write(f"cpu{cpu}/cpufreq/scaling_cur_freq", str(now))
        write(f"cpu{cpu}/cpufreq/cpuinfo_max_freq", "3000000")
    assert frequency_share({0, 1}, tmp_path) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "max", None),
        ("memory.max", str(4 * GIB), 4 * GIB),
        ("memory/memory.limit_in_bytes", str(4 * GIB), 4 * GIB),
        ("memory/memory.limit_in_bytes", str((1 << 63) - 4096), None),
    ],
)
def test_memory_limit_of_both_versions_of_cgroups(
    tmp_path: Path, write: Callable[[str, str], None], name: str, text: str, limit: int | None
) -> None:
    write(name, text)
    assert memory_limit_bytes(tmp_path) == limit


def test_allowed_processors_are_those_of_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert allowed_cpus() == {3, 5}


# The operator library.


def test_operator_library_works_here_and_takes_the_best_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OWL_KERNEL_TARGET", raising=False)
    status = operator_status.operator_status()
    assert (status.is_available, status.reason, status.library) == (True, "", str(library_path()))
    assert status.targets[-1] == "portable"
    assert status.target == status.targets[0]


def test_forced_target_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_KERNEL_TARGET", "portable")
    status = operator_status.operator_status()
    assert (status.is_available, status.target, status.forced) == (True, "portable", "portable")
    assert len(status.targets) >= 1


def test_target_that_is_not_here_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_KERNEL_TARGET", "vax")
    status = operator_status.operator_status()
    assert not status.is_available
    assert status.reason.startswith("OWL_KERNEL_TARGET is vax, and this machine has ")
    assert status.reason.endswith("unset it or name one of these")
    assert status.target is None


def test_missing_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _package: tmp_path)
    status = operator_status.operator_status()
    assert (status.is_available, status.library, status.targets) == (False, None, ())
    assert "install g++" in status.reason


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("1234.5", "computes 1234.5 in place of"),
        ("cannot open shared object", "cannot open shared object"),
        ("", "-11"),
    ],
)
def test_library_that_does_not_compute_is_a_sentence(monkeypatch: pytest.MonkeyPatch, said: str, words: str) -> None:
    done = subprocess.CompletedProcess([], -11, said, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    status = operator_status.operator_status()
    assert not status.is_available
    assert words in status.reason
    assert "install owl-deploy again" in status.reason


# The whole.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds; other tests have it."""
    status = OperatorStatus(True, "", "/usr/lib/operator.so", ("avx2", "portable"))
    monkeypatch.setattr(doctor, "operator_status", lambda: status)
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda _: 34e9)


@pytest.mark.usefixtures("quick")
def test_facts_are_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "deep" / "cache"))
    facts = diagnose([ONNXRUNTIME, DEEPSPARSE], threads=1).facts
    assert facts["machine"]["n_cores"] == len(allowed_cpus())
    assert (facts["machine"]["threads"], facts["machine"]["threads_source"]) == (1, "setting")
    assert facts["machine"]["memory_bandwidth_bytes_per_s"] == 34e9
    assert facts["operator"]["target"] == "avx2"
    assert facts["cache"]["exists"] is False
    assert facts["cache"]["is_writable"] is True
    assert facts["cache"]["free_bytes"] > 0
    assert not (tmp_path / "deep").exists()


@pytest.mark.usefixtures("quick")
def test_cache_that_is_a_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    assert diagnose([ONNXRUNTIME]).has_error


@pytest.mark.usefixtures("quick")
def test_bandwidth_that_cannot_be_measured_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> float:
        raise OwlDeployError("the memory bandwidth could not be measured: no numpy")

    monkeypatch.setattr(doctor, "memory_bandwidth", fail)
    diagnosis = diagnose([ONNXRUNTIME])
    assert diagnosis.facts["machine"]["memory_bandwidth_bytes_per_s"] is None
    assert Finding("warning", "the memory bandwidth could not be measured: no numpy") in diagnosis.findings


@pytest.mark.usefixtures("quick")
def test_bandwidth_is_not_probed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda _: pytest.fail("probed"))
    assert diagnose([ONNXRUNTIME]).facts["machine"]["memory_bandwidth_bytes_per_s"] is None


def test_threads_must_be_positive() -> None:
    with pytest.raises(RecipeError, match="threads must be auto or at least 1"):
        diagnose([], threads=0)


def test_text_holds_facts_and_findings_in_a_hundred_columns() -> None:
    finding = Finding("warning", f"something is wrong: {'do this ' * 30}")
    lines = diagnosis_lines(Diagnosis(sound(), (finding,)).to_json())
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    for words in ("Some CPU at 2.5 GHz", "34.0 GB/s", "8 on 8 physical of 64", "avx512 (avx512 avx2 portable)"):
        assert words in text
    assert "engine deepsparse unavailable: DeepSparse is not installed: run this and that" in text
    assert "warning: something is wrong" in text
    assert lines[-1] == "no errors, 1 warning."


def test_text_of_a_sound_machine_ends_well() -> None:
    assert diagnosis_lines(Diagnosis(sound(), ()).to_json())[-1] == "Nothing is wrong."


@pytest.mark.usefixtures("quick")
def test_command_prints_one_document() -> None:
    done = call("doctor", "--json")
    assert {"machine", "operator", "engines", "versions", "cache", "findings"} <= done.document.keys()
    assert done.code == (3 if done.document["has_error"] else 0)


@pytest.mark.usefixtures("quick")
def test_error_is_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    done = call("doctor", "--quiet")
    assert (done.code, done.stderr) == (3, "")
    assert "error: the cache folder" in done.stdout


def test_command_looks_at_the_real_machine() -> None:
    done = call("doctor", "--threads", "1", "--json", "--quiet")
    assert done.document["machine"]["memory_bandwidth_bytes_per_s"] > 1e8
    assert done.document["operator"]["is_available"] is True
