"""Allocations written to files and read back, and every way in which a file can be wrong."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owl_deploy.allocation_file import load_allocation, save_allocation
from owl_deploy.errors import RecipeError

SUFFIXES = [".json", ".yaml", ".yml"]
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj.3"]


def written(folder: Path, text: str, *, suffix: str = ".yaml") -> Path:
    path = folder / f"allocation{suffix}"
    path.write_text(text)
    return path


def refusal(path: Path, n_weights: list[int], target: float, *, names: list[str] | None = None) -> str:
    """Load a bad file and return the one sentence that says so."""
    with pytest.raises(RecipeError) as error:
        load_allocation(path, n_weights, target, names=names)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".JSON"])
@pytest.mark.parametrize("names", [None, NAMES])
def test_saved_numbers_come_back_exactly(tmp_path: Path, suffix: str, names: list[str] | None) -> None:
    path = tmp_path / "deep" / f"allocation{suffix}"
    save_allocation(path, [0.1 + 0.2, 1e-05], names=names)
    assert load_allocation(path, [1, 1], 0.15, names=names) == [0.1 + 0.2, 1e-05]
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.dictionaries(st.text(max_size=12), st.floats(0, 0.99), min_size=1, max_size=5),
    suffix=st.sampled_from(SUFFIXES),
)
def test_any_names_and_sparsities_come_back(tmp_path: Path, pairs: dict[str, float], suffix: str) -> None:
    path, values = tmp_path / f"allocation{suffix}", list(pairs.values())
    names = list(pairs)
    save_allocation(path, values, names=names)
    backwards = load_allocation(path, [2] * len(values), sum(values) / len(values), names=names[::-1])
    assert backwards == values[::-1]


def test_json_is_a_flat_mapping(tmp_path: Path) -> None:
    save_allocation(tmp_path / "a.json", [0.6, 0.8])
    assert json.loads((tmp_path / "a.json").read_text()) == {"0": 0.6, "1": 0.8}


def test_yaml_is_a_flat_mapping(tmp_path: Path) -> None:
    save_allocation(tmp_path / "a.yaml", [0.6, 0.8])
    assert (tmp_path / "a.yaml").read_text() == "0: 0.6\n1: 0.8\n"
    save_allocation(tmp_path / "a.yaml", [0.6, 0.8], names=NAMES)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == dict(zip(NAMES, [0.6, 0.8], strict=True))


def test_keys_may_be_quoted_and_in_any_order_and_numbers_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "'1': 0\n0: .5\n")
    assert load_allocation(path, [1, 1], 0.25) == [0.5, 0.0]


def test_mean_is_weighted_by_the_number_of_weights(tmp_path: Path) -> None:
    path = written(tmp_path, "0: 0.2\n1: 0.6\n")
    assert load_allocation(path, [1, 3], 0.5) == [0.2, 0.6]
    assert "is 0.4, which must be the target 0.5 to within 0.001" in refusal(path, [1, 1], 0.5)


@pytest.mark.parametrize("target", [0.599, 0.6, 0.601])
def test_mean_within_a_thousandth_is_taken_as_it_is(tmp_path: Path, target: float) -> None:
    assert load_allocation(written(tmp_path, "0: 0.5\n1: 0.7\n"), [1, 1], target) == [0.5, 0.7]


@pytest.mark.parametrize("target", [0.5985, 0.6015])
def test_mean_further_off_is_an_error_that_says_what_to_do(tmp_path: Path, target: float) -> None:
    message = refusal(written(tmp_path, "0: 0.5\n1: 0.7\n"), [1, 1], target)
    assert f"target {target:g}" in message
    assert message.endswith("change the values, or set sparsity to 0.6")


def test_targets_above_the_usual_bound_allow_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_allocation(path, [0.995, 0.995])
    assert load_allocation(path, [1, 1], 0.995) == [0.995, 0.995]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0.5", "block 1 is missing; 2 are needed"),
        ("{}", "block 0 is missing (and 1 more); 2 are needed"),
        ("0: 0.5\n1: 0.5\n2: 0.25", "unknown block 2, of value 0.25; blocks are 0 to 1"),
        ("0: 0.5\n01: 0.5", "unknown block 01, of value 0.5; blocks are 0 to 1"),
        ("0: 0.5\nyes: 0.5", "unknown block yes, of value 0.5"),
        ("0: 0.5\n-1: 0.5", "unknown block -1, of value 0.5"),
        ("0: 0.5\n1.0: 0.5", "unknown block 1.0, of value 0.5"),
        ("0: 0.5\n? [1, 2]\n: 0.5", "unknown block"),
        ("0: 0.5\n'': 0.5", "unknown block '', of value 0.5"),
        ("0: 0.5\n'1': 0.5\n1: 0.4", "block 1 is there twice, 0.5 and 0.4"),
        ("0: 0.5\n1: 1.2", "sparsity of block 1 must be in [0, 0.99], got 1.2"),
        ("0: 0.5\n1: 0.995", "sparsity of block 1 must be in [0, 0.99], got 0.995"),
        ("0: 0.5\n1: -0.1", "sparsity of block 1 must be in [0, 0.99], got -0.1"),
        ("0: 0.5\n1: .nan", "sparsity of block 1 must be in [0, 0.99], got nan"),
        ("0: 0.5\n1: .inf", "sparsity of block 1 must be in [0, 0.99], got inf"),
        ("0: 0.5\n1: half", "sparsity of block 1 must be a number, got 'half'"),
        ("0: 0.5\n1: '0.5'", "sparsity of block 1 must be a number, got '0.5'"),
        ("0: 0.5\n1: true", "sparsity of block 1 must be a number, got True"),
        ("0: 0.5\n1:", "sparsity of block 1 must be a number, got None"),
        ("0: 0.5\n1: [0.5]", "sparsity of block 1 must be a number, got [0.5]"),
        ("0: 0.5\n1: 0x" + "f" * 9000, "sparsity of block 1 must be in [0, 0.99], got a number beyond all bounds"),
        ("0: 0.5\n1: 5" + "0" * 9000, "is not YAML"),
        ("0: 0.5\n1: 2025-02-30", "is not YAML"),
        ("0: 0.5\n1: !!python/name:os.system", "is not YAML"),
        ("0: 0.5\n1: &a [*a]", "is not YAML"),
        ("0: [0.5", "is not YAML"),
        ("0: 0.5\n---\n1: 0.5", "is not YAML"),
        ("[" * 400, "is not YAML"),
        ("", "an allocation is a mapping of blocks or linears to sparsities"),
        ("- 0.5\n- 0.5", "an allocation is a mapping"),
        ("0.5", "an allocation is a mapping"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(written(tmp_path, text), [1, 1], 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": 0.5}', "block 1 is missing"),
        ('{"0": 0.5, "0": 0.4, "1": 0.5}', "block 0 is there twice, 0.5 and 0.4"),
        ('{"0": 0.5, "1": NaN}', "sparsity of block 1 must be in [0, 0.99], got nan"),
        ('{"0": 0.5, "1": 1e999}', "sparsity of block 1 must be in [0, 0.99], got inf"),
        ('{"0": 0.5, "1": null}', "sparsity of block 1 must be a number, got None"),
        ('{"0": 0.5, "1": {"q": 0.5}}', "sparsity of block 1 must be a number"),
        ('{"0": 0.5, "1": 0.5, "ten\\n": 0.5}', "unknown block 'ten\\n', of value 0.5"),
        ('{"0": 0.5,}', "is not JSON"),
        ('{"0": 1' + "0" * 9000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[0.5, 0.5]", "an allocation is a mapping"),
        ("", "is not JSON"),
    ],
)
def test_bad_json_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(written(tmp_path, text, suffix=".json"), [1, 1], 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{NAMES[0]}: 0.5", f"linear {NAMES[1]} is missing"),
        (f"{NAMES[0]}s: 0.5", f"unknown linear {NAMES[0]}s, of value 0.5; did you mean {NAMES[0]}?"),
        ("zzz: 0.5", f"unknown linear zzz, of value 0.5; the first linear is {NAMES[0]}"),
        ("z" * 100_000 + ": 0.5", "is not YAML"),  # keys end within 1024 characters
        (f"{NAMES[0]}: 2", f"sparsity of linear {NAMES[0]} must be in [0, 0.99], got 2"),
    ],
)
def test_bad_linear_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(written(tmp_path, text), [1, 1], 0.5, names=NAMES)


def test_very_long_name_is_shown_in_part(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"z" * 100_000: 0.5}), suffix=".json")
    assert "unknown linear 'zzz" in refusal(path, [1, 1], 0.5, names=NAMES)


def test_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert "cannot read the allocation" in refusal(tmp_path / "none.yaml", [1], 0.5)


def test_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the allocation" in refusal(tmp_path / "a.yaml", [1], 0.5)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    assert "an allocation is a .json, .yaml or .yml file" in refusal(tmp_path / "a.npy", [1], 0.5)
    with pytest.raises(RecipeError, match="an allocation is a"):
        save_allocation(tmp_path / "a.npy", [0.5])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan")])
def test_sparsity_out_of_range_is_not_saved(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 1\), got .* for 1"):
        save_allocation(tmp_path / "a.json", [0.5, bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_names_must_fit(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ValueError, match="need 2 different names"):
        save_allocation(tmp_path / "a.json", [0.5, 0.5], names=names)
    with pytest.raises(ValueError, match="need 2 different names"):
        load_allocation(tmp_path / "a.json", [1, 1], 0.5, names=names)


def test_block_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive"):
        load_allocation(tmp_path / "a.json", [1, 0], 0.5)
