"""The recipes of published experiments, planned on configurations of the models that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from planning import GIB, LLAMA_7B_LINEARS

from owl_deploy.plan import plan_pruning
from owl_deploy.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("known_speed")
PAPERS = sorted((Path(__file__).resolve().parent.parent / "recipes" / "papers").glob("*.yaml"))


def test_there_are_recipes_of_four_papers() -> None:
    names = " ".join(path.stem for path in PAPERS)
    assert all(word in names for word in ("owl-wanda", "owl-sparsegpt", "alphapruning", "dass", "isc"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_recipe_of_a_paper_begins_by_saying_what_it_is_for_and_what_was_published(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"# \S.{20}", text)
    assert "arXiv" in text.splitlines()[0]
    assert re.search(r"# Published .*\d\.\d|# No published figure", text)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_recipe_of_a_paper_is_planned(path: Path, llama_7b: Path, opt_6_7b: Path) -> None:
    recipe = load_recipe(path)
    assert (recipe.prune.calibration, recipe.prune.n_samples, recipe.prune.seq_len) == ("c4", 128, 2048)
    assert (recipe.eval.text, recipe.eval.window, recipe.seed) == ("wikitext2", 2048, 0)
    is_opt = recipe.model.startswith("facebook/opt")
    facts = plan_pruning(str(opt_6_7b if is_opt else llama_7b), recipe.prune, artifacts=(), threads=1).facts
    n_weights = 32 * (4 * 4096**2 + 2 * 4096 * 16384) if is_opt else LLAMA_7B_LINEARS
    assert sum(block["n_weights"] for block in facts["blocks"]) == n_weights
    memory = facts["memory"]
    assert memory["hidden_states_bytes"] == 4 * GIB
    block = 4 * n_weights / 32
    held, states = memory["held_bytes"], 0 if memory["are_hidden_states_on_disk"] else 4 * GIB
    above = memory["peak_bytes"] - held - states
    if recipe.prune.isc_sensitivity == "hutchinson":
        assert memory["peak_bytes"] - held == memory["phases"]["tracing the loss"] > 4 * 4 * n_weights
    elif recipe.prune.method in ("sparsegpt", "isc"):
        # Of the widest inputs, a Hessian, its damped copy, two factors and an inverse, beside two of the others.
        widest = 16384 if is_opt else 11008
        assert block + 5 * 4 * widest**2 < above < 2 * block + 6 * 4 * widest**2 + 3 * GIB
    else:
        assert block < above < 4 * block
    assert 3600 < facts["time"]["seconds"] < 100 * 86400
