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
from mint_engine.device import upload
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
    rows = _Rows(
        tokens=torch.from_numpy(np.concatenate([p.tokens for p in pieces])),
        positions=torch.from_numpy(np.concatenate([np.arange(p.start, p.stop) for p in pieces])),
        slots=upload(_slots(cache, [(p, p.start) for p in pieces]), decoder.device),
        seating=decoder.borders.seat(
            [(p.adapter, a, b) for p, a, b in zip(pieces, bounds[:-1], bounds[1:], strict=True)]
        ),
    )
    split = bounds[len(prompts)]
    if split == 0 and kernels.decode_layer_supported(decoder.embedding[: len(rows.tokens)], cache.k[0], cache.v[0]):
        return _decode(decoder, cache, rows, sampled), rows.seating
    first = _prompt_attend(decoder, cache, prompts) if prompts else None
    then = _sampled_attend(decoder, cache, sampled) if sampled else None

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        cache.write(layer, rows.slots, k, v)
        if first is not None:
            first(layer, q[:split], k[:split], v[:split], out[:split])
        if then is not None:
            then(layer, q[split:], k[split:], v[split:], out[split:])

    return decoder.hidden(rows.tokens, rows.positions, rows.seating, attend)[0], rows.seating


@dataclass
class _Rows:
    """``tokens, positions, slots`` int64 [M]: what, where in its sequence, and which cell of the cache it gets."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    seating: Seating


def _decode(decoder: Decoder, cache: KVCache, rows: _Rows, pieces: Sequence[Piece]) -> Tensor:
    """The residual stream [M, H] of a few sampled tokens, a layer in one call."""
    c = decoder.config
    cos, sin = decoder.rope.rows(rows.positions)
    table, lengths = _context(cache, pieces)
    adapters = _layer_adapters(decoder, rows.seating)
    x, h = decoder.embedding[rows.tokens], None
    for i, layer in enumerate(decoder.layers):
        x, h = kernels.decode_layer(
            layer, x, h, cos, sin, cache.k[i], cache.v[i], rows.slots, table, lengths, c.num_heads, c.num_kv_heads,
            c.rms_norm_eps, c.head_dim**-0.5, adapters=adapters,
        )  # fmt: skip
    assert h is not None
    return h + x


def _layer_adapters(decoder: Decoder, seating: Seating) -> kernels.LayerAdapters | None:
    """The seating as decode_layer takes it. An adapter trains a kind of module in every layer or in none."""
    if not seating.segments:
        return None
    layer = decoder.layers[0]
    groups = [w.group for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    segments, scales = [], []
    for s in seating.segments:
        trained = sum(1 << bit for bit, group in enumerate(groups) if group.name in s.adapter.factors)
        segments.append([s.start, s.stop, s.offset, s.adapter.rank, trained])
        scales.append(s.adapter.scale)
    return kernels.LayerAdapters(torch.tensor(segments), torch.tensor(scales, dtype=torch.float32), seating.ranks)


def _context(cache: KVCache, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """(block table int32 [M, blocks], lengths int32 [M]) of sampled rows, each up to itself."""
    table = np.repeat(cache.table([p.cache for p in pieces]), [len(p.tokens) for p in pieces], axis=0)
    lengths = np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) + 1 for p in pieces])
    return torch.from_numpy(table), torch.from_numpy(lengths)


def _prompt_attend(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece]) -> Attend:
    """Causal attention of each piece over its sequence so far."""
    cu_seqlens = _cumulative([len(p.tokens) for p in pieces])
    cu_keys, held = cu_seqlens, None
    if any(p.start for p in pieces):
        cu_keys = _cumulative([p.stop for p in pieces])
        held = upload(_slots(cache, [(p, 0) for p in pieces]), decoder.device)
    heads = decoder.config.num_heads, decoder.config.num_kv_heads, decoder.config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        keys, values = (k, v) if held is None else cache.read(layer, held)
        kernels.attention(q, keys, values, cu_seqlens, *heads, cu_keys=cu_keys, out=out)

    return attend


def _sampled_attend(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece]) -> Attend:
    """Each row attends alone to the blocks of its sequence, up to itself."""
    table, lengths = (upload(t, decoder.device) for t in _context(cache, pieces))
    heads = decoder.config.num_heads, decoder.config.num_kv_heads, decoder.config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        kernels.paged_attention(q, cache.k[layer], cache.v[layer], table, lengths, *heads, out=out)

    return attend


def _slots(cache: KVCache, pieces: Sequence[tuple[Piece, int]]) -> Tensor:
    """The cells of each piece's tokens from the given position on, int64."""
    return torch.from_numpy(np.concatenate([cache.slots(p.cache, start, p.stop) for p, start in pieces]))


def _cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
