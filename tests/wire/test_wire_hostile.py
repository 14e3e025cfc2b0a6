"""Hostile bytes: a sentence, never another exception, and never more memory than the body is worth."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_values import GOLDEN, JSON, JSON_INPUTS, JSON_TENSORS, REQUESTS, RESPONSES, outputs

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.wire import messages

INT64 = st.integers(-(2**63), 2**63 - 1)
SIZES = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**62]) | INT64
BYTES = st.binary(max_size=40) | st.lists(INT64, max_size=5).map(lambda v: np.array(v, np.int64).tobytes())
DTYPES = st.integers(0, 5) | st.integers(-(2**31), 2**31 - 1)

READERS: list[Callable[[bytes], Any]] = [
    wire.parse_forward_backward, wire.parse_forward_backward_output, wire.parse_sample_response, wire.address,
]  # fmt: skip
SEEDS = [base64.b64decode(body) for golden in GOLDEN.values() for body in golden["requests"].values()]
SEEDS += [base64.b64decode(r["body"]) for golden in GOLDEN.values() for r in golden["results"].values()]


def attempt(read: Callable[[Any], Any], body: Any) -> Any:
    """The value, used as the engine would; or None if it was refused. Anything else escapes and fails the test."""
    try:
        value = read(body)
    except UserError as error:
        if len(str(error)) > 2000:
            raise AssertionError("nobody reads such a long sentence") from error
        return None
    for datum in getattr(value, "data", ()):
        assert datum.token_array().dtype == np.int64
        for tensor in datum.loss_fn_inputs.values():
            assert list(tensor.to_numpy().shape) == tensor.shape
    return value


@given(st.binary(max_size=200), st.sampled_from(READERS))
def test_random_bytes(body, read):
    attempt(read, body)


@settings(max_examples=200)
@given(st.sampled_from(SEEDS), st.sampled_from(READERS), st.data())
def test_damaged_messages(body, read, data):
    """Bytes of real messages changed, cut, doubled."""
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if how == "set" and at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del damaged[at : at + data.draw(st.integers(1, 8))]
        elif how == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=8))
        else:
            damaged[at:at] = damaged[at : at + data.draw(st.integers(1, 60))]
    attempt(read, bytes(damaged))


@st.composite
def hostile_tensors(draw: st.DrawFn) -> Any:
    tensor = messages.Tensor(dtype=draw(DTYPES), shape=draw(st.lists(SIZES, max_size=10)))
    if draw(st.booleans()):
        tensor.dense = draw(BYTES)
    if draw(st.booleans()):
        csr = tensor.sparse_csr
        csr.values, csr.crow_indices, csr.col_indices = draw(BYTES), draw(BYTES), draw(BYTES)
    return tensor


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=3), hostile_tensors(), max_size=3), BYTES, st.text(max_size=3), DTYPES)
def test_requests_whose_parts_do_not_agree(tensors, tokens, text, seq_id):
    message = messages.ForwardBackwardRequest(model_id="m", seq_id=seq_id, loss_fn=text)
    message.loss_fn_config_v2[text].number = float("nan")
    entry = message.data.add()
    entry.model_input.add().encoded_text.tokens = tokens
    for name, tensor in tensors.items():
        entry.loss_fn_inputs[name].CopyFrom(tensor)
    attempt(wire.parse_forward_backward, message.SerializeToString())


@settings(max_examples=200)
@given(BYTES, BYTES, DTYPES, st.lists(SIZES, max_size=3), SIZES | st.integers(0, 4))
def test_training_results_whose_parts_do_not_agree(data, offsets, dtype, trailing, count):
    message = messages.ForwardBackwardOutput()
    record = message.loss_fn_outputs.add(num_datums=count)
    field = record.fields["logprobs"]
    field.data, field.offsets, field.dtype = data, offsets, dtype
    field.trailing_shape.extend(trailing)
    attempt(wire.parse_forward_backward_output, message.SerializeToString())


@given(hostile_tensors(), hostile_tensors(), BYTES, BYTES, st.integers(0, 2**32 - 1), st.integers(0, 3), DTYPES)
def test_samples_whose_parts_do_not_agree(target, alternatives, ids, logprobs, length, k, reason):
    message = messages.SampleResponse(prompt_logprobs=logprobs)
    message.sequences.add(stop_reason=reason, tokens=ids, logprobs=logprobs)
    topk = message.topk_prompt_logprobs
    topk.token_ids, topk.logprobs, topk.length, topk.k = ids, logprobs, length, k
    message.target_prompt_logprobs.CopyFrom(target)
    message.prompt_alt_tokens.tokens.CopyFrom(alternatives)
    attempt(wire.parse_sample_response, message.SerializeToString())


JSON_DATUMS = st.fixed_dictionaries(
    {"model_input": JSON_INPUTS | JSON},
    optional={"loss_fn_inputs": st.dictionaries(st.sampled_from(["weights", "x"]), JSON_TENSORS | JSON) | JSON},
)
JSON_REQUESTS = st.fixed_dictionaries(
    {
        "model_id": st.just("m") | JSON,
        "forward_backward_input": st.fixed_dictionaries(
            {"loss_fn": st.just("ppo") | JSON, "data": st.lists(JSON_DATUMS | JSON, max_size=3) | JSON},
            optional={"loss_fn_config": JSON},
        )
        | JSON,
    },
    optional={"seq_id": JSON},
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(JSON_REQUESTS)
def test_json_requests_whose_parts_are_anything(obj):
    attempt(wire.forward_backward_from_json, obj)
    attempt(wire.address, obj)


@given(REQUESTS, RESPONSES, outputs(), st.data())
def test_a_truncated_message_never_reads_as_more_than_was_sent(request_, response, out, data):
    for read, body in [
        (wire.parse_forward_backward, wire.encode_forward_backward(request_)),
        (wire.parse_sample_response, wire.encode_sample_response(response)),
        (wire.parse_forward_backward_output, wire.encode_forward_backward_output(out)),
    ]:
        attempt(read, body[: data.draw(st.integers(0, len(body)))])


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensor_datum(tensor: bytes) -> bytes:
    return field(3, field(2, field(1, b"x") + field(2, tensor)))


MANY = 1 << 23
HEAD = field(1, b"m") + field(4, b"ppo")


def csr(rows: int, columns: int) -> bytes:
    """An empty float32 tensor."""
    return field(2, field(2, bytes(8 * rows + 8))) + b"\x18\x01" + field(4, varint(rows) + varint(columns))


TOO_MANY = "expected at most 1048576 protobuf fields"
TOO_WIDE = "expected sparse tensors of at most 33554432 values when made dense"
PROTOBUF_BOMBS = {
    "empty datums": (field(3, b"") * MANY, TOO_MANY),
    "empty chunks": (field(3, field(1, b"") * MANY), TOO_MANY),
    "empty tensors": (field(3, field(2, b"") * MANY), TOO_MANY),
    "empty spans": (field(3, field(3, b"") * MANY), TOO_MANY),
    "a shape of ones": (tensor_datum(field(4, b"\x01" * (4 * MANY))), "shape: expected a few sizes"),
    "a shape of ones, one by one": (tensor_datum(b"\x20\x01" * MANY), TOO_MANY),
    "a sparse tensor of 2^31 columns": (tensor_datum(csr(1, 2**31 - 1)), TOO_WIDE),
    "many wide sparse tensors": (tensor_datum(csr(1, 1 << 24)) * 64, TOO_WIDE),
    "a negative length": (b"\x1a" + b"\xff" * 9 + b"\x01" + bytes(2 * MANY), "truncated"),
    "groups": (b"\x0b" * MANY, "other bytes"),
}
NUMBER_LIST = b'{"model_id":"m","forward_backward_input":{"loss_fn":"ppo","data":[{"model_input":{"chunks":[%s]}}]}}'
JSON_BOMBS = {
    "a long string among many numbers": (
        NUMBER_LIST % (b'{"tokens":["' + b"x" * MANY + b'"' + b",0" * (MANY // 8) + b"]}"),
        "expected a flat list of numbers, got 'xxx",
    ),
    "empty chunks": (NUMBER_LIST % (b"{}," * (MANY // 2) + b"{}"), "expected at most 1048576 arrays, objects"),
    "a wide sparse tensor": (
        b'{"model_id":"m","forward_backward_input":{"loss_fn":"ppo","data":[{"model_input":{"chunks":[]},'
        b'"loss_fn_inputs":{"x":{"data":[],"dtype":"int64","shape":[1,2147483647],'
        b'"sparse_crow_indices":[0,0],"sparse_col_indices":[]}}}]}}',
        TOO_WIDE,
    ),
}
CHILD = """
import resource, sys, time
from mint_engine import wire
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 10 * 2**20 + int(sys.argv[2])
body = sys.stdin.buffer.read()
resource.setrlimit(resource.RLIMIT_AS, (room, room))
reader = {"protobuf": wire.parse_forward_backward,
          "json": lambda raw: wire.forward_backward_from_json(wire.parse_json(raw))}[sys.argv[1]]
try:
    request = reader(body)
    for datum in request.data:
        for tensor in datum.loss_fn_inputs.values():
            tensor.to_numpy()
    print("read")
except wire.WireError as error:
    print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("protobuf", n) for n in PROTOBUF_BOMBS] + [("json", n) for n in JSON_BOMBS]
)
def test_a_bomb_is_refused_in_little_memory(kind, name):
    """In a process that may have 12 bytes for each of the body's, and 64 MiB."""
    bomb, message = {"protobuf": PROTOBUF_BOMBS, "json": JSON_BOMBS}[kind][name]
    body = HEAD + bomb if kind == "protobuf" else bomb
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(12 * len(body) + 2**26)], input=body, capture_output=True, check=False
    )
    # (protobuf's parser says that the bytes are wrong when it has no memory: the sentence must be ours)
    assert ran.stdout.startswith(b"refused:"), ran.stderr[-2000:]
    assert message in ran.stdout.decode()
