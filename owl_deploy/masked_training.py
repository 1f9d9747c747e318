"""AdamW that leaves pruned weights at zero, and the order in which it sees sequences.

In: parameters by name (of one process, or shared out among several), where they are pruned. Out: steps, of gradients
that somebody else has made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from owl_deploy.process_group import local, share_like

__all__ = ["MaskedAdamW", "batches"]

_MAX_NORM = 1.0  # of the gradient: the first steps of a block with few weights left would otherwise be wild
_WARM_UP = 0.1  # share of the work in which the learning rate rises; it falls to zero in the rest
_BETAS = (0.9, 0.95)
_KINDS = ("step", "exp_avg", "exp_avg_sq")


class MaskedAdamW:
    """AdamW without weight decay; pruned weights get no gradient, so that momentum never moves them either."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor], learning_rate: float
    ) -> None:
        """Begin.

        Args:
            parameters: by name; all are trained.
            masks: of some of them, bool of the same shape, True where pruned.
            learning_rate: at its highest.
        """
        self._parameters, self._learning_rate = parameters, learning_rate
        self._masks = {name: local(share_like(pruned, parameters[name])) for name, pruned in masks.items()}
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0, betas=_BETAS)

    def step(self, share: float) -> None:
        """Apply the gradients, and forget them.

        Args:
            share: of the whole work that is done before this step, 0 to 1: the learning rate rises in the first tenth
                and falls to zero in a straight line afterwards.
        """
        rise = (share + 0.01) / (_WARM_UP + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate * (rise if share < _WARM_UP else (1 - share) / (1 - _WARM_UP))
        for name, pruned in self._masks.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                local(gradient).masked_fill_(pruned, 0)
        nn.utils.clip_grad_norm_(self._parameters.values(), _MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, pruned in self._masks.items():
                local(self._parameters[name]).masked_fill_(pruned, 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `load` takes, by kind and name of the parameter: shares, where parameters are shares."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            of = self.optimizer.state.get(parameter, {})
            found |= {f"{kind}/{name}": of[kind] for kind in _KINDS if kind in of}
        return found

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where another one was, of which `state` is whole."""
        for name, parameter in self._parameters.items():
            of = {kind: state[f"{kind}/{name}"] for kind in _KINDS if f"{kind}/{name}" in state}
            if of:
                shares = {kind: share_like(of[kind], parameter) for kind in _KINDS if kind != "step"}
                self.optimizer.state[parameter] = {**of, **shares}


def batches(n_train: int, *, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the sequences of every step, each sequence once per epoch, and whether an epoch ends there."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n_train, generator=generator).tolist()
        for first in range(0, n_train, batch_size):
            yield order[first : first + batch_size], first + batch_size >= n_train
