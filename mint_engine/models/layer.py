"""One decoder layer: a forward that saves what the backward needs, and that backward, by hand (DESIGN.md 2.3).

    x1 = norm(h);  qkv = x1 Wqkv;  q, k = rope(qk_norm(q, k));  o = attention(q, k, v);  h2 = h + o Wo
    x2 = norm(h2); gate, up = x2 Wgu;  a = silu(gate) * up;                              h' = h2 + a Wd

Every W is bordered with the adapters of the pass. The residual additions happen inside the next norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mint_engine.borders import BorderedWeight, Seating
from mint_engine.kernels import (
    attention_backward,
    qk_norm_rope,
    qk_norm_rope_backward,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from mint_engine.models import linear
from mint_engine.models.config import ModelConfig

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


@dataclass
class Pass:
    """What all layers share in one pass: who sits where, the rotary tables of the rows, how to attend."""

    config: ModelConfig
    seating: Seating
    cos: Tensor
    sin: Tensor
    attend: Attend
    cu_seqlens: Tensor | None = None  # needed by the backward

    def first(self, rows: int) -> Pass:
        """The same for a backward over the first ``rows`` rows; ``cu_seqlens`` is theirs already."""
        seating = self.seating.select(torch.arange(rows))
        return replace(self, seating=seating, cos=self.cos[:rows], sin=self.sin[:rows])


@dataclass
class Saved:
    """What the backward needs of one layer. Norm outputs, ``a`` and rotated q, k are recomputed: they are cheap."""

    h: Tensor
    s_qkv: Tensor
    qkv: Tensor
    o: Tensor  # [M, n_q*d + p]: S of the o projection rides in the tail
    lse: Tensor
    h2: Tensor
    s_gate_up: Tensor
    gate_up: Tensor
    s_down: Tensor

    def first(self, rows: int) -> Saved:
        """What the backward of the first ``rows`` rows needs: views."""
        by_row = {f.name: getattr(self, f.name)[:rows] for f in fields(self) if f.name != "lse"}
        return Saved(**by_row, lse=self.lse[:, :rows])


def forward(
    layer: DecoderLayer, delta: Tensor, h: Tensor | None, p: Pass, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """One layer over M packed rows.

    ``delta`` [M, H] is what the previous layer adds to the residual stream ``h`` [M, H] (None: delta is the stream).
    Returns this layer's (delta, h) and, if ``save``, what :func:`backward` needs.
    """
    rows, config, seating = delta.shape[0], p.config, p.seating
    eps, n_q, n_kv, d = config.rms_norm_eps, config.num_heads, config.num_kv_heads, config.head_dim

    x = linear.input_buffer(layer.qkv, rows, seating)
    _, h = rms_norm(delta, layer.attention_norm, eps, residual=h, y=x[:, : layer.qkv.k])
    linear.shrink_tail(layer.qkv, x, seating)
    qkv = linear.forward(layer.qkv, x, seating)
    qk = qk_norm_rope(qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps)

    o = linear.input_buffer(layer.o, rows, seating)
    lse = p.attend(layer.index, qk[:, : n_q * d], qk[:, n_q * d :], qkv[:, (n_q + n_kv) * d :], o[:, : layer.o.k])
    linear.shrink_tail(layer.o, o, seating)
    delta = linear.forward(layer.o, o, seating)

    x2 = linear.input_buffer(layer.gate_up, rows, seating)
    _, h2 = rms_norm(delta, layer.mlp_norm, eps, residual=h, y=x2[:, : layer.gate_up.k])
    linear.shrink_tail(layer.gate_up, x2, seating)
    gate_up = linear.forward(layer.gate_up, x2, seating)

    a = linear.input_buffer(layer.down, rows, seating)
    swiglu(gate_up, out=a[:, : layer.down.k])
    linear.shrink_tail(layer.down, a, seating)
    delta = linear.forward(layer.down, a, seating)
    if not save:
        return delta, h2, None
    assert lse is not None  # a pass that saves attends by the training kernel
    tails = (buf[:, w.k :].clone() for w, buf in ((layer.qkv, x), (layer.gate_up, x2), (layer.down, a)))
    s_qkv, s_gate_up, s_down = tails
    return delta, h2, Saved(h, s_qkv, qkv, o, lse, h2, s_gate_up, gate_up, s_down)


def backward(
    layer: DecoderLayer, dh: Tensor, saved: Saved, p: Pass, grads: linear.Gradients, need_dx: bool
) -> Tensor | None:
    """Gradient of the residual stream after the layer, ``dh`` [M, H], to that before it; adapters' go to ``grads``.

    Without ``need_dx`` (the first layer: the embedding is frozen) the last GEMM is left out and None returned.
    """
    rows, config, seating, eps = dh.shape[0], p.config, p.seating, p.config.rms_norm_eps
    n_q, n_kv, q_width = config.num_heads, config.num_kv_heads, config.num_heads * config.head_dim

    # MLP. The SwiGLU backward recomputes `a`, which down's adapter gradient needs.
    d_down = _with_tail(layer.down, dh, seating)
    da = linear.backward(layer.down, d_down, seating)
    d_gate_up = linear.gradient_buffer(layer.gate_up, rows, seating)
    _, a = swiglu_backward(da, saved.gate_up, dgate_up=d_gate_up[:, : layer.gate_up.n])
    linear.accumulate(layer.down, d_down, a, saved.s_down, seating, grads)
    linear.shrink_gradient(layer.gate_up, d_gate_up, seating)
    x2, _ = rms_norm(saved.h2, layer.mlp_norm, eps)
    linear.accumulate(layer.gate_up, d_gate_up, x2, saved.s_gate_up, seating, grads)
    dx2 = linear.backward(layer.gate_up, d_gate_up, seating)
    dh2 = rms_norm_backward(dx2, saved.h2, layer.mlp_norm, eps, dresidual=dh)

    # Attention.
    d_o = _with_tail(layer.o, dh2, seating)
    o, s_o = saved.o[:, : layer.o.k], saved.o[:, layer.o.k :]
    linear.accumulate(layer.o, d_o, o, s_o, seating, grads)
    do = linear.backward(layer.o, d_o, seating)
    qk = qk_norm_rope(saved.qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps)
    dqk = torch.empty_like(qk)
    dqkv = linear.gradient_buffer(layer.qkv, rows, seating)
    assert p.cu_seqlens is not None  # only training passes come here
    attention_backward(
        do, qk[:, :q_width], qk[:, q_width:], saved.qkv[:, qk.shape[1] :], o, saved.lse, p.cu_seqlens, n_q, n_kv,
        config.head_dim**-0.5, dq=dqk[:, :q_width], dk=dqk[:, q_width:], dv=dqkv[:, qk.shape[1] : layer.qkv.n],
    )  # fmt: skip
    qk_norm_rope_backward(
        dqk, saved.qkv, p.cos, p.sin, n_q, n_kv, q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps,
        dqkv=dqkv[:, : layer.qkv.n],
    )  # fmt: skip
    linear.shrink_gradient(layer.qkv, dqkv, seating)
    if seating.of(layer.qkv.group):
        x, _ = rms_norm(saved.h, layer.attention_norm, eps)
        linear.accumulate(layer.qkv, dqkv, x, saved.s_qkv, seating, grads)
    if not need_dx:
        return None
    dx = linear.backward(layer.qkv, dqkv, seating)
    return rms_norm_backward(dx, saved.h, layer.attention_norm, eps, dresidual=dh2)


def _with_tail(w: BorderedWeight, dy: Tensor, seating: Seating) -> Tensor:
    """``[dy | dS]``: a copy of ``dy`` [M, N] with room for, and the value of, its adapters' part."""
    out = linear.gradient_buffer(w, dy.shape[0], seating)
    out[:, : w.n].copy_(dy)
    linear.shrink_gradient(w, out, seating)
    return out
