"""Sampling: ours against transformers' generate, batched as people use it.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.decode [--rounds 5] [--prefix-rounds 1] [--only batch1] [--save]

Three kinds of work on SmolLM2-135M, plain sampling at temperature 1, no stops, contenders interleaved in one run:
one prompt x 128 tokens; 16 prompts x 64 tokens; 16 prompts x 8 samples x 64 tokens behind one shared prefix of 512
tokens. Prompts are new in every round: the prefix cache helps within a call for many samples, never across rounds.
Tokens a second count the sampled tokens over the whole time, prompts included. The floor is the time to read the
weights once for each step.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import mint
from benchmarks.timing import interleaved, medians, read_bandwidth, report
from mint import types
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.models.gguf import smollm2_directory

MODEL = "smollm2-135m"
OURS = "mint-engine bf16"


@dataclass(frozen=True)
class Work:
    """``prompts`` prompts of ``prefix`` shared and ``own`` further tokens, ``samples`` of ``tokens`` tokens each."""

    prompts: int
    samples: int
    tokens: int
    own: int = 16
    prefix: int = 0

    @property
    def sampled(self) -> int:
        return self.prompts * self.samples * self.tokens

    def inputs(self, vocab_size: int) -> Iterator[np.ndarray]:
        """int64 [prompts, prefix + own], new ones every time."""
        rng = np.random.default_rng(0)
        while True:
            prefix = np.tile(rng.integers(0, vocab_size, self.prefix), (self.prompts, 1))
            own = rng.integers(0, vocab_size, (self.prompts, self.own))
            yield np.concatenate([prefix, own], axis=1).astype(np.int64)


WORKS = {
    "batch1": Work(prompts=1, samples=1, tokens=128),
    "batch16": Work(prompts=16, samples=1, tokens=64),
    "prefix": Work(prompts=16, samples=8, tokens=64, prefix=512),
}


def ours(work: Work, vocab_size: int) -> Callable[[], object]:
    client = mint.ServiceClient(dtype="bfloat16").create_sampling_client(base_model=MODEL)
    params = types.SamplingParams(max_tokens=work.tokens, temperature=1.0, stop=[])
    inputs = work.inputs(vocab_size)

    def run() -> object:
        prompts = [types.ModelInput.from_ints(row.tolist()) for row in next(inputs)]
        futures = [client.sample(p, num_samples=work.samples, sampling_params=params) for p in prompts]
        answers = [f.result() for f in futures]
        assert sum(len(s.tokens) for a in answers for s in a.sequences) == work.sampled
        return answers

    return run


def theirs(directory: Path, work: Work, vocab_size: int, dtype: torch.dtype) -> Callable[[], object]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    inputs = work.inputs(vocab_size)

    def run() -> object:
        ids = torch.from_numpy(next(inputs))
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=work.samples, max_new_tokens=work.tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (work.prompts * work.samples, ids.shape[1] + work.tokens)
        return out

    return run


def weight_bytes(config: ModelConfig) -> int:
    """bf16 bytes of every weight a token goes through: the linears and the unembedding."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    return 2 * (config.num_layers * (h * (q + 2 * kv) + q * h + 3 * h * f) + config.vocab_size * h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix-rounds", type=int, default=1, help="rounds of the shared prefix: minutes each")
    parser.add_argument("--only", choices=list(WORKS), action="append", help="leave the others out")
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    directory = smollm2_directory(Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine"))
    config = load_config(directory)
    bandwidth = read_bandwidth()
    step_floor = weight_bytes(config) / bandwidth
    print(f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s; weights once {step_floor * 1e3:.2f} ms")
    results = {}
    for name in args.only or WORKS:
        work = WORKS[name]
        contenders = {
            OURS: ours(work, config.vocab_size),
            "transformers bf16": theirs(directory, work, config.vocab_size, torch.bfloat16),
            "transformers float32": theirs(directory, work, config.vocab_size, torch.float32),
        }
        slow = work.prefix > 0
        rounds = args.prefix_rounds if slow else args.rounds
        seconds = medians(interleaved(contenders, rounds=rounds, warmup=0 if slow else 1))
        floor = work.tokens * step_floor
        print(f"{name}: {work.prompts} prompts x {work.samples} samples x {work.tokens} tokens")
        for contender, s in seconds.items():
            print(
                f"  {contender:22s} {work.sampled / s:8.1f} tokens/s  {s / seconds[OURS]:5.2f} x our time  "
                f"floor is {floor / s:4.0%} of it"
            )
        results[name] = {
            "tokens_per_s": {contender: round(work.sampled / s, 1) for contender, s in seconds.items()},
            "speedup": {c: round(s / seconds[OURS], 2) for c, s in seconds.items() if c != OURS},
            "floor_share": round(floor / seconds[OURS], 3), "rounds": rounds,
        }  # fmt: skip
    report("decode", {"model": MODEL, "read_GBps": round(bandwidth / 1e9, 1), "works": results}, args.save)


if __name__ == "__main__":
    main()
