"""Which nodes ONNX Runtime runs, and where: `python -m owl_deploy.explain_nodes MODEL THREADS [OPERATOR LIBRARY]`.

In: a model.onnx. Out: how often each operator was assigned to which execution provider, and how often it runs in one
step of one token. In a process of its own: a file that makes the engine crash must cost a sentence, not the program.

ONNX Runtime tells assignments as of the moment at which it hands nodes to providers; what it fuses afterwards (of
OPT's, for one, additions with the norms behind them) shows in a profile of a real step alone. So one is run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_deploy.errors import UnsupportedModelError

__all__ = ["RunNodes", "run_nodes"]

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RunNodes:
    """What ONNX Runtime made of a graph."""

    version: str
    """Of ONNX Runtime."""
    assigned: dict[tuple[str, str, str], int]
    """Nodes by provider, domain and operator, as assigned."""
    run: dict[tuple[str, str], int]
    """Nodes by provider and operator that ran in one decode step, after all fusions."""


def run_nodes(model: Path, *, threads: int, operators: Path | None) -> RunNodes:
    """Load a model in ONNX Runtime and run one token through it.

    Args:
        model: model.onnx.
        threads: of the engine.
        operators: operator library that the graph needs, None where it needs none.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the model, or crashes on it.
    """
    command = [sys.executable, "-m", "owl_deploy.explain_nodes", str(model.resolve()), str(threads)]
    if operators is not None:
        command.append(str(operators))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedModelError(f"ONNX Runtime gave no answer about {model} for {_TIMEOUT_S:g} s") from error
    if done.returncode:
        code = done.returncode
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {code}"]
        why = f"signal {signal.Signals(-code).name}" if code < 0 else words[-1][:300]
        raise UnsupportedModelError(f"ONNX Runtime cannot run {model} ({why}): export the model again")
    found = json.loads(done.stdout)
    return RunNodes(
        found["version"],
        {(provider, domain, operator): count for provider, domain, operator, count in found["assigned"]},
        {(provider, operator): count for provider, operator, count in found["run"]},
    )


def _probe(model: str, threads: int, operators: str | None) -> dict[str, Any]:
    """Do it in this process; see `run_nodes`."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.enable_profiling = True
    if operators is not None:
        options.register_custom_ops_library(operators)
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        assigned = Counter(
            (part.ep_name, node.domain, node.op_type)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )
        # One token behind an empty cache: lengths that the graph leaves open are 1, of the cache 0.
        feeds: dict[str, Any] = {}
        for entry in session.get_inputs():
            is_cache = entry.type == "tensor(float)"
            shape = [
                size if isinstance(size, int) else int(not is_cache or at == 0) for at, size in enumerate(entry.shape)
            ]
            kind = np.float32 if is_cache else np.int64
            feeds[entry.name] = np.full(shape, entry.name == "attention_mask", kind)
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    run = Counter(
        (event["args"]["provider"], event["args"]["op_name"])
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    )
    return {
        "version": onnxruntime.__version__,
        "assigned": [[*key, count] for key, count in assigned.items()],
        "run": [[*key, count] for key, count in run.items()],
    }


if __name__ == "__main__":
    print(json.dumps(_probe(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)))
