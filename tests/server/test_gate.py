"""What one key may send and hold at once, and that nothing is read from strangers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from small_app import SmallApp

from mint_engine.errors import UserError
from mint_engine.server.caller import Caller
from mint_engine.store import KeyLimits

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def small(tmp_path: Path) -> SmallApp:
    return SmallApp(tmp_path, max_request_bytes=10_000)


async def _stream(total: int, step: int = 1000) -> AsyncIterator[bytes]:
    """A body without Content-Length."""
    for _ in range(total // step):
        yield bytes(step)


async def test_a_body_up_to_the_limit_is_taken(small: SmallApp) -> None:
    async with small.client() as client:
        assert (await client.post("/count", content=bytes(10_000))).json() == {"bytes": 10_000}


async def test_a_body_that_announces_too_much_is_not_read_at_all(small: SmallApp) -> None:
    async with small.client() as client:
        response = await client.post("/count", content=bytes(10_001))
    assert response.status_code == 413
    assert "at most 10000 bytes" in response.json()["detail"]
    assert small.bytes_read == 0


async def test_a_body_without_a_length_is_read_up_to_the_limit_only(small: SmallApp) -> None:
    async with small.client() as client:
        response = await client.post("/count", content=_stream(1_000_000))
    assert response.status_code == 413
    assert small.bytes_read == 10_000


@pytest.mark.parametrize("first", [0, 1, 9_999, 10_000])
@pytest.mark.parametrize(("beyond", "found"), [(5_000, True), (5_002, False)])
async def test_the_end_is_looked_for_as_far_beyond_the_limit_however_a_body_is_cut(
    small: SmallApp, first: int, beyond: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_engine.server.gate.SKIMMED", 5_000)
    small.app.add_api_route("/forward", small._count, methods=["POST"])
    body = bytes(10_000 + beyond)
    chunks = [body[:first], body[first:-2], body[-2:-1], body[-1:]]
    status, taken = await _raw(small, [], chunks, "/forward")
    assert (status, taken == len(chunks)) == (413, found)


async def test_a_length_that_lies_does_not_help(small: SmallApp) -> None:
    status, _ = await _raw(small, [(b"content-length", b"5")], [bytes(6_000), bytes(6_000)])
    assert status == 413


async def test_a_length_that_is_no_number_does_not_hurt(small: SmallApp) -> None:
    status, _ = await _raw(small, [(b"content-length", "²".encode("latin-1"))], [bytes(10)])
    assert status == 200


async def test_a_key_may_have_a_limit_of_its_own(small: SmallApp) -> None:
    _, secret = small.key(limits=KeyLimits(max_request_bytes=20_000))
    async with small.client(secret) as client:
        assert (await client.post("/count", content=bytes(20_000))).status_code == 200
        assert (await client.post("/count", content=bytes(20_001))).status_code == 413


async def test_json_bodies_are_limited_too(small: SmallApp) -> None:
    body = b'{"tinker_path": "' + b"x" * 20_000 + b'"}'
    async with small.client() as client:
        headers = {"Content-Type": "application/json"}
        assert (await client.post("/api/v1/weights_info", content=body, headers=headers)).status_code == 413


async def test_nothing_is_read_from_a_stranger(small: SmallApp) -> None:
    small.key()
    chunks = [bytes(1000)] * 5
    status, taken = await _raw(small, [(b"x-api-key", b"tml-wrong")], chunks, path="/count")
    assert (status, taken) == (401, 0)
    for path in ("/api/v1/weights_info", "/api/v1/checkpoints/upload", "/api/v1/mint/forward_backward_reverse_kl"):
        json = [(b"content-type", b"application/json")]
        status, taken = await _raw(small, [(b"x-api-key", b"tml-wrong"), *json], chunks, path=path)
        assert (path, status, taken) == (path, 401, 0)


async def test_what_needs_no_key_is_served_to_anyone(small: SmallApp) -> None:
    small.key()
    async with small.client("tml-wrong") as client:
        assert (await client.get("/open")).json() == {"status": "ok"}


async def _raw(
    small: SmallApp, headers: list[tuple[bytes, bytes]], chunks: list[bytes], path: str = "/count"
) -> tuple[int, int]:
    """A request below HTTP: the status, and how many chunks the application took."""
    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), *headers], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "root_path": "",
    }  # fmt: skip
    left, status = list(chunks), 0

    async def receive() -> dict[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await small.app(scope, receive, send)  # type: ignore[arg-type]
    return status, len(chunks) - len(left)


# ---- at once ---------------------------------------------------------------------------------------------------------


async def _held(
    small: SmallApp, client: httpx.AsyncClient, path: str, count: int, also: list[tuple[httpx.AsyncClient, str]]
) -> list[int]:
    """Statuses of `also` while `count` requests to `path` are in the middle of their bodies."""
    begun, done, statuses = anyio.Semaphore(0), anyio.Event(), []

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        begun.release()
        await done.wait()
        yield b"x"

    async def hold() -> None:
        assert (await client.post(path, content=body())).status_code == 200

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(hold)
        for _ in range(count):
            await begun.acquire()
        for other, other_path in also:
            response = await other.post(other_path, content=b"")
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert response.headers["Retry-After"] == "1"
        done.set()
    return statuses


async def test_more_at_once_than_a_key_may_are_told_to_come_again(small: SmallApp) -> None:
    _, alice = small.key("alice", limits=KeyLimits(max_concurrent_requests=3))
    _, bob = small.key("bob", limits=KeyLimits(max_concurrent_requests=3))
    async with small.client(alice) as a, small.client(bob) as b:
        assert await _held(small, a, "/count", 3, [(a, "/count"), (b, "/count"), (a, "/count")]) == [429, 200, 429]
        assert (await a.post("/count", content=b"")).status_code == 200  # their places are free again
        assert not small.auth.quotas._running


async def test_polls_that_only_wait_do_not_take_the_place_of_work(small: SmallApp) -> None:
    small.app.add_api_route("/retrieve_future", small._count, methods=["POST"])
    _, secret = small.key(limits=KeyLimits(max_concurrent_requests=1))
    async with small.client(secret) as client:
        assert await _held(small, client, "/retrieve_future", 64, [(client, "/count")]) == [200]
        assert await _held(small, client, "/retrieve_future", 64, [(client, "/retrieve_future")]) == [429]
        assert await _held(small, client, "/count", 1, [(client, "/retrieve_future")]) == [200]


async def test_a_request_that_fails_gives_its_place_back(small: SmallApp) -> None:
    _, secret = small.key(limits=KeyLimits(max_concurrent_requests=1))
    async with small.client(secret) as client:
        for _ in range(5):
            assert (await client.get("/api/v1/training_runs/none")).status_code == 404
            assert (await client.post("/count", content=bytes(99_999))).status_code == 413
    assert not small.auth.quotas._running


# ---- models and disk -------------------------------------------------------------------------------------------------


def _caller(small: SmallApp, limits: KeyLimits) -> Caller:
    record, _ = small.store.keys.create("someone", limits=limits)
    return Caller(record.key_id, small.store.as_owner(record.key_id), record)


async def test_models_on_their_way_count_as_resident(small: SmallApp) -> None:
    caller, other = (_caller(small, KeyLimits(max_resident_models=2)) for _ in range(2))
    quotas, engine = small.auth.quotas, small.app.state.mint.engine
    first = await quotas.reserve_model(caller, engine)
    await quotas.reserve_model(caller, engine)
    with pytest.raises(UserError, match="may keep 2 models in memory at once and has 2"):
        await quotas.reserve_model(caller, engine)
    await quotas.reserve_model(other, engine)
    first()
    first()  # once is enough
    small.resident[caller.owner] = 1  # it has arrived
    with pytest.raises(UserError, match="close a session"):
        await quotas.reserve_model(caller, engine)
    small.resident[caller.owner] = 0
    await quotas.reserve_model(caller, engine)


async def test_a_full_disk_says_what_to_do(small: SmallApp) -> None:
    caller = _caller(small, KeyLimits(max_disk_bytes=30_000))
    run = small.run(caller.owner)
    await small.auth.quotas.check_disk(caller)
    small.checkpoint(caller.owner, run, "one")
    small.checkpoint(caller.owner, run, "two")
    await small.auth.quotas.check_disk(caller)
    with pytest.raises(UserError, match="and 20,000 more are to come"):
        await small.auth.quotas.check_disk(caller, 20_000)
    small.checkpoint(caller.owner, run, "three")
    with pytest.raises(UserError, match="delete some"):
        await small.auth.quotas.check_disk(caller)
    caller.store.delete_checkpoint(f"tinker://{run}/weights/one")
    await small.auth.quotas.check_disk(caller)


async def test_a_copy_counts_against_the_disk_of_who_makes_it(small: SmallApp) -> None:
    owner, secret = small.key("owner", limits=KeyLimits(max_disk_bytes=15_000))
    run = small.run(owner)
    path = small.checkpoint(owner, run)
    async with small.client(secret) as client:
        response = await client.post("/api/v1/copy_weights", json={"source_path": path})
    assert response.status_code == 400
    assert "may take 15,000 bytes" in response.json()["detail"]
