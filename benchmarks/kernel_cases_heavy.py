"""Attention, the log-probabilities and the optimiser, as cases of ``kernel_cases``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import BF16, N_KV, N_Q, RANK, WEIGHTED, Case, D, H, M, V, normal
from mint_engine import kernels

SCALE = D**-0.5


def _attention_inputs(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return normal(rows, N_Q * D), normal(rows, N_KV * D, seed=1), normal(rows, N_KV * D, seed=2), cu


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    """One call for sequences of one length, one for each otherwise."""

    def heads(t: Tensor, sequences: int, n: int) -> Tensor:
        return t.unflatten(0, (sequences, -1)).unflatten(-1, (n, D)).transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
        parts = (heads(q, sequences, N_Q), heads(k, sequences, N_KV), heads(v, sequences, N_KV))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    ends = cu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if len(set(lengths)) == 1:
        return run(q, k, v, len(lengths))
    return torch.cat([run(*one, 1) for one in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)])


def _pairs(lengths: Sequence[int]) -> int:
    """Of query and key under the causal mask, all heads."""
    return N_Q * sum(n * (n + 1) // 2 for n in lengths)


def attention(lengths: Sequence[int]) -> Case:
    def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, face: str | None = None) -> list[Tensor]:
        return [kernels.attention(q, k, v, cu, N_Q, N_KV, SCALE, face=face)[0]]

    inputs = _attention_inputs(lengths)
    moved = 2 * sum(lengths) * (2 * N_Q + 2 * N_KV) * D
    return Case(inputs, ours, lambda *a: [_sdpa(*a)], 4 * D * _pairs(lengths), moved)


def attention_backward(lengths: Sequence[int]) -> Case:
    """Ours starts from what the forward saved; torch's is timed with its forward, which its autograd needs."""
    q, k, v, cu = _attention_inputs(lengths)
    o, lse = kernels.attention(q, k, v, cu, N_Q, N_KV, SCALE)

    def ours(do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor,
             face: str | None = None) -> list[Tensor]:  # fmt: skip
        if face == "reference":  # in float64 from the start: o and lse as the inputs give them
            o, lse = kernels.attention(q, k, v, cu, N_Q, N_KV, SCALE, face=face)
        return list(kernels.attention_backward(do, q, k, v, o, lse, cu, N_Q, N_KV, SCALE, face=face))

    def theirs(do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return list(torch.autograd.grad(_sdpa(*leaves, cu), leaves, do))

    moved = 2 * sum(lengths) * (4 * N_Q + 4 * N_KV) * D
    return Case((normal(len(q), N_Q * D, seed=3), o, lse, q, k, v, cu), ours, theirs, 10 * D * _pairs(lengths), moved)


def _head() -> tuple[Tensor, Tensor]:
    return normal(V, H + RANK, seed=1, scale=H**-0.5), torch.randint(0, V, (M, 1))


def target_logprob() -> Case:
    w, targets = _head()

    def ours(x: Tensor, w: Tensor, targets: Tensor, face: str | None = None) -> list[Tensor]:
        return list(kernels.target_logprob(x, w, targets, face=face))

    def theirs(x: Tensor, w: Tensor, targets: Tensor) -> list[Tensor]:
        logits = (x @ w.T).float()
        lse = torch.logsumexp(logits, 1)
        return [logits.gather(1, targets) - lse[:, None], lse]

    return Case((normal(M, H + RANK), w, targets), ours, theirs, 2 * M * w.numel(), 2 * w.numel())


def target_logprob_backward() -> Case:
    """The rows in the loss. The logits are computed again, in both."""
    w, targets = _head()
    x, targets = normal(WEIGHTED, H + RANK), targets[:WEIGHTED]
    dlogprob = normal(WEIGHTED, 1, seed=2, dtype=torch.float32)
    lse = kernels.target_logprob(x, w, targets)[1]

    def ours(x: Tensor, w: Tensor, targets: Tensor, dlogprob: Tensor, lse: Tensor,
             face: str | None = None) -> list[Tensor]:  # fmt: skip
        if face == "reference":
            lse = kernels.target_logprob(x, w, targets, face=face)[1]
        return list(kernels.target_logprob_backward(x, w, targets, dlogprob, lse, border=RANK, face=face))

    def theirs(x: Tensor, w: Tensor, targets: Tensor, dlogprob: Tensor, lse: Tensor) -> list[Tensor]:
        d = torch.softmax((x @ w.T).float(), 1).mul_(-dlogprob).scatter_add_(1, targets, dlogprob).to(x.dtype)
        return [d @ w, (d.T @ x[:, H:]).float()]

    flop = 2 * WEIGHTED * (2 * w.numel() + V * RANK)
    return Case((x, w, targets, dlogprob, lse), ours, theirs, flop, 2 * w.numel())


def adamw() -> Case:
    n = 5_000_000
    step = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 1}
    inputs = tuple(normal(n, seed=i, dtype=torch.float32).abs() for i in range(4))

    def ours(p: Tensor, g: Tensor, m: Tensor, v: Tensor, face: str | None = None) -> list[Tensor]:
        kernels.adamw_(p, g, m, v, **step, face=face)  # type: ignore[arg-type]
        return [p, m, v]

    def theirs(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> list[Tensor]:
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [torch.tensor(1.0)], lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        return [p, m, v]

    return Case(inputs, ours, theirs, moved=28 * n)


def gather() -> Case:
    """The embedding's rows: both are torch's."""
    tokens = torch.randint(0, V, (M,))
    return Case(
        (normal(V, H), tokens),
        lambda w, tokens, face=None: [w[tokens]],
        lambda w, tokens: [F.embedding(tokens, w)],
        moved=2 * M * H * BF16.itemsize,
    )
