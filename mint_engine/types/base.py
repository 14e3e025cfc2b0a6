"""Base classes of the pydantic models: what a caller builds is strict, what an engine answers is lenient."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestModel(BaseModel):
    """Built by the caller: immutable, and an unknown field is an error, so that a typo is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ResponseModel(BaseModel):
    """Built by an engine or a server: immutable, unknown fields are ignored, so that old clients keep working."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
