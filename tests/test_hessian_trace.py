"""Traces of the loss Hessian, against the whole Hessian of a tiny model in float64 and transformers' own loss."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from owl_deploy import hessian_trace
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.hessian_trace import Trace, hessian_traces
from owl_deploy.progress import Step
from owl_deploy.skeleton import Prunable, Skeleton, open_skeleton

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
N_EXPERTS = 8
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(24, size=(2, 7)))
ONE = TOKENS[:1, :4]
"""Enough where it does not matter what is computed."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds the results of another."""
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hessian-traces"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts for two sequences of seven tokens: some see none."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = GraniteMoeConfig(**{**SIZES, "intermediate_size": 3}, num_local_experts=N_EXPERTS, num_experts_per_tok=1)
    GraniteMoeForCausalLM(config).save_pretrained(folder)
    return folder


def traces_of(folder: Path, tokens: torch.Tensor = ONE, **changes: Any) -> dict[str, Trace]:
    checkpoint = open_checkpoint(str(folder))
    options = {"n_probes": 2, "seed": 0, "threads": 1, **changes}
    return hessian_traces(checkpoint, open_skeleton(checkpoint), tokens, **options)


def linears_of(skeleton: Skeleton) -> dict[str, Prunable]:
    return {name: linear for i in range(len(skeleton.blocks)) for name, linear in skeleton.linears(i).items()}


# --- The oracle ---------------------------------------------------------------------------------


def exact_hessian(folder: Path, linear: Prunable) -> torch.Tensor:
    """The Hessian (n, n) of transformers' loss of both sequences at once, with respect to one linear's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    stored = model.get_parameter(linear.parameter).detach()

    def loss(weights: torch.Tensor) -> torch.Tensor:
        whole = stored.clone()
        if linear.expert is None:
            whole = weights.reshape(whole.shape)
        else:
            whole[linear.expert] = weights.reshape(whole[0].shape)
        arguments = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}
        result: torch.Tensor = torch.func.functional_call(model, {linear.parameter: whole}, kwargs=arguments).loss
        return result

    own = stored if linear.expert is None else stored[linear.expert]
    hessian: torch.Tensor = torch.autograd.functional.hessian(loss, own.flatten().clone())  # type: ignore[no-untyped-call]
    return hessian


@dataclass(frozen=True)
class Parts:
    """What the private functions work on."""

    linears: dict[str, Prunable]
    parameters: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    """Per sequence."""

    def forms(self, probe: dict[str, torch.Tensor]) -> dict[str, float]:
        """Mean over sequences."""
        found = [
            hessian_trace._quadratic_forms(self.linears, self.parameters, gradients, probe)
            for gradients in self.gradients
        ]
        return {name: float(np.mean([forms[name] for forms in found])) for name in self.linears}


def parts_of(folder: Path) -> Parts:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    linears = linears_of(open_skeleton(open_checkpoint(str(folder))))
    names = {linear.parameter for linear in linears.values()}
    parameters = {name: model.get_parameter(name).requires_grad_() for name in sorted(names)}
    return Parts(linears, parameters, [hessian_trace._gradients(model, parameters, row) for row in TOKENS])


def diagonal(parts: Parts, name: str) -> torch.Tensor:
    """z^T H z for every vector z of the standard basis of one linear."""
    linear = parts.linears[name]
    probe = {parameter: torch.zeros_like(value) for parameter, value in parts.parameters.items()}
    own = probe[linear.parameter] if linear.expert is None else probe[linear.parameter][linear.expert]
    found = []
    for i in range(own.numel()):
        own.view(-1)[i] = 1
        found.append(parts.forms(probe)[name])
        own.view(-1)[i] = 0
    return torch.tensor(found, dtype=torch.float64)


# --- What is computed ---------------------------------------------------------------------------


def test_means_are_within_four_standard_errors_of_the_exact_traces(llama: Path) -> None:
    linears = linears_of(open_skeleton(open_checkpoint(str(llama))))
    exact = {name: float(exact_hessian(llama, linear).diagonal().mean()) for name, linear in linears.items()}
    traces = traces_of(llama, TOKENS, n_probes=40)
    assert len(traces) == 14
    deviations = [(trace.mean - exact[name]) / (trace.standard_error or 0) for name, trace in traces.items()]
    assert max(map(abs, deviations)) < 4
    # The errors are neither too large nor too small for that to say something: a deviation of about one is usual,
    # and the largest trace stands out.
    assert 0.3 < np.sqrt(np.mean(np.square(deviations))) < 2
    largest = max(exact, key=lambda name: exact[name])
    assert exact[largest] > 3 * (traces[largest].standard_error or 0)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_basis_vectors_give_the_diagonal_of_the_exact_hessian(llama: Path, name: str) -> None:
    parts = parts_of(llama)
    expected = exact_hessian(llama, parts.linears[name]).diagonal()
    torch.testing.assert_close(diagonal(parts, name), expected, rtol=1e-4, atol=1e-6)


def test_basis_vectors_give_the_diagonal_of_an_expert_of_a_fused_parameter(experts: Path) -> None:
    parts = parts_of(experts)
    found = parts.forms({name: torch.ones_like(value) for name, value in parts.parameters.items()})
    name = max((name for name in parts.linears if "layers.0" in name and "output" in name), key=lambda n: abs(found[n]))
    assert parts.linears[name].expert is not None
    expected = exact_hessian(experts, parts.linears[name]).diagonal()
    assert expected.abs().max() > 0
    torch.testing.assert_close(diagonal(parts, name), expected, rtol=1e-4, atol=1e-6)


def test_probe_of_two_linears_gives_each_its_own_row_of_products(llama: Path) -> None:
    parts = parts_of(llama)
    generator = torch.Generator().manual_seed(0)
    probe = {name: hessian_trace._signs(value, generator) for name, value in parts.parameters.items()}
    step = 1e-4
    forms = dict.fromkeys(parts.linears, 0.0)
    for sign in (1, -1):  # H z by differences of the gradient
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64, attn_implementation="eager")
        with torch.no_grad():
            for name, value in probe.items():
                model.get_parameter(name).add_(sign * step * value)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for name, linear in parts.linears.items():
            gradient = model.get_parameter(linear.parameter).grad
            assert gradient is not None
            forms[name] += sign * float((probe[linear.parameter] * gradient).sum()) / (2 * step)
    # Norms are computed in float32 by the model whatever its type: the differences are no more exact than that.
    assert parts.forms(probe) == pytest.approx(forms, rel=1e-2, abs=1e-2)


def test_experts_that_see_no_token_have_a_trace_of_zero(experts: Path) -> None:
    traces = traces_of(experts, ONE)
    for block in range(2):
        of_experts = [trace for name, trace in traces.items() if f"layers.{block}.block_sparse_moe.input" in name]
        assert len(of_experts) == N_EXPERTS
        n_unused = sum(trace == Trace(0.0, 0.0) for trace in of_experts)
        assert N_EXPERTS - 4 <= n_unused < N_EXPERTS


def test_head_tied_to_the_embedding_does_not_matter(llama: Path, tmp_path: Path) -> None:
    tied = LlamaForCausalLM.from_pretrained(llama)
    untied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    untied.save_pretrained(tmp_path / "untied")
    assert traces_of(tmp_path / "untied") == traces_of(llama)


def test_linears_are_in_the_order_of_the_skeleton(experts: Path) -> None:
    assert list(traces_of(experts)) == list(linears_of(open_skeleton(open_checkpoint(str(experts)))))


def test_sequences_count_the_same_and_only_the_spread_of_probes_is_an_error(llama: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    linear = linears_of(open_skeleton(open_checkpoint(str(llama))))[name]
    assert linear.weight.numel() == 32
    forms = np.array([[1.0, 3.0], [5.0, 9.0]])[:, :, None]  # per sequence: mean 2, variance 2; mean 7, variance 8
    trace = hessian_trace._traces(forms, {name: linear})[name]
    assert trace.mean == pytest.approx(4.5 / 32)
    assert trace.standard_error == pytest.approx((5 / 4) ** 0.5 / 32)


def test_single_probe_has_no_standard_error(llama: Path) -> None:
    first, again = (traces_of(llama, n_probes=1) for _ in range(2))
    assert all(trace.standard_error is None for trace in first.values())
    assert first == again


def test_signs_are_plus_and_minus_one_and_depend_on_the_seed(llama: Path) -> None:
    weight = torch.empty(50, 40)
    first, same, other = (hessian_trace._signs(weight, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.abs(), torch.ones(50, 40))
    assert abs(float(first.mean())) < 0.1
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_every_probe_is_told(llama: Path) -> None:
    steps: list[Step] = []
    traces_of(llama, TOKENS, n_probes=3, on_step=steps.append)
    assert [(step.done, step.total) for step in steps] == [(i, 6) for i in range(1, 7)]


# --- The cache ----------------------------------------------------------------------------------


def refuse_to_load(*_: Any) -> Any:
    raise AssertionError("the model was loaded")


def test_same_seed_gives_the_same_figures_without_a_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = traces_of(llama)
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "other"))
    assert traces_of(llama) == first
    assert len(list((tmp_path / "other" / "hessian-traces").iterdir())) == 1


def test_second_call_reads_the_same_figures_and_does_not_load_the_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = traces_of(llama)
    monkeypatch.setattr(hessian_trace, "load_torch_model", refuse_to_load)
    assert traces_of(llama) == first


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"n_probes": 3}, {"tokens": TOKENS[1:, :4]}, {"tokens": ONE.reshape(2, 2)}],
    ids=["seed", "n_probes", "tokens", "rows"],
)
def test_other_work_does_not_read_the_same_file(llama: Path, cache: Path, changes: dict[str, Any]) -> None:
    first = traces_of(llama)
    assert traces_of(llama, **changes) != first
    assert len(list(cache.iterdir())) == 2


def changed(**values: Any) -> Callable[[str], str]:
    """Change the first of the traces."""

    def change(text: str) -> str:
        stored = json.loads(text)
        name = next(iter(stored["traces"]))
        new = dict(zip(("mean", "standard_error"), stored["traces"].pop(name), strict=True)) | values
        stored["traces"] = {name: [value for value in new.values() if value != "gone"], **stored["traces"]}
        return json.dumps(stored)

    return change


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut short": lambda text: text[: len(text) // 2],
    "no object": lambda _: "[1]",
    "no traces": lambda _: json.dumps({"traces": None}),
    "other names": lambda text: text.replace("layers.1", "layers.2"),
    "nan": changed(mean=float("nan")),
    "text": changed(mean="1.0"),
    "no error": changed(standard_error=None),
    "negative error": changed(standard_error=-1.0),
    "nothing": changed(mean="gone", standard_error="gone"),
}


@pytest.fixture(scope="module")
def written(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trace], str, str]:
    """What a call gives, and the name and content of the file that it leaves."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OWL_DEPLOY_CACHE", str(folder))
        traces = traces_of(llama)
    (file,) = (folder / "hessian-traces").iterdir()
    return traces, file.name, file.read_text()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file_is_made_anew(
    llama: Path, cache: Path, written: tuple[dict[str, Trace], str, str], damage: Callable[[str], str]
) -> None:
    traces, name, text = written
    assert damage(text) != text
    cache.mkdir(parents=True)
    (cache / name).write_text(damage(text))
    assert traces_of(llama) == traces
    assert (cache / name).read_text() == text


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "n_probes"),
    [(TOKENS, 0), (TOKENS[:0], 1), (TOKENS[:, :1], 1), (TOKENS[0], 1)],
    ids=["no probes", "no sequences", "nothing to predict", "no rows"],
)
def test_impossible_arguments_are_refused(llama: Path, tokens: torch.Tensor, n_probes: int) -> None:
    with pytest.raises(ValueError, match="need probes"):
        traces_of(llama, tokens, n_probes=n_probes)


def test_operation_without_second_derivative_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_trace, "sdpa_kernel", lambda _: nullcontext())  # fused attention has none
    with pytest.raises(UnsupportedModelError, match=r"without second derivative .*layerwise"):
        traces_of(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_trace_that_is_no_number_is_refused(llama: Path, value: float) -> None:
    linears = dict(list(linears_of(open_skeleton(open_checkpoint(str(llama)))).items())[:2])
    forms = np.ones((1, 2, 2))
    forms[0, 0, 1] = value
    with pytest.raises(OwlDeployError, match=r"layers\.0\.self_attn\.k_proj holds NaN or Inf"):
        hessian_trace._traces(forms, linears)
