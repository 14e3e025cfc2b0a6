"""Our client over a bad network: applied once, in order, given up in time, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from fake_engine import FakeEngine
from fake_server import FakeServer

import mint
from mint import types
from mint_engine.client.remote import Address, Patience, RemoteEngine, transport
from mint_engine.errors import NonFiniteError, StorageError

ADDRESS = Address("http://server", api_key="tml-key")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1, 1]}
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(transport, "LAST_DELAY", 0.01)


@pytest.fixture
def engine(tmp_path) -> FakeEngine:
    return FakeEngine(tmp_path / "home")


@pytest.fixture
def server(engine) -> FakeServer:
    return FakeServer(engine)


@pytest.fixture
def connect(server, engine) -> Iterator[Callable[..., RemoteEngine]]:
    made: list[RemoteEngine] = []

    def make(address: Address = ADDRESS, **options) -> RemoteEngine:
        made.append(RemoteEngine(address, wire=server, **options))
        return made[-1]

    yield make
    server.fault = server.after = None
    engine.gate.set()
    for remote in made:
        remote.close()


@pytest.fixture
def service(connect) -> mint.ServiceClient:
    return mint.ServiceClient(engine=connect())


@pytest.fixture
def trainer(service) -> mint.TrainingClient:
    return service.create_lora_training_client("tiny")


def path_of(request: httpx.Request) -> str:
    return request.url.path.removeprefix("/api/v1/")


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# --- once, and in order


def test_a_request_whose_answer_is_lost_is_sent_again_and_applied_once(trainer, server):
    lost: set[str] = set()

    def lose_every_first_answer(request: httpx.Request, _: FakeServer) -> None:
        if path_of(request) != "retrieve_future" and path_of(request) not in lost:
            lost.add(path_of(request))
            raise httpx.ReadError("gone", request=request)

    server.after = lose_every_first_answer
    trainer.forward_backward([DATUM])
    trainer.optim_step(types.AdamParams())
    assert trainer.save_state("a").path.endswith("/weights/a")
    assert lost >= {"forward_backward", "optim_step", "save_weights"}
    assert [kind for _, _, kind in server.applied] == ["ForwardBackward", "OptimStep", "SaveWeights"]
    assert [seq for _, seq, _ in server.applied] == [1, 2, 3]


def test_any_mixture_of_faults_changes_nothing_but_the_time_it_takes(trainer, server):
    rng = random.Random(0)

    def before(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        match rng.randrange(8):
            case 0:
                raise httpx.ConnectError("refused", request=request)
            case 1:
                return httpx.Response(502, text="<html>bad gateway</html>")
            case 2:
                return httpx.Response(503, headers={"retry-after": "0"}, json={"detail": "restarting"})
            case 3:
                return httpx.Response(429, headers={"retry-after-ms": "1"}, json={"detail": "later"})
        return None

    def after(request: httpx.Request, _: FakeServer) -> None:
        match rng.randrange(6):
            case 0:
                raise httpx.ReadTimeout("slow", request=request)
            case 1:
                raise httpx.RemoteProtocolError("hung up", request=request)

    server.fault, server.after = before, after
    steps = [(trainer.forward_backward([DATUM]), trainer.optim_step(types.AdamParams())) for _ in range(20)]
    for backward, step in steps:
        assert backward.loss == 2.0
        assert step.metrics == {"grad_norm": 1.0}
    assert [seq for _, seq, _ in server.applied] == list(range(1, 41))
    assert [kind for _, _, kind in server.applied] == ["ForwardBackward", "OptimStep"] * 20


def test_calls_of_many_threads_each_get_a_number_of_their_own(trainer, server):
    futures: list[mint.APIFuture] = []

    def call() -> None:
        futures.extend(trainer.forward([DATUM]) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(future.loss == 2.0 for future in futures)
    assert [seq for _, seq, _ in server.applied] == list(range(1, 161))


def test_a_refused_call_uses_up_its_number_and_the_next_one_runs(trainer, server):
    def too_large(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        if path_of(request) == "optim_step" and server.requests["optim_step"] == 1:
            return httpx.Response(413, json={"detail": "too large: expected at most 10 bytes, got 11"})
        return None

    server.fault = too_large
    with pytest.raises(mint.UserError, match="at most 10 bytes"):
        trainer.optim_step(types.AdamParams()).result()
    trainer.optim_step(types.AdamParams()).result()
    # A server that could not read the request must not wait for number 1: something harmless is sent under it.
    assert server.applied == [(trainer.model_id, 1, "Forward"), (trainer.model_id, 2, "OptimStep")]


def test_a_call_that_cannot_be_written_uses_up_no_number(trainer, server):
    with pytest.raises(mint.UserError, match="an argument cannot be sent"):
        trainer.save_state("a", ttl_seconds=object()).result()
    trainer.optim_step(types.AdamParams()).result()
    assert server.applied == [(trainer.model_id, 1, "OptimStep")]


def test_after_a_call_without_an_answer_the_model_is_not_used_any_more(connect, server):
    remote = connect(patience=Patience(unknown=0.1, known=0.1))
    service = mint.ServiceClient(engine=remote)
    trainer, other = (service.create_lora_training_client("tiny") for _ in range(2))

    def lose(request: httpx.Request, _: FakeServer) -> None:
        if path_of(request) == "forward_backward":
            raise httpx.ReadError("gone", request=request)

    server.fault = lose
    first, second = trainer.forward_backward([DATUM]), trainer.optim_step(types.AdamParams())
    with pytest.raises(mint.TransportError, match=r"forward_backward: gone \(tried \d+ times"):
        first.result()
    with pytest.raises(mint.TransportError, match="nobody knows whether it was applied; make a new training client"):
        second.result()
    assert other.optim_step(types.AdamParams()).metrics == {"grad_norm": 1.0}
    assert [model for model, _, _ in server.applied] == [other.model_id]


def test_a_server_started_anew_is_asked_again_under_the_same_number(trainer, server, engine):
    engine.gate.clear()
    backward, step = trainer.forward_backward([DATUM]), trainer.optim_step(types.AdamParams())
    eventually(lambda: server.requests["retrieve_future"] >= 2)
    server.forget_promises()
    engine.gate.set()
    assert backward.loss == 2.0
    assert step.metrics == {"grad_norm": 1.0}
    assert [seq for _, seq, _ in server.applied] == [1, 2]


# --- large batches


def test_a_large_batch_goes_in_parts_and_comes_back_whole(connect, server):
    server.config = {"fwdbwd_max_chunk_len": 4, "fwdbwd_max_chunk_bytes_count": 10**6}
    trainer = mint.ServiceClient(engine=connect()).create_lora_training_client("tiny")
    output = trainer.forward_backward([DATUM] * 10).result()
    assert server.requests["forward_backward"] == 3
    assert len(output.loss_fn_outputs) == 10
    assert output.metrics["loss:sum"] == 40.0
    assert output.loss == 2.0
    custom = trainer.forward_backward_custom([DATUM] * 5, lambda data, lps: (sum(lp.sum() for lp in lps), {"n": 5}))
    assert custom.metrics["n"] == 5
    assert custom.metrics["loss:sum"] == -20.0
    assert [seq for _, seq, _ in server.applied] == list(range(1, 8))


def test_a_part_that_is_refused_says_that_the_others_were_taken(connect, server):
    server.config = {"fwdbwd_max_chunk_len": 1}
    trainer = mint.ServiceClient(engine=connect()).create_lora_training_client("tiny")

    def refuse_second(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        if path_of(request) == "forward_backward" and server.requests["forward_backward"] == 2:
            return httpx.Response(400, json={"detail": "weights: expected 2 values"})
        return None

    server.fault = refuse_second
    with pytest.raises(mint.UserError, match="weights: expected 2 values") as caught:
        trainer.forward_backward([DATUM] * 3).result()
    assert "first 1 parts of this large batch were accepted" in caught.value.__notes__[0]


# --- a loss of one's own


def test_later_calls_wait_for_a_loss_of_one_s_own_and_its_error_reaches_its_future(trainer, server, service):
    entered, release = threading.Event(), threading.Event()

    def loss(data, logprobs):
        entered.set()
        assert release.wait(10)
        return logprobs[0].sum(), {}

    custom, step = trainer.forward_backward_custom([DATUM], loss), trainer.optim_step(types.AdamParams())
    assert entered.wait(10)
    other = service.create_lora_training_client("tiny")
    assert other.optim_step(types.AdamParams()).metrics, "another model does not wait"
    assert [kind for model, _, kind in server.applied if model == trainer.model_id] == ["Forward"]
    release.set()
    assert custom.metrics["loss:sum"] == -4.0
    assert step.metrics
    applied = [(seq, kind) for model, seq, kind in server.applied if model == trainer.model_id]
    assert applied == [(1, "Forward"), (2, "ForwardBackward"), (3, "OptimStep")]

    def ends_the_program(data, logprobs):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        trainer.forward_backward_custom([DATUM], ends_the_program).result()
    assert trainer.optim_step(types.AdamParams()).metrics, "the loop lives on, and no number is missing"
    assert [seq for model, seq, _ in server.applied if model == trainer.model_id][-2:] == [4, 5]


# --- errors


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (NonFiniteError("loss: nan"), NonFiniteError),
        (mint.NotFoundError("there is no checkpoint"), mint.NotFoundError),
        (mint.CheckpointError("damaged"), mint.CheckpointError),
        (StorageError("the disk is full"), StorageError),
        (KeyError("a bug"), mint.MintError),
    ],
)
def test_a_failed_call_raises_what_it_raises_in_process(trainer, engine, monkeypatch, error, raised):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(engine, "_output", fail)
    caught = trainer.forward([DATUM]).exception()
    assert type(caught) is raised
    assert str(error) in str(caught)


@pytest.mark.parametrize(
    ("status", "body", "raised", "message"),
    [
        (400, {"detail": "rank: 300"}, mint.UserError, "^rank: 300$"),
        (401, {"detail": "the key is wrong"}, mint.UserError, "^the key is wrong$"),
        (404, {"detail": "no model"}, mint.NotFoundError, "^no model$"),
        (422, {"detail": [{"loc": ["body", "rank"], "msg": "too large"}]}, mint.UserError, "^rank: too large$"),
        (418, None, mint.UserError, "418"),
        (301, None, mint.TransportError, "redirects to nowhere"),
        (200, "not json", mint.TransportError, "Is this a mint-engine server's address"),
        (500, {"detail": "bug"}, mint.TransportError, "500 Internal Server Error: bug .tried 4 times"),
    ],
)
def test_a_refusal_carries_the_server_s_sentence(service, server, status, body, raised, message):
    content = {"json": body} if isinstance(body, (dict, list)) else {"text": body or ""}
    server.fault = lambda request, _: httpx.Response(status, **content)
    with pytest.raises(raised, match=message):
        service.create_rest_client().list_sessions().result()


def test_a_missing_key_is_explained(connect, server):
    server.fault = lambda request, _: httpx.Response(401, json={"detail": "a key is needed"})
    with pytest.raises(mint.UserError, match=r"a key is needed \(set MINT_API_KEY, or pass api_key\)"):
        mint.ServiceClient(engine=connect(Address("http://server")))


def test_a_page_that_is_no_server_of_ours_is_recognised(connect, server):
    server.fault = lambda request, _: httpx.Response(200, html="<html>Welcome</html>")
    with pytest.raises(mint.TransportError, match=r"expected .*<html>Welcome.*Is this a mint-engine server"):
        mint.ServiceClient(engine=connect())


def test_a_server_that_was_never_reached_is_given_up_soon(connect, server):
    def refuse(request: httpx.Request, _: FakeServer) -> None:
        raise httpx.ConnectError("connection refused", request=request)

    server.fault = refuse
    remote = connect(patience=Patience(unknown=0.2, known=60))
    with pytest.raises(mint.TransportError, match=r"connection refused .*Is a server running at http://server"):
        mint.ServiceClient(engine=remote)
    with pytest.raises(mint.TransportError, match="tried once"):
        mint.ServiceClient(engine=connect(Address("http://server", max_retries=0)))
    server.fault = None
    assert mint.ServiceClient(engine=remote).session_id, "once it is there, it is used"


def test_the_server_gets_the_key_the_headers_and_one_idempotency_key_for_all_tries(connect, server):
    tries = []

    def fail_twice(request: httpx.Request, _: FakeServer) -> httpx.Response | None:
        if path_of(request) == "create_session":
            tries.append(request.headers["x-idempotency-key"])
            return httpx.Response(503) if len(tries) < 3 else None
        return None

    server.fault = fail_twice
    mint.ServiceClient(engine=connect(Address("http://server", "tml-key", headers=(("X-Team", "a"),))))
    assert len(tries) == 3
    assert len(set(tries)) == 1
    assert {request.headers["x-api-key"] for request in server.seen} == {"tml-key"}
    assert {request.headers["x-team"] for request in server.seen} == {"a"}


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
    with pytest.raises(KeyboardInterrupt), mint.ServiceClient(engine=connect(beat_seconds=0.01)) as service:
        raise KeyboardInterrupt
    assert server.finished == [(service.session_id, "interrupted")]
    service.close()
    del service
    gc.collect()
    seen = server.requests["session_heartbeat"]
    time.sleep(0.1)
    assert server.requests["session_heartbeat"] == seen
    assert len(server.finished) == 1


def test_samplers_work_on_after_the_session_was_closed_and_end_it_when_they_are_gone(service, server):
    trainer = service.create_lora_training_client("tiny")
    sampler = trainer.save_weights_and_get_sampling_client()
    service.close("errored")
    assert len(sampler.sample([1, 2]).sequences) == 1
    assert server.finished == [], "a server forgets an unnamed sampler with its session"
    del sampler
    gc.collect()
    eventually(lambda: server.finished == [(service.session_id, "errored")])


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
