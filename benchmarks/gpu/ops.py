"""Every op against its floor; the bordered product against the bare one; the loss against its two-GEMM floor."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import cases
from benchmarks.gpu.models import RANK, SHAPES
from mint_engine import kernels


def floors(bench: Bench, model: str) -> dict[str, Any]:
    """Every op beside plain torch, as it is and compiled, and its floor."""
    rows: dict[str, Any] = {}
    for case in cases(bench, model):
        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda case=case: case.run(case.inputs, bench.face),  # type: ignore[misc]
            "plain torch": lambda case=case: case.run(case.inputs, "reference"),  # type: ignore[misc]
        }
        compiled = _compiled(bench, case)
        if not isinstance(compiled, str):
            contenders["compiled"] = compiled
        ms = bench.interleaved(contenders)
        floor = bench.floor(moved=case.moved, flop=case.flop)
        rows[case.name] = {
            "ms": ms["ours"], "floor_ms": floor, "of_floor": floor / ms["ours"],
            "bound": "memory" if floor > bench.floor(flop=case.flop) else "arithmetic",
            "plain_torch_ms": ms["plain torch"],
            "compiled_torch_ms": ms.get("compiled", compiled),
        }  # fmt: skip
    return rows


def _compiled(bench: Bench, case: Case) -> Callable[[], Any] | str:
    """The op's plain torch through torch.compile, or why there is none. The inductor on a GPU, whole or in pieces."""
    if case.flop:
        return "only what memory bounds is compiled"
    torch.compiler.reset()
    made = torch.compile(case.run, backend="eager" if bench.dry else "inductor", dynamic=False)
    try:
        made(case.inputs, "reference")
    except Exception as error:
        return f"torch.compile failed: {type(error).__name__}"
    return lambda: made(case.inputs, "reference")


def products(bench: Bench, model: str) -> dict[str, Any]:
    """One adapter's bordered product, forward and backward, against the base's alone: at most 6 % more is wanted."""
    hidden, ffn, _, n_q, n_kv, d, _, _ = SHAPES[model]
    q, kv = n_q * d, n_kv * d
    rows: dict[str, Any] = {}
    layers = {
        "qkv": (hidden, q + 2 * kv, 3),
        "o": (q, hidden, 1),
        "gate_up": (hidden, 2 * ffn, 2),
        "down": (ffn, hidden, 1),
    }
    for name, (k, n, modules) in layers.items():
        p = modules * RANK
        buf = bench.normal(n + p, k + p, seed=1, scale=k**-0.5)
        x, dy = bench.normal(bench.rows, k + p, seed=2), bench.normal(bench.rows, n + p, seed=3)
        forward, backward, w = buf[:, :][:n], buf[:, :k], buf[:n, :k].clone()
        bare_x, bare_dy = x[:, :k].clone(), dy[:, :n].clone()
        ms = bench.interleaved({
            "bordered": lambda: kernels.bordered_linear(x, forward, face=bench.face),  # noqa: B023
            "bare": lambda: torch.mm(bare_x, w.T),  # noqa: B023
            "bordered backward": lambda: kernels.bordered_linear_backward(dy, backward, face=bench.face),  # noqa: B023
            "bare backward": lambda: torch.mm(bare_dy, w),  # noqa: B023
        })  # fmt: skip
        floor = bench.floor(flop=2.0 * bench.rows * n * k)
        rows[name] = {
            "ms": ms["bordered"], "bare_ms": ms["bare"], "ratio": ms["bordered"] / ms["bare"],
            "backward_ms": ms["bordered backward"], "bare_backward_ms": ms["bare backward"],
            "backward_ratio": ms["bordered backward"] / ms["bare backward"], "floor_ms": floor,
        }  # fmt: skip
    return rows


def loss(bench: Bench, model: str) -> dict[str, Any]:
    """Weighted cross-entropy, forward and backward to the hidden rows, against the floor of two products."""
    hidden, _, _, _, _, _, vocab, _ = SHAPES[model]
    m = bench.rows
    x, w = bench.normal(m, hidden, seed=1), bench.normal(vocab, hidden, seed=2, scale=hidden**-0.5)
    targets = torch.randint(0, vocab, (m, 1), device=bench.device)
    weights = bench.normal(m, 1, seed=3, dtype=torch.float32)

    def ours() -> Any:
        return kernels.target_logprob_with_gradient(x, w, targets, lambda rows, lp: -weights[rows], face=bench.face)

    contenders: dict[str, Callable[[], Any]] = {"ours": ours}
    absent = {}
    for name, make in (("cut-cross-entropy", _cce), ("Liger fused linear CE", _liger)):
        found = make(x, w, targets[:, 0])
        if isinstance(found, str):
            absent[name] = found
        else:
            contenders[name] = found
    ms = bench.interleaved(contenders)
    lse_only = bench.interleaved({"forward": lambda: kernels.target_logprob(x, w, targets, face=bench.face)})["forward"]
    floor = bench.floor(flop=4.0 * m * hidden * vocab)
    return {
        "rows": m, "ms": ms["ours"], "floor_ms": floor, "over_floor": ms["ours"] / floor, "forward_only_ms": lse_only,
        "peers_ms": {name: t for name, t in ms.items() if name != "ours"}, "absent": absent,
    }  # fmt: skip


def _cce(x: Tensor, w: Tensor, targets: Tensor) -> Callable[[], Any] | str:
    if find_spec("cut_cross_entropy") is None:
        return "not installed"
    if x.device.type != "cuda":
        return "needs a GPU: its kernels are not for the interpreter"
    from cut_cross_entropy import linear_cross_entropy

    def run() -> Tensor:
        h = x.detach().requires_grad_()
        linear_cross_entropy(h, w, targets, reduction="sum").backward()
        return h

    return run


def _liger(x: Tensor, w: Tensor, targets: Tensor) -> Callable[[], Any] | str:
    """In a dry run interpreted, as ours is."""
    if find_spec("liger_kernel") is None:
        return "not installed"
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def run() -> Tensor:
        h = x.detach().requires_grad_()
        fused(w, h, targets).backward()
        return h

    return run
