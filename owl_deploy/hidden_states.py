"""The hidden states of calibration sequences between two blocks, in memory or on disk.

128 sequences of 2048 tokens of a 7B model are 4 GiB: more than the blocks that are in memory beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["HiddenStates"]


class HiddenStates:
    """One tensor per sequence, all of one shape, float32 on the CPU; a sequence of them.

    On disk they are read and written one by one, not mapped: mapped pages would count as memory of this process.
    The file has no name, so that it is gone with the process, however that ends.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open while we are)
        self._held: list[torch.Tensor] = []
        self._shape: torch.Size | None = None
        self._n = 0

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(self._n))

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < self._n:
            raise IndexError(i)
        if self._file is None:
            return self._held[i]
        assert self._shape is not None
        values = torch.empty(self._shape)
        self._file.seek(i * values.nbytes)
        self._file.readinto(values.view(torch.uint8).numpy().data)
        return values

    def __setitem__(self, i: int, values: torch.Tensor) -> None:
        """Replace sequence i, or add one where i is their number. Raises OSError where the disk is full."""
        values = values.detach().to("cpu", torch.float32)
        if self._shape is not None and values.shape != self._shape:
            raise ValueError(f"all sequences have one shape, {tuple(self._shape)}, got {tuple(values.shape)}")
        if not 0 <= i <= self._n:
            raise IndexError(i)
        self._shape = values.shape
        if self._file is not None:
            self._file.seek(i * values.nbytes)
            self._file.write(values.contiguous().view(torch.uint8).numpy().data)
        elif i == self._n:
            self._held.append(values)
        else:
            self._held[i] = values
        self._n = max(self._n, i + 1)

    def append(self, values: torch.Tensor) -> None:
        """Add a sequence."""
        self[self._n] = values
