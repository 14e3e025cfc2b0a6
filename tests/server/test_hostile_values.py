"""Whatever values a request holds: it is refused or done, the server's own faults do not show, and it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from api import Api, batch, prompt
from hostile_names import Names
from hostile_values import NUMBERS, TEXTS, damaged, dumps, values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from victim import Victim

from mint_engine import wire
from mint_engine.wire import messages

FAST = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Own(Names):
    api: Api
    victim: Victim


ROUTES = sorted(Names(*["x"] * 7).bodies())


@pytest.fixture(scope="module")
def own(attacked: Victim) -> Iterator[Own]:
    with attacked.api("mallory") as api:
        api.http.timeout = httpx.Timeout(120)
        yield Own(**vars(Names.of(api, attacked.base)), api=api, victim=attacked)
    attacked.check_unharmed()


def send(own: Own, route: str, body: bytes, kind: str = "application/json") -> None:
    response = own.api.http.post(route, content=body, headers={"Content-Type": kind})
    if route in ("retrieve_future", "telemetry", "cancel_future") or route.startswith(".."):
        own.victim.checked(response)
        assert b"internal error" not in response.content, response.text  # a stream has no status any more
    else:
        own.victim.outcome(own.api, response)


def test_the_bodies_are_good_before_they_are_damaged(own: Own) -> None:
    """Else the rest of this file would only try how the first question refuses."""
    for route, body in own.bodies().items():
        response = own.victim.checked(own.api.post(route, **body))
        expected = 400 if route == "create_custom_loss" else 200
        assert response.status_code == expected, (route, response.text)


@pytest.mark.parametrize("route", ROUTES)
@FAST
@given(data=st.data())
def test_damaged_json(own: Own, route: str, data: st.DataObject) -> None:
    send(own, route, dumps(data.draw(damaged(own.bodies()[route]))))


# ---- protobuf --------------------------------------------------------------------------------------------------------

INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def requests(draw: st.DrawFn, model: str) -> bytes:
    """A forward_backward request with parts that do not agree, or a good one with changed bytes."""
    message = messages.ForwardBackwardRequest.FromString(wire.encode_forward_backward(batch(model, None)))
    for datum in message.data:
        if draw(st.booleans()):
            datum.model_input[0].encoded_text.tokens = draw(st.binary(max_size=40))
        for name in sorted(datum.loss_fn_inputs):  # protobuf has them in any order
            tensor = datum.loss_fn_inputs[name]
            if draw(st.booleans()):
                tensor.dtype = draw(st.integers(-1, 5))
                del tensor.shape[:]
                tensor.shape.extend(draw(st.lists(st.integers(0, 300) | INT64, max_size=4)))
            if draw(st.booleans()):
                tensor.sparse_csr.values = draw(st.binary(max_size=40))
                tensor.sparse_csr.crow_indices = draw(st.binary(max_size=40))
                tensor.sparse_csr.col_indices = draw(st.binary(max_size=40))
    message.loss_fn = draw(
        st.sampled_from(["cross_entropy", "ppo", "cispo", "dro", "importance_sampling", "custom", "x"])
    )
    for name, number in draw(
        st.dictionaries(st.sampled_from(["clip_low_threshold", "beta", "x"]), st.floats())
    ).items():
        message.loss_fn_config[name] = number
    message.seq_id = draw(st.just(0) | st.integers(-(2**31), 2**31 - 1))
    body = bytearray(message.SerializeToString(deterministic=True))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(body)


@settings(FAST, max_examples=150)
@given(data=st.data())
def test_damaged_protobuf(own: Own, data: st.DataObject) -> None:
    send(own, "forward_backward", data.draw(requests(own.model) | st.binary(max_size=200)), wire.PROTOBUF)


@pytest.mark.slow
@settings(FAST, max_examples=1000)
@given(data=st.data())
def test_much_damaged_protobuf(own: Own, data: st.DataObject) -> None:
    send(own, "forward_backward", data.draw(requests(own.model) | st.binary(max_size=200)), wire.PROTOBUF)


@pytest.mark.slow
def test_one_wide_datum_does_not_multiply_the_others(own: Own) -> None:
    """Targets are padded to the widest datum of a pass: a sparse one of a few bytes can be very wide."""
    narrow = {"model_input": prompt(*[1] * 500), "loss_fn_inputs": {}}
    ones = {"data": [1] * 500, "dtype": "int64"}, {"data": [1.0] * 500, "dtype": "float32"}
    narrow["loss_fn_inputs"] = dict(zip(("target_tokens", "weights"), ones, strict=True))
    shape = {"shape": [500, 8_000], "sparse_crow_indices": [0] * 501, "sparse_col_indices": [], "data": []}
    wide = {
        **narrow,
        "loss_fn_inputs": {"target_tokens": {**shape, "dtype": "int64"}, "weights": {**shape, "dtype": "float32"}},
    }
    body = {
        "model_id": own.model,
        "forward_backward_input": {"data": [wide, *[narrow] * 150], "loss_fn": "cross_entropy"},
    }
    with own.victim.growing_at_most(2 << 30):
        send(own, "forward_backward", dumps(body))


# ---- paths and queries -----------------------------------------------------------------------------------------------

RUN = "training_runs/{}"
ONE = f"{RUN}/checkpoints/{{}}/{{}}"
PATHS = [
    ("GET", RUN), ("GET", f"{RUN}/checkpoints"), ("GET", ONE), ("DELETE", ONE), ("POST", f"{ONE}/publish"),
    ("DELETE", f"{ONE}/publish"), ("PUT", f"{ONE}/ttl"), ("GET", f"{ONE}/archive"),
    ("GET", f"{ONE}/external_weights_urls"),
    ("GET", "sessions/{}"), ("PUT", "sessions/{}/project"), ("GET", "sessions/{}/trace_export"),
    ("POST", "sessions/{}/finish"), ("GET", "samplers/{}"), ("GET", "downloads/{}/{}"), ("GET", "../../v1/models/{}"),
]  # fmt: skip
QUERIES = {
    "training_runs": ["limit", "offset", "access_scope", "project_id"],
    "sessions": ["limit", "offset", "access_scope"],
    "checkpoints": ["limit", "offset"],
    "audit": ["event_type", "day"],
    "billing/usage/checkpoints/current": ["project_id"],
    "mint/tokenizer": ["base_model"],
}
TEXT = st.sampled_from([text for text in TEXTS if len(text) < 1000]) | st.text(
    st.characters(codec="utf-8"), max_size=20
)


@settings(FAST, max_examples=200)
@given(st.sampled_from(PATHS), st.lists(TEXT, min_size=3, max_size=3), st.booleans(), values)
@example(("GET", ONE), ["..", "..", "server.secret"], True, None)
def test_hostile_paths(own: Own, request: tuple[str, str], texts: list[str], slashes: bool, value: Any) -> None:
    method, path = request
    parts = [quote(text.encode("utf-8", "surrogatepass"), safe="/" if slashes else "") or "%20" for text in texts]
    url = httpx.URL(f"{own.victim.url}/api/v1/").copy_with(raw_path=f"/api/v1/{path.format(*parts)}".encode())
    body = dumps({"ttl_seconds": value, "project_id": value, "reason": {"type": value}})
    response = own.api.http.request(method, url, content=None if method in ("GET", "DELETE") else body)
    assert own.victim.checked(response).status_code in (*range(400, 500), 200, 307)
    if response.status_code == 200:  # "..": it led to another, harmless one
        assert response.json() is not None


@settings(FAST, max_examples=200)
@given(st.data())
def test_hostile_queries(own: Own, data: st.DataObject) -> None:
    route = data.draw(st.sampled_from(sorted(QUERIES)))
    texts = st.sampled_from([str(number) for number in NUMBERS]) | TEXT
    query = "&".join(
        f"{name}={quote(data.draw(texts).encode('utf-8', 'surrogatepass'))}" for name in QUERIES[route] * 2
    )  # fmt: skip
    own.victim.checked(own.api.http.get(f"{route}?{query}"))


HEADERS = [
    "X-Request-ID", "X-Idempotency-Key", "User-Agent", "Accept", "Range", "If-None-Match", "Host", "X-Sdk-Version",
    "X-Tinker-Weights-Access-Token", "X-Forwarded-For", "X-Forwarded-Host", "Content-Type", "Origin", "Cookie",
]  # fmt: skip
BYTES = st.sampled_from([text.encode("utf-8", "surrogatepass") for text in TEXTS if len(text) < 1000])


@settings(FAST, max_examples=100)
@given(st.sampled_from(HEADERS), BYTES | st.binary(max_size=30))
def test_hostile_headers(own: Own, name: str, value: bytes) -> None:
    value = bytes(byte for byte in value if byte >= 32 and byte != 127).strip()  # httpx would not send the others
    content = dumps({"source_path": own.state})
    for method, route in (("GET", "checkpoints"), ("POST", "copy_weights"), ("GET", "mint/tokenizer?base_model=x")):
        body = content if method == "POST" else None
        response = own.api.http.request(method, route, content=body, headers={name: value})
        own.victim.checked(response)
        assert "X-Injected" not in response.headers
