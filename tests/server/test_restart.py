"""A server that is restarted in the middle of everything: its clients go on, and training ends in the same bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos_proxy import FAULTS, chaos_proxy
from checkpoint_bits import check_same, contents
from server_process import Restarts, ServerProcess, server_process

import mint
from mint_engine.client.remote import Address, RemoteEngine, limits, transport
from mint_engine.store import Store

sys.path.append(str(Path(__file__).parents[1] / "sdk" / "drivers"))
import faults

pytestmark = pytest.mark.slow  # processes that start, stop and start again

CLIENTS = 2
PARTS = ("steps", "custom", "samples", "accumulation", "load", "resumption")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import build_tiny
    from tiny_tokenizer import VOCAB

    return build_tiny("qwen3", tmp_path_factory.mktemp("base"), tie_word_embeddings=True, vocab_size=VOCAB)


@pytest.fixture(autouse=True, scope="module")
def _quick_and_small() -> Iterator[None]:
    """Retries come soon, and every batch of the program goes as several requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "FIRST_DELAY", 0.02)
        patch.setattr(transport, "LAST_DELAY", 0.2)
        patch.setattr(limits, "CHUNK_DATUMS", 2)
        yield


@contextmanager
def connection(url: str) -> Iterator[RemoteEngine]:
    remote = RemoteEngine(Address(url))
    try:
        yield remote
    finally:
        remote.close()


def run(url: str, home: Path, base: Path, reached: Callable[[str], None]) -> dict[str, Any]:
    """The program by several clients at once: what they got and saved. `reached`: called by the first of them."""

    def one(seed: int) -> Any:
        with connection(url) as remote:
            service = mint.ServiceClient(engine=remote)
            return faults.train(
                service, mint.types, str(base), seed, reached=reached if seed == 0 else lambda part: None
            )

    with ThreadPoolExecutor(CLIENTS) as threads:
        made = json.loads(json.dumps(list(threads.map(one, range(CLIENTS)))))
    store = Store(home)
    return {
        "values": [one["values"] for one in made],
        "samples": [one["samples"] for one in made],
        "saved": [contents(store.resolve(path).directory) for one in made for path in one["paths"].values()],
    }


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    with server_process(home, base) as server:
        return run(server.url, home, base, lambda part: None)


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_clients_do_not_notice_a_restart(base: Path, tmp_path: Path, undisturbed: dict[str, Any], delay: float) -> None:
    """At SIGTERM whatever runs is finished, whatever waits goes to disk, and the next server takes it up."""
    with server_process(tmp_path, base) as server:
        restarts = Restarts(server, PARTS, delay)
        disturbed = run(server.url, tmp_path, base, restarts.reached)
        assert restarts.join() == len(PARTS)
    check_same(disturbed, undisturbed)


def test_restarts_and_a_bad_network_at_once(base: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    with server_process(tmp_path, base) as server, chaos_proxy(server.url, rate=0.4) as proxy:
        restarts = Restarts(server, PARTS, 0.05)
        disturbed = run(proxy.url, tmp_path, base, restarts.reached)
        restarts.join()
    assert set(proxy.counts) == {*FAULTS, "none"}
    check_same(disturbed, undisturbed)


def test_a_client_does_not_notice_a_restart_of_the_command(
    base: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with server_process(tmp_path, base, ServerProcess) as server:
        restarts = Restarts(server, ("accumulation",), 0.01)
        disturbed = run(server.url, tmp_path, base, restarts.reached)
        assert restarts.join() == 1
    check_same(disturbed, undisturbed)


# ---- what waits when the server is told to end -----------------------------------------------------------------------


def long_work(service: mint.ServiceClient, base: Path, then: Callable[[str], None]) -> dict[str, Any]:
    """Steps that take a while, all submitted at once, and a long sample; `then` is called when the first is done."""
    training = service.create_lora_training_client(str(base), rank=4, seed=1)
    sampler = training.save_weights_and_get_sampling_client()
    work = []
    for step in range(8):
        data = faults.supervised(mint.types, (400,) * 12, seed=step)
        work.append(training.forward_backward(data, "cross_entropy"))
        work.append(training.optim_step(mint.types.AdamParams(learning_rate=1e-2)))
    saved = training.save_state("end")
    params = mint.types.SamplingParams(max_tokens=200, seed=1, stop=[])
    sample = sampler.sample(mint.types.ModelInput.from_ints([5, 6, 7]), 2, params)
    work[0].result()
    then(training.model_id)
    return {
        "losses": [forward_backward.result().metrics["loss:sum"] for forward_backward in work[::2]],
        "norms": [(optim_step.result().metrics or {})["grad_norm"] for optim_step in work[1::2]],
        "tokens": [sequence.tokens for sequence in sample.result().sequences],
        "path": saved.result().path,
    }


def test_what_waits_is_done_by_the_next_server(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted and not begun: it goes to disk with its model, and is done after the restart, once."""
    monkeypatch.setattr(limits, "CHUNK_DATUMS", 100)
    waited: list[int] = []
    with server_process(tmp_path, base) as server, connection(server.url) as remote:
        service = mint.ServiceClient(engine=remote)

        def restart(model_id: str) -> None:
            server.terminate()
            parked = Store(tmp_path).parked(model_id)
            assert parked is not None
            waited.append(len(parked.note["pending"]))
            server.start()

        expected = long_work(service, base, lambda model_id: None)
        got = long_work(service, base, restart)
        store = Store(tmp_path)
        bits = [contents(store.resolve(made.pop("path")).directory) for made in (expected, got)]
    assert waited[0] > 5, "it was ended in the middle"
    assert bits[0] == bits[1]
    assert got == expected


class Raw:
    """A model of a client that sends what it likes, when it likes."""

    def __init__(self, http: httpx.Client, base: Path) -> None:
        self._http = http
        session = self.post("create_session", tags=[])["session_id"]
        lora = {"rank": 4, "seed": 0}
        create = self.post("create_model", session_id=session, model_seq_id=0, base_model=str(base), lora_config=lora)
        self.model_id = self.result(create["request_id"])["model_id"]

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        answer = self._http.post(route, json=body)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def ask(self, route: str, seq_id: int, **body: Any) -> str:
        """The request id of an operation."""
        answer: str = self.post(route, model_id=self.model_id, seq_id=seq_id, **body)["request_id"]
        return answer

    def result(self, request_id: str) -> dict[str, Any]:
        while (made := self.post("retrieve_future", request_id=request_id)).get("type") == "try_again":
            pass
        return made

    def forward_backward(self, seq_id: int) -> str:
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4], "dtype": "int64"},
                "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32"},
            },
        }
        data = {"data": [datum], "loss_fn": "cross_entropy"}
        return self.ask("forward_backward", seq_id, forward_backward_input=data)


def test_what_came_too_early_waits_through_a_restart(base: Path, tmp_path: Path) -> None:
    """Requests 2 and 3 of a model are there, 1 comes after the restart: then all three are done, in order."""
    with server_process(tmp_path, base) as server, httpx.Client(base_url=f"{server.url}/api/v1/", timeout=60) as http:
        model = Raw(http, base)
        save = model.ask("save_weights", 3, path="third")
        step = model.ask("optim_step", 2, adam_params={"learning_rate": 0.1})
        server.terminate()
        server.start()
        first = model.forward_backward(1)
        assert model.ask("optim_step", 2, adam_params={"learning_rate": 0.1}) == step
        assert "loss:sum" in model.result(first)["metrics"]
        assert model.result(step)["metrics"]["grad_norm"] > 0, "it came after the gradient"
        assert model.result(save)["path"].endswith("/weights/third")


def test_results_can_be_fetched_again_after_a_restart(base: Path, tmp_path: Path) -> None:
    """The server has answered, but nobody knows whether that arrived; the client has sent many requests since."""
    with server_process(tmp_path, base) as server, httpx.Client(base_url=f"{server.url}/api/v1/", timeout=60) as http:
        model = Raw(http, base)
        asked = [model.forward_backward(seq_id) for seq_id in range(1, 41)]
        results = [model.result(request_id) for request_id in asked]
        for _ in range(2):
            server.terminate()
            server.start()
        assert [model.result(request_id) for request_id in asked] == results
        assert [model.forward_backward(seq_id) for seq_id in range(1, 41)] == asked
