"""JSON request bodies: what the SDKs send is understood, and what is wrong is said in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from wire_values import JSON, JSON_INPUTS, JSON_TENSORS

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.types import AdamParams, LoraConfig, ModelInput, SamplingParams
from mint_engine.wire import requests
from mint_engine.wire.requests import parse_request

MODELS = sorted(
    (m for m in vars(requests).values() if isinstance(m, type) and issubclass(m, BaseModel)), key=lambda m: m.__name__
)

# What stands behind the last list or object of a body whose beginning is not there.
ENDS = [
    ('5]}, "model_id": "a:train:0", "seq_id": 7}', {"model_id": "a:train:0", "seq_id": 7}),
    ('5]},"seq_id":7,"model_id":"a"}\n', {"model_id": "a", "seq_id": 7}),
    ('x", "model_id": "a", "seq_id": null, "type": "t"}', {"model_id": "a", "seq_id": None, "type": "t"}),
    ('\\"model_id\\":\\"b\\",", "seq_id": 7}', {"seq_id": 7}),
    ('{"model_id":"\\u0061","seq_id":7}', {"model_id": "a", "seq_id": 7}),
    ('"model_id": "a", "seq_id": 7}}', {}),
    ('"model_id": "a", "seq_id": 7', {}),
    ('"model_id": "a", "seq_id": [7]}', {}),
    ('{"seq_id": 1.2.3}', {}),
    ("", {}),
]

# As tinker 0.38.0, and 0.22.0 with mindlab-toolkit 0.2.0, posted them to a recording server.
RECORDED = [
    ("ClientConfigRequest", '{"sdk_version":"0.38.0"}'),
    ("AuthTokenRequest", "{}"),
    (
        "CreateSessionRequest",
        '{"tags":[],"user_metadata":{"who":"me"},"sdk_version":"0.38.0","project_id":"proj-1","display_name":"mine",'
        '"type":"create_session"}',
    ),
    (
        "CreateModelRequest",
        '{"session_id":"s","model_seq_id":0,"base_model":"org/m","user_metadata":{"a":"b"},"lora_config":{"rank":16,'
        '"seed":1,"train_unembed":true,"train_mlp":true,"train_attn":true},"optimizer_config":{"type":"adamw"},'
        '"type":"create_model"}',
    ),
    ("GetInfoRequest", '{"model_id":"s:train:0","type":"get_info"}'),
    ("UnloadModelRequest", '{"model_id":"s:train:0","type":"unload_model"}'),
    (
        "OptimStepRequest",
        '{"model_id":"s:train:0","seq_id":3,"type":"optim_step","adam_params":{"learning_rate":5e-05,"beta1":0.9,'
        '"beta2":0.999,"eps":1e-08,"weight_decay":0.0,"grad_clip_norm":0.0}}',
    ),
    (
        "SaveWeightsRequest",
        '{"model_id":"s:train:0","path":"ckpt-1","seq_id":7,"ttl_seconds":86400,"overwrite":true,'
        '"user_metadata":{"k":"v"},"type":"save_weights"}',
    ),
    (
        "LoadWeightsRequest",
        '{"model_id":"s:train:0","seq_id":8,"path":"tinker://s:train:0/weights/ckpt-1","optimizer":false,'
        '"type":"load_weights"}',
    ),
    (
        "LoadWeightsRequest",
        '{"session_id":"s","model_seq_id":2,"path":"tinker://s:train:0/weights/ckpt-1","optimizer":true,'
        '"weights_access_token":"tml-other","type":"load_weights"}',
    ),
    (
        "SaveWeightsForSamplerRequest",
        '{"model_id":"s:train:0","path":"smp-1","kind":"snapshot","seq_id":10,"type":"save_weights_for_sampler"}',
    ),
    (
        "SaveWeightsForSamplerRequest",
        '{"model_id":"s:train:0","sampling_session_seq_id":0,"seq_id":9,"type":"save_weights_for_sampler"}',
    ),
    (
        "SaveWeightsExternalRequest",
        '{"model_id":"s:train:0","path":"ext-1","seq_id":11,"ttl_seconds":3600,"type":"save_weights_external"}',
    ),
    (
        "CreateSamplingSessionRequest",
        '{"session_id":"s","sampling_session_seq_id":2,"model_path":"tinker://s:train:0/sampler_weights/smp-1",'
        '"type":"create_sampling_session"}',
    ),
    ("JoinSamplingSessionRequest", '{"sampling_session_id":"s:sample:0","type":"join_sampling_session"}'),
    (
        "SampleRequest",
        '{"num_samples":2,"prompt":{"chunks":[{"tokens":[5,6,7,8],"type":"encoded_text"}]},"sampling_params":'
        '{"max_tokens":3,"seed":3,"stop":["\\n"],"temperature":0.7,"top_k":5,"top_p":0.9},"sampling_session_id":'
        '"s:sample:0","seq_id":224436483000000000,"prompt_logprobs":false,"topk_prompt_logprobs":0,'
        '"topk_sample_logprobs":0,"prompt_alt_tokens_k":0,"record_stability_info":false,"type":"sample"}',
    ),
    (
        "SampleRequest",
        '{"num_samples":1,"prompt":{"chunks":[{"tokens":[5,6,7,8],"type":"encoded_text"}]},"sampling_params":'
        '{"max_tokens":2,"temperature":1.0,"top_k":-1,"top_p":1.0},"sampling_session_id":"s:sample:0","seq_id":0,'
        '"prompt_logprobs":true,"topk_prompt_logprobs":2,"topk_sample_logprobs":2,"target_prompt_logprobs":'
        '{"data":[1,-1,3],"dtype":"int64","shape":[3,1]},"prompt_alt_tokens_k":2,"type":"sample"}',
    ),
    ("RetrieveFutureRequest", '{"request_id":"req-5677659f","allow_metadata_only":true}'),
    (
        "RetrieveFuturesRequest",
        '{"target":{"type":"sampling_session","sampling_session_id":"s:sample:0","cloned_sampler_id":0},"prev_cursor":0,'
        '"timeout":0.0,"retrieved_request_ids":["req-1"]}',
    ),
    ("CancelFutureRequest", '{"request_id":"req-1"}'),
    ("SessionHeartbeatRequest", '{"session_id":"s","type":"session_heartbeat"}'),
    ("FinishSessionRequest", '{"reason":{"type":"success"},"detail":"done"}'),
    ("TelemetryRequest", '{"events":[{"event":"SESSION_START"}],"platform":"Linux","session_id":"s"}'),
    ("WeightsInfoRequest", '{"tinker_path":"tinker://s:train:0/weights/ckpt-1"}'),
    ("CopyWeightsRequest", '{"destination_project_id":"p","source_path":"tinker://s:train:0/weights/c","ttl_seconds":60}'),
    ("SetTtlRequest", '{"ttl_seconds":null}'),
    ("AssignProjectRequest", '{"project_id":"proj-9"}'),
    (
        "SessionSearchRequest",
        '{"user_metadata":{},"display_name":"n","owner":{"type":"own"},"statuses":[{"type":"active"}],"limit":50}',
    ),
    (
        "InterpolateCheckpointsRequest",
        '{"source_paths":["mint://a/sampler_weights/x","mint://b/sampler_weights/y"],"coefficients":[0.9,0.1],'
        '"output_path":"ema-10","output_checkpoint_type":"sampler","type":"mint_interpolate_checkpoints"}',
    ),
    (
        "ReverseKLRequest",
        '{"model_id":"s:train:0","reference_model_path":"mint://teacher","data":[{"student_input":{"chunks":[{"tokens":'
        '[1,2,3],"type":"encoded_text"}]},"reference_input":{"chunks":[{"tokens":[9,1,2,3],"type":"encoded_text"}]},'
        '"target_tokens":{"data":[2,3],"shape":[2],"dtype":"int64"},"weights":{"data":[1.0,1.0],"shape":null,'
        '"dtype":"float32"}}],"temperature":1.5,"seq_id":null,"type":"mint_forward_backward_reverse_kl"}',
    ),
    ("CreateCustomLossRequest", '{"session_id":"s","custom_loss_seq_id":0,"name":"f","inputs":[],"graph":{}}'),
]  # fmt: skip


def parsed(name: str, text: str, **changes: Any) -> Any:
    return parse_request(getattr(requests, name), json.loads(text) | changes)


def recorded(name: str, **changes: Any) -> Any:
    return parsed(name, next(text for n, text in RECORDED if n == name), **changes)


@pytest.mark.parametrize(("name", "text"), RECORDED)
def test_what_the_sdks_post_is_understood(name, text):
    request, sent = parsed(name, text), json.loads(text)
    for key in sent.keys() & type(request).model_fields.keys() - {"user_metadata"}:
        value = getattr(request, key)
        if isinstance(sent[key], (str, int, float)) or sent[key] is None:
            assert value == sent[key], key
    # unknown keys are ignored, null is the same as absent
    nulls = dict.fromkeys(type(request).model_fields.keys() - sent.keys())
    assert parsed(name, text, of_tomorrow=[1], **nulls) == request


def test_every_request_was_recorded_once():
    parts = {"FuturesTarget", "OptimizerChoice", "ReverseKLDatumRequest", "WireRequest"}
    parts |= {"WireLoraConfig", "WireOptimParams", "WireSamplingParams"}
    parts |= {"ForwardBody", "ForwardBackwardBody"}  # the OpenAPI page's; test_wire_bodies.py has the recorded ones
    assert {m.__name__ for m in MODELS} - parts == {name for name, _ in RECORDED}


def test_requests_become_our_own_types():
    assert recorded("CreateModelRequest").to_lora_config() == LoraConfig(rank=16, seed=1)
    assert recorded("OptimStepRequest").adam_params() == AdamParams()
    sample = recorded("SampleRequest")
    assert sample.prompt == ModelInput.from_ints([5, 6, 7, 8])
    assert sample.sampling_params() == SamplingParams(
        max_tokens=3, seed=3, stop=["\n"], temperature=0.7, top_k=5, top_p=0.9
    )
    datum = recorded("ReverseKLRequest").datums()[0]
    assert datum.reference_input.to_ints() == [9, 1, 2, 3]
    assert (datum.target_tokens.tolist(), datum.weights.tolist()) == ([2, 3], [1.0, 1.0])
    assert recorded("FinishSessionRequest").status == "success"


def test_a_request_can_be_written_by_our_client_and_read_again():
    sample = recorded("SampleRequest")
    body = sample.model_dump_json(by_alias=True, exclude_none=True).encode()
    assert parse_request(requests.SampleRequest, wire.parse_json(body)) == sample
    step = requests.OptimStepRequest(model_id="m", params=requests.WireOptimParams(**AdamParams().model_dump()))
    body = step.model_dump_json(by_alias=True, exclude_none=True).encode()
    assert parse_request(requests.OptimStepRequest, wire.parse_json(body)).adam_params() == AdamParams()


def test_what_a_client_leaves_out_is_the_sdks_default():
    assert recorded("CreateModelRequest", lora_config=None).to_lora_config().rank == 32
    step = recorded("OptimStepRequest", adam_params={})
    assert step.adam_params() == AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12)


def test_betas_are_taken_as_a_pair_too():
    step = recorded("OptimStepRequest", adam_params={"betas": [0.8, 0.9]})
    assert step.adam_params().betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "CreateModelRequest",
            {"model_seq_id": -1},
            "model_seq_id: input should be greater than or equal to 0, got -1",
        ),
        ("CreateModelRequest", {"session_id": "a\nb"}, "session_id: expected text without control characters, got 'a"),
        ("CreateModelRequest", {"base_model": None}, "base_model: is missing"),
        ("CreateModelRequest", {"optimizer_config": {"type": "dimuon"}}, "'dimuon', which is not supported here"),
        ("CreateModelRequest", {"user_metadata": {"a": "\0"}}, "user_metadata: expected text without NUL"),
        ("CreateModelRequest", {"user_metadata": {"a": "x" * 70000}}, "user_metadata: expected at most 65536 bytes"),
        ("OptimStepRequest", {"seq_id": 0}, "seq_id: input should be greater than or equal to 1, got 0"),
        ("OptimStepRequest", {"seq_id": 2**60}, "seq_id: input should be less than"),
        ("SaveWeightsRequest", {"ttl_seconds": 0}, "ttl_seconds: input should be greater"),
        ("SaveWeightsForSamplerRequest", {"path": None}, "path: expected path or sampling_session_seq_id, got neither"),
        (
            "LoadWeightsRequest",
            {"model_id": None},
            "model_id: expected either model_id, or session_id and model_seq_id",
        ),
        ("SampleRequest", {"prompt": {"chunks": [{"type": "image"}]}}, "prompt.*got 'image'.*not supported here"),
        ("SampleRequest", {"prompt": {"chunks": [{"tokens": ["a"]}]}}, "prompt.*flat list of numbers, got 'a' in it"),
        ("SampleRequest", {"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs.*expected dtype"),
        ("InterpolateCheckpointsRequest", {"coefficients": [1.0]}, "coefficients: expected 2, one for each"),
        ("ReverseKLRequest", {"temperature": 0}, "temperature: input should be greater than 0, got 0"),
        ("SessionSearchRequest", {"display_name": "\0"}, "expected text without NUL characters"),
    ],
)
def test_a_wrong_field_gives_one_sentence(name, changes, message):
    with pytest.raises(wire.WireError, match=message):
        recorded(name, **changes)


@pytest.mark.parametrize(
    ("name", "convert", "changes", "message"),
    [
        ("CreateModelRequest", "to_lora_config", {"lora_config": {"rank": 999}}, "lora_config.rank: input should"),
        ("CreateModelRequest", "to_lora_config", {"lora_config": dict.fromkeys(
            ["train_mlp", "train_attn", "train_unembed"], False)}, "nothing to train"),
        ("OptimStepRequest", "adam_params", {"adam_params": {"beta2": 1.5}}, "adam_params.beta2: input should be less"),
        ("OptimStepRequest", "adam_params", {"adam_params": {"betas": [1]}}, "betas: expected a pair"),
        ("SampleRequest", "sampling_params", {"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ("SampleRequest", "sampling_params", {"sampling_params": {"seed": 2**64}}, "sampling_params.seed"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_the_users_mistake(name, convert, changes, message):
    request = recorded(name, **changes)
    with pytest.raises(UserError, match=message):
        getattr(request, convert)()


PARTS = st.none() | st.sampled_from(["s", "", "\0", "adamw", 0, -1, 2**70, 1e999, True]) | JSON | JSON_INPUTS
OBJECTS = st.dictionaries(st.text(max_size=3), PARTS, max_size=3)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=20)
@given(st.data())
def test_anything_else_is_refused_and_nothing_else_happens(model, data):
    names = [f.alias or name for name, f in model.model_fields.items()] + ["adam_params"]
    values = PARTS | OBJECTS | JSON_TENSORS
    obj = data.draw(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(names, values)))
    try:
        request = parse_request(model, obj)
        for convert in ("to_lora_config", "adam_params", "sampling_params", "datums"):
            getattr(request, convert, lambda: None)()
    except UserError as error:
        assert str(error).count("\n") == 0  # noqa: PT017  (it is the only outcome besides success)


def test_the_models_serve_as_fastapi_bodies():
    """Validation errors become the same sentence, and every model has a schema."""
    app = FastAPI()
    for model in MODELS:

        def route(body: Any) -> str:
            return type(body).__name__

        route.__annotations__["body"] = model
        app.post(f"/{model.__name__}")(route)
    assert app.openapi()["components"]["schemas"].keys() >= {m.__name__ for m in MODELS}
    with TestClient(app) as client:
        for name, text in RECORDED:
            assert client.post(f"/{name}", content=text, headers={"content-type": "application/json"}).json() == name
        answer = client.post("/SetTtlRequest", json={"ttl_seconds": "soon"})
    assert answer.status_code == 422
    assert wire.explain(answer.json()["detail"]).startswith("ttl_seconds: input should be a valid integer")


@pytest.mark.parametrize(("end", "members"), ENDS)
def test_the_last_members_are_found_without_the_beginning(end: str, members: dict[str, Any]) -> None:
    assert wire.last_members(end.encode()) == members


@given(end=st.binary(max_size=1024) | st.text('{},:" \\\n1ae', max_size=1024).map(str.encode))
def test_any_end_of_a_body_is_taken(end: bytes) -> None:
    assert isinstance(wire.last_members(end), dict)
