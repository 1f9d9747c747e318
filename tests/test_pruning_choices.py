"""The prune stage with every method, allocation, refinement and pattern, on the tiny model."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from owl_deploy import pruning
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.calibration import calibration_tokens, must_be_sampled
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.footprint import predict_footprint
from owl_deploy.methods import METHODS
from owl_deploy.pruning import SparsityReport, prune
from owl_deploy.recipe import PruneSettings, checked
from owl_deploy.skeleton import open_skeleton

METHOD_NAMES = get_args(PruneSettings.model_fields["method"].annotation)
UPDATING = {"sparsegpt", "isc", "alps", "foundation"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {i}th owl saw {i * i} mice in the barn.\n" for i in range(400)))
    return path


def settings(text: Path, **changes: Any) -> PruneSettings:
    values = {"sparsity": 0.5, "allocation": "uniform", "calibration": f"text:{text}", "n_samples": 6, "seq_len": 48}
    if "pattern" in changes:
        del values["sparsity"]
    return PruneSettings.model_validate({**values, **changes})


def run(model: Path, text: Path, out: Path, **changes: Any) -> SparsityReport:
    return prune(str(model), settings(text, **changes), out=out, threads=1)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.inference_mode()
def output_error(dense: Path, sparse: Path, text: Path) -> float:
    """Mean squared difference of logits on the calibration text."""
    tokens = AutoTokenizer.from_pretrained(dense)(text.read_text()[:400], return_tensors="pt").input_ids
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits for path in (dense, sparse)
    ]
    return float((logits[0] - logits[1]).square().mean())


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_reaches_the_target_and_keeps_what_is_no_linear(
    method: str, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    report = run(tiny_model, text, tmp_path / "out", method=method)
    before, after = weights_of(tiny_model), weights_of(tmp_path / "out")
    names = {f"{fact['name']}.weight" for fact in report.facts["linears"]}
    assert len(names) == 14
    assert report.facts["sparsity"]["linears"] == pytest.approx(0.5, abs=2e-3)
    for name, tensor in after.items():
        if name not in names:
            assert torch.equal(tensor, before[name])
            continue
        assert abs(float((tensor == 0).float().mean()) - 0.5) < 0.02
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]) == (method not in UPDATING)
        assert not (torch.signbit(tensor) & ~kept).any()


@pytest.mark.parametrize("method", sorted(UPDATING | {"wanda"}))
def test_calibrated_methods_do_less_harm_than_magnitude(
    method: str, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    run(tiny_model, text, tmp_path / "a", method=method, n_samples=24)
    run(tiny_model, text, tmp_path / "b", method="magnitude")
    assert output_error(tiny_model, tmp_path / "a", text) < output_error(tiny_model, tmp_path / "b", text)


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "dass"])
def test_every_method_keeps_two_of_four_inputs(method: str, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    report = run(tiny_model, text, tmp_path / "out", method=method, pattern="keep 2 of 4")
    assert report.facts["sparsity"]["target"] == 0.5
    after = weights_of(tmp_path / "out")
    for fact in report.facts["linears"]:
        groups = after[f"{fact['name']}.weight"].reshape(-1, 4)
        assert ((groups != 0).sum(dim=1) <= 2).all()
        assert fact["sparsity"] == 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_true_sequential_sees_the_pruned_linears_before(
    method: str, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    first = run(tiny_model, text, tmp_path / "a", method=method)
    second = run(tiny_model, text, tmp_path / "b", method=method, true_sequential=True)
    masks = [{fact["name"]: fact["mask_sha256"] for fact in report.facts["linears"]} for report in (first, second)]
    inner = "model.layers.0.self_attn.q_proj"
    assert masks[0][inner] == masks[1][inner]  # nothing comes before it
    assert masks[0] != masks[1]


def test_dsnot_swaps_and_keeps_the_sparsity_of_every_row(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    plain = run(tiny_model, text, tmp_path / "a", method="wanda")
    refined = run(tiny_model, text, tmp_path / "b", method="wanda", refine="dsnot")
    assert sum(fact["notes"]["n_swapped"] for fact in refined.facts["linears"]) > 0
    assert refined.facts["mask_sha256"] != plain.facts["mask_sha256"]
    before, a, b = (weights_of(folder) for folder in (tiny_model, tmp_path / "a", tmp_path / "b"))
    for fact in refined.facts["linears"][:7]:  # of block 0, whose inputs are the same
        name = f"{fact['name']}.weight"
        assert torch.equal((a[name] == 0).sum(dim=1), (b[name] == 0).sum(dim=1))
        assert torch.equal(b[name][b[name] != 0], before[name][b[name] != 0])


@pytest.mark.parametrize(
    ("allocation", "figure"),
    [
        ("owl", "outlier_ratio"),
        ("dlp", "median_score"),
        ("alphapruning", "alpha"),
        ("isc", "sensitivity"),
        ("ramp", None),
    ],
)
def test_every_allocation_meets_the_target_and_shows_its_figure(
    allocation: str, figure: str | None, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    of_allocation: dict[str, dict[str, Any]] = {"ramp": {"ramp_slope": 0.2}, "owl": {"owl_m": 3}}
    options = of_allocation.get(allocation, {})
    report = run(tiny_model, text, tmp_path / "out", method="magnitude", allocation=allocation, **options)
    blocks = report.facts["blocks"]
    assert sum(block["sparsity"] for block in blocks) / 2 == pytest.approx(0.5, abs=1e-9)
    assert blocks[0]["sparsity"] != blocks[1]["sparsity"]
    assert (figure is None) or all(figure in block for block in blocks)


@pytest.mark.parametrize("allocation", ["owl", "dlp", "alphapruning", "isc"])
def test_linears_may_get_sparsities_of_their_own(allocation: str, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    options = {"allocation": allocation, "allocation_per": "linear", "owl_m": 3}
    report = run(tiny_model, text, tmp_path / "out", method="wanda", **options)
    asked = {fact["name"]: fact["asked"] for fact in report.facts["linears"]}
    assert len(set(asked.values())) > 4
    sizes = {fact["name"]: fact["shape"][0] * fact["shape"][1] for fact in report.facts["linears"]}
    mean = sum(asked[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.5, abs=1e-9)
    for index, block in enumerate(report.facts["blocks"]):
        inside = [name for name in asked if f".layers.{index}." in name]
        assert block["sparsity"] == pytest.approx(
            sum(asked[name] * sizes[name] for name in inside) / sum(sizes[name] for name in inside)
        )
    again = run(tiny_model, text, tmp_path / "b", allocation=f"file:{tmp_path / 'out' / 'allocation.json'}")
    assert again.facts["mask_sha256"] == report.facts["mask_sha256"]


def test_traces_of_the_loss_rank_blocks(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    options = {"allocation": "isc", "isc_sensitivity": "hutchinson", "isc_probes": 3, "method": "magnitude"}
    blocks = run(tiny_model, text, tmp_path / "out", **options).facts["blocks"]
    more, less = sorted(blocks, key=lambda block: block["sensitivity"], reverse=True)
    assert more["sparsity"] == pytest.approx(0.4)
    assert less["sparsity"] == pytest.approx(0.6)


def test_owl_keeps_more_of_eight_in_blocks_with_outliers(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    options = {"pattern": "keep 4 of 8", "allocation": "owl", "owl_m": 3, "owl_pattern_spread": 2}
    report = run(tiny_model, text, tmp_path / "out", **options)
    more, less = sorted(report.facts["blocks"], key=lambda block: block["outlier_ratio"], reverse=True)
    assert (more["sparsity"], less["sparsity"]) == (0.375, 0.625)
    weights = weights_of(tmp_path / "out")
    for fact in report.facts["linears"]:
        kept = (weights[f"{fact['name']}.weight"] != 0).reshape(-1, 8).sum(dim=1)
        block = more if f".layers.{more['index']}." in fact["name"] else less
        assert set(kept.tolist()) == {round(8 * (1 - block["sparsity"]))}


def test_hidden_states_on_disk_give_the_same_bytes(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "sparsegpt", "allocation": "owl", "owl_m": 3}
    in_memory = run(tiny_model, text, tmp_path / "a", **options)
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))  # statistics are to be taken again
    monkeypatch.setattr(pruning, "available_bytes", lambda: 0)
    monkeypatch.setattr(pruning, "rss_bytes", lambda: 0)
    on_disk = run(tiny_model, text, tmp_path / "b", **options)
    assert in_memory.facts == on_disk.facts
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b", "cache"]


def test_memory_that_cannot_do_is_refused_before_work(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"max_memory 0\.01 GiB is not enough: even with hidden states on disk"):
        prune(str(tiny_model), settings(text), out=tmp_path / "out", threads=1, max_memory=10 << 20)
    assert not list(tmp_path.iterdir())


def test_allocation_of_a_checkpoint_can_be_used_again(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    first = run(tiny_model, text, tmp_path / "a", allocation="owl", owl_m=3)
    again = run(tiny_model, text, tmp_path / "b", allocation=f"file:{tmp_path / 'a' / 'allocation.json'}")
    assert [block["sparsity"] for block in again.facts["blocks"]] == [
        block["sparsity"] for block in first.facts["blocks"]
    ]
    assert again.facts["mask_sha256"] == first.facts["mask_sha256"]


def test_edited_allocation_that_misses_the_target_is_refused(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    path.write_text('{"0": 0.5, "1": 0.9}')
    with pytest.raises(RecipeError, match=r"0\.5"):
        run(tiny_model, text, tmp_path / "out", allocation=f"file:{path}")
    assert not (tmp_path / "out").exists()


def test_dense_statistics_serve_other_sparsities(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    prune(
        str(tiny_model),
        settings(text, allocation="owl", owl_m=3),
        out=tmp_path / "a",
        threads=1,
        on_step=lambda step: steps.append(step.stage),
    )
    known = len(list((owl_deploy_cache() / "statistics").iterdir()))
    again: list[str] = []
    prune(
        str(tiny_model),
        settings(text, allocation="dlp", sparsity=0.6),
        out=tmp_path / "b",
        threads=1,
        on_step=lambda step: again.append(step.stage),
    )
    assert "inputs of the dense model" not in again
    assert len(list((owl_deploy_cache() / "statistics").iterdir())) == known


def test_damaged_statistics_are_made_anew(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    first = run(tiny_model, text, tmp_path / "a", allocation="owl", owl_m=3)
    for file in (owl_deploy_cache() / "statistics").iterdir():
        file.write_bytes(b"damaged")
    second = run(tiny_model, text, tmp_path / "b", allocation="owl", owl_m=3)
    assert first.facts == second.facts


def test_shared_inputs_give_the_masks_of_separate_ones(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    """The inputs of block 0 taken from the dense pass, or observed again: the same masks."""
    from_dense = run(tiny_model, text, tmp_path / "a", method="wanda", allocation="owl", owl_lambda=0.0, owl_m=3)
    observed = run(tiny_model, text, tmp_path / "b", method="wanda", allocation="uniform")
    assert from_dense.facts["mask_sha256"] == observed.facts["mask_sha256"]


def test_mlp_sparsity_is_shown_beside_that_of_all_linears(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    facts = run(tiny_model, text, tmp_path / "out", method="dass").facts
    mlp = [fact for fact in facts["linears"] if ".mlp." in fact["name"]]
    n_weights = sum(fact["shape"][0] * fact["shape"][1] for fact in mlp)
    assert facts["sparsity"]["mlp"] == sum(fact["n_zeros"] for fact in mlp) / n_weights


def test_compensation_leaves_its_loss_on_record(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    facts = run(tiny_model, text, tmp_path / "out", method="sparsegpt").facts
    assert all(fact["notes"]["loss"] > 0 for fact in facts["linears"])
    json.dumps(facts)


def test_model_without_gated_mlp_is_refused_by_dass(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
    save_tiny_model(tmp_path / "opt")  # for its tokenizer
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)).save_pretrained(tmp_path / "opt")
    with pytest.raises(OwlDeployError, match=r"no gated MLP, which method dass needs: use wanda"):
        run(tmp_path / "opt", text, tmp_path / "out", method="dass")
    assert not (tmp_path / "out").exists()


def test_pattern_that_does_not_divide_the_inputs_is_refused_by_name(
    tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"keep 3 of 7 does not fit model.layers.0.self_attn.q_proj, .* 64 inputs"):
        run(tiny_model, text, tmp_path / "out", pattern="keep 3 of 7")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "sparsgpt"}, "did you mean sparsegpt?"),
        ({"allocation": "alpha-pruning"}, "did you mean alphapruning?"),
        ({"allocation": "file:"}, "must be file:PATH"),
        ({"pattern": "2:4"}, "2:4 is ambiguous"),
        ({"pattern": "keep 2 of 4", "sparsity": 0.7}, "pattern keep 2 of 4 has sparsity 0.5, got sparsity 0.7"),
        ({"pattern": "keep 2 of 4", "allocation": "owl"}, "leaves nothing to share out"),
        ({"pattern": "keep 4 of 8", "allocation": "owl", "allocation_per": "linear"}, "use allocation_per block"),
        ({"allocation": "ramp", "allocation_per": "linear"}, "allocation ramp knows no linears"),
        ({"pattern": "keep 2 of 4", "method": "dass"}, "dass compares whole columns"),
        ({"method": "dass", "true_sequential": True}, "not with true_sequential"),
        ({"dampening": 0}, "dampening"),
    ],
)
def test_impossible_settings_are_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="command line: ") as error:
        checked(PruneSettings, values, where="command line")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pattern_sets_sparsity_and_allocation() -> None:
    chosen = PruneSettings.model_validate({"pattern": "keep 3 of 8"})
    assert (chosen.sparsity, chosen.allocation) == (0.625, "uniform")


def test_every_option_of_a_method_is_a_setting() -> None:
    for method in METHODS.values():
        assert set(method.options) <= set(PruneSettings.model_fields)


def test_text_that_is_still_to_be_sampled_counts_towards_memory(tiny_model: Path) -> None:
    skeleton = open_skeleton(open_checkpoint(str(tiny_model)))
    wanted = PruneSettings(n_samples=7, seq_len=33)
    assert must_be_sampled(skeleton.checkpoint, wanted, seed=5)
    known, sampled = (predict_footprint(skeleton, wanted, samples_text=samples) for samples in (False, True))
    assert "sampling text" not in known.whole_model
    assert sampled.whole_model["sampling text"] > 4 * sum(p.numel() for p in skeleton.model.parameters())
    calibration_tokens(skeleton.checkpoint, wanted, seed=5)
    assert not must_be_sampled(skeleton.checkpoint, wanted, seed=5)
    assert not must_be_sampled(skeleton.checkpoint, wanted.model_copy(update={"calibration": "python-docs"}), seed=6)


def test_hidden_states_count_only_where_they_are_in_memory(tiny_model: Path) -> None:
    footprint = predict_footprint(open_skeleton(open_checkpoint(str(tiny_model))), PruneSettings())
    assert footprint.hidden_states == 128 * 2048 * 64 * 4
    difference = footprint.peak(states_on_disk=False) - footprint.peak(states_on_disk=True)
    assert difference == footprint.hidden_states
    assert "hidden states on disk" in footprint.describe(states_on_disk=True)
