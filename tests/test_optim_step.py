"""optim_step on the CPU and the border: the next pass finds the new weights there, and nobody else's are touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import checked, load_decoder, make_data, trained_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.errors import NonFiniteError
from mint_engine.kernels import adamw_largest, adamw_norm
from mint_engine.models.decoder import Decoder
from mint_engine.optimizer import optim_step
from mint_engine.types import AdamParams, LoraConfig

ADAM = AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def trained(decoder: Decoder, rank: int, **train: bool) -> tuple[Adapter, TrainState]:
    adapter = trained_adapter(decoder, LoraConfig(rank=rank, seed=rank, **train))
    state = TrainState(adapter)
    state.grads.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(rank))
    return adapter, state


def bits(decoder: Decoder) -> list[torch.Tensor]:
    return [w.buf.clone() for w in decoder.borders.weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_mlp", [True, False])
def test_the_border_is_what_an_installation_would_have_written(
    tiny_tied: Path, dtype: torch.dtype, train_mlp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny_tied, dtype)
    (one, state), (company, _) = trained(decoder, 4, train_mlp=train_mlp), trained(decoder, 8)
    seats = [(company, 0, 1), (one, 1, 2)]
    decoder.borders.seat(seats)
    with torch.no_grad():
        optim_step(one, state, ADAM, decoder)
    assert not state.grads.any()
    mine = bits(decoder)
    with monkeypatch.context() as patched:
        patched.setattr("mint_engine.borders.BorderedWeight.install", lambda *_: pytest.fail("installed"))
        decoder.borders.seat(seats)
    for w in decoder.borders.weights:
        w.install(one, company.rank)
    assert all(torch.equal(a, b) for a, b in zip(mine, bits(decoder), strict=True))


def test_an_adapter_without_a_seat_leaves_the_border_alone(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    (one, state), (sitting, _) = trained(decoder, 4), trained(decoder, 8)
    decoder.borders.seat([(one, 0, 1)])
    decoder.borders.seat([(sitting, 0, 1)])
    before = bits(decoder)
    with torch.no_grad():
        optim_step(one, state, ADAM, decoder)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(decoder), strict=True))


def test_a_border_that_has_grown_is_written_where_it_is_now(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    (one, state), (wide, _) = trained(decoder, 4), trained(decoder, 64)
    with torch.no_grad():
        decoder.borders.seat([(one, 0, 1)])
        optim_step(one, state, ADAM, decoder)
        decoder.borders.seat([(one, 0, 1), (wide, 1, 2)])
        state.grads.fill_(0.1)
        optim_step(one, state, ADAM, decoder)
    mine = bits(decoder)
    for w in decoder.borders.weights:
        w.install(one, 0)
    assert all(torch.equal(a, b) for a, b in zip(mine, bits(decoder), strict=True))


EVENTS = ["forward_backward", "refused call", "refused step", "step", "gradients by hand", "weights by hand", "dropped"]


@settings(max_examples=40, deadline=None)
@given(events=st.lists(st.sampled_from(EVENTS), max_size=8), at_head=st.booleans())
def test_a_step_knows_the_gradients_and_weights_there_are(tiny_tied: Path, events: list[str], at_head: bool) -> None:
    """Whoever wrote to them since they were measured: it is not an old norm that clips, nor an old bound."""
    decoder = load_decoder(tiny_tied)
    adapter, state = trained(decoder, 4, train_unembed=at_head)
    state.zero_grads()
    good, bad = (checked(make_data("cross_entropy", (5, 3), 199, seed), "cross_entropy", decoder) for seed in (0, 1))
    bad[0][0].inputs["weights"][-1] = float("nan")

    def happen(event: str) -> None:
        if event == "forward_backward":
            trainer.run(decoder, adapter, state, *good)
        elif event == "refused call":
            with pytest.raises(NonFiniteError):
                trainer.run(decoder, adapter, state, *bad)
        elif event == "refused step":
            with pytest.raises(NonFiniteError, match="beyond fp32"):
                optim_step(adapter, state, AdamParams(learning_rate=1e37), decoder)
        elif event == "step":
            optim_step(adapter, state, ADAM, decoder)
        elif event == "gradients by hand":
            state.factors[adapter.groups[0].name].a.add_(0.01)
            state.has_grads = True
        elif event == "weights by hand":
            adapter.factors[adapter.groups[0].name].a.mul_(1.5)
        else:
            state.grads[-1] = torch.inf
            with pytest.raises(NonFiniteError, match="dropped"):
                optim_step(adapter, state, ADAM, decoder)

    with torch.no_grad():
        for event in events:
            happen(event)
            assert state.norm() == adamw_norm(state.grads)
            assert state.largest(adapter) == adamw_largest(adapter.params)


def test_a_call_and_its_step_measure_what_they_need_once(tiny_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_tied)
    adapter, state = trained(decoder, 4)
    state.zero_grads()
    data = checked(make_data("cross_entropy", (5, 3), 199), "cross_entropy", decoder)
    measured: list[str] = []
    for measure in (adamw_norm, adamw_largest):

        def counted(t: torch.Tensor, measure: Callable[[torch.Tensor], float] = measure) -> float:
            measured.append(measure.__name__)
            return measure(t)

        monkeypatch.setattr(f"mint_engine.adapters.{measure.__name__}", counted)
    with torch.no_grad():
        for _ in range(3):
            trainer.run(decoder, adapter, state, *data)
            norm = float(state.grads.norm())
            assert optim_step(adapter, state, ADAM, decoder).metrics["grad_norm"] == pytest.approx(norm)
    assert measured == ["adamw_norm", "adamw_largest", "adamw_norm", "adamw_norm"]


@pytest.mark.parametrize("params", [
    {"learning_rate": 1e34, "beta1": 1 - 1e-9},  # times a zero moment it would be NaN
    {"learning_rate": 1e3, "weight_decay": 1e36},  # so would this, times a zero weight
])  # fmt: skip
def test_a_step_whose_factors_do_not_fit_fp32_is_refused(tiny_tied: Path, params: dict[str, float]) -> None:
    decoder = load_decoder(tiny_tied)
    adapter, state = trained(decoder, 4)
    adapter.params.zero_()
    state.grads.zero_()
    with pytest.raises(NonFiniteError, match="beyond fp32; the step was refused"):
        optim_step(adapter, state, AdamParams(**params), decoder)
    assert state.step == 0
    assert not adapter.params.any()


def test_an_eps_that_is_zero_in_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="eps"):
        AdamParams(eps=1e-46)
