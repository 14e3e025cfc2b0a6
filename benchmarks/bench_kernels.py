"""Each op on the demo's shapes (SmolLM2-135M, 378 tokens, bf16): the face that is chosen against plain torch.

    OPENBLAS_NUM_THREADS=1 python -m pytest benchmarks/bench_kernels.py --benchmark-enable --benchmark-only \\
        --benchmark-group-by=group --benchmark-columns=median,rounds,ops

``extra_info`` in the JSON (``--benchmark-json=FILE``) holds the floor: bytes or FLOP at what this machine reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import copy_bandwidth, fma_peak
from mint_engine import kernels

M, H, FFN, V, N_Q, N_KV, D, RANK = 378, 576, 1536, 49152, 9, 3, 64, 16
BF16 = torch.bfloat16


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(BF16)


@cache
def peaks() -> tuple[float, float]:
    """(FLOP/s of bf16 multiply-adds, bytes/s of a large copy), measured here."""
    return fma_peak(BF16), copy_bandwidth()


Case = tuple[Callable[[], object], Callable[[], object], float, float]  # ours, torch, FLOP, bytes


def bordered(rows: int, border: int) -> Case:
    buf, x = normal(2 * FFN + border, H + border), normal(rows, H + border)
    w, plain = normal(2 * FFN, H), normal(rows, H)
    flop, moved = 2 * rows * 2 * FFN * (H + border), 2 * (buf.numel() + x.numel() + rows * 2 * FFN)
    return lambda: kernels.bordered_linear(x, buf[: 2 * FFN]), lambda: torch.mm(plain, w.T), flop, moved


def norm() -> Case:
    x, r, w = normal(M, H), normal(M, H), normal(H)
    return lambda: kernels.rms_norm(x, w, 1e-5, residual=r), lambda: F.rms_norm(x + r, (H,), w, 1e-5), 0, 8 * M * H


def swiglu() -> Case:
    gate_up = normal(M, 2 * FFN)
    return lambda: kernels.swiglu(gate_up), lambda: F.silu(gate_up[:, :FFN]) * gate_up[:, FFN:], 0, 6 * M * FFN


def norm_shrink() -> Case:
    x, r, w, a, out = normal(M, H), normal(M, H), normal(H), normal(3 * RANK, H), normal(M, H + 3 * RANK)
    s = out[:, H:]

    def theirs() -> None:
        out[:, :H] = F.rms_norm(x + r, (H,), w, 1e-5)
        torch.mm(out[:, :H], a.T, out=s)

    def ours() -> None:
        kernels.rms_norm(x, w, 1e-5, residual=r, y=out[:, :H], shrink=kernels.Shrink(a, 2.0, s))

    return ours, theirs, 2 * M * H * 3 * RANK, 8 * M * H


def swiglu_shrink() -> Case:
    gate_up, a, out = normal(M, 2 * FFN), normal(RANK, FFN), normal(M, FFN + RANK)
    s = out[:, FFN:]

    def theirs() -> None:
        torch.mul(F.silu(gate_up[:, :FFN]), gate_up[:, FFN:], out=out[:, :FFN])
        torch.mm(out[:, :FFN], a.T, out=s)

    def ours() -> None:
        kernels.swiglu(gate_up, out=out[:, :FFN], shrink=kernels.Shrink(a, 2.0, s))

    return ours, theirs, 2 * M * FFN * RANK, 6 * M * FFN


def gradients() -> Case:
    """gate and up's: dS, dA and dB."""
    dy, x, s = normal(M, 2 * FFN + 2 * RANK), normal(M, H), normal(M, 2 * RANK)
    b = [normal(FFN, RANK), normal(FFN, RANK)]
    db, da = [torch.zeros(FFN, RANK), torch.zeros(FFN, RANK)], torch.zeros(2 * RANK, H)
    ds = dy[:, 2 * FFN :]

    def theirs() -> None:
        for j in range(2):
            part, columns = dy[:, j * FFN : (j + 1) * FFN], slice(j * RANK, (j + 1) * RANK)
            torch.mm(part, b[j], out=ds[:, columns])
            db[j].add_(part.T @ s[:, columns])
        da.add_(ds.T @ x)

    def ours() -> None:
        kernels.lora_gradients(dy[:, : 2 * FFN], s, b, 2.0, ds=ds, db=db, x=x, da=da)

    return ours, theirs, 2 * M * RANK * (2 * 2 * FFN + 2 * H), 2 * M * (2 * FFN + H)


def attention(sequences: int, length: int) -> Case:
    rows = sequences * length
    q, k, v = normal(rows, N_Q * D), normal(rows, N_KV * D), normal(rows, N_KV * D)
    cu = torch.arange(0, rows + 1, length, dtype=torch.int32)

    def sdpa() -> object:
        def heads(t: torch.Tensor, n: int) -> torch.Tensor:
            return t.view(sequences, length, n, D).transpose(1, 2)

        return F.scaled_dot_product_attention(
            heads(q, N_Q), heads(k, N_KV), heads(v, N_KV), is_causal=True, enable_gqa=True
        )

    flop = 2 * rows * length * N_Q * D  # causal: half of QK and half of PV
    return lambda: kernels.attention(q, k, v, cu, N_Q, N_KV, D**-0.5), sdpa, flop, 2 * rows * (2 * N_Q + 2 * N_KV) * D


def logprob() -> Case:
    x, w, t = normal(M, H), normal(V, H), torch.randint(0, V, (M, 1))
    return (
        lambda: kernels.target_logprob(x, w, t),
        lambda: torch.log_softmax((x @ w.T).float(), -1).gather(1, t),
        2 * M * V * H,
        2 * V * H,
    )


def adamw() -> Case:
    n = 5_000_000
    ours, theirs = [torch.randn(n).abs() for _ in range(4)], torch.nn.Parameter(torch.randn(n))
    theirs.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([theirs], lr=1e-4, fused=True)
    step = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    return lambda: kernels.adamw_(*ours, **step), optimizer.step, 0, 28 * n


CASES: dict[str, Callable[[], Case]] = {
    "bordered_linear 378 rows, border 32": lambda: bordered(M, 32),
    "bordered_linear 1 row": lambda: bordered(1, 0),
    "bordered_linear 8 rows": lambda: bordered(8, 0),
    "rms_norm + residual": norm,
    "swiglu": swiglu,
    "rms_norm + residual + S": norm_shrink,
    "swiglu + S": swiglu_shrink,
    "lora_gradients": gradients,
    "attention 16 x 24": lambda: attention(16, 24),
    "attention 1 x 2048": lambda: attention(1, 2048),
    "target_logprob": logprob,
    "adamw 5M": adamw,
}


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark, case: str, who: str) -> None:  # type: ignore[no-untyped-def]
    ours, theirs, flop, moved = CASES[case]()
    benchmark.group = case
    peak, bandwidth = peaks()
    benchmark.extra_info["floor_us"] = round(max(flop / peak, moved / bandwidth) * 1e6, 1)
    with torch.no_grad():
        benchmark(ours if who == "ours" else theirs)
