"""One pass of the decoder over pieces of cached sequences: prompts in chunks, or sampled tokens one by one.

Which kernel computes a token's keys and values depends on nothing but what the token is. Prompt tokens attend by the
training kernel, over what the cache holds of their sequence and themselves; sampled tokens attend by the decode kernel,
also when they are computed a second time. So chunks, neighbours and a preemption change no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import Adapter
from mint_engine.borders import Seating
from mint_engine.device import computing_on, upload
from mint_engine.gpu.decode import Step, decode_programs, seats
from mint_engine.kv_cache import CachedSequence, KVCache
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Attend, Cells, Context
from mint_engine.sampling import Draw, step_draws


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


def prefill(
    decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], wanted: Tensor | None = None
) -> tuple[Tensor, Seating]:
    """(residual stream [M, H], seating) of the rows of prompts; their K and V go into the cache.

    Of the ``wanted`` rows only, if given (int64, ascending, at least one): the others are spared the last layer.

    A piece's earlier tokens must be in the cache or come from a piece before it. Rows have the same bits in any company
    of their own adapter's where products are our own (`kernels.plan`); where an adapter sits in the border moves sums.
    """
    with computing_on(decoder.device):
        rows = _Rows.of(decoder, cache, pieces)
        attend = _PromptAttend(decoder, cache, pieces, rows.slots)
        h, _ = decoder.hidden(rows.tokens, rows.positions, rows.seating, attend, rows=wanted)
        return h, rows.seating if wanted is None else rows.seating.select(wanted)


def decode(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], wanted: Sequence[int] | None = None) -> Tensor:
    """fp32 logits [R, V], on the device, of the rows of sampled tokens, or of the ``wanted`` ones, ascending.

    Their K and V go into the cache. Where the cpu kernels run, rows have the same bits in any company. On a GPU the
    logits of a step live until the next.
    """
    if decoder.device.type == "cuda" and wanted is None:
        return decode_programs(decoder, cache).logits(_step(cache, pieces))
    if not steps_in_a_call(decoder, cache):
        rows = _Rows.of(decoder, cache, pieces)
        h, _ = decoder.hidden(
            rows.tokens, rows.positions, rows.seating, _sampled_attend(decoder, cache, pieces, rows.slots)
        )
        chosen = _chosen(wanted, len(h))
        own = rows.seating.select(chosen)
        return decoder.logits(decoder.head_input(h[upload(chosen, decoder.device)], own), own)
    step = _cpu_step(decoder, cache, pieces, 1)
    return kernels.decode_step(**step, wanted=_chosen(wanted, len(step["tokens"])))


def steps_in_a_call(decoder: Decoder, cache: KVCache) -> bool:
    """Whether :func:`decode_steps` is there for these."""
    return kernels.decode_step_supported(decoder.norm, cache.k, cache.v)


def decode_steps(
    decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], draws: Sequence[Draw],
    stops: Sequence[frozenset[int]], uniforms: np.ndarray, interrupted: Tensor | None, seconds: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens int64 [k, R], log-probabilities fp32 [k, R]) of rows of one token each, in up to len(``uniforms``) steps.

    The sequences have room for so many tokens. See ``kernels.decode_steps``; ``uniforms`` float64 [steps, R].
    """
    return kernels.decode_steps(
        **_cpu_step(decoder, cache, pieces, len(uniforms)),
        draws=step_draws(draws, stops, uniforms, decoder.config.vocab_size),
        interrupted=interrupted, seconds=seconds,
    )  # fmt: skip


def _cpu_step(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], steps: int) -> dict[str, Any]:
    """The arguments that so many steps of ``kernels`` begin with."""
    # On a CPU the step waits for what is done here, with caches that the weights have swept: few calls, small arrays.
    tokens, (table, lengths) = _tokens(pieces), _context(cache, pieces)
    cos, sin = decoder.rope.first(int(lengths.max()) + steps - 1)
    seating = decoder.borders.seat(_seats(pieces))  # first: it may widen the borders, and then there is another model
    return {
        "model": decoder.step_model(), "tokens": tokens, "cos": cos, "sin": sin, "k_pool": cache.k, "v_pool": cache.v,
        "block_table": torch.from_numpy(table), "lengths": torch.from_numpy(lengths),
        "scale": decoder.config.head_dim**-0.5, "adapters": _adapters(decoder, seating),
    }  # fmt: skip


def _chosen(wanted: Sequence[int] | None, rows: int) -> Tensor:
    """The ``wanted`` of so many rows, int64; all of them by default."""
    return torch.from_numpy(np.arange(rows) if wanted is None else np.array(wanted, dtype=np.int64))


def _step(cache: KVCache, pieces: Sequence[Piece]) -> Step:
    """The pieces as the GPU's programs take them."""
    table, lengths = _context(cache, pieces)
    return Step(
        tokens=np.concatenate([p.tokens for p in pieces]),
        positions=np.concatenate([np.arange(p.start, p.stop) for p in pieces]),
        slots=_slots(cache, [(p, p.start) for p in pieces]).numpy(),
        table=table, lengths=lengths,
        seats=seats([p.adapter for p in pieces], [len(p.tokens) for p in pieces]),
    )  # fmt: skip


def draw_at_once(
    decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], draws: Sequence[Draw], uniforms: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """A token for each row of :func:`decode` with its log-probability, drawn without storing logits.

    None, and nothing done, where that cannot be: on a CPU, or if a row has filters.
    """
    if decoder.device.type != "cuda" or not all(draw.plain for draw in draws):
        return None
    temperatures = np.array([draw.temperature for draw in draws], dtype=np.float32)
    step = replace(_step(cache, pieces), temperatures=temperatures, uniforms=np.array(uniforms, dtype=np.float64))
    return decode_programs(decoder, cache).draw(step)


@dataclass
class _Rows:
    """``tokens, positions, slots`` int64 [M]: what, where in its sequence, and which cell of the cache it gets."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    seating: Seating

    @staticmethod
    def of(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece]) -> _Rows:
        return _Rows(
            tokens=_tokens(pieces),
            positions=torch.from_numpy(np.concatenate([np.arange(p.start, p.stop) for p in pieces])),
            slots=upload(_slots(cache, [(p, p.start) for p in pieces]), decoder.device),
            seating=decoder.borders.seat(_seats(pieces)),
        )


def _tokens(pieces: Sequence[Piece]) -> Tensor:
    return torch.from_numpy(np.concatenate([p.tokens for p in pieces]))


def _seats(pieces: Sequence[Piece]) -> list[tuple[Adapter | None, int, int]]:
    """Whose rows are where, as `Borders.seat` wants to know."""
    bounds = [0, *accumulate(len(p.tokens) for p in pieces)]
    return [(p.adapter, a, b) for p, a, b in zip(pieces, bounds[:-1], bounds[1:], strict=True)]


def _adapters(decoder: Decoder, seating: Seating) -> kernels.StepAdapters | None:
    """The seating as decode_step takes it. An adapter trains a kind of module in every layer or in none."""
    if not seating.segments:
        return None
    layer = decoder.layers[0]
    groups = [w.group for w in (layer.qkv, layer.o, layer.gate_up, layer.down, decoder.head)]
    segments, scales = [], []
    for s in seating.segments:
        trained = sum(1 << bit for bit, group in enumerate(groups) if group.name in s.adapter.factors)
        segments.append([s.start, s.stop, s.offset, s.adapter.rank, trained])
        scales.append(s.adapter.scale)
    words = None if decoder.border_words is None else decoder.border_words.of(seating.segments)
    return kernels.StepAdapters(torch.tensor(segments), torch.tensor(scales, dtype=torch.float32), seating.ranks, words)


def _context(cache: KVCache, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """(block table int32 [M, blocks], lengths int32 [M]) of sampled rows, each up to itself."""
    table, counts = cache.table([p.cache for p in pieces]), [len(p.tokens) for p in pieces]
    if sum(counts) == len(pieces):
        return table, np.array([p.stop for p in pieces], dtype=np.int32)
    lengths = np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) + 1 for p in pieces])
    return np.repeat(table, counts, axis=0), lengths


class _PromptAttend:
    """K and V of a pass's rows go into the cache; then each piece attends causally, over its sequence so far.

    ``bounds`` and ``context`` say the same to whoever does that in a call of its own (`models/fused.py`).
    """

    def __init__(self, decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], slots: Tensor) -> None:
        self.bounds = _cumulative([len(p.tokens) for p in pieces])
        keys, held = self.bounds, None
        if any(p.start for p in pieces):
            keys = _cumulative([p.stop for p in pieces])
            held = upload(_slots(cache, [(p, 0) for p in pieces]), decoder.device)
        self.context = Context(Cells(slots, cache.k, cache.v), held, keys)
        self._cache, c = cache, decoder.config
        self._heads = c.num_heads, c.num_kv_heads, c.head_dim**-0.5

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        held, keys = self.context.held, self.context.cu_keys
        self._cache.write(layer, self.context.cells.slots, k, v)
        k, v = (k, v) if held is None else self._cache.read(layer, held)
        kernels.attention(q, k, v, self.bounds, *self._heads, cu_keys=keys, out=out)


def _sampled_attend(decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], slots: Tensor) -> Attend:
    """The rows' K and V go into the cache; then each attends alone to the blocks of its sequence, up to itself."""
    table, lengths = (upload(torch.from_numpy(t), decoder.device) for t in _context(cache, pieces))
    heads = decoder.config.num_heads, decoder.config.num_kv_heads, decoder.config.head_dim**-0.5

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        cache.write(layer, slots, k, v)
        kernels.paged_attention(q, cache.k[layer], cache.v[layer], table, lengths, *heads, out=out)

    return attend


def _slots(cache: KVCache, pieces: Sequence[tuple[Piece, int]]) -> Tensor:
    """The cells of each piece's tokens from the given position on, int64."""
    return torch.from_numpy(np.concatenate([cache.slots(p.cache, start, p.stop) for p, start in pieces]))


def _cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
