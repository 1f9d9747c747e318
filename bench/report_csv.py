"""The rows of a bench result as a spreadsheet: one line per artifact and workload, numbers unrounded.

A speed-up that must not be shown is left out here too, and the reason stands beside it.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from owl_deploy.bench.comparison import Result, has_speedup, printable, void_reason, workloads_of
from owl_deploy.bench.plots import Row
from owl_deploy.bench.report_file import WORKLOAD_KEYS

__all__ = ["report_csv"]

_OF_THE_ROW = ("engine", "artifact", "weights", "precision", "sparsity", "threads", *WORKLOAD_KEYS, "status", "reason")
_QUALITY = ("perplexity", "kl_divergence", "top1_agreement", "accuracy")
_COST = ("tokens_per_s", "ceiling_fraction", "bytes_per_step", "peak_rss_bytes", "load_ms")


def report_csv(result: Result) -> str:
    """Return the rows as CSV, with a heading; what is unknown is empty."""
    lines = [_line(row, load.baseline) for load in workloads_of(result) for row in load.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(row: Row, baseline: Row | None) -> dict[str, Any]:
    ms, speedup = row.get("ms") or {}, row.get("speedup") or {}
    is_shown = has_speedup(row, baseline) and not row["is_baseline"]
    void = void_reason(row, baseline) if row["status"] == "ok" else None
    found = {key: row.get(key) for key in _OF_THE_ROW}
    found |= {f"{name}_ms": ms.get(name) for name in ("p50", "p90", "p99", "min")} | {"n_samples": ms.get("n")}
    found |= {key: row.get(key) for key in _COST}
    found |= {
        name: speedup.get(key) if is_shown else None
        for name, key in (("speedup", "p50"), ("speedup_low", "low"), ("speedup_high", "high"))
    }
    found |= {"is_baseline": row["is_baseline"], "void": void, **{key: row.get(key) for key in _QUALITY}}
    return {key: printable(value) if isinstance(value, str) else value for key, value in found.items()}
