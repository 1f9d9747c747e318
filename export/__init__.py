"""Checkpoint to ONNX artifact: graphs, initializers, parity. No timing, no serving."""
