"""Levels of linears, made on demand: against the methods themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model

from owl_deploy.block_pruning import prune_block_, statistic_kinds
from owl_deploy.calibration import Calibration, calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.dense_inputs import dense_inputs
from owl_deploy.level_database import LevelDatabase, most_bytes, observed_inputs, open_level_database
from owl_deploy.methods import METHODS, Goal
from owl_deploy.progress import silent
from owl_deploy.recipe import PruneSettings
from owl_deploy.replicas import Replicas
from owl_deploy.skeleton import Skeleton, open_skeleton

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Level {i} of {i * 7 % 13} is high.\n" for i in range(300)))
    return path


def prepared(model: Path, text: Path, **changes: Any) -> tuple[Skeleton, PruneSettings, Calibration]:
    values = {"allocation": "evopress", "calibration": f"text:{text}", "n_samples": 4, "seq_len": 48}
    wanted = PruneSettings.model_validate({**values, **changes})
    checkpoint = open_checkpoint(str(model))
    torch.set_num_threads(1)
    return open_skeleton(checkpoint), wanted, calibration_tokens(checkpoint, wanted, seed=0)


def directly(skeleton: Skeleton, wanted: PruneSettings, calibration: Calibration, sparsity: float) -> Any:
    """Both blocks pruned by the driver's own function, both with the inputs of the dense model, as they are stored."""
    found: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    replicas = Replicas.capture([skeleton], torch.from_numpy(calibration.tokens))
    for index in range(2):
        linears = skeleton.linears(index)
        dtypes = {name: skeleton.checkpoint.dtype(name) for name in skeleton.block_tensors(index)}
        with replicas.filled(index):
            kept |= {name: linear.weight.clone() for name, linear in linears.items()}
            seen = replicas if statistic_kinds(wanted) else None
            prune_block_(skeleton, wanted, index, seen, None, dict.fromkeys(linears, Goal(sparsity)), dtypes)
            found |= {name: linear.weight.to(dtypes[linear.parameter]).clone() for name, linear in linears.items()}
            for name, linear in linears.items():
                linear.set_(kept[name])
            replicas.advance_(index)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_levels_are_what_the_method_makes_of_the_dense_model(
    method: str, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    skeleton, wanted, calibration = prepared(tiny_model, text, method=method, block_size=16)
    observed = observed_inputs([skeleton], wanted, calibration, None, silent)
    with open_level_database(skeleton, wanted, observed, tmp_path) as database:
        for sparsity in (0.3, 0.72):
            for name, expected in directly(skeleton, wanted, calibration, sparsity).items():
                actual = database.weight(int(name.split(".")[2]), name, sparsity)
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected), name


def test_a_refinement_is_part_of_a_level(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    skeleton, wanted, calibration = prepared(tiny_model, text, refine="dsnot")
    observed = observed_inputs([skeleton], wanted, calibration, None, silent)
    expected = directly(skeleton, wanted, calibration, 0.6)
    with open_level_database(skeleton, wanted, observed, tmp_path) as database:
        assert all(torch.equal(database.weight(1, name, 0.6), expected[name]) for name in (Q, DOWN))


def test_levels_have_the_type_of_the_checkpoint(text: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", dtype="bfloat16")
    _half(model)
    skeleton, wanted, calibration = prepared(model, text, method="sparsegpt")
    observed = observed_inputs([skeleton], wanted, calibration, None, silent)
    expected = directly(skeleton, wanted, calibration, 0.5)
    with open_level_database(skeleton, wanted, observed, tmp_path) as database:
        for _ in range(2):  # made, then read
            assert database.weight(1, Q, 0.5).dtype == torch.bfloat16
            assert torch.equal(database.weight(1, Q, 0.5), expected[Q])


def _half(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_norms_that_are_known_are_not_taken_again(tiny_model: Path, text: Path) -> None:
    skeleton, wanted, calibration = prepared(tiny_model, text)
    seen = dense_inputs([skeleton], calibration, silent, n_threads=1)
    assert observed_inputs([skeleton], wanted, calibration, seen, silent) is seen


def test_magnitude_looks_at_no_inputs(tiny_model: Path, text: Path) -> None:
    skeleton, wanted, calibration = prepared(tiny_model, text, method="magnitude")
    assert observed_inputs([skeleton], wanted, calibration, None, silent) == [{}, {}]


@pytest.fixture
def magnitude(tiny_model: Path, text: Path) -> tuple[Skeleton, PruneSettings]:
    skeleton, wanted, _ = prepared(tiny_model, text, method="magnitude")
    return skeleton, wanted


def test_a_level_is_made_once_and_the_model_is_empty_again(
    magnitude: tuple[Skeleton, PruneSettings], tmp_path: Path
) -> None:
    skeleton, wanted = magnitude
    with open_level_database(skeleton, wanted, [{}, {}], tmp_path) as database:
        first = database.weight(1, Q, 0.5)
        (file,) = database.folder.iterdir()
        before = file.stat().st_mtime_ns
        assert torch.equal(database.weight(1, Q, 0.5), first)
        assert [(one, one.stat().st_mtime_ns) for one in database.folder.iterdir()] == [(file, before)]
        assert all(parameter.is_meta for parameter in skeleton.blocks.parameters())


def test_predicted_bytes_are_those_of_all_levels(magnitude: tuple[Skeleton, PruneSettings], tmp_path: Path) -> None:
    skeleton, wanted = magnitude
    names = [name for index in range(2) for name in skeleton.linears(index)]
    n_levels = {name: 1 + i % 3 for i, name in enumerate(names)}
    with open_level_database(skeleton, wanted, [{}, {}], tmp_path) as database:
        held = sum(
            database.weight(int(name.split(".")[2]), name, 0.1 * level).nbytes
            for name in names
            for level in range(n_levels[name])
        )
    assert most_bytes(skeleton, n_levels) == held


def test_nothing_is_left_of_a_database(magnitude: tuple[Skeleton, PruneSettings], tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_level_database(*magnitude, [{}, {}], tmp_path) as database:
            database.weight(1, Q, 0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_up(magnitude: tuple[Skeleton, PruneSettings], tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in (".levels.999999999.tmp", ".levels.1.tmp", ".levels.mine.tmp"))
    for folder in (dead, alive, other):
        folder.mkdir()
    with open_level_database(*magnitude, [{}, {}], tmp_path) as database:
        assert isinstance(database, LevelDatabase)
    assert sorted(tmp_path.iterdir()) == [alive, other]
