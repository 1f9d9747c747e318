"""What a client is told when a request cannot be served, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from owl_deploy.errors import shown

__all__ = ["ApiError", "error_body", "error_response", "invalid_request"]


class ApiError(Exception):
    """A request cannot be served; the status says whose fault that is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body of an error."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    """Return the whole answer."""
    return JSONResponse(error_body(error), error.status, error.headers)


def invalid_request(error: ValidationError) -> ApiError:
    """Return the first problem of a body as a 400."""
    problem = error.errors(include_url=False, include_context=False)[0]
    # Names of union branches stand among the keys; a path holds only what the client wrote.
    path = [str(part) for part in problem["loc"] if isinstance(part, int) or (part.islower() and part.isidentifier())]
    param = ".".join(part for part in path if part not in ("str", "int")) or None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {message}", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        message = "is not supported by this server"
    elif problem["type"] == "missing":
        message = "is missing"
    else:
        message = f"{message}, got {shown(problem['input'])}"
    return ApiError(400, f"{param}: {message}" if param else message, code="invalid_value", param=param)
