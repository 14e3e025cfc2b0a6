"""What clients ask about their account, in process and over HTTP: audit log, usage, storage, timelines, who one is."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from fake_engine import FakeEngine
from fake_server import FakeServer

import mint
from mint import types
from mint_engine.client.remote import Address, RemoteEngine, account
from mint_engine.store import LedgerEntry


@pytest.fixture(params=["local", "http"])
def reached(request, engine: FakeEngine, server: FakeServer) -> Iterator[FakeEngine | RemoteEngine]:
    if request.param == "local":
        yield engine
        return
    remote = RemoteEngine(Address("http://server"), wire=server)
    yield remote
    remote.close()


@pytest.fixture(params=[mint.RestClient, mint.AdminClient])
def admin(request, reached) -> mint.AdminClient:
    return request.param(engine=reached)


def entry(kind: str, about: str, *, ago: timedelta = timedelta(0)) -> LedgerEntry:
    start = datetime.now(UTC) - ago
    return LedgerEntry(f"{about}:req:{kind}", "local", kind, "done", start, model_id=about, finished=start)


def test_the_audit_log_of_a_day(admin, engine):
    yesterday = timedelta(days=1)
    engine.store.ledger.append(
        [entry("SaveWeights", "m"), entry("OptimStep", "m"), entry("LoadWeights", "n", ago=yesterday)]
    )
    (saved,) = admin.get_audit_log().entries
    assert (saved.event, saved.model_id, saved.event_details["status"]) == ("checkpoint_saved", "m", "done")
    assert saved.timestamp.tzinfo is not None
    day = datetime.now(UTC).date() - yesterday
    (read,) = admin.get_audit_log("checkpoints", day).result().entries
    assert (read.event, read.model_id) == ("checkpoint_read", "n")
    assert asyncio.run(admin.get_audit_log_async(event_type="teams")).entries == []
    assert admin.get_audit_log(day=date(2020, 2, 2)).entries == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.get_audit_log("checkpoint"), "event_type: expected one of all, checkpoints, .*got 'checkpoint'"),
        (lambda a: a.get_audit_log(day="2026-01-01"), "day: expected a datetime.date, got '2026-01-01'"),
        (lambda a: a.get_audit_log(day=datetime(2026, 1, 1, tzinfo=UTC)), "day: expected a datetime.date"),
        (lambda a: a.get_billing_usage("soon", "2026-01-01T00:00:00Z"), "starting_on: .*got 'soon'"),
        (lambda a: a.get_billing_usage("2026-01-01T00:00:00", "2026-01-02T00:00:00Z"), "starting_on: .*timezone"),
        (
            lambda a: a.get_billing_usage("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"),
            "ending_before: expected a time",
        ),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(admin, call, message):
    with pytest.raises(mint.UserError, match=message):
        call(admin)


def test_nobody_is_billed_here(admin, server):
    start = datetime(2026, 7, 13, tzinfo=UTC)
    answer = admin.get_billing_usage(start, "2026-07-14T00:00:00Z").result()
    assert (answer.data, answer.sessions, answer.cost_data_through) == ([], {}, None)
    for request in server.seen:
        assert dict(request.url.params) == {
            "starting_on": "2026-07-13T00:00:00Z",
            "ending_before": "2026-07-14T00:00:00Z",
        }


def test_another_server_s_bill_can_be_read(connect, server):
    hour = {"bucket_start": "2026-07-13T00:00:00Z", "bucket_end": "2026-07-13T01:00:00Z"}
    server.bill = {
        "data": [
            hour | {"event_info": {"type": "training", "token_count": 7}, "session_id": "s", "a new field": 1},
            hour | {"event_info": {"type": "storage", "gigabyte_hours": 0.5}, "estimated_cost_usd": 0.25},
        ],
        "sessions": {"s": {"user_metadata": {"k": "v"}}},
    }
    usage = mint.AdminClient(engine=connect()).get_billing_usage(*hour.values()).result()
    assert usage.data[0].event_info == types.TrainingBillingEvent(token_count=7)
    assert usage.data[1].event_info == types.StorageBillingEvent(gigabyte_hours=0.5)
    assert usage.data[1].estimated_cost_usd == 0.25
    assert usage.sessions["s"].user_metadata == {"k": "v"}


def test_storage_is_counted_by_project(admin, engine, reached):
    for project, names in (("p", "ab"), (None, "c")):
        trainer = mint.ServiceClient(project_id=project, engine=reached).create_lora_training_client("tiny")
        for name in names:
            engine.store.write_checkpoint(
                trainer.model_id, "weights", name, lambda directory: (directory / "file").write_bytes(b"1234567"),
                base_model="tiny", lora=types.LoraConfig(),
            )  # fmt: skip
    items = {item.project_id: item for item in admin.get_current_checkpoint_storage_usage().result().data}
    assert {project: item.checkpoint_count for project, item in items.items()} == {"p": 2, None: 1}
    assert items["p"].size_bytes == 2 * items[None].size_bytes > 0
    assert items["p"].size_gigabytes == items["p"].size_bytes / 1e9
    assert items["p"].estimated_monthly_cost_usd is None
    assert admin.get_current_checkpoint_storage_usage("p").data == [items["p"]]
    assert asyncio.run(admin.get_current_checkpoint_storage_usage_async("none")).data == []


# --- timelines


def test_a_timeline_in_process_is_that_of_the_server_before(engine):
    service = mint.ServiceClient(engine=engine)
    rest, session = service.create_rest_client(), service.session_id
    with pytest.raises(mint.UserError, match=f"there is no timeline of '{session}': .*requests to a server"):
        rest.export_session_trace(session).result()
    with pytest.raises(mint.NotFoundError, match="no session 'other'"):
        rest.export_session_trace("other").result()
    engine.store.ledger.append([entry("OptimStep", f"{session}:train:0"), entry("OptimStep", "other:train:0")])
    url = urlparse(asyncio.run(rest.export_session_trace_async(session)))
    assert url.scheme == "file"
    with open(url2pathname(url.path)) as file:
        events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in events] == ["OptimStep"]


def test_a_timeline_of_a_server_is_waited_for(connect, server, monkeypatch):
    monkeypatch.setattr(account, "TRACE_POLL_SECONDS", 0.001)
    service = mint.ServiceClient(engine=connect())
    rest, session = service.create_rest_client(), service.session_id
    server.traces = [{"status": "pending"}, {"status": "building"}, {"status": "ready", "url": "https://there"}]
    assert rest.export_session_trace(session).result() == "https://there"
    server.traces = [{"status": "failed", "error": "the disk is full"}]
    with pytest.raises(mint.MintError, match="the disk is full"):
        rest.export_session_trace(session).result()
    server.traces = [{"status": "ready"}]
    with pytest.raises(mint.TransportError, match="expected the timeline's url"):
        rest.export_session_trace(session).result()
    with pytest.raises(mint.NotFoundError, match="no session 'other'"):
        rest.export_session_trace("other").result()


# --- who one is


def test_in_process_one_is_who_owns_everything(engine):
    me = mint.RestClient(engine=engine).whoami().result()
    assert (me.user_urn, me.email) == ("local", None)


def test_a_server_says_who_one_is_in_a_token(connect, server):
    def token(claims: dict[str, str]) -> str:
        return f"head.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.signature"

    rest = mint.RestClient(engine=connect())
    server.jwt = token({"sub": "key-1", "org_id": "mint-engine", "email": "me"})
    assert rest.whoami().result() == types.WhoamiResponse(
        user_urn="key-1", org_urn="tml:organization:mint-engine", email="me"
    )
    server.jwt = token({"sub": "key-1", "org_id": "x", "email": ""})
    assert asyncio.run(rest.whoami_async()).email is None
    wrong: list[Callable[[], object]] = [lambda: None, lambda: "a.b", lambda: "abc", lambda: token({"sub": "x"})]
    for make in wrong:
        server.jwt = make()
        with pytest.raises(mint.TransportError, match="expected a JWT"):
            rest.whoami().result()


def test_where_to_look(reached, engine):
    service = mint.ServiceClient(engine=reached)
    trainer = service.create_lora_training_client("tiny")
    if reached is engine:
        assert service.get_console_url() == trainer.get_console_url() == engine.store.home.resolve().as_uri()
    else:
        assert service.get_console_url() == f"http://server/api/v1/sessions/{service.session_id}"
        assert trainer.get_console_url() == f"http://server/api/v1/training_runs/{trainer.model_id}"
