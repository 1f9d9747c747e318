"""DSnoT: a mask improved by swaps that bring the expected output error to zero (arXiv 2310.08915).

In: the dense weight of a linear, a mask by whatever method, the moments of its inputs. Out: another mask
with as many kept weights in every row, and in every group of a pattern. How the mask was found is not known here.
"""

from __future__ import annotations

import torch

from owl_deploy.methods.method import Goal

__all__ = ["InputMoments", "dsnot"]

_CHUNK_ELEMENTS = 1 << 20
"""Weights worked on at a time: what a cycle touches stays within some 8 MiB per float64 array."""


class InputMoments:
    """Mean and variance of every input over all tokens, and what follows from them; everything float64.

    One mean and one sum of squared deviations are updated per sequence (Chan, Golub and LeVeque 1979), so that
    the variance of inputs with a large mean is not a difference of large sums. The official code averages the
    variances within the sequences instead, which leaves out how their means differ.
    """

    def __init__(self, in_features: int) -> None:
        self.mean = torch.zeros(in_features, dtype=torch.float64)
        """Mean of x_j over all tokens, (in_features,)."""
        self.deviations = torch.zeros(in_features, dtype=torch.float64)
        """Sum over all tokens of (x_j - mean)^2, (in_features,)."""
        self.n_tokens = 0
        self.n_sequences = 0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one sequence, (tokens, in_features)."""
        self.n_sequences += 1
        if not len(inputs):
            return
        x = inputs.double()
        mean = x.mean(dim=0)
        self._add(len(x), mean, (x - mean).square_().sum(dim=0))

    def merge(self, other: InputMoments) -> None:
        """Take in what another has seen of other sequences."""
        self.n_sequences += other.n_sequences
        if other.n_tokens:
            self._add(other.n_tokens, other.mean.to(self.mean.device), other.deviations.to(self.mean.device))

    def _add(self, n_tokens: int, mean: torch.Tensor, deviations: torch.Tensor) -> None:
        self.mean, self.deviations = self.mean.to(mean.device), self.deviations.to(mean.device)
        shift, before = mean - self.mean, self.n_tokens
        self.n_tokens += n_tokens
        self.mean += shift * (n_tokens / self.n_tokens)
        self.deviations += deviations + shift.square() * (before * n_tokens / self.n_tokens)

    def is_finite(self) -> bool:
        """Return whether all that was taken in was finite."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.deviations).all())

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens of a sequence, on average."""
        return self.n_tokens / max(1, self.n_sequences)

    @property
    def sums(self) -> torch.Tensor:
        """mu_j: mean over sequences of the sum over tokens of x_j, (in_features,)."""
        return self.mean * self.tokens_per_sequence

    @property
    def variance(self) -> torch.Tensor:
        """Var(x_j) over all tokens, divided by their number, (in_features,)."""
        return self.deviations / max(1, self.n_tokens)

    @property
    def norm(self) -> torch.Tensor:
        """||X_j||: what `SquaredNorm.norm` is, (in_features,)."""
        return ((self.variance + self.mean.square()) * self.tokens_per_sequence).sqrt()


def dsnot(
    weight: torch.Tensor,
    mask: torch.Tensor,
    moments: InputMoments,
    goal: Goal,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
) -> torch.Tensor:
    """Swap pruned weights for kept ones until the expected output error of each row is small.

    With E = sum of W_ij mu_j over the pruned j of row i, a cycle swaps one pair in every row that goes on:

    - it grows the pruned weight with the largest W_ij mu_j / Var(x_j)^power of the sign of E, among those that
      have a partner;
    - its partner, which is pruned instead, is the kept weight of lowest Wanda score whose W_ij mu_j has the other
      sign: of the row, or, with a pattern, of the same group.

    A row stops when E is small, no pair is left, or the swap would not make abs(E) smaller; no position is
    swapped twice. All of E is float64; of equals, the one with the lower column index.

    Where the official code differs:

    - It stops at abs(E) <= 0.1, and E scales with weights, activations and the length of the sequences. Here
      `threshold` is in units of the spread of the output error: a row stops when the mean error of a token is at
      most `threshold` times the standard deviation that the pruned weights give it, inputs taken as independent.
      At 0.1 the mean adds at most 1 % to the squared error. To remove all of it costs more than it gains: on random
      inputs without a mean, threshold 0 raised the output error by 7 to 20 %, and 0.1 left it as it was.
    - It accepts swaps that overshoot, even to a larger abs(E), for unstructured masks (its
      `--without_same_sign` is true whatever is given), and stops at any change of sign with a pattern.
    - With a pattern it prunes the lowest Wanda score of the group whatever its sign.
    - It refines attention only unless told otherwise (`--skip_layer mlp`). Here the caller decides.

    Args:
        weight: (out, in) float32, dense: also what would come back in pruned positions.
        mask: (out, in) bool, True = kept; not changed.
        moments: of the linear's inputs.
        goal: its pattern, if any, restricts swaps to groups; how many are pruned is up to `mask`.
        max_cycles: swaps per row at most.
        threshold: in standard deviations per token, see above; 0 goes on while anything is gained.
        power: of the variance. 0 grows what changes E most.

    Returns:
        Mask (out, in) bool, True = kept; as many per row, or per group, as before.

    Raises:
        ValueError: the shapes do not fit, or the columns are no multiple of the pattern's group.
    """
    rows, columns = weight.shape
    if mask.shape != weight.shape or len(moments.mean) != columns:
        raise ValueError(
            f"need a mask and moments for a weight of {rows} x {columns}, got a mask of {tuple(mask.shape)} and "
            f"{len(moments.mean)} inputs"
        )
    group = columns
    if goal.pattern:
        goal.pattern.check_columns(columns)
        group = goal.pattern.of
    refined = mask.clone()
    # Every number of a row depends on that row alone, so that the chunks do not show in the result.
    chunk = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        _refine_(refined[part], weight[part].double(), moments, group, max_cycles, threshold, power)
    return refined


def _refine_(
    mask: torch.Tensor,
    weight: torch.Tensor,
    moments: InputMoments,
    group: int,
    max_cycles: int,
    threshold: float,
    power: float,
) -> None:
    """Swap in some rows of a mask, in place. `weight` is float64, `group` the columns of a group."""
    pruned = ~mask
    effect = weight * moments.sums  # what pruning a weight adds to the error
    error = torch.where(pruned, effect, 0.0).sum(dim=1)
    spread = torch.where(pruned, weight.square() * moments.variance, 0.0).sum(dim=1).sqrt()
    enough = threshold * spread * moments.tokens_per_sequence
    # A constant input has no variance to be paid for: infinitely useful. 0 / 0 is one that never says anything.
    usefulness = torch.where(
        pruned, (effect / moments.variance**power).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), 0.0
    )
    cost = torch.where(mask, weight.abs() * moments.norm, torch.inf)
    active = torch.arange(len(mask), device=mask.device)
    for _ in range(max_cycles):
        going = error.abs() > enough
        if not going.all():
            active, error, enough = active[going], error[going], enough[going]
            effect, usefulness, cost = effect[going], usefulness[going], cost[going]
        if not len(active):
            return
        sign = error.sign().unsqueeze(1)
        helps = torch.where(effect * sign < 0, cost, torch.inf).reshape(len(active), -1, group)
        cheapest, partner = helps.min(dim=2)
        useful = (usefulness * sign).reshape(len(active), -1, group)
        gain, grown = torch.where(torch.isfinite(cheapest).unsqueeze(2), useful, -torch.inf).flatten(1).max(dim=1)
        of_group = (grown // group).unsqueeze(1)
        gone = partner.gather(1, of_group).squeeze(1) + of_group.squeeze(1) * group
        here = torch.arange(len(active), device=mask.device)
        after = error + effect[here, gone] - effect[here, grown]
        accepted = (gain > 0) & (after.abs() < error.abs())
        here, grown, gone = here[accepted], grown[accepted], gone[accepted]
        mask[active[here], grown] = True
        mask[active[here], gone] = False
        usefulness[here, grown] = 0.0
        cost[here, gone] = torch.inf
        error = torch.where(accepted, after, 0.0)  # a row that refused its swap is done
