"""A plan as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from planning import settings

from owl_deploy import plan_plot
from owl_deploy.errors import OwlDeployError
from owl_deploy.plan import plan_pruning, write_plan
from owl_deploy.plan_plot import plan_svg

pytestmark = pytest.mark.usefixtures("known_speed")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def facts(tiny_model: Path) -> dict[str, Any]:
    return plan_pruning(str(tiny_model), settings(), artifacts=(), threads=1).facts


def words_of(svg: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_picture_is_xml_with_a_title_and_a_description(facts: dict[str, Any]) -> None:
    root = ET.fromstring(plan_svg(facts))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    by_id = {element.get("id"): element for element in root}
    labels = [by_id[name] for name in (root.get("aria-labelledby") or "").split()]
    assert [element.tag for element in labels] == [f"{SVG}title", f"{SVG}desc"]
    assert labels[0].text == "Sparsity by block: wanda, owl, 60%"
    assert "the target is 0.6" in (labels[1].text or "")


def test_picture_has_labels_on_its_axes_and_a_panel_for_the_figure(facts: dict[str, Any]) -> None:
    words = words_of(plan_svg(facts))
    assert {"sparsity asked", "outlier ratio", "decoder block", "target 0.6"} <= set(words)


def test_picture_is_the_same_bytes_twice_small_and_without_a_date(facts: dict[str, Any]) -> None:
    first = plan_svg(facts)
    assert plan_svg(facts) == first
    assert len(first) < 40_000
    assert b"dc:date" not in first


def test_picture_of_linears_that_differ_has_a_line_for_each_kind(tiny_model: Path) -> None:
    by_linear = plan_pruning(str(tiny_model), settings(allocation_per="linear"), artifacts=(), threads=1).facts
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds <= set(words_of(plan_svg(by_linear)))


def test_kinds_of_one_name_are_told_apart_and_experts_are_one_kind() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.experts.0.w1", "h.0.mlp.experts.1.w1"]
    linears = [{"name": name, "block": 0, "sparsity": 0.1 * i} for i, name in enumerate(names, start=1)]
    found = plan_plot._by_kind(linears)
    assert {kind: values[0] for kind, values in found.items()} == pytest.approx(
        {"attn.c_proj": 0.1, "mlp.c_proj": 0.2, "w1": 0.35}
    )


def test_picture_of_an_allocation_that_needs_weights_shows_its_range(six_blocks: Path) -> None:
    unknown = plan_pruning(str(six_blocks), settings(), artifacts=(), threads=1).facts
    assert "what the rule allows; which of it, weights decide" in words_of(plan_svg(unknown))


def test_names_cannot_leave_their_place_in_the_picture(facts: dict[str, Any]) -> None:
    hostile = {**facts["recipe"], "prune": {**facts["recipe"]["prune"], "method": "</title><script>$x^{"}}
    root = ET.fromstring(plan_svg({**facts, "recipe": hostile}))
    assert not list(root.iter(f"{SVG}script"))


def test_plan_that_cannot_be_drawn_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> bytes:
        raise OwlDeployError("no ink")

    plan = plan_pruning(str(tiny_model), settings(), artifacts=(), threads=1)
    monkeypatch.setattr(plan_plot, "plan_svg", fail)
    with pytest.raises(OwlDeployError, match="no ink"):
        write_plan(plan, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
