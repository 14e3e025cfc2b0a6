"""Limits that clients are told of, and back-pressure."""

from __future__ import annotations

import json

import numpy as np
from api import Api
from server_fixture import live_server
from stub_engine import BASE, StubEngine

from mint_engine.store import KeyLimits


def body_as_large_as_may_be(config: dict) -> bytes:
    """The JSON of so many datums whose numbers take so many bytes, as an SDK counts them; long to spell."""
    datums, numbers = config["fwdbwd_max_chunk_len"], config["fwdbwd_max_chunk_bytes_count"]
    values = np.random.default_rng(0).normal(scale=1e-5, size=max(1, numbers // datums // 4)).astype(np.float32)
    chunks = [{"tokens": [1], "type": "encoded_text"}] * 5
    tensors = {
        name: {"data": [0], "dtype": "float32", "shape": [1]}
        for name in ("weights", "advantages", "logprobs", "target_tokens")
    }
    tensors["weights"] = {"data": values.tolist(), "dtype": "float32", "shape": [len(values)]}
    data = [{"model_input": {"chunks": chunks}, "loss_fn_inputs": tensors}] * datums
    return json.dumps(
        {"forward_backward_input": {"data": data, "loss_fn": "ppo"}, "model_id": "s" * 60, "seq_id": 1}
    ).encode()


def test_sdks_are_told_to_send_no_more_than_a_body_may_have(engine: StubEngine) -> None:
    _, secret = engine.store.keys.create("ada", limits=KeyLimits(max_request_bytes=100_000))
    _, other = engine.store.keys.create("bob")
    with live_server(engine, models=[BASE]) as live:
        with Api(live.url, other) as api:
            config = api.ok("client/config", sdk_version="0.38.0")
            assert (config["fwdbwd_max_chunk_bytes_count"], config["fwdbwd_max_chunk_len"]) == (5_000_000, 1024)
        with Api(live.url, secret) as api:
            body = body_as_large_as_may_be(api.ok("client/config", sdk_version="0.38.0"))
            assert len(body) > 50_000, "no smaller than need be"
            answer = api.http.post("forward_backward", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 404, "there is no such model; it is not 413"


def test_interpolations_that_wait_count_as_what_they_take(engine: StubEngine) -> None:
    engine.interpolate_checkpoints = lambda *args, **options: engine._call("interpolate", dict)  # type: ignore[attr-defined]
    with live_server(engine, models=[BASE], memory_budget_bytes=1 << 20) as live, Api(live.url) as api:
        engine.hold = True
        body = {"source_paths": ["tinker://s:train:0/sampler_weights/" + "a" * 150] * 64, "coefficients": [0.1] * 64}
        answers = [api.post("mint/checkpoints/interpolate", **body).status_code for _ in range(100)]
        assert set(answers) == {200, 429}
        assert live.state.promises.pending_bytes > 500_000
        for call in engine.take():
            call.finish()
        engine.hold = False
        api.result("mint/checkpoints/interpolate", **body)
        assert live.state.promises.pending_bytes == 0
