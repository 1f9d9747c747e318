"""From a dense Hugging Face language model to a sparse one that is really faster on a CPU.

All that the command line does is one of these functions; they are imported when first used, so
that importing the package is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owl_deploy.artifact import open_artifact
    from owl_deploy.bench.run import run_bench
    from owl_deploy.checkpoint import open_checkpoint
    from owl_deploy.depth import prune_depth
    from owl_deploy.engines.bridge import install_bridge
    from owl_deploy.evaluation import evaluate
    from owl_deploy.export.writer import export_onnx
    from owl_deploy.pipeline import run
    from owl_deploy.pruning import prune
    from owl_deploy.recipe import load_recipe
    from owl_deploy.sweep import run_sweep

__all__ = [
    "evaluate",
    "export_onnx",
    "install_bridge",
    "load_recipe",
    "open_artifact",
    "open_checkpoint",
    "prune",
    "prune_depth",
    "run",
    "run_bench",
    "run_sweep",
]

_HOMES = {
    "evaluate": "owl_deploy.evaluation",
    "export_onnx": "owl_deploy.export.writer",
    "install_bridge": "owl_deploy.engines.bridge",
    "load_recipe": "owl_deploy.recipe",
    "open_artifact": "owl_deploy.artifact",
    "open_checkpoint": "owl_deploy.checkpoint",
    "prune": "owl_deploy.pruning",
    "prune_depth": "owl_deploy.depth",
    "run": "owl_deploy.pipeline",
    "run_bench": "owl_deploy.bench.run",
    "run_sweep": "owl_deploy.sweep",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
