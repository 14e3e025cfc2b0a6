"""The OpenAPI document says what there is: every route, its body, its answers, and that it needs a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from stub_engine import StubEngine

from mint_engine.server import Settings, create_app
from mint_engine.wire import PROTOBUF, requests

OPEN = {"/health", "/healthz", "/api/v1/healthz", "/metrics", "/api/v1/downloads/{token}/{file}"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return create_app(StubEngine(tmp_path_factory.mktemp("home")), Settings())


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return made


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert len(found) > 40
    for reference in found:
        at: Any = document
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]
        assert "type" in at or "anyOf" in at or "$ref" in at, reference


def test_every_route_is_in_it(app: FastAPI, document: dict[str, Any]) -> None:
    def routes(of: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for route in of.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in route.methods:
                    yield method.lower(), prefix + route.path.replace(":path}", "}")

    documented = {(method, path) for method, path, _ in operations(document)}
    assert {entry for entry in routes(app) if entry[0] != "head"} <= documented
    assert len(documented) > 50


def test_every_body_is_described(document: dict[str, Any]) -> None:
    """Also of the routes that read their bodies by themselves."""
    described = set()
    for method, path, operation in operations(document):
        if method in ("get", "delete") or path.endswith(("/auth/token", "/publish")):
            assert "requestBody" not in operation, path
            continue
        for kind, content in operation["requestBody"]["content"].items():
            schema = content["schema"]
            if kind == "application/json":
                described.add(schema["$ref"].rpartition("/")[2])
            else:
                assert kind in (PROTOBUF, "multipart/form-data")
    bodies = {name for name in requests.__all__ if name.endswith("Request")} - {
        "WireRequest", "AuthTokenRequest", "ReverseKLDatumRequest",
    }  # fmt: skip
    assert bodies <= described


def test_what_needs_a_key_says_so_and_what_it_refuses_with(document: dict[str, Any]) -> None:
    assert set(document["components"]["securitySchemes"]) == {"key", "bearer"}
    assert document["security"] == [{"key": []}, {"bearer": []}]
    for _, path, operation in operations(document):
        assert (operation.get("security") == []) is (path in OPEN), path
        if path in OPEN:
            continue
        responses = operation["responses"]
        assert {"200", "401", "403", "429", "500", "503"} <= set(responses), path
        schema = responses["401"]["content"]["application/json"]["schema"]["$ref"]
        face = "ErrorAnswer" if path.startswith("/api/v1") else "ErrorBody"  # ours, OpenAI's
        assert schema == f"#/components/schemas/{face}", path


def test_it_tells_nothing_about_the_server_s_files(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert str(Path(__file__).parents[2]) not in text
    assert ".py" not in text
    assert "Traceback" not in text
