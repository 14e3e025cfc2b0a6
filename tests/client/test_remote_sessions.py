"""Our client over HTTP: sessions that live as long as their clients, samples by the thousand, the end."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time

import httpx
import pytest
from fake_server import FakeServer
from remote_helpers import DATUM, eventually, path_of

import mint
from mint import types
from mint_engine.client.remote import Address, Patience
from mint_engine.errors import TransportError

pytestmark = pytest.mark.usefixtures("quick_retries")

# --- sessions


def test_heartbeats_go_on_while_any_client_is_held_and_stop_with_the_last(connect, server):
    service = mint.ServiceClient(engine=connect(beat_seconds=0.01))
    session = service.session_id
    trainer = service.create_lora_training_client("tiny")
    sampler = trainer.save_weights_and_get_sampling_client()
    del service, trainer
    gc.collect()
    seen = server.requests["session_heartbeat"]
    eventually(lambda: server.requests["session_heartbeat"] > seen + 2)
    assert server.finished == []
    assert len(sampler.sample([1, 2]).sequences) == 1
    del sampler
    gc.collect()
    eventually(lambda: server.finished == [(session, "success")])
    assert len(server.unloaded) == 1
    seen = server.requests["session_heartbeat"]
    time.sleep(0.1)
    assert server.requests["session_heartbeat"] == seen


def test_a_closed_session_stops_its_heartbeats_and_is_finished_once(connect, server):
    service = mint.ServiceClient(engine=connect(beat_seconds=0.01))
    session = service.session_id
    with pytest.raises(KeyboardInterrupt), service:
        raise KeyboardInterrupt
    eventually(lambda: server.finished == [(session, "interrupted")])
    service.close()
    del service
    gc.collect()
    seen = server.requests["session_heartbeat"]
    time.sleep(0.1)
    assert server.requests["session_heartbeat"] == seen
    assert len(server.finished) == 1


def test_an_interrupted_program_does_not_wait_for_a_server_that_is_gone(service, trainer, server):
    def refuse(request: httpx.Request, _: FakeServer) -> None:
        raise httpx.ConnectError("connection refused", request=request)

    server.fault = refuse
    trainer.optim_step(types.AdamParams())
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), service:
        raise KeyboardInterrupt
    assert time.monotonic() - started < 2


def test_samplers_work_on_after_the_session_was_closed_and_end_it_when_they_are_gone(service, server):
    trainer = service.create_lora_training_client("tiny")
    sampler = trainer.save_weights_and_get_sampling_client()
    service.close("errored")
    assert len(sampler.sample([1, 2]).sequences) == 1
    assert server.finished == [], "a server forgets an unnamed sampler with its session"
    del sampler
    gc.collect()
    eventually(lambda: server.finished == [(service.session_id, "errored")])


def test_a_closed_training_client_is_refused_and_given_no_old_result(service, server):
    trainer = service.create_lora_training_client("tiny")
    sampler = trainer.save_weights_and_get_sampling_client()  # so that the session lives on
    trainer.optim_step(types.AdamParams()).result()
    service.close()
    applied, asked = list(server.applied), len(server.seen)
    for call in (
        lambda: trainer.forward_backward([DATUM]),
        lambda: trainer.optim_step(types.AdamParams()),
        lambda: trainer.save_state("late"),
    ):
        with pytest.raises(mint.NotFoundError, match=r"there is no model 'session-0:train:0' \(unloaded\)"):
            call().result()
    assert (server.applied, len(server.seen)) == (applied, asked)
    assert len(sampler.sample([1, 2]).sequences) == 1


def test_a_dropped_training_client_is_unloaded_after_what_was_asked_of_it(service, server, engine):
    engine.gate.clear()
    creating = threading.Timer(0.05, engine.gate.set)
    creating.start()
    step = service.create_lora_training_client("tiny").optim_step(types.AdamParams())
    gc.collect()
    assert step.metrics == {"grad_norm": 1.0}
    eventually(lambda: [name for name, _ in engine.log] == ["create_model", "optim_step", "unload_model"])


def test_a_heartbeat_that_fails_is_made_good_and_one_that_is_refused_ends_them(connect, server, caplog):
    answers = iter([503, 200, 410])

    def beat(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        if path_of(request) == "session_heartbeat":
            return httpx.Response(next(answers), json={})
        return None

    server.fault = beat
    service = mint.ServiceClient(engine=connect(beat_seconds=0.01))
    eventually(lambda: "is over, says the server" in caplog.text)
    assert server.requests["session_heartbeat"] == 3
    assert service.create_lora_training_client("tiny").model_id


# --- sampling


@pytest.mark.parametrize("times", [9, 10])
def test_a_sample_that_is_forgotten_is_asked_for_again_but_not_for_ever(service, server, times):
    """A server keeps no samples through a restart; one that never has the result ends in an error."""
    forgotten = iter([410] * times)

    def forget(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        if path_of(request) == "retrieve_future" and (status := next(forgotten, None)):
            return httpx.Response(status, json={"detail": "not kept any more"})
        return None

    sampler = service.create_sampling_client(base_model="tiny")
    server.fault = forget
    if times == 10:
        with pytest.raises(TransportError, match=r"lost this request 10 times: not kept any more"):
            sampler.sample([1, 2]).result()
    else:
        assert len(sampler.sample([1, 2]).sequences) == 1
    assert server.requests["asample"] == 10


def test_a_thousand_samples_need_no_thread_each_and_no_more_connections_than_the_server_wants(connect, server, engine):
    server.config = {"sample_max_concurrent_requests": 50}
    sampler = mint.ServiceClient(engine=connect()).create_sampling_client(base_model="tiny")
    engine.gate.clear()
    before = threading.active_count()
    futures = [sampler.sample([1, 2, i]) for i in range(1000)]
    eventually(lambda: server.requests["asample"] == 50)
    assert threading.active_count() <= before
    engine.gate.set()
    assert all(len(future.sequences) == 1 for future in futures)
    assert server.requests["asample"] == 1000
    ids = {future.sequences[0].sequence_id for future in futures}
    assert ids == {f"{sampler.sampler_id}:seq:{n}:0" for n in range(1000)}


def test_samples_are_awaited_in_a_running_loop(service):
    sampler = service.create_sampling_client(base_model="tiny")

    async def main() -> int:
        answers = await asyncio.gather(*(sampler.sample_async([1, i]) for i in range(200)))
        return sum(len(answer.sequences) for answer in answers)

    assert asyncio.run(main()) == 200


def test_back_pressure_is_borne_however_long_it_takes(connect, server):
    service = mint.ServiceClient(engine=connect(patience=Patience(known=0.05)))
    sampler = service.create_sampling_client(base_model="tiny")
    refused = 0

    def later(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        nonlocal refused
        if path_of(request) == "asample" and refused < 30:
            refused += 1
            return httpx.Response(429, headers={"retry-after-ms": "10"}, json={"detail": "later"})
        return None

    server.fault = later
    assert len(sampler.sample([1, 2]).sequences) == 1
    assert server.applied[-1][1:] == (0, "Sample")


def test_a_sample_of_a_server_started_anew_is_made_again(service, server, engine):
    sampler = service.create_sampling_client(base_model="tiny")
    engine.gate.clear()
    future = sampler.sample([1, 2])
    eventually(lambda: server.requests["retrieve_future"] >= 1)
    server.forget_promises()
    engine.gate.set()
    assert len(future.sequences) == 1


def test_a_cancelled_sample_is_cancelled_on_the_server(service, server, engine):
    sampler = service.create_sampling_client(base_model="tiny")
    engine.gate.clear()
    future = sampler.sample([1, 2])
    eventually(lambda: server.requests["retrieve_future"] >= 1)
    assert future.future().cancel()
    eventually(lambda: len(server.cancelled) == 1)


def test_a_training_call_cannot_be_cancelled_half_way(trainer, engine):
    engine.gate.clear()
    step = trainer.optim_step(types.AdamParams())
    assert not step.future().cancel()
    engine.gate.set()
    assert step.metrics == {"grad_norm": 1.0}


def test_a_copy_of_a_sampling_client_counts_in_a_block_of_its_own(connect, server, monkeypatch):
    from mint_engine.client import sampling_client

    remote, elsewhere = connect(), connect()
    sampler = mint.ServiceClient(engine=remote).create_sampling_client(base_model="tiny")
    monkeypatch.setattr(sampling_client, "connect", lambda address: elsewhere)
    copy = pickle.loads(pickle.dumps(sampler))
    assert (copy.sampler_id, copy.get_base_model()) == (sampler.sampler_id, "tiny")
    for client in (sampler, copy, sampler, copy):
        assert len(client.sample([1, 2]).sequences) == 1
    numbers = [seq for scope, seq, _ in server.applied if scope == sampler.sampler_id]
    assert numbers[0::2] == [0, 1]
    assert numbers[1] >= 10**9
    assert numbers[1] % 10**9 == 0
    assert numbers[3] == numbers[1] + 1


def test_a_handle_holds_no_key_and_makes_a_client(connect, server, monkeypatch):
    import base64

    from mint_engine.client import connection

    sampler = mint.ServiceClient(engine=connect()).create_sampling_client(base_model="tiny")
    handle = sampler.get_sampler_handle()
    assert "tml-key" not in base64.urlsafe_b64decode(handle).decode()
    asked = []
    elsewhere = connect()
    monkeypatch.setattr(connection, "connect", lambda address: asked.append(address) or elsewhere)
    client = mint.SamplingClient.from_sampler_handle(handle, api_key="tml-mine")
    assert asked == [Address("http://server", "tml-mine")]
    assert len(client.sample([1, 2]).sequences) == 1
    for wrong in ("", "x", base64.urlsafe_b64encode(b"[]").decode()):
        with pytest.raises(mint.UserError, match="handle: expected a string from get_sampler_handle"):
            mint.SamplingClient.from_sampler_handle(wrong)


def test_a_handle_of_another_server_is_not_given_the_environment_s_key(connect, server, monkeypatch):
    from mint_engine.client import connection

    handle = mint.ServiceClient(engine=connect()).create_sampling_client(base_model="tiny").get_sampler_handle()
    asked, elsewhere = [], connect()
    monkeypatch.setattr(connection, "connect", lambda address: asked.append(address) or elsewhere)
    make = mint.SamplingClient.from_sampler_handle
    monkeypatch.delenv("MINT_BASE_URL", raising=False)
    monkeypatch.delenv("MINT_API_KEY", raising=False)
    make(handle)
    monkeypatch.setenv("MINT_API_KEY", "tml-mine")
    for own in ("", "https://server", "http://server:8000", "http://server.org", "other"):
        monkeypatch.setenv("MINT_BASE_URL", own)
        with pytest.raises(mint.UserError, match="api_key: expected one for http://server, which the handle names"):
            make(handle)
    make(handle, api_key="tml-given")
    make(handle, base_url="http://chosen")
    monkeypatch.setenv("MINT_BASE_URL", "http://SERVER:80/")
    make(handle)
    assert [(address.url, address.api_key) for address in asked] == [
        ("http://server", None), ("http://server", "tml-given"), ("http://chosen", "tml-mine"),
        ("http://server", "tml-mine"),
    ]  # fmt: skip


def test_a_sampling_client_of_this_process_says_why_it_cannot_leave(engine):
    sampler = mint.ServiceClient(engine=engine).create_sampling_client(base_model="tiny")
    with pytest.raises(pickle.PicklingError, match="samples in this process; one of a server"):
        pickle.dumps(sampler)
    with pytest.raises(mint.UserError, match="samples in this process"):
        sampler.get_sampler_handle()


# --- the end


def test_a_closed_connection_says_so_and_what_was_called_before_has_been_sent(connect, server):
    remote = connect()
    trainer = mint.ServiceClient(engine=remote).create_lora_training_client("tiny")
    for _ in range(10):
        trainer.optim_step(types.AdamParams())
    remote.close(drain=True)
    assert len(server.applied) == 10
    assert server.finished[0][1] == "success"
    with pytest.raises(mint.EngineClosedError, match="the connection to http://server is closed"):
        trainer.optim_step(types.AdamParams()).result()


def test_a_callback_that_would_stop_all_traffic_is_told(trainer, engine):
    engine.gate.clear()
    first, second = trainer.forward([DATUM]), trainer.forward([DATUM])
    seen: list[BaseException] = []

    def wait_for_the_other(_: object) -> None:
        try:
            second.result(timeout=5)
        except RuntimeError as error:
            seen.append(error)

    first.add_done_callback(wait_for_the_other)
    engine.gate.set()
    assert second.loss == 2.0
    assert all("would stop all traffic" in str(error) for error in seen)
