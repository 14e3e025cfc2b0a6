"""Bytes that the real SDKs made, and what they read in ours (recorded by `record_golden.py`)."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from golden_results import FORWARD_BACKWARD, SAMPLES
from wire_values import GOLDEN

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.types import Datum, ModelInput, TensorData
from mint_engine.wire import messages

SDKS = sorted(GOLDEN)

INTS, FLOATS = [1, 2, 3, 4], [0.0, 1.0, -0.5, 1e-3]
POLICY = {"target_tokens": INTS, "logprobs": FLOATS, "advantages": [0.0, 1.0, 1.0, -2.0]}
THRESHOLDS = {"clip_low_threshold": [0.9] * 4, "clip_high_threshold": [1.1] * 4}


def datum(tokens: list[int], **inputs: Any) -> Datum:
    return Datum(ModelInput.from_ints(tokens), inputs)


def sparse_datum() -> Datum:
    crow, col, shape = [0, 0, 0, 0, 2, 2, 3], [0, 1, 0], [6, 8]
    targets = TensorData([7, 9, 11], "int64", shape, crow, col)
    return datum(
        [0, 1, 2, 3, 4, 5], target_tokens=targets, weights=TensorData([0.5, 0.25, 1], "float32", shape, crow, col)
    )


PLAIN = [datum([0, 1, 2, 3], target_tokens=INTS, weights=FLOATS)]
MEANT = {
    "dense": ("cross_entropy", [*PLAIN, datum([5], target_tokens=[6], weights=[1])]),
    "chunks": ("cross_entropy", PLAIN),
    "matrix": (
        "cross_entropy",
        [datum([1, 2], target_tokens=[[1, 2, 3], [4, 5, 6]], weights=[[1, 0, 0], [0.5, 0.5, 0]])],
    ),
    "sparse": ("cross_entropy", [sparse_datum()]),
    "ppo": ("ppo", [datum([0, 1, 2, 3], **POLICY)]),
    "thresholds": ("ppo", [datum([0, 1, 2, 3], **POLICY, **THRESHOLDS)]),
    "integers": ("cross_entropy", [datum([0, 1, 2, 3], target_tokens=INTS, weights=[0, 1, 1, 1])]),
    "no seq_id": ("cross_entropy", PLAIN),
    "spans": ("importance_sampling", [datum([0, 1, 2, 3], **POLICY)]),
    "int32 and bfloat16": ("cross_entropy", [datum([1, 2], target_tokens=[2, 3], weights=[1.5, -0.25])]),
}  # what sdk_side.py asked the SDKs to send
SEQ_IDS = {"chunks": 7, "ppo": 2, "no seq_id": None, "int32 and bfloat16": 3}
CONFIGS = {"ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}}
REFUSED = {"image": "image", "custom": "custom losses are not supported", "text config": "expected a number for 'mode'"}

BODIES = [(sdk, name) for sdk in SDKS for name in GOLDEN[sdk]["requests"]]
JSON_BODIES = [(sdk, name) for sdk in SDKS for name in GOLDEN[sdk]["json_requests"]]
RESULTS = [(sdk, name) for sdk in SDKS for name in GOLDEN[sdk]["results"]]


def test_both_generations_of_the_sdk_are_recorded():
    assert [GOLDEN[sdk]["sdk"] for sdk in SDKS] == ["tinker 0.22.0", "tinker 0.38.0"]
    assert {name for _, name in BODIES} == {*MEANT, *REFUSED}


@pytest.mark.parametrize(("sdk", "name"), BODIES)
def test_a_request_of_the_sdk_means_what_its_user_wrote(sdk, name):
    body = base64.b64decode(GOLDEN[sdk]["requests"][name])
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            wire.parse_forward_backward(body)
        assert wire.address(body) == ("s:train:0", 1)
        return
    request = wire.parse_forward_backward(body)
    assert request.forward_only == (sdk == "0.38" and name == "sparse")
    assert_meant(request, name)


@pytest.mark.parametrize(("sdk", "name"), JSON_BODIES)
def test_a_json_request_of_the_sdk_means_the_same(sdk, name):
    obj = wire.parse_json(json.dumps(GOLDEN[sdk]["json_requests"][name]).encode())
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            wire.forward_backward_from_json(obj)
        assert wire.address(obj) == ("s:train:0", 1)
        return
    assert_meant(wire.forward_backward_from_json(obj), name)


def assert_meant(request: wire.ForwardBackwardRequest, name: str) -> None:
    loss_fn, data = MEANT[name]
    assert (request.model_id, request.loss_fn, request.data) == ("s:train:0", loss_fn, data)
    assert request.seq_id == SEQ_IDS.get(name, 1)
    assert request.loss_fn_config == CONFIGS.get(name, {})
    assert request.num_tokens == sum(d.model_input.length for d in data)


@pytest.mark.parametrize(("sdk", "name"), RESULTS)
def test_a_result_is_written_as_the_bytes_that_the_sdk_read(sdk, name):
    recorded = GOLDEN[sdk]["results"][name]
    message, encode, value = {
        "forward_backward": (messages.ForwardBackwardOutput, wire.encode_forward_backward_output, FORWARD_BACKWARD),
        "sample": (messages.SampleResponse, wire.encode_sample_response, SAMPLES),
    }[recorded["kind"]]
    written, read = (
        message.FromString(body).SerializeToString(deterministic=True)
        for body in (encode(value[name]), base64.b64decode(recorded["body"]))
    )
    assert written == read


@pytest.mark.parametrize(("sdk", "name"), [(s, n) for s, n in RESULTS if n in FORWARD_BACKWARD])
def test_the_sdk_reads_the_training_result_that_was_sent(sdk, name):
    out, read = FORWARD_BACKWARD[name], GOLDEN[sdk]["results"][name]["read"]
    if "error" in read:  # tinker 0.22 takes the first datum's layout for all
        assert sdk == "0.22"
        assert not wire.has_one_layout(out)
        return
    assert read["type"] == out.loss_fn_output_type
    assert {k: float(v) for k, v in read["metrics"].items()} == pytest.approx(out.metrics, nan_ok=True)
    sent = [{k: [t.dtype, t.shape, t.data] for k, t in datum.items()} for datum in out.loss_fn_outputs]
    assert read["outputs"] == sent


@pytest.mark.parametrize(("sdk", "name"), [(s, n) for s, n in RESULTS if n in SAMPLES])
def test_the_sdk_reads_the_samples_that_were_sent(sdk, name):
    out, read = SAMPLES[name], GOLDEN[sdk]["results"][name]["read"]
    assert read["sequences"] == [[s.stop_reason, s.tokens, s.logprobs] for s in out.sequences]
    assert read["prompt_logprobs"] == out.prompt_logprobs
    assert read["topk_prompt_logprobs"] == as_lists(out.topk_prompt_logprobs)
    if sdk == "0.22":
        return
    assert read["topk"] == [as_lists(s.topk_logprobs) for s in out.sequences]
    assert read["cached"] == out.prompt_cache_hit_tokens
    assert read["target"] == as_record(out.target_prompt_logprobs)
    alternatives = out.prompt_alt_tokens
    assert read["alt_tokens"] == as_record(alternatives and alternatives.tokens)
    assert read["alt_logprobs"] == as_record(alternatives and alternatives.logprobs)


def as_lists(rows: Any) -> Any:
    return json.loads(json.dumps(rows))


def as_record(tensor: TensorData | None) -> list[Any] | None:
    return tensor and [tensor.dtype, tensor.shape, tensor.data, tensor.sparse_col_indices]


def test_bfloat16_values_arrive_exactly():
    request = wire.parse_forward_backward(base64.b64decode(GOLDEN["0.38"]["requests"]["int32 and bfloat16"]))
    np.testing.assert_array_equal(request.data[0].loss_fn_inputs["weights"].to_numpy(), np.float32([1.5, -0.25]))
