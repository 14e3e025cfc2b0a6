"""Keys, tokens, and who gets in without a key."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import httpx
import jwt
import pytest
from small_app import SmallApp

from mint_engine.server import auth as auth_module
from mint_engine.server.tokens import Tokens, derive, load_secret
from mint_engine.store import KeyStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def small(tmp_path: Path) -> SmallApp:
    return SmallApp(tmp_path)


async def _owner(client: httpx.AsyncClient, **headers: str) -> tuple[int, str]:
    response = await client.get("/whoami", headers=headers)
    return response.status_code, response.json().get("owner", "")


async def test_a_key_is_taken_from_either_header(small: SmallApp) -> None:
    owner, secret = small.key()
    async with small.client() as client:
        assert await _owner(client, **{"X-API-Key": secret}) == (200, owner)
        assert await _owner(client, Authorization=f"Bearer {secret}") == (200, owner)
        assert await _owner(client, Authorization=f"bearer {secret}") == (200, owner)


@pytest.mark.parametrize("prefix", ["tml-", "sk-"])
async def test_both_kinds_of_keys_work(small: SmallApp, prefix: str) -> None:
    owner, secret = small.key(prefix=prefix)
    assert secret.startswith(prefix)
    async with small.client(secret) as client:
        assert await _owner(client) == (200, owner)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "tml-wrong"},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 100_000},
        {"X-API-Key": b"\xff\xfe\x00tml".decode("latin-1")},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dG1sOnRtbA=="},
        {"X-API-Key": "eyJ.e30."},
        {"X-API-Key": "eyJ" + "." * 2},
    ],
)
async def test_without_a_good_key_there_is_401(small: SmallApp, headers: dict[str, str]) -> None:
    small.key()
    async with small.client() as client:
        response = await client.get("/whoami", headers={k: v.encode("latin-1") for k, v in headers.items()})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert set(response.json()) == {"detail"}


async def test_a_part_of_a_key_and_its_id_are_no_keys(small: SmallApp) -> None:
    owner, secret = small.key()
    async with small.client() as client:
        for wrong in (secret[:-1], secret + "x", secret.upper(), owner, secret[4:]):
            assert (await _owner(client, **{"X-API-Key": wrong}))[0] == 401


async def test_a_revoked_key_works_for_a_second_at_most(small: SmallApp) -> None:
    owner, secret = small.key()
    async with small.client(secret) as client:
        assert (await _owner(client))[0] == 200
        small.store.keys.revoke(owner)  # another process: this one is not told
        end = time.monotonic() + 1.5
        while (await _owner(client))[0] == 200:
            assert time.monotonic() < end
            await anyio.sleep(0.05)


async def test_in_this_process_a_key_can_be_revoked_at_once(small: SmallApp) -> None:
    owner, secret = small.key()
    async with small.client(secret) as client:
        assert (await _owner(client))[0] == 200
        small.store.keys.revoke(owner)
        small.auth.forget()
        assert (await _owner(client))[0] == 401


async def test_a_burst_of_requests_asks_the_database_once(small: SmallApp, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = small.key()
    looks: list[str] = []
    find = KeyStore.find

    def counted(self: KeyStore, secret: str) -> object:
        looks.append(secret)
        return find(self, secret)

    monkeypatch.setattr(KeyStore, "find", counted)
    monkeypatch.setattr(auth_module, "_FRESH_SECONDS", 60.0)
    async with small.client() as client:

        async def ask(key: str) -> None:
            await client.get("/whoami", headers={"X-API-Key": key})

        for key in (secret, "tml-wrong"):
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(ask, key)
    assert sorted(looks) == sorted([secret, "tml-wrong"])


async def test_slow_work_of_others_keeps_nobody_out(small: SmallApp) -> None:
    owner, secret = small.key()
    held = threading.Event()
    threads = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
    async with small.client(secret) as client, anyio.create_task_group() as group:
        for _ in range(threads):
            group.start_soon(anyio.to_thread.run_sync, held.wait, 30)
        await anyio.wait_all_tasks_blocked()
        try:
            with anyio.fail_after(10):
                assert await _owner(client) == (200, owner)
        finally:
            held.set()


async def test_a_flood_of_wrong_keys_takes_a_bounded_amount_of_memory(
    small: SmallApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = small.key()
    monkeypatch.setattr(auth_module, "_REMEMBERED", 10)
    monkeypatch.setattr(auth_module, "_FRESH_SECONDS", 60.0)
    async with small.client() as client:
        assert (await _owner(client, **{"X-API-Key": secret}))[0] == 200
        for i in range(30):
            assert (await _owner(client, **{"X-API-Key": f"tml-{i}"}))[0] == 401
        known, unknown = small.auth._cache._rooms
        assert (len(known), len(unknown)) == (1, 10)


# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_a_token_stands_for_its_key_until_that_is_revoked(small: SmallApp) -> None:
    owner, secret = small.key("alice", prefix="sk-")
    async with small.client(secret) as client:
        token = (await client.post("/api/v1/auth/token", json={})).json()["jwt"]
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["sub"] == owner
    assert claims["exp"] - claims["iat"] >= 900  # tinker 0.22 renews 300 s before the end
    assert {"org_id", "email", "iss"} <= set(claims)
    async with small.client(token) as client:
        assert await _owner(client) == (200, owner)
        assert (await client.post("/api/v1/auth/token", json={})).status_code == 200  # a token renews itself
        small.store.keys.revoke(owner)
        small.auth.forget()
        response = await client.get("/whoami")
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]  # 0.38 exchanges its key again


def _forged(small: SmallApp, owner: str) -> dict[str, str]:
    secret = load_secret(small.store.home)
    key = derive(secret, "tokens")
    now = int(time.time())
    good = {"sub": owner, "iss": "mint-engine", "iat": now, "exp": now + 900, "org_id": "x", "email": ""}
    fine = jwt.encode(good, key, "HS256")
    head, body, signature = fine.split(".")
    other = base64.urlsafe_b64encode(json.dumps({**good, "sub": "key-other"}).encode()).decode().rstrip("=")
    return {
        "unsigned": jwt.encode(good, "", "none"),
        "signed with another key": jwt.encode(good, b"k" * 32, "HS256"),
        "signed for links": jwt.encode(good, derive(secret, "links"), "HS256"),
        "signed with the secret itself": jwt.encode(good, secret, "HS256"),
        "another algorithm": jwt.encode(good, key, "HS512"),
        "expired": jwt.encode({**good, "exp": now - 60}, key, "HS256"),
        "without end": jwt.encode({k: v for k, v in good.items() if k != "exp"}, key, "HS256"),
        "of another issuer": jwt.encode({**good, "iss": "evil"}, key, "HS256"),
        "of nobody": jwt.encode({k: v for k, v in good.items() if k != "sub"}, key, "HS256"),
        "of an unknown key": jwt.encode({**good, "sub": "key-none"}, key, "HS256"),
        "of the anonymous": jwt.encode({**good, "sub": "local"}, key, "HS256"),
        "not yet valid": jwt.encode({**good, "nbf": now + 600}, key, "HS256"),
        "a changed body": f"{head}.{other}.{signature}",
        "a cut signature": f"{head}.{body}.{signature[:-2]}",
        "garbage": "eyJhbGciOiJIUzI1NiJ9.AAAA.AAAA",
    }


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # of the forger's HS512
async def test_no_forged_token_is_taken(small: SmallApp) -> None:
    owner, _ = small.key()
    async with small.client() as client:
        for what, token in _forged(small, owner).items():
            response = await client.get("/whoami", headers={"X-API-Key": token})
            assert response.status_code == 401, what
            assert 'error="invalid_token"' in response.headers["WWW-Authenticate"], what


def test_the_secret_is_ours_alone_and_survives_a_restart(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        secret = load_secret(tmp_path)
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE((tmp_path / "server.secret").stat().st_mode) == 0o600
    assert load_secret(tmp_path) == secret
    assert Tokens(load_secret(tmp_path)).subject(Tokens(secret).issue("key-1")) == "key-1"


def test_a_secret_that_others_could_read_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = load_secret(tmp_path)
    (tmp_path / "server.secret").chmod(0o644)
    assert load_secret(tmp_path) != secret
    assert "others could read it" in caplog.text
    assert stat.S_IMODE((tmp_path / "server.secret").stat().st_mode) == 0o600


def test_a_damaged_secret_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "server.secret").write_bytes(b"")
    (tmp_path / "server.secret").chmod(0o600)
    assert len(load_secret(tmp_path)) == 32


def test_processes_that_start_together_agree_on_the_secret(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from mint_engine.server.tokens import load_secret;"
        "print(load_secret(pathlib.Path(sys.argv[1])).hex())"
    )

    def start(_: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(start, range(3)))) == 1


# ---- without keys ----------------------------------------------------------------------------------------------------


async def test_without_keys_this_machine_is_served_whatever_it_sends(small: SmallApp) -> None:
    async with small.client() as client:
        assert await _owner(client) == (200, "local")
        assert await _owner(client, **{"X-API-Key": "tml-anything"}) == (200, "local")
        token = (await client.post("/api/v1/auth/token", json={})).json()["jwt"]
        assert await _owner(client, **{"X-API-Key": token}) == (200, "local")


async def test_the_first_key_ends_service_without_one_within_a_second(small: SmallApp) -> None:
    async with small.client() as client:
        assert (await _owner(client))[0] == 200
        small.store.keys.create("first")
        end = time.monotonic() + 1.5
        while (await _owner(client))[0] == 200:
            assert time.monotonic() < end
            await anyio.sleep(0.05)


async def test_revoking_the_last_key_does_not_open_the_server(small: SmallApp, tmp_path: Path) -> None:
    owner, _ = small.key()
    small.store.keys.revoke(owner)
    small.auth.forget()
    async with small.client() as client:
        assert (await _owner(client))[0] == 401
    async with SmallApp(tmp_path).client() as client:  # nor does a restart
        assert (await _owner(client))[0] == 401


def _from(small: SmallApp, peer: str, url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(small.app, client=(peer, 1234)), base_url=url)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", ""])
@pytest.mark.parametrize("url", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:1", "http://my.localhost"])
async def test_without_keys_loopback_is_served(small: SmallApp, peer: str, url: str) -> None:
    async with _from(small, peer, url) as client:
        assert (await _owner(client))[0] == 200


@pytest.mark.parametrize("peer", ["10.0.0.5", "192.168.1.1", "8.8.8.8", "2001:db8::1", "::ffff:8.8.8.8", "unknown"])
async def test_without_keys_other_machines_are_refused(small: SmallApp, peer: str) -> None:
    async with _from(small, peer, "http://localhost") as client:
        response = await client.get("/whoami")
    assert response.status_code == 403
    assert "mint-engine keys create" in response.json()["detail"]


async def test_without_keys_a_name_that_points_here_is_refused(small: SmallApp) -> None:
    """DNS rebinding: a page of evil.example, whose name has just been made to point to 127.0.0.1."""
    async with _from(small, "127.0.0.1", "http://evil.example:8000") as client:
        response = await client.get("/whoami", headers={"Origin": "http://evil.example:8000"})
    assert response.status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://[bad"])
async def test_without_keys_other_web_pages_are_refused(small: SmallApp, origin: str) -> None:
    async with _from(small, "127.0.0.1", "http://localhost:8000") as client:
        response = await client.post("/api/v1/auth/token", headers={"Origin": origin})
    assert response.status_code == 403


async def test_without_keys_the_owner_may_open_the_server(tmp_path: Path) -> None:
    small = SmallApp(tmp_path, allow_anonymous=True)
    async with _from(small, "10.0.0.5", "http://gpu.example") as client:
        assert await _owner(client) == (200, "local")


async def test_without_keys_the_public_name_of_the_server_is_served(tmp_path: Path) -> None:
    small = SmallApp(tmp_path, public_url="https://gpu.example/mint")
    async with _from(small, "127.0.0.1", "https://gpu.example") as client:
        assert (await _owner(client, Origin="https://gpu.example"))[0] == 200
        assert (await _owner(client, Origin="https://evil.example"))[0] == 403
        assert (await _owner(client, Origin="null"))[0] == 403
