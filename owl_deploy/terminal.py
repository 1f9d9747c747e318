"""What a person sees while a command works: progress and log lines, all on stderr."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from owl_deploy.progress import Step

__all__ = ["TerminalProgress"]

# Seconds between progress lines where stderr is not a terminal (a log file, CI).
_LINE_INTERVAL_S = 20.0


class TerminalProgress:
    """One bar with ETA per stage on a terminal; elsewhere a line now and then. Call it with each Step.

    `before_step` is called first at every step, and may raise.
    """

    def __init__(self, *, is_quiet: bool, before_step: Callable[[], None] = lambda: None) -> None:
        self._before_step = before_step
        self.console = Console(stderr=True, quiet=is_quiet, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            disable=is_quiet or not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}
        self._last_line = 0.0

    def __enter__(self) -> TerminalProgress:
        package = logging.getLogger("owl_deploy")
        package.setLevel(logging.INFO)
        package.handlers = [RichHandler(console=self.console, show_time=False, show_level=False, show_path=False)]
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, step: Step) -> None:
        """Show a step."""
        self._before_step()
        if self._progress.disable:
            self._line(step)
            return
        # A stage that starts over (the next artifact's export) gets a bar of its own.
        if step.stage not in self._tasks or self._progress.tasks[self._tasks[step.stage]].completed > step.done:
            self._tasks[step.stage] = self._progress.add_task(step.stage, total=step.total, note="")
        self._progress.update(self._tasks[step.stage], completed=step.done, total=step.total, note=step.note)

    def _line(self, step: Step) -> None:
        """Print a plain line at the end of a stage, and now and then before."""
        now = time.monotonic()
        if step.done < self._done.get(step.stage, step.total):  # new, over, or begun anew
            self._began[step.stage] = (now, step.done)
        self._done[step.stage] = step.done
        if step.done < step.total and now - self._last_line < _LINE_INTERVAL_S:
            return
        self._last_line = now
        began, first = self._began.get(step.stage, (now, step.done))
        time_text = ""
        if step.done == step.total:
            time_text = f" in {now - began:.0f} s"
        elif step.done > first:
            time_text = f", ETA {(now - began) / (step.done - first) * (step.total - step.done):.0f} s"
        self.console.print(f"{step.stage}: {step.done}/{step.total}{time_text} {step.note}", markup=False)
