"""Perplexity and closeness to a reference, against slow loops in float64 and torch's own divergence."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_tiny_model
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.evaluation import Evaluation, divergence, evaluate, evaluation_windows, mean_nll, perplexity
from owl_deploy.recipe import EvalSettings
from owl_deploy.text import Encoder

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again; 100 letters are here in all."


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return f"text:{path}"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


def float64_logits(model: Path, tokens: list[int]) -> torch.Tensor:
    """Logits (n, vocab) with all arithmetic in float64."""
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).double().eval()
        logits: torch.Tensor = loaded(torch.tensor([tokens])).logits[0]
    return logits


def slow_perplexity(model: Path, tokens: list[int], window: int) -> float:
    """Predict token after token of every full window, each window from nothing; exp of the mean of window means."""
    means = []
    for start in range(0, len(tokens) - window + 1, window):
        row = tokens[start : start + window]
        logits = float64_logits(model, row)
        nlls = []
        for position in range(window - 1):
            log_probabilities = torch.log_softmax(logits[position], dim=-1)
            nlls.append(-float(log_probabilities[row[position + 1]]))
        means.append(sum(nlls) / len(nlls))
    return math.exp(sum(means) / len(means))


def random_logits(n: int, vocab: int = 50, seed: int = 0) -> NDArray[np.float32]:
    return (4 * np.random.default_rng(seed).standard_normal((n, vocab))).astype(np.float32)


def test_perplexity_of_the_worked_example() -> None:
    assert perplexity([2.0, 2.2, 1.9]) == pytest.approx(7.639509, abs=5e-7)


def test_perplexity_of_a_hopeless_model_is_huge_but_a_number() -> None:
    assert 1e300 < perplexity([1e6, 2.0]) < math.inf


# Rows are worked through in pieces of 32: sizes around its multiples.
@pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 34, 64, 65, 66, 700])
def test_mean_nll_is_that_of_the_slow_loop(n: int) -> None:
    logits, tokens = random_logits(n), np.random.default_rng(1).integers(0, 50, n)
    rows = torch.from_numpy(logits).double()
    nlls = [-float(torch.log_softmax(rows[i], 0)[tokens[i + 1]]) for i in range(n - 1)]
    assert mean_nll(logits, tokens) == pytest.approx(sum(nlls) / (n - 1), rel=1e-7)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    nll = mean_nll(np.full((10, 260), 1e4, dtype=np.float32), np.arange(10))
    assert perplexity([nll]) == pytest.approx(260, rel=1e-12)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 600])
def test_divergence_is_that_of_torch(n: int) -> None:
    expected, actual = random_logits(n, seed=0), random_logits(n, seed=1)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=1) for x in (expected, actual))
    kl, top1 = divergence(expected, actual)
    assert kl == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-6
    )
    assert top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()), rel=1e-12)


def test_divergence_is_taken_from_the_reference() -> None:
    certain = np.array([[20.0, 0, 0, 0]], dtype=np.float32)
    flat = np.zeros((1, 4), dtype=np.float32)
    assert divergence(certain, flat)[0] == pytest.approx(math.log(4), rel=1e-5)
    assert divergence(flat, certain)[0] > 10


def test_divergence_from_itself_is_nothing_whatever_is_added_to_the_logits() -> None:
    logits = random_logits(9)
    assert divergence(logits, logits) == (0.0, 1.0)
    assert divergence(logits, logits + np.float32(8)) == pytest.approx((0, 1), abs=1e-6)


def test_windows_do_not_overlap_and_the_tail_is_dropped(tiny_model: Path, text: str) -> None:
    windows = evaluation_windows(Encoder.open(tiny_model), EvalSettings(text=text, window=32))
    expected = byte_tokenizer()(TEXT[:96])["input_ids"]
    assert windows.tokens.shape == (3, 32)
    assert windows.tokens.ravel().tolist() == expected
    assert not windows.starts_with_bos


def test_windows_are_taken_from_the_start(tiny_model: Path, text: str) -> None:
    encoder = Encoder.open(tiny_model)
    two = evaluation_windows(encoder, EvalSettings(text=text, window=25, max_windows=2))
    assert byte_tokenizer().batch_decode(torch.from_numpy(two.tokens)) == [TEXT[:25], TEXT[25:50]]
    assert evaluation_windows(encoder, EvalSettings(text=text, window=25, max_windows=99)).tokens.shape == (4, 25)
    assert evaluation_windows(encoder, EvalSettings(text=text, window=100)).tokens.shape == (1, 100)


def test_text_is_tokenised_once_so_that_only_the_first_window_starts_with_bos(tmp_path: Path, text: str) -> None:
    byte_tokenizer(adds_bos=True).save_pretrained(tmp_path)
    windows = evaluation_windows(Encoder.open(tmp_path), EvalSettings(text=text, window=25))
    assert windows.starts_with_bos
    assert (windows.tokens == 0).sum() == 1
    assert windows.tokens[0, 0] == 0


def test_too_little_text_says_how_much_there_is_and_what_to_do(tiny_model: Path, text: str) -> None:
    with pytest.raises(OwlDeployError, match="gives 100 tokens, one window needs 101: lower window"):
        evaluate([str(tiny_model)], EvalSettings(text=text, window=101), threads=1)


def test_generated_text_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="evaluate on another text"):
        evaluate([str(tiny_model)], EvalSettings(text="generated"), threads=1)


def test_perplexity_of_a_model_is_that_of_the_slow_loop(tiny_model: Path, text: str) -> None:
    (result,) = evaluate([str(tiny_model)], EvalSettings(text=text, window=32), threads=1)
    tokens = byte_tokenizer()(TEXT)["input_ids"]
    assert result.perplexity == pytest.approx(slow_perplexity(tiny_model, tokens, 32), rel=1e-5)
    assert (result.text, result.window, result.n_windows, result.engine) == (text, 32, 3, "torch")


def test_models_are_compared_with_the_reference_position_by_position(
    tiny_model: Path, other_model: Path, text: str
) -> None:
    results = evaluate(
        [str(tiny_model), str(other_model)],
        EvalSettings(text=text, window=33, max_windows=2),
        reference=str(tiny_model),
        threads=1,
    )
    rows = [byte_tokenizer()(TEXT[start : start + 33])["input_ids"] for start in (0, 33)]
    p, q = (
        torch.log_softmax(torch.cat([float64_logits(model, row) for row in rows]), dim=1)
        for model in (tiny_model, other_model)
    )
    kl = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    same, other = results
    assert same.kl_divergence == pytest.approx(0, abs=1e-12)
    assert same.top1_agreement == 1
    assert other.kl_divergence == pytest.approx(kl, rel=1e-4)
    assert other.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert other.perplexity != same.perplexity
    assert {result.reference for result in results} == {str(tiny_model)}


def test_json_leaves_out_what_was_not_measured(tiny_model: Path, text: str) -> None:
    (result,) = evaluate([str(tiny_model)], EvalSettings(text=text, window=50), threads=1)
    document = json.loads(json.dumps(result.to_json()))
    keys = "perplexity text window n_windows starts_with_bos tokens_sha256 engine"
    assert set(document) == set(keys.split())


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, text: str) -> None:
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    model.save_pretrained(folder)
    with pytest.raises(OwlDeployError, match="NaN or Inf"):
        evaluate([str(folder)], EvalSettings(text=text, window=50), threads=1)


@dataclass
class CountingEngine:
    """Stands in for an artifact's engine: uniform logits, and a count of the windows it saw."""

    name: str = "counting"
    seen: list[int] = field(default_factory=list)

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self.seen.append(len(tokens))
        return np.zeros((len(tokens), 260), dtype=np.float32)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CountingEngine:
    engine = CountingEngine()

    @contextmanager
    def open_language_model(*_: Any, **__: Any) -> Iterator[CountingEngine]:
        yield engine

    monkeypatch.setattr("owl_deploy.evaluation.open_language_model", open_language_model)
    return engine


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder that looks like an artifact; its model is never opened here."""
    folder = tmp_path / "artifact"
    byte_tokenizer().save_pretrained(folder)
    (folder / "model.onnx").touch()
    (folder / "owl.json").write_text("{}")
    return folder


def test_artifact_keeps_its_evaluations(artifact: Path, text: str, engine: CountingEngine) -> None:
    settings = EvalSettings(text=text, window=25)
    first = evaluate([str(artifact)], settings, threads=1)
    assert engine.seen == [25] * 4
    assert evaluate([str(artifact)], settings, threads=1) == first
    assert engine.seen == [25] * 4


@pytest.mark.parametrize(
    "change", [{"window": 50}, {"window": 20}, {"max_windows": 2}], ids=["same tokens", "fewer tokens", "max"]
)
def test_evaluation_with_other_windows_is_made_anew(
    artifact: Path, tmp_path: Path, engine: CountingEngine, change: dict[str, int]
) -> None:
    (tmp_path / "hundred.txt").write_text("x" * 100)
    settings = EvalSettings(text=f"text:{tmp_path / 'hundred.txt'}", window=25)
    evaluate([str(artifact)], settings, threads=1)
    n_seen = len(engine.seen)
    changed = settings.model_copy(update=change)
    (result,) = evaluate([str(artifact)], changed, threads=1)
    assert result.window == changed.window
    assert len(engine.seen) == n_seen + result.n_windows


def test_evaluation_against_another_reference_is_made_anew(
    artifact: Path, tmp_path: Path, text: str, engine: CountingEngine
) -> None:
    settings = EvalSettings(text=text, window=50)
    evaluate([str(artifact)], settings, threads=1)
    (judged,) = evaluate([str(artifact)], settings, reference=str(artifact), threads=1)
    assert judged.kl_divergence == 0
    assert len(engine.seen) == 2 + 2 * 2  # two windows alone, then two seen by model and reference


def test_known_and_new_results_come_back_in_the_order_of_the_models(
    artifact: Path, tiny_model: Path, text: str, engine: CountingEngine
) -> None:
    settings = EvalSettings(text=text, window=50)
    (stored,) = evaluate([str(artifact)], settings, threads=1)
    file = artifact / "evaluations.json"
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: {**stored.to_json(), "perplexity": 5.0}}))
    first, second, third = evaluate([str(tiny_model), str(artifact), str(tiny_model)], settings, threads=1)
    assert [result.perplexity for result in (first, second, third)] == [pytest.approx(260), 5.0, pytest.approx(260)]
    assert isinstance(second, Evaluation)


def test_checkpoint_keeps_no_evaluations(tiny_model: Path, text: str) -> None:
    before = sorted(path.name for path in tiny_model.iterdir())
    evaluate([str(tiny_model)], EvalSettings(text=text, window=50), threads=1)
    assert sorted(path.name for path in tiny_model.iterdir()) == before
