"""One training step (forward_backward + optim_step) on the demo's batch: ours against PEFT + transformers.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.train_step [--rounds 10] [--threads 1] [--save]

All contenders train the same modules (all linears and the unembedding, rank 16) of the same model on the same
examples, interleaved in one run. PEFT runs as people use it: a padded batch, ``model(labels=...)``, torch's AdamW.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers

import mint
from benchmarks.timing import fma_peak, interleaved, medians, report
from mint import types
from mint_engine.demo import process_sft_example, questions
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.models.gguf import smollm2_directory

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
RANK = 16


def ours(data: list[types.Datum], dtype: str) -> Callable[[], object]:
    client = mint.ServiceClient(dtype=dtype).create_lora_training_client("smollm2-135m", RANK, seed=0)
    adam = types.AdamParams(learning_rate=5e-5)

    def step() -> object:
        client.forward_backward(data, "cross_entropy")
        return client.optim_step(adam).result()

    return step


def theirs(directory: Path, data: list[types.Datum], dtype: torch.dtype) -> Callable[[], object]:
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0)
    width = max(d.model_input.length for d in data) + 1
    ids, mask, labels = (torch.full((len(data), width), fill) for fill in (0, 0, -100))
    for i, d in enumerate(data):
        tokens = [*d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"].tolist()[-1]]
        weights = d.loss_fn_inputs["weights"].tolist()
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        labels[i, 1 : len(tokens)] = torch.tensor([t if w else -100 for t, w in zip(tokens[1:], weights, strict=True)])

    def step() -> object:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def step_flops(config: ModelConfig, tokens: int, weighted: int) -> float:
    """Multiply-adds x2 that no LoRA step can avoid: every linear forward and for dX (not the first layer's qkv),
    the unembedding forward for every row whose log-probability is returned and twice more for the weighted ones, the
    adapters three times. Attention is left out: on sequences of 20 tokens it is nothing."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    layer = h * (q + 2 * kv) + q * h + 3 * h * f
    adapter = RANK * (3 * h + q + 2 * kv + q + h + 2 * h + 2 * f + f + h)
    body = config.num_layers * (2 * layer + 3 * adapter) - h * (q + 2 * kv)
    return 2 * (tokens * body + (tokens + 2 * weighted) * config.vocab_size * h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="with 1, CPU time is measured: what to use on a busy machine")  # fmt: skip
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter

    directory = smollm2_directory(Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    data = [process_sft_example(ex, tokenizer) for ex in questions(16, seed=0)]
    tokens = sum(d.model_input.length for d in data)
    weighted = int(sum(sum(d.loss_fn_inputs["weights"].tolist()) for d in data))
    steps = {
        "mint-engine bf16": ours(data, "bfloat16"),
        "mint-engine float32": ours(data, "float32"),
        "PEFT float32 (default)": theirs(directory, data, torch.float32),
        "PEFT bf16": theirs(directory, data, torch.bfloat16),
    }
    flops = step_flops(load_config(directory), tokens, weighted)
    floors = {"bf16": flops / fma_peak(torch.bfloat16, clock), "float32": flops / fma_peak(torch.float32, clock)}
    median = medians(interleaved(steps, rounds=args.rounds, warmup=2, clock=clock))
    print(f"{tokens} tokens, {weighted} in the loss, {torch.get_num_threads()} threads; "
          + ", ".join(f"floor in {dtype} {floor * 1e3:.0f} ms" for dtype, floor in floors.items()))  # fmt: skip
    for name, seconds in median.items():
        floor = floors["float32" if "float32" in name else "bf16"]
        print(f"{name:24s} {seconds * 1e3:7.0f} ms  {seconds / median['mint-engine bf16']:5.2f} x ours in bf16  "
              f"{seconds / median['mint-engine float32']:5.2f} x ours in float32  "
              f"floor is {floor / seconds:4.0%} of it")  # fmt: skip
    report("train_step", {
        "tokens": tokens, "weighted": weighted,
        "floor_ms": {dtype: round(floor * 1e3, 1) for dtype, floor in floors.items()},
        "median_ms": {name: round(seconds * 1e3, 1) for name, seconds in median.items()},
        "speedup": {mine: {name: round(seconds / median[mine], 2) for name, seconds in median.items() if name != mine}
                    for mine in median if mine.startswith("mint-engine")},
        "rounds": args.rounds,
    }, args.save)  # fmt: skip


if __name__ == "__main__":
    main()
