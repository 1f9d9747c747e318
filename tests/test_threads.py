from __future__ import annotations

import os
from pathlib import Path

import pytest

from owl_deploy.errors import RecipeError
from owl_deploy.threads import ThreadCount, allowed_threads, resolve_threads


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """An affinity mask of 8 cores on a machine of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def v1(root: Path, quota: str, period: str = "100000") -> Path:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    return root


def v2(root: Path, text: str) -> Path:
    (root / "cpu.max").write_text(f"{text}\n")
    return root


@pytest.mark.usefixtures("eight_cores")
class TestAllowedThreads:
    def test_affinity_counts_and_not_the_cores_of_the_machine(self, tmp_path: Path) -> None:
        assert allowed_threads(tmp_path) == ThreadCount(8, "affinity mask")

    def test_missing_cgroup_is_no_limit(self, tmp_path: Path) -> None:
        assert allowed_threads(tmp_path / "nosuch").n == 8

    @pytest.mark.parametrize(
        ("text", "n"),
        [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("1000 100000", 1), ("25000 10000", 3)],
    )
    def test_quota_of_v2_is_rounded_up(self, tmp_path: Path, text: str, n: int) -> None:
        count = allowed_threads(v2(tmp_path, text))
        assert count.n == n
        assert count.source.startswith("cgroup quota of ")

    def test_source_names_the_quota(self, tmp_path: Path) -> None:
        assert allowed_threads(v2(tmp_path, "150000 100000")).source == "cgroup quota of 1.5 CPUs"

    @pytest.mark.parametrize("text", ["max 100000", "800000 100000", "6400000 100000"])
    def test_quota_of_v2_at_or_above_the_affinity_is_no_limit(self, tmp_path: Path, text: str) -> None:
        assert allowed_threads(v2(tmp_path, text)) == ThreadCount(8, "affinity mask")

    @pytest.mark.parametrize(("quota", "n"), [("200000", 2), ("150000", 2), ("-1", 8), ("1600000", 8)])
    def test_quota_of_v1(self, tmp_path: Path, quota: str, n: int) -> None:
        assert allowed_threads(v1(tmp_path, quota)).n == n

    def test_v2_goes_before_v1(self, tmp_path: Path) -> None:
        assert allowed_threads(v2(v1(tmp_path, "300000"), "200000 100000")).n == 2

    def test_half_a_v1_tree_is_no_limit(self, tmp_path: Path) -> None:
        v1(tmp_path, "200000")
        (tmp_path / "cpu" / "cpu.cfs_period_us").unlink()
        assert allowed_threads(tmp_path).n == 8


def test_affinity_of_this_process_is_used(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert allowed_threads(tmp_path) == ThreadCount(1, "affinity mask")
    finally:
        os.sched_setaffinity(0, before)


def test_auto_is_what_is_allowed() -> None:
    assert resolve_threads("auto") == allowed_threads()


def test_number_is_taken_as_it_is() -> None:
    assert resolve_threads(3) == ThreadCount(3, "setting")


@pytest.mark.parametrize("n", [0, -1])
def test_less_than_one_is_refused(n: int) -> None:
    with pytest.raises(RecipeError, match=f"threads must be auto or at least 1, got {n}"):
        resolve_threads(n)
