"""Decode steps: tokens per second at batch 1 and 64 against the time to read the weights and the cache once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import RANK, decoder
from mint_engine.adapters import Adapter
from mint_engine.gpu.decode import DecodePrograms
from mint_engine.kernels import force_face
from mint_engine.kv_cache import BLOCK_TOKENS, CachedSequence, KVCache, blocks_for
from mint_engine.sampling_pass import Piece, _step
from mint_engine.types import LoraConfig

BATCHES = {"batch 1": (1, 128), "batch 64": (64, 1024)}  # rows, tokens of context (DESIGN.md section 4)
SHARERS = 8


def decode(bench: Bench, model: str) -> dict[str, Any]:
    """Steps as the sampler takes them, tokens read on the host: the base model, one adapter and eight, in turns."""
    base = decoder(bench, model)
    adapters = [Adapter(base.groups, LoraConfig(rank=RANK, seed=i), base.device) for i in range(SHARERS)]
    base.borders.seat([(a, i, i + 1) for i, a in enumerate(adapters)])  # all there: nobody's weights move later
    weights = float(sum(w.buf.nbytes for w in base.borders.weights))
    found: dict[str, Any] = {}
    for name, (rows, context) in BATCHES.items():
        if bench.dry:
            rows, context = min(rows, 2 * SHARERS), 40
        c = base.config
        token_bytes = 2 * c.num_layers * c.num_kv_heads * c.head_dim * base.dtype.itemsize  # of K and V
        cache = KVCache(c, base.dtype, rows * blocks_for(context) * BLOCK_TOKENS * token_bytes, base.device)
        for pool in (cache.k, cache.v):
            pool.normal_()
        programs = DecodePrograms(base, cache)
        makers: dict[str, Sequence[Adapter | None]] = {"base": [None], "adapter": adapters[:1]}
        if rows >= SHARERS:
            makers["eight adapters"] = adapters
        sequences = [_sequence(cache, context) for _ in range(rows)]
        contenders = {
            who: _steps(bench, programs, cache, sequences, [of[i * len(of) // rows] for i in range(rows)])
            for who, of in makers.items()
        }
        ms = bench.walls(contenders)
        floor = bench.floor(moved=weights + rows * context * token_bytes)
        found[name] = {
            "rows": rows, "context": context, "floor_ms": floor, "of_floor": floor / ms["adapter"],
            "adapter_speed": ms["base"] / ms["adapter"],
            **{who: {"ms": took, "tokens_per_s": rows / took * 1e3} for who, took in ms.items()},
        }  # fmt: skip
        del cache, programs, contenders, pool
        bench.free()
    return found


def _sequence(cache: KVCache, context: int) -> CachedSequence:
    """One whose last token is still to come."""
    sequence = cache.open()
    cache.reserve(sequence, context)
    sequence.length = context - 1
    return sequence


def _steps(
    bench: Bench, programs: DecodePrograms, cache: KVCache, sequences: Sequence[CachedSequence],
    adapters: Sequence[Adapter | None],
) -> Callable[[], Any]:  # fmt: skip
    """The same step again and again: each sequence's last token, by its row's adapter."""
    pieces = [Piece(a, s, np.ones(1, np.int64), s.length) for a, s in zip(adapters, sequences, strict=True)]
    generator, temperatures = np.random.default_rng(0), np.ones(len(pieces), np.float32)

    def step() -> Any:
        drawn = replace(_step(cache, pieces), temperatures=temperatures, uniforms=generator.random(len(pieces)))
        with torch.no_grad(), force_face("reference") if bench.dry else nullcontext():
            tokens, logprobs = programs.draw(drawn)
        return tokens.tolist(), logprobs.tolist()

    return step
