"""Choosing tokens, and text out of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare

from owl_deploy.serve.sampling import Sampler, SamplingSettings
from owl_deploy.serve.text_stream import TextStream

TOKENIZER = byte_tokenizer().backend_tokenizer


def random_logits(n: int, seed: int = 0) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def counts(logits: NDArray[np.float32], n_draws: int, **settings: float) -> NDArray[np.int64]:
    sampler = Sampler(SamplingSettings(seed=0, **settings))  # type: ignore[arg-type]
    draws = [sampler.choose(logits).token for _ in range(n_draws)]
    return np.bincount(draws, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    logits = random_logits(12)
    expected = softmax(logits.astype(np.float64) / temperature)
    assert chisquare(counts(logits, 4000, temperature=temperature), 4000 * expected).pvalue > 1e-3


@pytest.mark.parametrize("n", [40, 3000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_leaves_the_fewest_tokens_that_have_that_share(n: int, top_p: float) -> None:
    logits = random_logits(n, seed=n)
    probabilities = softmax(logits.astype(np.float64))
    order = np.argsort(-probabilities)
    n_kept = next(k for k in range(1, n + 1) if probabilities[order[:k]].sum() >= top_p)
    found = counts(logits, 2000, top_p=top_p)
    assert set(np.flatnonzero(found)) <= set(order[:n_kept])
    assert found[order[0]] > 0
    if n_kept <= 5:
        assert set(np.flatnonzero(found)) == set(order[:n_kept])


def test_top_k_leaves_the_largest() -> None:
    logits = random_logits(50)
    assert set(np.flatnonzero(counts(logits, 2000, top_k=3, temperature=2.0))) == set(np.argsort(-logits)[:3])


def test_top_k_beyond_the_vocabulary_is_all() -> None:
    assert (counts(np.zeros(4, np.float32), 400, top_k=99) > 0).all()


def test_top_p_of_zero_is_the_most_likely() -> None:
    logits = random_logits(50)
    assert np.flatnonzero(counts(logits, 50, top_p=0.0)).tolist() == [logits.argmax()]


def test_smallest_temperature_is_the_most_likely() -> None:
    logits = random_logits(50)
    assert np.flatnonzero(counts(logits, 50, temperature=5e-324)).tolist() == [logits.argmax()]


def test_seed_fixes_the_draws() -> None:
    logits = random_logits(50)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(seed=seed))
        return [sampler.choose(logits).token for _ in range(30)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(50)
    settings = SamplingSettings(temperature=0, n_logprobs=4, logit_bias={int(logits.argmin()): 100.0})
    choice = Sampler(settings).choose(logits)
    expected = log_softmax(logits.astype(np.float64))
    assert choice.token == logits.argmin()
    assert choice.logprob == pytest.approx(expected.min(), abs=1e-5)
    best = np.argsort(-expected)[:4]
    assert [token for token, _ in choice.most_likely] == best.tolist()
    np.testing.assert_allclose([logprob for _, logprob in choice.most_likely], expected[best], atol=1e-5)


def test_penalties_grow_with_use() -> None:
    logits = np.array([1.0, 0.55, 0.0], np.float32)
    frequency = Sampler(SamplingSettings(temperature=0, frequency_penalty=0.2))
    # 1.0, 0.8, 0.6, then 0.4 against 0.55, then 0.4 against 0.35
    assert [frequency.choose(logits).token for _ in range(5)] == [0, 0, 0, 1, 0]
    presence = Sampler(SamplingSettings(temperature=0, presence_penalty=0.5))
    # 1.0, then 0.5 against 0.55, then 0.5 against 0.05, and no further
    assert [presence.choose(logits).token for _ in range(4)] == [0, 1, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    with pytest.raises(FloatingPointError, match="damaged"):
        Sampler(SamplingSettings()).choose(np.array([0, value, 1], np.float32))


# Text.


def streamed(tokens: list[int], *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stop)
    parts = []
    for token in tokens:
        parts.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*parts, stream.finish()], stream.is_stopped


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(words)
def test_text_arrives_whole_and_only_whole_characters(text: str) -> None:
    parts, _ = streamed(TOKENIZER.encode(text).ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.lists(st.integers(0, 259), max_size=40))
def test_any_tokens_make_some_text(tokens: list[int]) -> None:
    parts, _ = streamed(tokens)
    decoded = TOKENIZER.decode(tokens, skip_special_tokens=True)
    # Bytes that are no text become replacement characters, whose number depends on where the bytes were cut.
    assert "".join(parts).replace("\ufffd", "") == decoded.replace("\ufffd", "")


@examples(max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    parts, is_stopped = streamed(TOKENIZER.encode(text).ids, *stops)
    # The first to be complete ends the text; of those that are complete at once, the one that began first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert ("".join(parts), is_stopped) == (expected, bool(ends))


def test_special_tokens_are_no_text() -> None:
    ids = [*TOKENIZER.encode("a").ids, 0, 1, *TOKENIZER.encode("b").ids]
    assert "".join(streamed(ids)[0]) == "ab"
