"""Keys that are none, and what a stranger can learn without one."""

from __future__ import annotations

import base64
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from victim import Victim

from mint_engine.server.tokens import derive

OPEN = {
    "/health",
    "/healthz",
    "/api/v1/healthz",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/docs/oauth2-redirect",
}


@pytest.fixture(autouse=True, scope="module")
def _unharmed(attacked: Victim) -> Iterator[None]:
    yield
    attacked.check_unharmed()


@pytest.fixture(scope="module")
def http(attacked: Victim) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=attacked.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def operations(http: httpx.Client) -> list[tuple[str, str]]:
    """(method, path) of everything the server has. Where a path has a part to fill in, something is put there."""
    document = http.get("/openapi.json").json()
    filled = [(method.upper(), path, item) for path, item in document["paths"].items() for method in item]
    return [(method, path.replace("{", "x").replace("}", "x")) for method, path, _ in filled]


def forged(attacked: Victim) -> dict[str, str]:
    """Tokens that this server has not made, and one that it made long ago."""
    secret = (attacked.home / "server.secret").read_bytes()
    key, now = derive(secret, "tokens"), int(time.time())
    with attacked.api("alice") as api:
        good = api.ok("auth/token")["jwt"]
    claims = jwt.decode(good, options={"verify_signature": False})
    head, body, signature = good.split(".")
    raised = base64.urlsafe_b64encode(json.dumps({**claims, "sub": "key-0000"}).encode()).decode().rstrip("=")
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")

    def signed(with_key: bytes = key, algorithm: str = "HS256", **changes: Any) -> str:
        return jwt.encode({**claims, **changes}, with_key, algorithm)

    return {
        "alg none": jwt.encode(claims, "", "none"),
        "alg none with a signature": f"{none}.{body}.{signature}",
        "without a signature": f"{head}.{body}.",
        "of another secret": signed(b"k" * 32),
        "of an empty secret": signed(b"\0" * 32),
        "signed with the key itself": signed(attacked.keys["alice"].encode()),
        "signed with the secret itself": signed(secret),
        "signed for links": signed(derive(secret, "links")),
        "another algorithm": signed(key, "HS384"),
        "expired": signed(iat=now - 7200, exp=now - 3600),
        "for ever": jwt.encode({k: v for k, v in claims.items() if k != "exp"}, key, "HS256"),
        "an end that is no number": signed_raw({**claims, "exp": "never"}, key),
        "an infinite end": signed_raw({**claims, "exp": math.inf}, key),
        "from the future": signed(iat=now + 3600, nbf=now + 3600),
        "of nobody": signed_raw({**claims, "sub": None}, key),
        "of a list": signed_raw({**claims, "sub": ["key-1"]}, key),
        "of an unknown key": signed(sub="key-0123456789abcdef"),
        "of the anonymous": signed(sub="local"),
        "of a path": signed(sub="../../etc"),
        "of a NUL": signed(sub="a\0b"),
        "of a surrogate": signed_raw({**claims, "sub": "\ud800"}, key),
        "a changed subject": f"{head}.{raised}.{signature}",
        "a cut signature": good[:-4],
        "no JSON": "eyJ.eyJ.eyJ",
        "a nest": f"{deep}.{deep}.{signature}",
        "a large one": f"{head}.{'A' * 7000}.{signature}",
    }


def signed_raw(claims: dict[str, Any], key: bytes) -> str:
    """PyJWT refuses to write some claims that it may be given to read."""
    import hashlib
    import hmac

    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    mac = base64.urlsafe_b64encode(hmac.new(key, text, hashlib.sha256).digest()).rstrip(b"=")
    return (text + b"." + mac).decode()


def test_nothing_is_served_without_a_key(
    attacked: Victim, http: httpx.Client, operations: list[tuple[str, str]]
) -> None:
    assert len(operations) > 50
    for method, path in operations:
        response = attacked.checked(http.request(method, path, json={} if method in ("POST", "PUT") else None))
        if path in OPEN:
            assert response.status_code == 200
        elif "/downloads/" in path:
            assert response.status_code == 403  # the link is the key, and this is none
        else:
            assert response.status_code == 401, (method, path, response.text)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # of the forger's keys
def test_forged_keys_and_tokens_open_nothing(attacked: Victim, http: httpx.Client) -> None:
    secret = attacked.keys["alice"]
    wrong = {
        **forged(attacked), "revoked": attacked.keys["revoked"], "cut": secret[:-1], "longer": secret + "x",
        "upper case": secret.upper(), "another prefix": "sk-" + secret[4:], "the shown part": secret[:8],
        "a wildcard": "%", "SQL": "' or '1'='1", "very long": "tml-" + "x" * 30_000, "only the prefix": "tml-",
        "two keys": f"{secret}, {secret}", "the hash": attacked.secrets["the hash of alice's key"],
    }  # fmt: skip
    for what, value in wrong.items():
        for headers in (
            {"X-API-Key": value},
            {"Authorization": f"Bearer {value}"},
            {"Authorization": f"Basic {value}"},
        ):
            for method, path in (("GET", "/api/v1/checkpoints"), ("POST", "/api/v1/auth/token"), ("GET", "/v1/models")):
                response = attacked.checked(http.request(method, path, headers=headers))
                assert response.status_code == 401, (what, response.text)
                assert value[:40] not in response.text or len(value) < 5, f"{what}: it is told again"
    attacked.check_serving("alice")


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["X-API-Key", "Authorization"]),
    st.binary(max_size=60) | st.binary(max_size=30).map(lambda b: b"Bearer eyJ" + base64.urlsafe_b64encode(b) + b"..")
    | st.lists(st.binary(max_size=20), min_size=3, max_size=3).map(
        lambda parts: b"eyJ" + b".".join(base64.urlsafe_b64encode(part) for part in parts)
    ),
)  # fmt: skip
def test_random_keys_open_nothing(attacked: Victim, http: httpx.Client, name: str, value: bytes) -> None:
    value = bytes(byte for byte in value if byte >= 32 and byte != 127).strip()
    assert attacked.checked(http.get("/api/v1/sessions", headers={name: value})).status_code == 401


def test_a_stranger_can_take_no_memory_and_nobody_s_place(attacked: Victim, http: httpx.Client) -> None:
    """Fifteen hundred wrong keys: others are served meanwhile, and they are not remembered."""
    with attacked.growing_at_most(32 << 20):
        for i in range(1500):
            assert http.get("/api/v1/checkpoints", headers={"X-API-Key": f"tml-{i:043}"}).status_code == 401
    attacked.check_serving()


def test_what_is_open_tells_nothing_about_tenants(attacked: Victim, http: httpx.Client) -> None:
    with attacked.api("alice") as api:
        session = api.session()
        model = api.model(attacked.base, session)
    for path in sorted(OPEN):
        told = attacked.checked(http.get(path)).text
        assert session not in told
        assert model not in told
        assert "alice" not in told


def test_ids_cannot_be_guessed(attacked: Victim) -> None:
    """A hundred random bits and more in every session; what is counted up is only behind such an id. And of every
    result a part of its own: who knows a model's id does not know its results'."""
    with attacked.api("alice") as api:
        sessions = [api.session() for _ in range(200)]
        model = api.model(attacked.base)
        promises = [api.ok("optim_step", model_id=model)["request_id"] for _ in range(200)]
        path = api.result("save_weights", model_id=model, path="n")["path"]
        copies = [api.ok("copy_weights", source_path=path)["tinker_path"] for _ in range(20)]
    for ids, bits in ((sessions, 100), ([promise.split(":req:")[1] for promise in promises], 100)):
        assert len(set(ids)) == len(ids)
        assert entropy(ids) > bits
    runs = [copy.removeprefix("tinker://").split("/")[0] for copy in copies]
    assert len({run[:16] for run in runs}) == len(runs), "a copy's run is named at random, too"


def entropy(ids: list[str]) -> float:
    """Bits, at least, as the letters at each place are distributed over some hundred ids."""
    total = 0.0
    for letters in zip(*ids, strict=True):
        most = max(Counter(letters).values()) / len(letters)
        total -= math.log2(most)
    return total


def test_a_revoked_key_ends_within_seconds_for_tokens_and_links_too(attacked: Victim) -> None:
    from mint_engine.store import Store

    store = Store(attacked.home)
    record, secret = store.keys.create("leaver")
    attacked.secrets["the leaver's key"] = attacked.keys["leaver"] = secret
    with attacked.api("leaver") as api:
        model = api.model(attacked.base)
        api.result("save_weights_for_sampler", model_id=model, path="n")
        token = api.ok("auth/token")["jwt"]
        archive = f"training_runs/{model}/checkpoints/sampler_weights/n/archive"
        link = api.http.get(archive, headers={"Accept": "application/json"}).json()["url"]
        assert httpx.get(link).status_code == 200
        assert api.http.get("sessions", headers={"X-API-Key": token}).status_code == 200
        store.keys.revoke(record.key_id)
        store.close()
        end = time.monotonic() + 5
        for value in (secret, token):
            while api.http.get("sessions", headers={"X-API-Key": value}).status_code == 200:
                assert time.monotonic() < end
            assert api.http.get("sessions", headers={"X-API-Key": value}).status_code == 401
            assert api.post("optim_step", {"X-API-Key": value}, model_id=model).status_code == 401
        while httpx.get(link).status_code == 200:
            assert time.monotonic() < end
        assert attacked.checked(httpx.get(link)).status_code == 403
