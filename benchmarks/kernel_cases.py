"""The ops of a training step on the shapes of SmolLM2-135M (bf16): ours, the same in plain torch, and the floor.

Every case carries its own proof: the op's reference in float64 on the same inputs. ``gate`` holds ours to it with the
error rule of the tests (DESIGN.md section 5) before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mint_engine import kernels

M, H, FFN, V, N_Q, N_KV, D, RANK = 378, 576, 1536, 49152, 9, 3, 64, 16
WEIGHTED = 124
BF16 = torch.bfloat16
EPS = 1e-5
FACTOR = 3.0  # our error over that of plain torch in the same dtype, as in tests/kernels/check.py

Op = Callable[..., Sequence[Tensor]]


class GateClosedError(RuntimeError):
    """An op's numbers are wrong: it is not timed."""


@dataclass(frozen=True)
class Case:
    """``ours(*inputs, face=...)`` and ``torch(*inputs)`` give the same outputs. ``flop``, ``moved``: the floor."""

    inputs: tuple[Tensor, ...]
    ours: Op
    torch: Op
    flop: float = 0.0
    moved: float = 0.0


def gate(name: str, case: Case) -> None:
    """Raises GateClosedError where an output of ours is further from float64 than FACTOR times plain torch's."""
    wide = [t.double() if t.is_floating_point() else t for t in case.inputs]
    exact = case.ours(*wide, face="reference")
    plain, got = (run(*(t.clone() for t in case.inputs)) for run in (case.torch, case.ours))
    for i, (value, truth, peer) in enumerate(zip(got, exact, plain, strict=True)):
        floor = float(truth.abs().max()) * torch.finfo(value.dtype).eps
        allowed = FACTOR * max(float((peer.double() - truth).abs().max()), floor)
        error = float((value.double() - truth).abs().max())
        if not error <= allowed:
            raise GateClosedError(f"{name}: output {i} is off by {error:.2e}, allowed {allowed:.2e}")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# ---- linears ---------------------------------------------------------------------------------------------------------


def bordered(rows: int, border: int) -> Case:
    """gate and up, forward."""
    x, w = normal(rows, H + border), normal(2 * FFN, H + border, seed=1, scale=H**-0.5)
    return Case(
        (x, w),
        lambda x, w, face=None: [kernels.bordered_linear(x, w, face=face)],
        lambda x, w: [torch.mm(x, w.T)],
        flop=2 * rows * w.numel(),
        moved=2 * (w.numel() + x.numel() + rows * 2 * FFN),
    )


def bordered_backward(rows: int, border: int) -> Case:
    dy, w = normal(rows, 2 * FFN + border), normal(2 * FFN + border, H, seed=1, scale=H**-0.5)
    return Case(
        (dy, w),
        lambda dy, w, face=None: [kernels.bordered_linear_backward(dy, w, face=face)],
        lambda dy, w: [torch.mm(dy, w)],
        flop=2 * rows * w.numel(),
        moved=2 * (w.numel() + dy.numel() + rows * H),
    )


def lora_gradients() -> Case:
    """gate and up's: dS, dA and dB."""
    dy, x, s = normal(M, 2 * FFN), normal(M, H, seed=1), normal(M, 2 * RANK, seed=2)
    b = normal(2, FFN, RANK, seed=3, scale=FFN**-0.5)

    def ours(dy: Tensor, x: Tensor, s: Tensor, b: Tensor, face: str | None = None) -> list[Tensor]:
        sums = torch.float64 if dy.dtype is torch.float64 else torch.float32
        ds, da = torch.empty_like(s), torch.zeros(2 * RANK, H, dtype=sums)
        db = [torch.zeros(FFN, RANK, dtype=sums) for _ in range(2)]
        kernels.lora_gradients(dy, s, list(b), 2.0, ds=ds, db=db, x=x, da=da, face=face)
        return [ds, da, *db]

    def theirs(dy: Tensor, x: Tensor, s: Tensor, b: Tensor) -> list[Tensor]:
        halves = [slice(j * RANK, (j + 1) * RANK) for j in range(2)]
        parts = dy.split(FFN, 1)
        ds = torch.cat([2.0 * (part @ b[j]) for j, part in enumerate(parts)], 1)
        return [ds, (ds.T @ x).float(), *((part.T @ s[:, h]).float() for part, h in zip(parts, halves, strict=True))]

    return Case((dy, x, s, b), ours, theirs, 2 * M * RANK * (2 * 2 * FFN + 2 * H), 2 * M * (2 * FFN + H))


# ---- norms, rotary embedding, SwiGLU ---------------------------------------------------------------------------------


def norm(rank: int) -> Case:
    """With the residual's addition, and with S of q, k and v where there is a rank."""
    x, r, w, a = normal(M, H), normal(M, H, seed=1), normal(H, seed=2), normal(3 * rank, H, seed=3, scale=H**-0.5)

    def ours(x: Tensor, r: Tensor, w: Tensor, a: Tensor, face: str | None = None) -> list[Tensor]:
        s = x.new_empty(len(x), len(a))
        shrink = kernels.Shrink(a, 2.0, s) if rank else None
        return [*kernels.rms_norm(x, w, EPS, residual=r, shrink=shrink, face=face), *([s] if rank else [])]

    def theirs(x: Tensor, r: Tensor, w: Tensor, a: Tensor) -> list[Tensor]:
        h = x + r
        y = F.rms_norm(h, (H,), w, EPS)
        return [y, h, *([2.0 * (y @ a.T)] if rank else [])]

    return Case((x, r, w, a), ours, theirs, 2 * M * H * 3 * rank, 8 * M * H)


def norm_backward() -> Case:
    dy, h, w, skip = normal(M, H), normal(M, H, seed=1), normal(H, seed=2), normal(M, H, seed=3)

    def theirs(dy: Tensor, h: Tensor, w: Tensor, skip: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            (dh,) = torch.autograd.grad(F.rms_norm(leaf, (H,), w, EPS), leaf, dy)
        return [dh + skip]

    def ours(dy: Tensor, h: Tensor, w: Tensor, skip: Tensor, face: str | None = None) -> list[Tensor]:
        return [kernels.rms_norm_backward(dy, h, w, EPS, dresidual=skip, face=face)]

    return Case((dy, h, w, skip), ours, theirs, moved=8 * M * H)


def _rope(q_heads: int, kv_heads: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin, one weight of the norms."""
    angles = torch.arange(M)[:, None] * 10000.0 ** -(torch.arange(d // 2) / (d // 2))
    return normal(M, (q_heads + 2 * kv_heads) * d), angles.cos(), angles.sin(), normal(d, seed=1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, w: Tensor, heads: int) -> Tensor:
    x = F.rms_norm(x[:, : heads * len(w)].view(len(x), heads, len(w)).float(), (len(w),), w.float(), EPS)
    x1, x2 = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).flatten(1)


def qk_norm_rope() -> Case:
    """Qwen3-0.6B's heads."""
    q, kv, d = 16, 8, 128

    def ours(qkv: Tensor, cos: Tensor, sin: Tensor, w: Tensor, face: str | None = None) -> list[Tensor]:
        return [kernels.qk_norm_rope(qkv, cos, sin, q, kv, q_weight=w, k_weight=w, eps=EPS, face=face)]

    def theirs(qkv: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> list[Tensor]:
        return [_rotated(qkv, cos, sin, w, q + kv).to(qkv.dtype)]

    return Case(_rope(q, kv, d), ours, theirs, moved=4 * M * (q + kv) * d + 4 * M * d)


def qk_norm_rope_backward() -> Case:
    q, kv, d = 16, 8, 128
    width = (q + kv) * d

    def ours(dqk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, w: Tensor, face: str | None = None) -> list[Tensor]:
        dqkv = torch.empty_like(qkv)
        out = kernels.qk_norm_rope_backward(
            dqk, qkv, cos, sin, q, kv, dqkv=dqkv, q_weight=w, k_weight=w, eps=EPS, face=face
        )
        return [out[:, :width]]

    def theirs(dqk: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = qkv[:, :width].detach().requires_grad_()
            return list(torch.autograd.grad(_rotated(leaf, cos, sin, w, q + kv).to(qkv.dtype), leaf, dqk))

    return Case((normal(M, width, seed=2), *_rope(q, kv, d)), ours, theirs, moved=6 * M * width + 4 * M * d)


def swiglu(rank: int) -> Case:
    gate_up, a = normal(M, 2 * FFN), normal(rank, FFN, seed=1, scale=FFN**-0.5)

    def ours(gate_up: Tensor, a: Tensor, face: str | None = None) -> list[Tensor]:
        s = gate_up.new_empty(len(gate_up), len(a))
        shrink = kernels.Shrink(a, 2.0, s) if rank else None
        return [kernels.swiglu(gate_up, shrink=shrink, face=face), *([s] if rank else [])]

    def theirs(gate_up: Tensor, a: Tensor) -> list[Tensor]:
        y = F.silu(gate_up[:, :FFN]) * gate_up[:, FFN:]
        return [y, *([2.0 * (y @ a.T)] if rank else [])]

    return Case((gate_up, a), ours, theirs, 2 * M * FFN * rank, 6 * M * FFN)


def swiglu_backward() -> Case:
    def ours(da: Tensor, gate_up: Tensor, face: str | None = None) -> list[Tensor]:
        return list(kernels.swiglu_backward(da, gate_up, face=face))

    def theirs(da: Tensor, gate_up: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            a = F.silu(leaf[:, :FFN]) * leaf[:, FFN:]
            return [*torch.autograd.grad(a, leaf, da), a.detach()]

    return Case((normal(M, FFN), normal(M, 2 * FFN, seed=1)), ours, theirs, moved=12 * M * FFN)
