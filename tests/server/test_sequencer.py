"""Each operation of a model runs once and in order, whatever the network makes of the requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from stub_engine import BASE, StubEngine

from mint_engine.errors import NotFoundError, StorageError, UserError
from mint_engine.server import operations
from mint_engine.server.caller import Caller
from mint_engine.server.context import enter
from mint_engine.server.failures import RestartingError, TryAgainLaterError
from mint_engine.server.lifecycle import _put_aside_for_good
from mint_engine.server.promises import Promise, Promises
from mint_engine.server.sequencer import Sequencer
from mint_engine.store import names
from mint_engine.types import AdamParams, LoraConfig
from mint_engine.wire.requests import OptimStepRequest


class Server:
    """An engine, a sequencer and one model of caller `a`."""

    def __init__(self, home: Path, *, engine: StubEngine | None = None, **options: Any) -> None:
        self.engine = engine or StubEngine(home)
        self.promises = Promises(budget=options.pop("budget", 1 << 30))
        self.sequencer = Sequencer(self.engine, self.promises, restart=self._restart, **options)  # type: ignore[arg-type]
        self.a, self.b = (Caller(owner, self.engine.store.as_owner(owner)) for owner in ("a", "b"))
        self.model = "s:train:0"

    def _restart(self, caller: Caller, kind: str, body: bytes) -> Callable[[], Any]:
        return operations.start(self.engine, caller, operations.load(kind, body))  # type: ignore[arg-type]

    async def create(self, model: str = "s:train:0") -> Promise:
        return await self.sequencer.create(
            self.a, model, "CreateModel",
            lambda: self.engine.create_model("s", BASE, LoraConfig(), seq=int(model[-1])),
        )  # fmt: skip

    async def step(self, seq_id: int | None, rate: float | None = None, **options: Any) -> Promise:
        request = OptimStepRequest(model_id=self.model, seq_id=seq_id)
        params = AdamParams(learning_rate=rate if rate is not None else float(seq_id or 0))
        return await self.sequencer.submit(
            options.pop("caller", self.a), self.model, seq_id, "OptimStep",
            lambda: self.engine.optim_step(self.model, params), saved=lambda: operations.dump(request), **options,
        )  # fmt: skip

    @property
    def applied(self) -> list[float]:
        return [c.arguments["params"].learning_rate for c in self.engine.calls if c.name == "optim_step"]


def serve(tmp_path: Path, body: Callable[[Server], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        server = Server(tmp_path, **options)
        server.engine.create_session(session_id="s", owner="a")
        await server.create()
        await body(server)

    asyncio.run(run())


def test_requests_out_of_order_run_in_order_and_are_answered_at_once(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        late = [await server.step(seq_id) for seq_id in (3, 2, 4)]
        assert server.applied == []
        assert not any(p.done for p in late)
        assert late[0].why_waiting == "seq_id 1 of s:train:0 has not arrived yet"
        await server.step(1)
        assert server.applied == [1, 2, 3, 4]
        assert all(p.done for p in late)

    serve(tmp_path, body)


def test_a_request_that_comes_twice_is_one(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        first = await server.step(1)
        enter(None, "another-idempotency-key")
        assert await server.step(1) is first
        assert server.applied == [1]

    serve(tmp_path, body)


def test_a_number_that_another_kind_of_request_has_is_refused(tmp_path: Path) -> None:
    """It would be answered with the other's result. Which may wait for its turn, or be of before a restart."""

    async def body(server: Server) -> None:
        async def save(seq_id: int | None) -> Promise:
            return await server.sequencer.submit(
                server.a, server.model, seq_id, "SaveWeights", lambda: pytest.fail("it ran")
            )

        first = await server.step(1)
        await server.step(3)
        for seq_id, kind in ((0, "CreateModel"), (1, "OptimStep"), (3, "OptimStep")):
            with pytest.raises(UserError, match=f"seq_id: {seq_id} of s:train:0: expected the {kind} that has it"):
                await save(seq_id)
        await server.step(2)
        await server.sequencer.park(server.model)
        with pytest.raises(UserError, match=r"seq_id: 1 of s:train:0: expected the OptimStep .*, got SaveWeights"):
            await save(1)
        assert (await server.step(1)).request_id == first.request_id
        enter(None, "key-1")
        await server.step(None, 0.5)
        with pytest.raises(UserError, match="X-Idempotency-Key: key-1"):
            await save(None)
        assert server.applied == [1, 2, 3, 0.5]

    serve(tmp_path, body)


def test_copies_that_arrive_together_are_one(tmp_path: Path) -> None:
    """Also when the model has to come from the disk first, so that all of them wait."""

    async def body(server: Server) -> None:
        await server.step(1)
        assert await server.sequencer.park(server.model)
        server.engine.take()
        promises = await asyncio.gather(*(server.step(2) for _ in range(20)))
        assert len({p.request_id for p in promises}) == 1
        assert server.applied == [2]
        assert server.engine.names("optim_step") == ["unpark"]

    serve(tmp_path, body)


def test_a_model_that_is_made_twice_is_made_once(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        promises = await asyncio.gather(*(server.create("s:train:1") for _ in range(5)))
        assert len({p.request_id for p in promises}) == 1
        assert server.engine.names() == ["create_model", "create_model"]
        with pytest.raises(UserError, match="there is a model"):
            await server.sequencer.create(server.b, "s:train:1", "CreateModel", lambda: pytest.fail("made again"))

    serve(tmp_path, body)


def test_making_a_model_does_not_look_for_runs_of_similar_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        monkeypatch.setattr(names, "get_close_matches", None)
        await server.create("s:train:1")

    serve(tmp_path, body)


def test_a_refusal_uses_up_its_number(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        await server.step(2)
        server.sequencer.refuse(server.model, 1)
        assert server.applied == [2]
        with pytest.raises(UserError):
            await server.step(1)
        server.sequencer.refuse(server.model, 2)  # a copy of an accepted one cannot take it away
        await server.step(3)
        assert server.applied == [2, 3]

    serve(tmp_path, body)


def test_a_gap_times_out_and_says_so(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        waiting = await server.step(2)
        await server.promises.wait(waiting.request_id, "a", 5)
        assert waiting.failure is not None
        assert "seq_id 1 of s:train:0 did not arrive within 0.01 s" in waiting.failure.detail
        assert server.applied == []
        await server.step(3)
        assert server.applied == [3], "the client may go on"
        with pytest.raises(UserError, match="is past"):
            await server.step(1)

    serve(tmp_path, body, gap_timeout=0.01)


def test_without_a_number_a_retry_is_known_by_its_idempotency_key(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        enter(None, "key-1")
        first = await server.step(None, 0.5)
        assert await server.step(None, 0.5) is first
        enter(None, "key-2")
        assert await server.step(None, 0.5) is not first
        assert server.applied == [0.5, 0.5]

    serve(tmp_path, body)


def test_another_s_model_does_not_exist(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        with pytest.raises(NotFoundError):
            await server.step(1, caller=server.b)
        server.model = "s:train:7"
        with pytest.raises(NotFoundError):
            await server.step(1)

    serve(tmp_path, body)


def test_an_engine_that_refuses_at_once_fails_the_promise_only(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        def refuse() -> Any:
            raise UserError("no")

        promise = await server.sequencer.submit(server.a, server.model, 1, "OptimStep", refuse)
        assert promise.failure is not None
        assert promise.failure.category == "user"
        await server.step(2)
        assert server.applied == [2]

    serve(tmp_path, body)


def test_back_pressure_never_refuses_what_the_others_wait_for(tmp_path: Path) -> None:
    """Were chunk 1 refused while 2 and 3 fill the memory, nothing would ever move again."""

    async def body(server: Server) -> None:
        for call in server.engine.take():  # the model's creation is fetched
            assert call.future.done()
        for promise in list(server.promises._promises.values()):
            server.promises.mark_fetched(promise)
        server.engine.hold = True
        await server.step(2, request_bytes=600)
        await server.step(3, request_bytes=300)
        with pytest.raises(TryAgainLaterError):
            await server.step(4, request_bytes=600)
        await server.step(1, request_bytes=600)
        assert server.applied == [1, 2, 3]
        for call in server.engine.take():
            call.finish()
        await asyncio.sleep(0.05)
        with pytest.raises(TryAgainLaterError):
            await server.step(4, request_bytes=600)  # the three results alone are larger than this budget
        for promise in list(server.promises._promises.values()):
            server.promises.mark_fetched(promise)
        await server.step(4, request_bytes=600)

    serve(tmp_path, body, budget=1250)


def test_a_parked_model_goes_on_where_it_was(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        first = await server.step(1)
        assert await server.sequencer.park(server.model)
        assert not server.engine.is_resident(server.model)
        assert (await server.step(1)).request_id == first.request_id, "still known"
        await server.step(2)
        assert server.applied == [1, 2]
        assert server.engine.steps[server.model] == ["optim_step(1)", "optim_step(2)"]

    serve(tmp_path, body)


def test_a_busy_model_is_not_parked(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        server.engine.hold = True
        await server.step(1)
        assert not await server.sequencer.park(server.model)
        server.engine.calls[-1].finish()
        await asyncio.sleep(0.05)
        server.engine.hold = False
        assert await server.sequencer.park(server.model)

    serve(tmp_path, body)


def test_a_restarted_server_takes_up_every_promise(tmp_path: Path) -> None:
    """Done and unfetched, accepted and not begun, and early ones that wait for a gap: all end as without a restart."""
    ids: dict[int, str] = {}

    async def before() -> StubEngine:
        server = Server(tmp_path)
        server.engine.create_session(session_id="s", owner="a")
        await server.create()
        ids[1] = (await server.step(1)).request_id
        server.engine.hold = True
        for seq_id in (2, 3, 4, 6):
            ids[seq_id] = (await server.step(seq_id)).request_id
        running = server.engine.calls[-3]
        assert running.future.set_running_or_notify_cancel()
        lanes = await server.sequencer.stop()
        server.engine.hold = False
        parking = asyncio.gather(*(_put_aside_for_good(server, *lane, grace=5) for lane in lanes))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert server.engine.names()[-1] == "optim_step", "what runs is waited for"
        running.future.set_result(running.answer())
        await parking
        assert server.engine.steps["s:train:0"] == ["optim_step(1)", "optim_step(2)"]
        return server.engine

    async def after(engine: StubEngine) -> None:
        server = Server(tmp_path, engine=engine)
        assert (await server.step(1)).request_id == ids[1]
        for seq_id in (1, 2, 3, 4):
            promise = await server.promises.wait(ids[seq_id], "a", 5)
            assert promise.done
            assert promise.failure is None
            assert b"grad_norm" in promise.result(None).body
        assert not (await server.promises.wait(ids[6], "a", 0.01)).done
        await server.step(5)
        assert (await server.promises.wait(ids[6], "a", 5)).done
        rates = [f"optim_step({rate})" for rate in (1, 2, "1e-05", "1e-05", 5, "1e-05")]
        assert engine.steps["s:train:0"] == [r.replace("1e-05", "0.0001") for r in rates], "each once, in order"

    engine = asyncio.run(before())
    engine.take()
    asyncio.run(after(engine))


def test_a_model_that_cannot_be_read_back_at_first_is_as_it_was_later(tmp_path: Path) -> None:
    """Neither answered by a failure nor done: the next request tries again, and each operation is done once."""

    async def body(server: Server) -> None:
        early = await server.step(2)
        assert await _parked_with_what_waits(server)
        unpark, broken = server.engine.unpark, [StorageError(5, "reading failed: Input/output error")]

        def unpark_later(identifier: str) -> Any:
            def fail() -> None:
                raise broken.pop()

            return server.engine._call("unpark", fail) if broken else unpark(identifier)

        server.engine.unpark = unpark_later  # type: ignore[method-assign]
        later = Server(tmp_path, engine=server.engine)
        with pytest.raises(StorageError):
            await later.step(1)
        assert later.promises.get(early.request_id, "a") is None
        await later.step(1)
        assert (await later.promises.wait(early.request_id, "a", 5)).failure is None
        assert len(server.engine.steps[server.model]) == 2

    serve(tmp_path, body)


async def _parked_with_what_waits(server: Server) -> bool:
    for lane, taken_back in await server.sequencer.stop():
        await _put_aside_for_good(server, lane, taken_back, grace=5)  # type: ignore[arg-type]
    return server.engine.store.parked(server.model) is not None


def test_a_model_for_which_there_is_no_room_is_waited_for(tmp_path: Path) -> None:
    full = [True]

    async def reserve(caller: Caller) -> Callable[[], None]:
        if full:
            raise UserError("this key may keep 1 models in memory at once and has 1")
        return lambda: None

    async def body(server: Server) -> None:
        await server.step(1)
        assert await server.sequencer.park(server.model)
        with pytest.raises(TryAgainLaterError, match="may keep 1 models"):
            await server.step(2)
        full.clear()
        await server.step(2)
        assert server.applied == [1, 2]

    serve(tmp_path, body, reserve=reserve)


def test_a_server_that_stops_takes_nothing_more(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        await server.step(1)
        assert await server.sequencer.park(server.model)
        await server.create("s:train:1")
        server.promises.stop("restarting")
        for model in ("s:train:0", "s:train:1"):  # one would have to come back from the disk
            server.model = model
            with pytest.raises(RestartingError):
                await server.step(2)
        with pytest.raises(RestartingError):
            await server.create("s:train:2")
        assert server.engine.store.parked("s:train:0") is not None

    serve(tmp_path, body)


def test_a_model_lost_with_a_killed_server_says_what_to_do(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        fresh = Server(tmp_path, engine=StubEngine(tmp_path))
        with pytest.raises(NotFoundError, match="create_training_client_from_state"):
            await fresh.step(1)

    serve(tmp_path, body)


def test_a_model_that_cannot_be_written_stays(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        await server.step(1)

        def broken(*_: Any) -> Any:
            raise OSError("disk full")

        server.engine.park = broken  # type: ignore[method-assign]
        assert not await server.sequencer.park(server.model)
        await server.step(2)
        assert server.applied == [1, 2]

    serve(tmp_path, body)
