"""Whole training steps, forward_backward + optim_step with its results read: ours, and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import LENGTH, RANK, SHARE, batch, config, decoder, hf_config
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.datums import CheckedDatum
from mint_engine.gpu.run import Programs, programs
from mint_engine.kernels import force_face
from mint_engine.losses import get_loss
from mint_engine.models.decoder import Decoder
from mint_engine.optimizer import queue_step
from mint_engine.types import AdamParams, LoraConfig

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def flop_per_token(name: str) -> float:
    """Multiply-adds x2 of one LoRA step: linears forward and for dX, the unembedding of rows in the loss three times,
    adapters three times. Attention is left out."""
    c = config(name)
    h, f, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = h * (q + 2 * kv) + q * h + 3 * h * f
    adapter = RANK * (3 * h + q + 2 * kv + q + h + 2 * h + 2 * f + f + h)
    head = SHARE * (2 * c.vocab_size * h + 3 * RANK * (c.vocab_size + h))
    return 2.0 * (c.num_layers * (2 * layer + 3 * adapter) + head)


def queued_of(
    bench: Bench, base: Decoder, shares: Sequence[Sequence[CheckedDatum]]
) -> Callable[[], Callable[[], list[float]]]:
    """Queues a step of one adapter per share and gives what reads its losses; in programs, recorded at their second
    use."""
    loss = get_loss("cross_entropy")
    adapters = [Adapter(base.groups, LoraConfig(rank=RANK, seed=i), base.device) for i in range(len(shares))]
    states = [TrainState(adapter) for adapter in adapters]
    found = Programs(base) if bench.dry else programs(base)
    assert found is not None
    adam = AdamParams(learning_rate=1e-4)

    def queue() -> Callable[[], list[float]]:
        calls = [Call(a, s, data, loss, {}) for a, s, data in zip(adapters, states, shares, strict=True)]
        # A dry run interprets kernels in `agreement`.
        with torch.no_grad(), force_face("reference") if bench.dry else nullcontext():
            passes = found.queue(calls, masked_logprobs=False)
            steps = [queue_step(found, adapter, state, adam) for adapter, state in zip(adapters, states, strict=True)]

        def read() -> list[float]:
            outcomes = passes.result()
            for step in steps:
                step.result()
            return [o.metrics["loss:sum"] for o in outcomes if not isinstance(o, Exception)]

        return read

    return queue


def step_of(bench: Bench, base: Decoder, shares: Sequence[Sequence[CheckedDatum]]) -> Callable[[], Any]:
    """Such a step, read before anything else is queued."""
    queue = queued_of(bench, base, shares)
    return lambda: queue()()


def ours(bench: Bench, model: str, tokens: int, length: int, sharers: int = 1) -> Callable[[], Any]:
    """Our step of ``tokens`` tokens, shared by ``sharers`` adapters."""
    base = decoder(bench, model)
    data = batch(base.config, tokens, length)
    each = max(1, len(data) // sharers)
    return step_of(bench, base, [data[i * each : (i + 1) * each] for i in range(sharers)])


def measured(
    bench: Bench, model: str, tokens: int, contenders: Mapping[str, Callable[[], Callable[[], Any]]]
) -> dict[str, Any]:
    """Contenders (each makes its step) in turns, and the memory of each: what it kept and took at its peak."""
    steps, kept = {}, {}
    for name, make in contenders.items():
        before = bench.reserved()
        steps[name] = make()
        for _ in range(1 if bench.dry else 3):
            steps[name]()  # compiled and recorded
        kept[name] = bench.reserved() - before
    ms = bench.walls(steps, max(3, bench.rounds // 3))
    flop = flop_per_token(model) * tokens
    found: dict[str, Any] = {"tokens": tokens, "floor_ms": bench.floor(flop=flop)}
    for name, step in steps.items():
        peak = kept[name] + bench.peak_above(bench.reserved(), step)
        found[name] = {
            "ms": ms[name], "tokens_per_s": tokens / ms[name] * 1e3, "peak_gib": peak / 2**30,
            "tflops": flop / ms[name] / 1e9,
        }  # fmt: skip
    return found


def versus(bench: Bench, model: str, *, liger: bool = False, compiled: bool = False) -> dict[str, Any]:
    """Our step beside PEFT's, in turns. Where both do not fit together, with half as many sequences for both."""
    name = "liger" if liger else "compiled" if compiled else "peft"
    tokens, length = (4 * LENGTH, LENGTH) if not bench.dry else (64, 32)
    missing = lacking(bench, liger=liger)
    while True:
        contenders = {"ours": partial(ours, bench, model, tokens, length)}
        if missing is None:
            contenders[name] = partial(peer, bench, model, tokens, length, liger=liger, compiled=compiled)
        try:
            found = measured(bench, model, tokens, contenders)
        except torch.OutOfMemoryError:
            if tokens <= length:
                raise
        else:
            break
        tokens //= 2
        bench.free()
    if missing is not None:
        found[name] = {"absent": missing}
    elif liger:
        found[name]["note"] = "Liger's fused loss reads the raw head: the adapter of lm_head gets no gradient"
    return found


def small(bench: Bench, model: str) -> dict[str, Any]:
    tokens = 256 if not bench.dry else 32
    return measured(bench, model, tokens, {"ours": partial(ours, bench, model, tokens, tokens)})


def ahead(bench: Bench, model: str) -> dict[str, Any]:
    """Steps that are queued while the one before runs, as the engine does it, against steps that are awaited."""
    tokens, length, count = (8192, LENGTH, 8) if not bench.dry else (64, 32, 2)
    found: dict[str, Any] = {}
    for size in (tokens, 256) if not bench.dry else (tokens,):
        base = decoder(bench, model)
        queue = queued_of(bench, base, [batch(base.config, size, min(size, length))])

        def awaited(queue: Callable[[], Callable[[], Any]] = queue) -> None:
            for _ in range(count):
                queue()()

        def following(queue: Callable[[], Callable[[], Any]] = queue) -> None:
            read = queue()
            for _ in range(count - 1):
                last, read = read, queue()
                last()
            read()

        ms = bench.walls({"awaited": awaited, "ahead": following}, max(3, bench.rounds // 3))
        found[f"{size} tokens"] = {
            "awaited_ms": ms["awaited"] / count, "ahead_ms": ms["ahead"] / count, "speed": ms["awaited"] / ms["ahead"]
        }  # fmt: skip
        del base, queue, awaited, following
        bench.free()
    return found


def sharing(bench: Bench, model: str) -> dict[str, Any]:
    """Eight adapters in a batch against one with the same tokens, in turns."""
    tokens, length = (8192, 1024) if not bench.dry else (64, 32)
    count = 8 if not bench.dry else 2
    make = partial(ours, bench, model, tokens, length)
    found = measured(bench, model, tokens, {"many": partial(make, count), "one": make})
    return {"adapters": count, **found, "speed": found["one"]["ms"] / found["many"]["ms"]}


def lacking(bench: Bench, *, liger: bool) -> str | None:
    """Why a peer cannot run."""
    missing = [
        name for name in ("peft", "transformers", *(["liger_kernel"] if liger else [])) if find_spec(name) is None
    ]
    if missing:
        return f"{', '.join(missing)}: not installed"
    return "Liger's norm needs a GPU: it is not for the interpreter" if liger and bench.device.type != "cuda" else None


def peer(bench: Bench, model: str, tokens: int, length: int, *, liger: bool, compiled: bool) -> Callable[[], Any]:
    """PEFT + transformers (SDPA) on the same tokens: a padded batch, ``model(labels=...)``, torch's fused AdamW."""
    import peft
    from transformers import AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
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
        value = run(input_ids=ids, labels=labels, use_cache=False).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step
