"""What one end writes is what the other end reads, in protobuf and in JSON."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from wire_values import REQUESTS, RESPONSES, datums, outputs, same_datum, same_tensors, tensors

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.types import Datum, ForwardBackwardOutput, ModelInput, SampledSequence, SampleResponse, TensorData
from mint_engine.wire.json_values import tensor_from_json
from mint_engine.wire.outputs import tensor_to_json


@given(REQUESTS)
def test_a_training_request_survives_protobuf(request_):
    read = wire.parse_forward_backward(wire.encode_forward_backward(request_))
    assert replace(read, data=[]) == replace(request_, data=[])
    assert len(read.data) == len(request_.data)
    assert all(map(same_datum, read.data, request_.data))


@given(REQUESTS)
def test_a_training_request_survives_json_as_tinker_022_writes_it(request_):
    obj = {
        "model_id": request_.model_id,
        "seq_id": request_.seq_id,
        "forward_backward_input": {
            "loss_fn": request_.loss_fn,
            "loss_fn_config": request_.loss_fn_config,
            "data": [
                {
                    "model_input": d.model_input.model_dump(),
                    "loss_fn_inputs": {
                        n: t.to_dict() for n, t in d.loss_fn_inputs.items() if np.isfinite(t.to_numpy()).all()
                    },
                }
                for d in request_.data
            ],
        },
    }
    read = wire.forward_backward_from_json(wire.parse_json(json.dumps(obj).encode()))
    assert replace(read, data=[]) == replace(request_, data=[], forward_only=False)
    for got, sent in zip(read.data, request_.data, strict=True):
        finite = {n: t for n, t in sent.loss_fn_inputs.items() if np.isfinite(t.to_numpy()).all()}
        assert same_datum(got, Datum(sent.model_input, finite))


@given(outputs())
def test_a_training_result_survives_protobuf(out):
    read = wire.parse_forward_backward_output(wire.encode_forward_backward_output(out))
    assert (read.loss_fn_output_type, read.weight_sum) == (out.loss_fn_output_type, out.weight_sum)
    assert read.metrics == pytest.approx(out.metrics, nan_ok=True)
    assert len(read.loss_fn_outputs) == len(out.loss_fn_outputs)
    assert all(map(same_tensors, read.loss_fn_outputs, out.loss_fn_outputs))


@given(RESPONSES)
def test_samples_survive_protobuf(response):
    read = wire.parse_sample_response(wire.encode_sample_response(response))
    assert read == response


@given(outputs(), RESPONSES)
def test_json_results_hold_nothing_that_json_does_not_know(out, response):
    for record in (wire.forward_backward_output_to_json(out), wire.sample_response_to_json(response)):
        text = json.dumps(record, allow_nan=False)
        assert "error" not in json.loads(text)  # the SDKs would take it for a failure


@given(tensors())
def test_a_tensor_survives_json(tensor):
    record = json.loads(json.dumps(tensor_to_json(tensor), allow_nan=False))
    if None not in record["data"]:
        assert same_tensors({"t": tensor_from_json(record)}, {"t": tensor})


def test_samples_get_the_ids_that_came_with_their_promise():
    body = wire.encode_sample_response(SampleResponse([SampledSequence("stop", [1]), SampledSequence("stop", [2])]))
    assert [s.sequence_id for s in wire.parse_sample_response(body, ["a"]).sequences] == ["a", ""]


def test_the_loss_shown_by_a_client_is_that_of_the_server():
    out = ForwardBackwardOutput(
        "TorchLossReturn", [{"logprobs": TensorData([-1.0], "float32")}], {"loss:sum": 6.0}, 4.0
    )
    assert wire.parse_forward_backward_output(wire.encode_forward_backward_output(out)).loss == 1.5


def test_what_a_client_reads_is_its_own_memory():
    out = ForwardBackwardOutput("TorchLossReturn", [{"logprobs": TensorData([-1.0, -2.0], "float32")}])
    read = wire.parse_forward_backward_output(wire.encode_forward_backward_output(out))
    torch.from_numpy(read.loss_fn_outputs[0]["logprobs"].to_numpy()).add_(1.0)  # warns about read-only memory
    assert read.loss_fn_outputs[0]["logprobs"].tolist() == [0.0, -1.0]


@given(datums())
def test_a_parsed_datum_is_a_datum_like_any_other(datum):
    request = wire.ForwardBackwardRequest("m", 1, [datum], "cross_entropy")
    read = wire.parse_forward_backward(wire.encode_forward_backward(request)).data[0]
    assert read.num_tokens == datum.num_tokens
    np.testing.assert_array_equal(read.token_array(), datum.token_array())
    assert same_datum(pickle.loads(pickle.dumps(read)), datum)
    assert read.model_input == datum.model_input
    assert read == datum
    assert replace(read) == datum
    assert repr(read).startswith("Datum(model_input=ModelInput(chunks=[EncodedTextChunk(tokens=[")
    with pytest.raises(AttributeError, match="no attribute 'tokens'"):
        _ = read.tokens


@pytest.mark.parametrize("token", [-1, 2**31, 2**70])
def test_a_token_that_the_wire_cannot_carry_is_refused_where_it_is_sent(token):
    request = wire.ForwardBackwardRequest("m", 1, [Datum(ModelInput.from_ints([token]))], "cross_entropy")
    with pytest.raises(UserError, match=r"model_input: expected token ids in \[0, 2\^31\) \(datum 0\)"):
        wire.encode_forward_backward(request)


def test_missing_prompt_logprobs_are_nan_for_the_sdks_and_null_in_json():
    response = SampleResponse([SampledSequence("stop", [1], [-1.0])], prompt_logprobs=[None, -0.5])
    message = wire.messages.SampleResponse.FromString(wire.encode_sample_response(response))
    np.testing.assert_array_equal(np.frombuffer(message.prompt_logprobs, "<f4"), np.float32([math.nan, -0.5]))
    assert wire.sample_response_to_json(response)["prompt_logprobs"] == [None, -0.5]
