"""decode_layer against its steps, one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from check import normal, poisoned, within_budget
from torch import Tensor

from mint_engine.kernels import (
    LayerAdapters,
    bordered_linear,
    decode_layer,
    decode_layer_supported,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    swiglu,
)

HIDDEN, FFN, N_Q, N_KV, D, RANKS, BLOCK = 48, 80, 4, 2, 16, 6, 4
EPS, SCALE = 1e-5, D**-0.5


@dataclass
class Bordered:
    buf: Tensor
    n: int
    k: int
    m: int
    bias: Tensor | None = None


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


def weights(dtype: torch.dtype, *, bias: bool = False, norms: bool = False) -> Weights:
    """Borders are full of numbers: what nobody asked for must not be read."""

    def linear(n: int, k: int, m: int, seed: int) -> Bordered:
        buf = normal(n + m * RANKS, k + m * RANKS, seed=seed, dtype=dtype, scale=k**-0.5)
        return Bordered(
            buf, n, k, m, normal(n, seed=seed + 50, dtype=dtype) if bias and m in (1, 3) and k != FFN else None
        )

    def norm(n: int, seed: int) -> Tensor:
        return (1 + normal(n, seed=seed, scale=0.1)).to(dtype)

    return Weights(
        norm(HIDDEN, 1), linear((N_Q + 2 * N_KV) * D, HIDDEN, 3, 2), linear(HIDDEN, N_Q * D, 1, 3), norm(HIDDEN, 4),
        linear(2 * FFN, HIDDEN, 2, 5), linear(HIDDEN, FFN, 1, 6),
        norm(D, 7) if norms else None, norm(D, 8) if norms else None,
    )  # fmt: skip


def converted(w: Weights, dtype: torch.dtype) -> Weights:
    def cast(value: Any) -> Any:
        if isinstance(value, Bordered):
            return replace(value, buf=value.buf.to(dtype), bias=cast(value.bias))
        return value.to(dtype) if isinstance(value, Tensor) else value

    return Weights(**{name: cast(value) for name, value in vars(w).items()})


def batch(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of different lengths in scattered blocks; every cell that is not theirs is NaN."""
    lengths = torch.tensor([1 + 3 * i % 9 for i in range(rows)], dtype=torch.int32)
    table = torch.full((rows, 3), -1, dtype=torch.int32)
    width = N_KV * D
    k_pool, v_pool = (torch.full((3 * rows + 1, BLOCK, width), float("nan"), dtype=dtype) for _ in range(2))
    slots = []
    for i, n in enumerate(lengths.tolist()):
        blocks = [3 * rows - 3 * i - j for j in range(-(-n // BLOCK))]
        table[i, : len(blocks)] = torch.tensor(blocks)
        cells = [blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(n)]
        for seed, pool in ((i, k_pool), (i + 99, v_pool)):
            pool.view(-1, width)[cells[:-1]] = normal(n - 1, width, seed=seed, dtype=dtype)
        slots.append(cells[-1])
    angles = normal(rows, D // 2, seed=3)
    return {
        "x": normal(rows, HIDDEN, seed=11, dtype=dtype), "residual": normal(rows, HIDDEN, seed=12, dtype=dtype),
        "cos": angles.cos(), "sin": angles.sin(), "k_pool": k_pool, "v_pool": v_pool, "slots": torch.tensor(slots),
        "block_table": table, "lengths": lengths,
    }  # fmt: skip


def run(w: Weights, b: dict[str, Any], *, adapters: LayerAdapters | None = None, face: str | None = None) -> Any:
    b = {name: t.clone() if name.endswith("pool") else t for name, t in b.items()}
    out, h = decode_layer(w, **b, n_q=N_Q, n_kv=N_KV, eps=EPS, scale=SCALE, adapters=adapters, face=face)
    return out, h, b["k_pool"], b["v_pool"]


def exactly(w: Weights, b: dict[str, Tensor], adapters: LayerAdapters | None = None) -> Any:
    """The reference in float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in b.items()}
    return run(converted(w, torch.float64), wide, adapters=adapters, face="reference")


MIXED = LayerAdapters(  # rows 0 and 1: rank 2, everything; row 2: the base; rows 3 and 4: rank 4, attention only
    torch.tensor([[0, 2, 0, 2, 15], [3, 5, 2, 4, 3]]), torch.tensor([2.0, 0.5]), RANKS
)


@pytest.mark.parametrize("adapters", [None, MIXED], ids=["base", "adapters"])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"norms": True}], ids=["plain", "bias", "norms"])
def test_a_layer_matches_float64(face: str, dtype: torch.dtype, extras: dict, adapters: LayerAdapters | None) -> None:
    w, b = weights(dtype, **extras), batch(5, dtype)
    got, exact = run(w, b, adapters=adapters, face=face), exactly(w, b, adapters)
    plain = run(w, b, adapters=adapters, face="reference")
    for name, g, e, p in zip(("out", "h"), got, exact, plain, strict=False):
        within_budget(name, g, e, p)
    cells = b["slots"]
    for name, g, e, p, before in zip(
        ("k", "v"), got[2:], exact[2:], plain[2:], (b["k_pool"], b["v_pool"]), strict=True
    ):
        flat = [t.view(-1, N_KV * D) for t in (g, e, p, before)]
        within_budget(name, *(t[cells] for t in flat[:3]))
        others = torch.ones(len(flat[0]), dtype=torch.bool)
        others[cells] = False
        assert torch.equal(flat[0][others].nan_to_num(7.0), flat[3][others].nan_to_num(7.0)), "nothing else is written"


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_layer_has_the_bits_of_its_steps(dtype: torch.dtype, rows: int) -> None:
    w, b = weights(dtype, norms=True, bias=True), batch(rows, dtype)

    def linear(weight: Bordered, x: Tensor) -> Tensor:
        return bordered_linear(x, weight.buf[: weight.n, : weight.k], bias=weight.bias, face="cpu")

    x1, h1 = rms_norm(b["x"], w.attention_norm, EPS, residual=b["residual"], face="cpu")
    qkv = linear(w.qkv, x1)
    qk = qk_norm_rope(qkv, b["cos"], b["sin"], N_Q, N_KV, q_weight=w.q_norm, k_weight=w.k_norm, eps=EPS, face="cpu")
    k_pool, v_pool = b["k_pool"].clone(), b["v_pool"].clone()
    k_pool.view(-1, N_KV * D)[b["slots"]] = qk[:, N_Q * D :]
    v_pool.view(-1, N_KV * D)[b["slots"]] = qkv[:, qk.shape[1] :]
    o = poisoned(rows, N_Q * D, dtype)
    paged_attention(
        qk[:, : N_Q * D], k_pool, v_pool, b["block_table"], b["lengths"], N_Q, N_KV, SCALE, out=o, face="cpu"
    )
    x2, h = rms_norm(linear(w.o, o.contiguous()), w.mlp_norm, EPS, residual=h1, face="cpu")
    out = linear(w.down, swiglu(linear(w.gate_up, x2), face="cpu"))
    got = run(w, b, face="cpu")
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], h)
    assert torch.equal(got[2].nan_to_num(7.0), k_pool.nan_to_num(7.0))
    assert torch.equal(got[3].nan_to_num(7.0), v_pool.nan_to_num(7.0))


def test_many_rows_match_float64(face: str) -> None:
    """More rows than share one pass over a weight, two adapters of them beyond the first eight."""
    dtype = torch.bfloat16
    w, b = weights(dtype), batch(21, dtype)
    adapters = LayerAdapters(torch.tensor([[2, 13, 0, 4, 15], [13, 21, 4, 2, 15]]), torch.tensor([1.5, 0.5]), RANKS)
    got, exact = run(w, b, adapters=adapters, face=face), exactly(w, b, adapters)
    plain = run(w, b, adapters=adapters, face="reference")
    for name, g, e, p in zip(("out", "h"), got, exact, plain, strict=False):
        within_budget(name, g, e, p)


def test_the_first_layer_begins_the_stream(face: str, dtype: torch.dtype) -> None:
    w, b = weights(dtype), batch(3, dtype)
    alone = run(w, {**b, "residual": None}, face=face)
    added = run(w, {**b, "residual": torch.zeros_like(b["x"])}, face=face)
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(alone, added, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    w, b = weights(dtype), batch(8, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(w, b, adapters=MIXED, face="cpu")[:2])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_arguments_that_do_not_fit_are_named() -> None:
    w, b = weights(torch.float32), batch(2, torch.float32)
    with pytest.raises(ValueError, match=r"slots: expected torch.int64 \[2\], got torch.int64 \[1\] \(decode_layer\)"):
        run(w, {**b, "slots": b["slots"][:1]})
    with pytest.raises(ValueError, match=r"k_pool: expected \[n_blocks, block, 32\], contiguous"):
        run(w, {**b, "k_pool": b["k_pool"].transpose(0, 1)})
    with pytest.raises(ValueError, match=r"qkv: expected 3 modules of \[128, 48\] with 27 of border, got 3 of"):
        run(w, b, adapters=LayerAdapters(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0), 9))
    with pytest.raises(ValueError, match=r"cells in the pool: expected 1001 or more, got 28"):
        run(w, {**b, "slots": torch.tensor([1000, 0])}, face="cpu")
    with pytest.raises(ValueError, match=r"decode_layer cannot run on 'cpu': 9 rows \(at most 8\)"):
        run(w, batch(9, torch.float32), face="cpu")
    assert not decode_layer_supported(torch.zeros(9, HIDDEN))
    assert decode_layer_supported(torch.zeros(32, HIDDEN, dtype=torch.bfloat16))
