"""Samplers in memory and on disk, and what is remembered of them."""

from __future__ import annotations

import pytest
from api import Api, prompt, until
from server_fixture import LiveServer, live_server
from stub_engine import BASE, StubEngine


def ask(api: Api, sampler: str, seq_id: int) -> str:
    request = api.ok("asample", sampling_session_id=sampler, seq_id=seq_id, prompt=prompt(1), num_samples=1)
    return str(request["request_id"])


def named(api: Api, session: str, number: int) -> str:
    body = {"session_id": session, "sampling_session_seq_id": number, "base_model": BASE}
    return str(api.ok("create_sampling_session", **body)["sampling_session_id"])


def inflight(api: Api, model: str, number: int) -> str:
    body = {"model_id": model, "seq_id": number + 1, "sampling_session_seq_id": number, "kind": "inflight"}
    return str(api.result("save_weights_for_sampler", **body)["sampling_session_id"])


def test_samplers_with_a_name_do_not_pile_up_in_memory(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], max_resident_samplers=2) as live, Api(live.url) as api:
        session = api.session()
        samplers = [named(api, session, n) for n in range(20)]
        until(lambda: len(engine.samplers) <= 5)  # those just asked for may be about to be used
        assert api.retrieve(ask(api, samplers[0], 0)).json()["sequences"], "one that was let go comes back"


def test_a_session_keeps_so_many_unnamed_samplers_on_disk(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_engine.server.samplers._GRACE_S", -1.0)
    with live_server(engine, models=[BASE], max_resident_samplers=2) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        samplers = [api.sampler(model, n + 1, n) for n in range(12)]
        until(lambda: len(engine.samplers) == 2)
        until(lambda: engine.store.parked_ids(session, "sample") == samplers[8:10])


# ---- what has ended --------------------------------------------------------------------------------------------------


def poll(api: Api, sampler: str, clone: int = 0, cursor: int = 0, timeout: float = 0) -> dict:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return api.ok("retrieve_futures", target=target, prev_cursor=cursor, timeout=timeout)


def ended(answer: dict) -> list[str]:
    return [completion["request_id"] for completion in answer["completions"]]


def known(live: LiveServer) -> int:
    return len(live.state.promises._promises)


def test_who_polls_for_all_samples_keeps_no_results(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], result_ttl_s=0.2, fetched_ttl_s=0.2) as live, Api(live.url) as api:
        sampler = named(api, api.session(), 0)
        poll(api, sampler)
        for i in range(5):
            api.retrieve(ask(api, sampler, i))
        seen = poll(api, sampler)
        assert len(ended(seen)) == 5
        until(lambda: known(live) == 0)
        assert ended(poll(api, sampler)) == [], "their results are gone"
        late = ask(api, sampler, 5)
        assert ended(poll(api, sampler, cursor=seen["cursor"], timeout=5)) == [late]


def test_numbers_that_nobody_was_given_take_no_memory(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE]) as live, Api(live.url) as api:
        sampler = named(api, api.session(), 0)
        given = api.ok("join_sampling_session", sampling_session_id=sampler)["client_counter"]
        for clone in range(1000, 1050):
            assert poll(api, sampler, clone)["completions"] == []
        mine = ask(api, sampler, given * 10**9)
        assert ended(poll(api, sampler, given, timeout=5)) == [mine]
        before_a_restart = ask(api, sampler, 7 * 10**9)
        assert ended(poll(api, sampler, 7, timeout=5)) == [before_a_restart], "who samples with a number has it"
        assert len(live.state.samplers._entries[sampler].completions) <= 4


# ---- the newest weights ----------------------------------------------------------------------------------------------


def test_inflight_samplers_keep_the_newest_weights_through_silence_and_restart(engine: StubEngine) -> None:
    def sampled() -> str:
        api.retrieve(ask(api, samplers[0], len(engine.calls)))
        return str([call for call in engine.calls if call.name == "sample"][-1].arguments["sampler_id"])

    settings = {"models": [BASE], "park_on_shutdown": True}
    with live_server(engine, session_timeout_s=0.3, **settings) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        other = api.model(BASE, session, 1)
        samplers = [inflight(api, model, n) for n in range(2)]
        inflight_of_another = api.result(
            "save_weights_for_sampler", model_id=other, seq_id=1, sampling_session_seq_id=9, kind="inflight"
        )["sampling_session_id"]
        assert sampled() == samplers[1]
        until(lambda: not engine.samplers)
        until(lambda: live.state.samplers._newest == {})  # it goes with the samplers
        assert sampled() == samplers[1]
        assert inflight_of_another != samplers[1]
    with live_server(engine, **settings) as live, Api(live.url) as api:
        assert sampled() == samplers[1]
        samplers.append(inflight(api, model, 2))
        assert sampled() == samplers[2]


def test_a_copy_of_an_old_save_does_not_make_its_sampler_the_newest(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE]) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        save = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0, "kind": "inflight"}
        promise = api.ok("save_weights_for_sampler", **save)
        second = inflight(api, model, 1)
        entry = live.state.samplers._entries[f"{session}:sample:0"]
        assert api.ok("save_weights_for_sampler", **save) == promise
        assert live.state.samplers._newest == {model: second}
        assert live.state.samplers._entries[f"{session}:sample:0"] is entry
