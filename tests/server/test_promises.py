"""Promises: settled from any thread, held polls woken at once, results kept while somebody may want them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from mint_engine import wire
from mint_engine.errors import NotFoundError, StorageError, UserError
from mint_engine.server import resume
from mint_engine.server.failures import RestartingError
from mint_engine.server.promises import Promise, Promises
from mint_engine.types import ForwardBackwardOutput, OptimStepResponse, SampledSequence, SampleResponse, TensorData


def step() -> OptimStepResponse:
    return OptimStepResponse(metrics={"grad_norm": 2.0})


def in_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_poll_is_woken_by_a_result_from_another_thread() -> None:
    async def run() -> None:
        promises, future = Promises(), Future()
        promise = promises.follow(future, kind="OptimStep", owner="a", model_id="s:train:0")
        assert promise.answer() == {"request_id": promise.request_id, "model_id": "s:train:0"}
        polls = [asyncio.create_task(promises.wait(promise.request_id, "a", 30)) for _ in range(3)]
        await asyncio.sleep(0)
        in_thread(lambda: future.set_result(step()))
        found = await asyncio.gather(*polls)
        assert all(p is promise and p.done for p in found)
        assert promise.result(None).body == b'{"metrics":{"grad_norm":2.0},"type":"optim_step"}'

    asyncio.run(run())


def test_thousands_of_held_polls_need_no_thread_and_one_wake_up() -> None:
    async def run() -> None:
        promises, futures = Promises(), [Future() for _ in range(5000)]
        made = [promises.follow(f, kind="OptimStep", owner="a") for f in futures]
        polls = [asyncio.create_task(promises.wait(p.request_id, "a", 30)) for p in made]
        await asyncio.sleep(0)
        threads, loop, woken = threading.active_count(), asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*args, **kwargs):
            nonlocal woken
            woken += 1
            return wake(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        in_thread(lambda: [f.set_result(step()) for f in futures])  # the loop stands still meanwhile
        await asyncio.gather(*polls)
        assert woken == 1
        assert threading.active_count() <= threads
        assert promises.pending == 0

    asyncio.run(run())


def test_a_poll_ends_after_its_time_without_a_result() -> None:
    async def run() -> None:
        promises = Promises()
        promise = promises.create("OptimStep", "a")
        assert not (await promises.wait(promise.request_id, "a", 0.01)).done

    asyncio.run(run())


def test_another_owner_s_promise_does_not_exist() -> None:
    async def run() -> None:
        promises = Promises()
        promise = promises.create("OptimStep", "a")
        for request_id, owner in ((promise.request_id, "b"), ("req:unknown", "a")):
            with pytest.raises(NotFoundError):
                await promises.wait(request_id, owner, 1)

    asyncio.run(run())


def test_ids_cannot_be_guessed() -> None:
    async def run() -> None:
        promises = Promises()
        ids = {promises.create("OptimStep", "a", "s:train:0").request_id.rpartition(":req:")[2] for _ in range(1000)}
        assert len(ids) == 1000
        assert min(len(i) for i in ids) >= 24

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "category", "text"),
    [
        (UserError("lr: expected a number"), "user", "lr: expected a number"),
        (RuntimeError("secret path /root"), "server", "internal error: RuntimeError"),
        (MemoryError(), "server", "out of memory"),
    ],
)
def test_a_failure_says_whose_fault_it_is_and_leaks_nothing(error, category, text) -> None:
    async def run() -> None:
        promises, future = Promises(), Future()
        promise = promises.follow(future, kind="OptimStep", owner="a")
        future.set_exception(error)
        body = promise.result(wire.PROTOBUF)
        assert body.media_type == "application/json"
        said = wire.parse_json(body.body)
        assert said["category"] == category
        assert text in said["error"]
        assert "secret" not in said["error"]

    asyncio.run(run())


@pytest.mark.parametrize("error", [StorageError(28, "writing x failed: disk full"), MemoryError("no room")])
def test_what_the_operator_has_to_mend_is_in_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> Promise:
        promises, future = Promises(), Future()
        promise = promises.follow(future, kind="SaveWeights", owner="a", model_id="s:train:0")
        future.set_exception(error)
        return promise

    promise = asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(error) in caplog.text
    assert promise.request_id in caplog.text


def test_a_result_is_encoded_once_and_still_available_as_json_afterwards() -> None:
    async def run() -> None:
        promises, future = Promises(), Future()
        promise = promises.follow(future, kind="Sample", owner="a", scope="s:sample:0")
        future.set_result(SampleResponse([SampledSequence("stop", [1, 2], [-0.5, -1.5])]))
        proto = promise.result("application/x-protobuf, application/json")
        assert proto.media_type == wire.PROTOBUF
        assert promise.result(wire.PROTOBUF) is proto
        assert promise.value is None, "the value is not kept beside its bytes"
        assert wire.parse_json(promise.result("application/json").body)["sequences"][0]["tokens"] == [1, 2]

    asyncio.run(run())


@pytest.mark.parametrize("read", ["value", "_encoded"])
def test_two_polls_that_encode_one_result_both_get_it(read: str) -> None:
    """One of them is overtaken by the other, just before it reads the one field or the other."""
    slot, others = getattr(Promise, read), []

    def overtaken(promise: Promise):
        if others:
            others.pop()()
        return slot.__get__(promise)

    class Overtaken(Promise):
        pass

    setattr(Overtaken, read, property(overtaken, slot.__set__))
    promise = Overtaken("req:1", "OptimStep", "a", finished=1.0, value=step())
    seen = []
    others.append(lambda: seen.append(promise.result(None)))
    assert promise.result(None) == seen[0]
    assert wire.parse_json(seen[0].body)["metrics"] == {"grad_norm": 2.0}


def test_what_tinker_022_cannot_read_as_protobuf_it_gets_as_json() -> None:
    async def run() -> None:
        promises, future = Promises(), Future()
        promise = promises.follow(future, kind="ForwardBackward", owner="a", model_id="s:train:0")
        shapes = ((3,), (3, 2))  # one target per token, and two
        outputs = [{"logprobs": TensorData(np.full(shape, -0.5, np.float32), "float32")} for shape in shapes]
        future.set_result(ForwardBackwardOutput("TorchLossReturn", outputs, {"loss:sum": 1.0}))
        assert promise.result("application/x-protobuf, application/json").media_type == "application/json"
        assert promise.result("application/x-protobuf").media_type == wire.PROTOBUF
        later = Promises()  # of the server after a restart
        resume._restore(resume._result(promise), "a", "s:train:0", later)
        restored = later.get(promise.request_id, "a")
        assert restored is not None
        assert restored.result("application/x-protobuf, application/json").media_type == "application/json"

    asyncio.run(run())


def test_a_result_that_was_let_go_while_it_was_encoded_stays_gone() -> None:
    async def run() -> None:
        promises = Promises(fetched_ttl=0.0)
        slow, other = promises.create("OptimStep", "a"), promises.create("OptimStep", "a")
        promises.settle(slow, step())
        promises._drop(slow.request_id)
        promises.mark_fetched(slow)  # the poll that had begun before
        promises.settle(other, step())
        promises.mark_fetched(other)
        promises._expire()
        assert promises.get(other.request_id, "a") is None
        assert promises.result_bytes == 0

    asyncio.run(run())


def test_results_are_kept_until_fetched_and_a_while_after() -> None:
    async def run() -> None:
        promises = Promises(result_ttl=30, fetched_ttl=0.0)
        kept, fetched = (promises.create("OptimStep", "a") for _ in range(2))
        for promise in (kept, fetched):
            promises.settle(promise, step())
        promises.mark_fetched(fetched)
        assert promises.get(fetched.request_id, "a") is fetched, "the answer may not have arrived"
        promises._expire()
        assert promises.get(fetched.request_id, "a") is None
        assert promises.get(kept.request_id, "a") is kept

    asyncio.run(run())


def test_the_expiry_timer_runs_by_itself() -> None:
    async def run() -> None:
        promises = Promises(result_ttl=3600, fetched_ttl=0.0)
        promise = promises.create("OptimStep", "a")
        promises.settle(promise, step())
        promises.mark_fetched(promise)
        assert promises._expiry is not None
        assert promises._expiry.when() - asyncio.get_running_loop().time() < 2, "not the unfetched one's hour"

    asyncio.run(run())


def test_memory_is_bounded_fetched_results_go_first() -> None:
    async def run() -> None:
        promises = Promises(budget=20_000)
        old = [promises.create("OptimStep", "a") for _ in range(10)]
        for promise in old:
            promises.settle(promise, step())
            promises.mark_fetched(promise)
        assert promises.result_bytes <= 20_000 // 8 + 1024
        held = promises.create("ForwardBackward", "a", request_bytes=19_000)
        assert promises.full(2_000, "a")
        assert promises.result_bytes == 0, "nothing that was fetched is kept when memory is short"
        promises.settle(held, step())
        assert not promises.full(50_000, "a"), "a request larger than the budget is taken when nothing else waits"

    asyncio.run(run())


def test_a_stopping_server_answers_held_polls_with_something_to_retry() -> None:
    async def run() -> None:
        promises = Promises()
        waiting, done = promises.create("OptimStep", "a"), promises.create("OptimStep", "a")
        promises.settle(done, step())
        poll = asyncio.create_task(promises.wait(waiting.request_id, "a", 30))
        await asyncio.sleep(0)
        promises.stop("restarting")
        with pytest.raises(RestartingError):
            await poll
        with pytest.raises(RestartingError):
            await promises.wait(waiting.request_id, "a", 30)
        assert (await promises.wait(done.request_id, "a", 30)).done, "what is there is still given out"

    asyncio.run(run())


def test_one_application_is_served_from_one_loop() -> None:
    promises = Promises()

    async def create() -> None:
        promises.create("OptimStep", "a")

    asyncio.run(create())
    asyncio.run(create())  # the first loop is closed

    async def other() -> None:
        promises.create("OptimStep", "a")
        await asyncio.to_thread(refused)

    def refused() -> None:
        loop = asyncio.new_event_loop()
        with pytest.raises(RuntimeError, match="another event loop"):
            loop.run_until_complete(create())
        loop.close()

    asyncio.run(other())


def test_results_that_nobody_fetches_do_not_keep_everybody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client died: what it left behind goes when the room is needed, not after an hour."""

    async def run() -> None:
        promises = Promises(result_ttl=3600, budget=9_200)
        left = [promises.create("OptimStep", "a") for _ in range(4)]
        for promise in left:
            promises.settle(promise, step())
        promises.create("OptimStep", "a")
        assert promises.full(4_000, "a")
        monkeypatch.setattr("mint_engine.server.promises.FORSAKEN_S", -1.0)
        assert not promises.full(2_500, "a")
        assert [promises.get(p.request_id, "a") is None for p in left] == [True, True, False, False]

    asyncio.run(run())


def test_who_sends_one_request_at_a_time_and_fetches_nothing_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of theirs is thrown away for that before it is old: to fetch it is the way on."""

    async def run() -> None:
        promises = Promises(budget=40_000)

        def large() -> Promise:
            promise = promises.create("ForwardBackward", "a")
            outputs = [{"logprobs": TensorData(np.zeros(2_000, np.float32), "float32")}]
            promises.settle(promise, ForwardBackwardOutput("TorchLossReturn", outputs, {"loss:sum": 1.0}))
            return promise

        left = []
        while not promises.full(100, "a") and len(left) < 10:
            left.append(large())
        assert len(left) == 4, "three quarters of the budget, and the result that went beyond it"
        assert all(promises.get(promise.request_id, "a") is promise for promise in left)
        assert not promises.full(100, "b")
        promises.mark_fetched(left[0])
        assert not promises.full(100, "a")
        left.append(large())
        assert promises.full(100, "a")
        monkeypatch.setattr("mint_engine.server.promises.FORSAKEN_S", -1.0)
        assert not promises.full(100, "a")
        assert [promises.get(promise.request_id, "a") is None for promise in left] == [True, True, True, False, False]

    asyncio.run(run())


def test_a_result_larger_than_the_budget_is_kept_until_it_is_fetched() -> None:
    async def run() -> None:
        promises = Promises(budget=1_000)
        promise = promises.create("OptimStep", "a")
        promises.settle(promise, step())
        assert promises.full(1, "a")
        assert promises.get(promise.request_id, "a") is promise
        promises.mark_fetched(promise)
        assert not promises.full(1, "a")

    asyncio.run(run())
