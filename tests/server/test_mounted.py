"""The application inside somebody else's, and sessions that live and die, without a clock."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from api import prompt
from fastapi import FastAPI
from stub_engine import BASE, StubEngine

from mint_engine.server import Settings, create_app
from mint_engine.server.app import stop
from mint_engine.server.sessions import Session, Sessions


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def train_a_step(http: httpx.AsyncClient, prefix: str) -> str:
    async def post(path: str, **body: object) -> dict:
        answer = await http.post(f"{prefix}/api/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    session = (await post("create_session", tags=[]))["session_id"]
    made = await post("create_model", session_id=session, model_seq_id=0, base_model=BASE)
    model = (await post("retrieve_future", request_id=made["request_id"]))["model_id"]
    promise = await post("optim_step", model_id=model, seq_id=1)
    assert (await post("retrieve_future", request_id=promise["request_id"]))["metrics"]
    sampler = await post("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=BASE)
    promise = await post(
        "asample", sampling_session_id=sampler["sampling_session_id"], seq_id=0, prompt=prompt(1), num_samples=1
    )
    assert (await post("retrieve_future", request_id=promise["request_id"]))["sequences"]
    return model


@pytest.mark.parametrize("prefix", ["", "/mint"])
def test_it_can_be_mounted_where_no_lifespan_runs(tmp_path: Path, prefix: str) -> None:
    async def run() -> None:
        engine, outer = StubEngine(tmp_path), FastAPI(openapi_url=None)
        inner = create_app(engine, Settings(models=[BASE]))  # type: ignore[arg-type]
        outer.get("/hello")(lambda: "mine")
        outer.mount(prefix or "/", inner)
        async with client(outer) as http:
            model = await train_a_step(http, prefix)
            assert (await http.get("/hello")).json() == "mine"
            assert engine.names()[0] == "load_base", "the first request started what the lifespan would have"
            document = (await http.get(f"{prefix}/openapi.json")).json()
            assert "/api/v1/optim_step" in document["paths"]
            await stop(inner)
            assert engine.store.parked(model) is not None
            assert (await http.post(f"{prefix}/api/v1/create_session", json={})).status_code == 503
            late = await http.post(f"{prefix}/api/v1/retrieve_future", json={"request_id": f"{model}:req:old"})
            assert late.status_code == 503
            assert engine.store.parked(model) is not None, "a poll that comes late does not take it from the disk"
            assert (await http.get(f"{prefix}/healthz")).status_code == 503

    asyncio.run(run())


def test_without_named_models_those_the_engine_has_are_served(tmp_path: Path) -> None:
    async def run() -> None:
        app = create_app(StubEngine(tmp_path))  # type: ignore[arg-type]
        async with client(app) as http:
            await train_a_step(http, "")
            models = (await http.get("/api/v1/get_server_capabilities")).json()["supported_models"]
            assert [m["model_name"] for m in models] == [BASE]

    asyncio.run(run())


def test_a_start_that_failed_is_tried_again_by_the_next_request(tmp_path: Path) -> None:
    async def run() -> None:
        engine = StubEngine(tmp_path)
        load, engine.load_base = engine.load_base, lambda name: engine._call("load", lambda: 1 / 0)  # type: ignore[method-assign]
        app = create_app(engine, Settings(models=[BASE]))  # type: ignore[arg-type]
        async with client(app) as http:
            assert (await http.post("/api/v1/create_session", json={})).status_code == 500
            engine.load_base = load  # type: ignore[method-assign]
            assert (await http.post("/api/v1/create_session", json={})).status_code == 200

    asyncio.run(run())


class Aside:
    """Takes what is put aside; says it is busy the first ``busy`` times."""

    def __init__(self, busy: int = 0) -> None:
        self.calls: list[str] = []
        self._busy = busy

    async def __call__(self, session_id: str) -> bool:
        self.calls.append(session_id)
        return len(self.calls) > self._busy


def look(sessions: Sessions, silent: float) -> Session | None:
    """What the timer does, ``silent`` seconds after the last sign of life."""
    session = sessions._sessions["s"]
    session.seen = time.monotonic() - silent
    if session.timer is not None:
        session.timer.cancel()
    sessions._look("s", session)
    return session


def test_a_sign_of_life_moves_the_end_away() -> None:
    async def run() -> None:
        aside = Aside()
        sessions = Sessions(100, aside)  # type: ignore[arg-type]
        sessions.touch("s", "a")
        session = look(sessions, silent=40)
        await asyncio.sleep(0)
        assert aside.calls == []
        assert session is not None
        assert session.timer is not None
        assert 59 < session.timer.when() - asyncio.get_running_loop().time() < 61, "the rest of its time, no more"
        look(sessions, silent=100)
        await asyncio.sleep(0.01)
        assert aside.calls == ["s"]
        assert sessions._sessions == {}, "forgotten until it is heard of again"

    asyncio.run(run())


def test_a_busy_session_is_looked_at_again() -> None:
    async def run() -> None:
        aside = Aside(busy=1)
        sessions = Sessions(100, aside)  # type: ignore[arg-type]
        sessions.touch("s", "a")
        session = look(sessions, silent=101)
        await asyncio.sleep(0.01)
        assert aside.calls == ["s"]
        assert sessions._sessions == {"s": session}
        look(sessions, silent=101)
        await asyncio.sleep(0.01)
        assert aside.calls == ["s", "s"]
        assert sessions._sessions == {}

    asyncio.run(run())
