"""Keys and values of the sequences being sampled, in fixed-size blocks that sequences with a common prefix share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint_engine.device import memory_bytes
from mint_engine.kv_blocks import BlockPool
from mint_engine.models.config import ModelConfig

BLOCK_TOKENS = 32
_MAX_BLOCKS = 1 << 16  # keeps the free list of a tiny test model short


def default_bytes(device: torch.device) -> int:
    """A quarter of the memory of the machine, or of its container's limit, or of the GPU."""
    return memory_bytes(device) // 4


@dataclass(eq=False)
class CachedSequence:
    """One sequence's blocks (pool indices, in order) and how many tokens in them have their keys and values."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """A pool of blocks ``[layers, blocks, BLOCK_TOKENS, n_kv*d]`` for K and for V.

    A sequence takes blocks as it grows. Whole blocks are shared freely, they never change; a partial last block is
    copied when one of several sequences that hold it writes to it. The pool is allocated at once but its pages are only
    touched, hence only taken from the system, when they are used.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, max_bytes: int, device: torch.device | str = "cpu"
    ) -> None:
        width = config.num_kv_heads * config.head_dim
        self.block_bytes = 2 * config.num_layers * BLOCK_TOKENS * width * dtype.itemsize
        self.num_blocks = max(1, min(max_bytes // self.block_bytes, _MAX_BLOCKS))
        shape = (config.num_layers, self.num_blocks, BLOCK_TOKENS, width)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self._pool = BlockPool(self.num_blocks)
        self.programs: Any = None  # of `mint_engine.gpu.decode`, on a GPU

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.num_blocks * BLOCK_TOKENS

    @property
    def blocks_available(self) -> int:
        """Blocks that no sequence holds, those kept for a prefix that may come again included."""
        return self._pool.available

    @property
    def blocks_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self._pool.available

    def longest(self, prompt: int, samples: int) -> int:
        """The largest length to which ``samples`` continuations of one prompt fit the pool side by side.

        Where there is not another block for each, the end of one more block: they take turns.
        """
        shared = prompt // BLOCK_TOKENS
        left = self.num_blocks - shared
        return (shared + max(min(1, left), left // max(1, samples))) * BLOCK_TOKENS

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest cached prefix of a sequence whose whole blocks have these keys."""
        found: list[int] = []
        for key in keys:
            block = self._pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def price(self, found: Sequence[int], tokens: int) -> int:
        """Available blocks that a sequence of ``tokens`` tokens beginning with the blocks ``found`` takes."""
        return blocks_for(tokens) - sum(self._pool.users(block) > 0 for block in found)

    def open(self, found: Sequence[int] = ()) -> CachedSequence:
        """A new sequence that begins with these blocks (whole ones)."""
        for block in found:
            self._pool.share(block)
        return CachedSequence(list(found), len(found) * BLOCK_TOKENS)

    def growth(self, seq: CachedSequence, tokens: int) -> int:
        """Blocks that :meth:`reserve` would take."""
        new = blocks_for(seq.length + tokens) - len(seq.blocks)
        return max(0, new) + (tokens > 0 and self._copies_last(seq))

    def reserve(self, seq: CachedSequence, tokens: int) -> None:
        """Make room, of the sequence's own, for ``tokens`` more tokens. Needs :meth:`growth` available blocks."""
        if tokens > 0 and self._copies_last(seq):
            at = seq.length // BLOCK_TOKENS
            old, new = seq.blocks[at], self._pool.take()
            self.k[:, new], self.v[:, new] = self.k[:, old], self.v[:, old]
            seq.blocks[at] = new
            self._pool.release(old)
        while len(seq.blocks) * BLOCK_TOKENS < seq.length + tokens:
            seq.blocks.append(self._pool.take())

    def _copies_last(self, seq: CachedSequence) -> bool:
        at, inside = divmod(seq.length, BLOCK_TOKENS)
        return inside > 0 and self._pool.users(seq.blocks[at]) > 1

    def fork(self, seq: CachedSequence) -> CachedSequence:
        """A sequence that goes on from the same tokens, in the same blocks."""
        blocks = seq.blocks[: blocks_for(seq.length)]
        for block in blocks:
            self._pool.share(block)
        return CachedSequence(blocks, seq.length)

    def close(self, seq: CachedSequence) -> None:
        """Let go of the sequence's blocks, the last first: a prefix that is kept is evicted from its end."""
        for block in reversed(seq.blocks):
            self._pool.release(block)
        seq.blocks, seq.length = [], 0

    def publish(self, seq: CachedSequence, keys: Sequence[bytes], start: int, stop: int) -> list[int]:
        """Let the whole blocks that end in tokens ``start:stop`` be found; returns those that could not be before."""
        ends = range(start // BLOCK_TOKENS, min(stop // BLOCK_TOKENS, len(keys)))
        return [seq.blocks[i] for i in ends if self._pool.publish(seq.blocks[i], keys[i])]

    def retract(self, blocks: Sequence[int]) -> None:
        """Let published blocks not be found any more: the pass that was to fill them failed."""
        for block in blocks:
            self._pool.retract(block)

    def slots(self, seq: CachedSequence, start: int, stop: int) -> np.ndarray:
        """Flat slots (block * BLOCK_TOKENS + offset) of tokens ``start:stop``, int64."""
        at = np.arange(start, stop)
        return np.array(seq.blocks, dtype=np.int64)[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store ``k, v`` [M, n_kv*d] at the flat slots int64 [M] of a layer."""
        self.k[layer].view(-1, k.shape[1]).index_copy_(0, slots, k)
        self.v[layer].view(-1, v.shape[1]).index_copy_(0, slots, v)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """``k, v`` [M, n_kv*d] at the flat slots int64 [M] of a layer."""
        k, v = (pool[layer].flatten(0, 1).index_select(0, slots) for pool in (self.k, self.v))
        return k, v

    def table(self, sequences: Sequence[CachedSequence]) -> np.ndarray:
        """Block table int32 [n, most blocks], padded with -1."""
        most = max(len(s.blocks) for s in sequences)
        return np.array([s.blocks + [-1] * (most - len(s.blocks)) for s in sequences], dtype=np.int32)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)
