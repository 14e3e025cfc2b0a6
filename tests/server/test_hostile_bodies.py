"""Bodies that are broken, too large, or made to become too large; requests that never end."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import zstandard
from api import Api, batch, prompt
from victim import LIMIT, Victim, victim

from mint_engine import wire

JSON = "application/json"
GOOD = json.dumps({"session_id": "nobody's", "prompt": prompt(1, 2, 3)}).encode()
# Every way in which bodies are read.
ROUTES = {
    "create_session": JSON, "session_heartbeat": JSON, "forward": JSON, "forward_backward": wire.PROTOBUF,
    "optim_step": JSON, "asample": JSON, "telemetry": JSON, "mint/forward_backward_reverse_kl": JSON,
    "../../v1/chat/completions": JSON,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _unharmed(attacked: Victim) -> Iterator[None]:
    yield
    attacked.check_unharmed()


@pytest.fixture
def api(attacked: Victim) -> Iterator[Api]:
    with attacked.api("mallory") as api:
        yield api


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zeros(size: int, level: int = 19) -> bytes:
    """A zstd frame of many zeros, made without having them."""
    packer = zstandard.ZstdCompressor(level=level).compressobj()
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(size >> 20)), packer.flush()])


DAMAGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zstd that is none": ("zstd", lambda body: body),
    "zstd cut short": ("zstd", lambda body: zstd(body)[:-3]),
    "zstd with a changed byte": ("zstd", lambda body: zstd(body)[:9] + b"\xff" + zstd(body)[10:]),
    "two zstd frames": ("zstd", lambda body: zstd(body) * 2),
    "an empty zstd body": ("zstd", lambda body: b""),
    "a zstd head that asks for a window of 2 GiB": ("zstd", lambda body: bytes.fromhex("28b52ffd04a8") + body),
    "a zstd frame with a dictionary": ("zstd", lambda body: bytes.fromhex("28b52ffd2101020304") + body),
    "gzip that is none": ("gzip", lambda body: body),
    "gzip cut short": ("gzip", lambda body: gzip.compress(body)[:-6]),
    "gzip with a wrong checksum": ("gzip", lambda body: gzip.compress(body)[:-8] + bytes(8)),
    "gzip and more": ("gzip", lambda body: gzip.compress(body) + b"more"),
    "deflate that is none": ("deflate", lambda body: b"\x78\x9c" + body),
    "deflate cut short": ("deflate", lambda body: zlib.compress(body)[:-3]),
    "an unknown encoding": ("br", lambda body: body),
    "two encodings": ("zstd, gzip", lambda body: zstd(gzip.compress(body))),
    "an encoding of commas": (", ,", lambda body: b""),
    "a very long encoding": ("x" * 5000, lambda body: body),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_encodings_are_refused(attacked: Victim, api: Api, what: str) -> None:
    encoding, damage = DAMAGED[what]
    for route, kind in ROUTES.items():
        headers = {"Content-Type": kind, "Content-Encoding": encoding}
        response = attacked.checked(api.http.post(route, content=damage(GOOD), headers=headers))
        assert response.status_code in (400, 413, 415), (route, response.text)


@pytest.mark.parametrize("encoding", ["zstd", "gzip", "deflate"])
def test_a_bomb_takes_no_more_memory_than_a_body_may(attacked: Victim, api: Api, encoding: str) -> None:
    """A gibibyte in some kilobytes, sixteen times at once."""
    size = 1 << 30 if encoding == "zstd" else 1 << 28
    if encoding == "zstd":
        bomb = zeros(size)
    else:
        packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
        bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.flush()])
    assert len(bomb) < LIMIT

    def send(route: str) -> int:
        headers = {"Content-Type": ROUTES[route], "Content-Encoding": encoding}
        return attacked.checked(api.http.post(route, content=bomb, headers=headers)).status_code

    with attacked.growing_at_most(64 << 20), ThreadPoolExecutor(16) as threads:
        assert set(threads.map(send, ["forward_backward", "create_session"] * 8)) == {413}


@pytest.mark.slow
def test_bombs_of_the_default_limit_take_turns(tmp_path: Path) -> None:
    """256 MiB each, in 8 KB and less: of sixteen at once two are unpacked at a time, and others are served."""
    size = 256 << 20
    spaces = zstd(b" " * (size - 2) + b"{}")
    numbers = zstd(b'{"a":[' + b"1234567," * ((size - 100) // 8) + b"1]}")
    with victim(tmp_path, "--max-request-bytes", str(size)) as server, server.api("mallory") as api:
        api.http.timeout = httpx.Timeout(600)

        def send(work: tuple[bytes, str]) -> int:
            body, kind = work
            headers = {"Content-Type": kind, "Content-Encoding": "zstd"}
            return server.checked(api.http.post("forward_backward", content=body, headers=headers)).status_code

        # Bombs of numbers take 3.0 GiB and somewhat more by turns, 4.3 if all six are parsed at once.
        for bomb, kind, most in (
            (zeros(size), wire.PROTOBUF, 2 << 30), (spaces, JSON, 2 << 30), (numbers, JSON, 4 << 30)
        ):  # fmt: skip
            with server.growing_at_most(most), ThreadPoolExecutor(16) as threads:
                sent = [threads.submit(send, (bomb, kind)) for _ in range(6 if bomb is numbers else 16)]
                begun = time.monotonic()
                server.check_serving()
                assert time.monotonic() - begun < 30
                assert {future.result() for future in sent} <= {400, 429}
        server.check_unharmed()


def test_what_does_not_fit_is_refused_however_it_is_sent(attacked: Victim, api: Api) -> None:
    over = LIMIT + 1

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(LIMIT // 16)

    def slowly_larger() -> bytes:
        return zstd(os.urandom(1000) + bytes(LIMIT))

    for route, kind in ROUTES.items():
        headers = {"Content-Type": kind}
        for body in (bytes(over), chunks()):
            try:
                response = api.http.post(route, content=body, headers=headers)
            except httpx.WriteError:  # the server answered, and hung up while we were still sending
                continue
            assert attacked.checked(response).status_code == 413, route
        if not route.startswith(".."):  # the OpenAI face takes no encodings: that is a 400
            headers["Content-Encoding"] = "zstd"
            assert attacked.checked(api.http.post(route, content=slowly_larger(), headers=headers)).status_code == 413
    upload = {"file": ("a.tar.gz", bytes(over))}
    assert attacked.checked(api.http.post("checkpoints/upload", files=upload)).status_code == 413


# ---- below HTTP ------------------------------------------------------------------------------------------------------


def connect(attacked: Victim) -> socket.socket:
    address = urlsplit(attacked.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def head(attacked: Victim, *lines: str, route: str = "/api/v1/create_session") -> bytes:
    fixed = [f"POST {route} HTTP/1.1", "Host: localhost", f"X-API-Key: {attacked.keys['mallory']}"]
    return "\r\n".join([*fixed, "Content-Type: application/json", *lines, "", ""]).encode()


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up, or for two seconds."""
    connection.settimeout(2)
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(parts)


BROKEN = {
    "a body longer than it says": (["Content-Length: 2"], b'{}GARBAGE / HTTP/9\r\n\r\n'),
    "a length that is no number": (["Content-Length: many"], b"{}"),
    "a negative length": (["Content-Length: -1"], b"{}"),
    "an enormous length": (["Content-Length: 99999999999999999999999"], b"{}"),
    "two lengths": (["Content-Length: 2", "Content-Length: 3"], b"{}x"),
    "a length and chunks": (["Content-Length: 2", "Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n"),
    "a chunk without a size": (["Transfer-Encoding: chunked"], b"\r\n{}\r\n0\r\n\r\n"),
    "an enormous chunk": (["Transfer-Encoding: chunked"], b"FFFFFFFFFFFFFFFFFF\r\n{}\r\n"),
    "an unknown transfer encoding": (["Transfer-Encoding: gzip"], b"{}"),
    "a NUL in a header": (["X-Request-ID: a\0b", "Content-Length: 2"], b"{}"),
    "a header that goes on in the next line": (["X-Request-ID: a", " b", "Content-Length: 2"], b"{}"),
    "bytes that are no text": (["X-Request-ID: \u00ff\u00fe", "Content-Length: 2"], b"\xff\xfe"),
    "an upgrade": (["Upgrade: websocket", "Connection: Upgrade", "Content-Length: 2"], b"{}"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_http_is_answered_or_hung_up_on(attacked: Victim, what: str) -> None:
    lines, body = BROKEN[what]
    with closing(connect(attacked)) as connection:
        connection.sendall(head(attacked, *lines, "Connection: close") + body)
        told = answer(connection)
    statuses = re.findall(rb"HTTP/1\.1 (\d\d\d)", told)
    assert all(status < b"500" for status in statuses), told
    assert b"Traceback" not in told
    attacked.check_serving()


TARGETS = ["/api/v1/\u00ff", "//", "http://[", "/%ff%fe%00", "*", "/" + "a" * 60_000, "/api/v1/%"]


@pytest.mark.parametrize("target", TARGETS)
def test_broken_targets_are_answered_or_hung_up_on(attacked: Victim, target: str) -> None:
    with closing(connect(attacked)) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        told = answer(connection)
    assert re.match(rb"HTTP/1\.1 4\d\d", told) or not told, told[:200]


def test_half_requests_hold_up_nobody(attacked: Victim) -> None:
    """Three hundred connections, each of which has sent a part of a request and waits."""
    whole = head(attacked, "Content-Length: 100") + b"{"
    chunked = head(attacked, "Transfer-Encoding: chunked") + b"5\r\n{"
    with ExitStack() as stack:
        for i in range(300):
            connection = stack.enter_context(closing(connect(attacked)))
            connection.sendall((b"", whole[:30], whole[:-60], whole, chunked)[i % 5])
        begun = time.monotonic()
        attacked.check_serving()
        attacked.check_serving("mallory")  # nor is a key's own work held up by its own half requests
        assert time.monotonic() - begun < 20
    attacked.check_serving()


@pytest.mark.parametrize("what", ["target", "header", "headers", "trailers"])
def test_a_head_without_end_takes_no_memory(attacked: Victim, what: str) -> None:
    """It needs no key: nobody is known before the head is complete."""
    begin, more = {
        "target": (b"GET /", b"a" * 65536),
        "header": (b"GET / HTTP/1.1\r\nX-A: ", b"a" * 65536),
        "headers": (b"GET / HTTP/1.1\r\n", b"X-Abcdefgh: 1\r\n" * 4096),
        "trailers": (
            b"POST /api/v1/auth/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Abcdefgh: 1\r\n" * 4096
        ),
    }[what]  # fmt: skip
    sent = 0
    with attacked.growing_at_most(32 << 20), closing(connect(attacked)) as connection:
        try:
            connection.sendall(begin)
            while sent < 256 << 20:
                connection.sendall(more)
                sent += len(more)
        except OSError:
            pass  # it hung up
    assert sent < 64 << 20, "it reads for ever"


def test_who_hangs_up_in_the_middle_leaves_nothing_behind(attacked: Victim) -> None:
    body = wire.encode_forward_backward(batch("m", 1, (500,)))
    for length in (1, 100, len(body) - 1):
        for route in ("forward_backward", "checkpoints/upload", "asample"):
            with closing(connect(attacked)) as connection:
                connection.sendall(head(attacked, f"Content-Length: {len(body)}", route=f"/api/v1/{route}"))
                connection.sendall(body[:length])
    attacked.check_unharmed()


# ---- JSON ------------------------------------------------------------------------------------------------------------

NO_OBJECTS = {
    "nothing": b"",
    "a word": b"undefined",
    "a list": b"[]",
    "a number": b"1e999",
    "a string": b'"x"',
    "null": b"null",
    "NaN": b'{"seq_id": NaN, "session_id": "s", "model_id": "m"}',
    "Infinity": b'{"temperature": -Infinity, "session_id": "s", "model_id": "m"}',
    "cut short": b'{"session_id": "s',
    "two objects": b"{}{}",
    "a comma too many": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a nest of lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a nest of objects": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "UTF-16": '{"session_id": "s"}'.encode("utf-16"),
    "bytes that are no UTF-8": b'{"session_id": "\xff\xfe"}',
    "half a surrogate pair as bytes": b'{"session_id": "\xed\xa0\x80"}',
    "a control character in a string": b'{"session_id": "a\x00b"}',
}


@pytest.mark.parametrize("what", NO_OBJECTS)
def test_what_is_no_json_object_is_refused(attacked: Victim, api: Api, what: str) -> None:
    for route, kind in ROUTES.items():
        if route == "telemetry":
            continue  # nobody looks into that
        headers = {"Content-Type": JSON if kind == JSON else kind}
        response = attacked.checked(api.http.post(route, content=NO_OBJECTS[what], headers=headers))
        assert 400 <= response.status_code < 500, (route, response.text)


ODD_VALUES = {
    "a number of ten thousand digits": b'{"session_id": "s", "seq_id": ' + b"9" * 10_000 + b"}",
    "lone surrogates": rb'{"session_id": "\ud800", "model_id": "\udfff", "tags": ["\ud800"]}',
    "NUL characters": rb'{"session_id": "\u0000", "model_id": "a\u0000b", "request_id": "\u0000"}',
    "the same key twice": b'{"session_id": "s", "session_id": 1, "model_id": "m", "model_id": []}',
    "a very long string": b'{"session_id": "' + b"s" * 900_000 + b'"}',
    "a very long key": b'{"' + b"s" * 900_000 + b'": 1}',
    "many lists": b'{"a": [' + b"[]," * 300_000 + b"[]]}",
    "many keys": b"{" + b",".join(b'"k%d": %d' % (i, i) for i in range(60_000)) + b"}",
}


@pytest.mark.parametrize("what", ODD_VALUES)
def test_odd_json_is_taken_or_refused(attacked: Victim, api: Api, what: str) -> None:
    for route in ROUTES:
        response = api.http.post(route, content=ODD_VALUES[what], headers={"Content-Type": JSON})
        attacked.checked(response)
        assert len(response.content) < 4096, "nobody needs all of it back"


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-protobuf; x", "", "a" * 2000, "/"])
def test_other_kinds_of_content_are_refused(attacked: Victim, api: Api, kind: str) -> None:
    for route in ("create_session", "optim_step", "asample", "retrieve_future"):
        response = attacked.checked(api.http.post(route, content=b"{}", headers={"Content-Type": kind}))
        assert response.status_code in (400, 415, 422) or route == "create_session"
