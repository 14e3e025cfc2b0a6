"""Weights kept twice: the copy is made when somebody samples, where it fits, and changes nothing but the time."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from check_isas import WITH_WORDS
from engine_helpers import new_model, train
from helpers import load_decoder, trained_adapter

from mint_engine import kernels
from mint_engine.engine import Engine
from mint_engine.types import LoraConfig, ModelInput, SamplingParams

PROMPT = ModelInput.from_ints([5, 9, 2, 44, 7, 3])
PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=3, stop=[])

reads_words = pytest.mark.skipif(kernels.isa() not in WITH_WORDS, reason="this CPU reads no words")


def sampled(engine: Engine, base: Path) -> list[tuple[list[int], list[float] | None]]:
    """Of a trained adapter and of the base model, in company."""
    session = engine.create_session()
    model = new_model(engine, session, base)
    train(engine, model, steps=2)
    adapter = engine.save_weights_for_sampler(model).result().sampling_session_id
    assert adapter is not None
    plain = engine.create_sampler(session, base_model=str(base)).result()
    futures = [engine.sample(s, PROMPT, 3, PARAMS) for s in (adapter, plain)]
    return [(s.tokens, s.logprobs) for f in futures for s in f.result().sequences]


def opened(tmp_path: Path, weights: str | None, dtype: str = "bfloat16") -> Engine:
    return Engine(dtype=dtype, home=tmp_path / str(weights), kv_cache_bytes=1 << 22, weights=weights)


def resident(engine: Engine, base: Path) -> int:
    return engine._bases.get(str(base)).decoder.resident_bytes


def weight_bytes(engine: Engine, base: Path) -> int:
    return sum(w.weight.numel() * 2 for w in engine._bases.get(str(base)).decoder.borders.weights)


@reads_words
def test_a_copy_is_made_by_the_first_sample_and_changes_no_bit(tmp_path: Path, tiny_tied: Path) -> None:
    found = {}
    for weights in ("once", "twice"):
        engine = opened(tmp_path, weights)
        try:
            before = resident(engine, tiny_tied)
            found[weights] = sampled(engine, tiny_tied)
            grown, copy = resident(engine, tiny_tied) - before, weight_bytes(engine, tiny_tied)
            # Of these small matrices the last panel is mostly padding.
            assert grown == 0 if weights == "once" else copy <= grown < 2 * copy
        finally:
            engine.close()
    assert found["once"] == found["twice"]


@reads_words
@pytest.mark.parametrize(("memory", "kept"), [(1 << 40, True), (1 << 16, False)])
def test_by_default_it_is_made_where_it_fits(
    tmp_path: Path, tiny_tied: Path, memory: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_engine.bases.machine_bytes", lambda: memory)
    engine = opened(tmp_path, None)
    try:
        before = resident(engine, tiny_tied)
        sampled(engine, tiny_tied)
        assert (resident(engine, tiny_tied) > before) == kept
    finally:
        engine.close()


@pytest.mark.parametrize(("weights", "dtype"), [("twice", "float32"), ("int8", "bfloat16")])
def test_float32_and_int8_have_no_such_copy(tmp_path: Path, tiny_tied: Path, weights: str, dtype: str) -> None:
    engine = opened(tmp_path, weights, dtype)
    try:
        before = resident(engine, tiny_tied)
        sampled(engine, tiny_tied)
        assert resident(engine, tiny_tied) == before
        assert all(w.words is None for w in engine._bases.get(str(tiny_tied)).decoder.borders.weights)
    finally:
        engine.close()


@reads_words
def test_borders_that_grow_keep_it(tmp_path: Path, tiny_tied: Path) -> None:
    engine = opened(tmp_path, "twice")
    try:
        sampled(engine, tiny_tied)
        decoder = engine._bases.get(str(tiny_tied)).decoder
        words = [w.words for w in decoder.borders.weights]
        model = new_model(engine, engine.create_session(), tiny_tied, rank=40)
        train(engine, model)
        sampled(engine, tiny_tied)
        assert all(a is w.words for a, w in zip(words, decoder.borders.weights, strict=True))
        assert torch.equal(decoder.head.weight, decoder.embedding)
    finally:
        engine.close()


@reads_words
@pytest.mark.parametrize(("most", "kept"), [(0, 1), (1 << 30, 3)])
def test_adapters_of_the_past_are_forgotten_when_there_is_no_room(
    tmp_path: Path, tiny_tied: Path, most: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three versions are sampled in turn, twice over: the same tokens, whoever is still there."""
    monkeypatch.setattr("mint_engine.border_words.KEPT_BYTES", most)
    engine = opened(tmp_path, "twice")
    try:
        session = engine.create_session()
        model = new_model(engine, session, tiny_tied)
        samplers = []
        for _ in range(3):
            train(engine, model, steps=2)
            sampler = engine.save_weights_for_sampler(model).result().sampling_session_id
            assert sampler is not None
            samplers.append(sampler)
        found = [engine.sample(s, PROMPT, 1, PARAMS).result().sequences[0].logprobs for s in samplers * 2]
        assert found[:3] == found[3:]
        assert len({tuple(logprobs or []) for logprobs in found}) == 3
        copies = engine._bases.get(str(tiny_tied)).decoder.border_words
        assert copies is not None
        assert len(copies._copies) == kept
        assert copies.nbytes == sum(w.nbytes for c in copies._copies.values() for w in c.words if w is not None) > 0
    finally:
        engine.close()


@reads_words
def test_small_adapters_take_no_large_pages(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    decoder.keeps_words = True
    decoder.step_model()
    assert decoder.border_words is not None
    before = psutil.Process().memory_info().rss
    for seed in range(24):
        seating = decoder.borders.seat([(trained_adapter(decoder, LoraConfig(rank=4, seed=seed)), 0, 1)])
        decoder.border_words.of(seating.segments)
    assert psutil.Process().memory_info().rss - before < 16 << 20  # a page of 2 MB for each would be 48 MB
