"""What sits in a border is what the pass asks for, whoever sat there before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.adapters import Adapter, LinearGroup
from mint_engine.borders import BorderedWeight, Borders
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
    weights = [BorderedWeight(group, torch.bfloat16, 8, torch.device("cpu")) for group in GROUPS]
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
