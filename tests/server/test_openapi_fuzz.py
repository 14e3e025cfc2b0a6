"""schemathesis over the OpenAPI document of a live server: no fault, and answers are as the document says.

Random ids end at the first question. So ids of the caller's own are put in half of the time, which the server then
works with.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from api import Api
from hostile_names import Names
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from victim import Victim

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
# The face that is mounted twice is tried once; a body that is not JSON but protobuf is tried in test_hostile_values.
SKIPPED = "/oai/"


@pytest.fixture(scope="module")
def hers(attacked: Victim) -> Iterator[Names]:
    with attacked.api("mallory") as api:
        yield Names.of(api, attacked.base)
    attacked.check_unharmed()


@pytest.fixture(scope="module")
def operations(attacked: Victim) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{attacked.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if not operation.path.startswith(SKIPPED)]


@st.composite
def with_own_ids(draw: st.DrawFn, cases: Any, names: Names) -> Any:
    case = draw(cases)
    own = {
        "session_id": names.session, "model_id": names.model, "sampling_session_id": names.sampler, "path": names.state,
        "sampler_id": names.sampler, "run_id": names.model, "base_model": names.base, "model": names.base,
        "model_path": names.weights, "tinker_path": names.weights, "source_path": names.state, "kind": "weights",
        "reference_model_path": names.weights, "request_id": names.promise, "name": "first",
    }  # fmt: skip

    def put_in(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {key: put_in(item) for key, item in value.items()}
            inner.update({key: own[key] for key in own if key in inner and draw(st.booleans())})
            return inner
        return [put_in(item) for item in value] if isinstance(value, list) else value

    if isinstance(case.body, dict | list):
        case.body = put_in(copy.deepcopy(case.body))
    if "finish" not in case.operation.path and "unload" not in case.operation.path:
        for name in case.path_parameters or {}:
            if name in own and draw(st.booleans()):
                case.path_parameters[name] = own[name]
    for key, value in own.items():
        if isinstance(case.query, dict) and key in case.query and draw(st.booleans()):
            case.query[key] = value
    return case


def campaign(victim: Victim, operations: list[Any], names: Names, who: str | None, examples: int) -> Counter[int]:
    """Every operation with so many cases that fit its schema, and as many that do not. How often which status came."""
    statuses: Counter[int] = Counter()
    headers = {} if who is None else {"X-API-Key": victim.keys[who]}
    given_how = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with victim.api("mallory") as api:

        def attempt(case: Any) -> None:
            response = case.call(headers=headers, timeout=120)
            case.validate_response(response, checks=CHECKS)
            statuses[response.status_code] += 1
            _look_through(victim, response)
            if response.status_code == 200 and who is not None:
                _await_promise(victim, api, response)

        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                cases = with_own_ids(operation.as_strategy(generation_mode=mode), names)
                try:
                    given_how(given(case=cases)(attempt))()
                except Unsatisfiable:
                    assert mode is GenerationMode.NEGATIVE, operation.label  # nothing in it can be wrong
    return statuses


def _look_through(victim: Victim, response: Any) -> None:
    told = f"{response.headers} {response.content.decode('latin-1')}"
    for what in ("Traceback", 'File "', "site-packages", str(victim.home)):
        assert what not in told
    for what, secret in victim.secrets.items():
        assert secret not in told, what


def _await_promise(victim: Victim, api: Api, response: Any) -> None:
    kind = response.headers.get("content-type", [""])[0]
    answer = response.json() if kind == "application/json" else None
    if isinstance(answer, dict) and "request_id" in answer and "type" not in answer:
        result = victim.checked(api.retrieve(answer["request_id"])).json()
        assert result.get("category", "user") == "user", result


def test_nobody_gets_in(attacked: Victim, operations: list[Any], hers: Names) -> None:
    statuses = campaign(attacked, operations, hers, None, 3)
    assert set(statuses) <= {200, 401, 403}
    assert statuses[401] > 5 * statuses[200], "only what is open answers"


def test_no_request_that_can_be_written_does_harm(attacked: Victim, operations: list[Any], hers: Names) -> None:
    statuses = campaign(attacked, operations, hers, "mallory", 4)
    assert statuses[200] > 30
