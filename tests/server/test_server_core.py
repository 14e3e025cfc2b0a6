"""The protocol over real HTTP, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import pytest
from api import Api, batch, batch_json, sample, until
from server_fixture import LiveServer, live_server
from stub_engine import BASE, StubEngine

from mint_engine import wire

# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "key", "token", "pyqwest"),
    [("0.38.0", "tml-x", False, True), ("0.22.0", "sk-x", True, False), ("0.22.0", "tml-x", False, False)],
)
def test_each_sdk_gets_the_flags_it_needs(server: LiveServer, version, key, token, pyqwest) -> None:
    with Api(server.url, key) as api:
        config = api.ok("client/config", sdk_version=version)
    assert (config["pjwt_auth_enabled"], config["use_pyqwest_transport"]) == (token, pyqwest)
    assert config["sample_max_concurrent_requests"] > 0
    assert config["custom_loss_server_side"] is False


def test_a_running_sdk_is_told_that_samples_can_be_cancelled(api: Api) -> None:
    assert api.ok("client/dynamic_config", sdk_version="0.38.0")["sample_cancel_enabled"] is True


def test_the_server_says_what_it_serves_and_refuses_other_bases(api: Api) -> None:
    models = api.http.get("get_server_capabilities").json()["supported_models"]
    assert models == [{"model_name": BASE, "max_context_length": 4096, "trainable": True, "sampleable": True}]
    session = api.session()
    refused = api.post("create_model", session_id=session, model_seq_id=0, base_model="other/model")
    assert (refused.status_code, f"serves {BASE}" in refused.text) == (400, True)
    refused = api.post("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="other")
    assert refused.status_code == 400


# ---- promises over HTTP ----------------------------------------------------------------------------------------------


def test_a_post_answers_while_the_engine_works_and_the_poll_is_held(api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    engine.hold = True
    promise = api.ok("optim_step", model_id=model, seq_id=1)
    assert promise["model_id"] == model
    begun = time.monotonic()
    waiting = api.ok("retrieve_future", request_id=promise["request_id"], allow_metadata_only=True)
    assert waiting == {"type": "try_again", "request_id": promise["request_id"], "queue_state": "active"}
    assert time.monotonic() - begun >= 0.45, "held, not answered at once"
    timer = threading.Timer(0.1, engine.calls[-1].finish)
    timer.start()
    assert api.ok("retrieve_future", request_id=promise["request_id"])["metrics"] == {"grad_norm": 1.0}


def test_an_sdk_is_told_to_try_again_by_408(api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    engine.hold = True
    promise = api.ok("optim_step", model_id=model, seq_id=1)
    answer = api.post("retrieve_future", {"x-stainless-lang": "python"}, request_id=promise["request_id"])
    assert (answer.status_code, answer.json()["type"]) == (408, "try_again")


def test_results_can_be_fetched_again(api: Api) -> None:
    promise = api.ok("optim_step", model_id=api.model(BASE), seq_id=1)
    assert api.retrieve(promise["request_id"]).json() == api.retrieve(promise["request_id"]).json()


@pytest.mark.parametrize("accept", ["application/x-protobuf", "application/x-protobuf, application/json"])
def test_forward_backward_speaks_protobuf_both_ways(api: Api, accept: str) -> None:
    model = api.model(BASE)
    promise = api.proto(batch(model, 1)).json()
    answer = api.retrieve(promise["request_id"], accept)
    assert answer.headers["content-type"] == wire.PROTOBUF
    out = wire.parse_forward_backward_output(answer.content)
    assert [len(o["logprobs"]) for o in out.loss_fn_outputs] == [6, 9]
    assert out.metrics["loss:sum"] == 15.0


def test_json_clients_get_json_and_small_results_are_json_for_all(api: Api) -> None:
    model = api.model(BASE)
    for seq_id, path, key in ((1, "forward_backward", "forward_backward_input"), (2, "forward", "forward_input")):
        promise = api.ok(path, **batch_json(model, seq_id, key))
        out = api.retrieve(promise["request_id"]).json()
        assert out["loss_fn_outputs"][0]["logprobs"]["data"] == [-0.5] * 3
        assert "error" not in out
    promise = api.ok("optim_step", model_id=model, seq_id=3)
    assert api.retrieve(promise["request_id"], wire.PROTOBUF).headers["content-type"] == "application/json"


def test_compressed_bodies_are_read(api: Api) -> None:
    model = api.model(BASE)
    body = wire.compress_body(wire.encode_forward_backward(batch(model, 1)))
    headers = {"Content-Type": wire.PROTOBUF, "Content-Encoding": "zstd"}
    answer = api.http.post("forward_backward", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    broken = api.http.post("forward_backward", content=body[:-9], headers=headers)
    assert broken.status_code == 400


def test_a_large_result_is_announced_first(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], inline_result_bytes=100) as live, Api(live.url) as api:
        promise = api.proto(batch(api.model(BASE), 1, (100,))).json()
        size = api.ok("retrieve_future", request_id=promise["request_id"], allow_metadata_only=True)
        assert size["status"] == "complete_metadata"
        whole = api.post("retrieve_future", request_id=promise["request_id"], allow_metadata_only=False)
        assert len(whole.content) == size["response_payload_size"]


def test_hundreds_of_polls_are_held_at_once(engine: StubEngine) -> None:
    async def poll(server: LiveServer, request_id: str) -> httpx.Response:
        # A client of its own: each request of a pool looks at all its connections, which takes longer than the server.
        async with httpx.AsyncClient(base_url=f"{server.url}/api/v1/", verify=False, timeout=60) as client:
            return await client.post("retrieve_future", json={"request_id": request_id})

    async def poll_all(server: LiveServer, ids: list[str]) -> list[httpx.Response]:
        polls = [asyncio.create_task(poll(server, request_id)) for request_id in ids]
        await asyncio.to_thread(until, lambda: _held(server) == 300)
        for call in engine.take():
            call.finish()
        return await asyncio.gather(*polls)

    # A poll is held for longer than a busy machine needs to take 300.
    with live_server(engine, models=[BASE], long_poll_s=30) as live, Api(live.url) as api:
        model = api.model(BASE)
        engine.hold = True
        ids = [api.ok("optim_step", model_id=model, seq_id=1 + i)["request_id"] for i in range(300)]
        answers = asyncio.run(poll_all(live, ids))
    assert all(answer.json()["metrics"] == {"grad_norm": 1.0} for answer in answers)


def _held(server: LiveServer) -> int:
    return sum(len(p._bell._waiters) for p in list(server.state.promises._promises.values()) if p._bell is not None)


# ---- order and repetition --------------------------------------------------------------------------------------------


def test_chunks_in_any_order_and_retries_apply_each_gradient_once(api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    engine.take()
    promises = {seq_id: api.proto(batch(model, seq_id, (seq_id,))).json() for seq_id in (2, 3)}
    assert engine.names() == [], "chunk 1 is missing"
    again = api.proto(batch(model, 2, (2,)), **{"X-Idempotency-Key": "new-key-of-the-outer-retry"}).json()
    assert again == promises[2]
    promises[1] = api.proto(batch(model, 1, (1,))).json()
    api.ok("optim_step", model_id=model, seq_id=4)
    sizes = [len(c.arguments["data"][0].loss_fn_inputs["weights"]) for c in engine.calls[:3]]
    assert sizes == [1, 2, 3]
    assert engine.names()[3:] == ["optim_step"]


def test_a_refused_request_uses_up_its_number(api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    refused = [
        api.proto(batch(model, 1, loss_fn="stable_reinforce")),
        api.post("forward_backward", **batch_json(model, 2, loss_fn="custom")),
        api.post("optim_step", model_id=model, seq_id=3, optimizer_params={"type": "dimuon", "learning_rate": 1e-3}),
        api.post("save_weights", model_id=model, seq_id=4, path="a/b"),
        api.post("mint/forward_backward_reverse_kl", model_id=model, seq_id=5, data="nonsense"),
    ]
    assert [r.status_code for r in refused] == [400] * 5, [r.text for r in refused]
    assert all(isinstance(r.json()["detail"], str) for r in refused)
    assert api.result("optim_step", model_id=model, seq_id=6)["metrics"], "it does not wait for them"


def test_a_gap_that_never_fills_is_a_failed_future(api: Api) -> None:
    model = api.model(BASE)
    promise = api.ok("optim_step", model_id=model, seq_id=2)
    waiting = api.ok("retrieve_future", request_id=promise["request_id"])
    failed = waiting if "error" in waiting else api.retrieve(promise["request_id"]).json()
    assert "seq_id 1" in failed["error"]
    assert api.result("optim_step", model_id=model, seq_id=3)["metrics"]


def test_a_caller_s_mistake_is_the_user_s_category(api: Api) -> None:
    failed = api.result("forward_backward", **batch_json(api.model(BASE), 1, loss_fn="refused"))
    assert failed == {"error": "loss_fn: refused (datum 0)", "category": "user"}


def test_making_things_twice_makes_one(api: Api, engine: StubEngine) -> None:
    key = {"X-Idempotency-Key": "stainless-python-retry-1"}
    session = api.ok("create_session", key, tags=[])["session_id"]
    assert api.ok("create_session", key, tags=[])["session_id"] == session
    assert api.session() != session
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
    assert api.ok("create_model", **body) == api.ok("create_model", **body)
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    assert api.ok("create_sampling_session", **body) == api.ok("create_sampling_session", **body)
    assert engine.names("load_base") == ["create_model", "create_sampler"]


def test_an_ephemeral_save_retried_with_another_sampler_number_is_one(api: Api, engine: StubEngine) -> None:
    """The SDK counts sampling_session_seq_id up when it retries, and keeps seq_id."""
    model = api.model(BASE)
    engine.take()
    first = api.ok("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=0)
    assert api.ok("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=1) == first
    assert engine.names() == ["save_weights_for_sampler"]
    assert api.retrieve(first["request_id"]).json()["sampling_session_id"].endswith(":sample:0")


# ---- models and sessions ---------------------------------------------------------------------------------------------


def test_get_info_names_model_and_tokenizer(api: Api) -> None:
    info = api.ok("get_info", model_id=api.model(BASE))
    assert (info["model_name"], info["model_data"]["tokenizer_id"], info["is_lora"]) == (BASE, BASE, True)


def test_load_weights_with_a_session_makes_a_model(api: Api, engine: StubEngine) -> None:
    session = api.session()
    path = engine.add_checkpoint(api.model(BASE, session))
    made = api.result("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=True)
    assert made == {"path": path, "model_id": f"{session}:train:1", "type": "load_weights"}
    api.ok("optim_step", model_id=f"{session}:train:1", seq_id=1)
    missing = api.post("load_weights", session_id=session, model_seq_id=2, path=path + "x", optimizer=True)
    assert missing.status_code == 404


def test_a_checkpoint_of_another_key_is_loaded_with_that_key_as_token(engine: StubEngine) -> None:
    (_, mine), (_, theirs) = (engine.store.keys.create(name) for name in ("me", "they"))
    with live_server(engine, models=[BASE]) as live, Api(live.url, mine) as me, Api(live.url, theirs) as they:
        path = engine.add_checkpoint(they.model(BASE))
        session = me.session()
        body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
        assert me.post("load_weights", **body).status_code == 404
        assert me.post("load_weights", **body, weights_access_token="tml-wrong").status_code in (400, 401, 403, 404)
        assert me.result("load_weights", **body, weights_access_token=theirs)["model_id"] == f"{session}:train:0"


def test_a_finished_session_lets_its_models_go_and_its_heart_stop(api: Api, engine: StubEngine) -> None:
    session = api.session()
    model = api.model(BASE, session)
    assert api.ok("session_heartbeat", session_id=session)["type"] == "session_heartbeat"
    api.ok(f"sessions/{session}/finish", reason={"type": "success"})
    assert api.post("session_heartbeat", session_id=session).status_code == 410
    until(lambda: model not in engine.models)
    assert api.post("create_model", session_id=session, model_seq_id=1, base_model=BASE).status_code == 400


def test_a_silent_session_is_put_aside_and_comes_back(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], session_timeout_s=0.3) as live, Api(live.url) as api:
        model = api.model(BASE)
        sampler = api.sampler(model, 1)
        api.result("optim_step", model_id=model, seq_id=2)
        until(lambda: not engine.is_resident(model) and not engine.is_resident(sampler))
        assert engine.store.parked(model) is not None
        assert api.result("asample", **sample(sampler))["sequences"]
        assert api.result("optim_step", model_id=model, seq_id=3)["metrics"]
        assert engine.steps[model] == ["optim_step(0.0001)"] * 2


def test_unload_model_is_a_promise(api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    assert api.result("unload_model", model_id=model) == {"model_id": model, "type": "unload_model"}
    assert api.result("optim_step", model_id=model, seq_id=1)["category"] == "user"


def test_training_is_refused_for_a_while_when_memory_is_short(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], memory_budget_bytes=1 << 20) as live, Api(live.url) as api:
        model = api.model(BASE)
        engine.hold = True
        assert api.proto(batch(model, 1, (40_000,))).status_code == 200
        assert api.proto(batch(model, 2, (40_000,))).status_code == 429
        engine.calls[-1].finish()
        engine.hold = False
        until(lambda: live.state.promises.pending == 0)
        assert api.retrieve(api.proto(batch(model, 2, (40_000,))).json()["request_id"])


def test_training_cannot_be_cancelled(api: Api, engine: StubEngine) -> None:
    promise = api.ok("optim_step", model_id=api.model(BASE), seq_id=1)
    api.ok("cancel_future", request_id=promise["request_id"])
    assert engine.cancelled == []


# ---- errors, tenants, the rest ---------------------------------------------------------------------------------------


def test_what_is_not_supported_is_said(api: Api) -> None:
    session = api.session()
    sampler = api.sampler(api.model(BASE, session), 1)
    image = {"chunks": [{"type": "image", "data": "aGk=", "format": "png"}]}
    for path, body, word in (
        ("create_custom_loss", {"session_id": session, "name": "l", "inputs": [], "graph": {}}, "not supported"),
        ("asample", sample(sampler, 0, prompt=image), "image"),
        ("asample", sample(sampler, 0, record_stability_info=True), "record_stability_info"),
    ):
        answer = api.post(path, **body)
        assert answer.status_code == 400
        assert word in answer.json()["detail"]


def test_every_answer_carries_a_request_id_and_errors_name_it(api: Api) -> None:
    mine = api.post("get_info", {"X-Request-ID": "my-id"}, model_id="s:train:0")
    assert (mine.headers["x-request-id"], mine.json()["request_id"], mine.status_code) == ("my-id", "my-id", 404)
    assert api.post("get_info", {"X-Request-ID": "bad id"}, model_id="x").headers["x-request-id"] != "bad id"


def test_an_error_of_ours_is_500_without_a_traceback(api: Api, engine: StubEngine, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret: /root/key")

    model = api.model(BASE)
    monkeypatch.setattr(engine, "get_info", broken)
    answer = api.post("get_info", model_id=model)
    assert answer.status_code == 500
    assert answer.json()["request_id"] in answer.json()["detail"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_keys_see_only_their_own(engine: StubEngine) -> None:
    (_, mine), (_, theirs) = (engine.store.keys.create(name) for name in ("me", "they"))
    with live_server(engine, models=[BASE]) as live, Api(live.url, mine) as me, Api(live.url, theirs) as they:
        session = me.session()
        model = me.model(BASE, session)
        promise = me.ok("optim_step", model_id=model, seq_id=1)
        sampler = me.sampler(model, 2)
        foreign = [
            they.post("get_info", model_id=model),
            they.post("optim_step", model_id=model, seq_id=3),
            they.post("optim_step", model_id=model, seq_id=3, adam_params={"learning_rate": "x"}),
            they.post("retrieve_future", request_id=promise["request_id"]),
            they.post("cancel_future", request_id=promise["request_id"]),
            they.post("session_heartbeat", session_id=session),
            they.post("create_model", session_id=session, model_seq_id=5, base_model=BASE),
            they.post(f"sessions/{session}/finish", reason={"type": "success"}),
            they.post("asample", **sample(sampler)),
            they.post("join_sampling_session", sampling_session_id=sampler),
            they.post("retrieve_futures", target={"sampling_session_id": sampler}),
        ]
        assert [r.status_code for r in foreign[:2] + foreign[3:]] == [404] * 10
        assert foreign[2].status_code in (400, 404)
        assert me.result("optim_step", model_id=model, seq_id=3)["metrics"], "they used up none of my numbers"
        with Api(live.url) as nobody:
            assert nobody.post("create_session").status_code == 401


def test_oversized_bodies_are_413_and_garbage_is_4xx(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], max_request_bytes=10_000) as live, Api(live.url) as api:
        assert api.http.post("create_session", content=b"[" * 20_000).status_code == 413
        bomb = wire.compress_body(b" " * 1_000_000)
        headers = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
        assert api.http.post("create_session", content=bomb, headers=headers).status_code == 413
        for content, kind in ((b"{", "application/json"), (b"\xff" * 99, wire.PROTOBUF), (b"a=1", "text/plain")):
            answer = api.http.post("forward_backward", content=content, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(("path", "limit"), [("forward_backward", 2_000), ("forward", 2_000), ("forward", 150_000)])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in parts"])
def test_a_training_request_that_is_too_large_uses_up_its_number(
    engine: StubEngine, path: str, limit: int, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tinker 0.22 sends it, with its number at the end: what comes behind it neither waits nor fails."""
    monkeypatch.setattr("mint_engine.server.gate.SKIMMED", max(100_000, 220_000 - limit))
    limits = {"max_request_bytes": limit, "gap_timeout_s": 0.3, "long_poll_s": 0.5}
    with live_server(engine, models=[BASE], **limits) as live, Api(live.url) as api:
        model, headers = api.model(BASE), {"Content-Type": "application/json"}
        key = "forward_input" if path == "forward" else "forward_backward_input"
        body = json.dumps(batch_json(model, 1, key, note="x" * 200_000)).encode()
        parts = (body[at : at + 7_000] for at in range(0, len(body), 7_000))
        assert api.http.post(path, content=body if announced else parts, headers=headers).status_code == 413
        assert api.result("optim_step", model_id=model, seq_id=2)["metrics"]


def test_a_request_that_is_far_too_large_or_somebody_else_s_uses_up_no_number(
    engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_engine.server.gate.SKIMMED", 10_000)
    (_, mine), (_, theirs) = (engine.store.keys.create(name) for name in ("me", "they"))
    with (
        live_server(engine, models=[BASE], max_request_bytes=2_000, gap_timeout_s=0.2, long_poll_s=0.5) as live,
        Api(live.url, mine) as me,
        Api(live.url, theirs) as they,
    ):
        model, headers = me.model(BASE), {"Content-Type": "application/json"}
        near, far = (json.dumps(batch_json(model, 1, note="x" * size)).encode() for size in (5_000, 1_000_000))
        assert they.http.post("forward_backward", content=near, headers=headers).status_code == 404
        assert me.http.post("forward_backward", content=far, headers=headers).status_code == 413
        parts = (far[at : at + 7_000] for at in range(0, len(far), 7_000))
        assert me.http.post("forward_backward", content=parts, headers=headers).status_code == 413
        assert "seq_id 1" in me.result("optim_step", model_id=model, seq_id=2)["error"]


def test_telemetry_is_accepted_and_dropped(api: Api) -> None:
    assert api.ok("telemetry", events=[{"event": "SESSION_START"}], session_id="x") == {"status": "accepted"}


def test_the_hot_requests_have_one_address_and_one_method_each(api: Api, server: LiveServer) -> None:
    """They take a way of their own past the router (`server/shortcut.py`)."""
    for name in ("forward_backward", "optim_step", "retrieve_future", "asample"):
        assert api.http.post(f"{server.url}/{name}", json={}).status_code == 404
        assert api.http.get(f"{server.url}/api/v1/{name}").status_code == 405
        assert api.http.post(f"{server.url}/api/v1/{name}", json={}).status_code in (400, 422)


def test_prometheus_can_read_it(api: Api, server: LiveServer) -> None:
    api.result("optim_step", model_id=api.model(BASE), seq_id=1)
    text = api.http.get(f"{server.url}/metrics").text
    for line in (
        'mint_promise_seconds_count{kind="OptimStep"} 1.0',
        'mint_http_requests_total{method="POST",route="/optim_step",status="200"} 1.0',
        'mint_tokens_total{what="sampled"} 0.0',
        'mint_queue_depth{queue="samples"} 0.0',
        'mint_memory_bytes{what="results"}',
    ):
        assert line in text


def test_health_and_documents(server: LiveServer, api: Api) -> None:
    for path in ("/healthz", "/health", "/api/v1/healthz", "/docs"):
        assert api.http.get(f"{server.url}{path}").status_code == 200
    document = api.http.get(f"{server.url}/openapi.json").json()
    body = document["paths"]["/api/v1/optim_step"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_the_ledger_has_every_request(server: LiveServer, api: Api, engine: StubEngine) -> None:
    model = api.model(BASE)
    api.proto(batch(model, 1))
    api.ok("optim_step", model_id=model, seq_id=2)
    until(lambda: len(engine.store.ledger.entries(model_id=model)) == 3)
    entries = {e.kind: e for e in engine.store.ledger.entries(model_id=model)}
    assert (entries["ForwardBackward"].tokens, entries["ForwardBackward"].seq_id) == (15, 1)
    assert {e.status for e in entries.values()} == {"done"}


def test_expired_checkpoints_are_removed_while_the_server_runs(engine: StubEngine, monkeypatch) -> None:
    monkeypatch.setattr("mint_engine.server.lifecycle.PURGE_S", 0.05)
    purged = threading.Event()
    monkeypatch.setattr(engine.store, "purge_expired", lambda: purged.set() or 0)
    with live_server(engine, models=[BASE]):
        assert purged.wait(5)
