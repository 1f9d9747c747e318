from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owl_deploy.errors import RecipeError
from owl_deploy.recipe import (
    BenchSettings,
    EvalSettings,
    ExportSettings,
    PruneSettings,
    Recipe,
    load_recipe,
    recipe_from_mapping,
)

FULL: dict[str, Any] = {
    "model": "demo:smollm2-135m",
    "seed": 1,
    "threads": 2,
    "prune": {"method": "magnitude", "allocation": "uniform", "sparsity": 0.5},
    "export": [
        {"name": "dense", "checkpoint": "dense"},
        {"name": "sparse", "checkpoint": "pruned", "weights": "sparse-initializer"},
    ],
    "eval": {"window": 64},
    "bench": {"baseline": "dense", "past_len": [16, 32]},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """FULL with one value changed; a path is keys and indices joined by dots."""
    mapping: Any = yaml.safe_load(yaml.safe_dump(FULL))
    place = mapping
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    place[last] = value
    assert isinstance(mapping, dict)
    return mapping


def test_full_recipe_becomes_plain_values() -> None:
    recipe = recipe_from_mapping(FULL)
    assert (recipe.seed, recipe.threads, recipe.prune.sparsity) == (1, 2, 0.5)
    assert [artifact.name for artifact in recipe.export] == ["dense", "sparse"]
    assert recipe.bench is not None
    assert recipe.bench.past_len == (16, 32)


def test_model_alone_is_a_recipe_of_defaults() -> None:
    assert recipe_from_mapping({"model": "x"}) == Recipe(
        model="x", seed=0, threads="auto", prune=PruneSettings(), export=(), eval=EvalSettings(), bench=None
    )


def test_written_recipe_reads_back_equal() -> None:
    recipe = recipe_from_mapping(FULL)
    assert recipe_from_mapping(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("kind", [PruneSettings, EvalSettings, ExportSettings, BenchSettings, Recipe])
def test_every_field_says_what_it_is(kind: Any) -> None:
    missing = [name for name, field in kind.model_fields.items() if not field.description]
    assert missing == [name for name in ("prune", "export", "eval", "bench") if name in kind.model_fields]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sede", "unknown key sede; did you mean seed?"),
        ("prune.sparsty", "unknown key prune.sparsty; did you mean sparsity?"),
        ("prune.n-samples", "unknown key prune.n-samples; did you mean n_samples?"),
        ("export.1.wieghts", "unknown key export.1.wieghts; did you mean weights?"),
        ("eval.windw", "unknown key eval.windw; did you mean window?"),
        ("bench.past-len", "unknown key bench.past-len; did you mean past_len?"),
        ("bench.zzz", "unknown key bench.zzz; known are past_len, prompt_len, rounds,"),
        ("n-samples", "unknown key n-samples; known are model, seed, threads, device, max_memory, prune,"),
        ("", "unknown key ''; known are model"),
        ("prune.a\nb", "unknown key prune.'a\\nb'; known are method"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(path: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(with_value(path, 1), where="r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("prune.sparsity", 1, "prune.sparsity: must be in [0, 1), got 1"),
        ("prune.sparsity", -0.1, "prune.sparsity: must be in [0, 1), got -0.1"),
        ("prune.sparsity", 70, "prune.sparsity: must be in [0, 1), got 70"),
        ("prune.sparsity", math.nan, "prune.sparsity: must be in [0, 1), got nan"),
        ("prune.sparsity", math.inf, "prune.sparsity: must be in [0, 1), got inf"),
        ("prune.n_samples", 2**31, "prune.n_samples: input should be less than or equal to 2147483647"),
        ("bench.rounds", 2**31, "bench.rounds: input should be less than or equal to 2147483647"),
        ("prune.sparsity", "much", "prune.sparsity: input should be a valid number"),
        ("prune.sparsity", None, "prune.sparsity: input should be a valid number, got None"),
        (
            "prune.method",
            "wnada",
            "prune.method: input should be 'magnitude', 'wanda', 'ria', 'dass', 'sparsegpt', 'isc', 'alps' or "
            "'foundation', got 'wnada'; did you mean wanda",
        ),
        ("prune.owl_m", 0, "prune.owl_m: input should be greater than 0, got 0"),
        ("prune.owl_m", math.inf, "prune.owl_m: must be a finite number, got inf"),
        ("prune.owl_lambda", 0.5, "prune.owl_lambda: input should be less than 0.5, got 0.5"),
        ("prune.n_samples", 0, "prune.n_samples: input should be greater than or equal to 1, got 0"),
        ("prune.n_samples", 1.5, "prune.n_samples: input should be a valid integer"),
        ("prune.seq_len", 1, "prune.seq_len: input should be greater than or equal to 2, got 1"),
        ("prune", None, "prune: input should be a valid dictionary"),
        ("seed", -1, "seed: input should be greater than or equal to 0, got -1"),
        ("seed", 2**32, "seed: input should be less than 4294967296, got 4294967296"),
        ("threads", 0, "threads: "),
        ("threads", "all", "threads: input should be 'auto', got 'all'"),
        ("threads", 1025, "threads: "),
        ("export.0.name", "../up", "export.0.name: string should match pattern"),
        ("export.0.name", "sparse", "export: two artifacts are named sparse"),
        ("export.0.target", "onnx", "export.0.target: input should be 'onnxruntime' or 'deepsparse', got 'onnx'"),
        ("export.0.max_positions", 0, "export.0.max_positions: input should be greater than or equal to 16, got 0"),
        ("export", "dense", "export: input should be a valid tuple, got 'dense'"),
        ("eval.max_windows", 0, "eval.max_windows: input should be greater than or equal to 1, got 0"),
        ("bench.past_len", [0], "bench.past_len.0: input should be greater than or equal to 1, got 0"),
        ("bench.rounds", 1, "bench.rounds: input should be greater than or equal to 2, got 1"),
        ("bench.baseline", "nosuch", "bench.baseline: 'nosuch' is not among the artifacts ['dense', 'sparse']"),
        ("model", 7, "model: input should be a valid string, got 7"),
    ],
)
def test_impossible_value_is_refused_naming_key_and_value(path: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(with_value(path, value), where="r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_all_problems_are_named_at_once() -> None:
    mapping = {**FULL, "sede": 1, "prune": {"sparsity": 2, "metod": "wanda"}}
    with pytest.raises(RecipeError, match=r"prune\.sparsity: .*; unknown key prune\.metod; .*; unknown key sede"):
        recipe_from_mapping(mapping)


def test_missing_model_is_named() -> None:
    with pytest.raises(RecipeError, match="model is missing"):
        recipe_from_mapping({})


def test_missing_baseline_is_named() -> None:
    with pytest.raises(RecipeError, match=r"bench\.baseline is missing"):
        recipe_from_mapping({**FULL, "bench": {}})


@pytest.mark.parametrize("value", [None, 1, "text", ["a"], True])
def test_recipe_that_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=f"a recipe is a mapping of keys, found {type(value).__name__}"):
        recipe_from_mapping(value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PruneSettings().sparsity = 0.5


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999])
def test_sparsity_in_range_is_taken(sparsity: float) -> None:
    assert PruneSettings(sparsity=sparsity).sparsity == sparsity


def test_value_of_any_size_gives_a_short_sentence() -> None:
    """A few aliases stand for 10^9 elements here; printing them all would never end."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    mapping = yaml.safe_load("\n".join(lines))
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"model": mapping["a8"], "prune": {"method": "m" * 100_000}})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "{model: x",
        "model: x\n  prune: y",
        "a: 2025-02-30",
        "a: !!int x",
        "a: !!python/object/apply:os.getpid []",
        "a: &a [*b]",
        "? [a]\n: 1",
        "[" * 5000,
        "a: " + "9" * 5000,
        "\x00",
        "model: 'x\n",
        "--- a\n--- b",
    ],
)
def test_text_that_is_no_recipe_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(str(caught.value).splitlines()) == 1
    assert "r.yaml" in str(caught.value)


def test_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nosuch\.yaml"):
        load_recipe(tmp_path / "nosuch.yaml")


def test_folder_and_binary_file_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            load_recipe(path)


def problem(read: Callable[[], Recipe]) -> str:
    """Return what a RecipeError says, nothing where there is none; other errors pass."""
    try:
        read()
    except RecipeError as error:
        return str(error)
    return ""


KEYS = st.one_of(
    st.sampled_from(
        [*Recipe.model_fields, *PruneSettings.model_fields, *BenchSettings.model_fields, "name", "baseline"]
    ),
    st.text(max_size=8),
    st.integers(),
    st.none(),
    st.booleans(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.dates(),
    st.binary(max_size=5),
    st.sampled_from(["auto", "dense", "wanda", "owl", "x"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(mapping=st.dictionaries(KEYS, VALUES, max_size=6))
@example(mapping={"model": "x", "": 1})
@example(mapping={None: 1})
def test_any_mapping_is_a_recipe_or_one_recipe_error(mapping: dict[Any, Any]) -> None:
    assert len(problem(lambda: recipe_from_mapping(mapping)).splitlines()) <= 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from("ab1:-[]{}&*!|>'\"#?,% \n\t~.2025"), max_size=60))
def test_any_text_is_a_recipe_or_one_recipe_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert len(problem(lambda: load_recipe(file)).splitlines()) <= 1
