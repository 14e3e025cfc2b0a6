"""int8 base weights: what decode steps read of them, and what they cost in quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mint_engine.engine import Engine
from mint_engine.errors import UserError
from mint_engine.kv_cache import CachedSequence, KVCache
from mint_engine.models import gguf
from mint_engine.models.config import load_config
from mint_engine.models.decoder import Decoder
from mint_engine.models.tokenizer import load_tokenizer
from mint_engine.models.weights import WeightReader
from mint_engine.sampling_pass import Piece, decode, prefill


def load(directory: Path, dtype: torch.dtype = torch.bfloat16, *, int8: bool = False) -> Decoder:
    return Decoder(load_config(directory), WeightReader(directory), dtype, int8=int8)


@torch.no_grad()
def decoded(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """log-probabilities [n, V] of decode steps over a text."""
    cache, sequence = KVCache(decoder.config, decoder.dtype, 1 << 27), CachedSequence()
    cache.reserve(sequence, len(tokens))
    return torch.log_softmax(decode(decoder, cache, [Piece(None, sequence, np.array(tokens), 0)]).double(), -1)


def test_every_weight_is_within_half_a_step_of_its_channel(tiny_tied: Path) -> None:
    plain, rounded = load(tiny_tied, torch.float32), load(tiny_tied, torch.float32, int8=True)
    for p, r in zip(plain.borders.weights, rounded.borders.weights, strict=True):
        assert r.int8 is not None
        values, scales = r.int8
        assert torch.equal(values.float() * scales[:, None], r.weight), "what everything else computes with"
        assert ((p.weight - r.weight).abs() <= 0.5001 * scales[:, None]).all()
        assert (values.abs().amax(1) == 127).all()


@torch.no_grad()
def test_decode_steps_and_prompts_see_the_same_weights(tiny_tied: Path) -> None:
    decoder = load(tiny_tied, torch.float32, int8=True)
    tokens = [(7 * i + 3) % 199 for i in range(40)]
    cache, sequence = KVCache(decoder.config, decoder.dtype, 1 << 24), CachedSequence()
    cache.reserve(sequence, len(tokens))
    h, seating = prefill(decoder, cache, [Piece(None, sequence, np.array(tokens), 0)])
    prompt = torch.log_softmax(decoder.logits(decoder.head_input(h, seating), seating).double(), -1)
    assert (prompt - decoded(decoder, tokens)).abs().max() < 5e-5


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights: expected None, 'int8', 'once' or 'twice', got 'int4'"):
        Engine(home=tmp_path, weights="int4")


@pytest.mark.slow
def test_int8_moves_a_real_model_little_more_than_bfloat16_does(smollm2_home: Path) -> None:
    """Kullback-Leibler divergence from float32, a token, on a text; kernels/decode_step/README.md has the numbers."""
    directory = gguf.smollm2_directory(smollm2_home)
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    tokens = load_tokenizer(directory).encode(text)[:400]
    exact = decoded(load(directory, torch.float32), tokens)
    kl = {
        int8: float((exact.exp() * (exact - decoded(load(directory, int8=int8), tokens))).sum(1).mean())
        for int8 in (False, True)
    }
    assert kl[False] < 1e-3
    assert kl[True] < 2e-2
