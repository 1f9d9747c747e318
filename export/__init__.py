"""Checkpoint to ONNX artifact: graphs, initializers, parity. No timing, no serving."""

from owl_deploy.export.writer import export_onnx, export_summary

__all__ = ["export_onnx", "export_summary"]
