"""The bench stage as one call: artifacts go in, a report folder comes out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from owl_deploy.bench.measure import measure_artifacts
from owl_deploy.bench.report import write_report
from owl_deploy.files import new_folder

__all__ = ["run_bench"]

log = logging.getLogger(__name__)


def run_bench(artifacts: Sequence[Path], *, out: Path, force: bool = False, **measuring: Any) -> dict[str, Any]:
    """Measure artifacts and write `report.json`, `report.md`, `report.html` and `report.csv`.

    After an interrupt the report holds what was measured until then.

    Args:
        artifacts: folders; their names must differ.
        out: folder of the report. A place that cannot be written is known before anything is measured.
        force: replace `out` if it exists.
        measuring: settings, baseline and the other arguments of `measure_artifacts`.

    Returns:
        The content of report.json.

    Raises:
        OwlDeployError: and its subclasses; nothing half-written is left at `out`.
        KeyboardInterrupt: again, once what was measured is written.
    """
    with new_folder(out, replace=force) as folder:
        measured = measure_artifacts(artifacts, **measuring)
        write_report(measured, folder)
    if measured["stopped"]:
        log.warning("stopped in %s; what was measured until then: %s", measured["stopped"], out)
        raise KeyboardInterrupt
    return measured
