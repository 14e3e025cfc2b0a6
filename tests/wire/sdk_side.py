"""Runs inside an environment that holds a tinker SDK (and torch), not in ours: `record_golden.py` starts it.

Requests: what the SDK's own encoders make of some calls. Results: what the SDK's own decoders make of our bytes.
stdin: {"results": {name: [kind, base64]}}; stdout: {"requests": {...}, "results": {...}}.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys

import numpy as np
import torch
from tinker import types
from tinker.proto import request_conv, response_conv
from tinker.proto import tinker_public_pb2 as pb
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

VERSION = importlib.metadata.version("tinker")
NEW = VERSION >= "0.38"  # "0.22.0" and "0.38.0" compare as text


def tokens(*chunks: list[int]) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=chunk) for chunk in chunks])


def request(data, loss_fn="cross_entropy", config=None, seq_id=1):
    inner = ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config)
    return ForwardBackwardRequest(forward_backward_input=inner, model_id="s:train:0", seq_id=seq_id)


def datum(chunks=([0, 1, 2, 3],), **inputs):
    return types.Datum(model_input=tokens(*chunks), loss_fn_inputs=inputs)


def sparse_targets():
    targets, weights = torch.zeros(6, 8, dtype=torch.int64), torch.zeros(6, 8)
    targets[3, 0], targets[3, 1], targets[5, 0] = 7, 9, 11
    weights[3, 0], weights[3, 1], weights[5, 0] = 0.5, 0.25, 1.0
    return datum(chunks=([0, 1, 2, 3, 4, 5],), target_tokens=targets, weights=weights)


def calls():
    ints, floats = [1, 2, 3, 4], [0.0, 1.0, -0.5, 1e-3]
    rl = {"target_tokens": ints, "logprobs": floats, "advantages": [0.0, 1.0, 1.0, -2.0]}
    thresholds = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    yield "dense", request([datum(target_tokens=ints, weights=floats), datum(([5],), target_tokens=[6], weights=[1])])
    yield "chunks", request([datum(([0], [1, 2], [], [3]), target_tokens=ints, weights=floats)], seq_id=7)
    yield (
        "matrix",
        request([datum(([1, 2],), target_tokens=[[1, 2, 3], [4, 5, 6]], weights=[[1, 0, 0], [0.5, 0.5, 0]])]),
    )
    yield "sparse", request([sparse_targets()])
    yield "ppo", request([datum(**rl)], "ppo", thresholds, seq_id=2)
    yield "thresholds", request([datum(**rl, clip_low_threshold=[0.9] * 4, clip_high_threshold=[1.1] * 4)], "ppo")
    yield "integers", request([datum(target_tokens=ints, weights=np.array([0, 1, 1, 1]))])
    yield "no seq_id", request([datum(target_tokens=ints, weights=floats)], seq_id=None)
    picture = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)
    yield "image", request([types.Datum(model_input=types.ModelInput(chunks=[picture]), loss_fn_inputs={})])
    if NEW:
        yield "custom", request([datum(target_tokens=ints, weights=floats)], "custom", {"loss_id": "L-1"})
        yield "text config", request([datum(**rl)], "ppo", {"mode": "fast"})
        yield "spans", request([with_spans(datum(**rl))], "importance_sampling")


def with_spans(plain):
    from tinker.types.provenance_spans import PromptProvenanceSpan, SampledProvenanceSpan

    prompt = PromptProvenanceSpan(sequence_id="q", offset=0, length=2)
    sampled = SampledProvenanceSpan(sequence_id="q", offset=0, length=2)
    return plain.with_provenance(model_input=[prompt, sampled], loss_fn_inputs=[prompt, sampled])


def made_by_hand():
    """Dtypes that the messages have and the SDK's encoder does not use, in the SDK's classes."""
    message = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=3, loss_fn="cross_entropy")
    entry = message.data.add()
    entry.model_input.add().encoded_text.tokens = np.array([1, 2], np.int32).tobytes()
    targets = entry.loss_fn_inputs["target_tokens"]
    targets.dtype, targets.dense = pb.DTYPE_INT32, np.array([2, 3], np.int32).tobytes()
    targets.shape.append(2)
    weights = entry.loss_fn_inputs["weights"]
    weights.dtype = pb.DTYPE_BFLOAT16
    weights.dense = torch.tensor([1.5, -0.25]).bfloat16().view(torch.int16).numpy().tobytes()
    return message  # weights without a shape: one dimension


def encoded():
    for name, call in calls():
        message = request_conv.forward_backward_request_to_proto(call)
        if NEW and name in ("dense", "sparse"):
            message.forward_only = name == "sparse"
        yield name, message
    yield "int32 and bfloat16", made_by_hand()


def as_json():
    """The bodies that 0.22 posts by default."""
    if NEW:
        return {}
    from tinker._compat import model_dump
    from tinker.lib._pydantic_conv import to_pydantic_request

    return {
        name: model_dump(to_pydantic_request(call), exclude_unset=False, exclude_none=True, mode="json")
        for name, call in calls()
    }


def shown(value):
    """SDK results as plain JSON; NaN as text."""
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, (list, tuple)):
        return [shown(v) for v in value]
    if isinstance(value, dict):
        return {k: shown(v) for k, v in value.items()}
    return value


def decoded(kind: str, body: bytes):
    if kind == "forward_backward":
        out = response_conv.deserialize_forward_backward_output(body)
        outputs = [{k: [t.dtype, t.shape, t.data] for k, t in datum.items()} for datum in out.loss_fn_outputs]
        return shown({"type": out.loss_fn_output_type, "outputs": outputs, "metrics": out.metrics})
    out = response_conv.deserialize_sample_response(body)
    record = {
        "sequences": [[s.stop_reason, s.tokens, s.logprobs] for s in out.sequences],
        "prompt_logprobs": out.prompt_logprobs,
        "topk_prompt_logprobs": out.topk_prompt_logprobs,
    }
    if NEW:
        record["topk"] = [s.topk_logprobs for s in out.sequences]
        record["cached"] = out.prompt_cache_hit_tokens
        for name, tensor in (
            ("target", out.target_prompt_logprobs),
            ("alt_tokens", out.prompt_alt_tokens and out.prompt_alt_tokens.tokens),
            ("alt_logprobs", out.prompt_alt_tokens and out.prompt_alt_tokens.logprobs),
        ):
            record[name] = tensor and [tensor.dtype, tensor.shape, tensor.data, tensor.sparse_col_indices]
    return shown(record)


def attempt(kind: str, body: bytes):
    try:
        return decoded(kind, body)
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump(
        {
            "sdk": f"tinker {VERSION}",
            "requests": {
                name: base64.b64encode(m.SerializeToString(deterministic=True)).decode() for name, m in encoded()
            },
            "json_requests": as_json(),
            "results": {name: attempt(kind, base64.b64decode(body)) for name, (kind, body) in given["results"].items()},
        },
        sys.stdout,
    )
