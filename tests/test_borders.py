"""What sits in a border is what the pass asks for, whoever sat there before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.adapters import Adapter, LinearGroup
from mint_engine.borders import LEAST_TOGETHER, BorderedWeight, Borders
from mint_engine.kernels import Arena
from mint_engine.types import LoraConfig

GROUPS = (
    LinearGroup("qkv", "train_attn", 24, (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))),
    LinearGroup("down", "train_mlp", 40, (("down_proj", 24),)),
)
CONFIGS = [
    LoraConfig(rank=3, seed=0), LoraConfig(rank=3, seed=1), LoraConfig(rank=3, seed=2, train_mlp=False),
    LoraConfig(rank=5, seed=3), LoraConfig(rank=3, seed=4, train_attn=False),
]  # fmt: skip


def borders() -> Borders:
    arena = Arena()
    weights = [BorderedWeight(group, torch.bfloat16, 8, arena) for group in GROUPS]
    for i, w in enumerate(weights):
        w.set_rows(0, torch.randn(w.n, w.k, generator=torch.Generator().manual_seed(i)))
    return Borders(weights, 8)


def trained(adapter: Adapter, step: int) -> None:
    adapter.params.copy_(torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(step)))
    adapter.version += 1


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True), min_size=1, max_size=8), st.data())
def test_a_seat_holds_its_adapter_whoever_sat_there_before(passes: list[list[int]], data: st.DataObject) -> None:
    """Zeros beside the blocks of B too: every row of a pass of one adapter is multiplied by all of its columns."""
    ours, adapters = borders(), [Adapter(GROUPS, config) for config in CONFIGS]
    for step, seated in enumerate(passes):
        for i in data.draw(st.sets(st.sampled_from(seated))):
            trained(adapters[i], step)
        rows = [(adapters[i], at, at + 1) for at, i in enumerate(seated)]
        seating, fresh = ours.seat(rows), borders()
        fresh.seat(rows)
        for w, wanted in zip(ours.weights, fresh.weights, strict=True):
            assert torch.equal(w.forward_weight(seating.ranks), wanted.forward_weight(seating.ranks))
            assert torch.equal(w.backward_weight(seating.ranks), wanted.backward_weight(seating.ranks))


def test_memory_that_ends_while_borders_grow_costs_nobody_a_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second weight cannot be widened: what sat in the first is gone, so everybody is seated again."""
    ours, fresh, first, large = borders(), borders(), Adapter(GROUPS, CONFIGS[0]), Adapter(GROUPS, LoraConfig(rank=32))
    trained(first, 1)
    ours.seat([(first, 0, 1)])
    before = ours.capacity

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ours.weights[1], "widen", no_memory)
    with pytest.raises(MemoryError):
        ours.seat([(large, 0, 1)])
    monkeypatch.undo()
    assert ours.capacity != before, "addresses that were kept for the old buffers are found to be stale"
    seating = ours.seat([(first, 0, 1)])
    fresh.seat([(first, 0, 1)])
    for w, wanted in zip(ours.weights, fresh.weights, strict=True):
        assert torch.equal(w.forward_weight(seating.ranks), wanted.forward_weight(seating.ranks))
        assert torch.equal(w.backward_weight(seating.ranks), wanted.backward_weight(seating.ranks))


def test_ranks_together_are_what_memory_allows() -> None:
    ours = borders()
    assert ours.ranks_within(0) == LEAST_TOGETHER
    before = sum(w.buf.nbytes for w in ours.weights) - sum(w.bytes_of(8) - w.bytes_of(0) for w in ours.weights)
    for w in ours.weights:
        w.widen(1024, Arena())
    taken = sum(w.buf.nbytes for w in ours.weights) - before
    assert ours.ranks_within(taken) == 1024
    assert ours.ranks_within(taken - 1) == 512
