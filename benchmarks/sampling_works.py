"""What `benchmarks.decode` gives everybody to do, and how we and transformers do it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import mint
from mint import types
from mint_engine.models.config import ModelConfig

_SEEDS = itertools.count()  # every contender of every row has prompts of its own


@dataclass(frozen=True)
class Work:
    """``prompts`` prompts of ``prefix`` shared and ``own`` further tokens, ``samples`` of ``tokens`` tokens each.

    ``known``: the prefix is the same in every call, so that a prefix cache has it from the call before.
    """

    prompts: int
    samples: int
    tokens: int
    own: int = 16
    prefix: int = 0
    known: bool = False

    @property
    def sampled(self) -> int:
        return self.prompts * self.samples * self.tokens

    def inputs(self, vocab_size: int) -> Iterator[np.ndarray]:
        """int64 [prompts, prefix + own], never seen before but for a prefix that is ``known``."""
        rng, same = np.random.default_rng(next(_SEEDS)), np.random.default_rng(self.prefix)
        known = same.integers(0, vocab_size, self.prefix)
        while True:
            prefix = known if self.known else rng.integers(0, vocab_size, self.prefix)
            own = rng.integers(0, vocab_size, (self.prompts, self.own))
            yield np.concatenate([np.tile(prefix, (self.prompts, 1)), own], axis=1).astype(np.int64)


def ours(work: Work, vocab_size: int, clients: Sequence[mint.SamplingClient]) -> Callable[[], float]:
    """Answers the tokens sampled. The prompts go to the clients in turn."""
    params = types.SamplingParams(max_tokens=work.tokens, temperature=1.0, stop=[])
    inputs = work.inputs(vocab_size)

    def run() -> float:
        futures = [
            clients[i % len(clients)].sample(row.tolist(), num_samples=work.samples, sampling_params=params)
            for i, row in enumerate(next(inputs))
        ]
        sampled = sum(len(s.tokens) for f in futures for s in f.result().sequences)
        assert sampled == work.sampled
        return sampled

    return run


def theirs(model: transformers.PreTrainedModel, work: Work, vocab_size: int) -> Callable[[], float]:
    """transformers' generate, batched as people use it."""
    inputs = work.inputs(vocab_size)

    def run() -> float:
        ids = torch.from_numpy(next(inputs))
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=work.samples, max_new_tokens=work.tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (work.prompts * work.samples, ids.shape[1] + work.tokens)
        return work.sampled

    return run


def load_theirs(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def weight_bytes(config: ModelConfig) -> int:
    """bf16 bytes of every weight a token goes through: the linears and the unembedding."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    return 2 * (config.num_layers * (h * (q + 2 * kv) + q * h + 3 * h * f) + config.vocab_size * h)


@dataclass(frozen=True)
class Traffic:
    """``requests`` of random lengths; each gets its prompt's first tokens ``seconds`` or less after the first."""

    prompts: list[list[int]]
    tokens: list[int]
    at: np.ndarray

    @classmethod
    def random(cls, requests: int, vocab_size: int, seconds: float, seed: int = 0) -> Traffic:
        """Prompts of 16 to 256 tokens, samples of 16 to 128, arrivals as of a Poisson process."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, vocab_size, int(n)).tolist() for n in rng.integers(16, 257, requests)]
        tokens = [int(n) for n in rng.integers(16, 129, requests)]
        return cls(prompts, tokens, np.sort(rng.uniform(0, seconds, requests)))

    def run(self, client: mint.SamplingClient) -> dict[str, float]:
        """Tokens a second from the first arrival to the last answer, time to first token, requests that failed."""
        begun = time.perf_counter()
        asked, first, lock = [0.0] * len(self.tokens), {}, threading.Lock()

        def told(request: int) -> None:
            with lock:
                first.setdefault(request, time.perf_counter())

        futures = []
        for i, (prompt, tokens, at) in enumerate(zip(self.prompts, self.tokens, self.at, strict=True)):
            time.sleep(max(0.0, begun + at - time.perf_counter()))
            asked[i] = time.perf_counter()
            params = types.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
            futures.append(
                client.sample(prompt, sampling_params=params, on_token=lambda *_, request=i: told(request)).future()
            )
        failed = sum(future.exception() is not None for future in futures)
        seconds = time.perf_counter() - begun
        waits = np.array([first[i] - asked[i] for i in sorted(first)])
        return {
            "tokens_per_s": sum(self.tokens) / seconds, "failed": failed,
            "first_token_p50_s": float(np.quantile(waits, 0.5)), "first_token_p99_s": float(np.quantile(waits, 0.99)),
        }  # fmt: skip


def best_static(client: mint.SamplingClient, vocab_size: int, sizes: Sequence[int]) -> dict[int, float]:
    """Batch size -> tokens a second of so many requests of the mean lengths of `Traffic` that come and end together."""
    found = {}
    for size in sizes:
        run = ours(Work(prompts=size, samples=1, tokens=72, own=136), vocab_size, [client])
        begun = time.perf_counter()
        found[size] = run() / (time.perf_counter() - begun)
    return found
