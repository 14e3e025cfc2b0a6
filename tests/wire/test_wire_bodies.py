"""Bodies as they arrive: every encoding the SDKs use, and none of their bombs."""

from __future__ import annotations

import contextlib
import gzip
import json
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mint_engine import wire

LIMIT = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def streamed_zstd(data: bytes) -> bytes:
    """Without the content size in its header."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


ENCODERS = [
    (None, bytes), ("", bytes), ("identity", bytes), ("zstd", wire.compress_body), ("ZSTD", streamed_zstd),
    ("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate),
]  # fmt: skip
COMPRESSED = [(encoding, encode) for encoding, encode in ENCODERS if encode is not bytes]


@pytest.mark.parametrize(("encoding", "encode"), ENCODERS)
@given(data=st.binary(max_size=300), repeats=st.sampled_from([1, 1000]))
def test_every_encoding_is_undone(encoding, encode, data, repeats):
    body = data * repeats
    assert wire.decode_body(encode(body), encoding, LIMIT) == body


@pytest.mark.parametrize(("encoding", "encode"), ENCODERS)
def test_a_body_of_exactly_the_limit_passes_and_one_more_byte_does_not(encoding, encode):
    assert len(wire.decode_body(encode(b"x" * LIMIT), encoding, LIMIT)) == LIMIT
    with pytest.raises(wire.BodyTooLargeError, match=f"expected at most {LIMIT} bytes"):
        wire.decode_body(encode(b"x" * (LIMIT + 1)), encoding, LIMIT)


@pytest.mark.parametrize(("encoding", "encode"), COMPRESSED)
def test_a_bomb_is_refused_before_it_is_in_memory(encoding, encode):
    bomb = encode(bytes(64 * LIMIT))
    tracemalloc.start()
    try:
        with pytest.raises(wire.BodyTooLargeError):
            wire.decode_body(bomb, encoding, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 8 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("encoding", "encode"), COMPRESSED)
@given(st.data())
def test_a_truncated_body_is_never_taken_for_a_whole_one(encoding, encode, data):
    whole = encode(b"some text, some text")
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(wire.WireError):
        wire.decode_body(cut, encoding, LIMIT)


@pytest.mark.parametrize(("encoding", "encode"), COMPRESSED)
def test_bytes_behind_the_body_are_refused(encoding, encode):
    with pytest.raises(wire.WireError, match="bytes behind it"):
        wire.decode_body(encode(b"text") + b"more", encoding, LIMIT)


@given(st.binary(max_size=60), st.sampled_from(["zstd", "gzip", "deflate"]))
def test_garbage_is_refused_with_a_wire_error(raw, encoding):
    with contextlib.suppress(wire.WireError):
        wire.decode_body(raw, encoding, LIMIT)


def test_a_zstd_body_cannot_ask_for_a_large_window():
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(wire.WireError, match="expected zstd data"):
        wire.decode_body(stream.compress(b"x") + stream.flush(), "zstd", LIMIT)


@pytest.mark.parametrize("encoding", ["br", "gzip, zstd", "chunked"])
def test_an_unknown_encoding_is_named(encoding):
    with pytest.raises(wire.EncodingError, match=f"expected zstd, gzip, deflate or none, got '{encoding}'"):
        wire.decode_body(b"x", encoding, LIMIT)


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)))
def test_json_objects_are_read(obj):
    assert wire.parse_json(json.dumps(obj).encode()) == obj


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"a": NaN}', "expected JSON"),
        (b'{"a": -Infinity}', "expected JSON"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "recursion limit"),
        (b'{"a": "\\ud800"}', "expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b"[]", "expected a JSON object, got a list of 0"),
        (b"null", "expected a JSON object, got None"),
        (b"[" + b"[]," * (1 << 20) + b"[]]", "arrays, objects and strings"),
    ],
)
def test_other_json_is_refused_with_a_sentence(body, message):
    with pytest.raises(wire.WireError, match=message):
        wire.parse_json(body)
