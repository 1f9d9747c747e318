"""Between which sparsities a rule may choose, against the rule itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planning import settings

from owl_deploy import allocation
from owl_deploy.plan import plan_pruning, write_plan

pytestmark = pytest.mark.usefixtures("known_speed")


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "owl"},
        {"allocation": "dlp"},
        {"allocation": "alphapruning"},
        {"allocation": "isc"},
        {"allocation": "ramp"},
        {"allocation": "evopress"},
    ],
)
def test_allocation_that_needs_weights_shows_the_range_of_its_rule(
    six_blocks: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = plan_pruning(str(six_blocks), settings(**changes), threads=1)
    assert plan.sparsities is None
    assert {block["sparsity"] for block in plan.facts["blocks"]} == {None}
    assert plan.facts["range"]["lowest"] < 0.6 < plan.facts["range"]["highest"]
    assert any("needs weights" in note for note in plan.facts["notes"])
    assert plan.facts["time"]["in_cache"] == []
    write_plan(plan, tmp_path / "plan")
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.svg"}


@pytest.mark.parametrize("target", [0.5, 0.95])
@pytest.mark.parametrize("per", ["block", "linear"])
@pytest.mark.parametrize("rule", ["owl", "dlp", "alphapruning", "isc"])
def test_range_holds_whatever_the_figures_and_is_reached(six_blocks: Path, rule: str, per: str, target: float) -> None:
    chosen = settings(allocation=rule, allocation_per=per, sparsity=target, alpha_epsilon=0.3)  # 0.95 is clipped
    facts = plan_pruning(str(six_blocks), chosen, artifacts=(), threads=1).facts
    low, high = facts["range"]["lowest"], facts["range"]["highest"]
    sizes = [block["n_weights"] for block in facts["blocks"]]
    if per == "linear":
        sizes = [linear["shape"][0] * linear["shape"][1] for linear in facts["linears"]]
    share: Callable[[list[float]], list[float]] = {
        "owl": lambda f: allocation.owl(f, sizes, target, owl_lambda=chosen.owl_lambda),
        "dlp": lambda f: allocation.dlp(f, sizes, target, alpha=chosen.dlp_alpha),
        "alphapruning": lambda f: allocation.alphapruning(f, sizes, target, epsilon=0.3),
        "isc": lambda f: allocation.isc(f, sizes, target, half_width=chosen.isc_half_width),
    }[rule]
    random = np.random.default_rng(0)
    draws = [random.exponential(size=len(sizes)) for _ in range(100)]
    draws += [np.eye(len(sizes))[sizes.index(min(sizes))], 1 - np.eye(len(sizes))[sizes.index(min(sizes))]]
    values = [value for figures in draws for value in share(figures.tolist())]
    assert low - 1e-9 <= min(values)
    assert max(values) <= high + 1e-9
    if rule != "isc":
        assert (min(values), max(values)) == pytest.approx((low, high), abs=1e-9)
