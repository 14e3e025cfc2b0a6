"""Looking over a protobuf body before it is parsed, so that parsing it cannot fill the memory.

An empty message takes two bytes in the body and about sixty in memory. Honest bodies consist of a few large arrays;
this counts the fields of a body without making anything of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from mint_engine.wire.errors import WireError

MAX_FIELDS = 1 << 20
_SMALL = 1 << 20  # bytes: what a body of this size can become needs no look
_MAX_PACKED = 128  # bytes of a list of integers
_LISTS = ("shape", "trailing_shape")  # the fields that are one: a byte in the body, eight in memory
_MESSAGE, _PACKED = 1, 2  # what needs a closer look


def check_structure(body: bytes, descriptor: Any) -> None:
    """Raises WireError if `body` has more than `MAX_FIELDS` fields, counting those of embedded messages."""
    if len(body) > _SMALL:
        _count(body, 0, len(body), descriptor, 0)


def _count(body: bytes, at: int, end: int, descriptor: Any, fields: int) -> int:
    """`fields` and those between `at` and `end`, which hold a message of `descriptor`."""
    looks = _closer_looks(descriptor)
    while at < end:
        fields += 1
        if fields > MAX_FIELDS:
            raise WireError(f"body: expected at most {MAX_FIELDS} protobuf fields, got more")
        tag, at = _varint(body, at, end)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(body, at, end)
            if size > end - at:
                raise WireError("body: expected a protobuf message, got a truncated one")
            look = looks.get(tag >> 3)
            if look is not None:
                inner, what = look
                if what == _MESSAGE:
                    fields = _count(body, at, at + size, inner, fields)
                elif size > _MAX_PACKED:
                    raise WireError(f"{inner}: expected a few sizes, got {size} bytes of them")
            at += size
        elif kind == 0:
            _, at = _varint(body, at, end)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        else:
            raise WireError("body: expected a protobuf message, got other bytes")
    if at != end:
        raise WireError("body: expected a protobuf message, got a truncated one")
    return fields


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError("body: expected a protobuf message, got a truncated one")


@cache
def _closer_looks(descriptor: Any) -> dict[int, tuple[Any, int]]:
    """By field number: the descriptor of an embedded message, or the name of a packed list."""
    looks: dict[int, tuple[Any, int]] = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            looks[field.number] = field.message_type, _MESSAGE
        elif field.name in _LISTS:
            looks[field.number] = field.name, _PACKED
    return looks
