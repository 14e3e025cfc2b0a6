"""Request bodies as they arrive: compressed or not, and JSON."""

from __future__ import annotations

import zlib
from typing import Any

import zstandard
from pydantic_core import from_json

from mint_engine.wire.errors import BodyTooLargeError, EncodingError, WireError, show

_MAX_WINDOW = 1 << 23  # bytes: what RFC 9659 lets a zstd body of HTTP ask for
_ZSTD_EXPANSION = 1 << 15  # most bytes that a byte of zstd stands for: 4 make a block of 128 KiB
_MAX_JSON_PARTS = 1 << 20  # arrays, objects and strings of one JSON body


def decode_body(raw: bytes, content_encoding: str | None, limit: int) -> bytes:
    """The body without its `Content-Encoding`: identity, gzip, deflate or zstd.

    Args:
        limit: the most bytes to answer. A body that would be longer is refused before it is in memory.

    Raises:
        BodyTooLargeError: more than `limit` bytes.
        EncodingError: an encoding that is not known.
        WireError: damaged or truncated data.
    """
    encoding = (content_encoding or "identity").strip().lower()
    if encoding == "identity":
        return _within(raw, limit)
    if encoding == "zstd":
        return _unzstd(raw, limit)
    if encoding in ("gzip", "x-gzip"):
        return _inflate(raw, 31, encoding, limit)
    if encoding == "deflate":
        return _inflate(raw, 15 if _has_zlib_header(raw) else -15, encoding, limit)
    raise EncodingError(f"Content-Encoding: expected zstd, gzip, deflate or none, got {show(content_encoding)}")


def compress_body(body: bytes) -> bytes:
    """`body` as one zstd frame, for `Content-Encoding: zstd`."""
    return zstandard.ZstdCompressor(level=1).compress(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises WireError for anything else, NaN and deep nesting included."""
    # An empty array takes 3 bytes in the body and 64 in memory.
    if body.count(b"[") + body.count(b"{") + body.count(b'"') // 2 > _MAX_JSON_PARTS:
        raise WireError(f"body: expected at most {_MAX_JSON_PARTS} arrays, objects and strings; send it as protobuf")
    try:
        obj = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise WireError(f"body: expected JSON: {error}") from None
    if not isinstance(obj, dict):
        raise WireError(f"body: expected a JSON object, got {show(obj)}")
    return obj


def _within(body: bytes, limit: int) -> bytes:
    if len(body) > limit:
        raise BodyTooLargeError(f"body: expected at most {limit} bytes, got more")
    return body


def _unzstd(raw: bytes, limit: int) -> bytes:
    """The decompressor has no limit on its output, so it is fed pieces that cannot become more than what is left."""
    stream = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
    parts: list[bytes] = []
    size = at = 0
    try:
        while at < len(raw) and not stream.eof:
            step = max(64, (limit - size) // _ZSTD_EXPANSION)
            parts.append(stream.decompress(raw[at : at + step]))
            at += step
            size += len(parts[-1])
            if size > limit:
                raise BodyTooLargeError(f"body: expected at most {limit} bytes after decompression, got more")
    except zstandard.ZstdError as error:
        raise WireError(f"body: expected zstd data: {error}") from None
    if not stream.eof:
        raise WireError("body: expected a whole zstd frame, got a truncated one")
    if stream.unused_data or at < len(raw):
        raise WireError("body: expected one zstd frame, got bytes behind it")
    return b"".join(parts)


def _inflate(raw: bytes, window_bits: int, encoding: str, limit: int) -> bytes:
    stream = zlib.decompressobj(window_bits)
    try:
        body = stream.decompress(raw, limit + 1)
    except zlib.error as error:
        raise WireError(f"body: expected {encoding} data: {error}") from None
    _within(body, limit)
    if not stream.eof:
        raise WireError(f"body: expected whole {encoding} data, got a truncated stream")
    if stream.unused_data:
        raise WireError(f"body: expected one {encoding} stream, got bytes behind it")
    return body


def _has_zlib_header(raw: bytes) -> bool:
    return len(raw) >= 2 and raw[0] & 0x0F == 8 and int.from_bytes(raw[:2], "big") % 31 == 0
