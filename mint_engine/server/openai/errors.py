"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status that fits."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mint_engine.server.failures import describe

_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """A refusal: its status, its sentence, the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        message = self.message.encode(errors="replace").decode()  # a lone surrogate cannot be sent
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code)).model_dump()

    @property
    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told; `failures.describe` decides it, as for every other route."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        if isinstance(error.body, bytes):  # FastAPI leaves unread what is not announced as JSON (by curl -d)
            return ApiError(415, "Content-Type: expected application/json")
        return _of_validation(error.errors())
    failure = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else failure.headers
    return ApiError(failure.status, failure.detail, headers=headers)


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing wrong with a body, by the name of its field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(path) or None
    if name is None and first["type"] in ("missing", "model_attributes_type"):
        return ApiError(400, "body: expected a JSON object")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; this server refuses what it would not act on"
    elif first["type"] == "missing" and name is not None:
        message = "required"
    if name is None:  # said by a check of several fields: the message names the field itself
        field, colon, _ = message.partition(":")
        return ApiError(400, message, param=field if colon and field.isidentifier() else None)
    return ApiError(400, f"{name}: {message}", param=name)


class OpenAIRoute(APIRoute):
    """A route whose every failure is an OpenAI error, those of dependencies and of the body included."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return as_api_error(error).response

        return handler
