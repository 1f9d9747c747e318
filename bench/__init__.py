"""Artifacts to latency report: workloads, the timing loop, machine facts, statistics, report pages."""

from owl_deploy.bench.measure import measure_artifacts
from owl_deploy.bench.report import write_report

__all__ = ["measure_artifacts", "write_report"]
