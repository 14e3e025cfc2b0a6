"""One pass of the decoder over pieces of cached sequences: prompts in chunks, sampled tokens one by one.

Which kernel computes a token's keys and values depends on nothing but what the token is. Prompt tokens attend by the
training kernel, over what the cache holds of their sequence and themselves; sampled tokens attend by the decode kernel,
also when they are computed a second time. So chunks, neighbours and a preemption change no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import Adapter
from mint_engine.borders import Seating
from mint_engine.kv_cache import CachedSequence, KVCache
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Attend


@dataclass
class Piece:
    """Tokens ``start : start + len(tokens)`` of a sequence that has room for them. ``tokens`` int64."""

    adapter: Adapter | None
    cache: CachedSequence
    tokens: np.ndarray
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


def compute(
    decoder: Decoder, cache: KVCache, prompts: Sequence[Piece], sampled: Sequence[Piece]
) -> tuple[Tensor, Seating]:
    """(residual stream [M, H], seating) of all pieces' rows, ``prompts`` first; their K and V go into the cache.

    A prompt piece's earlier tokens must be in the cache or come from a piece before it in the same pass.
    """
    pieces = [*prompts, *sampled]
    bounds = [0, *accumulate(len(p.tokens) for p in pieces)]
    split = bounds[len(prompts)]
    slots = torch.from_numpy(np.concatenate([cache.slots(p.cache, p.start, p.stop) for p in pieces]))
    first = _prompt_attend(decoder, cache, prompts) if prompts else None
    then = _sampled_attend(decoder, cache, sampled) if sampled else None

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        cache.write(layer, slots, k, v)
        if first is not None:
            first(layer, q[:split], k[:split], v[:split], out[:split])
        if then is not None:
            then(layer, q[split:], k[split:], v[split:], out[split:])

    seating = decoder.borders.seat([(p.adapter, a, b) for p, a, b in zip(pieces, bounds[:-1], bounds[1:], strict=True)])
    tokens = torch.from_numpy(np.concatenate([p.tokens for p in pieces]))
    positions = torch.from_numpy(np.concatenate([np.arange(p.start, p.stop) for p in pieces]))
    return decoder.hidden(tokens, positions, seating, attend)[0], seating


def _prompt_attend(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece]) -> Attend:
    """Causal attention of each piece over its sequence so far."""
    cu_seqlens = _cumulative([len(p.tokens) for p in pieces])
    cu_keys, held = cu_seqlens, None
    if any(p.start for p in pieces):
        cu_keys = _cumulative([p.stop for p in pieces])
        held = torch.from_numpy(np.concatenate([cache.slots(p.cache, 0, p.stop) for p in pieces]))
    heads = decoder.config.num_heads, decoder.config.num_kv_heads, decoder.config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        keys, values = (k, v) if held is None else cache.read(layer, held)
        kernels.attention(q, keys, values, cu_seqlens, *heads, cu_keys=cu_keys, out=out)

    return attend


def _sampled_attend(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece]) -> Attend:
    """Each row attends alone to the blocks of its sequence, up to itself."""
    counts = [len(p.tokens) for p in pieces]
    table = torch.from_numpy(np.repeat(cache.table([p.cache for p in pieces]), counts, axis=0))
    lengths = torch.from_numpy(np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) + 1 for p in pieces]))
    heads = decoder.config.num_heads, decoder.config.num_kv_heads, decoder.config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        kernels.paged_attention(q, cache.k[layer], cache.v[layer], table, lengths, *heads, out=out)

    return attend


def _cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
