"""Samplers and samples over real HTTP, with an engine that does what the test says."""

from __future__ import annotations

import threading

import pytest
from api import Api, sample, until
from server_fixture import live_server
from stub_engine import BASE, StubEngine

from mint_engine import wire


def test_a_sample_s_promise_carries_its_sequence_ids(api: Api) -> None:
    sampler = api.sampler(api.model(BASE), 1)
    promise = api.ok("asample", **sample(sampler, seq_id=5))
    assert promise["sample_sequence_ids"] == [f"{sampler}:seq:5:0", f"{sampler}:seq:5:1"]
    answer = api.retrieve(promise["request_id"], wire.PROTOBUF)
    assert [s.tokens for s in wire.parse_sample_response(answer.content).sequences] == [[7, 0], [7, 1]]


def test_a_sample_that_is_asked_for_twice_is_drawn_once(api: Api, engine: StubEngine) -> None:
    sampler = api.sampler(api.model(BASE), 1)
    engine.take()
    stop = {"sampling_params": {"stop": ["\n"]}}
    for more in ({}, stop):
        promises = [api.ok("asample", **sample(sampler, seq_id=len(more), **more)) for _ in range(3)]
        assert promises[0] == promises[1] == promises[2]
    assert engine.names() == ["sample", "sample"]


def test_samples_are_refused_for_a_while_when_too_many_wait(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], sample_queue_limit=3) as live, Api(live.url) as api:
        sampler = api.sampler(api.model(BASE), 1)
        engine.waiting_samples = 3
        busy = api.post("asample", **sample(sampler))
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        engine.waiting_samples = 0
        assert api.ok("asample", **sample(sampler))["request_id"], "the same number is taken later"


def test_a_sample_without_an_end_counts_as_long_as_the_context(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], memory_budget_bytes=1 << 20) as live, Api(live.url) as api:
        sampler = api.sampler(api.model(BASE), 1)
        engine.hold = True
        assert api.post("asample", **sample(sampler, 0, topk_sample_logprobs=2)).status_code == 200
        assert live.state.promises.pending_bytes > 2 * 4000 * 2 * 100
        assert api.post("asample", **sample(sampler, 1, topk_sample_logprobs=2)).status_code == 429
        for call in engine.take():
            call.finish()


def test_a_cancelled_sample_stops(api: Api, engine: StubEngine) -> None:
    sampler = api.sampler(api.model(BASE), 1)
    engine.hold = True
    promise = api.ok("asample", **sample(sampler))
    api.ok("cancel_future", request_id=promise["request_id"])
    assert engine.cancelled == [engine.calls[-1].future]
    assert "cancelled" in api.retrieve(promise["request_id"]).json()["error"]
    assert api.post("cancel_future", request_id="req:unknown").status_code == 404


def test_a_sampler_of_a_checkpoint_that_is_not_there_is_refused_at_once(api: Api, engine: StubEngine) -> None:
    session = api.session()
    model = api.model(BASE, session)
    path = engine.add_checkpoint(model, "sampler_weights")
    body = {"session_id": session, "sampling_session_seq_id": 0}
    assert api.post("create_sampling_session", **body, model_path=path + "x").status_code == 404
    wrong = api.post("create_sampling_session", **body, model_path=path, base_model="other/base")
    assert wrong.status_code == 400
    assert api.ok("create_sampling_session", **body, model_path=path)["sampling_session_id"] == f"{session}:sample:0"


def test_copies_of_a_sampling_client_get_numbers_of_their_own(api: Api) -> None:
    sampler = api.sampler(api.model(BASE), 1)
    numbers = [api.ok("join_sampling_session", sampling_session_id=sampler)["client_counter"] for _ in range(5)]
    assert len(set(numbers)) == 5
    assert min(numbers) >= 1
    assert max(numbers) * 10**9 < 2**63


def test_all_samples_of_a_client_are_polled_at_once(api: Api, engine: StubEngine) -> None:
    sampler = api.sampler(api.model(BASE), 1)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    engine.hold = True
    mine = [api.ok("asample", **sample(sampler, seq_id=i))["request_id"] for i in range(3)]
    api.ok("asample", **sample(sampler, seq_id=10**9))
    nothing = api.ok("retrieve_futures", target=target, prev_cursor=0, timeout=0)
    assert nothing["completions"] == []
    calls = engine.take()[-4:]
    for call in (*calls[:2], calls[3]):
        call.finish()
    first = api.ok("retrieve_futures", target=target, prev_cursor=nothing["cursor"])
    assert [c["request_id"] for c in first["completions"]] == mine[:2], "not those of the other client"
    size = first["completions"][0]["response_payload_uncompressed_size"]
    assert len(api.retrieve(mine[0], wire.PROTOBUF).content) == size
    threading.Timer(0.1, calls[2].finish, [ValueError("broken")]).start()
    second = api.ok(
        "retrieve_futures", target=target, prev_cursor=first["cursor"], retrieved_request_ids=mine[:2], timeout=10
    )
    assert second["completions"] == [{"state": "failed", "request_id": mine[2]}], "waited for"


def test_inflight_samplers_of_a_model_share_its_newest_weights(api: Api, engine: StubEngine) -> None:
    model, samplers = api.model(BASE), []
    for n, kind in enumerate(("inflight", "snapshot", "inflight")):
        saved = api.result(
            "save_weights_for_sampler", model_id=model, seq_id=n + 1, sampling_session_seq_id=n, kind=kind
        )
        samplers.append(saved["sampling_session_id"])
    engine.take()
    for sampler in samplers:
        api.ok("asample", **sample(sampler))
    assert [c.arguments["sampler_id"] for c in engine.calls] == [samplers[2], samplers[1], samplers[2]]


def test_only_the_samplers_used_last_stay_in_memory(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_engine.server.samplers._GRACE_S", -1.0)
    with live_server(engine, models=[BASE], max_resident_samplers=2) as live, Api(live.url) as api:
        model = api.model(BASE)
        samplers = [api.sampler(model, n + 1, n) for n in range(5)]
        until(lambda: len(engine.samplers) == 2)
        assert api.result("asample", **sample(samplers[0]))["sequences"], "an old one comes back"


def test_a_sample_of_before_a_restart_is_gone_and_others_are_unknown(api: Api) -> None:
    """410 makes the SDK sample again; 404 is an error."""
    sampler = api.sampler(api.model(BASE), 1)
    assert api.post("retrieve_future", request_id=f"{sampler}:req:lost").status_code == 410
    for unknown in ("req:x", "s:sample:9:req:x", "s:train:0:req:x", "x"):
        assert api.post("retrieve_future", request_id=unknown).status_code == 404
