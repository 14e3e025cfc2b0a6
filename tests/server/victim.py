"""A server that is attacked: a process of its own, as a user starts it, with the keys of several tenants."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from api import Api, batch_json, prompt
from openai_fakes import byte_tokenizer
from tiny_models import build_tiny

from mint_engine.store import KeyLimits, Store

LIMIT = 1 << 20
"""`max_request_bytes` of the server."""
QUEUE = 1600
"""Its `sample_queue_limit`, of which one tenant gets three quarters."""

VOCAB = 257
_REPOSITORY = Path(__file__).parents[2]
_URL = re.compile(r"https?://127\.0\.0\.1:\d+")
_STARTED_WITHIN = 120.0
_SETTLED_WITHIN = 60.0
_PENDING = re.compile(r"^mint_promises_pending\{.*\} ([0-9.]+)$", re.M)
_INSIDE = ("Traceback", 'File "', ".py", "sqlite", "sqlalchemy", "site-packages", str(_REPOSITORY))


@dataclass
class Victim:
    """url: of the server. base: the model it serves. secrets: what must never be told or logged, by what it is."""

    process: subprocess.Popen[str]
    url: str
    base: str
    home: Path
    keys: dict[str, str]
    secrets: dict[str, str]
    log: list[str]
    record: Path
    numbers: list[float] = field(default_factory=list)

    def api(self, who: str | None = "alice", **headers: str) -> Api:
        return Api(self.url, None if who is None else self.keys[who], **headers)

    # ---- what an answer may not be

    def checked(self, response: httpx.Response) -> httpx.Response:
        """The answer itself: no 5xx, and nothing in it about the inside of the server."""
        assert response.status_code < 500, f"{response.request.url}: {response.status_code} {response.text[:500]}"
        told = response.text + str(response.headers)
        for name in (*_INSIDE, str(self.home)):
            assert name not in told, f"{response.request.url} tells {name!r}: {told[:500]}"
        for name, secret in self.secrets.items():
            assert secret not in told, f"{response.request.url} tells {name}"
        return response

    def outcome(self, api: Api, response: httpx.Response) -> Any:
        """What became of a request: its answer or, if that is a promise, what the promise gives. Never a fault of the
        server's own. None: it was refused."""
        if self.checked(response).status_code != 200:
            return None
        answer = response.json()
        if "request_id" not in answer or "type" in answer:
            return answer
        result = self.checked(api.retrieve(answer["request_id"]))
        assert result.status_code == 200, result.text
        value = result.json()
        if "error" not in value:
            return value
        assert value["category"] == "user", value
        return None

    # ---- how it is

    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @contextmanager
    def growing_at_most(self, size: int) -> Iterator[None]:
        """The process never takes `size` bytes more than at the beginning."""
        before = peak = self.rss()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.01):
                peak = max(peak, self.rss())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert peak - before < size, f"it took {(peak - before) >> 20} MiB more"

    def train_and_sample(self, who: str = "carol") -> list[float]:
        """What a fresh model gives: log-probabilities before and after a step, a greedy sample and its own."""
        with self.api(who) as api:
            session = api.session()
            model = api.model(self.base, session)
            first = api.result("forward_backward", **batch_json(model, 1))
            api.result("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 1e-2})
            second = api.result("forward_backward", **batch_json(model, 3))
            sampled = api.result(
                "asample", sampling_session_id=api.sampler(model, 4), seq_id=0, prompt=prompt(5, 6, 7), num_samples=1,
                sampling_params={"max_tokens": 6, "temperature": 0.0, "seed": 3},
            )  # fmt: skip
            api.ok(f"sessions/{session}/finish", reason={"type": "success"})
        numbers: list[float] = []
        for output in (first, second):
            numbers += [value for one in output["loss_fn_outputs"] for value in one["logprobs"]["data"]]
        for sequence in sampled["sequences"]:
            numbers += [*sequence["tokens"], *sequence["logprobs"]]
        return numbers

    def check_serving(self, who: str = "carol") -> None:
        """Others are served, with the numbers of before. (Samples beside others differ in their last bits.)"""
        assert self.process.poll() is None, f"the server died:\n{self.tail()}"
        np.testing.assert_allclose(self.train_and_sample(who), self.numbers, rtol=0, atol=1e-4)

    def pending(self) -> int:
        """Requests that were accepted and are not done."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return int(sum(float(count) for count in _PENDING.findall(text)))

    def check_unharmed(self) -> None:
        """It lives, has no promise that is stuck, trains and samples as before; nothing has got out of its home."""
        assert self.process.poll() is None, f"the server died:\n{self.tail()}"
        end = time.monotonic() + _SETTLED_WITHIN
        while pending := self.pending():
            assert time.monotonic() < end, f"{pending} promises are stuck"
            time.sleep(0.05)
        assert self.train_and_sample() == self.numbers
        assert self.record.read_text() == "", "the server left its home"
        text = "".join(self.log)
        assert "Traceback" not in text, text[max(0, text.index("Traceback") - 500) :][:6000]
        for name, secret in self.secrets.items():
            assert secret not in text, f"{name} is in the log"

    def tail(self) -> str:
        return "".join(self.log[-60:])


@contextmanager
def victim(directory: Path, *flags: str, **limits: KeyLimits) -> Iterator[Victim]:
    """Alice, Bob, Carol and Mallory have keys; `limits` are those of theirs that have some. "revoked" had one.

    directory: empty; the server's home, model, temporary files and log go there.
    """
    base = build_tiny("qwen3", directory / "model", vocab_size=VOCAB, eos_token_id=256)
    byte_tokenizer(base).save_pretrained(base)
    home, empty, temporary = directory / "home", directory / "empty", directory / "tmp"
    for made in (home, empty, temporary):
        made.mkdir()
    keys, secrets = _make_keys(home, limits)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MINT_", "TINKER_"))}
    environment |= {"HOME": str(empty), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    record = directory / "record"
    record.touch()
    command = [
        sys.executable, str(Path(__file__).with_name("hostile_launcher.py")), str(record), str(home), str(temporary),
        "--", "serve", "--model", str(base), "--dtype", "float32", "--port", "0", "--home", str(home),
        "--max-request-bytes", str(LIMIT), "--gap-timeout-s", "2", "--long-poll-s", "5", "--kv-cache-bytes",
        str(64 << 20), "--sample-queue-limit", str(QUEUE), "--log-level", "debug", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=empty, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log: list[str] = []
    urls: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, log, urls), daemon=True)
    reader.start()
    try:
        url = urls.get(timeout=_STARTED_WITHIN)
        assert url is not None, f"the server did not start:\n{''.join(log)}"
        server = Victim(process, url, str(base), home, keys, secrets, log, record)
        server.numbers = server.train_and_sample()
        assert server.train_and_sample() == server.numbers  # or it says nothing that they are the same at the end
        secrets["the server's secret"] = (home / "server.secret").read_bytes().hex()
        yield server
        assert not any(empty.iterdir()), "the server wrote where it was started"
        assert not any(temporary.iterdir()), "the server left temporary files"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
        reader.join()
    assert code == 0, f"the server ended with {code} after SIGTERM:\n{''.join(log[-60:])}"


def _make_keys(home: Path, limits: dict[str, KeyLimits]) -> tuple[dict[str, str], dict[str, str]]:
    """The keys by who has them; and everything that must never be told, by what it is."""
    store = Store(home)
    keys = {}
    for who in ("alice", "bob", "carol", "mallory", "revoked"):
        record, keys[who] = store.keys.create(who, limits=limits.get(who))
        if who == "revoked":
            store.keys.revoke(record.key_id)
    with store._database.read() as connection:
        hashes = connection.exec_driver_sql("select name, secret_hash from keys").all()
    store.close()
    secrets = {f"the key of {who}": secret for who, secret in keys.items()}
    for who, digest in hashes:
        secrets[f"the hash of {who}'s key"] = digest.hex() if isinstance(digest, bytes) else digest
    return keys, secrets


def _read(process: subprocess.Popen[str], log: list[str], urls: queue.Queue[str | None]) -> None:
    """The server's log, and its URL from the banner; None when it has ended."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            log.append(line)
            if found := _URL.search(line):
                urls.put(found[0])
    urls.put(None)
