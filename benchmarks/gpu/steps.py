"""Whole training steps, forward_backward + optim_step with its results read: ours, and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import LENGTH, RANK, SHARE, batch, config, decoder, hf_config
from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.datums import CheckedDatum
from mint_engine.gpu.run import Programs
from mint_engine.kernels import force_face
from mint_engine.losses import get_loss
from mint_engine.models.decoder import Decoder
from mint_engine.optimizer import optim_step, step_within
from mint_engine.types import AdamParams, LoraConfig

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# tokens/s: at first, then (issue 5; 45 / 55 / 60 % of a Hopper's 989 TFLOP/s)
TARGETS = {"0.6b": (100_000, 158_000), "4b": (26_000, 31_000), "8b": (15_000, 19_000)}


def flop_per_token(name: str) -> float:
    """Multiply-adds x2 of one LoRA step: linears forward and for dX, the unembedding of rows in the loss three times,
    adapters three times. Attention is left out."""
    c = config(name)
    h, f, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * f
    adapter = RANK * (3 * h + q + 2 * kv + q + h + 2 * h + 2 * f + f + h)
    head = SHARE * (2 * c.vocab_size * h + 3 * RANK * (c.vocab_size + h))
    return 2.0 * (c.num_layers * (2 * layer + 3 * adapter) + head)


def step_of(
    bench: Bench, base: Decoder, shares: Sequence[Sequence[CheckedDatum]], interpret: bool
) -> Callable[[], Any]:
    """A step of one adapter per share; on a GPU in programs, recorded at their second use.

    ``interpret``: whether a dry run goes through Triton's interpreter, which takes its time.
    """
    loss = get_loss("cross_entropy")
    adapters = [Adapter(base.groups, LoraConfig(rank=RANK, seed=i), base.device) for i in range(len(shares))]
    states = [TrainState(adapter) for adapter in adapters]
    programs = Programs(base) if bench.dry else None
    adam = AdamParams(learning_rate=1e-4)

    def step() -> Any:
        calls = [Call(a, s, data, loss, {}) for a, s, data in zip(adapters, states, shares, strict=True)]
        with torch.no_grad():
            if programs is None:
                out = trainer.run_together(base, calls, masked_logprobs=False)
            else:
                with force_face("triton" if interpret else "reference"):
                    out = programs.run_together(calls, masked_logprobs=False)
            for adapter, state in zip(adapters, states, strict=True):
                if programs is None:
                    optim_step(adapter, state, adam, base)
                else:
                    step_within(programs, adapter, state, adam)
        return [o.metrics["loss:sum"] for o in out if not isinstance(o, Exception)]

    return step


def ours(
    bench: Bench, model: str, tokens: int, length: int, sharers: int = 1, *, interpret: bool = False
) -> dict[str, Any]:
    base = decoder(bench, model)
    data = batch(base.config, tokens, length)
    each = max(1, len(data) // sharers)
    step = step_of(bench, base, [data[i * each : (i + 1) * each] for i in range(sharers)], interpret)
    count = sum(d.tokens.size for d in data[: each * sharers])
    ms = bench.wall(step, max(3, bench.rounds // 3))
    return _result(bench, model, count, ms, bench.peak_memory(step))


def _result(bench: Bench, model: str, tokens: int, ms: float, peak: int) -> dict[str, Any]:
    flop = flop_per_token(model) * tokens
    return {
        "tokens": tokens, "ms": ms, "tokens_per_s": tokens / ms * 1e3, "peak_gib": peak / 2**30,
        "floor_ms": bench.floor(flop=flop), "tflops": flop / ms / 1e9,
    }  # fmt: skip


def whole(bench: Bench, model: str) -> dict[str, Any]:
    tokens, length = (4 * LENGTH, LENGTH) if not bench.dry else (64, 32)
    first, then = TARGETS.get(model, (0, 0))
    target = f"{first:,} tokens/s at first, then {then:,}; 3 x PEFT's, 1.5 x Liger's, at most 0.6 of their memory"
    return {**ours(bench, model, tokens, length, interpret=True), "target": target}


def small(bench: Bench, model: str) -> dict[str, Any]:
    tokens = 256 if not bench.dry else 32
    return {**ours(bench, model, tokens, tokens), "target": "at most 3 ms"}


def sharing(bench: Bench, model: str) -> dict[str, Any]:
    """Eight adapters in a batch against one with the same tokens; in one part, so on one warm machine."""
    tokens, length = (8192, 1024) if not bench.dry else (64, 32)
    count = 8 if not bench.dry else 2
    many, one = ours(bench, model, tokens, length, count), ours(bench, model, tokens, length)
    return {f"{count} adapters": many, "1 adapter": one, "speed": one["ms"] / many["ms"], "target": "at least 0.9"}


def peer(bench: Bench, model: str, *, liger: bool, compiled: bool) -> dict[str, Any]:
    """PEFT + transformers (SDPA) on the same tokens: a padded batch, ``model(labels=...)``, torch's fused AdamW."""
    missing = [
        name for name in ("peft", "transformers", *(["liger_kernel"] if liger else [])) if find_spec(name) is None
    ]
    if missing:
        return {"absent": f"{', '.join(missing)}: not installed"}
    if liger and bench.device.type != "cuda":
        return {"absent": "Liger kernels need a GPU"}
    import peft
    from transformers import AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
    tokens, length = (4 * LENGTH, LENGTH) if not bench.dry else (64, 32)
    with torch.device(bench.device):
        base = AutoModelForCausalLM.from_config(hf_config(model), dtype=bench.dtype, attn_implementation="sdpa")
    lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")
    net = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                                  fused=bench.device.type == "cuda")  # fmt: skip
    data = batch(config(model), tokens, length)
    ids = torch.stack([torch.from_numpy(d.tokens) for d in data]).to(bench.device)
    labels = ids.clone()
    labels[:, : length - int(length * SHARE)] = -100
    run = torch.compile(net, backend="eager" if bench.dry else "inductor") if compiled else net

    def step() -> Any:
        value = run(input_ids=ids, labels=labels).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    ms = bench.wall(step, max(3, bench.rounds // 3))
    result = _result(bench, model, ids.numel(), ms, bench.peak_memory(step))
    if liger:
        result["note"] = "Liger's fused loss reads the raw head: the adapter of lm_head gets no gradient"
    return result


def decode(bench: Bench) -> dict[str, Any]:
    """Sampling on a GPU goes through plain torch's paged attention so far: no number of it means anything yet."""
    from mint_engine.kernels import paged_attention
    from mint_engine.kernels.op import _ops

    found = _ops[paged_attention.__name__].triton()
    if isinstance(found, str):
        return {"batch 1": f"not there yet: {found}", "batch 64": f"not there yet: {found}"}
    return {"batch 1": "not there yet: this benchmark has no decode loop", "batch 64": "not there yet"}
