"""Artifacts to latency report: workloads, the timing loop, machine facts, statistics, report pages."""
