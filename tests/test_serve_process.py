"""`owl-deploy serve` as a process: what it loads, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import call
from serving import eventually, tiny_artifact

from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.serve.settings import ServeSettings, api_key, environment_name


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("process"))


@contextmanager
def started(artifact: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start a server by the environment alone; yields it and what it says when it listens."""
    chosen = {"ARTIFACT": str(artifact), "PORT": "0", "THREADS": "1", "CONTEXT_LENGTH": "512", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "owl_deploy", "serve", "--json"],
        env={**os.environ, **{f"OWL_DEPLOY_{name}": value for name, value in chosen.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        document = ""
        while not document.endswith("}\n"):
            document += process.stdout.readline()
            assert process.poll() is None
        yield process, json.loads(document)
    finally:
        process.kill()
        process.communicate()


ENDLESS = {"model": "tiny", "prompt": "An owl", "temperature": 0, "logit_bias": {"1": -100}}


def test_sigterm_answers_what_was_begun_and_ends_well(artifact: Path) -> None:
    with started(artifact) as (process, facts):
        assert (facts["threads"], facts["threads_source"]) == (1, "setting")
        events: list[str] = []
        with httpx.stream(
            "POST", f"{facts['url']}/v1/completions", json={**ENDLESS, "max_tokens": 500, "stream": True}, timeout=30
        ) as stream:
            for line in stream.iter_lines():
                if not events:
                    process.send_signal(signal.SIGTERM)
                if line:
                    events.append(line)
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2]
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{facts['url']}/health/live")
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_drain_ends_when_its_time_is_over(artifact: Path) -> None:
    # 500 steps in which 64 tokens are chosen and told with 20 others each take far more than a second.
    with started(artifact, DRAIN_TIMEOUT_S="1", BATCH_SIZE="64") as (process, facts):
        body = {**ENDLESS, "max_tokens": 500, "n": 64, "logprobs": 20}
        answered: list[int] = []

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answered.append(httpx.post(f"{facts['url']}/v1/completions", json=body, timeout=30).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        assert eventually(lambda: "owl_deploy_active_requests 64.0" in httpx.get(f"{facts['url']}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        thread.join()
        assert 200 not in answered


def test_killed_server_starts_again_at_once_on_its_port(artifact: Path) -> None:
    with started(artifact) as (process, facts):
        assert httpx.get(f"{facts['url']}/health/ready").status_code == 200
        process.kill()
        process.wait(10)
        port = facts["url"].rpartition(":")[2]
        with started(artifact, PORT=port) as (_, again):
            assert again["url"] == facts["url"]
            answer = httpx.post(f"{again['url']}/v1/completions", json={**ENDLESS, "max_tokens": 2}, timeout=30)
            assert answer.status_code == 200


def _stream(url: str, events: list[str], **body: Any) -> None:
    """Collect the events of a stream until it ends or breaks."""
    with contextlib.suppress(httpx.HTTPError):
        body = {**ENDLESS, "stream": True, **body}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            events.append(str(stream.status_code))
            events.extend(line for line in stream.iter_lines() if line)


@contextmanager
def _streaming(url: str, n_streams: int, **body: Any) -> Iterator[list[list[str]]]:
    """Run some streams at once; they have ended when the block has."""
    collected: list[list[str]] = [[] for _ in range(n_streams)]
    threads = [threading.Thread(target=_stream, args=(url, events), kwargs=body) for events in collected]
    for thread in threads:
        thread.start()
    yield collected
    for thread in threads:
        thread.join()


def _metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"owl_deploy_{name} "))


def test_server_killed_under_load_loses_what_was_in_flight_and_nothing_else(artifact: Path) -> None:
    question = {**ENDLESS, "max_tokens": 20}
    with started(artifact) as (process, facts):
        url = facts["url"]
        before = httpx.post(f"{url}/v1/completions", json=question, timeout=30).json()["choices"]
        # Answers that take seconds: every token is told with twenty others.
        with _streaming(url, 4, max_tokens=480, n=2, logprobs=20) as collected:
            assert eventually(lambda: all(len(events) > 2 for events in collected))
            process.kill()
        for events in collected:
            assert events[0] == "200"
            assert events[-1] != "data: [DONE]"
        process.wait(10)
        with started(artifact, PORT=url.rpartition(":")[2]) as (_, again):
            answer = httpx.post(f"{again['url']}/v1/completions", json=question, timeout=30)
            assert answer.json()["choices"] == before
            assert _metric(again["url"], "active_requests") == 0


def test_sigterm_under_load_answers_those_that_wait_too(artifact: Path) -> None:
    with started(artifact, BATCH_SIZE="2") as (process, facts):
        with _streaming(facts["url"], 6, max_tokens=300, logprobs=20) as collected:
            assert eventually(lambda: _metric(facts["url"], "queued_requests") == 4)
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    for events in collected:
        assert events[0] == "200"
        assert events[-1] == "data: [DONE]"


def test_client_that_never_reads_frees_its_place(artifact: Path) -> None:
    with started(artifact, BATCH_SIZE="4", REQUEST_TIMEOUT_S="2") as (_, facts):
        url = facts["url"]
        # Four times 480 tokens with twenty others each: megabytes, which this socket does not take.
        body = json.dumps({**ENDLESS, "max_tokens": 480, "n": 4, "logprobs": 20, "stream": True}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            silent.connect((host, int(port)))
            headers = f"Host: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            silent.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
            assert eventually(lambda: _metric(url, "active_requests") == 4)
            answer = httpx.post(f"{url}/v1/completions", json={**ENDLESS, "max_tokens": 2}, timeout=30)
            assert answer.status_code == 200
            assert eventually(lambda: _metric(url, "active_requests") == 0)


def test_port_that_is_taken_is_said_before_the_model_is_loaded(artifact: Path) -> None:
    with started(artifact) as (_, facts):
        taken = facts["url"].rpartition(":")[2]
        done = call("serve", artifact, "--port", taken)
    assert done.code == 1
    assert f"cannot listen on 127.0.0.1 port {taken}" in done.sentence


def test_serving_needs_neither_torch_nor_transformers(artifact: Path) -> None:
    code = """
import sys
from pathlib import Path
from owl_deploy.serve.server import Server, open_service
from owl_deploy.serve.settings import ServeSettings
service, _ = open_service(Path(sys.argv[1]), ServeSettings(threads=1, context_length=64), {})
Server(service).config.load()
service.scheduler.close()
print(*sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[2:])))
"""
    heavy = [
        "torch",
        "transformers",
        "onnx",
        "onnxruntime_genai",
        "optimum",
        "datasets",
        "huggingface_hub",
        "onnxscript",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact), *heavy, "onnxruntime"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["onnxruntime"]


def test_wrong_setting_in_the_environment_is_a_usage_error(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_BATCH_SIZE", "many")
    done = call("serve", artifact)
    assert done.code == 2
    assert "batch_size" in done.sentence


def test_every_flag_names_its_twin_in_the_environment() -> None:
    text = "".join(call("serve", "--help").stdout.split())
    for name in ServeSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert environment_name(name) in text


# The key.


def test_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    from_file = api_key(ServeSettings(api_key_file=str(file)), {})
    from_environment = api_key(ServeSettings(), {"OWL_DEPLOY_API_KEY": "s3cret"})
    assert from_file == from_environment
    assert from_file is not None
    assert from_file.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(from_file)
    assert api_key(ServeSettings(), {}) is None


@pytest.mark.parametrize("key", ["", " ", "two words", "\u00fcber", "a\nb"])
def test_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(RecipeError) as refused:
        api_key(ServeSettings(), {"OWL_DEPLOY_API_KEY": key})
    assert not key.strip() or key not in str(refused.value)


def test_key_that_is_given_twice_or_missing_is_refused(tmp_path: Path) -> None:
    settings = ServeSettings(api_key_file=str(tmp_path / "none"))
    with pytest.raises(OwlDeployError, match="cannot read the API key"):
        api_key(settings, {})
    with pytest.raises(RecipeError, match="both"):
        api_key(settings, {"OWL_DEPLOY_API_KEY": "a"})
