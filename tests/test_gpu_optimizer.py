"""optim_step as a GPU does it, launched one by one on CPU tensors: the CPU's step, and the border with it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import checked, load_decoder, make_data, trained_adapter

from mint_engine.adapters import Adapter, TrainState
from mint_engine.borders import Borders
from mint_engine.calls import Call
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.capture import NoGraph
from mint_engine.gpu.run import Programs
from mint_engine.kernels import force_face
from mint_engine.models.decoder import Decoder
from mint_engine.optimizer import optim_step, queue_step
from mint_engine.types import AdamParams, LoraConfig

ADAM = AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.3)


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


def trained(decoder: Decoder, rank: int = 4, **train: bool) -> tuple[Adapter, TrainState]:
    adapter = trained_adapter(decoder, LoraConfig(rank=rank, seed=rank, **train))
    return adapter, TrainState(adapter)


def gradients(state: TrainState, seed: int) -> None:
    state.grads.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))
    state.has_grads = True


def bits(borders: Borders) -> list[torch.Tensor]:
    return [w.buf.clone() for w in borders.weights]


@pytest.mark.parametrize("train_mlp", [True, False])
def test_four_steps_are_those_of_the_cpu_and_leave_the_border_up_to_date(
    decoder: Decoder, train_mlp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Callable[[], None]] = []
    programs = Programs(decoder, lambda launch: recorded.append(launch) or NoGraph(launch))
    (one, state), (other, other_state) = (trained(decoder, train_mlp=train_mlp) for _ in range(2))
    company = trained(decoder, rank=8)[0]
    decoder.borders.seat([(company, 0, 1), (one, 1, 2)])
    for step in range(4):
        for s in (state, other_state):
            gradients(s, step)
        with torch.no_grad():
            found, expected = queue_step(programs, one, state, ADAM).result(), optim_step(other, other_state, ADAM)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
        assert not state.has_grads
        assert not bool(state.grads.any())
    torch.testing.assert_close(one.params, other.params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.exp_avg_sq, other_state.exp_avg_sq, rtol=1e-6, atol=1e-12)
    assert len(recorded) == 1  # at its second use
    assert len(programs.steppers) == 1
    mine = bits(decoder.borders)
    with monkeypatch.context() as patched:
        patched.setattr("mint_engine.borders.BorderedWeight.install", lambda *_: pytest.fail("installed"))
        decoder.borders.seat([(company, 0, 1), (one, 1, 2)])
    for w in decoder.borders.weights:  # what an installation would have written, to the bit
        w.install(one, company.rank)
    assert all(torch.equal(a, b) for a, b in zip(mine, bits(decoder.borders), strict=True))


def test_an_adapter_without_a_seat_leaves_the_border_alone(decoder: Decoder) -> None:
    programs, (one, state), sitting = Programs(decoder), trained(decoder), trained(decoder)[0]
    decoder.borders.seat([(sitting, 0, 1)])
    before = bits(decoder.borders)
    gradients(state, 1)
    with torch.no_grad():
        queue_step(programs, one, state, ADAM).result()
    assert decoder.borders.offset_of(one) is None
    assert all(torch.equal(a, b) for a, b in zip(before, bits(decoder.borders), strict=True))


def test_of_two_seats_the_newest_is_written(decoder: Decoder) -> None:
    programs, (one, state), other = Programs(decoder), trained(decoder), trained(decoder)[0]
    decoder.borders.seat([(one, 0, 1), (other, 1, 2)])
    decoder.borders.seat([(other, 0, 1), (one, 1, 2)])
    decoder.borders.seat([(one, 0, 1)])  # twice there, with the same weights
    assert decoder.borders.offset_of(one) == 0
    one.version += 1
    decoder.borders.seat([(other, 0, 1), (one, 1, 2)])
    assert decoder.borders.offset_of(one) == other.rank
    gradients(state, 1)
    with torch.no_grad():
        queue_step(programs, one, state, ADAM).result()
    for w in decoder.borders.weights:
        expected = one.factors[w.group.name].a
        assert torch.equal(w.a(other.rank, one.rank), expected)
        assert not torch.equal(w.a(0, one.rank), expected)


def test_a_refused_step_changes_nothing(decoder: Decoder) -> None:
    programs, (one, state) = Programs(decoder), trained(decoder)
    decoder.borders.seat([(one, 0, 1)])
    before, weights = bits(decoder.borders), one.params.clone()
    gradients(state, 1)
    with torch.no_grad():
        with pytest.raises(NonFiniteError, match="beyond fp32"):
            queue_step(programs, one, state, AdamParams(learning_rate=1e38)).result()
        assert state.has_grads
        state.grads[3] = torch.inf
        with pytest.raises(NonFiniteError, match="its norm is inf"):
            queue_step(programs, one, state, ADAM).result()
    assert not state.has_grads
    assert state.step == 0
    assert torch.equal(one.params, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(decoder.borders), strict=True))


def test_wider_borders_and_moved_buffers_make_steppers_anew(decoder: Decoder) -> None:
    """And a pass after each step computes with the new weights."""
    programs, (one, state) = Programs(decoder), trained(decoder)

    def loss() -> float:
        call = Call(one, None, *checked(make_data("cross_entropy", (20,), 199), "cross_entropy", decoder))
        with torch.no_grad():
            (out,) = programs.run_together([call])
        return out.metrics["loss:sum"]

    def stepped() -> None:
        gradients(state, 1)
        with torch.no_grad():
            queue_step(programs, one, state, ADAM).result()
        inplace = loss()
        one.version += 1  # written anew
        assert loss() == inplace

    loss()
    stepped()
    decoder.borders.seat([(trained(decoder, rank=decoder.borders.capacity + 16)[0], 0, 1)])
    loss()
    stepped()
    assert len(programs.steppers) == 1
    state.exp_avg = state.exp_avg.clone()
    stepped()
    assert len(programs.steppers) == 2


def test_steppers_keep_no_adapter_alive(decoder: Decoder) -> None:
    """On a GPU; what is repeated one by one must be."""
    programs, (one, state) = Programs(decoder, lambda launch: lambda: None), trained(decoder)
    gone = weakref.ref(one.params), weakref.ref(state)
    with torch.no_grad():
        for _ in range(2):
            queue_step(programs, one, state, ADAM).result()
    del one, state
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are not interpreted on CPU tensors")
def test_the_kernel_interpreted_is_the_step_of_the_cpu(decoder: Decoder) -> None:
    """Two tenants side by side: a step writes its own columns and rows of the border only."""
    programs, (one, state), (other, other_state) = Programs(decoder), trained(decoder), trained(decoder)
    neighbour = trained(decoder, rank=8)[0]
    decoder.borders.seat([(one, 0, 1), (neighbour, 1, 2)])
    for s in (state, other_state):
        gradients(s, 1)
    with torch.no_grad():
        with force_face("triton"):
            queue_step(programs, one, state, ADAM).result()
        optim_step(other, other_state, ADAM)
    torch.testing.assert_close(one.params, other.params, rtol=1e-6, atol=1e-7)
    mine = bits(decoder.borders)
    for w in decoder.borders.weights:
        w.install(one, 0)
        w.install(neighbour, one.rank)
    assert all(torch.equal(a, b) for a, b in zip(mine, bits(decoder.borders), strict=True))
