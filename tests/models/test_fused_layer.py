"""A layer as one C++ call against the same ops one by one: the same bits with one adapter, the same sums in company."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from check_isas import ISAS, WITH_WORDS, using
from helpers import checked, load_decoder, make_data, relative, trained_adapter
from tiny_models import build_tiny

from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.kernels import decode_words, op, op_by_op
from mint_engine.kernels.plan import own_products
from mint_engine.kv_cache import BLOCK_TOKENS, KVCache
from mint_engine.models import checkpointed, fused
from mint_engine.models.decoder import Decoder
from mint_engine.sampling_pass import Piece, prefill
from mint_engine.types import LoraConfig

pytestmark = pytest.mark.skipif(op.native is None, reason="the C++ kernels are not built")
DTYPES = [torch.float32, torch.bfloat16]


def step(
    decoder: Decoder, adapters: list[Adapter], *, forwards: int = 0, masked_logprobs: bool = True, longest: int = 40
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each call the log-probabilities and the gradients; the last ``forwards`` calls have no backward."""
    calls = []
    for i, adapter in enumerate(adapters):
        data = make_data("cross_entropy", (1, longest + i, 9), 199, seed=i)
        state = TrainState(adapter) if i < len(adapters) - forwards else None
        calls.append(Call(adapter, state, *checked(data, "cross_entropy", decoder)))
    with torch.no_grad(), own_products():
        outputs = trainer.run_together(decoder, calls, masked_logprobs=masked_logprobs)
    found = []
    for call, out in zip(calls, outputs, strict=True):
        logprobs = np.concatenate([o["logprobs"].to_numpy() for o in out.loss_fn_outputs])
        grads = torch.zeros(1) if call.state is None else call.state.grads.clone()
        found.append((torch.from_numpy(logprobs), grads))
    return found


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which layers have been done in C++, a name for each layer of each call."""
    called: list[str] = []
    for name in ("decoder_layers", "decoder_layers_backward"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, name=name, real=real: (called.extend([name] * len(a[1])), real(*a)))
    return called


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("masked_logprobs", [True, False])
def test_one_adapter_has_the_bits_of_the_ops(
    tmp_path: Path, family: str, dtype: torch.dtype, masked_logprobs: bool, layers: list[str]
) -> None:
    decoder = load_decoder(build_tiny(family, tmp_path), dtype)
    adapter = trained_adapter(decoder, LoraConfig(rank=5, seed=0))
    found = []
    for block in (nullcontext, op_by_op):
        with block():
            found.append(step(decoder, [adapter], masked_logprobs=masked_logprobs)[0])
    (logprobs, grads), (logprobs2, grads2) = found
    assert layers == ["decoder_layers"] * 3 + ["decoder_layers_backward"] * 3
    assert bool(grads.abs().max() > 0)
    assert torch.equal(grads, grads2)
    torch.testing.assert_close(logprobs, logprobs2, rtol=0, atol=0, equal_nan=True)


def test_layers_are_one_call_unless_their_memory_moves(tiny_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    adapter = trained_adapter(decoder, LoraConfig(rank=5, seed=0))
    together: list[int] = []
    for name in ("decoder_layers", "decoder_layers_backward"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, real=real: (together.append(len(a[1])), real(*a)))
    step(decoder, [adapter], longest=5)
    together.clear()
    ((_, grads),) = step(decoder, [adapter], longest=90)  # buffers grow between layers
    assert sum(together) == 6
    assert len(together) > 2
    together.clear()
    ((_, again),) = step(decoder, [adapter], longest=90)
    assert together == [3, 3]
    with op_by_op():
        ((_, by_op),) = step(decoder, [adapter], longest=90)
    assert torch.equal(grads, again)
    assert torch.equal(grads, by_op)


@pytest.mark.parametrize("isa", op.native.isas() if op.native is not None else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_the_same_on_every_instruction_set(
    tiny_tied: Path, dtype: torch.dtype, isa: str, layers: list[str]
) -> None:
    decoder, before = load_decoder(tiny_tied, dtype), op.native.isa()
    adapter = trained_adapter(decoder, LoraConfig(rank=5, seed=0))
    try:
        op.native.set_isa(isa)
        ((_, grads),) = step(decoder, [adapter])
        with op_by_op():
            ((_, grads2),) = step(decoder, [adapter])
    finally:
        op.native.set_isa(before)
    assert len(layers) == 6
    assert torch.equal(grads, grads2)


@pytest.mark.parametrize("isa", [i for i in ISAS if i in WITH_WORDS])
@pytest.mark.parametrize("ffn", [96, 112], ids=["whole panels", "half panels"])
@pytest.mark.parametrize("longest", [5, 90], ids=["few rows", "many rows"])
@pytest.mark.parametrize("ranks", [(5,), (16, 3)], ids=["one", "two"])
def test_kept_words_change_no_bit(tmp_path: Path, isa: str, ffn: int, longest: int, ranks: tuple[int, ...]) -> None:
    """Where W ends within a chunk of sums (152 pairs) they go on with the border, or are an adapter's alone."""
    decoder = load_decoder(build_tiny("qwen2", tmp_path, hidden_size=304, intermediate_size=ffn), torch.bfloat16)
    adapters = [trained_adapter(decoder, LoraConfig(rank=r, seed=r)) for r in ranks]
    with using(isa):
        expected = step(decoder, adapters, longest=longest)
        for w in decoder.borders.weights:
            w.words = decode_words(w.weight, 2 if w.group.name.endswith(".gate_up") else 1)
        found = step(decoder, adapters, longest=longest)
        for (logprobs, grads), (logprobs2, grads2) in zip(expected, found, strict=True):
            torch.testing.assert_close(logprobs, logprobs2, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(grads, grads2)
        for layer in decoder.layers:
            assert layer.qkv.words is not None
            layer.qkv.words.parts[0].zero_()
        reads = isa not in ("avx2", "avx512") or longest == 5  # their panels are widened
        assert torch.equal(step(decoder, adapters, longest=longest)[0][1], expected[0][1]) != reads


def test_threads_change_no_bit(tiny_tied: Path) -> None:
    decoder, threads = load_decoder(tiny_tied, torch.bfloat16), torch.get_num_threads()
    adapters = [trained_adapter(decoder, LoraConfig(rank=r, seed=r)) for r in (16, 5)]
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(step(decoder, adapters, longest=450))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(
            torch.equal(a, b) for one, two in zip(found[0], other, strict=True) for a, b in zip(one, two, strict=True)
        )


@pytest.mark.parametrize("train", [{"train_mlp": False}, {"train_attn": False}])
def test_what_is_not_trained_is_left_alone(tiny_tied: Path, train: dict[str, bool], layers: list[str]) -> None:
    decoder = load_decoder(tiny_tied)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0, **train))
    with op_by_op():
        ((logprobs, grads),) = step(decoder, [adapter])
    ((logprobs2, grads2),) = step(decoder, [adapter])
    assert len(layers) == 6
    assert torch.equal(grads, grads2)
    assert torch.equal(logprobs, logprobs2)


@pytest.mark.parametrize("masked_logprobs", [True, False])
@pytest.mark.parametrize(("dtype", "reordered"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_company_has_the_sums_of_the_ops(
    tiny_tied: Path, dtype: torch.dtype, reordered: float, masked_logprobs: bool, layers: list[str]
) -> None:
    """Ranks and modules of all kinds; the last call is a forward, whose rows the backward leaves out."""
    decoder = load_decoder(tiny_tied, dtype)
    kinds = [{"rank": 5}, {"rank": 16, "train_mlp": False}, {"rank": 3, "train_attn": False}, {"rank": 40}]
    adapters = [trained_adapter(decoder, LoraConfig(seed=i, **kind)) for i, kind in enumerate(kinds)]
    together = step(decoder, adapters, forwards=1, masked_logprobs=masked_logprobs)
    assert len(layers) == 6
    with op_by_op():
        by_op = step(decoder, adapters, forwards=1, masked_logprobs=masked_logprobs)
    for (logprobs, grads), (logprobs2, grads2) in zip(together, by_op, strict=True):
        torch.testing.assert_close(logprobs, logprobs2, rtol=reordered, atol=reordered, equal_nan=True)
        assert relative(grads, grads2) < reordered or not grads2.any()


def test_a_checkpointed_pass_has_the_bits_of_an_ordinary_one(
    tiny_tied: Path, layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0))
    ((_, grads),) = step(decoder, [adapter])
    hidden, hidden_backward = checkpointed.functions(decoder)
    monkeypatch.setattr(decoder, "hidden", hidden)
    monkeypatch.setattr(decoder, "hidden_backward", hidden_backward)
    ((_, again),) = step(decoder, [adapter])
    assert layers.count("decoder_layers") == 3 + 6
    assert torch.equal(grads, again)


def test_a_border_that_has_grown_is_found(tiny_tied: Path, layers: list[str]) -> None:
    decoder = load_decoder(tiny_tied)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0))
    ((_, grads),) = step(decoder, [adapter])
    decoder.borders.seat([(trained_adapter(decoder, LoraConfig(rank=128, seed=1)), 0, 1)])
    ((_, again),) = step(decoder, [adapter])
    assert len(layers) == 12
    assert torch.equal(grads, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("rank", [0, 5])
def test_prompts_over_a_cache_have_the_bits_of_the_ops(
    tmp_path: Path, family: str, dtype: torch.dtype, rank: int, layers: list[str]
) -> None:
    """Two sequences in scattered blocks, in two passes: both begin in the first, one of them goes on in the second."""
    decoder = load_decoder(build_tiny(family, tmp_path), dtype)
    adapter = trained_adapter(decoder, LoraConfig(rank=rank, seed=0)) if rank else None
    tokens = [(np.arange(70) * 11 + 5) % 199, (np.arange(40) * 7 + 3) % 199]
    found = []
    for block in (nullcontext, op_by_op):
        cache = KVCache(decoder.config, dtype, 1 << 20)
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        sequences = [cache.open(), cache.open()]
        for _ in range(2):  # their blocks take turns
            for sequence in sequences:
                cache.reserve(sequence, len(sequence.blocks) * BLOCK_TOKENS + BLOCK_TOKENS)
        cache.reserve(sequences[0], 70)
        streams = []
        for stops in ((33, 40), (70, 40)):
            pieces = [Piece(adapter, seq, t[seq.length : stop], seq.length) for seq, t, stop in
                      zip(sequences, tokens, stops, strict=True) if stop > seq.length]  # fmt: skip
            with torch.no_grad(), own_products(), block():
                every, _ = prefill(decoder, cache, pieces)
                some = torch.tensor([0, 7, len(every) - 1])
                chosen, seating = prefill(decoder, cache, pieces, some)
            assert torch.equal(chosen, every[some])
            assert all(s.stop - s.start == 3 for s in seating.segments)
            streams.append(every)
            for sequence, stop in zip(sequences, stops, strict=True):
                sequence.length = stop
        found.append((*streams, cache.k.nan_to_num(7.0), cache.v.nan_to_num(7.0)))
    assert layers == ["decoder_layers"] * 3 * 4
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_pass_over_prompts_that_breaks_off_leaves_nothing_waiting(
    tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny_tied)
    cache = KVCache(decoder.config, torch.float32, 1 << 20)
    sequence = cache.open()
    cache.reserve(sequence, 20)
    pieces = [Piece(None, sequence, np.arange(20) % 199, 0)]
    with torch.no_grad(), own_products():
        expected, _ = prefill(decoder, cache, pieces)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "decoder_layers", lambda *_: pytest.fail("no more memory"))
            with pytest.raises(pytest.fail.Exception):
                prefill(decoder, cache, pieces)
        again, _ = prefill(decoder, cache, pieces)
    assert torch.equal(again, expected)
