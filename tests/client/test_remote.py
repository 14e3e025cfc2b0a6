"""Our client over a bad network: applied once, in order, given up in time, and nothing left behind."""

from __future__ import annotations

import random
import threading

import httpx
import pytest
from fake_server import FakeServer
from remote_helpers import DATUM, eventually, path_of

import mint
from mint import types
from mint_engine.client.remote import Address, Patience
from mint_engine.errors import NonFiniteError, StorageError, UserError

pytestmark = pytest.mark.usefixtures("quick_retries")


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


def test_an_interpolation_whose_result_is_lost_says_so(service, server):
    server.after = lambda request, _: server.forget_promises()
    future = service.create_rest_client().interpolate_checkpoints(["tinker://r/sampler_weights/a"], [1.0])
    with pytest.raises(mint.TransportError, match=r"MintInterpolateCheckpoints: the server accepted this .* lost its"):
        future.result()
    assert server.requests["mint/checkpoints/interpolate"] == 1


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
        (401, {"detail": "the key is wrong"}, mint.AuthenticationError, "^the key is wrong$"),
        (402, {"detail": "first the bill"}, mint.BillingError, "^first the bill$"),
        (403, {"detail": "not from there"}, mint.PermissionDeniedError, "^not from there$"),
        (404, {"detail": "no model"}, mint.NotFoundError, "^no model$"),
        (
            422,
            {"detail": [{"loc": ["body", "rank"], "msg": "too large"}]},
            mint.UnprocessableEntityError,
            "^rank: too large$",
        ),
        (418, None, mint.UserError, "418"),
        (301, None, mint.TransportError, "redirects to nowhere"),
        (200, "not json", mint.APIResponseValidationError, "Is this a mint-engine server's address"),
        (500, {"detail": "bug"}, mint.InternalServerError, "500 Internal Server Error: bug .tried 4 times"),
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


def test_samples_are_not_told_token_by_token_and_it_says_so(trainer):
    sampler = trainer.save_weights_and_get_sampling_client()
    with pytest.raises(UserError, match="on_token: only an engine in this process"):
        sampler.sample([1, 2, 3], on_token=print).result()
