"""`mint-engine serve` as a process: what it prints, how it ends, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api import Api, batch, prompt

from mint_engine import wire
from mint_engine.engine import Engine
from mint_engine.errors import UserError
from mint_engine.server import Settings
from mint_engine.server.serve import check_address, run, warn_of_small_bodies
from mint_engine.types import AdamParams, LoraConfig

START = """
import json, sys
import torch
torch.set_num_threads(1)
from mint_engine.server import Settings
from mint_engine.server.serve import run
sys.exit(run(Settings.load(**json.loads(sys.argv[1]))))
"""
ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 0.0}


class Served:
    def __init__(self, home: Path, model: Path, **settings: Any) -> None:
        chosen = {"home": str(home), "models": [str(model)], "dtype": "float32", "kv_cache_bytes": 1 << 22, "port": 0}
        command = [sys.executable, "-c", START, json.dumps(chosen | settings)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            if "stop: Ctrl-C" in line:
                break
        found = re.search(r"ready on (\S+)", self.banner)
        assert found, self.process.communicate()[1]
        self.url = found[1]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, the log)."""
        self.process.send_signal(number)
        log = self.process.communicate(timeout=60)[1]
        return self.process.returncode, log


@contextmanager
def serve(home: Path, model: Path, **settings: Any) -> Iterator[Served]:
    served = Served(home, model, **settings)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
        served.process.communicate()


def in_process(home: Path, base: Path, steps: int) -> list[list[float]]:
    """The same training without a server."""
    engine = Engine(dtype="float32", home=home, kv_cache_bytes=1 << 22)
    try:
        session = engine.create_session()
        lora = LoraConfig(rank=8, seed=1)
        model = engine.create_model(session, str(base), lora).result()
        found = []
        for _ in range(steps):
            out = engine.forward_backward(model, batch("m", 1).data, "cross_entropy").result()
            engine.optim_step(model, AdamParams(**ADAM)).result()
            found.append([float(x) for o in out.loss_fn_outputs for x in o["logprobs"].to_numpy()])
        return found
    finally:
        engine.close()


@pytest.mark.slow
def test_a_restart_in_the_middle_changes_nothing(tiny_tied: Path, tmp_path: Path) -> None:
    """SIGTERM between accepting and fetching; the next process answers the old promises, and training goes on."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = in_process(tmp_path / "alone", tiny_tied, 4)
    finally:
        torch.set_num_threads(threads)
    home, found = tmp_path / "served", []
    with serve(home, tiny_tied) as server, Api(server.url) as api:
        model = api.model(str(tiny_tied))
        sampler = api.sampler(model, 1)
        before = api.result("asample", **_sample(sampler))
        promises = []
        for step in range(3):
            promises.append(api.proto(batch(model, 2 + 2 * step)).json()["request_id"])
            promises.append(api.ok("optim_step", model_id=model, seq_id=3 + 2 * step, adam_params=ADAM)["request_id"])
        code, log = server.end()
        assert (code, "Traceback" in log) == (0, False), log
    with serve(home, tiny_tied) as server, Api(server.url) as api:
        again = api.ok("optim_step", model_id=model, seq_id=7, adam_params=ADAM)["request_id"]
        assert again == promises[-1], "a request of before is not run again"
        promises.append(api.proto(batch(model, 8)).json()["request_id"])
        for request_id in promises[::2]:
            out = wire.parse_forward_backward_output(api.retrieve(request_id, wire.PROTOBUF).content)
            found.append([float(x) for o in out.loss_fn_outputs for x in o["logprobs"].to_numpy()])
        for request_id in promises[1::2]:
            assert api.retrieve(request_id).json()["metrics"]["grad_norm"] > 0
        assert api.result("asample", **_sample(sampler)) == before, "the sampler is still that of the first step"
        assert server.end()[0] == 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_held_poll_is_answered_with_something_to_retry(tiny_tied: Path, tmp_path: Path) -> None:
    with serve(tmp_path, tiny_tied) as server, Api(server.url) as api:
        model = api.model(str(tiny_tied))
        waiting = api.ok("optim_step", model_id=model, seq_id=2)["request_id"]  # seq_id 1 never comes
        answers: list[httpx.Response] = []
        poll = threading.Thread(target=lambda: answers.append(api.post("retrieve_future", request_id=waiting)))
        poll.start()
        poll.join(0.5)
        assert poll.is_alive()
        code, log = server.end()
        poll.join(5)
        assert code == 0, log
        assert (answers[0].status_code, answers[0].headers["retry-after"]) == (503, "1")


@pytest.mark.slow
def test_ctrl_c_ends_well_too_and_logs_are_json_if_asked(tiny_tied: Path, tmp_path: Path) -> None:
    with serve(tmp_path, tiny_tied, log_format="json") as server, Api(server.url) as api:
        api.post("get_info", {"X-Request-ID": "find-me"}, model_id="x")
        code, log = server.end(signal.SIGINT)
    assert code == 0
    lines = [json.loads(line) for line in log.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert (line["status"], line["path"], line["level"]) == (404, "/api/v1/get_info", "info")


def test_what_it_prints_can_be_pasted(tiny_tied: Path, tmp_path: Path) -> None:
    with serve(tmp_path, tiny_tied) as server:
        exports = dict(re.findall(r"export (\w+)=(\S+)", server.banner))
        assert exports["MINT_BASE_URL"] == exports["TINKER_BASE_URL"] == server.url
        for word in (str(tiny_tied), "float32 on cpu", "attention: ", "this machine only"):
            assert word in server.banner
        with Api(server.url, exports["TINKER_API_KEY"]) as api:
            assert api.session()


def test_without_keys_only_loopback_is_served(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(Settings(host=host), keys=False)
    check_address(Settings(host="0.0.0.0"), keys=True)
    check_address(Settings(host="0.0.0.0", allow_anonymous=True), keys=False)
    for host in ("0.0.0.0", "192.168.1.2", "example.org", ""):
        with pytest.raises(UserError, match="mint-engine keys create"):
            check_address(Settings(host=host), keys=False)


def test_bodies_smaller_than_an_sdk_sends_are_warned_of(caplog) -> None:
    warn_of_small_bodies(Settings())
    assert caplog.text == ""
    warn_of_small_bodies(Settings(max_request_bytes=1 << 20))
    assert "max_request_bytes: expected at least 16777216, got 1048576" in caplog.text


@pytest.mark.parametrize(("settings", "error"), [({}, "models: expected"), ({"models": ["/no/such"]}, "no such dir")])
def test_settings_that_cannot_be_served_say_why(tmp_path: Path, settings, error, monkeypatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("mint_engine.server.logs.configure", lambda *_: None)
    with pytest.raises(UserError, match=error):
        run(Settings(home=tmp_path, port=0, **settings))


def test_a_port_that_is_taken_shows_before_anything_is_loaded(tmp_path: Path, monkeypatch) -> None:
    import socket

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("mint_engine.server.logs.configure", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"):
            run(Settings(home=tmp_path, port=taken.getsockname()[1], models=["never-loaded"]))


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nhost = "file"\ndtype = "float32"\nmodels = ["a", "b"]\n')
    monkeypatch.setitem(os.environ, "MINT_SERVER_PORT", "2")
    monkeypatch.setitem(os.environ, "MINT_SERVER_HOST", "environment")
    settings = Settings.load(file, port=3)
    assert (settings.port, settings.host, settings.dtype, settings.models) == (3, "environment", "float32", ["a", "b"])
    monkeypatch.setitem(os.environ, "MINT_SERVER_MODELS", "x, y")
    assert Settings().models == ["x", "y"]
    file.write_text("prot = 1")
    with pytest.raises(ValueError, match="prot"):
        Settings.load(file)
    file.write_text("= 1")
    with pytest.raises(UserError, match="is not TOML"):
        Settings.load(file)
    with pytest.raises(UserError, match="there is no file"):
        Settings.load(tmp_path / "missing.toml")


def _sample(sampler: str) -> dict[str, Any]:
    params = {"max_tokens": 6, "seed": 7, "stop": []}
    return {"sampling_session_id": sampler, "prompt": prompt(5, 6, 7), "num_samples": 2, "sampling_params": params}
