"""Two keys on one server: what is another's is as if it were not there, until it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from small_app import SmallApp

pytestmark = pytest.mark.anyio
API = "/api/v1"
RUN = "/training_runs/{run}"
ONE = f"{RUN}/checkpoints/weights/one"

# method, path, body. `{run}`, `{session}`, `{sampler}` stand for another's, then for such as do not exist.
REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", RUN, None),
    ("GET", f"{RUN}?access_scope=accessible", None),
    ("GET", f"{RUN}/checkpoints", None),
    ("GET", ONE, None),
    ("DELETE", ONE, None),
    ("POST", f"{ONE}/publish", None),
    ("DELETE", f"{ONE}/publish", None),
    ("PUT", f"{ONE}/ttl", {"ttl_seconds": 60}),
    ("GET", f"{ONE}/archive", None),
    ("GET", f"{RUN}/checkpoints/external_weights/ext/external_weights_urls", None),
    ("POST", "/weights_info", {"tinker_path": "tinker://{run}/weights/one"}),
    ("POST", "/weights_info", {"tinker_path": "{run}/one"}),
    ("POST", "/copy_weights", {"source_path": "tinker://{run}/weights/one"}),
    ("POST", "/copy_weights", {"source_path": "{own}/one", "session_id": "{session}", "model_seq_id": 9}),
    ("GET", "/sessions/{session}", None),
    ("GET", "/sessions/{session}?access_scope=accessible", None),
    ("PUT", "/sessions/{session}/project", {"project_id": "p"}),
    ("GET", "/sessions/{session}/trace_export", None),
    ("GET", "/samplers/{sampler}", None),
]  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Two:
    """Alice has a session, a run, checkpoints and a sampler; so has Bob."""

    def __init__(self, home: Path) -> None:
        self.small = SmallApp(home)
        self.alice, self.alices_key = self.small.key("alice")
        self.bob, self.bobs_key = self.small.key("bob")
        self.runs = {}
        for owner, session in ((self.alice, "alices"), (self.bob, "bobs")):
            run = self.runs[owner] = self.small.run(owner, session)
            self.small.checkpoint(owner, run)
            self.small.checkpoint(owner, run, "ext", kind="external_weights")
            self.small.store.as_owner(owner).add_sampler(session, f"{session}:sample:0", base_model="tiny")

    async def as_bob(self, client: httpx.AsyncClient, entry: tuple[str, str, Any], whose: str) -> httpx.Response:
        names = {
            "{run}": f"{whose}:train:0",
            "{session}": whose,
            "{sampler}": f"{whose}:sample:0",
            "{own}": "bobs:train:0",
        }
        method, path, body = entry

        def put_in(text: Any) -> Any:
            for name, value in names.items():
                text = text.replace(name, value) if isinstance(text, str) else text
            return text

        json = None if body is None else {key: put_in(value) for key, value in body.items()}
        return await client.request(method, API + put_in(path), json=json)


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


@pytest.mark.parametrize("entry", REQUESTS, ids=lambda entry: f"{entry[0]} {entry[1]}")
async def test_anothers_is_as_if_it_were_not_there(two: Two, entry: tuple[str, str, Any]) -> None:
    async with two.small.client(two.bobs_key) as client:
        own = await two.as_bob(client, entry, "bobs")
        assert own.status_code in (200, 302), own.text  # the request itself is fine
        foreign = await two.as_bob(client, entry, "alices")
        missing = await two.as_bob(client, entry, "nobody")
    assert foreign.status_code == missing.status_code == 404
    assert foreign.text.replace("alices", "nobody") == missing.text


@pytest.mark.parametrize("entry", REQUESTS, ids=lambda entry: f"{entry[0]} {entry[1]}")
async def test_what_bob_tries_leaves_alices_as_it_was(two: Two, entry: tuple[str, str, Any]) -> None:
    store = two.small.store.as_owner(two.alice)
    before = (store.list_user_checkpoints(), store.list_runs(), store.get_session("alices"))
    async with two.small.client(two.bobs_key) as client:
        await two.as_bob(client, entry, "alices")
    assert (store.list_user_checkpoints(), store.list_runs(), store.get_session("alices")) == before


async def test_lists_hold_ones_own_only(two: Two) -> None:
    async with two.small.client(two.bobs_key) as client:
        for path in ("/training_runs", "/checkpoints", "/sessions"):
            for scope in ("owned", "accessible"):
                text = (await client.get(API + path, params={"access_scope": scope})).text
                assert "bobs" in text
                assert "alice" not in text
        found = await client.post(f"{API}/sessions/search", json={"owner": {"type": "accessible"}})
        assert [session["session_id"] for session in found.json()["sessions"]] == ["bobs"]
        search = {"owner": {"type": "user", "owner_urns": [two.alice]}}
        assert (await client.post(f"{API}/sessions/search", json=search)).json()["sessions"] == []


async def test_published_checkpoints_can_be_read_and_not_changed(two: Two) -> None:
    run = two.runs[two.alice]
    async with two.small.client(two.alices_key) as client:
        assert (await client.post(f"{API}/training_runs/{run}/checkpoints/weights/one/publish")).status_code == 200
    one = f"{API}/training_runs/{run}/checkpoints/weights/one"
    async with two.small.client(two.bobs_key) as client:
        info = await client.post(f"{API}/weights_info", json={"tinker_path": f"tinker://{run}/weights/one"})
        assert info.json()["base_model"] == "tiny"
        link = (await client.get(f"{one}/archive")).headers["Location"].removeprefix("http://127.0.0.1:8000")
        assert (await client.get(link)).status_code == 200
        copied = await client.post(f"{API}/copy_weights", json={"source_path": f"tinker://{run}/weights/one"})
        assert copied.status_code == 200
        listed = (await client.get(f"{API}/training_runs/{run}/checkpoints")).json()["checkpoints"]
        assert [checkpoint["checkpoint_id"] for checkpoint in listed] == ["weights/one"]  # not the external one
        assert (await client.get(f"{API}/training_runs/{run}")).status_code == 404
        shown = await client.get(f"{API}/training_runs/{run}", params={"access_scope": "accessible"})
        assert shown.status_code == 200
        runs = (await client.get(f"{API}/training_runs", params={"access_scope": "accessible"})).json()
        assert run in [r["training_run_id"] for r in runs["training_runs"]]
        for method, path, json in (
            ("DELETE", one, None),
            ("DELETE", f"{one}/publish", None),
            ("POST", f"{one}/publish", None),
            ("PUT", f"{one}/ttl", {"ttl_seconds": 60}),
        ):
            assert (await client.request(method, path, json=json)).status_code == 404
    async with two.small.client(two.alices_key) as client:
        assert (await client.delete(f"{one}/publish")).status_code == 200
    async with two.small.client(two.bobs_key) as client:
        assert (await client.get(f"{one}/archive")).status_code == 404
        assert (await client.get(link)).status_code == 404  # the link sees with bob's eyes
        own = copied.json()["tinker_path"]
        assert (await client.post(f"{API}/weights_info", json={"tinker_path": own})).status_code == 200  # bob's copy


async def test_a_key_that_was_given_away_lets_its_checkpoints_be_copied(two: Two) -> None:
    source = {"source_path": f"tinker://{two.runs[two.alice]}/weights/one"}
    async with two.small.client(two.bobs_key) as client:
        for token in ("tml-wrong", "eyJh.bGc.x"):
            refused = await client.post(f"{API}/copy_weights", json={**source, "weights_access_token": token})
            assert refused.status_code == 400
            assert "weights_access_token" in refused.text
        headers = {"X-Tinker-Weights-Access-Token": two.alices_key}
        copied = await client.post(f"{API}/copy_weights", json=source, headers=headers)
        assert copied.status_code == 200
    names = [c.tinker_path for c in two.small.store.as_owner(two.bob).list_user_checkpoints().checkpoints]
    assert copied.json()["tinker_path"] in names


async def test_idempotency_keys_of_two_callers_do_not_meet(two: Two) -> None:
    headers = {"X-Idempotency-Key": "same"}
    paths = []
    for owner, key in ((two.alice, two.alices_key), (two.bob, two.bobs_key)):
        two.small.store.as_owner(owner).publish(f"tinker://{two.runs[owner]}/weights/one")
        async with two.small.client(key) as client:
            body = {"source_path": f"tinker://{two.runs[two.alice]}/weights/one"}
            response = await client.post(f"{API}/copy_weights", json=body, headers=headers)
            paths.append(response.json()["tinker_path"])
    assert paths[0] != paths[1]
