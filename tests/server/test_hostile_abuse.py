"""A tenant with a good key who asks for far too much: limits answer, and the others are still served."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api import Api, batch, prompt
from helpers import load_decoder
from hostile_names import Names
from server_fixture import live_server
from stub_engine import BASE, StubEngine
from test_hostile_bodies import connect, head
from victim import QUEUE, Victim

from mint_engine.errors import UserError
from mint_engine.executor import Executor
from mint_engine.models.decoder import Decoder
from mint_engine.requests import Request
from mint_engine.sampler import MAX_ROWS, Sampler
from mint_engine.server.lane import MOST_WAITING, Lane
from mint_engine.server.shares import Workers, over
from mint_engine.stopping import StopRule
from mint_engine.store import KeyLimits, Store
from mint_engine.turns import Turns
from mint_engine.types import SamplingParams

FOREVER = {"max_tokens": 2**40, "stop": [], "seed": 1}


@pytest.fixture(autouse=True, scope="module")
def _unharmed(attacked: Victim) -> Iterator[None]:
    yield
    attacked.check_unharmed()


@pytest.fixture(scope="module")
def mallory(attacked: Victim) -> Iterator[Api]:
    with attacked.api("mallory") as api:
        api.http.timeout = httpx.Timeout(120)
        yield api


@pytest.fixture(scope="module")
def hers(mallory: Api, attacked: Victim) -> Names:
    return Names.of(mallory, attacked.base)


def add_key(victim: Victim, name: str, **limits: int) -> None:
    store = Store(victim.home)
    _, victim.keys[name] = store.keys.create(name, limits=KeyLimits(**limits))
    store.close()


def served_within(victim: Victim, seconds: float) -> None:
    begun = time.monotonic()
    victim.check_serving()
    assert time.monotonic() - begun < seconds


# ---- one request -----------------------------------------------------------------------------------------------------

TOO_MUCH: dict[str, dict[str, Any]] = {
    "samples": {"num_samples": 65_536},
    "samples that fill the batch": {"num_samples": 256, "sampling_params": {**FOREVER, "max_tokens": 100}},
    "alternatives of a prompt's tokens": {"topk_prompt_logprobs": 2**52, "prompt": prompt(*[5] * 500)},
    "alternatives of sampled tokens": {"topk_sample_logprobs": 2**52, "num_samples": 100, "sampling_params": FOREVER},
    "draws beside the prompt": {"prompt_alt_tokens_k": 10**9},
    "draws beside a long prompt": {"prompt_alt_tokens_k": 20_000, "prompt": prompt(*[5] * 400)},
    "targets": {
        "prompt": prompt(5, 6, 7),
        "target_prompt_logprobs": {
            "data": [], "dtype": "int64", "shape": [2, 2**30], "sparse_crow_indices": [0] * 3, "sparse_col_indices": [],
        },
    },
    "stop strings": {"num_samples": 100, "sampling_params": {**FOREVER, "stop": [f"q{i}zz" for i in range(60_000)]}},
    "a long stop string": {"num_samples": 100, "sampling_params": {**FOREVER, "stop": ["x" * 900_000]}},
    "stop ids": {"num_samples": 50, "sampling_params": {**FOREVER, "stop": list(range(257)) * 600}},
    "tokens": {"num_samples": 100, "sampling_params": FOREVER},
    "a prompt": {"prompt": prompt(*[5] * 300_000)},
    "the last of the prompt": {"prompt_logprobs_last_n": 2**60, "prompt_logprobs": True},
    "top_k": {"sampling_params": {"max_tokens": 5, "top_k": 2**70}},
    "heat": {"sampling_params": {"max_tokens": 5, "temperature": 1e308, "top_p": 5e-324}},
    "a seed": {"sampling_params": {"max_tokens": 5, "seed": 2**64}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", TOO_MUCH)
def test_one_sample_call_cannot_ask_for_everything(attacked: Victim, mallory: Api, hers: Names, what: str) -> None:
    body = {"sampling_session_id": hers.sampler, "prompt": prompt(5, 6, 7), "num_samples": 1} | TOO_MUCH[what]
    with attacked.growing_at_most(512 << 20):
        response = mallory.post("asample", **body)
        served_within(attacked, 10)
        attacked.outcome(mallory, response)


# ---- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_queue_full_of_endless_samples_leaves_room_for_others(attacked: Victim, mallory: Api, hers: Names) -> None:
    body = {
        "sampling_session_id": hers.sampler,
        "num_samples": 100,
        "prompt": prompt(5, 6, 7),
        "sampling_params": FOREVER,
    }

    def ask(i: int) -> httpx.Response:
        return attacked.checked(mallory.post("asample", **body, seq_id=i))

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(QUEUE)))
    accepted = [answer.json()["request_id"] for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert QUEUE // 2 < len(accepted) < QUEUE
    for _ in range(3):
        served_within(attacked, 15)
    with ThreadPoolExecutor(8) as threads:  # she thinks better of it
        list(threads.map(lambda request_id: mallory.ok("cancel_future", request_id=request_id), accepted))
    assert mallory.retrieve(accepted[-1]).json()["category"] == "user"


@pytest.mark.slow
def test_a_queue_full_of_training_leaves_room_for_others(attacked: Victim, mallory: Api, hers: Names) -> None:
    """Twenty models with twenty steps each."""
    models = [mallory.model(attacked.base, hers.session, 100 + i) for i in range(20)]
    asked = [mallory.proto(batch(model, None, (300,))) for _ in range(20) for model in models]
    served_within(attacked, 15)
    assert {attacked.checked(answer).status_code for answer in asked} <= {200, 429}
    for model in models:
        mallory.ok("unload_model", model_id=model)
    last = [answer.json()["request_id"] for answer in asked if answer.status_code == 200][-1]
    assert "error" not in mallory.retrieve(last).json()


def test_requests_that_wait_for_one_that_never_comes(attacked: Victim, mallory: Api) -> None:
    """They fail when time is up, and others are served meanwhile."""
    model = mallory.model(attacked.base)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda i: mallory.post("optim_step", model_id=model, seq_id=i), range(2, 1002)))
    assert {answer.status_code for answer in answers} <= {200, 429, 400}  # 400: her time was up before the last
    served_within(attacked, 10)
    assert mallory.post("optim_step", model_id=model, seq_id=2**52).status_code == 400
    gone = mallory.retrieve(answers[0].json()["request_id"]).json()
    assert gone["category"] == "user"
    assert "did not arrive" in gone["error"]


def test_only_so_many_of_a_model_s_may_wait() -> None:
    """Each look at those that wait takes time on the event loop."""
    lane = Lane("m", "mallory")
    for seq_id in range(2, 2 + MOST_WAITING):
        assert not lane.crowded
        lane.refuse(seq_id)
    assert lane.crowded
    lane.refuse(2 + MOST_WAITING)
    assert len(lane.refused) == MOST_WAITING
    lane.refuse(1)  # what all wait for
    assert list(lane.ready()) == []
    assert lane.next_seq == 2 + MOST_WAITING
    with pytest.raises(UserError, match="far ahead"):
        lane.check(2**40)


@pytest.mark.slow
def test_thousands_of_sessions_models_and_samplers(attacked: Victim) -> None:
    add_key(attacked, "greedy", max_resident_models=3)
    with attacked.api("greedy") as api, attacked.growing_at_most(256 << 20):
        sessions = [api.session() for _ in range(1000)]
        made = []
        for i in range(40):
            lora = {"rank": 256, "seed": 1}
            body = {"session_id": sessions[i], "model_seq_id": 0, "base_model": attacked.base, "lora_config": lora}
            made.append(attacked.outcome(api, api.post("create_model", **body)))
        models = [answer["model_id"] for answer in made if answer is not None]
        assert len(models) == 3
        api.result("unload_model", model_id=models[0])
        small = api.model(attacked.base, sessions[-1], rank=2)
        for i in range(400):
            attacked.checked(api.post("save_weights_for_sampler", model_id=small, sampling_session_seq_id=1000 + i))
        assert gauge(attacked, "mint_resident_samplers") < 256
        served_within(attacked, 15)
        for i in range(300):
            named = {"session_id": sessions[0], "sampling_session_seq_id": i, "base_model": attacked.base}
            attacked.checked(api.post("create_sampling_session", **named))
        served_within(attacked, 10)


def gauge(victim: Victim, name: str) -> float:
    text = httpx.get(f"{victim.url}/metrics").text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))


def test_more_requests_at_once_than_a_key_may_have(attacked: Victim) -> None:
    """Her own are told to come again; polls and half bodies of hers do not keep the others out."""
    add_key(attacked, "busy", max_concurrent_requests=4)
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(closing(connect(attacked)))
            key = attacked.keys["busy"]
            connection.sendall(
                head(attacked, "Content-Length: 100").replace(attacked.keys["mallory"].encode(), key.encode())
            )
            connection.sendall(b"{")
        api = stack.enter_context(attacked.api("busy"))
        end = time.monotonic() + 10
        while (response := api.http.get("sessions")).status_code == 200:
            assert time.monotonic() < end
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        served_within(attacked, 10)
    end = time.monotonic() + 10
    with attacked.api("busy") as api:  # they have hung up
        while api.http.get("sessions").status_code == 429:
            assert time.monotonic() < end


def test_a_full_disk_is_hers_alone(attacked: Victim) -> None:
    add_key(attacked, "hoarder", max_disk_bytes=3_000_000)
    with attacked.api("hoarder") as api:
        model = api.model(attacked.base)
        answers = [
            api.post("save_weights", model_id=model, path=f"n{i}", ttl_seconds=3600) for i in range(20)
        ]  # fmt: skip
        kept = [outcome for answer in answers if (outcome := attacked.outcome(api, answer)) is not None]
        assert 0 < len(kept) < 20, "also of those that were sent before the first was written"
        listed = api.http.get("checkpoints").json()["checkpoints"]
        assert sum(checkpoint["size_bytes"] for checkpoint in listed) <= 3_000_000
        refused = attacked.checked(api.post("save_weights", model_id=model, path="last"))
        said = refused.text if refused.status_code == 400 else api.retrieve(refused.json()["request_id"]).text
        assert "delete some" in said
    with attacked.api("carol") as api:
        assert api.result("save_weights", model_id=api.model(attacked.base), path="n")["path"]


# ---- memory of requests on their way ---------------------------------------------------------------------------------


def test_bodies_that_are_not_finished_take_one_key_s_share_only(tmp_path: Path) -> None:
    engine = StubEngine(tmp_path)
    keys = {who: engine.store.keys.create(who)[1] for who in ("mallory", "carol")}
    size = 1 << 20
    with (
        live_server(engine, models=[BASE], max_request_bytes=size, memory_budget_bytes=4 * size) as live,
        ExitStack() as stack,
    ):
        fake = Victim(None, live.url, BASE, tmp_path, keys, {}, [], tmp_path)  # type: ignore[arg-type]
        answers = []
        for _ in range(6):
            connection = stack.enter_context(closing(connect(fake)))
            connection.settimeout(0.5)
            with contextlib.suppress(OSError):  # the server may hang up on us
                connection.sendall(head(fake, f"Content-Length: {size}") + b" " * (size - 10))
            try:
                answers.append(connection.recv(100)[:12])
            except TimeoutError:
                answers.append(b"waits")
        assert answers[:2] == [b"waits"] * 2
        assert answers[4:] == [b"HTTP/1.1 429"] * 2
        with Api(live.url, keys["carol"]) as carol:
            assert carol.http.post("create_session", content=b"{" + b" " * (size - 10) + b"}").status_code == 200
        assert live.state.auth.quotas._all_bytes >= 2 * (size - 10)
    assert not +live.state.auth.quotas._bytes
    assert live.state.auth.quotas._all_bytes == 0


def test_one_owner_s_heavy_work_does_not_keep_out_another_s() -> None:
    workers, release = Workers("mint-test"), threading.Event()

    async def run() -> None:
        jobs = [asyncio.create_task(workers.run("mallory", lambda: release.wait(30))) for _ in range(20)]
        await asyncio.sleep(0.05)
        carols = asyncio.create_task(workers.run("carol", lambda: "done"))
        release.set()
        assert await carols == "done"
        assert sum(job.done() for job in jobs) < 20, "two of hers were before it, not all"
        await asyncio.gather(*jobs)

    asyncio.run(run())
    assert not workers._queues


@pytest.mark.parametrize(
    ("own", "others", "more", "refused"),
    [(0, 0, 1000, False), (0, 100, 1000, False), (10, 0, 65, False), (10, 0, 66, True), (10, 60, 20, False),
     (10, 60, 21, True), (10, 100, 1, True)],
)  # fmt: skip
def test_shares(own: int, others: int, more: int, refused: bool) -> None:
    assert over(own, others, more, 100) is refused


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_owners_take_turns() -> None:
    turns: Turns[str] = Turns()
    for owner, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("c", "c2")):
        turns.append(owner, item)
    turns.discard("a", "a2")
    turns.discard("a", "no such")
    assert (len(turns), turns.owners, turns.of("a"), turns.first()) == (5, 3, 2, "a1")
    assert [turns.pop() for _ in range(2)] == ["a1", "b1"]
    turns.append("b", "b2")  # who comes back comes last
    turns.skip()
    assert list(turns) == ["a3", "b2", "c2"] or list(turns) == ["a3", "b2", "c1", "c2"]
    assert [turns.pop() for _ in range(4)] == ["a3", "b2", "c1", "c2"]
    assert not turns
    assert list(turns) == []


def test_an_owner_of_many_models_does_not_hold_up_the_owner_of_one() -> None:
    executor, begun, order = Executor("test"), threading.Event(), []
    try:
        first = executor.lane("mallory").submit(lambda: begun.wait(30))
        lanes = [executor.lane("mallory") for _ in range(50)]
        hers = [lane.submit(lambda: order.append("mallory")) for lane in lanes]
        carols = executor.lane("carol").submit(lambda: order.append("carol"))
        begun.set()
        for future in (first, carols, *hers):
            future.result(30)
        assert order.index("carol") <= 1
    finally:
        executor.close()


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


def make_request(owner: str, n: int, most: int) -> Request:
    params = SamplingParams(max_tokens=most, seed=1)
    ids = [str(i) for i in range(n)]
    return Request(None, np.array([1, 2, 3]), n, params, StopRule(), sequence_ids=ids, owner=owner)


def steps_until_done(sampler: Sampler, future: Future) -> int:
    return next(i for i in itertools.count(1) if sampler.step() and future.done())


@pytest.mark.parametrize("cache", [1 << 24, 1 << 27])
def test_a_sampler_full_of_one_owner_s_work_takes_in_another_s_at_once(decoder: Decoder, cache: int) -> None:
    """With rows to spare, or with cache: neither may be hers alone."""
    sampler = Sampler(decoder, cache, lambda: None)
    sampler.submit(make_request("carol", 1, 1))
    hers = [sampler.submit(make_request("mallory", 16, 300)) for _ in range(40)]
    sampler.step()
    assert sampler.load("mallory")[0] > 10, "not all of hers fit"
    carols = sampler.submit(make_request("carol", 4, 5))
    assert steps_until_done(sampler, carols) <= 6
    assert not any(future.done() for future in hers)
    sampler.fail(RuntimeError("enough"))


def test_one_owner_has_at_most_a_batch(decoder: Decoder) -> None:
    sampler = Sampler(decoder, 1 << 27, lambda: None)
    for _ in range(3):
        sampler.submit(make_request("mallory", MAX_ROWS // 2, 40))
    sampler.step()
    assert len(sampler._rows) == MAX_ROWS
    for owner in "abcdef":  # each may, but not all at once
        sampler.submit(make_request(owner, MAX_ROWS, 40))
    sampler.step()
    assert len(sampler._rows) == 4 * MAX_ROWS
    sampler.fail(RuntimeError("enough"))
