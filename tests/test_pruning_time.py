"""The time that pruning is predicted to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planning import settings

from owl_deploy import pruning_time
from owl_deploy.plan import plan_pruning
from owl_deploy.skeleton import open_configuration, open_skeleton

pytestmark = pytest.mark.usefixtures("known_speed")
MEASURED_SPEED = pruning_time._flop_per_second


def seconds(model: Path, **changes: Any) -> float:
    return float(plan_pruning(str(model), settings(**changes), artifacts=(), threads=1).facts["time"]["seconds"])


def test_time_of_a_forward_pass_is_two_operations_per_weight_and_token(six_blocks: Path) -> None:
    many, few = (
        plan_pruning(str(six_blocks), settings(n_samples=n), artifacts=(), threads=1).facts["time"]["phases"]
        for n in (200_000, 100_000)
    )
    name = "inputs of the dense model"
    n_weights = 6 * (4 * 64 * 64 + 3 * 64 * 96)
    attention = 6 * 2 * 32 * 64
    products = 2 * 32 * 100_000 * (n_weights + attention) / 1e11
    assert many[name] - few[name] == pytest.approx(1.3 * products, rel=1e-6)


def test_speed_is_measured_on_this_machine(six_blocks: Path) -> None:
    skeleton = open_skeleton(open_configuration(six_blocks))
    assert 1e6 < MEASURED_SPEED(skeleton, settings()) < 1e16


def test_more_work_takes_more_time(six_blocks: Path) -> None:
    plain = seconds(six_blocks, allocation="uniform")
    assert seconds(six_blocks, allocation="uniform", n_samples=4000) > plain
    assert seconds(six_blocks, allocation="uniform", true_sequential=True, n_samples=4000) > seconds(
        six_blocks, allocation="uniform", n_samples=4000
    )
    assert seconds(six_blocks, allocation="uniform", refine="dsnot") > plain
    assert seconds(six_blocks, allocation="owl") > plain
    assert seconds(six_blocks, allocation="alphapruning") > plain
    assert seconds(six_blocks, allocation="uniform", method="alps") > seconds(
        six_blocks, allocation="uniform", method="sparsegpt"
    )
    assert seconds(six_blocks, allocation="uniform", method="magnitude") < plain


def test_sampling_is_told_apart_from_the_time_of_pruning(six_blocks: Path) -> None:
    with_text = plan_pruning(str(six_blocks), settings(), artifacts=(), threads=1).facts
    sampled = plan_pruning(str(six_blocks), settings(calibration="generated"), artifacts=(), threads=1).facts
    assert with_text["time"]["sampling_seconds"] is None
    assert sampled["time"]["sampling_seconds"] > 0
    assert sampled["time"]["seconds"] == with_text["time"]["seconds"]
