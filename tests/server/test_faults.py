"""Over a network that loses, doubles, delays and cuts what is sent, training ends in the very same bits."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import Api, prompt, until
from chaos_proxy import FAULTS, ChaosProxy, chaos_proxy
from checkpoint_bits import check_same, contents
from engine_helpers import open_engine
from helpers import make_data
from server_fixture import LiveServer, live_server

import mint
from mint_engine.client.remote import Address, RemoteEngine, limits, transport
from mint_engine.wire import ForwardBackwardRequest, encode_forward_backward

sys.path.append(str(Path(__file__).parents[1] / "sdk" / "drivers"))
import faults

CLIENTS = 3


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
        patch.setattr(limits, "CHUNK_DATUMS", 2)
        yield


@contextmanager
def server(base: Path, home: Path) -> Iterator[LiveServer]:
    with open_engine(home) as engine, live_server(engine, models=[base]) as running:
        yield running


def run(url: str, base: Path, clients: int) -> list[dict[str, Any]]:
    """The program, by several clients at once, each with connections of its own."""

    def one(seed: int) -> dict[str, Any]:
        remote = RemoteEngine(Address(url, api_key="tml-key"))
        try:
            made = faults.train(mint.ServiceClient(engine=remote), mint.types, str(base), seed)
        finally:
            remote.close()
        return json.loads(json.dumps(made))

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(one, range(clients)))


UNCOUNTED = ("unload_model", "revive_sampler")


def run_on(server: LiveServer, url: str, base: Path) -> dict[str, Any]:
    """What all clients got and saved, and how often the server did what."""
    made = run(url, base, CLIENTS)
    store = server.engine.store
    return {
        "values": [one["values"] for one in made],
        "samples": [one["samples"] for one in made],
        "saved": [contents(store.resolve(path).directory) for one in made for path in one["paths"].values()],
        # A quick client's sampler may be asked for before the server has noted it: then it is looked up once more.
        "done": {n: done for n, done in server.engine.stats().operations.items() if n not in UNCOUNTED},
        "sessions": len(store.list_sessions(limit=100).sessions),
        "runs": len(store.list_runs(limit=100).training_runs),
        "checkpoints": len(store.list_user_checkpoints(limit=100).checkpoints),
    }


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with server(base, tmp_path_factory.mktemp("home")) as running:
        return run_on(running, running.url, base)


def check_all_happened(proxy: ChaosProxy) -> None:
    """Every kind of fault, and those that could apply a step twice or never, to the requests that take one."""
    assert set(proxy.counts) == {*FAULTS, "none"}, proxy.counts
    for path in ("/api/v1/forward_backward", "/api/v1/optim_step", "/api/v1/retrieve_future"):
        missing = [fault for fault in FAULTS if not proxy.by_path[path, fault]]
        assert not missing, (path, missing)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_faults_do_not_change_a_bit(base: Path, tmp_path: Path, undisturbed: dict[str, Any], seed: int) -> None:
    with server(base, tmp_path) as running, chaos_proxy(running.url, seed=seed, rate=0.5) as proxy:
        disturbed = run_on(running, proxy.url, base)
    check_all_happened(proxy)
    check_same(disturbed, undisturbed)
    for what in ("done", "sessions", "runs", "checkpoints"):
        assert disturbed[what] == undisturbed[what], f"{what}: not each exactly once"


def test_what_carries_no_number_is_done_once_too(base: Path, tmp_path: Path) -> None:
    """Sessions, copies, sums and deletions: the server knows their repetitions by another key."""
    with server(base, tmp_path) as running, chaos_proxy(running.url, seed=1, rate=0.9) as proxy:
        store, remote = running.engine.store, RemoteEngine(Address(proxy.url))
        services = [mint.ServiceClient(engine=remote) for _ in range(6)]
        training = services[0].create_lora_training_client(str(base), rank=2)
        path = training.save_weights_for_sampler("one").result().path
        rest = services[0].create_rest_client()
        copies = [rest.copy_weights(path).result() for _ in range(8)]
        sums = [rest.interpolate_checkpoints([path, path], [0.5, 0.5]).result().path for _ in range(4)]
        made = [*copies, *sums]
        assert len(store.list_sessions(limit=100).sessions) == len(services)
        assert {c.tinker_path for c in store.list_user_checkpoints(limit=100).checkpoints} == {path, *made}
        for one in made:
            rest.publish_checkpoint_from_tinker_path(one).result()
            rest.delete_checkpoint_from_tinker_path(one).result()
        assert [c.tinker_path for c in store.list_user_checkpoints(limit=100).checkpoints] == [path]
        remote.close()
    assert set(proxy.counts) == {*FAULTS, "none"}


def test_a_late_copy_of_a_sample_is_not_done_again_when_its_session_has_ended(base: Path, tmp_path: Path) -> None:
    with server(base, tmp_path) as running, Api(running.url) as api:
        session = api.session()
        sampler = api.sampler(api.model(str(base), session), 1)
        body = {
            "sampling_session_id": sampler, "seq_id": 0, "prompt": prompt(1), "num_samples": 1,
            "sampling_params": {"max_tokens": 3},
        }  # fmt: skip
        first = api.ok("asample", **body)
        assert api.retrieve(first["request_id"]).json()["sequences"]
        assert api.ok("asample", **body) == first
        api.ok(f"sessions/{session}/finish", reason={"type": "success"})
        until(lambda: sampler not in running.state.samplers._entries)
        assert api.post("asample", **body).status_code == 404
        assert running.engine.stats().operations["sample"] == 1


async def post_all(url: str, base: Path, *, order: random.Random | None) -> str:
    """Twenty steps of one model, each with two requests of gradients, and a save; the model's id.

    order: post all of them at once, in this order; None: one after the other.
    """
    async with httpx.AsyncClient(base_url=f"{url}/api/v1/", timeout=60) as http:
        session = (await answered(http, "create_session", {"tags": []})).json()["session_id"]
        lora = {"rank": 4, "seed": 0}
        model = {"session_id": session, "model_seq_id": 0, "base_model": str(base), "lora_config": lora}
        model_id: str = (await result(http, "create_model", model)).json()["model_id"]
        requests: list[tuple[str, Any]] = []
        for seq_id in range(1, 61):
            if seq_id % 3:
                data = make_data("cross_entropy", (4, 5), 257, seq_id)
                gradient = ForwardBackwardRequest(model_id, seq_id, data, "cross_entropy", {}, False)
                requests.append(("forward_backward", encode_forward_backward(gradient)))
            else:
                requests.append(("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": {}}))
        requests.append(("save_weights", {"model_id": model_id, "seq_id": 61, "path": "end"}))
        if order is None:
            for path, body in requests:
                await result(http, path, body)
        else:
            order.shuffle(requests)
            await asyncio.gather(*(result(http, path, body) for path, body in requests))
    return model_id


async def answered(http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    """Post until there is an answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/x-protobuf" if isinstance(body, bytes) else "application/json"
    for _ in range(60):
        try:
            answer = await http.post(path, content=content, headers={"Content-Type": kind})
        except httpx.TransportError:
            continue
        if answer.status_code != 502:
            assert answer.status_code == 200, answer.text
            return answer
    raise AssertionError(f"{path}: no answer")


async def result(http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    request_id = (await answered(http, path, body)).json()["request_id"]
    while True:
        answer = await answered(http, "retrieve_future", {"request_id": request_id})
        if answer.json().get("type") != "try_again":
            assert "error" not in answer.json(), answer.text
            return answer


def test_requests_in_any_order_are_done_in_theirs(base: Path, tmp_path: Path) -> None:
    with server(base, tmp_path) as running:
        store = running.engine.store

        def saved(url: str, order: random.Random | None) -> Any:
            model_id = asyncio.run(post_all(url, base, order=order))
            return contents(store.resolve(f"tinker://{model_id}/weights/end").directory)

        expected = saved(running.url, None)
        for seed in range(3):
            with chaos_proxy(running.url, seed=seed, rate=0.3) as proxy:
                assert saved(proxy.url, random.Random(seed)) == expected
