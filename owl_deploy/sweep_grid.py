"""The grid of a sweep, cell by cell.

In: a recipe with a `sweep` key. Out: its cells, each with a name, in the order in which they are made. Nothing is
opened or pruned here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from owl_deploy.errors import RecipeError
from owl_deploy.published import public_settings
from owl_deploy.recipe import PruneSettings, Recipe, SweepSettings, expanded_grid

__all__ = ["Cell", "chosen_cells", "sweep_cells", "sweep_settings", "with_local_texts"]


@dataclass(frozen=True)
class Cell:
    """One checkpoint of the grid."""

    name: str
    prune: PruneSettings
    varied: dict[str, Any]
    """What else the grid varies, beside method, allocation and sparsity."""


def sweep_cells(recipe: Recipe) -> list[Cell]:
    """Return the cells of a recipe's grid in the order in which they are made.

    Uniform allocation comes first, then one sparsity after the other in the order in which the grid names
    them: whatever there is after a part of the time can be compared.

    Raises:
        RecipeError: the recipe has no sweep, or two cells would have one name.
    """
    settings = sweep_settings(recipe)
    grid = expanded_grid(recipe.prune, settings)
    keys = [key for block in settings.grid for key in block if key not in ("method", "allocation", "sparsity")]
    cells = []
    for prune_settings in grid:
        values = public_settings(prune_settings)
        # What no block but another one varies has its shared value, which says nothing.
        shared = recipe.prune.model_dump(mode="json")
        varied = {key: values[key] for key in dict.fromkeys(keys) if getattr(prune_settings, key) != shared[key]}
        parts = [values["method"], values["allocation"], *(f"{k}-{v}" for k, v in varied.items()), values["sparsity"]]
        cells.append(
            Cell("-".join(re.sub(r"[^A-Za-z0-9._]+", "-", str(part)) for part in parts), prune_settings, varied)
        )
    name, count = Counter(cell.name for cell in cells).most_common(1)[0]
    if count > 1:
        raise RecipeError(f"{count} cells of the sweep would be named {name}: rename the files that they differ in")
    sparsities = list(dict.fromkeys(cell.prune.sparsity for cell in cells))
    return sorted(cells, key=lambda cell: (cell.prune.allocation != "uniform", sparsities.index(cell.prune.sparsity)))


def with_local_texts(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    """Return a recipe that reads some of its evaluation texts from other places.

    Args:
        recipe: with a sweep.
        texts: sources, such as `wikitext2:PATH`; each takes the place of those of its kind.

    Raises:
        RecipeError: the recipe has no text of that kind.
    """
    settings = sweep_settings(recipe)
    evals = settings.evals or (recipe.eval,)
    for text in texts:
        kind = text.partition(":")[0]
        if kind not in {item.text.partition(":")[0] for item in evals}:
            known = ", ".join(item.text for item in evals)
            raise RecipeError(f"no evaluation text of the recipe is a {kind}, so {text} replaces none; it has {known}")
        evals = tuple(
            item.model_copy(update={"text": text}) if item.text.partition(":")[0] == kind else item for item in evals
        )
    return recipe.model_copy(update={"sweep": settings.model_copy(update={"evals": evals})})


def chosen_cells(cells: Sequence[Cell], only: str) -> list[Cell]:
    """Return the cells whose name fits a pattern (`*`, `?`, `[...]`).

    Raises:
        RecipeError: there is none.
    """
    chosen = [cell for cell in cells if fnmatchcase(cell.name, only)]
    if not chosen:
        first = ", ".join(cell.name for cell in cells[:3])
        raise RecipeError(f"no cell of the sweep is named {only}; the first ones are {first}")
    return chosen


def sweep_settings(recipe: Recipe) -> SweepSettings:
    """Return the sweep of a recipe. Raises RecipeError where it has none."""
    if recipe.sweep is None:
        raise RecipeError("the recipe has no key sweep: give it one, with a grid")
    return recipe.sweep
