"""One decoder layer: a forward that saves what the backward needs, and that backward, by hand (DESIGN.md 2.3).

    x1 = norm(h);  qkv = x1 Wqkv;  q, k = rope(qk_norm(q, k));  o = attention(q, k, v);  h2 = h + o Wo
    x2 = norm(h2); gate, up = x2 Wgu;  a = silu(gate) * up;                              h' = h2 + a Wd

Every W is bordered with the adapters of the pass. The residual additions happen inside the next norm. What follows the
attention may be done for some of the rows only: in the last layer the others give their K and V, and no more.

What is here op by op is one call into C++ where `fused.py` can: the same ops in the same order. Where a pass has its
layers wait for each other, what a layer returns is there when they have been done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mint_engine.borders import BorderedWeight, Seating
from mint_engine.device import upload
from mint_engine.kernels import (
    attention_backward,
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_cached,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from mint_engine.kernels.attention import Bounds
from mint_engine.models import fused, linear
from mint_engine.models.config import ModelConfig
from mint_engine.models.workspace import Workspace

# (layer index, q [M, n_q*d], k, v [M, n_kv*d], out [M, n_q*d]) -> lse [n_q, M] or None
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor | None]


@dataclass
class DecoderLayer:
    """Frozen weights of one layer."""

    index: int
    attention_norm: Tensor
    qkv: BorderedWeight
    o: BorderedWeight
    mlp_norm: Tensor
    gate_up: BorderedWeight
    down: BorderedWeight
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    addresses: fused.Weights | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Cells:
    """Where a decode step's K and V go: ``slots`` int64 [M] of the pools ``k, v`` [layers, n_blocks, block, n_kv*d]."""

    slots: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Context:
    """Where the K and V of a prompt's rows go; and if tokens of the sequences came before, where all of them are.

    ``held`` int64 [keys]: the cells of the sequences' tokens, which lie end to end with bounds ``cu_keys`` int32.
    """

    cells: Cells
    held: Tensor | None
    cu_keys: Tensor


@dataclass
class Pass:
    """What all layers share in one pass: who sits where, the rotary tables of the rows, how to attend, memory."""

    config: ModelConfig
    seating: Seating
    cos: Tensor
    sin: Tensor
    attend: Attend
    space: Workspace
    cu_seqlens: Tensor | Bounds | None = None  # needed by the backward
    cells: Cells | None = None  # then ``attend`` gets a layer's pools for k and v
    shared: dict[int | None, fused.Shared | None] = field(default_factory=dict, repr=False)  # of `fused.py`
    waiting: fused.Waiting = field(default_factory=fused.Waiting, repr=False)

    def first(self, rows: int) -> Pass:
        """The same for a backward over the first ``rows`` rows; ``cu_seqlens`` is theirs already."""
        seating = self.seating.select(torch.arange(rows))
        return replace(self, seating=seating, cos=self.cos[:rows], sin=self.sin[:rows], shared={})

    @property
    def bounds(self) -> Tensor | Bounds | None:
        """Of the sequences, where rows attend to their own only."""
        return getattr(self.attend, "bounds", None) if self.cu_seqlens is None else self.cu_seqlens

    @property
    def context(self) -> Context | None:
        """Of prompts, whose rows attend to what a cache holds, too."""
        return getattr(self.attend, "context", None)


@dataclass
class Saved:
    """What the backward needs of one layer. Norm outputs, ``a`` and rotated q, k are recomputed: they are cheap.

    The tensors behind ``lse`` have the rows ``rows`` of the pass (None: all) where those before it have all.
    """

    h: Tensor
    s_qkv: Tensor
    qkv: Tensor
    attended: Tensor  # [M, n_q*d]
    lse: Tensor  # [n_q, M]
    o: Tensor  # [rows, n_q*d + p]: attended, with the S of the o projection in the tail
    h2: Tensor
    s_gate_up: Tensor
    gate_up: Tensor
    s_down: Tensor
    rows: Tensor | None = None  # int64, ascending, on the CPU

    def first(self, count: int) -> Saved:
        """What the backward of the first ``count`` rows needs: views. Which rows follow the attention stays."""
        before = {name: getattr(self, name)[:count] for name in ("h", "s_qkv", "qkv", "attended")}
        behind = {} if self.rows is not None else {name: getattr(self, name)[:count] for name in _BEHIND}
        return replace(self, **before, lse=self.lse[:, :count].contiguous(), **behind)

    def only(self, rows: Tensor, space: Workspace) -> Saved:
        """What the backward needs if of what follows the attention only these rows of the pass have gradients."""
        if self.rows is rows or (self.rows is None and len(rows) == len(self.h)):
            return self
        at = rows if self.rows is None else torch.searchsorted(self.rows, rows)
        behind = {name: _gather(getattr(self, name), at, space, f"selected {name}") for name in _BEHIND}
        return replace(self, **behind, rows=rows)


_BEHIND = ("o", "h2", "s_gate_up", "gate_up", "s_down")


def forward(
    layer: DecoderLayer, delta: Tensor, h: Tensor | None, p: Pass, save: bool, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Saved | None]:
    """One layer over M packed rows.

    ``delta`` [M, H] is what the previous layer adds to the residual stream ``h`` [M, H] (None: delta is the stream).
    ``rows`` (int64, ascending): the ones whose result is wanted, all by default. Returns this layer's (delta, h), both
    [rows, H], and, if ``save``, what :func:`backward` needs.
    """
    if (shared := fused.shared_of(layer, p, rows)) is not None:
        delta, h, kept = fused.forward(layer, delta, h, p, save, rows, shared)
        return delta, h, None if kept is None else Saved(*kept, rows=rows)
    p.waiting.flush()
    config, seating, m = p.config, p.seating, len(delta)
    eps, n_q, n_kv, d = config.rms_norm_eps, config.num_heads, config.num_kv_heads, config.head_dim
    at = layer.index if save else -1  # without a backward all layers use the same memory

    def take(name: str, count: int, columns: int, *, kept: bool = False) -> Tensor:
        return p.space.take((name, at) if kept else name, (count, columns), delta.dtype)

    x = take("x", m, layer.qkv.k + linear.tail(layer.qkv, seating))
    h = _norm(layer.qkv, delta, layer.attention_norm, eps, h, x, take("h", m, layer.qkv.k, kept=True), seating)
    qkv = linear.forward(layer.qkv, x, seating, take("qkv", m, layer.qkv.n, kept=True))
    s_qkv = _tail(layer.qkv, x, take, save)
    if p.cells is None:
        qk, v = take("qk", m, (n_q + n_kv) * d), qkv[:, (n_q + n_kv) * d :]
        qk_norm_rope(qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps, out=qk)
        q, k = qk[:, : n_q * d], qk[:, n_q * d :]
    else:
        q, k, v = take("qk", m, n_q * d), p.cells.k[layer.index], p.cells.v[layer.index]
        qk_norm_rope_cached(
            qkv, p.cos, p.sin, n_q, n_kv, k, v, p.cells.slots, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps,
            out=q,
        )  # fmt: skip
    o = take("o", m, layer.o.k + linear.tail(layer.o, seating), kept=True)
    attended = o[:, : layer.o.k]
    lse = p.attend(layer.index, q, k, v, attended)

    h_in = h
    if rows is not None:
        seating, m = seating.select(rows), len(rows)
        some = take("o of some", m, layer.o.k + linear.tail(layer.o, seating), kept=True)
        torch.index_select(attended, 0, upload(rows, h.device), out=some[:, : layer.o.k])
        o, h = some, _gather(h, rows, p.space, "h of some")
    linear.shrink_tail(layer.o, o, seating)
    delta = linear.forward(layer.o, o, seating, take("delta", m, layer.o.n))

    x = take("x", m, layer.gate_up.k + linear.tail(layer.gate_up, seating))
    h2 = _norm(layer.gate_up, delta, layer.mlp_norm, eps, h, x, take("h2", m, layer.gate_up.k, kept=True), seating)
    gate_up = linear.forward(layer.gate_up, x, seating, take("gate_up", m, layer.gate_up.n, kept=True))
    s_gate_up = _tail(layer.gate_up, x, take, save)
    a = take("a", m, layer.down.k + linear.tail(layer.down, seating))
    along = linear.shrink_along(layer.down, a, seating)
    swiglu(gate_up, out=a[:, : layer.down.k], shrink=along)
    if along is None:
        linear.shrink_tail(layer.down, a, seating)
    delta = linear.forward(layer.down, a, seating, take("delta", m, layer.down.n))
    if not save:
        return delta, h2, None
    assert lse is not None  # a pass that saves attends by the training kernel
    s_down = _tail(layer.down, a, take, save)
    return delta, h2, Saved(h_in, s_qkv, qkv, attended, lse, o, h2, s_gate_up, gate_up, s_down, rows)


def _norm(
    w: BorderedWeight, delta: Tensor, weight: Tensor, eps: float, residual: Tensor | None, x: Tensor, h: Tensor,
    seating: Seating,
) -> Tensor:  # fmt: skip
    """``x`` [rows, K + p], the input of ``w``, from the stream ``delta + residual``, which it returns (in ``h``)."""
    along = linear.shrink_along(w, x, seating)
    out = None if residual is None else h
    _, h = rms_norm(delta, weight, eps, residual=residual, y=x[:, : w.k], h=out, shrink=along)
    if along is None:
        linear.shrink_tail(w, x, seating)
    return h


def _tail(w: BorderedWeight, x: Tensor, take: Callable[..., Tensor], save: bool) -> Tensor:
    """A copy of the S in the tail of ``x`` [rows, K + p] for the backward."""
    s = x[:, w.k :]
    return take(f"s of {w.group.name}", *s.shape, kept=True).copy_(s) if save else s


def _gather(t: Tensor, rows: Tensor, space: Workspace, name: str) -> Tensor:
    return torch.index_select(t, 0, upload(rows, t.device), out=space.take(name, (len(rows), t.shape[1]), t.dtype))


def backward(
    layer: DecoderLayer, dh: Tensor, saved: Saved, p: Pass, grads: linear.Gradients, need_dx: bool
) -> Tensor | None:
    """Gradient of the residual stream after the layer to that before it; adapters' go to ``grads``.

    ``dh`` [rows, H + room] holds the gradient of the rows ``saved.rows`` in its first columns, is overwritten, and has
    room for any dS in the others; what comes back [M, H + room] is like it. Without ``need_dx`` (the first layer: the
    embedding is frozen) the last GEMM is left out and None returned.
    """
    if (shared := fused.shared_of(layer, p, saved.rows)) is not None:
        return fused.backward(layer, dh, saved, p, grads, need_dx, shared)
    p.waiting.flush()
    config, m, eps = p.config, len(saved.h), p.config.rms_norm_eps
    hidden, n_q, n_kv, q_width = config.hidden_size, config.num_heads, config.num_kv_heads, layer.o.k
    seating = p.seating if saved.rows is None else p.seating.select(saved.rows)

    def take(name: str, count: int, columns: int) -> Tensor:
        return p.space.take(name, (count, columns), dh.dtype)

    # MLP. The SwiGLU backward recomputes `a`, which down's adapter gradient needs.
    some = len(dh)
    d_down = dh[:, : hidden + linear.tail(layer.down, seating)]
    linear.gradients(layer.down, d_down, saved.s_down, None, seating, grads)
    da = linear.backward(layer.down, d_down, seating, take("da", some, layer.down.k))
    d_gate_up = take("d gate_up", some, layer.gate_up.n + linear.tail(layer.gate_up, seating))
    _, a = swiglu_backward(da, saved.gate_up, dgate_up=d_gate_up[:, : layer.gate_up.n], a=take("a", some, layer.down.k))
    linear.accumulate_a(layer.down, d_down, a, seating, grads)
    x = take("x", some, hidden)
    if seating.of(layer.gate_up.group):
        rms_norm(saved.h2, layer.mlp_norm, eps, y=x)
    linear.gradients(layer.gate_up, d_gate_up, saved.s_gate_up, x, seating, grads)
    dx = linear.backward(layer.gate_up, d_gate_up, seating, take("dx", some, hidden))
    stream = dh[:, :hidden]
    rms_norm_backward(dx, saved.h2, layer.mlp_norm, eps, dresidual=stream, dh=stream)

    # Attention.
    d_o = dh[:, : hidden + linear.tail(layer.o, seating)]
    linear.gradients(layer.o, d_o, saved.o[:, q_width:], saved.o[:, :q_width], seating, grads)
    do = linear.backward(layer.o, d_o, seating, take("do", some, q_width))
    if saved.rows is not None:
        at = upload(saved.rows, dh.device)
        do = take("do of all", m, q_width).zero_().index_copy_(0, at, do)
        dh = take("dh of all", m, dh.shape[1]).zero_().index_copy_(0, at, dh)
        stream = dh[:, :hidden]
    qk, dqk = take("qk", m, (n_q + n_kv) * config.head_dim), take("dqk", m, (n_q + n_kv) * config.head_dim)
    qk_norm_rope(saved.qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps, out=qk)
    dqkv = take("dqkv", m, layer.qkv.n + linear.tail(layer.qkv, p.seating))
    assert p.cu_seqlens is not None  # only training passes come here
    attention_backward(
        do, qk[:, :q_width], qk[:, q_width:], saved.qkv[:, qk.shape[1] :], saved.attended, saved.lse, p.cu_seqlens,
        n_q, n_kv, config.head_dim**-0.5, dq=dqk[:, :q_width], dk=dqk[:, q_width:],
        dv=dqkv[:, qk.shape[1] : layer.qkv.n],
    )  # fmt: skip
    qk_norm_rope_backward(
        dqk, saved.qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps,
        dqkv=dqkv[:, : layer.qkv.n],
    )  # fmt: skip
    x = take("x", m, hidden)
    if p.seating.of(layer.qkv.group):
        rms_norm(saved.h, layer.attention_norm, eps, y=x)
    linear.gradients(layer.qkv, dqkv, saved.s_qkv, x, p.seating, grads)
    if not need_dx:
        return None
    dx = linear.backward(layer.qkv, dqkv, p.seating, take("dx", m, hidden))
    rms_norm_backward(dx, saved.h, layer.attention_norm, eps, dresidual=stream, dh=stream)
    return dh
