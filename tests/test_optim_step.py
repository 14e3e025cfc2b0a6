"""optim_step on the CPU and the border: the next pass finds the new weights there, and nobody else's are touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import load_decoder, trained_adapter

from mint_engine.adapters import Adapter, TrainState
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
