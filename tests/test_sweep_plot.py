"""The results of a sweep as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from owl_deploy.sweep_plot import sweep_svg

SVG = "{http://www.w3.org/2000/svg}"


def row(method: str, allocation: str, sparsity: float, perplexity: float | None, **more: Any) -> dict[str, Any]:
    head = {"name": "n", "method": method, "allocation": allocation, "sparsity": sparsity, **more}
    if perplexity is None:
        return {**head, "status": "pending"}
    return {**head, "status": "ok", "evaluations": [{"perplexity": perplexity}, {"perplexity": perplexity / 2}]}


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "demo <b>&",
        "texts": [{"text": "wikitext2"}, {"text": "python-docs"}],
        "dense": {"evaluations": [{"perplexity": 24.0}, {"perplexity": 9.5}]},
        "rows": list(rows),
    }


ROWS = [
    *(row("wanda", allocation, 0.7, 1000 + i) for i, allocation in enumerate(("uniform", "owl", "dlp"))),
    row("wanda", "uniform", 0.5, 56),
    row("sparsegpt", "uniform", 0.7, 443),
    row("alps", "uniform", 0.7, None),
]


def words_of(svg: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_panels_compare_methods_and_the_allocations_of_a_method_with_three() -> None:
    words = words_of(sweep_svg(document(*ROWS)))
    assert words.count("uniform, by method") == 2  # one per text
    assert words.count("wanda, by allocation") == 2
    assert "sparsegpt, by allocation" not in words
    assert {"owl", "dlp", "sparsegpt", "dense 24", "dense 9.5", "sparsity of the linears"} <= set(words)


def test_cells_that_are_not_measured_have_no_line() -> None:
    assert "alps" not in words_of(sweep_svg(document(*ROWS)))


def test_settings_that_vary_are_told_apart() -> None:
    rows = [row("wanda", "owl", 0.7, 10.0 + m, settings={"owl_m": m}) for m in (3, 5)]
    assert {"wanda, owl_m 3", "wanda, owl_m 5"} <= set(words_of(sweep_svg(document(*rows))))


def test_description_says_the_figures_in_words_and_names_are_escaped() -> None:
    root = ET.fromstring(sweep_svg(document(*ROWS)))
    title, words = (root.find(f"{SVG}{tag}") for tag in ("title", "desc"))
    assert title is not None
    assert words is not None
    assert title.text == "Pruned checkpoints of demo <b>&"
    assert "the dense model has 24." in (words.text or "")
    assert "Uniform, by method: wanda 1000 at 70%, sparsegpt 443 at 70%." in (words.text or "")


def test_nothing_measured_yet_is_a_picture_too() -> None:
    assert b"nothing measured" in sweep_svg(document(row("wanda", "uniform", 0.7, None)))


def test_picture_is_the_same_bytes_twice() -> None:
    assert sweep_svg(document(*ROWS)) == sweep_svg(document(*ROWS))
