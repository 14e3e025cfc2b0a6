"""decode_step against its ops one by one, in float64 and to the bit, and against itself in other company."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from check import chained, normal, poisoned, within_budget
from check_isas import ISAS, WITH_WORDS, using
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint_engine.kernels import (
    StepAdapters,
    StepModel,
    Words,
    bordered_linear,
    decode_step,
    decode_words,
    logits,
    paged_attention,
    plan,
    qk_norm_rope,
    rms_norm,
    shrink,
    swiglu,
)
from mint_engine.kernels.bordered_linear import reference as bordered_reference

LAYERS, VOCAB, HIDDEN, FFN, N_Q, N_KV, D, RANKS, BLOCK = 2, 131, 48, 80, 4, 2, 16, 24, 4
LONG = 240  # hidden: sums of 128 are added, and what is left goes on with an adapter's columns, beyond 128 again
WHOLE = 256  # hidden: nothing is left, of tiles either
EPS, SCALE = 1e-5, D**-0.5
GROUPS = ("qkv", "o", "gate_up", "down")
ALL = 31  # groups that an adapter may train, as bits


@dataclass
class Bordered:
    buf: Tensor
    n: int
    k: int
    m: int
    bias: Tensor | None = None
    int8: tuple[Tensor, Tensor] | None = None
    words: Words | None = None

    def forward_weight(self, offset: int, rank: int) -> Tensor:
        """[W | B] of one adapter."""
        columns = slice(self.k + self.m * offset, self.k + self.m * (offset + rank))
        return torch.cat([self.buf[: self.n, : self.k], self.buf[: self.n, columns]], 1)

    def a(self, offset: int, rank: int) -> Tensor:
        return self.buf[self.n + self.m * offset : self.n + self.m * (offset + rank), : self.k]


@dataclass
class Weights:
    attention_norm: Tensor
    qkv: Bordered
    o: Bordered
    mlp_norm: Tensor
    gate_up: Bordered
    down: Bordered
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def bordered(n: int, k: int, m: int, seed: int, dtype: torch.dtype, bias: bool = False) -> Bordered:
    """The border is full of numbers: what nobody asked for must not be read."""
    buf = normal(n + m * RANKS, k + m * RANKS, seed=seed, dtype=dtype, scale=k**-0.5)
    return Bordered(buf, n, k, m, normal(n, seed=seed + 50, dtype=dtype) if bias else None)


def model(dtype: torch.dtype, *, bias: bool = False, norms: bool = False, hidden: int = HIDDEN) -> StepModel:
    def norm(n: int, seed: int) -> Tensor:
        return (1 + normal(n, seed=seed, scale=0.1)).to(dtype)

    layers = [
        Weights(
            norm(hidden, s + 1), bordered((N_Q + 2 * N_KV) * D, hidden, 3, s + 2, dtype, bias),
            bordered(hidden, N_Q * D, 1, s + 3, dtype, bias), norm(hidden, s + 4),
            bordered(2 * FFN, hidden, 2, s + 5, dtype), bordered(hidden, FFN, 1, s + 6, dtype),
            norm(D, s + 7) if norms else None, norm(D, s + 8) if norms else None,
        )
        for s in range(0, 20 * LAYERS, 20)
    ]  # fmt: skip
    head = bordered(VOCAB, hidden, 1, 99, dtype)
    return StepModel(layers, norm(hidden, 98), head, head.buf[:VOCAB, :hidden], N_Q, N_KV, EPS)


def with_words(m: StepModel) -> StepModel:
    """The same weights, kept in words too."""

    def kept(w: Bordered, parts: int = 1) -> Bordered:
        return replace(w, words=decode_words(w.buf[: w.n, : w.k], parts))

    layers = [replace(w, qkv=kept(w.qkv), o=kept(w.o), gate_up=kept(w.gate_up, 2), down=kept(w.down)) for w in m.layers]
    return StepModel(layers, m.norm, kept(m.head), m.embedding, N_Q, N_KV, EPS)


def b_words(m: StepModel, adapters: StepAdapters) -> tuple[StepAdapters, list[Words | None]]:
    """The same adapters, their B in words too; and what must live as long."""
    clear_foreign_blocks(m, adapters)
    linears = [(getattr(la, name), 2 if name == "gate_up" else 1) for la in m.layers for name in GROUPS]
    linears.append((m.head, 1))
    made = [
        decode_words(w.buf[: w.n, w.k + w.m * offset : w.k + w.m * (offset + rank)], parts)
        for _, _, offset, rank, _ in adapters.segments.tolist()
        for w, parts in linears
    ]
    addresses = [(0, 0) if w is None else (w.parts[0].data_ptr(), w.parts[-1].data_ptr()) for w in made]
    table = np.array(addresses, dtype=np.int64).reshape(len(adapters.scales), len(linears), 2)
    return replace(adapters, words=table), made


def converted(m: StepModel, dtype: torch.dtype) -> StepModel:
    def cast(value: Any) -> Any:
        if isinstance(value, Bordered):
            return replace(value, buf=value.buf.to(dtype), bias=cast(value.bias))
        return value.to(dtype) if isinstance(value, Tensor) else value

    layers = [Weights(**{name: cast(value) for name, value in vars(w).items()}) for w in m.layers]
    return StepModel(layers, cast(m.norm), cast(m.head), cast(m.embedding), N_Q, N_KV, EPS)


def in_int8(m: StepModel, hidden: int) -> StepModel:
    """Its weights rounded to int8; of the borders as they are."""
    for w in [getattr(la, name) for la in m.layers for name in GROUPS] + [m.head]:
        scales = w.buf[: w.n, : w.k].float().abs().amax(1) / 127
        values = (w.buf[: w.n, : w.k].float() / scales[:, None]).round().to(torch.int8)
        w.int8 = values, scales
        w.buf[: w.n, : w.k] = float("nan")  # nobody reads it
    embedding = normal(VOCAB, hidden, seed=4, dtype=m.norm.dtype)
    return StepModel(m.layers, m.norm, m.head, embedding, N_Q, N_KV, EPS)


def batch(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of different lengths in scattered blocks; every cell that is not theirs is NaN."""
    lengths = torch.tensor([1 + 3 * i % 9 for i in range(rows)], dtype=torch.int32)
    table = torch.full((rows, 3), -1, dtype=torch.int32)
    width = N_KV * D
    k_pool, v_pool = (torch.full((LAYERS, 3 * rows + 1, BLOCK, width), float("nan"), dtype=dtype) for _ in range(2))
    for i, n in enumerate(lengths.tolist()):
        blocks = [3 * rows - 3 * i - j for j in range(-(-n // BLOCK))]
        table[i, : len(blocks)] = torch.tensor(blocks)
        cells = [blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(n)]
        for seed, pool in ((i, k_pool), (i + 99, v_pool)):
            pool.view(LAYERS, -1, width)[:, cells[:-1]] = normal(LAYERS, n - 1, width, seed=seed, dtype=dtype)
    angles = normal(12, D // 2, seed=3)  # of positions: more than are used
    return {
        "tokens": torch.arange(rows) * 7 % VOCAB, "cos": angles.cos(), "sin": angles.sin(), "k_pool": k_pool,
        "v_pool": v_pool, "block_table": table, "lengths": lengths,
        "wanted": torch.arange(rows),
    }  # fmt: skip


def clear_foreign_blocks(m: StepModel, adapters: StepAdapters) -> None:
    """An adapter's B is block diagonal: rows of q have zeros in the columns of k and v."""
    for _, _, offset, rank, _ in adapters.segments.tolist():
        for layer in m.layers:
            for w, sizes in ((layer.qkv, (N_Q * D, N_KV * D, N_KV * D)), (layer.gate_up, (FFN, FFN))):
                row = 0
                for i, n in enumerate(sizes):
                    columns = w.buf[row : row + n, w.k + w.m * offset : w.k + w.m * (offset + rank)]
                    columns[:, : i * rank] = 0
                    columns[:, (i + 1) * rank :] = 0
                    row += n


OF_ROWS = ("tokens", "block_table", "lengths")


def own_cells(b: dict[str, Tensor]) -> Tensor:
    """The cell of each row's own token, of the pools' [n_blocks * block]."""
    positions = b["lengths"].long() - 1
    return b["block_table"][torch.arange(len(positions)), positions // BLOCK].long() * BLOCK + positions % BLOCK


def run(m: StepModel, b: dict[str, Any], adapters: StepAdapters | None = None, face: str | None = None) -> Any:
    b = {name: t.clone() if name.endswith("pool") else t for name, t in b.items()}
    if adapters is not None:
        clear_foreign_blocks(m, adapters)
    return decode_step(m, **b, scale=SCALE, adapters=adapters, face=face), b["k_pool"], b["v_pool"]


def seated(*segments: tuple[int, int, int, int, int]) -> StepAdapters:
    scales = torch.tensor([2.0, 0.5, 1.5, 1.0, 0.75][: len(segments)])
    return StepAdapters(torch.tensor(segments, dtype=torch.int64).reshape(-1, 5), scales, RANKS)


# rows 0 and 1: rank 2, everything; row 2: the base; rows 3 and 4: rank 4, attention only
MIXED = seated((0, 2, 0, 2, ALL), (3, 5, 2, 4, 3))
EIGHTS = seated((0, 2, 0, 8, ALL), (3, 5, 8, 8, 3))
ODD = seated((0, 1, 0, 3, ALL), (1, 5, 3, 6, 21))


@contextmanager
def chained_products() -> Iterator[None]:
    """The reference's linears sum as a plain loop does: another order, as right as the library's."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        y = chained(x, weight)
        return torch.add(y, bias, out=out) if bias is not None else out.copy_(y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bordered_reference, "bordered_linear", linear)
        yield


@pytest.mark.parametrize(
    ("adapters", "rows"), [(None, 5), (MIXED, 5), (EIGHTS, 5), (EIGHTS, 20)],
    ids=["base", "ranks 2 and 4", "ranks of 8", "ranks of 8 among many rows"],
)  # fmt: skip
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"norms": True}, {"hidden": 64}, {"hidden": LONG}])
def test_a_step_matches_float64(
    face: str, dtype: torch.dtype, extras: dict, adapters: StepAdapters | None, rows: int
) -> None:
    m, b = model(dtype, **extras), batch(rows, dtype)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in b.items()}
    got, exact = run(m, b, adapters, face), run(converted(m, torch.float64), wide, adapters, "reference")
    # Two layers let few numbers grow by chance: either order of summation is plain torch's error.
    plain = [run(m, b, adapters, "reference")]
    with chained_products():
        plain.append(run(m, b, adapters, "reference"))
    within_budget("logits", got[0], exact[0], *(p[0] for p in plain))
    cells = own_cells(b)
    for i, name in enumerate(("k", "v"), start=1):
        g, e, *p, before = (
            t.view(LAYERS, -1, N_KV * D) for t in (got[i], exact[i], *(p[i] for p in plain), b[name + "_pool"])
        )
        within_budget(name, g[:, cells], e[:, cells], *(t[:, cells] for t in p))
        others = torch.ones(g.shape[1], dtype=torch.bool)
        others[cells] = False
        assert torch.equal(g[:, others].nan_to_num(7.0), before[:, others].nan_to_num(7.0)), "nothing else"


def one_by_one(m: StepModel, b: dict[str, Tensor], rank: int, scale: float) -> Tensor:
    """The step in the ops of a training pass, with one adapter first in the border, or none."""

    def linear(w: Bordered, x: Tensor) -> tuple[Tensor, Tensor]:
        tail = poisoned(len(x), w.m * rank, x.dtype)
        if rank:
            shrink(x, w.a(0, rank), scale, out=tail, face="cpu")
        return torch.cat([x, tail], 1), w.forward_weight(0, rank)

    def product(w: Bordered, x: Tensor) -> Tensor:
        return bordered_linear(*linear(w, x), bias=w.bias, face="cpu")

    x, h, rows, cells = m.embedding[b["tokens"]], None, len(b["tokens"]), own_cells(b)
    cos, sin = (b[name][b["lengths"].long() - 1] for name in ("cos", "sin"))
    for i, w in enumerate(m.layers):
        x1, h1 = rms_norm(x, w.attention_norm, EPS, residual=h, face="cpu")
        qkv = product(w.qkv, x1)
        qk = qk_norm_rope(qkv, cos, sin, N_Q, N_KV, q_weight=w.q_norm, k_weight=w.k_norm, eps=EPS, face="cpu")
        k_pool, v_pool = b["k_pool"][i].clone(), b["v_pool"][i].clone()
        k_pool.view(-1, N_KV * D)[cells] = qk[:, N_Q * D :]
        v_pool.view(-1, N_KV * D)[cells] = qkv[:, qk.shape[1] :]
        o = torch.empty(rows, N_Q * D, dtype=x.dtype)
        table, lengths = b["block_table"], b["lengths"]
        paged_attention(qk[:, : N_Q * D], k_pool, v_pool, table, lengths, N_Q, N_KV, SCALE, out=o, face="cpu")
        x2, h = rms_norm(product(w.o, o), w.mlp_norm, EPS, residual=h1, face="cpu")
        x = product(w.down, swiglu(product(w.gate_up, x2), face="cpu"))
    assert h is not None
    return logits(*linear(m.head, rms_norm(h + x, m.norm, EPS, face="cpu")[0]), face="cpu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 8, 19, 70])
@pytest.mark.parametrize(("rank", "hidden"), [(0, HIDDEN), (2, HIDDEN), (5, HIDDEN), (8, HIDDEN), (0, LONG), (8, LONG)])
def test_a_step_has_the_bits_of_a_training_pass(
    dtype: torch.dtype, isa: str, rows: int, rank: int, hidden: int
) -> None:
    m, b = model(dtype, norms=True, bias=True, hidden=hidden), batch(rows, dtype)
    with using(isa), plan.own_products():
        got = run(m, b, seated((0, rows, 0, rank, ALL)) if rank else None, "cpu")[0]
        assert torch.equal(got, one_by_one(m, b, rank, 2.0))


# A row's adapter: none, or one of three, at this place in the border with this rank.
SEATS = {1: (5, 1), 2: (0, 2), 3: (2, 3)}, {1: (16, 8), 2: (0, 8), 3: (8, 8)}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whose=st.one_of(st.lists(st.integers(0, 3), min_size=2, max_size=most) for most in (9, 90)),
    seats=st.sampled_from(SEATS),
    hidden=st.sampled_from([HIDDEN, LONG, WHOLE]), threads=st.integers(1, 3), at=st.integers(0, 89),
    int8=st.booleans(),
)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_in_company(
    dtype: torch.dtype, whose: list, seats: dict, hidden: int, threads: int, at: int, int8: bool
) -> None:
    rows, whose = len(whose), sorted(whose)
    at %= rows
    m, b = model(dtype, hidden=hidden), batch(rows, dtype)
    if int8:
        m = in_int8(m, hidden)
    segments = [
        (whose.index(a), whose.index(a) + whose.count(a), *seats[a], ALL if a < 3 else 5)
        for a in (1, 2, 3)
        if a in whose
    ]
    for isa in ISAS:
        with using(isa, threads):
            together = run(m, b, seated(*segments), "cpu")[0]
        own = {name: b[name][at : at + 1] if name in OF_ROWS else b[name] for name in b}
        adapters = seated(*((0, 1, *s[2:]) for s in segments if s[0] <= at < s[1]))
        scale = torch.tensor([seated(*segments).scales[i] for i, s in enumerate(segments) if s[0] <= at < s[1]])
        adapters = replace(adapters, scales=scale)
        with using(isa, 1):
            alone = run(m, {**own, "wanted": torch.zeros(1, dtype=torch.int64)}, adapters, "cpu")[0]
        assert torch.equal(together[at], alone[0]), isa


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("hidden", [HIDDEN, LONG, WHOLE])
@pytest.mark.parametrize("seats", [None, MIXED, EIGHTS, ODD], ids=["base", "ranks 2 and 4", "ranks of 8", "odd ranks"])
def test_kept_words_change_no_bit(seats: StepAdapters | None, hidden: int, rows: int) -> None:
    if seats is not None and rows < 5:
        seats = seated((0, 1, 2, 8, ALL))
    m, b = model(torch.bfloat16, hidden=hidden, bias=True, norms=True), batch(rows, torch.bfloat16)
    for isa in ISAS:
        with using(isa, 2):
            kept = with_words(m)
            assert (kept.word_columns > 0) == (isa in WITH_WORDS)
            expected = [t.nan_to_num(7.0) for t in run(m, b, seats, "cpu")]
            with_b, _alive = (seats, None) if seats is None else b_words(m, seats)
            for given in (seats, with_b):
                for got, wanted in zip(run(kept, b, given, "cpu"), expected, strict=True):
                    assert torch.equal(got.nan_to_num(7.0), wanted), isa


def test_words_of_other_panels_are_left_alone() -> None:
    """Of an instruction set whose panels are as wide as none here, say: the weights themselves are read."""
    m, b = model(torch.bfloat16), batch(3, torch.bfloat16)
    for w in [m.head, *(getattr(la, name) for la in m.layers for name in ("qkv", "o", "gate_up", "down"))]:
        w.words = Words(7, (torch.zeros(1, dtype=torch.int32),))
    other = StepModel(m.layers, m.norm, m.head, m.embedding, N_Q, N_KV, EPS)
    assert torch.equal(run(other, b, face="cpu")[0], run(model(torch.bfloat16), b, face="cpu")[0])


@pytest.mark.parametrize("isa", ISAS)
def test_words_are_the_weight_in_another_order(isa: str) -> None:
    n, k = 61, 44
    weight = normal(n, k, seed=1, dtype=torch.bfloat16)
    with using(isa):
        words = decode_words(weight)
        assert (words is None) == (isa not in WITH_WORDS)
        if words is None:
            return
        # A pair of each row of a panel, then the next of each; in tiles whole steps of 16.
        pairs = words.parts[0].numel() // (-(-n // words.columns) * words.columns)
        assert pairs == (-(-k // 32) * 16 if isa == "amx" else k // 2)
        panels = words.parts[0].view(torch.bfloat16).view(-1, pairs, words.columns, 2)
        rows = panels.permute(0, 2, 1, 3).reshape(-1, 2 * pairs)
        assert torch.equal(rows[:n, :k], weight)
        assert not rows[n:].any()
        assert not rows[:, k:].any()
        assert decode_words(weight.float()) is None
        assert decode_words(normal(4, 7, seed=1, dtype=torch.bfloat16)) is None
        with pytest.raises(ValueError, match=r"parts: expected a divisor of 61 rows, got 2 \(decode_words\)"):
            decode_words(weight, 2)


def test_values_next_to_nothing_have_the_same_bits_alone_and_in_company() -> None:
    """Tiles take subnormal values for zero: what computes one row without them has to, too."""
    m, b = in_int8(model(torch.bfloat16, hidden=WHOLE), WHOLE), batch(20, torch.bfloat16)
    for layer in m.layers:
        layer.attention_norm *= 1e-38
        layer.qkv.int8[1].mul_(1e36)  # where they lie: the model has their addresses
    own = {name: b[name][3:4] if name in OF_ROWS else b[name] for name in b}
    for isa in ISAS:
        with using(isa, 1):
            together = run(m, b, None, "cpu")[0]
            alone = run(m, {**own, "wanted": torch.zeros(1, dtype=torch.int64)}, None, "cpu")[0]
        assert torch.equal(together[3], alone[0]), isa


ONE = seated((0, 1, 2, 8, ALL))


@pytest.mark.parametrize(
    ("rows", "seats"), [(2, ONE), (5, MIXED), (5, EIGHTS), (20, EIGHTS)],
    ids=["rank 8 of two rows", "ranks 2 and 4", "ranks of 8", "ranks of 8 among many rows"],
)  # fmt: skip
@pytest.mark.parametrize("hidden", [HIDDEN, WHOLE, LONG])
def test_int8_weights_are_their_values_times_their_scales(
    face: str, dtype: torch.dtype, hidden: int, rows: int, seats: StepAdapters
) -> None:
    m, b = in_int8(model(dtype, hidden=hidden), hidden), batch(rows, dtype)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in b.items()}
    exact = run(converted(m, torch.float64), wide, seats, "reference")[0]
    within_budget("logits", run(m, b, seats, face)[0], exact, run(m, b, seats, "reference")[0])


def test_only_what_is_wanted_reaches_the_head(face: str, dtype: torch.dtype) -> None:
    m, b = model(dtype), batch(5, dtype)
    everything = run(m, b, MIXED, face)[0]
    for wanted in ([], [4], [1, 2, 3]):
        got = run(m, {**b, "wanted": torch.tensor(wanted, dtype=torch.int64)}, MIXED, face)[0]
        assert torch.equal(got, everything[wanted]) or face == "reference"
        torch.testing.assert_close(got, everything[wanted])


def with_gaps(t: Tensor) -> Tensor:
    """The same values, neighbours two elements apart: a column of something larger."""
    wide = torch.stack([t, torch.ones_like(t)], -1)
    return wide[..., 0]


@pytest.mark.parametrize("name", ["tokens", "block_table", "lengths", "wanted"])
def test_what_comes_with_every_step_may_have_gaps(face: str, name: str) -> None:
    m, b = model(torch.float32), batch(5, torch.float32)
    assert torch.equal(run(m, {**b, name: with_gaps(b[name])}, MIXED, face)[0], run(m, b, MIXED, face)[0])


def test_memory_with_gaps_is_not_read_as_if_it_had_none() -> None:
    m, b = model(torch.float32, bias=True, norms=True), batch(2, torch.float32)
    for name in ("cos", "sin"):
        with pytest.raises(ValueError, match="decode_step cannot run on 'cpu': last dimension has stride 2, not 1"):
            run(m, {**b, name: with_gaps(b[name])}, face="cpu")
    first = m.layers[0]
    for changed, what in (
        (replace(first, attention_norm=with_gaps(first.attention_norm)), "attention_norm"),
        (replace(first, k_norm=with_gaps(first.k_norm)), "k_norm"),
        (replace(first, qkv=replace(first.qkv, bias=with_gaps(first.qkv.bias))), "qkv: bias"),
    ):
        with pytest.raises(ValueError, match=f"layer 0: {what}: expected rows without gaps, got strides"):
            StepModel([changed, *m.layers[1:]], m.norm, m.head, m.embedding, N_Q, N_KV, EPS)
    with pytest.raises(ValueError, match=r"layer 0: o: bias: expected torch.float32 \[48\], got torch.float32 \[47\]"):
        StepModel(
            [replace(first, o=replace(first.o, bias=first.o.bias[:47])), *m.layers[1:]], m.norm, m.head, m.embedding,
            N_Q, N_KV, EPS,
        )  # fmt: skip
    with pytest.raises(ValueError, match="embedding: expected rows without gaps, got strides"):
        StepModel(m.layers, m.norm, m.head, with_gaps(m.embedding), N_Q, N_KV, EPS)


def test_no_row_is_wanted_twice() -> None:
    """There is room for the rows that there are."""
    with pytest.raises(ValueError, match=r"wanted: expected 2 or more, got 1 \(decode_step\)"):
        run(model(torch.float32), {**batch(3, torch.float32), "wanted": torch.tensor([1, 1])}, face="cpu")


def test_arguments_that_do_not_fit_are_named() -> None:
    m, b = model(torch.float32), batch(2, torch.float32)
    with pytest.raises(ValueError, match=r"tokens: expected torch.int64 \[2\], got torch.int32 \[2\] \(decode_step\)"):
        run(m, {**b, "tokens": b["tokens"].int()})
    with pytest.raises(ValueError, match=r"k_pool: expected \[layers, n_blocks, block, 32\], contiguous"):
        run(m, {**b, "k_pool": b["k_pool"].transpose(1, 2)})
    with pytest.raises(ValueError, match=r"adapters: expected at most the border's 24 ranks, got 25 \(decode_step\)"):
        run(m, b, StepAdapters(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0), 25))
    words = replace(MIXED, words=np.zeros((2, 8, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"adapters: expected words int64 \[2, 9, 2\], got int64 \[2, 8, 2\]"):
        run(model(torch.float32), batch(5, torch.float32), words)
    with pytest.raises(ValueError, match=r"lengths: expected 1 or more, got 0"):
        run(m, {**b, "lengths": torch.tensor([4, 0], dtype=torch.int32)}, face="cpu")
    with pytest.raises(ValueError, match=r"positions of cos and sin: expected 4 or more, got 3"):
        run(m, {**b, "cos": b["cos"][:3], "sin": b["sin"][:3]}, face="cpu")
    with pytest.raises(ValueError, match=r"rows: expected 3 or more, got 2"):
        run(m, {**b, "wanted": torch.tensor([2])}, face="cpu")
    m.layers[1].o.n = 7
    with pytest.raises(
        ValueError, match=r"layer 1: o: expected torch.float32 of 1 modules of \[48, 64\], got 1 of \[7"
    ):
        StepModel(m.layers, m.norm, m.head, m.embedding, N_Q, N_KV, EPS)
