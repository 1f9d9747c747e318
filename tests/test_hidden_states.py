"""Hidden states in memory and on disk."""

import errno
from pathlib import Path

import pytest
import torch

from owl_deploy.hidden_states import HiddenStates


@pytest.fixture(params=["memory", "disk"])
def states(request: pytest.FixtureRequest, tmp_path: Path) -> HiddenStates:
    return HiddenStates(tmp_path if request.param == "disk" else None)


def test_what_was_added_or_replaced_comes_back(states: HiddenStates) -> None:
    rows = [torch.randn(1, 5, 3) for _ in range(4)]
    for row in rows:
        states.append(row)
    rows[2] = torch.randn(1, 5, 3)
    states[2] = rows[2]
    assert len(states) == 4
    assert all(torch.equal(a, b) for a, b in zip(states, rows, strict=True))


def test_strided_and_half_precision_values_are_stored_as_float32(states: HiddenStates) -> None:
    row = torch.randn(1, 6, 3).to(torch.bfloat16)[:, ::2]
    states.append(row)
    assert states[0].dtype == torch.float32
    assert torch.equal(states[0], row.float())


def test_other_shapes_and_places_are_refused(states: HiddenStates) -> None:
    states.append(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="one shape"):
        states.append(torch.zeros(1, 3, 2))
    with pytest.raises(IndexError):
        states[3] = torch.zeros(1, 2, 3)
    with pytest.raises(IndexError):
        states[1]


def test_the_file_has_no_name_to_be_left_behind(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path)
    states.append(torch.zeros(1, 2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = HiddenStates(tmp_path)

    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    states._file.close()  # type: ignore[union-attr]
    monkeypatch.setattr(states, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        states.append(torch.zeros(1, 2, 3))
