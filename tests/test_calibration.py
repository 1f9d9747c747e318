"""Calibration tokens: full sequences that do not overlap, the same for the same seed, with the BOS asked for."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from owl_deploy.calibration import Calibration, calibration_tokens
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import OwlDeployError
from owl_deploy.recipe import PruneSettings

BOS = 0
Policy = Literal["auto", "always", "never"]
# Every number once, so that any 20 characters occur at one place only.
NUMBERS = "".join(f"{i:05d}" for i in range(1000))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny matrices: on a busy machine a second thread is mostly waited for."""
    torch.set_num_threads(1)


def sampled(model: Path, calibration: str, *, seed: int = 0, **settings: Any) -> Calibration:
    sizes = {"n_samples": 8, "seq_len": 20, **settings}
    return calibration_tokens(
        open_checkpoint(str(model)), PruneSettings.model_validate({"calibration": calibration, **sizes}), seed=seed
    )


def with_tokenizer(model: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a copy of a model's folder with another tokenizer."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model / name)
    tokenizer.save_pretrained(folder)
    return folder


def without_bos(folder: Path) -> Path:
    """Let the tokenizer of a folder know no begin-of-sequence token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def adding_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that starts every text with BOS."""
    folder = tmp_path / "adding"
    folder.mkdir()
    return with_tokenizer(tiny_model, folder, byte_tokenizer(adds_bos=True))


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS)
    return f"text:{path}"


@pytest.fixture
def two_documents(tmp_path: Path) -> str:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcde", "fghijkl", "mnopqrstuvwx")))
    return f"jsonl:{path}"


def test_tokens_are_full_sequences_of_the_asked_size(tiny_model: Path, numbers: str) -> None:
    calibration = sampled(tiny_model, numbers, n_samples=5, seq_len=17)
    assert calibration.tokens.shape == (5, 17)
    assert calibration.tokens.dtype == np.int64
    assert calibration.tokens.flags.c_contiguous


def test_sequences_come_from_the_text_and_do_not_overlap(tiny_model: Path, numbers: str) -> None:
    tokens = sampled(tiny_model, numbers, n_samples=100).tokens
    texts = byte_tokenizer().batch_decode(torch.from_numpy(tokens))
    assert [NUMBERS.count(text) for text in texts] == [1] * 100
    starts = sorted(NUMBERS.index(text) for text in texts)
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(starts))
    assert max(starts) > len(NUMBERS) / 2  # drawn from all over the text


def test_all_of_a_text_can_be_used(tiny_model: Path, numbers: str) -> None:
    tokens = sampled(tiny_model, numbers, n_samples=250).tokens  # 250 x 20 = 5000 characters
    assert sorted(byte_tokenizer().batch_decode(torch.from_numpy(tokens))) == [
        NUMBERS[i : i + 20] for i in range(0, 5000, 20)
    ]


def test_same_seed_gives_the_same_tokens_and_another_seed_others(tiny_model: Path, numbers: str) -> None:
    first, again, other = (sampled(tiny_model, numbers, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_global_random_state_neither_matters_nor_moves(tiny_model: Path, numbers: str) -> None:
    import random

    random.seed(1)
    first, after = sampled(tiny_model, numbers).sha256, random.random()
    random.seed(1)
    assert random.random() == after
    assert sampled(tiny_model, numbers).sha256 == first


def test_too_little_text_says_how_much_there_is_and_what_to_do(tiny_model: Path, numbers: str) -> None:
    message = r"gives 5000 tokens, and 251 samples of 20 need 5020: lower n_samples or seq_len, or name a longer text"
    with pytest.raises(OwlDeployError, match=message):
        sampled(tiny_model, numbers, n_samples=251)


def test_source_without_documents_has_too_little_text(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(OwlDeployError, match="gives 0 tokens"):
        sampled(tiny_model, f"jsonl:{tmp_path / 'empty.jsonl'}")


@pytest.mark.parametrize("source", ["generated", "python-docs"])
def test_sequences_longer_than_the_context_are_refused(tiny_model: Path, source: str) -> None:
    with pytest.raises(OwlDeployError, match="seq_len 513 is longer than the model's context of 512 tokens: lower it"):
        sampled(tiny_model, source, seq_len=513)


def test_endless_source_is_read_no_further_than_needed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_read = 0

    def endless(*_: Any) -> Iterator[str]:
        nonlocal n_read
        while True:
            n_read += 1
            yield "a document of thirty-one letters"

    monkeypatch.setattr("owl_deploy.calibration.documents", endless)
    assert sampled(tiny_model, "c4", n_samples=4, seq_len=16).tokens.shape == (4, 16)
    assert n_read < 100


def test_auto_adds_no_bos_where_the_tokenizer_adds_none(tiny_model: Path, two_documents: str) -> None:
    calibration = sampled(tiny_model, two_documents, n_samples=1, seq_len=24)
    assert byte_tokenizer().decode(calibration.tokens[0]) == "abcdefghijklmnopqrstuvwx"
    assert not calibration.starts_with_bos


def test_auto_starts_every_document_with_the_bos_that_the_tokenizer_adds(
    adding_model: Path, two_documents: str
) -> None:
    calibration = sampled(adding_model, two_documents, n_samples=1, seq_len=27)
    assert byte_tokenizer().decode(calibration.tokens[0]) == "<bos>abcde<bos>fghijkl<bos>mnopqrstuvwx"
    assert calibration.starts_with_bos


def test_auto_does_not_claim_a_bos_that_only_some_sequences_start_with(adding_model: Path, two_documents: str) -> None:
    calibration = sampled(adding_model, two_documents, n_samples=3, seq_len=9)
    assert sorted(calibration.tokens[:, 0] == BOS) == [False, False, True]
    assert not calibration.starts_with_bos


def test_never_leaves_out_the_bos_that_the_tokenizer_adds(adding_model: Path, two_documents: str) -> None:
    calibration = sampled(adding_model, two_documents, n_samples=1, seq_len=24, bos="never")
    assert byte_tokenizer().decode(calibration.tokens[0]) == "abcdefghijklmnopqrstuvwx"
    assert not calibration.starts_with_bos


@pytest.mark.parametrize("adds_bos", [False, True])
def test_always_starts_every_sequence_with_one_bos(
    tiny_model: Path, tmp_path: Path, numbers: str, adds_bos: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = with_tokenizer(tiny_model, folder, byte_tokenizer(adds_bos=adds_bos))
    calibration = sampled(model, numbers, n_samples=30, seq_len=21, bos="always")
    assert calibration.tokens.shape == (30, 21)
    assert calibration.starts_with_bos
    np.testing.assert_array_equal((calibration.tokens == BOS).sum(axis=1), 1)
    np.testing.assert_array_equal(calibration.tokens[:, 0], BOS)
    starts = sorted(NUMBERS.index(byte_tokenizer().decode(row[1:])) for row in calibration.tokens)
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(starts))


@pytest.mark.parametrize("source", ["generated", "python-docs"])
def test_always_without_a_bos_token_is_an_error(adding_model: Path, source: str) -> None:
    with pytest.raises(OwlDeployError, match="no begin-of-sequence token"):
        sampled(without_bos(adding_model), source, bos="always")


def test_facts_name_all_that_identifies_the_data(tiny_model: Path, numbers: str) -> None:
    calibration = sampled(tiny_model, numbers, seed=5)
    assert calibration.facts() == {
        "source": numbers,
        "seed": 5,
        "bos": "auto",
        "starts_with_bos": False,
        "n_samples": 8,
        "seq_len": 20,
        "tokens_sha256": calibration.sha256,
    }


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def generated_files(cache: Path) -> list[Path]:
    return sorted((cache / "generated").iterdir())


def slow_samples(model: Path, n_samples: int, seq_len: int, seed: int) -> list[list[int]]:
    """Sample from the model at temperature 1 after BOS without a cache: the whole prefix again for every token."""
    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((n_samples, 1), BOS)
    with torch.inference_mode():
        while tokens.shape[1] < seq_len:
            probabilities = torch_model(tokens, use_cache=False).logits[:, -1].softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return tokens.tolist()


def test_generated_text_is_sampled_from_the_model_itself(tiny_model: Path, empty_cache: Path) -> None:
    tokens = sampled(tiny_model, "generated", n_samples=6, seed=7, bos="always").tokens
    assert tokens.tolist() == slow_samples(tiny_model, 6, 20, seed=7)


def test_generated_text_begins_in_the_middle_of_a_document_where_the_tokenizer_adds_no_bos(
    tiny_model: Path, empty_cache: Path
) -> None:
    tokens = sampled(tiny_model, "generated", n_samples=6, seed=7).tokens
    assert tokens.tolist() == [row[32:] for row in slow_samples(tiny_model, 6, 52, seed=7)]


def test_generated_text_as_long_as_the_context_begins_with_random_tokens_not_bos(
    tiny_model: Path, empty_cache: Path
) -> None:
    almost = sampled(tiny_model, "generated", n_samples=4, seq_len=511, seed=7).tokens
    assert almost.tolist() == [row[1:] for row in slow_samples(tiny_model, 4, 512, seed=7)]
    whole = sampled(tiny_model, "generated", n_samples=4, seq_len=512, seed=7)
    assert not whole.starts_with_bos
    assert len(set(whole.tokens[:, 0].tolist())) == 4


def test_generated_sequences_are_all_full_and_differ(tiny_model: Path, empty_cache: Path) -> None:
    calibration = sampled(tiny_model, "generated", n_samples=18, seq_len=12)  # more than one batch
    assert calibration.tokens.shape == (18, 12)
    assert calibration.tokens.dtype == np.int64
    assert ((calibration.tokens >= 0) & (calibration.tokens < 260)).all()
    assert len({tuple(row) for row in calibration.tokens}) == 18


def test_generated_text_is_made_once_per_model_and_seed(
    tiny_model: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sampled(tiny_model, "generated")
    assert not first.is_cached

    def no_model(_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("owl_deploy.generation.load_torch_model", no_model)
    again = sampled(tiny_model, "generated")
    assert again.is_cached
    np.testing.assert_array_equal(again.tokens, first.tokens)
    assert again.facts() == first.facts()
    for other in ({"seed": 1}, {"n_samples": 7}, {"seq_len": 19}, {"bos": "always"}):
        with pytest.raises(AssertionError, match="was loaded"):
            sampled(tiny_model, "generated", **other)


def test_generated_text_of_another_model_is_another(tiny_model: Path, empty_cache: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert sampled(tiny_model, "generated").sha256 != sampled(other, "generated").sha256
    assert len(generated_files(empty_cache)) == 2


def test_generated_text_depends_on_the_seed(tiny_model: Path, empty_cache: Path) -> None:
    assert sampled(tiny_model, "generated", seed=0).sha256 != sampled(tiny_model, "generated", seed=1).sha256


def test_generated_text_is_the_same_bytes_when_made_again(tiny_model: Path, empty_cache: Path) -> None:
    sampled(tiny_model, "generated")
    (file,) = generated_files(empty_cache)
    before = file.read_bytes()
    file.unlink()
    assert not sampled(tiny_model, "generated").is_cached
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("bos", "adds_bos", "starts"),
    [("auto", False, False), ("auto", True, True), ("always", False, True), ("never", True, False)],
)
def test_generated_text_starts_with_the_bos_that_the_policy_asks_for(
    tiny_model: Path, adding_model: Path, empty_cache: Path, bos: Policy, adds_bos: bool, starts: bool
) -> None:
    calibration = sampled(adding_model if adds_bos else tiny_model, "generated", bos=bos)
    assert calibration.starts_with_bos is starts
    assert bool((calibration.tokens[:, 0] == BOS).all()) is starts


def test_generated_text_of_a_model_without_bos_starts_with_random_tokens(adding_model: Path, empty_cache: Path) -> None:
    calibration = sampled(without_bos(adding_model), "generated")
    assert not calibration.starts_with_bos
    assert len(set(calibration.tokens[:, 0].tolist())) > 1
