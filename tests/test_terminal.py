"""Progress where stderr is no terminal: lines with what is left, from what was done so far."""

from __future__ import annotations

import time

import pytest

from owl_deploy import terminal
from owl_deploy.progress import Step
from owl_deploy.terminal import TerminalProgress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Return a function that shows steps at given seconds, and returns the lines."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(terminal, "_LINE_INTERVAL_S", 0.0)

    def shown(*steps: tuple[float, str, int, int]) -> list[str]:
        with TerminalProgress(is_quiet=False) as progress:
            for seconds, stage, done, total in steps:
                clock[0] = seconds
                progress(Step(stage, done, total, "note"))
        return [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]

    return shown


def test_what_is_left_follows_from_what_was_done(lines: object) -> None:
    assert callable(lines)
    found = lines((0, "sweep", 0, 6), (10, "sweep", 0, 6), (100, "sweep", 1, 6), (600, "sweep", 6, 6))
    assert found == [
        "sweep: 0/6 note",
        "sweep: 0/6 note",
        "sweep: 1/6, ETA 500 s note",
        "sweep: 6/6 in 600 s note",
    ]


def test_stage_that_begins_in_its_first_step_counts_from_there(lines: object) -> None:
    assert callable(lines)
    assert lines((50, "blocks", 1, 3), (60, "blocks", 2, 3))[1] == "blocks: 2/3, ETA 10 s note"


def test_stage_that_starts_over_counts_anew(lines: object) -> None:
    assert callable(lines)
    found = lines((0, "writing", 0, 2), (9, "writing", 2, 2), (100, "writing", 0, 2), (110, "writing", 1, 2))
    assert found[-1] == "writing: 1/2, ETA 10 s note"
