"""Calls of different clients in one pass: each answers what it answers alone, whoever its company is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import ADAM, VOCAB, held, logprobs, new_model, open_engine
from helpers import checked, load_decoder, make_data, relative, trained_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine import trainer
from mint_engine.adapters import TrainState
from mint_engine.calls import Call
from mint_engine.engine import Engine
from mint_engine.errors import MintError, NonFiniteError, UserError
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Saved
from mint_engine.types import Datum, ForwardBackwardOutput, LoraConfig, ModelInput

# The same fp32 sums in another order: some hundred roundings of 2**-24 each.
REORDERED = 1e-5
CONFIGS: dict[str, dict[str, float]] = {"ppo": {"clip_high_threshold": 1.5}, "dro": {"beta": 0.2}}
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
IMPOSSIBLE = {"target_tokens": [2, 3], "logprobs": [-3e4, -1.0], "advantages": [1.0, 1.0]}  # an infinite ratio


@functools.cache
def base(directory: Path) -> Decoder:
    return load_decoder(directory)


clients = st.fixed_dictionaries({
    "rank": st.sampled_from([1, 2, 3, 4, 8, 17]),
    "loss": st.sampled_from(LOSSES),
    "columns": st.sampled_from([0, 0, 1, 3]),
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=3),
    "backward": st.booleans(),
    "modules": st.sampled_from([{}, {"train_mlp": False}, {"train_attn": False, "train_unembed": False}]),
    "pending": st.booleans(),
})  # fmt: skip


def call(decoder: Decoder, client: dict[str, Any], seed: int) -> Call:
    """A client's call, made anew: the same one every time."""
    adapter = trained_adapter(decoder, LoraConfig(rank=client["rank"], seed=seed, **client["modules"]))
    loss = client["loss"]
    columns = client["columns"] if loss == "cross_entropy" else 0
    data = make_data(loss, tuple(client["lengths"]), VOCAB, seed, columns)
    state = TrainState(adapter) if client["backward"] else None
    if state is not None and client["pending"]:
        state.grads.fill_(0.5)
        state.has_grads = True
    return Call(adapter, state, *checked(data, loss, decoder, CONFIGS.get(loss)))


def assert_same(company: ForwardBackwardOutput, alone: ForwardBackwardOutput) -> None:
    terms = 0.0
    for ours, theirs in zip(company.loss_fn_outputs, alone.loss_fn_outputs, strict=True):
        lp = theirs["logprobs"].to_numpy()
        np.testing.assert_allclose(ours["logprobs"].to_numpy(), lp, rtol=REORDERED, atol=REORDERED)
        terms += float(np.abs(lp).sum())
    assert company.metrics["loss:sum"] == pytest.approx(alone.metrics["loss:sum"], rel=1e-4, abs=REORDERED * terms)
    assert company.metrics["tokens:sum"] == alone.metrics["tokens:sum"]
    assert company.weight_sum == pytest.approx(alone.weight_sum, abs=1e-5)
    assert company.loss_fn_output_type == alone.loss_fn_output_type


@settings(max_examples=40, deadline=None)
@given(mix=st.lists(clients, min_size=1, max_size=6), seed=st.integers(0, 100), max_tokens=st.sampled_from([None, 7]))
@torch.no_grad()
def test_any_mix_of_clients_is_each_alone(
    tiny_tied: Path, mix: list[dict[str, Any]], seed: int, max_tokens: int | None
) -> None:
    """Ranks, modules, losses, their config and weights, gradients that wait, forward beside forward_backward."""
    decoder = base(tiny_tied)
    together = [call(decoder, client, seed + i) for i, client in enumerate(mix)]
    outcomes = trainer.run_together(decoder, together, max_tokens=max_tokens)
    for i, (client, outcome) in enumerate(zip(mix, outcomes, strict=True)):
        alone = call(decoder, client, seed + i)
        (expected,) = trainer.run_together(decoder, [alone])
        assert not isinstance(outcome, NonFiniteError)
        assert not isinstance(expected, NonFiniteError)
        assert_same(outcome, expected)
        ours, theirs = together[i].state, alone.state
        if ours is not None and theirs is not None:
            # The gradient of a target's logit is p - 1: the likelier it is, the fewer digits survive a rounding.
            likeliest = max(float(one["logprobs"].to_numpy().max()) for one in expected.loss_fn_outputs)
            bound = REORDERED / max(-np.expm1(likeliest), REORDERED)
            assert relative(ours.grads, theirs.grads) < bound or float((ours.grads - theirs.grads).abs().max()) < 1e-6
            assert ours.has_grads


@torch.no_grad()
def test_the_same_company_gives_the_same_bits(tiny_tied: Path) -> None:
    decoder = base(tiny_tied)
    mix = [
        {"rank": 1 + i, "loss": "cross_entropy", "columns": 0, "lengths": [5 + i], "backward": True, "modules": {},
         "pending": False}
        for i in range(3)
    ]  # fmt: skip
    runs = []
    for _ in range(2):
        calls = [call(decoder, client, i) for i, client in enumerate(mix)]
        outcomes = trainer.run_together(decoder, calls)
        runs.append([(o.metrics["loss:sum"], c.state.grads) for o, c in zip(outcomes, calls, strict=True)])  # type: ignore[union-attr]
    for (loss, gradient), (loss2, gradient2) in zip(*runs, strict=True):
        assert loss == loss2
        assert torch.equal(gradient, gradient2)


# ---- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home", deterministic=False) as made:
        yield made


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each pass over the base had."""
    seen: list[int] = []
    begin_together = trainer.begin_together

    def spy(decoder: Decoder, calls: list[Call], **kwargs: Any) -> Any:
        seen.append(len(calls))
        return begin_together(decoder, calls, **kwargs)

    monkeypatch.setattr(trainer, "begin_together", spy)
    return seen


def ask(engine: Engine, model: str, seed: int = 0, lengths: tuple[int, ...] = (5, 6)) -> Future[ForwardBackwardOutput]:
    return engine.forward_backward(model, make_data("cross_entropy", lengths, VOCAB, seed), "cross_entropy")


def models_of(engine: Engine, directory: Path, count: int) -> list[str]:
    """Of as many sessions."""
    return [new_model(engine, engine.create_session(), directory, rank=2 + i, seed=i) for i in range(count)]


def test_clients_that_are_ready_share_a_pass_and_train_as_if_alone(
    engine: Engine, tiny_tied: Path, passes: list[int], tmp_path: Path
) -> None:
    models = models_of(engine, tiny_tied, 4)
    with held(engine):
        work = [[ask(engine, model, step) if kind else engine.optim_step(model, ADAM)
                 for step in range(3) for kind in (True, False)] for model in models]  # fmt: skip
    losses = [[f.result().metrics["loss:sum"] for f in futures[::2]] for futures in work]  # type: ignore[union-attr]
    assert passes == [4, 4, 4]
    assert engine.stats().operations["forward_backward"] == 12
    assert engine.stats().tokens_trained == 12 * 11
    with open_engine(tmp_path / "alone") as other:  # float32: deterministic unless it is told not to be
        for i, model in enumerate(models_of(other, tiny_tied, 4)):
            expected = []
            for step in range(3):
                expected.append(ask(other, model, step).result().metrics["loss:sum"])
                other.optim_step(model, ADAM).result()
            assert losses[i] == pytest.approx(expected, rel=1e-4)
            np.testing.assert_allclose(logprobs(engine, models[i]), logprobs(other, model), atol=1e-4)


def test_an_optimiser_step_in_front_does_not_keep_a_client_from_company(
    engine: Engine, tiny_tied: Path, passes: list[int]
) -> None:
    """One client is a step ahead of the others."""
    models = models_of(engine, tiny_tied, 3)
    for model in models[1:]:
        ask(engine, model).result()
    passes.clear()
    with held(engine):
        first = ask(engine, models[0], 1)
        steps = [engine.optim_step(model, ADAM) for model in models[1:]]
        others = [ask(engine, model, 1) for model in models[1:]]
    for future in (first, *others):
        future.result()
    assert passes == [3]
    assert [(f.result().metrics or {})["step"] for f in steps] == [1.0, 1.0]


def test_clients_that_wait_for_each_answer_fall_into_step(
    engine: Engine, tiny_tied: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread of its own, as over HTTP: the first call goes alone, then they meet."""
    monkeypatch.setattr("mint_engine.engine.together.PATIENCE_S", 0.5)
    models = models_of(engine, tiny_tied, 4)

    def train(model: str) -> None:
        for step in range(6):
            ask(engine, model, step)
            engine.optim_step(model, ADAM).result()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(train, models))
    assert sum(passes) == 24
    assert len(passes) <= 12, "not one after the other"
    assert max(passes) == 4


def test_company_that_is_refused_harms_nobody(engine: Engine, tiny_tied: Path, passes: list[int]) -> None:
    """Bad data, an infinite loss, a gradient that overflows: the error is that of a call alone, the rest go on."""
    models = models_of(engine, tiny_tied, 6)
    bad_data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, VOCAB], "weights": [1.0, 1.0]})]
    bad_loss = [*make_data("importance_sampling", (4,), VOCAB), Datum(ModelInput.from_ints([1, 2]), dict(IMPOSSIBLE))]
    overflow = [Datum(ModelInput.from_ints([1] * 9), {"target_tokens": [2] * 9, "weights": [3e37] * 9})]

    def offend() -> list[Future[ForwardBackwardOutput]]:
        return [
            engine.forward_backward(models[1], bad_data, "cross_entropy"),
            engine.forward_backward(models[2], bad_loss, "importance_sampling"),
            engine.forward_backward(models[4], overflow, "cross_entropy"),
            engine.forward_backward(models[5], "nonsense", "cross_entropy"),  # type: ignore[arg-type]
        ]

    alone = [future.exception() for future in offend()]
    assert [type(error) for error in alone[:3]] == [UserError, NonFiniteError, NonFiniteError]
    assert "gradient" in str(alone[2])
    states = [engine._models[model].state for model in models]
    ask(engine, models[3]).result()
    expected = [state.grads.clone() for state in states]
    passes.clear()
    with held(engine):
        good = [ask(engine, models[0], 1)]
        offences = offend()
        good.append(ask(engine, models[3], 1))
    assert [future.result().metrics["tokens:sum"] for future in good] == [11.0, 11.0]
    assert [(type(f.exception()), str(f.exception())) for f in offences] == [(type(e), str(e)) for e in alone]
    assert passes[0] == 4, "all whose data could be read began in one pass"
    for i in (1, 2, 4, 5):
        assert torch.equal(states[i].grads, expected[i])
        assert not states[i].has_grads
    twin = new_model(engine, engine.create_session(), tiny_tied, rank=5, seed=3)
    for seed in (0, 1):
        ask(engine, twin, seed).result()
    assert relative(states[3].grads, engine._models[twin].state.grads) < REORDERED


def test_a_pass_that_breaks_for_no_ones_fault_is_run_again_for_each(
    engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(engine, tiny_tied, 3)
    hidden, rows = Decoder.hidden_backward, []

    def small(self: Decoder, dh: torch.Tensor, active: torch.Tensor, saved: list[Saved], *rest: Any) -> None:
        rows.append(len(saved[0].h))
        hidden(self, dh, active, saved, *rest)
        if len(saved[0].h) > 11:
            raise MemoryError("no room for so many")

    monkeypatch.setattr(Decoder, "hidden_backward", small)
    with held(engine):
        futures = [ask(engine, model) for model in models]
    losses = [future.result().metrics["loss:sum"] for future in futures]
    assert rows == [33, 11, 11, 11]
    gradients = [engine._models[model].state.grads for model in models]
    monkeypatch.undo()
    for i, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
        twin = new_model(engine, engine.create_session(), tiny_tied, rank=2 + i, seed=i)
        assert ask(engine, twin).result().metrics["loss:sum"] == loss
        assert torch.equal(engine._models[twin].state.grads, gradient), "nothing of the first attempt is left"


def test_one_that_is_cancelled_is_not_run(engine: Engine, tiny_tied: Path, passes: list[int]) -> None:
    models = models_of(engine, tiny_tied, 4)
    with held(engine):
        futures = [ask(engine, model) for model in models]
        assert futures[0].cancel()
        assert futures[2].cancel()
        after = ask(engine, models[2], 1)
    for future in (futures[1], futures[3], after):
        future.result()
    assert passes[0] + sum(passes[1:]) == 3
    assert not engine._models[models[0]].state.grads.any()
    assert engine.stats().operations["forward_backward"] == 3
    assert engine.stats().operations_waiting == 0


def test_an_engine_that_is_deterministic_keeps_clients_apart(
    tiny_tied: Path, tmp_path: Path, passes: list[int]
) -> None:
    with open_engine(tmp_path) as engine:
        models = models_of(engine, tiny_tied, 3)
        with held(engine):
            futures = [ask(engine, model) for model in models]
        company = [future.result().metrics["loss:sum"] for future in futures]
        assert passes == [1, 1, 1]
        for model in models:
            engine._models[model].state.zero_grads()
        assert [ask(engine, model).result().metrics["loss:sum"] for model in models] == company


def test_clients_of_other_bases_and_calls_that_are_large_go_alone(
    engine: Engine, tiny_tied: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_engine.engine.together.MAX_TOKENS", 30)
    from tiny_models import build_tiny

    other = build_tiny("llama", tmp_path)
    models = [*models_of(engine, tiny_tied, 4), *models_of(engine, other, 2)]
    with held(engine):
        futures = [ask(engine, model, lengths=(25,) if i == 2 else (10,)) for i, model in enumerate(models)]
    for future in futures:
        future.result()
    assert sorted(passes) == [1, 2, 3]


def test_a_client_gets_its_error_in_company_of_a_model_that_is_gone(
    engine: Engine, tiny_tied: Path, passes: list[int]
) -> None:
    models = models_of(engine, tiny_tied, 3)
    with held(engine):
        gone = engine.unload_model(models[1])
        futures = [ask(engine, model) for model in models]
    gone.result()
    for future in (futures[0], futures[2]):
        future.result()
    with pytest.raises(MintError, match="there is no model"):
        futures[1].result()
