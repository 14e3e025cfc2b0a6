"""How sessions end: what is let go of, and what stays said."""

from __future__ import annotations

import threading
import time

from api import Api, prompt, until
from server_fixture import live_server
from stub_engine import BASE, StubEngine

from mint_engine.types import InterpolateCheckpointsResponse


def finish(api: Api, session: str, how: str = "success") -> None:
    api.ok(f"sessions/{session}/finish", reason={"type": how})


def is_finished(api: Api, session: str) -> bool:
    made = api.post("create_model", session_id=session, model_seq_id=5, base_model=BASE)
    return (made.status_code, api.post("session_heartbeat", session_id=session).status_code) == (400, 410)


def test_a_finished_session_stays_finished(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], session_timeout_s=0.2) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        finish(api, session, "interrupted")
        assert is_finished(api, session)
        until(lambda: not live.state.sessions._sessions)
        assert is_finished(api, session)
        until(lambda: not live.state.sessions._sessions)
        api.ok("get_info", model_id=model)  # a sign of life says nothing of that
        assert is_finished(api, session)
    with live_server(engine, models=[BASE]) as live, Api(live.url) as api:
        assert is_finished(api, session), "after a restart, too"


def test_what_is_on_its_way_to_the_disk_is_let_go_of_when_its_session_ends(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], session_timeout_s=0.3) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        sampler = api.sampler(model, 1)
        engine.take()
        engine.hold = True
        until(lambda: "park" in engine.names())
        finish(api, session)
        engine.hold = False
        time.sleep(0.2)
        for call in engine.calls:
            call.finish()
        until(lambda: not engine.is_resident(model) and not engine.is_resident(sampler))
        until(lambda: not live.state.sequencer.busy(model) and not live.state.samplers._moving)
        until(lambda: engine.store.parked(model) is None and engine.store.parked(sampler) is None)


def test_the_engine_is_told_of_parked_models_and_of_the_end(engine: StubEngine) -> None:
    forgotten: list[str] = []
    engine.forget_session = forgotten.append  # type: ignore[method-assign]
    with live_server(engine, models=[BASE], session_timeout_s=0.2) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        until(lambda: engine.store.parked(model) is not None and not engine.is_resident(model))
        engine.take()
        finish(api, session)
        until(lambda: forgotten == [session])
        assert engine.names() == ["unload_model"]
        assert engine.store.parked(model) is None


def test_interpolations_are_done_at_the_end_and_answered_after_it(engine: StubEngine) -> None:
    body = {"source_paths": ["tinker://s:train:0/sampler_weights/a"], "coefficients": [1.0]}
    answer = InterpolateCheckpointsResponse(path="tinker://sum/sampler_weights/sum", **body)
    engine.interpolate_checkpoints = lambda *_, **__: engine._call("interpolate", lambda: answer)  # type: ignore[attr-defined]
    with live_server(engine, models=[BASE], park_on_shutdown=True) as live, Api(live.url) as api:
        asked = [api.ok("mint/checkpoints/interpolate", **body)["request_id"]]
        engine.hold = True
        asked.append(api.ok("mint/checkpoints/interpolate", **body)["request_id"])
        ending = threading.Timer(0.5, engine.calls[-1].finish)
        ending.start()
    ending.join()
    engine.hold = False
    for _ in range(2):  # fetched ones are kept, too: the answer may not have arrived
        with live_server(engine, models=[BASE], park_on_shutdown=True) as live, Api(live.url) as api:
            for request_id in asked:
                assert api.retrieve(request_id).json()["path"] == answer.path
            assert live.state.promises.get(asked[0], "somebody else") is None


def test_a_sampler_that_is_busy_is_let_go_of_afterwards(engine: StubEngine) -> None:
    with live_server(engine, models=[BASE], session_timeout_s=0.5) as live, Api(live.url) as api:
        session = api.session()
        model = api.model(BASE, session)
        sampler = api.sampler(model, 1)
        engine.take()
        engine.hold = True
        api.ok("asample", sampling_session_id=sampler, seq_id=0, prompt=prompt(1), num_samples=1)
        (asked,) = engine.take()
        engine.hold = False
        finish(api, session)
        until(lambda: model not in engine.models)
        assert sampler in engine.samplers
        asked.finish()
        until(lambda: sampler not in engine.samplers)
        time.sleep(0.7)
        assert engine.store.parked(sampler) is None
