"""DaSS: gated MLPs pruned by what their down projection is fed (arXiv 2405.01943).

Neuron k of down(act(gate(x)) * up(x)) is row k of gate, row k of up and column k of down. All three are scored
by the size of its output, so that they tend to go together. The paper prunes nothing but MLPs: its 50 % are
50 % of MLP weights, two thirds of a Llama-2-7B decoder block, and its code leaves attention dense for the
methods it compares with as well. Here all other linears are pruned as Wanda does.
"""

from __future__ import annotations

import torch

from owl_deploy.methods import wanda
from owl_deploy.methods.method import Goal, Linear, Method, Pruned, prune_lowest
from owl_deploy.statistics import SquaredNorm

__all__ = ["METHOD", "prune", "score"]

_EXPONENT = 0.5  # of the neuron's norm: `alpha` of the paper and the default of its code; 1 empties whole neurons


def score(weight: torch.Tensor, neurons: SquaredNorm) -> torch.Tensor:
    """Return abs(W_kj) * ||h_k||^0.5, (out, in) float32, for gate or up.

    Args:
        weight: (out, in), one row per neuron.
        neurons: of the inputs h of the down projection; ||h_k|| is sqrt(c_k), so that the factor is c_k^0.25.
            The inputs of gate and up themselves do not count.
    """
    return weight.abs() * (neurons.norm**_EXPONENT).unsqueeze(1)


def prune(linear: Linear, goal: Goal) -> Pruned:
    """Zero the lowest scores: of every input column for gate and up, of every output row for down and all others.

    Every column of gate and of up (fused or not) loses exactly `n_pruned(neurons)`, ties by row, so their rows
    differ in sparsity; down and attention are Wanda, row by row.

    The official patterns for gate and up group successive outputs. Kernels need the groups along the inputs, where
    the factor c_k^0.25 is one and the same for the whole group: what would be left is magnitude pruning under the
    name of DaSS, hence the refusal.

    Raises:
        ValueError: gate or up and a pattern; no statistic of the neurons, or one of another number of neurons.
    """
    if linear.role in ("down", "other"):
        return wanda.prune(linear, goal)
    if goal.pattern is not None:
        raise ValueError(
            f"dass cannot prune {linear.name} with pattern {goal.pattern}: its score differs between the neurons of a "
            "column, and within a group of inputs it is only the magnitude; use unstructured, or wanda or ria"
        )
    if linear.neurons is None:
        raise ValueError(f"dass needs the statistic of the inputs of the down projection to prune {linear.name}")
    halves = linear.weight.chunk(2) if linear.role == "gate_up" else (linear.weight,)
    n_neurons = len(linear.neurons.mean)
    if any(len(half) != n_neurons for half in halves):
        raise ValueError(
            f"{linear.name} has {len(linear.weight)} rows as {linear.role}, its down projection {n_neurons} inputs"
        )
    # Columns as rows: the comparison is within each input, across neurons.
    masks = [prune_lowest(score(half, linear.neurons).T, goal).T for half in halves]
    return Pruned(torch.where(torch.cat(masks), linear.weight, 0.0))


METHOD = Method(name="dass", new_statistic=SquaredNorm, prune=prune, needs_neurons=True)
