"""Sessions, runs and checkpoints over HTTP: what one's own key sees, and how it looks."""

from __future__ import annotations

import asyncio
import io
import tarfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from small_app import SmallApp

from mint_engine.store import LedgerEntry, archive, copies

pytestmark = pytest.mark.anyio
API = "/api/v1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def small(tmp_path: Path) -> SmallApp:
    return SmallApp(tmp_path)


async def _json(client: httpx.AsyncClient, path: str, status: int = 200, **query: Any) -> Any:
    response = await client.get(API + path, params=query)
    assert response.status_code == status, response.text
    return response.json()


async def test_runs_are_listed_a_page_at_a_time(small: SmallApp) -> None:
    runs = [small.run("local", number=n) for n in range(5)]
    async with small.client() as client:
        first = await _json(client, "/training_runs", limit=2)
        assert first["cursor"] == {"offset": 0, "limit": 2, "total_count": 5}
        ids = [run["training_run_id"] for run in first["training_runs"]]
        for offset in (2, 4):
            page = await _json(client, "/training_runs", limit=2, offset=offset)
            ids += [run["training_run_id"] for run in page["training_runs"]]
    assert ids == runs[::-1]


async def test_a_run_shows_its_newest_checkpoints(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run, "old")
    small.checkpoint("local", run, "new", user_metadata={"step": "7"})
    small.checkpoint("local", run, "snap", kind="sampler_weights")
    async with small.client() as client:
        shown = await _json(client, f"/training_runs/{run}", access_scope="owned")
    assert shown["last_checkpoint"]["tinker_path"] == f"tinker://{run}/weights/new"
    assert shown["last_checkpoint"]["user_metadata"] == {"step": "7"}
    assert shown["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/snap"


@pytest.mark.parametrize("query", [{"limit": -1}, {"limit": "x"}, {"offset": 2**70}, {"access_scope": "all"}])
async def test_a_bad_page_is_a_422(small: SmallApp, query: dict[str, Any]) -> None:
    async with small.client() as client:
        for path in ("/training_runs", "/sessions"):
            assert (await client.get(API + path, params=query)).status_code == 422


async def test_checkpoints_are_listed_published_timed_and_deleted(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    one = f"{API}/training_runs/{run}/checkpoints/weights/one"
    async with small.client() as client:

        async def shown() -> dict[str, Any]:
            (checkpoint,) = (await _json(client, f"/training_runs/{run}/checkpoints"))["checkpoints"]
            assert (await _json(client, "/checkpoints"))["checkpoints"] == [checkpoint]
            return checkpoint

        for _ in range(2):  # as often as one likes: a 409 would be retried for minutes
            assert (await client.post(f"{one}/publish")).status_code == 200
            assert (await shown())["public"] is True
        for _ in range(2):
            assert (await client.delete(f"{one}/publish")).status_code == 200
            assert (await shown())["public"] is False
        assert (await client.put(f"{one}/ttl", json={"ttl_seconds": 3600})).status_code == 200
        expires = datetime.fromisoformat((await shown())["expires_at"])
        assert abs(expires - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
        assert (await client.put(f"{one}/ttl", json={"ttl_seconds": None})).status_code == 200
        assert (await shown())["expires_at"] is None
        assert (await client.delete(one)).status_code == 200
        assert (await client.delete(one)).status_code == 404
        assert (await _json(client, "/checkpoints"))["checkpoints"] == []


@pytest.mark.parametrize("ttl", [0, -5, 10**12, "soon"])
async def test_a_ttl_that_cannot_be_is_refused(small: SmallApp, ttl: Any) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    async with small.client() as client:
        response = await client.put(f"{API}/training_runs/{run}/checkpoints/weights/one/ttl", json={"ttl_seconds": ttl})
    assert response.status_code in (400, 422)


@pytest.mark.parametrize(
    "path", ["weights/..%2f..%2fmint.db", "weights/%2e%2e", "..%2f..%2f..%2fetc", "weights/a%00b", "weights", "a/b/c/d"]
)
async def test_no_id_leads_out_of_the_store(small: SmallApp, path: str) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    async with small.client() as client:
        for method, end in (("DELETE", ""), ("POST", "/publish"), ("GET", "/archive"), ("GET", "")):
            response = await client.request(method, f"{API}/training_runs/{run}/checkpoints/{path}{end}")
            assert response.status_code in (400, 404, 405), (method, end, response.text)
            assert str(small.store.home) not in response.text
    assert len(small.store.list_user_checkpoints().checkpoints) == 1


@pytest.mark.parametrize("name", ["publish", "ttl", "archive", "external_weights_urls", "weights", "ünï 1"])
async def test_a_checkpoint_may_have_any_name(small: SmallApp, name: str) -> None:
    run = small.run("local")
    path = small.checkpoint("local", run, name)
    async with small.client() as client:
        one = f"{API}/training_runs/{run}/checkpoints/weights/{name}"
        assert (await client.get(one)).json()["tinker_path"] == path
        assert (await client.post(f"{one}/publish")).status_code == 200
        assert (await client.delete(one)).status_code == 200
        assert (await _json(client, "/checkpoints"))["checkpoints"] == []


async def test_old_sdks_are_not_shown_what_they_do_not_know(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    small.checkpoint("local", run, kind="external_weights")
    for version, count in (("0.18.2", 1), ("0.22.0", 1), ("0.27.0", 1), ("0.28.0", 2), ("0.38.0", 2), ("1.0", 2)):
        headers = {"User-Agent": f"AsyncTinker/Python {version}", "X-Stainless-Package-Version": version}
        async with small.client(**headers) as client:
            for path in ("/checkpoints", f"/training_runs/{run}/checkpoints"):
                assert len((await _json(client, path))["checkpoints"]) == count, version


async def test_weights_info_takes_every_form_of_a_path(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    async with small.client() as client:
        for path in (f"tinker://{run}/weights/one", f"mint://{run}/weights/one", f"{run}/weights/one", "one"):
            response = await client.post(f"{API}/weights_info", json={"tinker_path": path})
            assert response.json()["base_model"] == "tiny"
            assert response.json()["lora_rank"] == 4
        assert (await client.post(f"{API}/weights_info", json={})).status_code == 400


async def test_sessions_and_samplers(small: SmallApp) -> None:
    run = small.run("local", "first")
    small.run("local", "second")
    small.store.add_sampler("first", "first:sample:0", base_model="tiny", model_path="tinker://x/sampler_weights/y")
    async with small.client() as client:
        assert (await _json(client, "/sessions"))["sessions"] == ["second", "first"]
        shown = await _json(client, "/sessions/first", access_scope="accessible")
        assert shown["training_run_ids"] == [run]
        assert shown["sampler_ids"] == ["first:sample:0"]
        sampler = await _json(client, "/samplers/first:sample:0")
        assert sampler["model_path"] == "tinker://x/sampler_weights/y"
        await _json(client, "/samplers/first:sample:1", 404)
        response = await client.put(f"{API}/sessions/first/project", json={"project_id": "p"})
        assert response.status_code == 200
        runs = await _json(client, "/training_runs", project_id="p")
        assert [r["training_run_id"] for r in runs["training_runs"]] == [run]
        response = await client.put(f"{API}/sessions/first/project", json={})
        assert response.status_code == 400


async def test_sessions_are_searched_a_page_at_a_time(small: SmallApp) -> None:
    for n in range(5):
        small.store.create_session(f"s{n}", user_metadata={"odd": str(n % 2)}, display_name=f"Run {n}")
    small.store.finish_session("s1", "errored", "oops")
    async with small.client() as client:

        async def search(**query: Any) -> Any:
            response = await client.post(f"{API}/sessions/search", json=query)
            assert response.status_code == 200, response.text
            return response.json()

        page, found = await search(limit=2), []
        while True:
            found += [s["session_id"] for s in page["sessions"]]
            if page["next_cursor"] is None:
                break
            page = await search(limit=2, cursor=page["next_cursor"])
        assert found == ["s4", "s3", "s2", "s1", "s0"]
        assert [s["session_id"] for s in (await search(user_metadata={"odd": "1"}))["sessions"]] == ["s3", "s1"]
        (errored,) = (await search(statuses=[{"type": "client_finished", "reasons": ["errored"]}]))["sessions"]
        assert errored["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "oops"}
        response = await client.post(f"{API}/sessions/search", json={"limit": 0})
        assert response.status_code == 400


# ---- links -----------------------------------------------------------------------------------------------------------


def _path_of(url: str) -> str:
    return url.removeprefix("http://127.0.0.1:8000")


async def test_an_archive_is_a_redirect_to_022_and_json_to_later_sdks(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    archive = f"{API}/training_runs/{run}/checkpoints/weights/one/archive"
    async with small.client() as client:
        redirect = await client.get(archive, headers=[("Accept", "application/json"), ("Accept", "application/gzip")])
        assert redirect.status_code == 302
        expires = datetime.strptime(redirect.headers["Expires"], "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
        assert timedelta(minutes=10) < expires - datetime.now(UTC) < timedelta(hours=2)
        answer = (await client.get(archive, headers={"Accept": "application/json"})).json()
        assert datetime.fromisoformat(answer["expires"]) > datetime.now(UTC)
        for url in (redirect.headers["Location"], answer["url"]):
            tar = await client.get(_path_of(url))
            assert tar.headers["Content-Type"] == "application/gzip"
            with tarfile.open(fileobj=io.BytesIO(tar.content)) as opened:
                names = opened.getnames()
            assert names == ["adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"]


@pytest.mark.parametrize("kind", ["archive", "copy"])
async def test_one_owner_s_slow_jobs_keep_nobody_waiting(
    small: SmallApp, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, begun = threading.Event(), []

    def slow(module: ModuleType, name: str) -> None:
        """Hold up what is done with mallory's checkpoints."""
        real = getattr(module, name)

        def job(source: Any, *others: Any) -> Any:
            if "mallory" in str(source):
                begun.append(source)
                held.wait(30)
            return real(source, *others)

        monkeypatch.setattr(module, name, job)

    slow(archive, "_pack")
    slow(copies, "_copier")

    async def ask(client: httpx.AsyncClient, run: str, name: str) -> int:
        path = f"{run}/weights/{name}"
        if kind == "copy":
            body = {"source_path": f"tinker://{path}"}
            return (await client.post(f"{API}/copy_weights", json=body)).status_code
        response = await client.get(f"{API}/training_runs/{path.replace('weights', 'checkpoints/weights')}/archive")
        return response.status_code

    (mallory, hers), (carol, secret) = small.key("mallory"), small.key("carol")
    runs = {owner: small.run(owner, session) for owner, session in ((mallory, "mallory"), (carol, "carol"))}
    names = [f"v{i}" for i in range(50)]  # anyio has forty threads
    for name in names:
        small.checkpoint(mallory, runs[mallory], name)
    small.checkpoint(carol, runs[carol])
    async with small.client(hers) as attacker, small.client(secret) as client:
        jobs = [asyncio.create_task(ask(attacker, runs[mallory], name)) for name in names]
        try:
            while not begun:
                await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                assert len((await _json(client, "/checkpoints"))["checkpoints"]) == 1
                assert await ask(client, runs[carol], "one") in (200, 302)
            assert len(begun) == 2
        finally:
            held.set()
        assert set(await asyncio.gather(*jobs)) <= {200, 302}


async def test_a_link_needs_no_key_and_parts_can_be_fetched(small: SmallApp) -> None:
    owner, secret = small.key()
    run = small.run(owner)
    small.checkpoint(owner, run, kind="external_weights")
    async with small.client(secret) as client:
        links = await _json(client, f"/training_runs/{run}/checkpoints/external_weights/one/external_weights_urls")
    assert set(links["urls"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert datetime.fromisoformat(links["expires"]) > datetime.now(UTC) + timedelta(minutes=6)  # 0.38 renews at 5
    async with small.client() as client:
        url = _path_of(links["urls"]["adapter_model.safetensors"])
        whole = await client.get(url)
        assert whole.content == bytes(range(256)) * 40
        assert whole.headers["Content-Length"] == "10240"
        part = await client.get(url, headers={"Range": "bytes=10000-"})
        assert (part.status_code, part.content) == (206, whole.content[10000:])
        assert (await client.get(url, headers={"Range": "bytes=99999-"})).status_code == 416
        assert (await client.head(url)).headers["Content-Length"] == "10240"


async def test_only_external_checkpoints_have_links_to_their_files(small: SmallApp) -> None:
    run = small.run("local")
    small.checkpoint("local", run)
    async with small.client() as client:
        answer = await _json(client, f"/training_runs/{run}/checkpoints/weights/one/external_weights_urls", 400)
    assert "external_weights" in answer["detail"]


async def _link(small: SmallApp, secret: str, run: str) -> str:
    async with small.client(secret) as client:
        links = await _json(client, f"/training_runs/{run}/checkpoints/external_weights/one/external_weights_urls")
        return _path_of(links["urls"]["adapter_config.json"])


async def test_a_link_ends_with_its_checkpoint_its_version_or_its_key(small: SmallApp) -> None:
    owner, secret = small.key()
    run = small.run(owner)
    path = small.checkpoint(owner, run, kind="external_weights")
    async with small.client() as client:
        first = await _link(small, secret, run)
        assert (await client.get(first)).status_code == 200
        small.checkpoint(owner, run, kind="external_weights", overwrite=True)
        assert (await client.get(first)).status_code == 404  # not the files of another version
        second = await _link(small, secret, run)
        assert (await client.get(second)).status_code == 200
        small.store.as_owner(owner).delete_checkpoint(path)
        assert (await client.get(second)).status_code == 404
        small.checkpoint(owner, run, kind="external_weights")
        third = await _link(small, secret, run)
        small.store.keys.revoke(owner)
        small.auth.forget()
        assert (await client.get(third)).status_code == 403


async def test_a_changed_link_opens_nothing(small: SmallApp) -> None:
    owner, secret = small.key()
    run = small.run(owner)
    small.checkpoint(owner, run, kind="external_weights")
    link = await _link(small, secret, run)
    head, _, tail = link.rpartition("/")
    prefix, _, token = head.rpartition("/")
    async with small.client() as client:
        for position in range(0, len(token), 7):
            other = "A" if token[position] != "A" else "B"
            changed = token[:position] + other + token[position + 1 :]
            assert (await client.get(f"{prefix}/{changed}/{tail}")).status_code == 403
        for changed in (token[:-1], token + "A", token + "=", "x", "é.é"):
            assert (await client.get(f"{prefix}/{changed}/{tail}")).status_code == 403
        assert (await client.get(f"{head}/adapter_model.safetensors")).status_code == 403
        assert (await client.get(f"{head}/..%2fadapter_config.json")).status_code in (403, 404)


async def test_a_link_expires(small: SmallApp, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.run("local")
    small.checkpoint("local", run, kind="external_weights")
    small.signer._lifetime = -1
    link = await _link(small, "", run)
    async with small.client() as client:
        response = await client.get(link)
    assert response.status_code == 403
    assert "expired" in response.json()["detail"]


async def test_links_lead_to_the_public_address(tmp_path: Path) -> None:
    small = SmallApp(tmp_path, public_url="https://gpu.example/mint/")
    run = small.run("local")
    small.checkpoint("local", run, kind="external_weights")
    async with small.client() as client:
        links = await _json(client, f"/training_runs/{run}/checkpoints/external_weights/one/external_weights_urls")
    assert links["urls"]["adapter_config.json"].startswith("https://gpu.example/mint/api/v1/downloads/")


async def test_links_lead_to_where_the_application_is_mounted(small: SmallApp) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    run = small.run("local")
    small.checkpoint("local", run, kind="external_weights")
    outer = Starlette(routes=[Mount("/tinker", small.app)])
    transport = httpx.ASGITransport(outer)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        path = f"/tinker{API}/training_runs/{run}/checkpoints/external_weights/one/external_weights_urls"
        url = (await client.get(path)).json()["urls"]["adapter_config.json"]
        assert url.startswith("http://127.0.0.1:8000/tinker/api/v1/downloads/")
        assert (await client.get(url)).status_code == 200


# ---- copies, the ledger ----------------------------------------------------------------------------------------------


async def test_a_copy_is_a_run_of_its_own(small: SmallApp) -> None:
    run = small.run("local")
    path = small.checkpoint("local", run)
    async with small.client() as client:
        copied = await client.post(f"{API}/copy_weights", json={"source_path": path, "destination_project_id": "p"})
        new = copied.json()["tinker_path"]
        assert new.endswith("/weights/one")
        assert new != path
        into = {"source_path": path, "session_id": "s", "model_seq_id": 7}
        assert (await client.post(f"{API}/copy_weights", json=into)).json() == {
            "tinker_path": "tinker://s:train:7/weights/one"
        }
        assert (await client.post(f"{API}/copy_weights", json={**into, "session_id": "none"})).status_code == 404
        half = {"source_path": path, "session_id": "s"}
        assert (await client.post(f"{API}/copy_weights", json=half)).status_code == 400


async def test_a_copy_that_is_asked_for_again_is_not_made_again(small: SmallApp) -> None:
    run = small.run("local")
    path = small.checkpoint("local", run)
    async with small.client() as client:
        answers = []
        for key in ("a", "a", "b"):
            headers = {"X-Idempotency-Key": key}
            response = await client.post(f"{API}/copy_weights", json={"source_path": path}, headers=headers)
            answers.append(response.json()["tinker_path"])
        missing = {"source_path": f"tinker://{run}/weights/later"}
        headers = {"X-Idempotency-Key": "c"}
        assert (await client.post(f"{API}/copy_weights", json=missing, headers=headers)).status_code == 404
        small.checkpoint("local", run, "later")  # a failure is not remembered
        assert (await client.post(f"{API}/copy_weights", json=missing, headers=headers)).status_code == 200
    assert answers[0] == answers[1] != answers[2]


def _entry(kind: str, request_id: str, model_id: str | None, **changes: Any) -> LedgerEntry:
    start = datetime.now(UTC)
    fields: dict[str, Any] = {"owner": "local", "status": "done", "accepted": start, "finished": start, "tokens": 5}
    return LedgerEntry(request_id=request_id, kind=kind, model_id=model_id, **(fields | changes))


async def test_a_session_can_be_seen_as_a_timeline(small: SmallApp) -> None:
    run = small.run("local", "first")
    start = datetime.now(UTC)
    small.store.ledger.append(
        [
            _entry("OptimStep", f"{run}:req:a", run, accepted=start, finished=start + timedelta(milliseconds=250)),
            _entry("Sample", "first:sample:0:req:b", None, status="failed", error="no"),
            _entry("OptimStep", "other:train:0:req:c", "other:train:0"),
            _entry("OptimStep", "first:train:9:req:d", "first:train:9", owner="key-else"),
        ]
    )
    async with small.client() as client:
        answer = await _json(client, "/sessions/first/trace_export")
        assert answer["status"] == "ready"
        trace = (await client.get(_path_of(answer["url"]))).json()
        await _json(client, "/sessions/none/trace_export", 404)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["dur"]) for event in events] == [("OptimStep", 250_000), ("Sample", 0)]
    assert events[1]["args"]["error"] == "no"
    rows = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert rows == [run, "first:sample:0"]


async def test_the_audit_log_shows_ones_own_saves_of_a_day(small: SmallApp) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    small.store.ledger.append(
        [
            _entry("SaveWeights", "m:req:1", "m"),
            _entry("OptimStep", "m:req:2", "m"),
            _entry("SaveWeights", "m:req:3", "m", owner="key-else"),
            _entry("LoadWeights", "m:req:4", "m", accepted=yesterday),
        ]
    )
    async with small.client() as client:
        assert [e["event"] for e in (await _json(client, "/audit"))["entries"]] == ["checkpoint_saved"]
        old = await _json(client, "/audit", day=yesterday.date().isoformat(), event_type="checkpoints")
        assert [e["event"] for e in old["entries"]] == ["checkpoint_read"]
        assert await _json(client, "/audit", event_type="teams") == {"entries": []}


async def test_the_audit_log_is_not_crowded_out_by_training(small: SmallApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_engine.store.account.AUDIT_ENTRIES", 5)
    small.store.ledger.append([_entry("SaveWeights", "m:req:0", "m")])
    small.store.ledger.append([_entry("OptimStep", f"m:req:{i}", "m") for i in range(1, 10)])
    async with small.client() as client:
        assert [e["event"] for e in (await _json(client, "/audit"))["entries"]] == ["checkpoint_saved"]
        for day in ("0001-01-01", "9999-12-31"):
            assert await _json(client, "/audit", day=day) == {"entries": []}


async def test_bills_are_empty_and_storage_is_counted(small: SmallApp) -> None:
    run = small.run("local")
    async with small.client() as client:
        events = await _json(
            client, "/billing/usage/events", starting_on="2026-01-01T00:00:00Z", ending_before="2026-01-02T00:00:00Z"
        )
        assert events["data"] == []
        assert (await _json(client, "/billing/usage/checkpoints/current"))["data"] == []
        small.checkpoint("local", run)
        (item,) = (await _json(client, "/billing/usage/checkpoints/current"))["data"]
        assert (item["checkpoint_count"], item["size_bytes"]) == (1, 10_248)
        assert item["estimated_monthly_cost_usd"] is None
