"""The ops of a training step at a model's shapes: what is checked, tuned and measured is the same call."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case, Results
from benchmarks.gpu.models import RANK, SHAPES
from benchmarks.gpu.product_cases import head_cases, optimizer_case, product_cases
from mint_engine import kernels
from mint_engine.kernels.attention import Bounds


def cases(bench: Bench, model: str) -> list[Case]:
    """One case of each op, at ``model``'s widths and ``bench.rows`` rows."""
    hidden, ffn, _, n_q, n_kv, d, _, _ = SHAPES[model]
    m, size, r = bench.rows, bench.dtype.itemsize, RANK
    q, kv = n_q * d, n_kv * d
    normal = bench.normal
    cu = torch.arange(0, m + 1, max(1, m // 4), dtype=torch.int32)
    data = Bounds(m, len(cu), bench.device)  # as in a captured step: the kernels may not depend on them
    for new, buffer in data.write(cu.numpy()):
        buffer.copy_(torch.from_numpy(new))
    heads = (n_q, n_kv, d**-0.5)

    def bounds(face: str | None) -> Tensor | Bounds:
        return cu if face == "reference" else data

    pairs = sum(float(b - a) ** 2 for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)) / 2
    attention_flop = 4.0 * n_q * d * pairs
    angles = torch.arange(m, device=bench.device)[:, None] / torch.arange(1, d // 2 + 1, device=bench.device)
    rope = {"cos": angles.cos(), "sin": angles.sin()}

    def empty(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=bench.device)

    stream = {"x": normal(m, hidden, seed=1), "h": normal(m, hidden, seed=2), "w": normal(hidden, seed=3),
              "a": normal(3 * r, hidden, seed=4, scale=hidden**-0.5)}  # fmt: skip
    mlp = {"gate_up": normal(m, 2 * ffn, seed=5), "da": normal(m, ffn, seed=6)}
    attend = {"q": normal(m, q, seed=7), "k": normal(m, kv, seed=8), "v": normal(m, kv, seed=9),
              "do": normal(m, q, seed=10)}  # fmt: skip
    lora = {"dy": normal(m, hidden, seed=11), "s": normal(m, r, seed=12), "b": normal(hidden, r, seed=13),
            "x": normal(m, ffn, seed=14), "ds": normal(m, r, seed=16), "da": empty(r, ffn),
            "db": empty(hidden, r)}  # fmt: skip
    n = r * (hidden + 2 * ffn) * 16
    adam = {name: normal(n, seed=15 + i, dtype=torch.float32).abs() for i, name in enumerate(("p", "g", "m", "v"))}

    def norm(t: dict[str, Tensor], face: str | None) -> Results:
        s = t["x"].new_empty(len(t["x"]), len(t["a"]))
        y, h = kernels.rms_norm(t["x"], t["w"], 1e-6, residual=t["h"], shrink=kernels.Shrink(t["a"], 2.0, s), face=face)
        return y, h, s

    def attention(t: dict[str, Tensor], face: str | None) -> Results:
        return kernels.attention(t["q"], t["k"], t["v"], bounds(face), *heads, face=face)

    forward = attention(attend, "reference") if bench.dry else attention(attend, None)

    def attention_backward(t: dict[str, Tensor], face: str | None) -> Results:
        taken = (t[name] for name in ("do", "q", "k", "v", "o", "lse"))
        return kernels.attention_backward(*taken, bounds(face), *heads, face=face)

    def rope_backward(t: dict[str, Tensor], face: str | None) -> Results:
        kernels.qk_norm_rope_backward(t["dqk"], t["qkv"], t["cos"], t["sin"], n_q, n_kv, q_weight=t["qw"],
                                      k_weight=t["kw"], dqkv=t["dqkv"], face=face)  # fmt: skip
        return (t["dqkv"],)

    def gradients(t: dict[str, Tensor], face: str | None) -> Results:
        ds, da, db = made = t["ds"], t["da"], t["db"]
        kernels.lora_gradients(t["dy"], t["s"], [t["b"]], 2.0, ds=ds, db=[db], x=t["x"], da=da, face=face)
        return made

    def adamw(t: dict[str, Tensor], face: str | None) -> Results:
        kernels.adamw_(t["p"], t["g"], t["m"], t["v"], lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
                       step=3, face=face)  # fmt: skip
        return t["p"], t["m"], t["v"]

    heads_of = {"qkv": normal(m, q + 2 * kv, seed=20), "qw": normal(d, seed=21), "kw": normal(d, seed=22),
                "dqkv": normal(m, q + 2 * kv, seed=25), **rope}  # fmt: skip
    qk_bytes = m * (q + kv) * size
    return [
        Case("rms_norm + residual + shrink", stream, norm, moved=4.0 * m * hidden * size),
        Case(
            "rms_norm backward", {**stream, "dy": normal(m, hidden, seed=23)},
            lambda t, face: (kernels.rms_norm_backward(t["dy"], t["h"], t["w"], 1e-6, dresidual=t["x"], face=face),),
            moved=4.0 * m * hidden * size,
        ),
        Case(
            "QK-norm + RoPE", heads_of,
            lambda t, face: (kernels.qk_norm_rope(t["qkv"], t["cos"], t["sin"], n_q, n_kv, q_weight=t["qw"],
                                                  k_weight=t["kw"], face=face),),
            moved=2.0 * qk_bytes,
        ),
        Case("QK-norm + RoPE backward", {**heads_of, "dqk": normal(m, q + kv, seed=24)}, rope_backward,
             moved=3.0 * qk_bytes, writes=("dqkv",)),
        Case("SwiGLU", mlp, lambda t, face: (kernels.swiglu(t["gate_up"], face=face),), moved=3.0 * m * ffn * size),
        Case("SwiGLU backward", mlp, lambda t, face: kernels.swiglu_backward(t["da"], t["gate_up"], face=face),
             moved=6.0 * m * ffn * size),
        Case("dS, dA, dB", lora, gradients, moved=float(m * (hidden + ffn) * size),
             flop=2.0 * m * r * (2 * hidden + ffn), writes=("ds", "da", "db")),
        Case("AdamW", adam, adamw, moved=28.0 * n, writes=("p", "m", "v")),
        Case("attention", attend, attention, moved=(2.0 * q + 2 * kv) * m * size, flop=attention_flop),
        Case("attention backward", {**attend, "o": forward[0], "lse": forward[1]}, attention_backward,
             moved=(4.0 * q + 4 * kv) * m * size, flop=2.5 * attention_flop),
        optimizer_case(bench, model), *product_cases(bench, model), *head_cases(bench, model),
    ]  # fmt: skip
