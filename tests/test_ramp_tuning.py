"""The slope of an arithmetic allocation, tuned on calibration text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.progress import Step, silent
from owl_deploy.pruning import prune
from owl_deploy.ramp_tuning import TunedSlope, tune_slope
from owl_deploy.recipe import PruneSettings
from owl_deploy.skeleton import open_skeleton


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Slope {i} of hill {i * 7 % 13} is steep.\n" for i in range(300)))
    return path


def settings(text: Path, **changes: Any) -> PruneSettings:
    values = {"allocation": "ramp", "sparsity": 0.6, "calibration": f"text:{text}", "n_samples": 4, "seq_len": 32}
    return PruneSettings.model_validate({**values, **changes})


def tuned(model: Path, wanted: PruneSettings, on_step: Any = silent, seed: int = 0) -> TunedSlope:
    checkpoint = open_checkpoint(str(model))
    calibration = calibration_tokens(checkpoint, wanted, seed=seed)
    torch.set_num_threads(1)
    return tune_slope([open_skeleton(checkpoint)], wanted, calibration, on_step, n_threads=1)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_losses_are_those_of_the_pruned_checkpoints(method: str, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(text, method=method)
    found = tuned(tiny_model, wanted)
    tokens = torch.from_numpy(calibration_tokens(open_checkpoint(str(tiny_model)), wanted, seed=0).tokens)
    assert len(found.losses) == 9
    for i, (slope, loss) in enumerate(found.losses.items()):
        if i % 4:
            continue
        folder = tmp_path / str(i)
        prune(str(tiny_model), wanted.model_copy(update={"ramp_slope": float(slope)}), out=folder, threads=1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            expected = float(torch.stack([model(row[None], labels=row[None]).loss for row in tokens]).mean())
        assert loss == pytest.approx(expected, abs=1e-5)
    assert found.losses[repr(found.slope)] == min(found.losses.values())


def test_methods_with_an_update_are_stood_in_for_by_wanda(tiny_model: Path, text: Path) -> None:
    assert tuned(tiny_model, settings(text, method="sparsegpt")) == tuned(tiny_model, settings(text, method="wanda"))


def test_slopes_are_tried_once_and_then_read(tiny_model: Path, text: Path) -> None:
    steps: list[Step] = []
    first = tuned(tiny_model, settings(text), steps.append, seed=3)
    assert steps
    steps.clear()
    assert tuned(tiny_model, settings(text), steps.append, seed=3) == first
    assert steps == []


def test_a_checkpoint_says_which_slope_was_chosen(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = prune(str(tiny_model), settings(text), out=tmp_path / "out", threads=1)
    slope = report.facts["ramp"]["slope"]
    assert repr(slope) in report.facts["ramp"]["losses"]
    blocks = [block["sparsity"] for block in report.facts["blocks"]]
    assert blocks[1] - blocks[0] == pytest.approx(slope)
    assert sum(blocks) / 2 == pytest.approx(0.6)
