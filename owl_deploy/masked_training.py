"""AdamW that leaves pruned weights at zero, and the order in which it sees sequences.

In: parameters by name (of one process, or shared out among several), where they are pruned. Out: steps, of gradients
that somebody else has made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from owl_deploy.process_group import local, share_like, whole

__all__ = ["MaskedAdamW", "batches"]

_MAX_NORM = 1.0  # of the gradient: the first steps of a block with few weights left would otherwise be wild
_WARM_UP = 0.1  # share of the work in which the learning rate rises; it falls to zero in the rest
_BETAS = (0.9, 0.95)
_KINDS = ("step", "exp_avg", "exp_avg_sq")


class MaskedAdamW:
    """AdamW without weight decay; pruned weights get no gradient, so that neither moments nor steps are of them."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, torch.Tensor],
        learning_rate: float,
        *,
        is_relative: bool = False,
    ) -> None:
        """Begin.

        Args:
            parameters: by name; all are trained.
            masks: of some of them, bool of the same shape, True where pruned.
            learning_rate: at its highest.
            is_relative: whether the learning rate of a parameter is that share of the root mean square of its weights
                that are not zero by now.
        """
        self._parameters = parameters
        # Numbers, not booleans: gradients of 885 thousand weights are masked in 0.13 ms, by masked_fill_ in 1.9.
        self._kept = {name: local(share_like((~pruned).float(), parameters[name])) for name, pruned in masks.items()}
        self._rates = {
            name: learning_rate * (_size(parameter) if is_relative else 1.0) for name, parameter in parameters.items()
        }
        groups = [{"params": [parameter], "lr": self._rates[name]} for name, parameter in parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=_BETAS, fused=True)

    def step(self, share: float) -> None:
        """Apply the gradients, and forget them.

        Args:
            share: of the whole work that is done before this step, 0 to 1: the learning rate rises in the first tenth
                and falls to zero in a straight line afterwards.
        """
        rise = (share + 0.01) / (_WARM_UP + 0.01)
        for group, rate in zip(self.optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * (rise if share < _WARM_UP else (1 - share) / (1 - _WARM_UP))
        for name, kept in self._kept.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                local(gradient).mul_(kept)
        nn.utils.clip_grad_norm_(self._parameters.values(), _MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `load` takes, by kind and name of the parameter: shares, where parameters are shares."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            of = self.optimizer.state.get(parameter, {})
            found |= {f"{kind}/{name}": of[kind] for kind in _KINDS if kind in of}
        # parameters have another size by now
        return found | {f"rate/{name}": torch.tensor(rate, dtype=torch.float64) for name, rate in self._rates.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where another one was, of which `state` is whole."""
        for name, parameter in self._parameters.items():
            if f"rate/{name}" in state:
                self._rates[name] = float(state[f"rate/{name}"])
            of = {kind: state[f"{kind}/{name}"] for kind in _KINDS if f"{kind}/{name}" in state}
            if of:
                shares = {kind: share_like(of[kind], parameter) for kind in _KINDS if kind != "step"}
                self.optimizer.state[parameter] = {**of, **shares}


@torch.no_grad()
def _size(parameter: nn.Parameter) -> float:
    """Return the root mean square of the weights that are not zero, at least a hundredth: biases may begin at zero."""
    values = whole(parameter).double()
    return max(float((values.square().sum() / values.count_nonzero().clamp_min(1)).sqrt()), 0.01)


def batches(n_train: int, *, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the sequences of every step, each sequence once per epoch, and whether an epoch ends there."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n_train, generator=generator).tolist()
        for first in range(0, n_train, batch_size):
            yield order[first : first + batch_size], first + batch_size >= n_train
