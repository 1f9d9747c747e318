"""Pruning methods: each says which weights of one linear are kept, and some what becomes of them.

A method is a module with a `METHOD`; adding one is adding a module and a line here. The driver
(`owl_deploy.pruning`) knows nothing of what a method computes.
"""

from owl_deploy.methods import alps, dass, foundation, isc, magnitude, ria, sparsegpt, wanda
from owl_deploy.methods.method import Goal, Linear, Method, Pruned

__all__ = [
    "METHODS",
    "Goal",
    "Linear",
    "Method",
    "Pruned",
    "alps",
    "dass",
    "foundation",
    "isc",
    "magnitude",
    "ria",
    "sparsegpt",
    "wanda",
]

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (magnitude, wanda, ria, dass, sparsegpt, isc, alps, foundation)
}
"""Every method by its `--method` name."""
