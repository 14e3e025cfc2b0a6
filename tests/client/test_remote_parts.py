"""The parts of our HTTP client: addresses, batches in parts, tokenizers from a server, retries' timing."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import httpx
import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import save_byte_tokenizer

import mint
from mint import types
from mint_engine.client.connection import open_engine
from mint_engine.client.remote import RemoteEngine, address_of, close_connections, connect, normalize_url, tokenizers
from mint_engine.client.remote.chunks import cut, datum_bytes, join, sum_of_weights
from mint_engine.client.remote.limits import Limits
from mint_engine.client.remote.transport import _advised_delay, _Waiting
from mint_engine.types import ForwardBackwardOutput, TensorData

# --- addresses


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://mint.macaron.xin/", "https://mint.macaron.xin"),
        ("mint-cn.macaron.xin", "https://mint-cn.macaron.xin"),
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        (" http://10.0.0.1:8000/prefix/ ", "http://10.0.0.1:8000/prefix"),
    ],
)
def test_an_address_may_leave_out_what_is_obvious(given, url):
    assert normalize_url(given) == url


@pytest.mark.parametrize("wrong", ["ftp://host", "https://", "http://host:port", "http://host?x=1", 3, "http://[::1"])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(mint.UserError, match="base_url: expected"):
        normalize_url(wrong)


def test_the_key_comes_from_the_environment_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("MINT_API_KEY", "sk-environment")
    assert address_of("https://host").api_key == "sk-environment"
    assert address_of("https://host", "tml-mine").api_key == "tml-mine"
    monkeypatch.setenv("MINT_API_KEY", "")
    assert address_of("https://host").api_key is None
    assert "tml-mine" not in repr(address_of("https://host", "tml-mine"))


def test_the_options_of_the_sdks_are_honoured_or_refused():
    address = address_of(
        "https://host", options={"timeout": httpx.Timeout(7), "max_retries": 3, "default_headers": {"a": "1", "b": "1"},
        "default_headers_overrides": {"b": "2"}, "default_query": {"q": "x"}},
    )  # fmt: skip
    assert (address.timeout, address.max_retries, address.query) == ((7.0,) * 4, 3, (("q", "x"),))
    assert dict(address.headers) == {"a": "1", "b": "2"}
    for options in (
        {"http_client": httpx.Client}, {"timeout": 0}, {"timeout": "long"}, {"max_retries": -1}, {"max_retries": 1.5},
        {"default_headers": {"a": 1}}, {"default_query": "q"},
    ):  # fmt: skip
        with pytest.raises(mint.UserError, match=next(iter(options))):
            address_of("https://host", options=options)
    with pytest.raises(mint.UserError, match="api_key: expected printable ASCII"):
        address_of("https://host", "kéy")


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [
        (3, (3, 3, 3, 3)),
        (30, (5, 30, 30, 30)),  # to connect takes no longer because an answer may
        (None, (None, None, None, None)),
        (mint.Timeout(9, connect=None, write=1.5), (None, 9, 1.5, 9)),
    ],
)
def test_a_timeout_holds_for_every_request_in_all_its_parts(engine, timeout, expected):
    server = FakeServer(engine)
    remote = RemoteEngine(address_of("http://server", options={"timeout": timeout}), wire=server)
    try:
        remote.capabilities()
        service = mint.ServiceClient(engine=remote)
        service.create_sampling_client(base_model="tiny")  # which may take long: so much more than the user said
    finally:
        remote.close()
    sent = {request.url.path.rpartition("/")[2]: request.extensions["timeout"] for request in server.seen}
    parts = ("connect", "read", "write", "pool")
    assert tuple(sent["get_server_capabilities"][part] for part in parts) == expected
    read = None if timeout is None else 300
    assert sent["create_sampling_session"] == sent["get_server_capabilities"] | {"read": read}


def test_connections_are_shared_by_equal_addresses_and_a_server_chooses_its_own_dtype(monkeypatch):
    monkeypatch.setenv("MINT_BASE_URL", "127.0.0.1:9")
    first = open_engine(base_url=None, api_key="a", dtype=None)
    assert first is connect(address_of("http://127.0.0.1:9", "a"))
    assert first is not open_engine(base_url=None, api_key="b", dtype=None)
    with pytest.raises(mint.UserError, match=r"dtype: expected None for the server 127\.0\.0\.1:9"):
        open_engine(base_url=None, api_key=None, dtype="float32")
    close_connections()
    assert first is not open_engine(base_url=None, api_key="a", dtype=None)
    close_connections()


# --- batches in parts


def datum(tokens: int) -> types.Datum:
    inputs = {"target_tokens": [1] * tokens, "weights": [0.5] * tokens}
    return types.Datum(model_input=types.ModelInput.from_ints([1] * tokens), loss_fn_inputs=inputs)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 8), st.integers(1, 1000))
def test_parts_keep_the_order_and_the_limits(lengths, most_datums, most_bytes):
    data = [datum(n) for n in lengths]
    parts = list(cut(data, most_datums, most_bytes))
    assert [d for part in parts for d in part] == data
    assert all(len(part) <= most_datums for part in parts)
    assert all(len(part) == 1 or sum(map(datum_bytes, part)) <= most_bytes for part in parts)
    assert len(parts) == 1 or all(parts)
    assert sum_of_weights(data) == 0.5 * sum(lengths)


def test_metrics_of_parts_become_those_of_the_whole():
    def part(n: int, **metrics: float) -> ForwardBackwardOutput:
        named = {name.replace("_", ":"): value for name, value in metrics.items()}
        return ForwardBackwardOutput("loss", [{"logprobs": TensorData([0.0], "float32")}] * n, named)

    first = part(1, loss_sum=1, a_mean=1, b_min=3, c_max=3, d_slack=3, e_unique=7, f_hash2=2**53, only_sum=1, odd=1)
    second = part(3, loss_sum=2, a_mean=5, b_min=1, c_max=9, d_slack=7, e_unique=8, f_hash2=4, odd=1)
    whole = join([first, second], 4.0)
    assert whole.metrics == {
        "loss:sum": 3, "a:mean": 4, "b:min": 1, "c:max": 9, "d:slack": 1, "e:unique": 7, "e:unique_1": 8,
        "f:hash2": 2**53 + 4,
    }  # fmt: skip
    assert (len(whole.loss_fn_outputs), whole.loss) == (4, 0.75)


def test_as_many_samples_are_under_way_as_the_process_may_open_files(monkeypatch):
    import resource

    assert Limits().samples == 512
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    from mint_engine.client.remote.limits import _open_files

    assert _open_files() == 64
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert _open_files() > 10**6


# --- waiting


def test_delays_grow_and_a_server_s_advice_counts_within_reason():
    waiting = _Waiting()
    assert waiting.next_delay(None, at_once=True) == 0.0
    delays = [waiting.next_delay(None, at_once=True) for _ in range(12)]
    assert all(low < 1.1 * high for low, high in zip(delays[:3], delays[4:7], strict=True))
    assert 5.0 <= delays[-1] <= 10.0
    assert 2.0 <= waiting.next_delay(2.0, at_once=False) <= 2.5
    advice = [
        ({"retry-after": "3"}, 3.0), ({"retry-after-ms": "250"}, 0.25), ({"retry-after": "86400"}, 60.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None), ({"retry-after": "-1"}, None), ({}, None),
        ({"retry-after": "nan"}, None),
    ]  # fmt: skip
    for headers, seconds in advice:
        assert _advised_delay(httpx.Response(503, headers=headers)) == seconds


# --- tokenizers


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_tokenizer_from_a_server_is_unpacked_once_and_read(tmp_path):
    save_byte_tokenizer(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    archive = zipped(**files)
    directory = tokenizers.unpack(archive, "tiny", tmp_path / "home")
    assert tokenizers.unpack(archive, "tiny", tmp_path / "home") == directory
    assert tokenizers.load(directory).decode(tokenizers.load(directory).encode("12 * 3")) == "12 * 3"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "source" / "tokenizer.json", "tokenizer.json")
    assert [p.name for p in tokenizers.unpack(buffer.getvalue(), "tiny", tmp_path / "home").iterdir()] == [
        "tokenizer.json"
    ]


def test_an_archive_cannot_write_elsewhere_or_bring_code(tmp_path):
    archive = zipped(**{
        "tokenizer.json": b"{}", "../escaped.json": b"x", "/tmp/absolute.json": b"x", "tokenization_evil.py": b"x",
        "a/b.json": b"x", ".hidden.json": b"x", "model.safetensors": b"x",
    })  # fmt: skip
    directory = tokenizers.unpack(archive, "tiny", tmp_path / "home")
    assert [path.name for path in directory.iterdir()] == ["tokenizer.json"]
    assert not (tmp_path / "escaped.json").exists()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("tokenizer.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(mint.ModelError, match="there is no tokenizer file in it"):
        tokenizers.unpack(buffer.getvalue(), "tiny", tmp_path / "home")


@pytest.mark.parametrize(
    "archive", [b"", b"PK\x03\x04garbage", b"garbage", gzip.compress(b"garbage", mtime=0), zipped(x=b"1")]
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path, archive):
    with pytest.raises(mint.ModelError, match="the server's tokenizer of 'tiny' cannot be read"):
        tokenizers.unpack(archive, "tiny", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "MOST_BYTES", 1000)
    with pytest.raises(mint.ModelError, match="larger than 1000 bytes"):
        tokenizers.unpack(zipped(**{"tokenizer.json": b" " * 10_000}), "tiny", tmp_path)


def test_a_tokenizer_on_this_machine_is_used_first(tmp_path):
    save_byte_tokenizer(tmp_path)
    assert tokenizers.cached_directory(str(tmp_path)) == tmp_path
    for name in ("nobody/has-this-model", "smollm2-135m", "a/b/c", str(tmp_path / "nothing"), ""):
        assert tokenizers.cached_directory(name) is None


def test_a_model_without_a_tokenizer_anywhere_says_so():
    with pytest.raises(mint.ModelError, match="neither the server nor the hub has a tokenizer of 'nobody/has-this'"):
        tokenizers.from_hub("nobody/has-this")
