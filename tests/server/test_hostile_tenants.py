"""Two tenants on one live server: what is the other's is as if it were not there, and stays as it was.

`test_tenants.py` shows it for the registry; this is about everything that reaches the engine.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from api import Api, batch, batch_json, prompt
from hostile_names import Names
from victim import Victim

from mint_engine import wire

FIELDS = ("session", "model", "sampler", "state", "weights", "promise")


@pytest.fixture(autouse=True, scope="module")
def _unharmed(attacked: Victim) -> Iterator[None]:
    yield
    attacked.check_unharmed()


@pytest.fixture(scope="module")
def alice(attacked: Victim) -> Iterator[Api]:
    with attacked.api("alice") as api:
        yield api


@pytest.fixture(scope="module")
def bob(attacked: Victim) -> Iterator[Api]:
    with attacked.api("bob") as api:
        yield api


@pytest.fixture(scope="module")
def alices(alice: Api, attacked: Victim) -> Names:
    return Names.of(alice, attacked.base)


@pytest.fixture(scope="module")
def bobs(bob: Api, attacked: Victim) -> Names:
    return Names.of(bob, attacked.base)


def nobodys(names: Names) -> Names:
    """Ids of the same form that do not exist."""
    fake = "00000000-0000-4000-8000-000000000000"
    return replace(names, **{name: getattr(names, name).replace(names.session, fake) for name in FIELDS})


def told(victim: Victim, api: Api, route: str, body: dict[str, Any]) -> tuple[int, str]:
    """What a request comes to: its status, or that of its promise, and the words."""
    response = victim.checked(api.post(route, **body))
    answer = response.json()
    if response.status_code == 200 and "request_id" in answer and "type" not in answer:
        answer = victim.checked(api.retrieve(answer["request_id"])).json()
        assert answer.get("category") == "user", (route, body, answer)
        return 0, answer["error"]
    return response.status_code, json.dumps(answer.get("detail", answer))


def test_the_other_s_ids_are_as_if_they_were_not_there(attacked: Victim, bob: Api, alices: Names, bobs: Names) -> None:
    """In every place of every request where bob may give an id of his own."""
    tried = 0
    fake = nobodys(alices)
    for route in bobs.bodies():
        for field in FIELDS:
            mine, foreign, none = (replace(bobs, **{field: getattr(n, field)}) for n in (bobs, alices, fake))
            if mine.bodies()[route] == foreign.bodies()[route] or route == "telemetry":
                continue
            if route == "retrieve_futures" and field == "promise":
                continue  # acknowledging a result that is not there does nothing
            if route == "create_custom_loss":
                continue  # refused whatever it says
            status, words = told(attacked, bob, route, foreign.bodies()[route])
            assert status in (404, 0), (route, field, status, words)
            missing = told(attacked, bob, route, none.bodies()[route])
            assert (status, words.replace(alices.session, fake.session)) == missing, (route, field)
            tried += 1
    assert tried > 20


def test_what_is_tried_leaves_no_trace(attacked: Victim, alice: Api, bob: Api, alices: Names, bobs: Names) -> None:
    def seen() -> list[Any]:
        listed = [alice.http.get(path).json() for path in ("checkpoints", "training_runs", "sessions")]
        one = alice.http.get(f"sessions/{alices.session}").json()
        scores = alice.result("forward", **batch_json(alices.model, None, "forward_input"))["loss_fn_outputs"]
        return [*listed, one, scores]

    before = seen()
    for route in bobs.bodies():
        bob.post(route, **alices.bodies()[route])
    for seq_id in (1, 2, 3, 2**31 - 1):  # numbers of alice's that she has not used
        bob.post("optim_step", model_id=alices.model, seq_id=seq_id, adam_params={"learning_rate": 1.0})
        bob.proto(batch(alices.model, seq_id, loss_fn="no such loss"))  # refused ones use up a number
        bob.http.post("forward_backward", content=b"\xff", headers={"Content-Type": wire.PROTOBUF})
    for path in ("finish", "project"):
        method = "POST" if path == "finish" else "PUT"
        bob.http.request(
            method, f"sessions/{alices.session}/{path}", json={"reason": {"type": "success"}, "project_id": "p"}
        )
    bob.post("unload_model", model_id=alices.model)
    bob.post("cancel_future", request_id=alices.promise)
    assert seen() == before
    for seq_id in (1, 2):
        assert "error" not in alice.result("forward_backward", **batch_json(alices.model, seq_id))
    assert alice.retrieve(alices.promise).status_code == 200


def test_a_number_is_used_up_by_its_owner_only(alice: Api, bob: Api, attacked: Victim) -> None:
    """A request that is refused uses up its number: were bob's refusals counted, alice's next step would be lost."""
    model = alice.model(attacked.base)
    for body in ({"adam_params": {"learning_rate": -1}}, {"adam_params": {"type": "x"}}, {"adam_params": 1}, {}):
        assert bob.post("optim_step", model_id=model, seq_id=1, **body).status_code in (400, 404, 422)
    assert "error" not in alice.result("forward_backward", **batch_json(model, 1))
    assert "error" not in alice.result("optim_step", model_id=model, seq_id=2)


def test_idempotency_keys_and_request_ids_of_two_tenants_do_not_meet(
    attacked: Victim, alice: Api, bob: Api, bobs: Names, alices: Names
) -> None:
    same = {"X-Idempotency-Key": "same", "X-Request-ID": "same"}
    for route in ("create_session", "copy_weights", "optim_step", "asample", "mint/checkpoints/interpolate"):
        own = [api.ok(route, same, **names.bodies()[route]) for api, names in ((alice, alices), (bob, bobs))]
        assert own[0] != own[1], route
        for api, answer in ((alice, own[1]), (bob, own[0])):
            if "request_id" in answer:
                assert api.post("retrieve_future", request_id=answer["request_id"]).status_code == 404


def test_names_that_look_like_another_s_lead_nowhere(attacked: Victim, bob: Api, alices: Names, bobs: Names) -> None:
    """Paths are taken apart at colons and slashes: nothing that bob may name ends in alice's home."""
    run, session = alices.model, alices.session
    paths = [
        f"tinker://{bobs.model}/weights/../../{run}/weights/first", f"tinker://{bobs.model}/../{run}/weights/first",
        f"mint://{run}/weights/first", f"tinker:///{run}/weights/first", f"tinker://{run}//weights/first",
        f"tinker://{run}/weights/first\0", f"tinker://{run}/weights/first ", f"TINKER://{run}/weights/first",
        f"{run}/first", f"{run}/weights/first", f"{session}/first", "/etc/passwd", "file:///etc/passwd",
        "tinker://../../../etc/passwd", "tinker://local/weights/first",
        f"tinker://{run.replace(':', '.')}/weights/first",
    ]  # fmt: skip
    for path in paths:
        for route, body in (
            ("weights_info", {"tinker_path": path}),
            ("copy_weights", {"source_path": path}),
            ("load_weights", {"model_id": bobs.model, "path": path}),
            ("load_weights", {"session_id": bobs.session, "model_seq_id": 77, "path": path}),
            (
                "create_sampling_session",
                {"session_id": bobs.session, "sampling_session_seq_id": 77, "model_path": path},
            ),
            ("mint/checkpoints/interpolate", {"source_paths": [path], "coefficients": [1.0]}),
            ("../../v1/completions", {"model": path, "prompt": "a"}),
        ):
            status, words = told(attacked, bob, route, body)
            assert status in (0, 400, 404, 422), (route, path, words)
    names = ["../x", "a/b", "..", ".", ".hidden", "a\0b", "a\\b", "x" * 300, "\u202e", "con:", "a\nb"]
    for name in names:
        for route in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
            answer = bob.post(route, model_id=bobs.model, path=name)
            if attacked.checked(answer).status_code == 200:
                result = bob.retrieve(answer.json()["request_id"]).json()
                assert result.get("category") == "user" or name == "con:", (route, name, result)


# ---- links -----------------------------------------------------------------------------------------------------------


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _fields(link: str) -> dict[str, Any]:
    token = urlsplit(link).path.split("/")[4]
    body = token.partition(".")[0]
    fields: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return fields


def test_a_link_gives_what_it_was_made_for_and_nothing_else(
    attacked: Victim, alice: Api, bob: Api, alices: Names, bobs: Names
) -> None:
    links = []
    for api, names in ((alice, alices), (bob, bobs)):
        archive = f"training_runs/{names.model}/checkpoints/sampler_weights/first/archive"
        links.append(api.http.get(archive, headers={"Accept": "application/json"}).json()["url"])
        links.append(api.http.get(f"sessions/{names.session}/trace_export").json()["url"])
    assert all(httpx.get(link).status_code == 200 for link in links)
    tokens = [urlsplit(link).path.split("/")[4] for link in links]
    assert len({token.partition(".")[2] for token in tokens}) == len(links)

    link, (body, _, signature) = links[2], tokens[2].partition(".")  # bob's, turned to what is alice's
    fields = _fields(link)
    changes: list[dict[str, Any]] = [
        {"owner": _fields(links[0])["owner"]}, {"name": alices.weights}, {"what": "file"}, {"what": "trace"},
        {"file": "adapter_config.json"}, {"file": "../../../server.secret"}, {"expires": 2**40}, {"version": ""},
        {"expires": None}, {"name": "../.."}, {"owner": "local"}, {"more": 1},
    ]  # fmt: skip
    forged = []
    for change in changes:
        changed = json.dumps({**fields, **change}, separators=(",", ":"), sort_keys=True).encode()
        macs = [
            hmac.new(key, changed, hashlib.sha256).digest() for key in (b"", b"links", attacked.keys["bob"].encode())
        ]
        forged += [f"{_encode(changed)}.{mac}" for mac in (signature, "", *map(_encode, macs))]
    forged += [
        f"{body}.{signature[:-1]}",
        f"{body}.{signature}A",
        f"{body}.{signature}=",
        f"{body}=.{signature}",
        body,
        ".",
    ]
    forged += [f"{body}.{tokens[0].partition('.')[2]}", f"{tokens[0].partition('.')[0]}.{signature}", "A" * 5000, "%00"]
    name = link.rsplit("/", 1)[1]
    for token in forged:
        response = attacked.checked(httpx.get(f"{attacked.url}/api/v1/downloads/{token}/{name}"))
        assert response.status_code in (403, 404), token
    for file in (
        "adapter_config.json",
        "..%2fadapter_config.json",
        "%2e%2e",
        "server.secret",
        "..%2f..%2fmint.db",
        "%00",
    ):
        response = attacked.checked(httpx.get(f"{link.rsplit('/', 1)[0]}/{file}"))
        assert response.status_code in (403, 404), file
    for ranges in (
        "bytes=0-0",
        "bytes=-1",
        "bytes=5-2",
        "bytes=99999999999-",
        "bytes=" + "0-0," * 2000,
        "x",
        "bytes=--",
    ):
        response = httpx.get(link, headers={"Range": ranges})
        assert response.status_code in (200, 206, 400, 416), ranges
        assert len(response.content) < 4 << 20


def test_samples_of_one_never_come_to_the_other(
    attacked: Victim, alice: Api, bob: Api, alices: Names, bobs: Names
) -> None:
    """The same seq_ids, prompts and seeds at the same time: each gets samples of its own weights, by its own ids."""
    alice.result("forward_backward", **batch_json(alices.model, None))
    alice.result("optim_step", model_id=alices.model, adam_params={"learning_rate": 0.5})
    samplers = {}
    for api, names in ((alice, alices), (bob, bobs)):
        answer = api.result("save_weights_for_sampler", model_id=names.model, sampling_session_seq_id=40)
        samplers[api] = answer["sampling_session_id"]
    asked = []
    for seq_id in range(10):
        for api in (alice, bob):
            body = {"seq_id": seq_id, "prompt": prompt(5, 6), "sampling_params": {"max_tokens": 5, "seed": seq_id}}
            asked.append((api, api.ok("asample", sampling_session_id=samplers[api], **body)["request_id"]))
    assert len({request_id for _, request_id in asked}) == len(asked)
    for api, request_id in asked:
        other = bob if api is alice else alice
        assert other.post("retrieve_future", request_id=request_id).status_code == 404
        assert len(api.retrieve(request_id).json()["sequences"]) == 1
