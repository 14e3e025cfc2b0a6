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
import psutil
from api import Api, batch_json, prompt
from openai_fakes import byte_tokenizer
from tiny_models import build_tiny

from mint_engine.store import KeyLimits, Store

LIMIT = 1 << 20
"""`max_request_bytes` of the server."""

VOCAB = 257
_URL = re.compile(r"https?://127\.0\.0\.1:\d+")
_STARTED_WITHIN = 120.0
_SETTLED_WITHIN = 60.0
_PENDING = re.compile(r"^mint_promises_pending\{.*\} ([0-9.]+)$", re.M)


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

    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def train_and_sample(self) -> list[float]:
        """What a fresh model gives: losses before and after a step, a greedy sample and its log-probabilities."""
        with self.api("carol") as api:
            session = api.session()
            model = api.model(self.base, session)
            first = api.result("forward_backward", **batch_json(model, 1))
            api.result("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 1e-2})
            second = api.result("forward_backward", **batch_json(model, 3))
            sampler = api.sampler(model, 4)
            sampled = api.result(
                "asample", sampling_session_id=sampler, seq_id=0, prompt=prompt(5, 6, 7), num_samples=1,
                sampling_params={"max_tokens": 6, "temperature": 0.0, "seed": 3},
            )  # fmt: skip
            api.ok(f"sessions/{session}/finish", reason={"type": "success"})
        numbers: list[float] = []
        for output in (first, second):
            numbers += [value for one in output["loss_fn_outputs"] for value in one["logprobs"]["data"]]
        for sequence in sampled["sequences"]:
            numbers += [*sequence["tokens"], *sequence["logprobs"]]
        return numbers

    def pending(self) -> int:
        """Requests that were accepted and are not done."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return int(sum(float(count) for count in _PENDING.findall(text)))

    def check_unharmed(self) -> None:
        """It lives, trains and samples as before, no promise is stuck, nothing left its home, its log tells nothing."""
        assert self.process.poll() is None, f"the server died:\n{self.tail()}"
        assert self.train_and_sample() == self.numbers
        end = time.monotonic() + _SETTLED_WITHIN
        while pending := self.pending():
            assert time.monotonic() < end, f"{pending} promises are stuck"
            time.sleep(0.05)
        assert self.record.read_text() == "", "the server left its home"
        text = "".join(self.log)
        assert "Traceback" not in text, self.tail()
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
    keys, hidden = _make_keys(home, limits)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MINT_", "TINKER_"))}
    environment |= {"HOME": str(empty), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    record = directory / "record"
    record.touch()
    command = [
        sys.executable, str(Path(__file__).with_name("hostile_launcher.py")), str(record), str(home), str(temporary),
        "--", "serve", "--model", str(base), "--dtype", "float32", "--port", "0", "--home", str(home),
        "--max-request-bytes", str(LIMIT), "--gap-timeout-s", "2", "--long-poll-s", "5", "--kv-cache-bytes",
        str(64 << 20), "--log-level", "debug", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=empty, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log: list[str] = []
    try:
        server = Victim(process, _url(process, log), str(base), home, keys, hidden, log, record)
        server.numbers = server.train_and_sample()
        assert server.train_and_sample() == server.numbers  # or it says nothing that they are the same at the end
        yield server
        assert not any(empty.iterdir()), "the server wrote where it was started"
        assert not any(temporary.iterdir()), "the server left temporary files"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
    assert code == 0, f"the server ended with {code} after SIGTERM:\n{''.join(log[-60:])}"


def _make_keys(home: Path, limits: dict[str, KeyLimits]) -> tuple[dict[str, str], dict[str, str]]:
    """The secrets by who has them; and everything that must never be told, by what it is."""
    store = Store(home)
    keys = {}
    for who in ("alice", "bob", "carol", "mallory", "revoked"):
        record, keys[who] = store.keys.create(who, limits=limits.get(who))
        if who == "revoked":
            store.keys.revoke(record.key_id)
    with store._database.read() as connection:
        hashes = [row[0] for row in connection.exec_driver_sql("select secret_hash from keys")]
    store.close()
    hidden = {f"the key of {who}": secret for who, secret in keys.items()}
    hidden |= {f"a key's hash ({i})": value.hex() if isinstance(value, bytes) else value for i, value in enumerate(hashes)}
    return keys, hidden


def _url(process: subprocess.Popen[str], log: list[str]) -> str:
    """From the server's banner. A thread reads on, what comes after."""
    urls: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if found := _URL.search(line):
                urls.put(found[0])
        urls.put(None)

    threading.Thread(target=read, daemon=True).start()
    url = urls.get(timeout=_STARTED_WITHIN)
    assert url is not None, f"the server did not start:\n{''.join(log)}"
    return url


def tokens(value: Any) -> dict[str, Any]:
    return prompt(*value)
