"""Sampling in Triton: a program goes through one row of logits as often as its filters need; nothing is sorted.

Logits become y = (z - max) / temperature <= 0 and e = exp(y), anew in every pass: a row stays in L2. Their order is
by y, then by token. The bits of |y| are ordered as |y| is, so a filter's edge is found four bits at a time from the
top: a pass sums the entries (or their e) under each of the next four bits' 16 values. Of the entries on the edge, whose
e are all the same, the first few by token stay. The draw is the inverse of the cumulative sum in token order. Sums of
tiles are joined in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.gpu_plan import Tunable
from mint_engine.kernels.triton_common import architecture, power_of_2, triton_reason

ROW = Tunable(
    "sample_rows.row",
    {"TILE": (1024, 2048, 4096, 8192), "SEARCH": (256, 512, 1024), "warps": (4, 8, 16), "stages": (1, 2)},
)
TOP = Tunable("sample_rows.top", {"TILE": (1024, 2048, 4096, 8192), "warps": (4, 8, 16), "stages": (1, 2)})
NEVER = tl.constexpr(0x7FFFFFFF)  # above every key and every token


def supports(logits: Tensor) -> str | None:
    """Why this face cannot run on these logits, or None."""
    return triton_reason(logits)


@triton.jit
def _maximum(z, vocab, TILE: tl.constexpr):
    step = tl.arange(0, TILE)
    high = tl.full((TILE,), float("-inf"), tl.float32)
    for at in range(0, vocab, TILE):
        high = tl.maximum(high, tl.load(z + at + step, mask=at + step < vocab, other=float("-inf")))
    return tl.max(high, 0)


@triton.jit
def _entries(z, v, vocab, high, divisor):
    """y, e and the bits of |y|; past the vocabulary -inf, 0 and those of infinity."""
    y = tl.div_rn(tl.load(z + v, mask=v < vocab, other=float("-inf")) - high, divisor)
    return y, tl.exp(y), y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divisor_of(temperature):
    """A normal number, so that the quotient may be -inf, never NaN."""
    return tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, 1e-30))


@triton.jit
def _mass(z, vocab, high, divisor, TILE: tl.constexpr):
    """The sum of e, NaN where the row is no distribution, and the first of the likeliest tokens."""
    step = tl.arange(0, TILE)
    total = tl.full((), 0.0, tl.float64)
    first = tl.full((TILE,), NEVER, tl.int32)
    for at in range(0, vocab, TILE):
        y, e, _key = _entries(z, at + step, vocab, high, divisor)
        total += tl.sum(e.to(tl.float64), 0)
        first = tl.minimum(first, tl.where((y == 0.0) & (at + step < vocab), at + step, NEVER))
    return total, tl.min(first, 0)


@triton.jit
def _edge(z, vocab, high, divisor, target, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The smallest key up to which there are ``target`` entries (or as much mass), and how much lies before it."""
    step, digits = tl.arange(0, TILE), tl.arange(0, 16)
    prefix = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    for level in range(8):
        shift = 28 - 4 * level
        sums = tl.zeros((16,), tl.float64)
        for at in range(0, vocab, TILE):
            _y, e, key = _entries(z, at + step, vocab, high, divisor)
            value = e if BY_MASS else (at + step < vocab).to(tl.float32)
            value = tl.where(((key >> shift) >> 4) == prefix, value, 0.0)
            hit = ((key >> shift) & 15)[:, None] == digits[None, :]
            sums += tl.sum(tl.where(hit, value[:, None], 0.0), 0).to(tl.float64)
        reached = tl.min(tl.where(before + tl.cumsum(sums, 0) >= target, digits, 15), 0)
        # Rounding may leave the target unreached: then the last that there are.
        digit = tl.minimum(reached, tl.max(tl.where(sums > 0.0, digits, 0), 0))
        before += tl.sum(tl.where(digits < digit, sums, 0.0), 0)
        prefix = prefix * 16 + digit
    return prefix, before


@triton.jit
def _kept(e, key, v, vocab, edge, ties, seen):
    """e where the filters keep it, else 0: keys before the edge and the first ``ties`` on it. And those seen so far."""
    tied = ((key == edge) & (v < vocab)).to(tl.int32)
    rank = seen + tl.cumsum(tied, 0) - tied
    return tl.where((key < edge) | ((tied > 0) & (rank < ties)), e, 0.0), seen + tl.sum(tied, 0)


@triton.jit
def _kept_mass(z, vocab, high, divisor, edge, ties, TILE: tl.constexpr):
    step = tl.arange(0, TILE)
    total = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int32)
    for at in range(0, vocab, TILE):
        _y, e, key = _entries(z, at + step, vocab, high, divisor)
        e, seen = _kept(e, key, at + step, vocab, edge, ties, seen)
        total += tl.sum(e.to(tl.float64), 0)
    return total


@triton.jit
def _draw(z, vocab, high, divisor, edge, ties, target, TILE: tl.constexpr):
    """The first token whose cumulative mass is above ``target``; rounding may leave none: then the last of any mass."""
    step = tl.arange(0, TILE)
    running = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int32)
    # Of the tile with the token, or until it is found of the last tile of any mass.
    start, start_seen, start_sum, found = seen, seen, running, seen
    for at in range(0, vocab, TILE):
        _y, e, key = _entries(z, at + step, vocab, high, divisor)
        e, now = _kept(e, key, at + step, vocab, edge, ties, seen)
        mass = tl.sum(e.to(tl.float64), 0)
        takes = (found == 0) & (mass > 0.0)
        start, start_seen = tl.where(takes, at, start), tl.where(takes, seen, start_seen)
        start_sum = tl.where(takes, running, start_sum)
        running += mass
        seen = now
        found = tl.where(running > target, 1, found)
    v = start + step
    _y, e, key = _entries(z, v, vocab, high, divisor)
    e, now = _kept(e, key, v, vocab, edge, ties, start_seen)
    above = (start_sum + tl.cumsum(e.to(tl.float64), 0) > target) & (e > 0.0)
    token = tl.min(tl.where(above, v, NEVER), 0)
    return tl.where(token == NEVER, tl.max(tl.where(e > 0.0, v, 0), 0), token)


@triton.jit
def _sample(
    logits, stride, temperatures, top_k, top_p, uniforms, tokens, logprobs, vocab,
    TILE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    temperature = tl.load(temperatures + row)
    divisor, high = divisor_of(temperature), _maximum(z, vocab, TILE)
    total, token = _mass(z, vocab, high, divisor, TILE)
    valid = total == total
    log_sum = tl.log(total)
    if valid & (temperature != 0.0):
        k, share = tl.load(top_k + row), tl.load(top_p + row)
        edge = tl.full((), NEVER, tl.int32)
        ties = tl.full((), 0, tl.int64)
        if (k >= 1) & (k < vocab):
            edge, before = _edge(z, vocab, high, divisor, k.to(tl.float64), False, SEARCH)
            ties = k - before.to(tl.int64)
            total = _kept_mass(z, vocab, high, divisor, edge, ties, TILE)
        if share < 1.0:
            target = share * total
            last, before = _edge(z, vocab, high, divisor, target, True, SEARCH)
            own = tl.exp(-last.to(tl.float32, bitcast=True)).to(tl.float64)
            count = ((target - before) / own).to(tl.int64)
            count = tl.maximum(tl.where(before + count * own < target, count + 1, count), 1)
            ties = tl.where(last < edge, count, tl.minimum(count, ties))
            edge = tl.minimum(edge, last)
            total = _kept_mass(z, vocab, high, divisor, edge, ties, TILE)
        token = _draw(z, vocab, high, divisor, edge, ties, tl.load(uniforms + row) * total, TILE)
    token = tl.where(valid, token, 0)
    y = tl.div_rn(tl.load(z + token) - high, divisor)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.where(valid, y.to(tl.float64) - log_sum, float("nan")).to(tl.float32))


@triton.jit
def _top(logits, stride, temperatures, tokens, logprobs, k, vocab, TILE: tl.constexpr):
    """One after the other: the next is the first beyond the last, by (key, token)."""
    row, step = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    z = logits + row * stride
    divisor, high = divisor_of(tl.load(temperatures + row)), _maximum(z, vocab, TILE)
    total, _likeliest = _mass(z, vocab, high, divisor, TILE)
    valid = total == total
    log_sum = tl.log(total)
    last = tl.full((), -1, tl.int64)
    for i in range(k):
        best = tl.full((TILE,), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for at in range(0, vocab, TILE):
            v = at + step
            y, _e, key = _entries(z, v, vocab, high, divisor)
            place = (key.to(tl.int64) << 32) | v
            best = tl.minimum(best, tl.where((place > last) & (v < vocab), place, 0x7FFFFFFFFFFFFFFF))
        last = tl.min(best, 0)
        token = tl.where(valid, last & 0xFFFFFFFF, 0)
        y = tl.div_rn(tl.load(z + token) - high, divisor)
        tl.store(tokens + row * k + i, token)
        tl.store(logprobs + row * k + i, tl.where(valid, y.to(tl.float64) - log_sum, float("nan")).to(tl.float32))


def _fit(meta: dict[str, int], vocab: int) -> dict[str, int]:
    return {name: min(value, power_of_2(vocab, 16)) if name.isupper() else value for name, value in meta.items()}


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    temperature, top_k, top_p, uniforms = (t.contiguous() for t in (temperature, top_k, top_p, uniforms))
    if rows:
        _sample[(rows,)](
            logits, logits.stride(0), temperature, top_k, top_p, uniforms, tokens, logprobs, vocab,
            **_fit(ROW.meta(architecture()), vocab),
        )  # fmt: skip
    return tokens, logprobs


def top_logprobs(logits: Tensor, temperature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    if rows:
        _top[(rows,)](
            logits, logits.stride(0), temperature.contiguous(), tokens, logprobs, k, vocab,
            **_fit(TOP.meta(architecture()), vocab),
        )  # fmt: skip
    return tokens, logprobs
