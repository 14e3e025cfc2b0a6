"""The GPU's step, its launches repeated one by one on CPU tensors, against the CPU's: programs, buckets, passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checked, load_decoder, make_data, relative, trained_adapter

from mint_engine import kernels, trainer
from mint_engine.adapters import TrainState
from mint_engine.calls import Call
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.buckets import bucket, power_of_2
from mint_engine.gpu.capture import NoGraph
from mint_engine.gpu.memory import Plan, kept_bytes, plan
from mint_engine.gpu.run import Programs
from mint_engine.models.decoder import Decoder
from mint_engine.types import Datum, ForwardBackwardOutput, LoraConfig

# The same fp32 sums in another order, through three layers forwards and back.
REORDERED = 1e-5
EXACT = Plan(1 << 16, checkpoint=False)


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


def call(decoder: Decoder, data: list[Datum], loss_fn: str = "cross_entropy", rank: int = 4, *, backward: bool = True,
         **train: bool) -> Call:  # fmt: skip
    adapter = trained_adapter(decoder, LoraConfig(rank=rank, seed=rank, **train))
    datums, loss, config = checked(data, loss_fn, decoder)
    return Call(adapter, TrainState(adapter) if backward else None, datums, loss, config)


def again(old: Call, **changes: object) -> Call:
    """The same call with gradients of its own."""
    state = None if old.state is None else TrainState(old.adapter)
    return Call(**{**vars(old), "state": state, **changes})


def same(
    decoder: Decoder, calls: Sequence[Call], programs: Programs, memory: Plan = EXACT, masked_logprobs: bool = True
) -> None:
    """Losses, log-probabilities and gradients of ``calls`` are those of the CPU's own step."""
    expected_calls = [again(c) for c in calls]
    with torch.no_grad():
        expected = trainer.run_together(decoder, expected_calls, masked_logprobs=masked_logprobs)
        found = programs.run_together(calls, masked_logprobs=masked_logprobs, memory=memory)
    for ours, theirs, mine, other in zip(found, expected, calls, expected_calls, strict=True):
        assert isinstance(ours, ForwardBackwardOutput)
        assert isinstance(theirs, ForwardBackwardOutput)
        # Every log-probability is off by its rounding, and weights of both signs cancel in the sum.
        allowed = REORDERED * theirs.metrics["tokens:sum"]
        assert ours.metrics == pytest.approx(theirs.metrics, rel=REORDERED, abs=allowed)
        assert (ours.weight_sum or 0.0) == pytest.approx(theirs.weight_sum or 0.0, rel=1e-6)
        for a, b in zip(ours.loss_fn_outputs, theirs.loss_fn_outputs, strict=True):
            lp, wanted = a["logprobs"].to_numpy(), b["logprobs"].to_numpy()
            np.testing.assert_allclose(lp, wanted, rtol=REORDERED, atol=REORDERED)
        if mine.state is not None:
            assert other.state is not None
            assert float(other.state.grads.abs().max()) > 0
            assert relative(mine.state.grads, other.state.grads) < REORDERED


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
@pytest.mark.parametrize("masked_logprobs", [True, False])
def test_one_call_is_that_of_the_cpu(decoder: Decoder, loss_fn: str, masked_logprobs: bool) -> None:
    same(decoder, [call(decoder, make_data(loss_fn, (1, 9, 23, 70), 199), loss_fn)], Programs(decoder),
         masked_logprobs=masked_logprobs)  # fmt: skip


def test_a_program_serves_other_batches_of_its_shape(decoder: Decoder) -> None:
    """Other sequences, weights and row lists, same buffers; the second batch of a shape is the one that is recorded."""
    recorded = []

    def record(launch: Callable[[], None]) -> NoGraph:
        recorded.append(launch)
        return NoGraph(launch)

    programs = Programs(decoder, record)
    first = call(decoder, make_data("cross_entropy", (50, 20), 199))
    for seed, lengths in enumerate([(50, 20), (30, 35), (69,), (1, 66, 2), (65, 1)]):
        datums = checked(make_data("cross_entropy", lengths, 199, seed), "cross_entropy", decoder)[0]
        same(decoder, [again(first, data=datums)], programs)
        assert len(recorded) == min(seed, 1)
    assert len(programs) <= 2  # of one or two to four sequences


def test_calls_of_several_adapters_share_a_pass(decoder: Decoder) -> None:
    """Ranks, modules and losses of their own; a forward and soft targets among them."""
    calls = [
        call(decoder, make_data("cross_entropy", (40, 3), 199, 1), rank=4),
        call(decoder, make_data("ppo", (9,), 199, 2), "ppo", rank=8, train_mlp=False),
        call(decoder, make_data("cross_entropy", (5, 6), 199, 3, columns=3), rank=2, train_unembed=False),
        call(decoder, make_data("cross_entropy", (12,), 199, 4), rank=3, backward=False),
    ]
    programs = Programs(decoder)
    for _ in range(2):
        same(decoder, [again(c) for c in calls], programs)
    assert len(programs) == 2  # those with a backward, and the forward


@pytest.mark.parametrize(("masked_logprobs", "ranks"), [(True, (16, 32)), (False, (16, 32)), (True, (64, 64))])
def test_adapters_of_ranks_of_16_take_their_own_tiles(
    decoder: Decoder, masked_logprobs: bool, ranks: tuple[int, int]
) -> None:
    """Of 64 even whole tiles of K, where the base's columns are such."""
    calls = [call(decoder, make_data("cross_entropy", (130, 20 + i), 199, i), rank=r) for i, r in enumerate(ranks)]
    same(decoder, calls, Programs(decoder), masked_logprobs=masked_logprobs)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("masked_logprobs", [True, False])
def test_micro_batches_and_checkpoints_are_the_same_sums(
    decoder: Decoder, checkpoint: bool, masked_logprobs: bool
) -> None:
    """Two batches are in flight: the next is packed and queued before the first is read."""
    calls = [call(decoder, make_data("cross_entropy", (20, 30, 31, 9, 40, 5), 199)) for _ in range(2)]
    same(decoder, calls, Programs(decoder), Plan(64, checkpoint), masked_logprobs)


def test_gradients_add_to_those_that_wait(decoder: Decoder) -> None:
    programs, data = Programs(decoder), make_data("cross_entropy", (9, 30), 199)
    twice, once = call(decoder, data), call(decoder, data)
    with torch.no_grad():
        programs.run_together([once])
        programs.run_together([twice])
        programs.run_together([twice])
    assert once.state is not None
    assert twice.state is not None
    assert relative(twice.state.grads, 2 * once.state.grads) < 1e-6


@pytest.mark.parametrize("masked", [True, False])
def test_no_logits_are_computed_twice(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Rows with a gradient meet the unembedding once, in `target_logprob_with_gradient`; the others once, or never."""
    rows: dict[str, int] = {}

    def counted(name: str) -> None:
        original = getattr(kernels, name)

        def run(x: torch.Tensor, *args: object, **kwargs: object) -> object:
            rows[name] = rows.get(name, 0) + len(x)
            return original(x, *args, **kwargs)

        monkeypatch.setattr(kernels, name, run)

    for name in ("target_logprob", "target_logprob_with_gradient", "target_logprob_backward"):
        counted(name)
    (datum,) = make_data("cross_entropy", (300,), 199)
    weights = np.where(np.arange(300) < 70, 1.0, 0.0).astype(np.float32)
    data = [Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "weights": weights})]
    with torch.no_grad():
        Programs(decoder).run_together([call(decoder, data)], masked_logprobs=masked, memory=EXACT)
    expected = {"target_logprob_with_gradient": 72, **({"target_logprob": bucket(300) - 72} if masked else {})}
    assert rows == expected


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("memory", [EXACT, Plan(16, checkpoint=False)])
def test_a_loss_that_is_not_finite_leaves_nothing_behind(decoder: Decoder, memory: Plan, masked: bool) -> None:
    data = make_data("importance_sampling", (9, 12), 199)
    data[1].loss_fn_inputs["logprobs"] = np.where(np.arange(12) == 5, -1e30, -5.0).astype(np.float32)
    data[1].loss_fn_inputs["advantages"] = np.ones(12, np.float32)
    data[1] = Datum(model_input=data[1].model_input, loss_fn_inputs=dict(data[1].loss_fn_inputs))
    broken = call(decoder, data, "importance_sampling")
    sound = call(decoder, make_data("cross_entropy", (20,), 199, 5), rank=8)
    alone = again(sound)
    with torch.no_grad():
        found = Programs(decoder).run_together([broken, sound], memory=memory, masked_logprobs=masked)
        Programs(decoder).run_together([alone], memory=memory)
    assert isinstance(found[0], NonFiniteError)
    assert "datum 1, position 5" in str(found[0])
    assert isinstance(found[1], ForwardBackwardOutput)
    assert broken.state is not None
    assert sound.state is not None
    assert alone.state is not None
    assert not broken.state.has_grads
    assert not bool(broken.state.grads.any())
    assert relative(sound.state.grads, alone.state.grads) < REORDERED


@pytest.mark.parametrize("masked", [True, False])
def test_activations_that_are_not_finite_stay_with_their_call(decoder: Decoder, masked: bool) -> None:
    broken = call(decoder, make_data("cross_entropy", (20,), 199))
    broken.adapter.params.mul_(1e18)
    broken.adapter.version += 1
    sound = call(decoder, make_data("cross_entropy", (20,), 199, 5), rank=8)
    alone = again(sound)
    with torch.no_grad():
        found = Programs(decoder).run_together([broken, sound], memory=EXACT, masked_logprobs=masked)
        Programs(decoder).run_together([alone], memory=EXACT)
    assert isinstance(found[0], NonFiniteError)
    assert isinstance(found[1], ForwardBackwardOutput)
    assert broken.state is not None
    assert sound.state is not None
    assert alone.state is not None
    assert not broken.state.has_grads
    assert relative(sound.state.grads, alone.state.grads) < REORDERED


def test_more_room_in_the_borders_makes_programs_anew(decoder: Decoder) -> None:
    programs = Programs(decoder)
    narrow = call(decoder, make_data("cross_entropy", (9,), 199))
    same(decoder, [narrow], programs)
    wide = call(decoder, make_data("cross_entropy", (9,), 199), rank=decoder.borders.capacity + 16)
    same(decoder, [wide], programs)
    assert len(programs) == 1
    same(decoder, [again(narrow)], programs)


def test_buckets_waste_at_most_an_eighth() -> None:
    sizes = sorted({bucket(n) for n in range(1, 5000)})
    assert all(bucket(n) >= n for n in range(1, 5000))
    assert all((bucket(n) - n) * 8 <= n for n in range(64, 5000))
    assert len(sizes) <= 8 * 7
    assert [power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_short_memory_is_met_first_by_passes_then_by_checkpoints(decoder: Decoder) -> None:
    keep, some = (kept_bytes(decoder, 16, checkpoint=c) for c in (False, True))
    assert some < keep
    before = decoder.activation_bytes
    try:
        decoder.activation_bytes = 9000 * keep
        assert plan(decoder, 4000, 100, 16) == Plan(8000, False)  # all at once
        assert plan(decoder, 9000, 100, 16) == Plan(8000, False)  # in two passes
        assert bucket(8000) <= 9000
        assert plan(decoder, 9000, 100, 16, company=True) == Plan(
            4500, False
        )  # whose rows are rounded to powers of two
        decoder.activation_bytes = 1800 * keep
        assert plan(decoder, 900, 100, 16) == Plan(1600, False)
        short = plan(decoder, 9000, 100, 16)  # small passes would leave a GPU idle
        assert short.checkpoint
        assert short.max_tokens > 1600
        assert plan(decoder, 9000, 8000, 16).max_tokens >= 8000  # a sequence is never cut
    finally:
        decoder.activation_bytes = before
