"""The server over real connections: OpenAI's client, limits, errors, cancellation and the queue."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving import Running, eventually, serving, tiny_artifact
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from owl_deploy.serve.batch import DecoderBatch

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def tiny(artifact: Path) -> Iterator[Running]:
    with serving(artifact) as running:
        yield running


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step take 10 ms, so that a test sees requests while they run."""
    decode = DecoderBatch.decode

    def slow_decode(self: DecoderBatch, *arguments: Any) -> Any:
        time.sleep(0.01)
        return decode(self, *arguments)

    monkeypatch.setattr(DecoderBatch, "decode", slow_decode)


def greedy_tokens(artifact: Path, prompt: str, n: int) -> list[int]:
    """The continuation of the checkpoint in torch, one token after the other without a cache."""
    model = AutoModelForCausalLM.from_pretrained(artifact.parent / "model").eval()
    tokens: list[int] = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(prompt).ids
    n_prompt = len(tokens)
    with torch.inference_mode():
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[n_prompt:]


def text_of(artifact: Path, tokens: list[int]) -> str:
    text: str = Tokenizer.from_file(str(artifact / "tokenizer.json")).decode(tokens)
    return text


# The official client.


def test_completion_is_the_checkpoints_greedy_continuation(tiny: Running, artifact: Path) -> None:
    answer = tiny.client.completions.create(model="tiny", prompt="An owl", max_tokens=12, temperature=0)
    expected = greedy_tokens(artifact, "An owl", 12)
    assert 1 not in expected  # else it would end there
    assert answer.choices[0].text == text_of(artifact, expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 12, 18)


@pytest.mark.parametrize("seed", [0, 1])
def test_streamed_chunks_make_the_same_text(tiny: Running, seed: int) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "An owl", "max_tokens": 40, "seed": seed}
    whole = tiny.client.completions.create(**asked)
    chunks = list(tiny.client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert len(chunks) > 1


def test_stream_tells_its_usage_last_where_that_is_asked_for(tiny: Running) -> None:
    stream = tiny.client.completions.create(
        model="tiny", prompt="An owl", max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


def test_chat_is_a_completion_of_the_templates_text(tiny: Running) -> None:
    messages: Any = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    chat = tiny.client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    same = tiny.client.completions.create(model="tiny", prompt="s:be/u:hi/a:", max_tokens=9, temperature=0)
    assert chat.choices[0].message.content == same.choices[0].text
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage == same.usage


def test_streamed_chat_begins_with_the_role(tiny: Running) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    chunks = list(tiny.client.chat.completions.create(**asked, stream=True))
    whole = tiny.client.chat.completions.create(**asked)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_model_without_a_template_refuses_chats(tmp_path: Path) -> None:
    with serving(tiny_artifact(tmp_path, template=None)) as running:
        assert not running.service.model.describe()["has_chat_template"]
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            running.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])


def test_template_may_refuse_a_conversation(tiny: Running) -> None:
    messages: Any = [{"role": "user", "content": "hi"}, {"role": "system", "content": "be"}]
    with pytest.raises(openai.BadRequestError, match="a system message must come first"):
        tiny.client.chat.completions.create(model="tiny", messages=messages)


def test_models_are_listed(tiny: Running) -> None:
    assert [model.id for model in tiny.client.models.list()] == ["tiny"]
    assert tiny.client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        tiny.client.models.retrieve("other")


def test_stop_string_ends_the_text_before_it(tiny: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "An owl", "max_tokens": 12, "temperature": 0}
    text = tiny.client.completions.create(**asked).choices[0].text
    stop = text[5:7]
    stopped = tiny.client.completions.create(**asked, stop=["never here", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_same_seed_same_answer_another_seed_another(tiny: Running) -> None:
    def answer(seed: int) -> str:
        asked = tiny.client.completions.create(model="tiny", prompt="An owl", max_tokens=30, seed=seed, temperature=2)
        return asked.choices[0].text

    assert answer(7) == answer(7) != answer(8)


def test_prompts_and_answers_are_numbered_in_order(tiny: Running) -> None:
    single = [
        tiny.client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in ("An owl", "Two mice and more")
    ]
    many = tiny.client.completions.create(
        model="tiny", prompt=["An owl", "Two mice and more"], n=2, max_tokens=6, temperature=0
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices] == [single[0], single[0], single[1], single[1]]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (6 + 17, 24)


def test_prompt_may_be_tokens(tiny: Running, artifact: Path) -> None:
    ids = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode("An owl").ids
    texts = {
        tiny.client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in ("An owl", ids, [ids])
    }
    assert len(texts) == 1


def test_logprobs_are_those_of_the_checkpoint(tiny: Running, artifact: Path) -> None:
    choice = (
        tiny.client.completions.create(model="tiny", prompt="An owl", max_tokens=1, temperature=0, logprobs=3)
    ).choices[0]
    model = AutoModelForCausalLM.from_pretrained(artifact.parent / "model").eval()
    ids = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode("An owl").ids
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-3)
    assert choice.logprobs.top_logprobs is not None
    np.testing.assert_allclose(
        sorted(choice.logprobs.top_logprobs[0].values(), reverse=True), expected.topk(3).values, atol=1e-3
    )


def test_chat_logprobs_name_every_token(tiny: Running) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = tiny.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)  # greedy


# Bad requests.


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "object"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "not JSON"),
        (b'{"model": "tiny"}', 400, "prompt: is missing"),
        (b'{"model": "tiny", "prompt": {}}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": ""}', 400, "holds no text"),
        (b'{"model": "tiny", "prompt": []}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": [260]}', 400, "0 to 259"),
        (b'{"model": "tiny", "prompt": [-1]}', 400, "0 to 259"),
        (b'{"model": "tiny", "prompt": [1e400]}', 400, "prompt"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": "5"}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", 400, "out of range"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 512}', 400, "more than the model's 512"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 9999}', 400, "allows 2048"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, ""),
        (b'{"model": "tiny", "prompt": "a", "temperature": -1}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "a", "top_p": 1.5}', 400, "top_p"),
        (b'{"model": "tiny", "prompt": "a", "stop": [""]}', 400, "stop"),
        (b'{"model": "tiny", "prompt": "a", "n": 5}', 400, "at most 4 answers"),
        (b'{"model": "tiny", "prompt": "a", "logit_bias": {"999": 1}}', 400, "logit_bias"),
        (b'{"model": "tiny", "prompt": "a", "logit_bias": {"\xc2\xb2": 1}}', 400, "logit_bias"),
        (b'{"model": "tiny", "prompt": "a", "echo": true}', 400, "echo"),
        (b'{"model": "tiny", "prompt": "a", "tools": []}', 400, "tools: is not supported"),
        (b'{"model": "../../etc/passwd", "prompt": "a"}', 404, "only 'tiny'"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, ""),
    ],
)
def test_bad_body_is_refused_with_a_sentence(tiny: Running, body: bytes, status: int, words: str) -> None:
    found, answer = tiny.post(COMPLETIONS, body)
    assert (found, set(answer["error"])) == (status, {"message", "type", "param", "code"})
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_prompt_that_is_too_long_is_refused_with_openais_code(tiny: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tiny.client.completions.create(model="tiny", prompt="a" * 512, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


def test_large_body_is_refused_before_it_is_read(artifact: Path) -> None:
    with serving(artifact, max_request_bytes=2000) as running:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        assert running.send(f"{head}Content-Length: 999999999\r\n\r\n".encode())[0] == 413
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        assert running.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 3 * chunk)[0] == 413
        assert running.ask(COMPLETIONS, prompt="a", max_tokens=1)[0] == 200


def test_body_of_another_type_is_refused(tiny: Running) -> None:
    status, answer = tiny.post(COMPLETIONS, b'{"model": "tiny", "prompt": "a"}', "Content-Type: text/plain")
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("request_line", "status"), [("GET /v1/completions", 405), ("GET /nowhere", 404), ("GET /../../etc/passwd", 404)]
)
def test_unknown_routes_have_openais_errors(tiny: Running, request_line: str, status: int) -> None:
    found, answer = tiny.send(f"{request_line} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
    assert found == status
    assert answer["error"]["message"]


def test_clients_that_send_slowly_are_cut(artifact: Path) -> None:
    with serving(artifact, receive_timeout_s=0.2) as running:
        with running.connection() as half_headers:
            half_headers.sendall(b"POST / HTTP/1.1\r\nHost:")
            assert half_headers.recv(100) == b""
        with running.connection() as silent:
            assert silent.recv(100) == b""
        with running.connection() as half_body:
            half_body.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                "Content-Length: 100\r\n\r\n{".encode()
            )
            assert half_body.recv(100).startswith(b"HTTP/1.1 408 ")
        assert running.ask(COMPLETIONS, prompt="a", max_tokens=1)[0] == 200


# The key.


def test_key_is_asked_for_and_never_shown(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(artifact, environment={"OWL_DEPLOY_API_KEY": "s3cret-key"}) as running:
        with pytest.raises(openai.AuthenticationError):
            running.client.models.list()
        for wrong in ("Bearer", "Bearer ", "Bearer s3cret-ke", "Bearer s3cret-keys", "s3cret-key", "Bearer \u00e9"):
            head = f"GET /v1/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\nAuthorization: {wrong}\r\n\r\n"
            assert running.send(head.encode())[0] == 401
        allowed = openai.OpenAI(base_url=f"{running.url}/v1", api_key="s3cret-key", max_retries=0)
        assert allowed.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        shown = json.dumps(running.service.settings.model_dump(mode="json")) + repr(running.service) + caplog.text
        assert "s3cret" not in shown
        assert running.send(b"GET /health/ready HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")[0] == 200


# Several clients.


def open_stream(running: Running, **body: Any) -> socket.socket:
    """Begin a streamed completion; returns the connection when its first token is there."""
    text = json.dumps({"model": "tiny", "prompt": "An owl", "stream": True, "temperature": 0, **body})
    connection = running.connection()
    connection.sendall(
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
    )
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    return connection


ENDLESS = {"max_tokens": 500, "logit_bias": {"1": -100}}
"""No end token: an answer goes on to its limit."""


@pytest.mark.usefixtures("slow")
def test_client_that_goes_away_frees_its_place(artifact: Path) -> None:
    with serving(artifact, batch_size=1, queue_size=0) as running:
        scheduler = running.service.scheduler
        open_stream(running, **ENDLESS).close()
        assert eventually(lambda: scheduler.n_active == 0, 2.0)  # 500 steps of 10 ms would be 5 s
        with open_stream(running, stream=False, max_tokens=1):
            pass
        status, answer = running.ask(COMPLETIONS, prompt="a", max_tokens=1)
        assert status == 200, answer


@pytest.mark.usefixtures("slow")
def test_full_queue_answers_429_and_when_to_come_again(artifact: Path) -> None:
    with serving(artifact, batch_size=1, queue_size=1) as running:
        second = threading.Thread(target=running.ask, args=(COMPLETIONS,), kwargs={"prompt": "a", "max_tokens": 1})
        with open_stream(running, **ENDLESS):
            second.start()
            assert eventually(lambda: running.service.scheduler.n_waiting == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                running.client.completions.create(model="tiny", prompt="a")
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert refused.value.code == "queue_full"
        second.join()


@pytest.mark.usefixtures("slow")
def test_time_limit_ends_an_answer_and_refuses_one_that_never_began(artifact: Path) -> None:
    with serving(artifact, batch_size=1, request_timeout_s=0.4) as running:
        late: list[tuple[int, Any]] = []
        asked = {"prompt": "a", "max_tokens": 400, "logit_bias": {"1": -100}}
        with open_stream(running, **ENDLESS):
            waits = threading.Thread(target=lambda: late.append(running.ask(COMPLETIONS, **asked)))
            waits.start()
            waits.join()
        status, answer = running.ask(COMPLETIONS, **asked)
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 400
        # It arrived after the first one, and so has a little time left when that one's is over.
        assert late[0][0] in (200, 503)


def test_failed_step_is_told_and_the_next_request_is_served(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(artifact) as running:
        with monkeypatch.context() as broken:
            broken.setattr(DecoderBatch, "decode", lambda *_: 1 / 0)
            status, answer = running.ask(COMPLETIONS, prompt="a", max_tokens=3, logit_bias={"1": -100})
            assert (status, answer["error"]["code"]) == (500, "engine_failed")
            assert "ZeroDivisionError" in caplog.text
            assert "ZeroDivisionError" not in json.dumps(answer)
            status, events = running.ask(COMPLETIONS, prompt="a", max_tokens=3, logit_bias={"1": -100}, stream=True)
            assert status == 200  # it had begun
            assert b"engine_failed" in events
            assert b"[DONE]" not in events
        assert running.ask(COMPLETIONS, prompt="a", max_tokens=3)[0] == 200


# Health, metrics, page.


def get(running: Running, path: str) -> tuple[int, Any]:
    return running.send(f"GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"])
def test_health_is_ok(tiny: Running, path: str) -> None:
    assert get(tiny, path) == (200, {"status": "ok"})


def test_draining_server_is_alive_but_not_ready_and_takes_nothing(artifact: Path) -> None:
    with serving(artifact) as running:
        running.service.scheduler.drain()
        assert get(running, "/health/live")[0] == 200
        assert get(running, "/health/ready")[0] == get(running, "/v2/health/ready")[0] == 503
        status, answer = running.ask(COMPLETIONS, prompt="a")
        assert (status, answer["error"]["code"]) == (503, "stopping")


def test_metrics_count_what_was_done(artifact: Path) -> None:
    with serving(artifact) as running:
        assert running.ask(COMPLETIONS, prompt="An owl", max_tokens=5, logit_bias={"1": -100})[0] == 200
        assert get(running, "/nowhere")[0] == 404
        text = get(running, "/metrics")[1].decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["owl_deploy_prompt_tokens_total"]) == 6
    assert float(figures["owl_deploy_completion_tokens_total"]) == 5
    assert float(figures["owl_deploy_ttft_seconds_count"]) == 1
    assert float(figures["owl_deploy_itl_seconds_count"]) == 4
    assert float(figures["owl_deploy_queue_seconds_count"]) == 1
    assert float(figures['owl_deploy_sequences_finished_total{outcome="length"}']) == 1
    assert float(figures["owl_deploy_active_requests"]) == 0
    assert float(figures["owl_deploy_resident_memory_bytes"]) > 2**20
    assert float(figures['owl_deploy_requests_total{route="/v1/completions",status="200"}']) == 1
    assert float(figures['owl_deploy_requests_total{route="other",status="404"}']) == 1


def test_page_loads_nothing_from_elsewhere(tiny: Running) -> None:
    for path in ("/", "/page.css", "/page.js"):
        status, body = get(tiny, path)
        assert status == 200
        assert b"://" not in body
