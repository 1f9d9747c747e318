"""Calibration sequences shared among devices: here two skeletons on the CPU, each with its part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from owl_deploy import pruning
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.devices import has_bfloat16_instructions, resolve_devices, resolve_products
from owl_deploy.errors import RecipeError
from owl_deploy.pruning import SparsityReport, prune
from owl_deploy.recipe import PruneSettings
from owl_deploy.refinement import InputMoments
from owl_deploy.statistics import Hessian, InputStatistic, SquaredNorm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Part {i} of {i * 3 % 17} goes elsewhere.\n" for i in range(300)))
    return path


def run(
    model: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, n: int, threads: int = 1, **changes: Any
) -> SparsityReport:
    values = {"allocation": "owl", "owl_m": 3, "sparsity": 0.5, "calibration": f"text:{text}"}
    settings = PruneSettings.model_validate({**values, "n_samples": 5, "seq_len": 32, **changes})
    monkeypatch.setattr(pruning, "resolve_devices", lambda _: (CPU,) * n)
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(out.with_name(f"{out.name}-cache")))
    return prune(str(model), settings, out=out, threads=threads)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "options",
    [{"method": "wanda"}, {"method": "sparsegpt"}, {"method": "wanda", "refine": "dsnot"}, {"true_sequential": True}],
    ids=str,
)
@pytest.mark.parametrize("n", [2, 7])
def test_masks_are_those_of_one_device_up_to_ties(
    n: int, options: dict[str, Any], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(tiny_model, text, tmp_path / "one", monkeypatch, 1, **options)
    more = run(tiny_model, text, tmp_path / "more", monkeypatch, n, **options)
    a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / "more")
    for fact in one.facts["linears"]:
        name = f"{fact['name']}.weight"
        assert ((a[name] != 0) == (b[name] != 0)).float().mean() > 0.999
    assert more.facts["sparsity"] == one.facts["sparsity"]
    figures = [[block["outlier_ratio"] for block in report.facts["blocks"]] for report in (one, more)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"method": "wanda"}, {"refine": "dsnot"}, {"true_sequential": True}, {"method": "sparsegpt"}], ids=str
)
def test_threads_with_sequences_of_their_own_see_the_same(
    options: dict[str, Any], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model, text, tmp_path / "one", monkeypatch, 1, threads=1, **options)
    three = run(tiny_model, text, tmp_path / "three", monkeypatch, 1, threads=3, **options)
    assert torch.get_num_threads() == 3
    a, b = weights_of(tmp_path / "one"), weights_of(tmp_path / "three")
    assert all(((a[name] != 0) == (b[name] != 0)).float().mean() > 0.999 for name in a)
    again = run(tiny_model, text, tmp_path / "again", monkeypatch, 1, threads=3, **options)
    assert again.facts == three.facts  # whichever thread is first


def test_products_in_bfloat16_give_nearly_the_same_masks(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run(tiny_model, text, tmp_path / "a", monkeypatch, 1)
    rounded = run(tiny_model, text, tmp_path / "b", monkeypatch, 1, forward_dtype="bfloat16")
    assert rounded.facts["mask_sha256"] != exact.facts["mask_sha256"]
    assert rounded.facts["sparsity"] == exact.facts["sparsity"]
    dense, a, b = (weights_of(folder) for folder in (tiny_model, tmp_path / "a", tmp_path / "b"))
    for name in (f"{fact['name']}.weight" for fact in exact.facts["linears"]):
        assert ((a[name] != 0) == (b[name] != 0)).float().mean() > 0.97
        assert torch.equal(b[name], torch.where(b[name] != 0, dense[name], 0.0))


@pytest.mark.parametrize("kind", [SquaredNorm, Hessian, InputMoments])
def test_merged_statistics_are_those_of_all_sequences(kind: type[InputStatistic]) -> None:
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randn(tokens, 6, generator=generator) + 1 for tokens in (7, 3, 5, 9)]
    whole, first, second = kind(6), kind(6), kind(6)  # type: ignore[call-arg]
    for i, sequence in enumerate(sequences):
        whole.update(sequence)
        (first if i < 3 else second).update(sequence)
    first.merge(second)
    first.merge(kind(6))  # type: ignore[call-arg]  # a device that saw nothing
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(first, name), value, rtol=1e-5, atol=1e-5)
        elif isinstance(value, int):
            assert getattr(first, name) == value


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert resolve_devices("auto") == (CPU,)
    assert resolve_devices("cpu") == (CPU,)
    with pytest.raises(RecipeError, match="device cuda is not on this machine, which has cpu"):
        resolve_devices("cuda")


def test_auto_takes_every_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    both = (torch.device("cuda", 0), torch.device("cuda", 1))
    assert resolve_devices("auto") == resolve_devices("cuda:0,cuda:1") == both
    assert resolve_devices("cuda") == (torch.device("cuda"),)
    with pytest.raises(RecipeError, match="device cuda:2 is not on this machine"):
        resolve_devices("cuda:2")


def test_nonsense_is_no_device() -> None:
    with pytest.raises(RecipeError, match="device must be auto, cpu or accelerators"):
        resolve_devices("gpu9000")


def test_statistics_in_the_cache_are_not_mixed_among_numbers_of_devices(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model, text, tmp_path / "one", monkeypatch, 1)
    values = {"allocation": "owl", "owl_m": 3, "sparsity": 0.5, "calibration": f"text:{text}"}
    settings = PruneSettings.model_validate({**values, "n_samples": 5, "seq_len": 32})
    monkeypatch.setattr(pruning, "resolve_devices", lambda _: (CPU, CPU))
    prune(str(tiny_model), settings, out=tmp_path / "two", threads=1)
    assert len(list((owl_deploy_cache() / "statistics").iterdir())) == 2


@pytest.mark.parametrize(
    ("features", "products", "has_instructions"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, torch.float32, False),
        ({"architecture": "aarch64"}, torch.float32, False),
    ],
)
def test_products_are_of_the_faster_type(
    features: dict[str, object], products: torch.dtype, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_products("auto", CPU) == products
    assert has_bfloat16_instructions() == has_instructions
    assert resolve_products("bfloat16", CPU) == torch.bfloat16
