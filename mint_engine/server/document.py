"""The OpenAPI document: FastAPI's, completed by what routes do themselves: bodies they read, errors, keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from mint_engine import wire
from mint_engine.server import reading

_ALWAYS = {
    401: "No key, or one that is unknown or revoked.",
    403: "No keys are configured, and this caller is not on the server's machine.",
    429: "Too much at once: the same request is taken a little later.",
    500: "A fault of the server's; its log has more under the request id.",
    503: "The server is about to stop.",
}
_WITH_INPUT = {
    400: "Something in the request cannot be; the sentence says what.",
    404: "There is no such thing, or it is another's.",
}
_WITH_BODY = {413: "The body is too large.", 415: "A content type or encoding that is not known."}
_WITH_QUERY = {422: "A parameter that cannot be."}
_OPEN = ("/health", "/healthz", "/api/v1/healthz", "/metrics", "/api/v1/downloads/{token}/{file}")


class ErrorAnswer(BaseModel):
    """Every refusal outside of the OpenAI face."""

    detail: str
    request_id: str | None = Field(default=None, description="As in the header X-Request-ID and in the server's log.")


class PromiseAnswer(BaseModel):
    """The request was accepted: `retrieve_future` gives its result."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class TryAgain(BaseModel):
    """There is no result yet: ask again."""

    type: str = "try_again"
    request_id: str
    queue_state: str
    queue_state_reason: str | None = None


PROMISED: dict[int | str, dict[str, Any]] = {200: {"model": PromiseAnswer}}
"""`responses` of a route that answers with a promise."""


def files(description: str, media_type: str = "*/*") -> dict[str, Any]:
    """One of a route's `responses`: bytes."""
    return {"description": description, "content": {media_type: {"schema": {"type": "string", "format": "binary"}}}}


def results() -> dict[int | str, dict[str, Any]]:
    """`responses` of `retrieve_future`."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    some = "The result, as protobuf to who accepts it; or an error; or that there is none yet."
    return {
        200: {
            "description": some,
            "content": {"application/json": {"schema": {"type": "object"}}, wire.PROTOBUF: binary},
        },
        408: {"model": TryAgain, "description": "There is no result yet. (SDKs are told so by this status.)"},
        410: {"model": ErrorAnswer, "description": "The result is not kept any more."},
    }


def document(app: FastAPI) -> dict[str, Any]:
    """Made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models = [(model, "validation") for model in dict.fromkeys([*reading.documented, ErrorAnswer])]
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = schema.setdefault("components", {})
        known = components.setdefault("schemas", {})
        known.update({name: model for name, model in definitions.get("$defs", {}).items() if name not in known})
        for name in ("HTTPValidationError", "ValidationError"):  # our errors look otherwise
            known.pop(name, None)
        components["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        schema["security"] = [{"key": []}, {"bearer": []}]
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        app.openapi_schema = schema
    return app.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path in _OPEN:
        operation["security"] = []
    if not path.startswith("/api/v1/"):
        return  # open, or of the OpenAI face, which says by itself what its errors look like
    places = {parameter["in"] for parameter in operation.get("parameters", [])}
    errors = {} if path in _OPEN else dict(_ALWAYS)
    if "requestBody" in operation:
        errors |= _WITH_INPUT | _WITH_BODY
    if "path" in places:
        errors |= _WITH_INPUT
    if "query" in places:
        errors |= _WITH_QUERY | _WITH_INPUT
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for status, description in sorted(errors.items()):
        responses.setdefault(str(status), {"description": description, "content": content})
