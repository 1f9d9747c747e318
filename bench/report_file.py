"""A report.json read back: a path in, the result that was written out, checked for what a comparison needs.

Only these keys are checked: the file may be of an older or a newer version, or written by someone else.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from owl_deploy.bench.comparison import Result, Workload
from owl_deploy.errors import RecipeError, shown

__all__ = ["WORKLOAD_KEYS", "read_report", "report_schema"]

WORKLOAD_KEYS = tuple(field.name for field in fields(Workload) if field.name != "rows")
"""The keys of a row that say what was run."""

_Name = Annotated[str, Field(min_length=1, max_length=1000)]
_Round = Annotated[list[Annotated[int, Field(gt=0, lt=2**62)]], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Parity(_Part):
    passed: bool


class _Speedup(_Part):
    p50: float
    low: float
    high: float


class _Row(_Part):
    engine: _Name
    artifact: _Name
    weights: _Name
    precision: _Name
    threads: int
    status: Literal["ok", "failed"]
    is_baseline: bool
    samples_ns: Annotated[list[_Round], Field(description="Nanoseconds of every call, round by round.")]
    reason: Annotated[str | None, Field(description="Why it failed.")] = None
    sparsity: Annotated[float | None, Field(description="Zeros over elements of the pruned matrices.")] = None
    ms: Annotated[dict[str, float] | None, Field(description="p50, p90, p99 from 100 samples on, min; n samples.")] = (
        None
    )
    tokens_per_s: float | None = None
    speedup: Annotated[_Speedup | None, Field(description="Over the baseline: ratio of medians, 95 % interval.")] = None
    bytes_per_step: float | None = None
    ceiling_fraction: float | None = None
    peak_rss_bytes: float | None = None
    load_ms: float | None = None
    perplexity: float | None = None
    kl_divergence: Annotated[float | None, Field(description="From the reference model, in nats.")] = None
    top1_agreement: float | None = None
    accuracy: Annotated[float | None, Field(description="Mean over the tasks that were asked, 0 to 1.")] = None
    tasks: dict[str, dict[str, Any]] | None = None
    parity: _Parity | None = None
    evaluation: dict[str, Any] | None = None


class _Machine(_Part):
    load_before: float
    steal_fraction: float | None = None
    memory_bandwidth_bytes_per_s: float | None = None


class _Protocol(_Part):
    n_rounds: int


class _Report(_Part):
    versions: dict[str, str]
    commit: str | None = None
    stopped: Annotated[str | None, Field(description="Where an interrupt ended the run, if one did.")] = None
    artifacts: dict[str, str] = {}
    machine: _Machine
    protocol: _Protocol
    rows: Annotated[list[_Row], Field(min_length=1)]


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json; `report.schema.json` beside this module holds it."""
    schema = _Report.model_json_schema()
    row = schema["$defs"]["_Row"]
    row["properties"] |= {key: {"type": "string" if key == "phase" else "integer"} for key in WORKLOAD_KEYS}
    row["required"] += [key for key in WORKLOAD_KEYS if key != "n_new"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "report.json of owl-deploy"}


def read_report(path: Path) -> Result:
    """Read a report.json, or that of a report's folder.

    Raises:
        RecipeError: there is none, or it lacks what a comparison needs.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}): give a report.json or its folder") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file} is not JSON: give a report.json that owl-deploy bench has written") from error
    problem = _problem(result)
    if problem is not None:
        raise RecipeError(f"{file} is no report: {problem}; give a report.json that owl-deploy bench has written")
    return result


def _problem(result: Any) -> str | None:
    """Return what a JSON value lacks, or None."""
    try:
        _Report.model_validate(result)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        return f"{place}: {first['msg']}, found {shown(first['input'])}"
    for number, row in enumerate(result["rows"]):
        row.setdefault("n_new", 0)  # reports of before there was generation
        for key in WORKLOAD_KEYS:
            if type(row.get(key)) not in (int, str):
                return f"rows.{number}.{key}: should say what was run, found {shown(row.get(key))}"
        if row["status"] == "ok" and len(row["samples_ns"]) < 2:
            return f"rows.{number}.samples_ns: should hold two rounds or more, found {len(row['samples_ns'])}"
    return None
