"""Values that no client sends, and ways to put them into bodies that clients do send."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = [
    0, -1, 1, 2, 7, 257, 1000, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1,
    2**64, 10**30, 10**400, 0.5, -0.0, 2.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "x" * 513, "x" * 70_000, "\n", "a\r\nX-Injected: 1", "\u202e",
    "\ufeff", "名前", "🦊" * 100, ".", "..", "/", "//", "../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "~root", "%00", "%2e%2e%2f", "..%2f..%2fmint.db", "tinker://", "tinker:///", "tinker://../../x/weights/y", "mint://a/b/c/d",
    "tinker://x/../../server.secret", "http://127.0.0.1:1/", "a:b:train:0", ":train:0", ":req:", "req:", "' or 1=1 --",
    "{{7*7}}", "${jndi:ldap://127.0.0.1/a}", "NaN", "-1", "0x10", "true", "\x1b[31m", "encoded_text", "age1",
    "ssh-rsa AAAA",
]  # fmt: skip
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": None},
    [None],
    [1] * 1000,
    ["a"] * 300,
    {"a": {"a": {"a": 1}}},
]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


values = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(TEXTS)
    | st.sampled_from([*OTHERS, nested(60), nested(250)])
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20)
    | st.recursive(st.none() | st.integers(-5, 300), lambda inner: st.lists(inner, max_size=4), max_leaves=6)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something else can be put."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with one to three things replaced, taken out or put in."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([place for place in places(body) if place] or [("x",)]))
        *way, last = path
        at: Any = body
        for key in way:
            at = at[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "grow"]))
        if how == "remove":
            del at[last]
        elif how == "add" and isinstance(at, dict):
            at[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(values))  # the next round may change it
        elif how == "grow" and isinstance(at, dict) and isinstance(at.get(last), list):
            at[last] = at[last] * draw(st.integers(0, 200))
        else:
            at[last] = copy.deepcopy(draw(values))  # the next round may change it
        if not body:
            break
    return body


def dumps(body: Any) -> bytes:
    """As Python writes it: NaN and infinities as words, lone surrogates as escapes."""
    return json.dumps(body).encode()
