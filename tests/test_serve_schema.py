"""The OpenAPI document holds what the server does: requests made from it, and broken ones, against the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as examples
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Running, serving, tiny_artifact

BOUNDED = examples(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    database=None,
)
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # Few tokens to a request: it is their form that is tried here.
    with serving(tiny_artifact(tmp_path_factory.mktemp("schema")), context_length=48, max_tokens=8) as running:
        yield running


OPERATIONS = (
    *("GET /v1/models", "GET /v1/models/{model}", "POST /v1/completions", "POST /v1/chat/completions"),
    *("GET /health/live", "GET /health/ready", "GET /v2/health/live", "GET /v2/health/ready", "GET /metrics"),
)


def test_document_describes_every_operation(tiny: Running) -> None:
    paths = httpx.get(f"{tiny.url}/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_server_keeps_to_its_document(tiny: Running, operation: str) -> None:
    method, path = operation.split()
    # Its pytest plugin does not know this pytest, so operations are taken one by one.
    described = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")[path][method]

    # There is nothing wrong to send where nothing is taken.
    for mode in schemathesis.GenerationMode if method == "POST" else (schemathesis.GenerationMode.POSITIVE,):

        @seed(0)
        @BOUNDED
        @given(case=described.as_strategy(generation_mode=mode))
        def keeps_to_it(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        keeps_to_it()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("prompt", "messages", "max_tokens", "n", "stop", "stream", "stream_options", "temperature", "top_p", "top_k"),
    *("seed", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "echo", "model"),
)


@seed(0)
@BOUNDED
@given(data=st.data(), path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_no_value_of_any_field_is_a_server_error(tiny: Running, data: st.DataObject, path: str) -> None:
    good: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
    good |= {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    wrong = data.draw(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
    answer = httpx.post(f"{tiny.url}{path}", json={**good, **wrong}, timeout=30)
    assert answer.status_code in (200, 400, 404)


@seed(0)
@BOUNDED
@given(data=st.data())
def test_no_damage_to_a_body_is_a_server_error(tiny: Running, data: st.DataObject) -> None:
    body = bytearray(json.dumps({"model": "tiny", "prompt": "an \u00f6wl", "max_tokens": 2, "seed": 1}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    status, _ = tiny.post("/v1/completions", bytes(body))
    assert status in (200, 400, 404)


def test_document_names_the_model_and_the_key(tmp_path: Path) -> None:
    with serving(tiny_artifact(tmp_path), environment={"OWL_DEPLOY_API_KEY": "k"}, model_name="owl") as running:
        document = httpx.get(f"{running.url}/openapi.json").json()
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["owl"]
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health/live"]["get"]
