"""Calibration sequences shared among devices or threads, each of which runs the same block over its part.

With one part this is a plain loop. What all see is merged, so that a block is pruned once.

On the CPU the parts are threads over one and the same block, each with products of one thread of its own: 25 ms a
block and sequence of SmolLM2-135M (512 tokens), against 29 one sequence after the other with products of two threads,
because norms, activations and rotations are then shared out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from owl_deploy import observation
from owl_deploy.observation import Groups, Kinds, Observed
from owl_deploy.skeleton import BlockInputs, Skeleton

__all__ = ["Replicas"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Replicas:
    """Skeletons of one checkpoint, and the inputs of each one's sequences."""

    skeletons: Sequence[Skeleton]
    """One per device; threads of the CPU share one, which is there as often as there are threads."""
    inputs: Sequence[BlockInputs]

    @classmethod
    def capture(
        cls,
        skeletons: Sequence[Skeleton],
        tokens: torch.Tensor,
        *,
        threads_apart: bool = False,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
    ) -> Replicas:
        """Run everything before block 0, everywhere for its part of the sequences.

        Args:
            skeletons: one per device; where there are more than sequences, the last ones have nothing to do.
            tokens: (n_samples, seq_len) int64.
            threads_apart: whether threads of the CPU take sequences of their own. What they remember of their inputs is
                then in memory once per thread: nothing for norms, much for Hessians.
            dtype: of matrix products.
            folder: for the hidden states, where they are to be on disk.
        """
        used = list(skeletons)
        if threads_apart and len(used) == 1 and used[0].device.type == "cpu":
            used *= torch.get_num_threads()
        used = used[: len(tokens)]
        parts = torch.tensor_split(tokens, len(used))
        return cls(used, [one.capture(part, folder=folder, dtype=dtype) for one, part in zip(used, parts, strict=True)])

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Fill a block everywhere, and yield that of the first device."""
        with ExitStack() as stack:
            different = {id(skeleton): skeleton for skeleton in self.skeletons}
            blocks = [stack.enter_context(skeleton.filled(index)) for skeleton in different.values()]
            yield blocks[0]

    def input_groups(self, index: int) -> Groups:
        """See `observation.input_groups`."""
        first = self.skeletons[0]
        return observation.input_groups(first.blocks[index], self.inputs[0], index, first.linears(index))

    def observe(self, index: int, groups: Groups, kinds: Kinds) -> dict[str, Observed]:
        """See `observation.observe`; what every device saw, together, on the first one."""
        return self._observed(observation.observe, index, groups, kinds)

    def observe_and_advance_(self, index: int, groups: Groups, kinds: Kinds) -> dict[str, Observed]:
        """See `observation.observe_and_advance_`."""
        return self._observed(observation.observe_and_advance_, index, groups, kinds)

    def advance_(self, index: int) -> None:
        """See `observation.advance_`."""
        self._everywhere(index, lambda block, inputs, at, _: observation.advance_(block, inputs, at))

    def _observed(
        self, run: Callable[..., dict[str, Observed]], index: int, groups: Groups, kinds: Kinds
    ) -> dict[str, Observed]:
        parts = self._everywhere(
            index, lambda block, inputs, at, linears: run(block, inputs, at, linears, groups, kinds)
        )
        return _merged(parts, groups)

    def _everywhere(self, index: int, run: Callable[..., Found]) -> list[Found]:
        """Call `run` with block, inputs, index and linears of every device, side by side.

        The block is everywhere as it is on the first device by now.
        """
        self._copy_weights_(index)
        calls = [
            (skeleton.blocks[index], inputs, index, skeleton.linears(index))
            for skeleton, inputs in zip(self.skeletons, self.inputs, strict=True)
        ]
        if len(calls) == 1:
            return [run(*calls[0])]
        n_threads = torch.get_num_threads()
        each = max(1, n_threads // len(calls))
        try:
            with ThreadPoolExecutor(len(calls), initializer=torch.set_num_threads, initargs=(each,)) as pool:
                return list(pool.map(lambda call: run(*call), calls))
        finally:
            torch.set_num_threads(n_threads)  # some libraries keep one number for all threads

    @torch.no_grad()
    def _copy_weights_(self, index: int) -> None:
        first = self.skeletons[0]
        for skeleton in self.skeletons:
            if skeleton is not first:
                for name, parameter in first.blocks[index].named_parameters():
                    skeleton.blocks[index].get_parameter(name).copy_(parameter)


def _merged(parts: list[dict[str, Observed]], groups: Groups) -> dict[str, Observed]:
    """Return what all saw, shared within groups as before."""
    first, *others = parts
    for group in groups:
        mine = first[group[0]]
        for other in others:
            theirs = other[group[0]]
            mine.n_tokens += theirs.n_tokens
            for statistic, seen in zip(mine.statistics, theirs.statistics, strict=True):
                statistic.merge(seen)
    return first
