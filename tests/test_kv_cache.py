"""The block manager under random arrivals, growth, forks, cancellations, evictions and adapters that change: every cell
is read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_models import build_tiny

from mint_engine.kv_blocks import BlockPool
from mint_engine.kv_cache import BLOCK_TOKENS, CachedSequence, KVCache, blocks_for
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.requests import Request
from mint_engine.sampling_rows import block_keys
from mint_engine.stopping import StopRule
from mint_engine.types import SamplingParams

BLOCKS = 7


def config() -> ModelConfig:
    """The smallest model whose cache holds one number a token."""
    return ModelConfig(
        family="llama", vocab_size=10, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=1, rms_norm_eps=1e-5, max_context_length=512, tie_word_embeddings=True, qkv_bias=False, o_bias=False,
        qk_norm=False, rope=None, eos_token_ids=(), bos_token_id=None, architecture="none",
    )  # type: ignore[arg-type]  # fmt: skip


def make_cache() -> KVCache:
    cache = KVCache(config(), torch.float32, 2 * BLOCK_TOKENS * 4 * BLOCKS)
    assert cache.num_blocks == BLOCKS
    cache.k.fill_(torch.nan)
    return cache


@dataclass
class Version:
    """What the keys know of an adapter."""

    uid: int
    version: int


def keys_of(tokens: list[int], adapter: Version | None = None) -> list[bytes]:
    array = np.array(tokens, dtype=np.int64)
    return block_keys(Request(adapter, array, 1, SamplingParams(), StopRule()), array)  # type: ignore[arg-type]


def cell(token: int, version: Version | None) -> int:
    """What a token's keys and values are to be."""
    return token + (0 if version is None else 100 * (1 + version.version))


class Blocks(RuleBasedStateMachine):
    """Sequences beside the tokens that must be in their cells, and the version of the adapter that computed them, which
    the cells hold, too. Tokens are few, so prefixes are often common.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache()
        self.live: list[tuple[CachedSequence, list[int], Version | None]] = []
        self.adapter = Version(5, 0)

    def fits(self, price: int) -> bool:
        return price <= self.cache.blocks_available

    def store(self, seq: CachedSequence, held: list[int], tokens: list[int], version: Version | None) -> None:
        """What a pass does: write tokens behind those that are held, and count them."""
        slots = torch.from_numpy(self.cache.slots(seq, len(held), len(held) + len(tokens)))
        values = torch.tensor([cell(token, version) for token in tokens], dtype=torch.float32)[:, None]
        self.cache.write(0, slots, values, values)
        seq.length += len(tokens)
        held += tokens

    @rule()
    def train(self) -> None:
        """A new version of the adapter: nothing of the old one may be found for it."""
        self.adapter = Version(5, self.adapter.version + 1)

    @rule(kind=st.integers(0, 2), length=st.integers(1, 4 * BLOCK_TOKENS), publish=st.booleans(), adapted=st.booleans())
    def arrive(self, kind: int, length: int, publish: bool, adapted: bool) -> None:
        version = self.adapter if adapted else None
        tokens = ([kind] * (BLOCK_TOKENS + 5) + [7] * (4 * BLOCK_TOKENS))[:length]
        keys = keys_of(tokens, version)
        found = self.cache.find(keys[: (length - 1) // BLOCK_TOKENS])
        before = self.cache.blocks_available
        price = self.cache.price(found, length)
        if not self.fits(price):
            return
        seq = self.cache.open(found)
        self.cache.reserve(seq, length - seq.length)
        assert before - self.cache.blocks_available == price
        held = tokens[: seq.length]
        self.store(seq, held, tokens[seq.length :], version)
        if publish:
            self.cache.publish(seq, keys, 0, length)
        self.live.append((seq, held, version))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), token=st.integers(0, 9), tokens=st.integers(1, 3))
    def grow(self, which: int, token: int, tokens: int) -> None:
        seq, held, version = self.live[which % len(self.live)]
        before, growth = self.cache.blocks_available, self.cache.growth(seq, tokens)
        if not self.fits(growth):
            return
        self.cache.reserve(seq, tokens)
        assert before - self.cache.blocks_available == growth
        self.store(seq, held, [token] * tokens, version)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        seq, held, version = self.live[which % len(self.live)]
        before = self.cache.blocks_available
        self.live.append((self.cache.fork(seq), list(held), version))
        assert self.cache.blocks_available == before, "a fork costs nothing until it is written to"

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), publish=st.booleans())
    def leave(self, which: int, publish: bool) -> None:
        """A sample ends, is cancelled or is preempted."""
        seq, held, version = self.live.pop(which % len(self.live))
        if publish:
            self.cache.publish(seq, keys_of(held, version), 0, len(held))
        self.cache.close(seq)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        """A pass fails: what it published is not found, what it held is given back."""
        seq, held, version = self.live.pop(which % len(self.live))
        new = self.cache.publish(seq, keys_of(held, version), 0, len(held))
        self.cache.retract(new)
        assert not {*self.cache.find(keys_of(held, version))} & {*new}
        self.cache.close(seq)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for seq, held, version in self.live:
            assert seq.length == len(held)
            k, v = self.cache.read(0, torch.from_numpy(self.cache.slots(seq, 0, seq.length)))
            assert k[:, 0].tolist() == [cell(token, version) for token in held] == v[:, 0].tolist()

    @invariant()
    def no_block_is_lost_and_the_budget_is_kept(self) -> None:
        distinct = {block for seq, _, _ in self.live for block in seq.blocks}
        assert self.cache.blocks_used == len(distinct)
        assert self.cache.blocks_used + self.cache.blocks_available == BLOCKS
        users = [sum(seq.blocks.count(block) for seq, _, _ in self.live) for block in range(BLOCKS)]
        assert [self.cache._pool.users(block) for block in range(BLOCKS)] == users

    def teardown(self) -> None:
        for seq, _, _ in self.live:
            self.cache.close(seq)
        assert self.cache.blocks_available == BLOCKS


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase


def test_the_prefix_nobody_has_used_for_longest_goes_first_and_from_its_end() -> None:
    cache = make_cache()
    prefixes = [[i] * (2 * BLOCK_TOKENS) for i in range(3)]
    for tokens in prefixes:
        seq = cache.open()
        cache.reserve(seq, len(tokens))
        seq.length = len(tokens)
        cache.publish(seq, keys_of(tokens), 0, len(tokens))
        cache.close(seq)
    assert [len(cache.find(keys_of(t))) for t in prefixes] == [2, 2, 2]
    cache.close(cache.open(cache.find(keys_of(prefixes[0]))))  # used again
    assert cache.blocks_available == BLOCKS
    seq = cache.open()
    cache.reserve(seq, 2 * BLOCK_TOKENS)  # one is free, one must go
    assert [len(cache.find(keys_of(t))) for t in prefixes] == [2, 1, 2]
    cache.reserve(seq, 5 * BLOCK_TOKENS)
    assert [len(cache.find(keys_of(t))) for t in prefixes] == [2, 0, 0]
    cache.reserve(seq, BLOCKS * BLOCK_TOKENS)
    assert cache.find(keys_of(prefixes[0])) == []
    with pytest.raises(IndexError, match="all 7 blocks have users"):
        cache.reserve(seq, (BLOCKS + 1) * BLOCK_TOKENS)


def test_a_block_is_not_given_back_twice() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ValueError, match=f"block {block} has no users"):
        pool.release(block)


def test_the_block_of_a_key_is_the_first_that_had_it() -> None:
    pool = BlockPool(2)
    a, b = pool.take(), pool.take()
    assert pool.publish(a, b"x")
    assert not pool.publish(b, b"x"), "somebody else computed the same"
    assert not pool.publish(a, b"y"), "a block never holds something else"
    pool.release(a)
    pool.release(b)
    assert pool.find(b"x") == a
    assert pool.available == 2
    assert pool.take() == b, "a free one before a kept one"
    assert pool.take() == a
    assert pool.find(b"x") is None


def test_keys_tell_apart_what_may_differ() -> None:
    """Owner, adapter version, every earlier token, and what was prompt."""
    tokens = np.arange(3 * BLOCK_TOKENS) % 10

    def keys(prompt: int = len(tokens), owner: str = "", change: int | None = None) -> list[bytes]:
        array = tokens.copy()
        if change is not None:
            array[change] += 1
        return block_keys(Request(None, array[:prompt], 1, SamplingParams(), StopRule(), owner=owner), array)

    base = keys()
    assert len(base) == len(set(base)) == 3
    assert base == keys()
    assert not {*base} & {*keys(owner="somebody else")}
    assert [a == b for a, b in zip(base, keys(change=BLOCK_TOKENS), strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(base, keys(prompt=BLOCK_TOKENS + 1), strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(base, keys(prompt=3 * BLOCK_TOKENS - 1), strict=True)] == [True, True, False]


def test_the_pool_is_as_large_as_the_budget_allows(tmp_path: Path) -> None:
    tiny = load_config(build_tiny("llama", tmp_path))
    block = 2 * tiny.num_layers * BLOCK_TOKENS * tiny.num_kv_heads * tiny.head_dim * 2
    cache = KVCache(tiny, torch.bfloat16, 5 * block + block // 2)
    assert (cache.num_blocks, cache.block_bytes, cache.capacity) == (5, block, 5 * BLOCK_TOKENS)
    assert cache.k.nbytes + cache.v.nbytes == 5 * block
    assert blocks_for(cache.capacity) == 5
    assert [cache.longest(BLOCK_TOKENS, n) for n in (1, 2, 5)] == [5 * BLOCK_TOKENS, 3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS]
    assert cache.longest(5 * BLOCK_TOKENS, 2) == 5 * BLOCK_TOKENS, "the prompt alone fills it"
