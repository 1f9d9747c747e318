"""The interface of the server as an OpenAPI document, made from the very models that check requests."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from owl_deploy.serve.model import ServedModel
from owl_deploy.serve.schemas import (
    ChatAnswer,
    ChatChunk,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    ErrorAnswer,
    Health,
    ModelList,
    ModelObject,
)
from owl_deploy.serve.settings import ServeSettings

__all__ = ["openapi_document"]

_REQUESTS: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest)
_ANSWERS: tuple[type[BaseModel], ...] = (
    CompletionAnswer,
    ChatAnswer,
    ChatChunk,
    ErrorAnswer,
    Health,
    ModelList,
    ModelObject,
)
_ERRORS = {
    400: "The body breaks a rule; the error says which.",
    404: "No such model.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "The engine failed.",
    503: "The server is stopping, or the request's time was over before its turn came.",
}


def openapi_document(model: ServedModel, settings: ServeSettings, *, has_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server: with the name and the limits of this very one."""
    _, schemas = models_json_schema(
        [*((kind, "validation") for kind in _REQUESTS), *((kind, "serialization") for kind in _ANSWERS)],
        ref_template="#/components/schemas/{model}",
    )
    components = schemas["$defs"]
    for kind in _REQUESTS:
        properties = components[kind.__name__]["properties"]
        properties["model"]["enum"] = [model.name]
    try:
        release = version("owl-deploy")
    except PackageNotFoundError:
        release = "unknown"
    health = _get("Whether the server {}.", "Health", 503)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "owl-deploy",
            "version": release,
            "description": f"An OpenAI-compatible server of {model.name}. A prompt and its answer have at most "
            f"{model.context_length} tokens together, an answer {settings.max_tokens}, a body "
            f"{int(settings.max_request_bytes)} bytes, and a request {settings.batch_size} answers.",
        },
        "paths": {
            "/v1/models": {"get": _secured(_get("The served models.", "ModelList"), has_key)},
            "/v1/models/{model}": {
                "get": _secured(_get("The served model.", "ModelObject", 404), has_key)
                | {
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ]
                }
            },
            "/v1/completions": {
                "post": _secured(
                    _post("Go on with a text.", "CompletionRequest", "CompletionAnswer", "CompletionAnswer"), has_key
                )
            },
            "/v1/chat/completions": {
                "post": _secured(_post("Go on with a conversation.", "ChatRequest", "ChatAnswer", "ChatChunk"), has_key)
            },
            **{
                f"{prefix}/health/{state}": {"get": {**health, "summary": health["summary"].format(claim)}}
                for prefix in ("", "/v2")
                for state, claim in (("live", "works"), ("ready", "takes requests"))
            },
            "/metrics": {
                "get": {
                    "summary": "Figures in Prometheus' text format.",
                    "responses": {
                        "200": {"description": "Figures.", "content": {"text/plain": {"schema": {"type": "string"}}}}
                    },
                }
            },
        },
        "components": {
            "schemas": components,
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if has_key else {}),
        },
    }


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _failures(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _ERRORS[status], "content": _content("ErrorAnswer")} for status in statuses}


def _get(summary: str, answer: str, *failures: int) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": _content(answer)}, **_failures(*failures)},
    }


def _post(summary: str, request: str, answer: str, chunk: str) -> dict[str, Any]:
    events = {
        "text/event-stream": {
            "schema": {
                "type": "string",
                "description": f"With stream: events of {chunk} or, as the last, ErrorAnswer; then [DONE].",
            }
        }
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _content(request)},
        "responses": {
            "200": {"description": "The answers.", "content": {**_content(answer), **events}},
            **_failures(*_ERRORS),
        },
    }


def _secured(operation: dict[str, Any], has_key: bool) -> dict[str, Any]:
    if not has_key:
        return operation
    refusal = {"401": {"description": "No valid API key.", "content": _content("ErrorAnswer")}}
    return {**operation, "security": [{"key": []}], "responses": {**operation["responses"], **refusal}}
