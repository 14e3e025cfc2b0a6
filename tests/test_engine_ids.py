"""Ids given by the caller, whose things they are, and what one owner may read of another's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import logprobs, new_model, open_engine, sampled, train

from mint_engine.engine import Engine
from mint_engine.errors import ModelError, NotFoundError, UserError
from mint_engine.models.hub import ModelFiles
from mint_engine.types import LoraConfig

LORA = LoraConfig(rank=4, seed=0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home") as made:
        yield made


def test_the_caller_may_give_ids_and_counting_goes_on_behind_them(engine: Engine, tiny_tied: Path) -> None:
    assert engine.create_session(session_id="mine", display_name="a run") == "mine"
    assert engine.store.get_session("mine").display_name == "a run"
    base = str(tiny_tied)
    assert engine.create_model("mine", base, LORA, seq=3).result() == "mine:train:3"
    assert engine.create_model("mine", base, LORA).result() == "mine:train:4"
    assert engine.create_sampler("mine", base_model=base, seq=7).result() == "mine:sample:7"
    saved = engine.save_weights_for_sampler("mine:train:3", sampler_seq=2).result()
    assert saved.sampling_session_id == "mine:sample:2"
    again = engine.save_weights_for_sampler("mine:train:3").result()
    assert again.sampling_session_id == "mine:sample:8"
    assert sampled(engine, "mine:sample:8") == sampled(engine, "mine:sample:2")


def test_an_id_is_used_once(engine: Engine, tiny_tied: Path, tmp_path: Path) -> None:
    """Also after its model was unloaded, and in a new process: its checkpoints carry the id for ever."""
    engine.create_session(session_id="mine")
    with pytest.raises(UserError, match="'mine' already exists"):
        engine.create_session(session_id="mine")
    model = engine.create_model("mine", str(tiny_tied), LORA, seq=0).result()
    with pytest.raises(UserError, match="'mine:train:0' is in use"):
        engine.create_model("mine", str(tiny_tied), LORA, seq=0).result()
    path = engine.save_weights(model, "a").result().path
    with pytest.raises(UserError, match="'mine:train:0' is in use"):
        engine.create_model_from_state("mine", path, optimizer=True, seq=0).result()
    engine.create_sampler("mine", base_model=str(tiny_tied), seq=0).result()
    for make in (
        lambda: engine.create_sampler("mine", base_model=str(tiny_tied), seq=0),
        lambda: engine.save_weights_for_sampler(model, sampler_seq=0),
    ):
        with pytest.raises(UserError, match="'mine:sample:0' is in use"):
            make().result()
    engine.unload_model(model).result()
    with pytest.raises(UserError, match="'mine:train:0' already exists"):
        engine.create_model("mine", str(tiny_tied), LORA, seq=0).result()
    with open_engine(tmp_path / "home") as later:
        for future in (
            later.create_model("mine", str(tiny_tied), LORA, seq=0),
            later.create_sampler("mine", base_model=str(tiny_tied), seq=0),
        ):
            with pytest.raises(UserError, match="already exists"):
                future.result()
        assert not later.is_resident("mine:train:0")


def test_an_id_whose_model_could_not_be_made_is_free_again(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session()
    first = engine.create_model(session, "/nowhere", LORA, seq=0)
    after = engine.save_weights(f"{session}:train:0", "a")
    with pytest.raises(ModelError):
        first.result()
    with pytest.raises(NotFoundError):
        after.result()
    assert engine.create_model(session, str(tiny_tied), LORA, seq=0).result() == f"{session}:train:0"
    with pytest.raises(NotFoundError):
        engine.create_sampler(session, model_path=f"tinker://{session}:train:0/weights/none", seq=0).result()
    assert engine.create_sampler(session, base_model=str(tiny_tied), seq=0).result() == f"{session}:sample:0"


@pytest.mark.parametrize("seq", [-1, True, 1.0, "1"])
def test_a_seq_is_a_count(engine: Engine, tiny_tied: Path, seq: object) -> None:
    session = engine.create_session()
    with pytest.raises(UserError, match="seq: expected an integer of at least 0"):
        engine.create_model(session, str(tiny_tied), LORA, seq=seq).result()  # type: ignore[arg-type]


def test_work_for_ids_that_never_were_is_refused_and_leaves_nothing(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session()
    for wrong in (f"{session}:train:0", "nobody:train:0", "x", ""):
        with pytest.raises(NotFoundError):
            engine.save_weights(wrong, "a").result()
        with pytest.raises(NotFoundError):
            engine.unload_model(wrong).result()
        with pytest.raises(NotFoundError):
            engine.model_owner(wrong)
        assert not engine.is_resident(wrong)
    with pytest.raises(NotFoundError, match="no session 'nobody'"):
        engine.create_model("nobody", str(tiny_tied), LORA).result()
    assert engine._residents._lanes == {}


def test_an_owner_s_things_are_its_own(engine: Engine, tiny_tied: Path) -> None:
    """Another owner's session reads nothing of them, unless it is lent a reader, or they are published."""
    alice, bob = (engine.create_session(owner=name) for name in ("alice", "bob"))
    model = new_model(engine, alice, tiny_tied)
    train(engine, model)
    state = engine.save_weights(model, "a").result().path
    version = engine.save_weights_for_sampler(model, "v").result().path
    assert version is not None
    assert [run.training_run_id for run in engine.store.as_owner("alice").list_runs().training_runs] == [model]
    assert engine.store.as_owner("bob").list_runs().training_runs == []
    assert engine.store.list_runs().training_runs == []
    mine = new_model(engine, bob, tiny_tied)
    attempts = [
        lambda **kw: engine.create_model_from_state(bob, state, optimizer=True, **kw),
        lambda **kw: engine.load_weights(mine, state, optimizer=True, **kw),
        lambda **kw: engine.create_sampler(bob, model_path=version, **kw),
        lambda **kw: engine.interpolate_checkpoints("bob", [version], [1.0], **kw),
        lambda **kw: engine.copy_checkpoint(version, owner="bob", **kw),
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError):
            attempt().result()
    for attempt in attempts:
        attempt(reader=engine.store.as_owner("alice")).result()
    assert np.array_equal(logprobs(engine, mine), logprobs(engine, model))
    for path in (state, version):
        engine.store.as_owner("alice").publish(path)
    for attempt in attempts:
        attempt().result()


def test_the_engine_knows_whose_everything_is(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session(owner="alice")
    pending = engine.create_model(session, str(tiny_tied), LORA, seq=0)
    assert engine.model_owner(f"{session}:train:0") == "alice", "on its way"
    assert engine.is_resident(f"{session}:train:0")
    model = pending.result()
    sampler = engine.create_sampler(session, base_model=str(tiny_tied)).result()
    assert (engine.model_owner(model), engine.sampler_owner(sampler)) == ("alice", "alice")
    assert (engine.resident_models("alice"), engine.resident_models("bob")) == (1, 0)
    assert engine.is_resident(sampler)
    engine.park(model).result()
    engine.release(sampler)
    engine.create_sampler(session, base_model=str(tiny_tied)).result()
    assert engine.resident_models("alice") == 0
    assert not engine.is_resident(model)
    assert not engine.is_resident(sampler)
    assert (engine.model_owner(model), engine.sampler_owner(sampler)) == ("alice", "alice"), "parked, recorded"
    engine.unload_model(model).result()
    with pytest.raises(NotFoundError):
        engine.model_owner(model)
    with pytest.raises(NotFoundError):
        engine.sampler_owner(f"{session}:sample:99")


def test_a_copy_may_take_the_place_of_a_model_of_a_session(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    train(engine, model, 2)
    source = engine.save_weights(model, "a").result().path
    assert engine.copy_checkpoint(source, session_id=session, seq=5).result() == f"tinker://{session}:train:5/weights/a"
    with pytest.raises(UserError, match="already exists"):
        engine.create_model(session, str(tiny_tied), LORA, seq=5).result()
    with pytest.raises(UserError, match="is in use"):
        engine.copy_checkpoint(source, session_id=session, seq=0).result()
    free = engine.copy_checkpoint(source).result()
    assert session not in free
    twin = engine.create_model_from_state(session, free, optimizer=True).result()
    assert twin == f"{session}:train:6"
    assert train(engine, twin) == train(engine, model)


def test_a_base_model_goes_by_its_name_and_by_its_directory(
    engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a name was resolved to is the same copy, not a second one."""
    monkeypatch.setattr("mint_engine.bases.resolve_model", lambda name, home: ModelFiles(name, tiny_tied))
    session = engine.create_session()
    engine.load_base("nickname").result()
    model = engine.create_model(session, str(tiny_tied), LORA).result()
    assert engine.get_info(model).model_name == "nickname"
    assert len(engine.base_info()) == 1


def test_a_base_model_can_be_loaded_ahead(engine: Engine, tiny_tied: Path) -> None:
    engine.load_base(str(tiny_tied)).result()
    (info,) = engine.base_info()
    assert (info.name, info.dtype, info.vocab_size) == (str(tiny_tied), "float32", 199)
    assert info.resident_bytes > 4 * 199 * 64
    with pytest.raises(ModelError, match="/nowhere"):
        engine.load_base("/nowhere").result()
    assert [m.model_name for m in engine.capabilities().supported_models] == [info.name]
