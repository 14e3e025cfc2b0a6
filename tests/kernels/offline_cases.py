"""Calls of the public ops on ``meta`` tensors, at the shapes of Qwen3-0.6B (and 8B where the tile changes)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mint_engine import kernels
from mint_engine.kernels.grouped_linear import LinearTable, Outer, OuterTable, Product

ROWS = 8192
HIDDEN, FFN, N_Q, N_KV, D = 1024, 3072, 16, 8, 128
RANK, BORDER = 16, 64


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="meta")


def norm(width: int) -> None:
    x, w = bf16(ROWS, width), bf16(width)
    kernels.rms_norm(x, w, 1e-6, residual=x, face="triton")
    kernels.rms_norm_backward(x, x, w, 1e-6, dresidual=x, face="triton")


def shrinks(ranks: int) -> None:
    """norm + residual + S, SwiGLU + S."""
    x, a, w = bf16(ROWS, HIDDEN + BORDER), bf16(ranks, FFN), bf16(HIDDEN)
    shrink = kernels.Shrink(a[:, :HIDDEN], 2.0, bf16(ROWS, ranks))
    kernels.rms_norm(x[:, :HIDDEN], w, 1e-6, residual=bf16(ROWS, HIDDEN), shrink=shrink, face="triton")
    kernels.swiglu(bf16(ROWS, 2 * FFN), shrink=kernels.Shrink(a, 2.0, bf16(ROWS, ranks)), face="triton")


def lora(rank: int) -> None:
    """dS and dB of gate and up, dA of both."""
    dy, s, ds = bf16(ROWS, 2 * FFN + BORDER), bf16(ROWS, 2 * rank), bf16(ROWS, 2 * rank)
    border, db = bf16(2 * FFN, HIDDEN + 2 * rank)[:, HIDDEN:], fp32(2 * FFN, rank).split(FFN)
    b = border[:FFN, :rank], border[FFN:, rank:]
    kernels.lora_gradients(
        dy[:, : 2 * FFN], s, b, 2.0, ds=ds, db=db, x=bf16(ROWS, HIDDEN), da=fp32(2 * rank, HIDDEN), face="triton"
    )  # fmt: skip


def swiglu() -> None:
    gate_up = bf16(ROWS, 2 * FFN)
    kernels.swiglu(gate_up, face="triton")
    kernels.swiglu_backward(bf16(ROWS, FFN), gate_up, face="triton")


def rope() -> None:
    qkv, table, w = bf16(ROWS, (N_Q + 2 * N_KV) * D), fp32(ROWS, D // 2), bf16(D)
    qk = kernels.qk_norm_rope(qkv, table, table, N_Q, N_KV, q_weight=w, k_weight=w, face="triton")
    kernels.qk_norm_rope_backward(
        qk, qkv, table, table, N_Q, N_KV, dqkv=qkv, q_weight=w, k_weight=w, face="triton"
    )  # fmt: skip


def rope_cached() -> None:
    qkv, table, w, pool = bf16(64, (N_Q + 2 * N_KV) * D), fp32(64, D // 2), bf16(D), bf16(8192, 32, N_KV * D)
    slots = torch.empty(64, dtype=torch.int64, device="meta")
    kernels.qk_norm_rope_cached(
        qkv, table, table, N_Q, N_KV, pool, pool, slots, q_weight=w, k_weight=w, face="triton"
    )  # fmt: skip


def adamw() -> None:
    p = fp32(10_000_000)
    hyper = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "step": 3}
    kernels.adamw_(p, p, p, p, **hyper, face="triton")


def adamw_places() -> None:
    """A and B of one linear, written into its border."""
    p, buf = fp32(RANK * (HIDDEN + FFN)), bf16(FFN + BORDER, HIDDEN + BORDER)
    views = buf[FFN : FFN + RANK, :HIDDEN], buf[:FFN, HIDDEN : HIDDEN + RANK]
    places = kernels.Places([(v.numel(), v) for v in views], "meta")
    kernels.adamw_places_(p, p, p, p, fp32(9), places, face="triton")
    kernels.write_places_(p, places, face="triton")


def embedding() -> None:
    kernels.embedding(torch.empty(ROWS, dtype=torch.int64, device="meta"), bf16(151936, HIDDEN), face="triton")


def narrow() -> None:
    """S and dS of a stack, and the gradients of A and B."""
    x, a, b = bf16(ROWS, HIDDEN + BORDER), bf16(RANK, HIDDEN + BORDER), bf16(FFN, HIDDEN + BORDER)
    kernels.shrink(x[:, :HIDDEN], a[:, :HIDDEN], 2.0, out=x[:, HIDDEN : HIDDEN + RANK], face="triton")
    dy = bf16(ROWS, FFN + BORDER)
    kernels.expand_backward(dy[:, :FFN], b[:, HIDDEN : HIDDEN + RANK], 2.0, out=dy[:, FFN : FFN + RANK], face="triton")


def outer() -> None:
    kernels.outer_accumulate(bf16(ROWS, RANK), bf16(ROWS, HIDDEN), fp32(RANK, HIDDEN), face="triton")


def outer_tall() -> None:
    kernels.outer_accumulate(bf16(ROWS, HIDDEN), bf16(ROWS, RANK), fp32(HIDDEN, RANK), face="triton")


def by_tile() -> None:
    spans = torch.empty(ROWS // 128, 3, dtype=torch.int32, device="meta")
    x, w = bf16(ROWS, HIDDEN + BORDER), bf16(2 * FFN + BORDER, HIDDEN + BORDER)
    kernels.bordered_by_tile(x, w[: 2 * FFN], spans, k=HIDDEN, tile_rows=128, step=64, face="triton")
    dy = bf16(ROWS, 2 * FFN + BORDER)
    kernels.bordered_by_tile_backward(dy, w[:, :HIDDEN], spans, n=2 * FFN, tile_rows=128, step=64, face="triton")


def by_narrow_tile() -> None:
    """Borders of 16 columns: less than a tile of K."""
    spans = torch.empty(ROWS // 128, 3, dtype=torch.int32, device="meta")
    x, w = bf16(ROWS, HIDDEN + BORDER), bf16(2 * FFN + BORDER, HIDDEN + BORDER)
    kernels.bordered_by_tile(x, w[: 2 * FFN], spans, k=HIDDEN, tile_rows=128, face="triton")
    dy = bf16(ROWS, 2 * FFN + BORDER)
    kernels.bordered_by_tile_backward(dy, w[:, :HIDDEN], spans, n=2 * FFN, tile_rows=128, face="triton")


def by_tile_with_pointers() -> None:
    """Strides that are no multiples of 16 bytes."""
    spans = torch.empty(ROWS // 128, 3, dtype=torch.int32, device="meta")
    x, w = bf16(ROWS, HIDDEN + 17), bf16(2 * FFN, HIDDEN + 17)
    kernels.bordered_by_tile(x, w, spans, k=HIDDEN, tile_rows=128, face="triton")


def by_tile_of_few_rows() -> None:
    """A decode step: 64 rows, grouped by adapter and padded to tiles of 16."""
    spans = torch.empty(4, 3, dtype=torch.int32, device="meta")
    x, w = bf16(64, HIDDEN + 16), bf16(2 * FFN, HIDDEN + 4 * 16)
    kernels.bordered_by_tile(x, w, spans, k=HIDDEN, tile_rows=16, face="triton")


def grouped() -> None:
    """Eight adapters of rank 16 on gate and up: S, S Bᵀ, dS, dS A, dA, dB."""
    rows, n, k = ROWS // 8, 2 * FFN, HIDDEN
    stride, seats = k + 8 * 2 * RANK, range(8)
    x, dy, buf = bf16(ROWS, k + 2 * RANK), bf16(ROWS, n + 2 * RANK), bf16(n + 8 * 2 * RANK, stride)
    a = [Product(rows * i, rows, 0, k, (n + 32 * i) * stride, stride, 1, k, 2 * RANK, 2.0) for i in seats]
    b = [Product(rows * i, rows, k, RANK, k + 32 * i, stride, 1, 0, FFN) for i in seats]
    d_b = [Product(rows * i, rows, 0, FFN, k + 32 * i, 1, stride, n, RANK, 2.0) for i in seats]
    d_a = [Product(rows * i, rows, n, 2 * RANK, (n + 32 * i) * stride, 1, stride, 0, k) for i in seats]
    y, dx, size = dy[:, :n], x[:, :k], buf.numel()
    for source, out, products, add in ((x, x, a, False), (x, y, b, True), (dy, dy, d_b, False), (dy, dx, d_a, True)):
        table = LinearTable.of(products, ROWS, source.shape[1], out.shape[1], size)
        kernels.grouped_linear(source, buf, out, table, add=add, face="triton")
    outs = [fp32(2 * RANK * k + n * RANK) for _ in seats]
    wide = [Outer(i, rows * i, rows, n, 2 * RANK, 0, k, 0, k) for i in seats]
    tall = [Outer(i, rows * i, rows, 0, FFN, k, RANK, 2 * RANK * k, RANK) for i in seats]
    kernels.grouped_outer(dy, x, outs, OuterTable.of(wide, ROWS, dy.shape[1], x.shape[1], 8), face="triton")
    kernels.grouped_outer(dy, x, outs, OuterTable.of(tall, ROWS, dy.shape[1], x.shape[1], 8), face="triton")


def grouped_qkv() -> None:
    """Eight adapters of rank 16 on q, k and v: the three S in one go, and dA of all three."""
    rows, n, k, ranks, seats = ROWS // 8, (N_Q + 2 * N_KV) * D, HIDDEN, 3 * RANK, range(8)
    stride = k + 8 * ranks
    x, dy, buf = bf16(ROWS, k + ranks), bf16(ROWS, n + ranks), bf16(n + 8 * ranks, stride)
    a = [Product(rows * i, rows, 0, k, (n + ranks * i) * stride, stride, 1, k, ranks, 2.0) for i in seats]
    table = LinearTable.of(a, ROWS, x.shape[1], x.shape[1], buf.numel())
    kernels.grouped_linear(x, buf, x, table, face="triton")
    outer = [Outer(i, rows * i, rows, n, ranks, 0, k, 0, k) for i in seats]
    table = OuterTable.of(outer, ROWS, dy.shape[1], x.shape[1], 8)
    kernels.grouped_outer(dy, x, [fp32(ranks * k) for _ in seats], table, face="triton")


def head() -> None:
    x, w = bf16(ROWS, HIDDEN + BORDER), bf16(151936, HIDDEN + BORDER)
    targets = torch.empty(ROWS, 1, dtype=torch.int64, device="meta")
    _, lse = kernels.target_logprob(x, w, targets, face="triton")
    kernels.target_logprob_backward(x, w, targets, fp32(ROWS, 1), lse, border=BORDER, face="triton")


def head_at_once() -> None:
    """Raw labels of some rows, with the gradient from the exponentials that the forward left."""
    x, w, rows = bf16(ROWS, HIDDEN + BORDER), bf16(151936, HIDDEN + BORDER), torch.empty(ROWS, dtype=torch.int64)
    bounds = torch.empty(9, dtype=torch.int32, device="meta")
    labels = kernels.Labels(torch.empty(32768, dtype=torch.int64, device="meta"), bounds, rows.to("meta"))
    kernels.target_logprob_with_gradient(
        x, w, labels, lambda _, logprob: torch.empty_like(logprob), border=BORDER, face="triton"
    )  # fmt: skip


def head_logits() -> None:
    kernels.logits(bf16(16, HIDDEN + BORDER), bf16(151936, HIDDEN + BORDER), face="triton")


def attention(d: int) -> None:
    q, kv, lse = bf16(ROWS, N_Q * d), bf16(ROWS, N_KV * d), fp32(N_Q, ROWS)
    cu = torch.tensor([0, 100, ROWS], dtype=torch.int32)
    kernels.attention(q, kv, kv, cu, N_Q, N_KV, d**-0.5, face="triton")
    kernels.attention_backward(q, q, kv, kv, q, lse, cu, N_Q, N_KV, d**-0.5, face="triton")


def paged_attention(d: int) -> None:
    """64 rows of up to 4096 tokens in blocks of 32."""
    pool, ints = bf16(8192, 32, N_KV * d), {"dtype": torch.int32, "device": "meta"}
    table, lengths = torch.empty(64, 128, **ints), torch.empty(64, **ints)
    kernels.paged_attention(bf16(64, N_Q * d), pool, pool, table, lengths, N_Q, N_KV, d**-0.5, face="triton")


def sample() -> None:
    logits, doubles = fp32(64, 151936), {"dtype": torch.float64, "device": "meta"}
    k = torch.empty(64, dtype=torch.int64, device="meta")
    kernels.sample_rows(logits, fp32(64), k, torch.empty(64, **doubles), torch.empty(64, **doubles), face="triton")
    kernels.top_logprobs(logits, fp32(64), 20, face="triton")


def sample_from_head() -> None:
    x, w = bf16(64, HIDDEN + 16), bf16(151936, HIDDEN + 16)
    kernels.sample_head(x, w, fp32(64), torch.empty(64, dtype=torch.float64, device="meta"), face="triton")


CASES: dict[str, Callable[[], None]] = {
    "rms_norm 1024": lambda: norm(1024),
    "rms_norm 4096": lambda: norm(4096),
    "swiglu": swiglu,
    "norm, swiglu with S of 16": lambda: shrinks(16),
    "norm, swiglu with S of 48": lambda: shrinks(48),
    "norm, swiglu with S of 256": lambda: shrinks(256),
    "lora_gradients 16": lambda: lora(16),
    "lora_gradients 64": lambda: lora(64),
    "qk_norm_rope": rope,
    "qk_norm_rope into a cache": rope_cached,
    "adamw": adamw,
    "adamw into places": adamw_places,
    "embedding": embedding,
    "shrink, expand": narrow,
    "outer_accumulate dA": outer,
    "outer_accumulate dB": outer_tall,
    "bordered_by_tile": by_tile,
    "bordered_by_tile of 16": by_narrow_tile,
    "bordered_by_tile with pointers": by_tile_with_pointers,
    "bordered_by_tile of few rows": by_tile_of_few_rows,
    "grouped_linear": grouped,
    "grouped_linear of qkv": grouped_qkv,
    "attention 64": lambda: attention(64),
    "attention 128": lambda: attention(128),
    "attention 256": lambda: attention(256),
    "paged_attention 64": lambda: paged_attention(64),
    "paged_attention 128": lambda: paged_attention(128),
    "paged_attention 256": lambda: paged_attention(256),
    "sample_head": sample_from_head,
    "sample_rows": sample,
    "target_logprob": head,
    "target_logprob with gradient": head_at_once,
    "logits 16 rows": head_logits,
}
