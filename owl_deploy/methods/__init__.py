"""Pruning methods: each scores the weights of one linear and says which are kept.

A method is a module with a `METHOD`; adding one is adding a module and a line here. The driver
(`owl_deploy.pruning`) knows nothing of what a method computes.
"""

from owl_deploy.methods import magnitude, wanda
from owl_deploy.methods.method import Method

__all__ = ["METHODS", "Method"]

METHODS: dict[str, Method] = {method.name: method for method in (magnitude.METHOD, wanda.METHOD)}
"""Every method by its `--method` name."""
