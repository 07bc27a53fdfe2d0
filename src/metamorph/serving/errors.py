"""Errors of the API in the form of OpenAI's, whichever part of the server they come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from metamorph.flags.checks import printable
from metamorph.serving.batcher import Closed, QueueFull


logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_RETRY = {"Retry-After": "1"}


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an answer that is an error."""

    error: ErrorObject


class ApiError(Exception):
    """What a client did wrong, or why its request cannot be answered now."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = ErrorObject(message=printable(str(self)), type=kind, param=self.param, code=self.code)
        return ErrorBody(error=error).model_dump()

    def response(self) -> JSONResponse:
        """The answer to the client."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What the client is told about an exception; nothing of what went wrong inside the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        message = "too many requests wait already: try again later"
        return ApiError(message, status=429, code="queue_full", headers=_RETRY)
    if isinstance(error, Closed):
        message = "the server is ending: send the request to another one, or try again later"
        return ApiError(message, status=503, code="server_ending", headers=_RETRY)
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), status=error.status_code, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError("the server failed to answer; its log says why", status=500, code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Answer with OpenAI's error object, whatever is raised."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, QueueFull, Closed, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _validation_error(error: RequestValidationError) -> ApiError:
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return ApiError(f"the body is not JSON: {problems[0]['ctx']['error']}", code="invalid_json")
    if problems[0]["type"] in ("model_attributes_type", "dict_type") and len(problems[0]["loc"]) == 1:
        message = "the body is not a JSON object with Content-Type: application/json"
        return ApiError(message, code="invalid_json")
    problem = max(problems, key=lambda each: len(each["loc"]))  # of the alternative that fits best
    param = _name(problem["loc"][1:], error.body, is_missing=problem["type"] == "missing")
    return ApiError(f"{param or 'the body'}: {problem['msg']}", param=param or None, code="invalid_value")


def _name(location: Sequence[str | int], body: Any, is_missing: bool) -> str:
    """`messages[0].role` for pydantic's location, without the names of types that it holds, too."""
    name = ""
    for number, step in enumerate(location):
        known = isinstance(body, dict) if isinstance(step, str) else isinstance(body, list)
        try:
            body = body[step] if known else None
        except (KeyError, IndexError):
            known = is_missing and number == len(location) - 1
        if known or not name:
            name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name
