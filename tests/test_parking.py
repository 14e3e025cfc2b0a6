"""Parked and brought back, a client goes on bit for bit as if nothing had happened, in this process or the next."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import ADAM, VOCAB, logprobs, new_model, open_engine, sampled, train
from helpers import make_data

from mint_engine.engine import Engine
from mint_engine.errors import NonFiniteError, NotFoundError, UserError
from mint_engine.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

DECAY = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)


def accumulate(engine: Engine, model: str, seed: int) -> float:
    data = make_data("cross_entropy", (6, 9), VOCAB, seed)
    return engine.forward_backward(model, data, "cross_entropy").result().metrics["loss:sum"]


def go_on(engine: Engine, model: str) -> list[float]:
    """Starts with gradients pending; a few more steps, of every number they show."""
    numbers = []
    for step in range(3):
        metrics = engine.optim_step(model, DECAY).result().metrics or {}
        numbers += [metrics["grad_norm"], metrics["step"], accumulate(engine, model, 10 + step)]
    return numbers


def bits(engine: Engine, model: str) -> list[torch.Tensor]:
    m = engine._models[model]
    return [m.adapter.params, m.state.grads, m.state.exp_avg, m.state.exp_avg_sq]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["same process", "a new engine"])
def test_training_goes_on_bit_for_bit(tiny_tied: Path, tmp_path: Path, dtype: str, where: str) -> None:
    """Parked between forward_backward and optim_step, twice: weights, moments, step and pending gradients are all back.

    Others train in the meantime, and its place in the border has been given away.
    """
    note = {"next_seq": 7, "done": {"3": "abc"}, "näme": None}
    with open_engine(tmp_path / "home", dtype) as engine:
        session = engine.create_session()
        lora = {"rank": 5, "seed": 3, "train_mlp": False}
        parked, never, other = (new_model(engine, session, tiny_tied, **lora) for _ in range(3))
        for model in (parked, never):
            train(engine, model, 3)
            accumulate(engine, model, 5)
        expected = go_on(engine, never)
        engine.park(parked, note).result()
        assert not engine.is_resident(parked)
        train(engine, other, 2)
        if where == "same process":
            assert engine.unpark(parked).result() == note
            engine.park(parked).result()
            assert engine.unpark(parked).result() == {}
            assert go_on(engine, parked) == expected
            assert all(map(torch.equal, bits(engine, parked), bits(engine, never)))
            assert np.array_equal(logprobs(engine, parked), logprobs(engine, never))
            assert engine._models[parked].adapter.lora == engine._models[never].adapter.lora
            return
        wanted = [t.clone() for t in bits(engine, never)]
        said = logprobs(engine, never)
    with open_engine(tmp_path / "home", dtype) as later:
        assert later.model_owner(parked) == "local"
        assert later.unpark(parked).result() == note
        assert go_on(later, parked) == expected
        assert all(map(torch.equal, bits(later, parked), wanted))
        assert np.array_equal(logprobs(later, parked), said)


def test_a_model_that_was_never_trained_is_parked_as_it_is(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model, twin = (new_model(engine, session, tiny_tied, seed=9) for _ in range(2))
        engine.park(model).result()
        engine.unpark(model).result()
        assert not engine._models[model].state.has_grads
        assert train(engine, model, 2) == train(engine, twin, 2)


def test_parking_comes_after_everything_submitted_and_frees_the_memory(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model = f"{session}:train:0"
        go = threading.Event()

        def slow(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            assert go.wait(30)
            return -lps[0].sum(), {}

        created = engine.create_model(session, str(tiny_tied), LoraConfig(rank=4, seed=0))
        custom = engine.forward_backward_custom(model, make_data("cross_entropy", (5,), VOCAB), slow)
        step = engine.optim_step(model, ADAM)
        parked = engine.park(model, {"n": 1})
        created.result()
        m = engine._models[model]
        held = [weakref.ref(t) for t in (m.adapter.params, m.state.grads, m.state.exp_avg, m.state.exp_avg_sq)]
        del m
        assert not parked.done()
        go.set()
        parked.result()
        assert custom.done()
        assert (step.result().metrics or {})["grad_norm"] > 0
        assert engine.resident_models("local") == engine.stats().resident_models == 0
        gc.collect()
        assert [ref() is None for ref in held] == [True] * 4


def test_a_parked_model_refuses_work_until_it_is_asked_back(tiny_tied: Path, tmp_path: Path) -> None:
    """What follows a call of unpark need not wait for it."""
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        train(engine, model)
        said = logprobs(engine, model)
        engine.park(model).result()
        with pytest.raises(NotFoundError, match="parked"):
            engine.optim_step(model, ADAM).result()
        with pytest.raises(NotFoundError):
            engine.park(model).result()
        coming = engine.unpark(model)
        forward = engine.forward(model, make_data("cross_entropy", (8,), VOCAB, 3), "cross_entropy")
        assert np.array_equal(forward.result().loss_fn_outputs[0]["logprobs"].to_numpy(), said)
        coming.result()
        with pytest.raises(UserError, match="is in use"):
            engine.unpark(model).result()
        with pytest.raises(NotFoundError, match="no parked model"):
            engine.unpark(f"{session}:train:9").result()
        with pytest.raises(NotFoundError, match="no session"):
            engine.unpark("nobody:train:0").result()
        engine.park(model).result()
        both = [engine.unpark(model), engine.unpark(model)]
        assert sorted(type(f.exception()).__name__ for f in both) == ["NoneType", "UserError"]
        assert np.array_equal(logprobs(engine, model), said)


def test_what_was_brought_back_does_not_come_back_twice(tiny_tied: Path, tmp_path: Path) -> None:
    """A process that dies with a revived model has lost it: an older state must not pass for the acknowledged one."""
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        engine.park(model).result()
        engine.unpark(model).result()
        train(engine, model)
    with open_engine(tmp_path) as later:
        with pytest.raises(NotFoundError):
            later.unpark(model).result()
        with pytest.raises(NotFoundError):
            later.model_owner(model)


def test_a_disk_that_refuses_leaves_the_model_in_memory(
    tiny_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model, twin = (new_model(engine, session, tiny_tied) for _ in range(2))
        train(engine, model)
        train(engine, twin)

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mint_engine.parking.write_training_state", full)
        with pytest.raises(OSError, match="No space left on device"):
            engine.park(model).result()
        assert list(engine.park_all({})) == [model, twin]
        monkeypatch.undo()
        assert engine.is_resident(model)
        assert train(engine, model, 2) == train(engine, twin, 2)


def test_a_damaged_parked_model_stays_where_it_is(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        said = logprobs(engine, model)
        engine.park(model, {"n": 1}).result()
        parked = engine.store.parked(model)
        assert parked is not None
        file = parked.directory / "lora.json"
        whole = file.read_bytes()
        file.write_bytes(b"{")
        with pytest.raises(UserError, match=r"lora\.json: missing or damaged"):
            engine.unpark(model).result()
        assert not engine.is_resident(model)
        file.write_bytes(whole)
        assert engine.unpark(model).result() == {"n": 1}
        assert np.array_equal(logprobs(engine, model), said)


def test_pending_gradients_that_are_not_finite_are_still_refused_by_the_step(tiny_tied: Path, tmp_path: Path) -> None:
    """Their sum overflowed before the model was parked: that is the next step's to say, not a reason to lose it."""
    with open_engine(tmp_path) as engine:
        model = new_model(engine, engine.create_session(), tiny_tied)
        train(engine, model)
        said = logprobs(engine, model)
        engine._models[model].state.grads[3] = float("inf")
        engine._models[model].state.has_grads = True
        engine.park(model).result()
        engine.unpark(model).result()
        with pytest.raises(NonFiniteError, match="its norm is inf"):
            engine.optim_step(model, ADAM).result()
        assert np.array_equal(logprobs(engine, model), said)


def test_unloading_a_parked_model_forgets_it_and_keeps_its_checkpoints(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        model = new_model(engine, engine.create_session(), tiny_tied)
        path = engine.save_weights(model, "a").result().path
        engine.park(model).result()
        engine.unload_model(model).result()
        with pytest.raises(NotFoundError):
            engine.unpark(model).result()
        with pytest.raises(NotFoundError):
            engine.unload_model(model).result()
        assert engine.store.parked(model) is None
        assert engine.store.resolve(path).directory.is_dir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samplers_come_back_and_say_the_same(tiny_tied: Path, tmp_path: Path, dtype: str) -> None:
    """One whose weights were never saved is written to disk; the others come back from their record."""
    with open_engine(tmp_path, dtype) as engine:
        session = engine.create_session(owner="alice")
        model = new_model(engine, session, tiny_tied)
        train(engine, model, 2)
        named = engine.save_weights_for_sampler(model, "v", sampler=True).result().sampling_session_id or ""
        train(engine, model, 1)
        ephemeral = engine.save_weights_for_sampler(model).result().sampling_session_id or ""
        base = engine.create_sampler(session, base_model=str(tiny_tied)).result()
        samplers = [named, ephemeral, base]
        said = {sampler: sampled(engine, sampler) for sampler in samplers}
        assert len({str(s) for s in said.values()}) == 3
        running = engine.sample(ephemeral, ModelInput.from_ints([1, 2, 3]), 2, SamplingParams(max_tokens=8, seed=1))
        engine.park(ephemeral, {"k": 2}).result()
        assert [(s.tokens, s.logprobs) for s in running.result().sequences] == said[ephemeral], "it had been asked"
        with pytest.raises(NotFoundError, match="no sampler"):
            engine.sample(ephemeral, ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=2)).result()
        assert engine.unpark(ephemeral).result() == {"k": 2}
        for sampler in samplers:
            engine.park(sampler).result()
            engine.revive_sampler(sampler).result()
            engine.revive_sampler(sampler).result()
            assert sampled(engine, sampler) == said[sampler]
        engine.park(ephemeral).result()
    with open_engine(tmp_path, dtype) as later:
        for sampler in samplers:
            later.revive_sampler(sampler).result()
            assert sampled(later, sampler) == said[sampler]
            assert later.sampler_owner(sampler) == "alice"
            assert later.get_sampler(sampler) == later.store.as_owner("alice").get_sampler(sampler)


def test_a_sampler_whose_weights_are_lost_says_so_instead_of_answering_as_the_base(
    tiny_tied: Path, tmp_path: Path
) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        lost = engine.save_weights_for_sampler(model).result().sampling_session_id or ""
        path = engine.save_weights_for_sampler(model, "v").result().path
        gone = engine.create_sampler(session, model_path=path).result()
        engine.store.delete_checkpoint(path)  # type: ignore[arg-type]
    with open_engine(tmp_path) as later:
        with pytest.raises(
            NotFoundError, match="never saved, and was let go of, or its process has ended without parking it"
        ):
            later.revive_sampler(lost).result()
        with pytest.raises(NotFoundError, match="there is no checkpoint"):
            later.revive_sampler(gone).result()
        for unknown in (f"{session}:sample:99", "nobody:sample:0", "x"):
            with pytest.raises(NotFoundError):
                later.revive_sampler(unknown).result()
            with pytest.raises(NotFoundError):
                later.park(unknown).result()


def test_a_sampler_that_was_let_go_of_is_gone_at_once(tiny_tied: Path, tmp_path: Path) -> None:
    """Or a late copy of a request, after the end of its session, would be sampled again. What was saved is there."""
    with open_engine(tmp_path) as engine:
        model = new_model(engine, engine.create_session(), tiny_tied)
        unnamed = engine.save_weights_for_sampler(model).result().sampling_session_id or ""
        path = engine.save_weights_for_sampler(model, "v").result().path
        named = engine.create_sampler(model.split(":")[0], model_path=path).result()
        said = sampled(engine, named)
        for sampler in (unnamed, named):
            engine.revive_sampler(sampler).result()
            engine.release(sampler)
        with pytest.raises(NotFoundError, match="was let go of"):
            engine.revive_sampler(unnamed).result()
        engine.revive_sampler(named).result()
        assert sampled(engine, named) == said


def test_a_process_that_parks_everything_is_continued_by_the_next(tiny_tied: Path, tmp_path: Path) -> None:
    """What was submitted before is done first, creations included; a creation that fails is no obstacle."""
    with open_engine(tmp_path) as engine:
        alice, bob = (engine.create_session(owner=name) for name in ("alice", "bob"))
        models = [new_model(engine, session, tiny_tied, seed=i) for i, session in enumerate((alice, bob, bob))]
        twin = new_model(engine, alice, tiny_tied, seed=0)
        sampler = engine.save_weights_for_sampler(models[1]).result().sampling_session_id or ""
        said = sampled(engine, sampler)
        path = engine.save_weights_for_sampler(models[0], "v", sampler=True).result().path
        losses = [engine.forward_backward(models[0], make_data("cross_entropy", (6, 9), VOCAB), "cross_entropy")]
        steps = [engine.optim_step(models[0], ADAM)]
        young = engine.create_model(bob, str(tiny_tied), LoraConfig(rank=2, seed=5))
        stillborn = engine.create_model(bob, "/nowhere", LoraConfig(rank=2))
        expected = train(engine, twin, 3)
        assert engine.park_all({models[0]: {"seq": 11}}) == {}
        assert losses[0].result().metrics["loss:sum"] == expected[0]
        assert steps[0].done()
        assert stillborn.exception() is not None
        assert engine.stats().resident_models == 0
        assert engine.park_all() == {}
    with open_engine(tmp_path) as later:
        assert later.unpark(models[0]).result() == {"seq": 11}
        assert train(later, models[0], 2) == expected[1:]
        for model in (*models[1:], young.result()):
            assert later.unpark(model).result() == {}
        later.revive_sampler(sampler).result()
        assert sampled(later, sampler) == said
        assert later.store.as_owner("alice").list_user_checkpoints().checkpoints[0].tinker_path == path
