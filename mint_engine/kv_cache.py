"""Keys and values of the sequences being sampled, in fixed-size blocks that samples of one prompt share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint_engine.models.config import ModelConfig

BLOCK_TOKENS = 32
_MAX_BLOCKS = 1 << 16  # keeps the free list of a tiny test model short


def default_bytes() -> int:
    """A quarter of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@dataclass
class CachedSequence:
    """One sequence's blocks (pool indices, in order), how many tokens of them are filled, and its reserve."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    reserved: int = 0  # blocks promised to this sequence and not taken yet


class KVCache:
    """A pool of blocks ``[layers, blocks, BLOCK_TOKENS, n_kv*d]`` for K and for V.

    A sequence reserves its worst case when it is admitted, so a running one never finds the pool empty. The pool is
    allocated at once but its pages are only touched, hence only taken from the system, when they are used.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_bytes: int) -> None:
        width = config.num_kv_heads * config.head_dim
        self.block_bytes = 2 * config.num_layers * BLOCK_TOKENS * width * dtype.itemsize
        self.num_blocks = max(1, min(max_bytes // self.block_bytes, _MAX_BLOCKS))
        shape = (config.num_layers, self.num_blocks, BLOCK_TOKENS, width)
        self.k, self.v = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._users = [0] * self.num_blocks
        self._promised = 0

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.num_blocks * BLOCK_TOKENS

    @property
    def blocks_available(self) -> int:
        """Blocks neither used nor promised."""
        return len(self._free) - self._promised

    @property
    def blocks_used(self) -> int:
        """Blocks that hold somebody's keys and values."""
        return self.num_blocks - len(self._free)

    @staticmethod
    def blocks_needed(prompt: int, total: int, samples: int) -> int:
        """Worst case of ``samples`` continuations of one prompt to ``total`` tokens each: prompt blocks are shared."""
        shared = prompt // BLOCK_TOKENS
        return shared + samples * (-(-total // BLOCK_TOKENS) - shared)

    def longest(self, prompt: int, samples: int) -> int:
        """The largest ``total`` for which :meth:`blocks_needed` is at most the whole pool."""
        shared = prompt // BLOCK_TOKENS
        return (shared + (self.num_blocks - shared) // max(1, samples)) * BLOCK_TOKENS

    def open(self, reserve: int) -> CachedSequence:
        """A new empty sequence with ``reserve`` blocks promised to it."""
        self._promised += reserve
        return CachedSequence(reserved=reserve)

    def extend(self, seq: CachedSequence, tokens: int) -> list[int]:
        """Make room for ``tokens`` more tokens; returns their flat slots (block * BLOCK_TOKENS + offset)."""
        start, seq.length = seq.length, seq.length + tokens
        while len(seq.blocks) * BLOCK_TOKENS < seq.length:
            seq.blocks.append(self._take(seq))
        return [seq.blocks[t // BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS for t in range(start, seq.length)]

    def fork(self, seq: CachedSequence, reserve: int) -> CachedSequence:
        """A sequence that continues from the same tokens: full blocks are shared, the last partial one is copied.

        ``reserve`` blocks of ``seq``'s own promise move to the new sequence.
        """
        seq.reserved -= reserve
        full = seq.length // BLOCK_TOKENS
        new = CachedSequence(seq.blocks[:full], seq.length, reserve)
        for block in new.blocks:
            self._users[block] += 1
        if seq.length % BLOCK_TOKENS:
            block = self._take(new)
            self.k[:, block] = self.k[:, seq.blocks[full]]
            self.v[:, block] = self.v[:, seq.blocks[full]]
            new.blocks.append(block)
        return new

    def close(self, seq: CachedSequence) -> None:
        """Give back everything the sequence holds and was promised."""
        for block in seq.blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)
        self._promised -= seq.reserved
        seq.blocks, seq.length, seq.reserved = [], 0, 0

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store ``k, v`` [M, n_kv*d] at the flat slots int64 [M] of a layer."""
        self.k[layer].view(-1, k.shape[1]).index_copy_(0, slots, k)
        self.v[layer].view(-1, v.shape[1]).index_copy_(0, slots, v)

    def table(self, sequences: list[CachedSequence]) -> tuple[Tensor, Tensor]:
        """(block table int32 [n, max blocks] padded with -1, lengths int32 [n])."""
        width = max(len(s.blocks) for s in sequences)
        rows = [s.blocks + [-1] * (width - len(s.blocks)) for s in sequences]
        return torch.tensor(rows, dtype=torch.int32), torch.tensor([s.length for s in sequences], dtype=torch.int32)

    def _take(self, seq: CachedSequence) -> int:
        if seq.reserved > 0:
            seq.reserved -= 1
            self._promised -= 1
        block = self._free.pop()
        self._users[block] = 1
        return block
