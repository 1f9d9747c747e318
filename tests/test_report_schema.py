"""The published JSON Schema of report.json: what reports hold to, and what it refuses."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from test_frontier import two_cells
from test_report import FASTER, bench_result

from owl_deploy.bench.report_file import report_schema

PUBLISHED = json.loads((files("owl_deploy.bench") / "report.schema.json").read_text(encoding="utf-8"))


def test_the_published_schema_is_that_of_the_code() -> None:
    """Make it anew with: json.dumps(report_schema(), indent=1)."""
    assert report_schema() == PUBLISHED
    Draft202012Validator.check_schema(PUBLISHED)


RESULTS = {"bench": bench_result(FASTER), "sweep": two_cells({"a-0.9": {"int8": "out of memory"}})}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_reports_hold_to_the_schema(result: dict[str, Any]) -> None:
    Draft202012Validator(PUBLISHED).validate(json.loads(json.dumps(result)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples_ns", [[0]]), ("status", "perhaps"), ("past_len", "256"), ("speedup", {"p50": 1.0}), ("engine", "")],
)
def test_the_schema_refuses(key: str, value: Any) -> None:
    result = copy.deepcopy(json.loads(json.dumps(two_cells())))
    result["rows"][0][key] = value
    assert not Draft202012Validator(PUBLISHED).is_valid(result)
    del result["rows"][0][key]
    if key != "speedup":
        assert not Draft202012Validator(PUBLISHED).is_valid(result)
