"""Sums: cutting a batch in any way, or permuting it, gives the same loss and gradient; masked rows add nothing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import checked, load_decoder, make_data, relative, trained_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from scarce_memory import until_there_is_enough

from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.run import Programs
from mint_engine.models.decoder import Decoder
from mint_engine.types import Datum, ForwardBackwardOutput, LoraConfig, ModelInput

# The same fp32 sums in another order: some hundred roundings of 2**-24 each.
REORDERED = 1e-5


@functools.cache
def setup(directory: Path) -> tuple[Decoder, Adapter]:
    decoder = load_decoder(directory)
    return decoder, trained_adapter(decoder, LoraConfig(rank=4, seed=0))


def run(directory: Path, data: list[Datum], loss_fn: str = "cross_entropy", **kwargs: int) -> tuple:
    """(summed loss, flat gradient, log-probabilities per datum) of one call."""
    decoder, adapter = setup(directory)
    state = TrainState(adapter)
    with torch.no_grad():
        out = trainer.run(decoder, adapter, state, *checked(data, loss_fn, decoder), **kwargs)
    return out.metrics["loss:sum"], state.grads, [o["logprobs"].to_numpy() for o in out.loss_fn_outputs]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=lengths, seed=st.integers(0, 1000), max_tokens=st.integers(1, 30), permute=st.randoms(use_true_random=False)
)
def test_splitting_or_permuting_a_batch_changes_nothing(tiny_tied, lengths, seed, max_tokens, permute) -> None:
    data = make_data("cross_entropy", tuple(lengths), 199, seed)
    loss, gradient, logprobs = run(tiny_tied, data)
    order = list(range(len(data)))
    permute.shuffle(order)
    loss2, gradient2, logprobs2 = run(tiny_tied, [data[i] for i in order], max_tokens=max_tokens)
    terms = [np.abs(lp * d.loss_fn_inputs["weights"].to_numpy()).sum() for lp, d in zip(logprobs, data, strict=True)]
    assert loss2 == pytest.approx(loss, abs=REORDERED * (1 + float(sum(terms))))  # terms of any sign cancel
    assert relative(gradient2, gradient) < REORDERED or float(gradient.abs().max()) < 1e-6
    for i, lp in zip(order, logprobs2, strict=True):
        np.testing.assert_allclose(lp, logprobs[i], rtol=REORDERED, atol=REORDERED)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 1000), cut=st.integers(0, 6))
def test_gradients_accumulate_over_calls(tiny_tied, lengths, seed, cut) -> None:
    data = make_data("importance_sampling", tuple(lengths), 199, seed)
    _, gradient, _ = run(tiny_tied, data, "importance_sampling")
    decoder, adapter = setup(tiny_tied)
    state = TrainState(adapter)
    for part in (data[:cut], data[cut:]):
        if part:
            with torch.no_grad():
                trainer.run(decoder, adapter, state, *checked(part, "importance_sampling", decoder))
    assert relative(state.grads, gradient) < REORDERED or float(gradient.abs().max()) < 1e-6


def test_a_masked_row_contributes_nothing(tiny_tied: Path) -> None:
    """Changing the targets of masked rows leaves loss and gradient bit-equal; so does masking all of a datum."""
    data = make_data("cross_entropy", (9, 6), 199)
    weights = data[0].loss_fn_inputs["weights"].to_numpy()
    assert (weights == 0).any()
    targets = data[0].loss_fn_inputs["target_tokens"].to_numpy()
    other = np.where(weights == 0, (targets + 1) % 199, targets)
    changed = Datum(model_input=data[0].model_input, loss_fn_inputs={"target_tokens": other, "weights": weights})
    loss, gradient, _ = run(tiny_tied, data)
    loss2, gradient2, _ = run(tiny_tied, [changed, data[1]])
    assert loss2 == loss
    assert torch.equal(gradient2, gradient)

    silent = Datum(data[1].model_input, {**data[1].loss_fn_inputs, "weights": [0.0] * 6})
    alone_loss, alone, _ = run(tiny_tied, data[:1])
    both_loss, both, _ = run(tiny_tied, [data[0], silent])
    assert both_loss == pytest.approx(alone_loss, rel=1e-6)
    assert relative(both, alone) < REORDERED


def test_a_batch_without_weight_has_loss_zero_and_no_gradient(tiny_tied: Path) -> None:
    data = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [0, 0, 0]})]
    decoder, adapter = setup(tiny_tied)
    state = TrainState(adapter)
    out = trainer.run(decoder, adapter, state, *checked(data, "cross_entropy", decoder))
    assert out.loss == 0.0
    assert not state.grads.any()
    # The true log-probabilities are reported all the same.
    assert (out.loss_fn_outputs[0]["logprobs"].to_numpy() < 0).all()


def test_sequences_do_not_see_each_other(tiny_tied: Path) -> None:
    data = make_data("cross_entropy", (1, 5, 1, 1, 8), 199)
    _, _, together = run(tiny_tied, data)
    for datum, lp in zip(data, together, strict=True):
        _, _, (alone,) = run(tiny_tied, [datum])
        np.testing.assert_allclose(lp, alone, atol=1e-5)


def test_the_loss_of_cross_entropy_is_the_weighted_mean_and_the_gradient_that_of_the_sum(tiny_tied: Path) -> None:
    decoder, adapter = setup(tiny_tied)
    data = make_data("cross_entropy", (6,), 199)
    out = trainer.run(decoder, adapter, None, *checked(data, "cross_entropy", decoder))
    lp, w = out.loss_fn_outputs[0]["logprobs"].to_numpy(), data[0].loss_fn_inputs["weights"].to_numpy()
    assert out.metrics["loss:sum"] == pytest.approx(float(-(lp * w).sum()), rel=1e-5)
    assert out.loss == pytest.approx(float(-(lp * w).sum() / w.sum()), rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused_and_leaves_no_trace(tiny_tied: Path) -> None:
    decoder, adapter = setup(tiny_tied)
    state = TrainState(adapter)
    good = make_data("importance_sampling", (4, 5), 199)
    trainer.run(decoder, adapter, state, *checked(good, "importance_sampling", decoder))
    before, params = state.grads.clone(), adapter.params.clone()
    bad = Datum(
        ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "logprobs": [-3e4, -1.0], "advantages": [1.0, 1.0]}
    )
    with pytest.raises(NonFiniteError, match=r"loss: importance_sampling is -inf \(datum 1, position 0\)"):
        # One token per pass: the good datum's gradients are computed before the bad one is met.
        trainer.run(decoder, adapter, state, *checked([good[0], bad], "importance_sampling", decoder), max_tokens=1)
    assert torch.equal(state.grads, before)
    assert torch.equal(adapter.params, params)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_a_call_whose_answer_cannot_be_made_leaves_no_trace(
    tiny_tied: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: bool
) -> None:
    """Memory for the results is not there: nobody's gradients count yet, so the calls can be run again."""
    decoder, adapter = setup(tiny_tied)
    if as_on_a_gpu:
        monkeypatch.setattr(decoder, "programs", Programs(decoder))
    other = trained_adapter(decoder, LoraConfig(rank=4, seed=9))
    states = [TrainState(adapter), TrainState(other)]
    parts = checked(make_data("cross_entropy", (4, 5), 199), "cross_entropy", decoder)
    calls = [Call(adapter, states[0], *parts), Call(other, states[1], *parts)]
    made: list[ForwardBackwardOutput] = []

    def second_fails(**fields: Any) -> ForwardBackwardOutput:
        if len(made) == 1:
            raise MemoryError
        made.append(ForwardBackwardOutput(**fields))
        return made[0]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("mint_engine.calls.ForwardBackwardOutput", second_fails)
        with pytest.raises(MemoryError):
            trainer.run_together(decoder, calls)
    assert len(made) == 1
    for state in states:
        assert not state.has_grads
        assert not state.grads.any()
    alone = TrainState(adapter)
    with torch.no_grad():
        trainer.run_together(decoder, calls)
        trainer.run_together(decoder, [Call(adapter, alone, *parts)])
    assert states[0].has_grads
    assert relative(states[0].grads, alone.grads) < 1e-5


def test_memory_that_ends_in_the_middle_leaves_no_trace(tiny_tied: Path) -> None:
    """In a kernel, in any layer of any pass: nobody's gradients count, and what comes next is as right as before."""
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    adapters = [trained_adapter(decoder, LoraConfig(rank=rank, seed=rank)) for rank in (4, 6)]
    parts = checked(make_data("cross_entropy", (30, 25), 199), "cross_entropy", decoder)

    def train(states: list[TrainState]) -> None:
        calls = [Call(adapter, state, *parts) for adapter, state in zip(adapters, states, strict=True)]
        with torch.no_grad():
            trainer.run_together(decoder, calls, max_tokens=80)

    expected, states = ([TrainState(adapter) for adapter in adapters] for _ in range(2))
    train(expected)

    def attempt() -> None:
        try:
            train(states)
        except MemoryError:
            assert not any(state.has_grads or bool(state.grads.any()) for state in states)
            raise

    failed = until_there_is_enough(attempt)[1]
    assert failed > 12
    for state, right in zip(states, expected, strict=True):
        assert state.has_grads
        assert torch.equal(state.grads, right.grads)


def test_weights_beyond_what_a_step_may_reach_are_not_loaded(tiny_tied: Path) -> None:
    """They are finite in fp32 and infinite in bf16, where they would reach their neighbours' rows."""
    _, adapter = setup(tiny_tied)
    before, tensors = adapter.params.clone(), {name: t.clone() for name, t in adapter.named(adapter.params)}
    next(iter(tensors.values())).view(-1)[3] = -3.4e38
    with pytest.raises(NonFiniteError, match="not below 1e"):
        adapter.load(tensors, adapter.params, "the checkpoint")
    assert torch.equal(adapter.params, before)
    adapter.load(tensors, torch.empty_like(before), "moments", below=float("inf"))
